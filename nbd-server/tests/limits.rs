//! Limits on clients, usage, and where the server listens.

mod common;

use common::Server;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_silent_client_is_hung_up_on() {
    let server = Server::start("silent", &["--export", "a,size=1M"]);
    let began = Instant::now();
    let mut client = server.connect();
    // A byte now and then must not prolong it.
    client.send(&[&[0]]);
    std::thread::sleep(Duration::from_secs(4));
    client.send(&[&[0]]);
    assert!(client.is_hung_up_on());
    assert!(began.elapsed() < Duration::from_secs(13), "{:?}", began.elapsed());
    server.end();
}

#[test]
fn clients_beyond_the_limit_are_refused_and_pipelined_requests_all_answered() {
    let server = Server::start("limit", &["--export", "a,size=1M", "--max-lanes", "2"]);
    // The connection that `start` tried may linger for a moment.
    std::thread::sleep(Duration::from_millis(300));
    let (mut first, mut second) = (server.connect(), server.connect());
    first.enter(b"a");
    second.enter(b"");
    // Who only asks is answered; who wants to go there is told, or hung up on where no word for it exists.
    let mut third = server.connect();
    third.greet();
    assert_eq!(third.option(6, b"\0\0\0\x01a\0\0"), 1);
    assert_eq!(third.option(7, b"\0\0\0\x01a\0\0"), 1 << 31 | 2);
    third.send(&[b"IHAVEOPT", &1u32.to_be_bytes(), &1u32.to_be_bytes(), b"a"]);
    assert!(third.is_hung_up_on());
    for number in 0..200u32 {
        first.request(0, 1, u64::from(number) * 4096, 4096, &[number as u8 + 1; 4096]);
    }
    (0..200).for_each(|_| assert_eq!(first.errno(), 0));
    (0..200u64).for_each(|number| second.request(0, 0, number * 4096, 4096, b""));
    for number in 0..200u32 {
        assert_eq!(second.errno(), 0);
        assert_eq!(second.take(4096), [number as u8 + 1; 4096]);
    }
    server.signal("USR1");
    first.request(0, 3, 0, 0, b"");
    assert_eq!(first.errno(), 0);
    server.end();
}

#[test]
fn usage_stale_sockets_and_other_servers() {
    let status = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd")).args(arguments).stdin(Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let mut server = Server::start("usage", &["--export", "a,size=1M"]);
    let socket = server.socket().display().to_string();
    for bad in [
        &["--export", "a"][..],
        &["--unix", "/tmp/x"],
        &["--unix", "/tmp/x", "--export", "a,colour=red"],
        &["--unix", "/tmp/x", "--export", "a", "--tier", "paper"],
        &["--unix", "/tmp/x", "--export", "a", "--export", "a"],
        &["--unix", "/tmp/x", "--export", "a,size=100"],
    ] {
        assert_eq!(status(bad).0, Some(2), "{bad:?}");
    }
    let (code, text) = status(&["--unix", &socket, "--export", "a,size=1M"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("another server listens"), "{text}");
    let file = server.directory.join("file");
    std::fs::write(&file, "precious").unwrap();
    assert_eq!(status(&["--unix", &file.display().to_string(), "--export", "a,size=1M"]).0, Some(1));
    assert!(file.exists());
    // Killed, it leaves its socket; the next server takes its place.
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    assert!(server.socket().exists());
    let next = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"))
        .args(["--unix", &socket, "--export", "a,size=1M"])
        .env("RUST_LOG", "off")
        .spawn()
        .unwrap();
    server.child = next;
    let end = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(10));
    }
    server.end();
}
