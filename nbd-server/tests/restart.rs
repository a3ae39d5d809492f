//! A server whose processes are all gone, started again on what its service manager kept. The manager is this test: it
//! takes descriptors as systemd does (FDSTORE), and passes them as systemd does (LISTEN_FDS). With systemd itself:
//! `scripts/vm/nbd-systemd`.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{is_running, kill, Server};
use rustix::net::{recvmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ghostswap-nbd");
const CONTENT: [u8; 4096] = [0x5a; 4096];

/// What the server has its manager keep until it says that it is ready, by name.
fn kept_by(manager: &UnixDatagram) -> Vec<(String, OwnedFd)> {
    let mut kept = Vec::new();
    loop {
        let (mut words, mut space) = ([0; 512], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got =
            recvmsg(manager, &mut [IoSliceMut::new(&mut words)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        let words = String::from_utf8_lossy(&words[..got.bytes]).into_owned();
        if words == "READY=1" {
            return kept;
        }
        let name = words.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap().to_owned();
        assert!(words.contains("FDSTORE=1"), "{words}");
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                kept.extend(rights.map(|descriptor| (name.clone(), descriptor)));
            }
        }
    }
}

/// Starts a server that is passed three descriptors.
fn start_with(kept: Vec<(String, OwnedFd)>, directory: &Path, arguments: &[&str]) -> Server {
    let names: Vec<String> = kept.iter().map(|(name, _)| name.clone()).collect();
    let [first, second, third] =
        <[OwnedFd; 3]>::try_from(kept.into_iter().map(|(_, fd)| fd).collect::<Vec<_>>()).unwrap();
    let script = "exec 3<&0 4<&1 5<&2 0</dev/null 1>/dev/null 2>\"$0\"; export LISTEN_PID=$$ LISTEN_FDS=3; exec \"$@\"";
    let child = Command::new("sh")
        .args(["-c", script])
        .arg(directory.join("log"))
        .arg(PROGRAM)
        .args(arguments)
        .env("LISTEN_FDNAMES", names.join(":"))
        .stdin(Stdio::from(first))
        .stdout(Stdio::from(second))
        .stderr(Stdio::from(third))
        .spawn()
        .unwrap();
    let server = Server { child, directory: directory.to_path_buf() };
    let end = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(server.socket()).is_err() {
        assert!(Instant::now() < end, "{}", std::fs::read_to_string(directory.join("log")).unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
    server
}

fn exports(arguments: &[&str], control: &str) -> String {
    let all = [&["exports"], arguments, &["--control", control]].concat();
    common::run(Command::new(PROGRAM).args(all))
}

/// Name, size, quota and identity of each.
fn list(control: &str) -> Vec<[serde_json::Value; 4]> {
    let all: serde_json::Value = serde_json::from_str(&exports(&["list", "--json"], control)).unwrap();
    let keys = ["name", "size_bytes", "quota_bytes", "identity"];
    all["exports"].as_array().unwrap().iter().map(|export| keys.map(|key| export[key].clone())).collect()
}

#[test]
fn all_processes_die_and_what_the_manager_kept_is_served_again() {
    let directory = Server::directory("restart");
    std::fs::create_dir_all(&directory).unwrap();
    let (socket, control) =
        (directory.join("s").display().to_string(), directory.join("control").display().to_string());
    let notify = directory.join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The only test of this program.
    std::env::set_var("NOTIFY_SOCKET", &notify);
    let first = ["--control", &control, "--export", "a,size=8M", "--export", "b,size=8M"];
    let mut server = Server::start("restart", &first);
    let kept = kept_by(&manager);
    exports(&["add", "late,size=1M,quota=64K"], &control);
    let before = list(&control);
    for (page, export) in [&b"a"[..], b"b", b"late"].into_iter().enumerate() {
        let mut client = server.connect();
        client.enter(export);
        client.write_page(page as u64, &CONTENT);
    }
    let processes = [server.child.id(), server.worker(), server.await_standby()];
    processes.into_iter().for_each(|process| kill("KILL", process));
    server.child.wait().unwrap();
    // As a manager does before it starts the next.
    while processes.into_iter().any(is_running) {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::mem::forget(server);

    // Another command line: a is larger, b smaller, and c is new.
    let second = ["--export", "a,size=16M,quota=1M", "--export", "b,size=4M", "--export", "c,size=1M"];
    let all = [&["--unix", &socket, "--control", &control], &second[..]].concat();
    let server = start_with(kept, &directory, &all);
    assert!(kept_by(&manager).is_empty(), "it has them already");
    let after = list(&control);
    let (mib, none) = (1u64 << 20, serde_json::Value::Null);
    let identity = |which: usize| before[which][3].clone();
    assert_eq!(after[0], ["a".into(), (16 * mib).into(), mib.into(), identity(0)]);
    assert_eq!(after[1], ["b".into(), (8 * mib).into(), none, identity(1)]);
    assert_eq!(after[2], ["late".into(), mib.into(), (64u64 << 10).into(), identity(2)]);
    assert!(after.len() == 4 && after[3][0] == "c", "{after:?}");
    for (page, export) in [&b"a"[..], b"b", b"late"].into_iter().enumerate() {
        let mut client = server.connect();
        client.enter(export);
        assert!(client.read_page(page as u64) == CONTENT, "{export:?}");
    }
    let mut grown = server.connect();
    grown.enter(b"a");
    assert!(grown.read_page(3000) == [0; 4096]);
    let log = std::fs::read_to_string(directory.join("log")).unwrap();
    assert!(log.contains("no option names it, and it is kept") && log.contains("it keeps its size"), "{log}");
    server.end();
}
