//! A worker's death: another takes over, and whoever connects again finds what was acknowledged.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{kill, run, Raw, Server};
use std::process::Command;
use std::time::Duration;

const PAGE: usize = 4096;

fn content(page: u64, version: u64) -> Vec<u8> {
    let mut state = page << 20 | version << 1 | 1;
    let mut bytes = vec![version as u8; PAGE];
    bytes[..PAGE / 2].chunks_exact_mut(8).for_each(|word| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        word.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
    });
    bytes
}

/// Writes until the server is gone; the last version of each page that was acknowledged.
fn write_until_it_dies(mut client: Raw, versions: &mut [u64]) {
    use std::io::{Read, Write};
    for round in 0.. {
        let page = round * 7919 % versions.len();
        let version = versions[page] + 1;
        let head = [&0x2560_9513u32.to_be_bytes()[..], &[0, 0, 0, 1], &[0; 8], &((page * PAGE) as u64).to_be_bytes()];
        let request = [&head.concat()[..], &(PAGE as u32).to_be_bytes(), &content(page as u64, version)].concat();
        let mut reply = [0; 16];
        if client.0.write_all(&request).and_then(|()| client.0.read_exact(&mut reply)).is_err() {
            // In flight: it may be there or not.
            return;
        }
        assert_eq!(reply[4..8], [0; 4], "refused");
        versions[page] = version;
    }
}

#[test]
fn what_was_acknowledged_outlives_the_worker() {
    let arguments = ["--export", "other,size=1M", "--export", "a,size=64M", "--tier", "ram,limit=64M"];
    let server = Server::start("survive", &arguments);
    let mut versions = vec![0u64; 2000];
    for death in 0..8 {
        let worker = server.worker();
        let mut client = server.connect();
        client.enter(b"a");
        std::thread::scope(|scope| {
            scope.spawn(|| write_until_it_dies(client, &mut versions));
            std::thread::sleep(Duration::from_millis(150 + 40 * death));
            kill(if death % 2 == 0 { "KILL" } else { "ABRT" }, worker);
        });
        // Connections wait for the next one.
        let mut client = server.connect();
        client.enter(b"a");
        assert_ne!(server.next_worker(worker), worker);
        for (page, version) in versions.iter().enumerate() {
            client.request(0, 0, (page * PAGE) as u64, PAGE as u32, b"");
            assert_eq!(client.errno(), 0);
            let got = client.take(PAGE);
            let is = |version| got == if version == 0 { vec![0; PAGE] } else { content(page as u64, version) };
            // The one in flight at the death may be there already.
            assert!(is(*version) || is(version + 1), "death {death}, page {page}, version {version}");
        }
        for (page, version) in versions.iter_mut().enumerate() {
            *version += 1;
            client.request(0, 1, (page * PAGE) as u64, PAGE as u32, &content(page as u64, *version));
            assert_eq!(client.errno(), 0);
        }
    }
    server.end();
}

#[test]
fn qemu_connects_again_by_itself() {
    let server = Server::start("reconnect", &["--export", "a,size=16M"]);
    let worker = server.worker();
    let image =
        format!("driver=nbd,server.type=unix,server.path={},export=a,reconnect-delay=30", server.socket().display());
    let commands = ["write -P 7 0 4M", "flush", "sleep 3000", "read -P 7 0 4M", "write -P 9 4M 1M", "read -P 9 4M 1M"];
    let mut qemu = Command::new("qemu-io");
    qemu.args(["--image-opts", &image]);
    commands.iter().for_each(|line| {
        qemu.args(["-c", line]);
    });
    std::thread::scope(|scope| {
        let said = scope.spawn(|| run(&mut qemu));
        std::thread::sleep(Duration::from_millis(1500));
        kill("KILL", worker);
        let said = said.join().unwrap();
        assert!(said.matches("read ").count() == 2 && !said.contains("failed"), "{said}");
    });
    server.end();
}

#[test]
fn without_a_supervisor_the_worker_serves_on_and_ends_in_order() {
    let mut server = Server::start("orphan", &["--export", "a,size=1M"]);
    let worker = server.worker();
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let mut client = server.connect();
    client.enter(b"a");
    client.request(0, 1, 0, PAGE as u32, &content(1, 1));
    assert_eq!(client.errno(), 0);
    client.request(0, 0, 0, PAGE as u32, b"");
    assert_eq!(client.errno(), 0);
    assert!(client.take(PAGE) == content(1, 1));
    kill("TERM", worker);
    assert!(client.is_hung_up_on());
}

#[test]
fn a_worker_that_cannot_begin_is_not_tried_again() {
    let output = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"))
        .args(["--tcp", "127.0.0.1:0", "--export", "a", "--tier", "ram,limit=900T"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{said}");
}
