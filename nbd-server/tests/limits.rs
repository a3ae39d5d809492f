//! Limits on clients, usage, and where the server listens.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{run, Raw, Server};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
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
    let worker = server.worker().to_string();
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    run(Command::new("kill").args(["-s", "KILL", &worker]));
    while UnixStream::connect(&socket).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
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

#[test]
fn idle_clients_and_those_that_do_not_take_their_replies_give_their_lane_back() {
    let server = Server::start("idle", &["--export", "a,size=64M", "--max-lanes", "1", "--idle-time", "1"]);
    let mut idle = server.connect();
    idle.enter(b"a");
    let began = Instant::now();
    assert!(idle.is_hung_up_on());
    assert!(began.elapsed() >= Duration::from_millis(900) && began.elapsed() < Duration::from_secs(10));
    // More replies than the socket holds, none of them taken.
    let mut lazy = server.enter_when_a_lane_is_free();
    (0..64).for_each(|_| lazy.request(0, 0, 0, 8 << 20, b""));
    std::thread::sleep(Duration::from_secs(3));
    let mut next = server.enter_when_a_lane_is_free();
    // Who keeps talking is not idle, however slowly.
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(500));
        next.request(0, 3, 0, 0, b"");
        assert_eq!(next.errno(), 0);
    }
    drop(lazy);
    server.end();
}

#[test]
fn connections_beyond_the_limit_are_closed_at_once() {
    let arguments = ["--export", "a,size=1M", "--max-connections", "3", "--handshake-time", "2"];
    let server = Server::start("connections", &arguments);
    std::thread::sleep(Duration::from_millis(300));
    let mut kept: Vec<Raw> = (0..3).map(|_| server.connect()).collect();
    kept.iter_mut().for_each(Raw::greet);
    assert_eq!(server.connect().0.read(&mut [0]).unwrap_or(0), 0);
    // They have come to nothing, and are gone when their time is over.
    std::thread::sleep(Duration::from_secs(3));
    server.connect().enter(b"a");
    server.end();
}

/// A server that tells where it listens, in its log.
fn start_and_read_log(command: &mut Command) -> (Child, Vec<String>) {
    let mut child = command.env("RUST_LOG", "info").stderr(Stdio::piped()).spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let mut told = Vec::new();
    for line in log.lines() {
        let line = line.unwrap();
        let Some((_, place)) = line.split_once("serving at ") else { continue };
        told.push(place.to_owned());
        if !place.starts_with("tcp ") {
            break;
        }
    }
    (child, told)
}

fn end(mut child: Child) {
    run(Command::new("kill").args(["-s", "TERM", &child.id().to_string()]));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn tcp_connections_are_kept_alive() {
    let socket = std::env::temp_dir().join(format!("ghostswap-nbd-tcp-{}", std::process::id()));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"));
    command.args(["--tcp", "127.0.0.1:0", "--export", "a,size=1M", "--unix"]).arg(&socket);
    let (child, told) = start_and_read_log(&mut command);
    let address = told[0].strip_prefix("tcp ").unwrap().to_owned();
    let info = run(Command::new("nbdinfo").args(["--size", &format!("nbd://{address}/a")]));
    assert_eq!(info.trim(), (1 << 20).to_string());
    let mut client = TcpStream::connect(&address).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(&[&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &[0; 4]].concat()).unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    // The kernel's own table: local and remote port in hexadecimal, and 02 for a running keepalive timer.
    let port = |address: std::net::SocketAddr| format!(":{:04X}", address.port());
    let (own, its) = (port(client.local_addr().unwrap()), port(client.peer_addr().unwrap()));
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let server_side = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = server_side.into_iter().find(|line| line[1].ends_with(&its) && line[2].ends_with(&own)).unwrap();
    assert!(line[5].starts_with("02:"), "{line:?}");
    end(child);
    // The socket that it made is gone with it, and another server may have the port at once.
    assert!(!socket.exists());
    TcpListener::bind(&address).unwrap();
}

#[test]
fn systemd_may_listen_for_it() {
    let directory = std::env::temp_dir().join(format!("ghostswap-nbd-activated-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("s");
    let activated = |socket: OwnedFd| {
        // What systemd does: the socket as descriptor 3, and whom it is for.
        let script = r#"exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_FDNAMES=pool LISTEN_PID=$$; exec "$@""#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_ghostswap-nbd"), "--export", "a,size=1M"]);
        command.stdin(socket);
        command
    };
    let listener = UnixListener::bind(&path).unwrap();
    // As systemd leaves it.
    listener.set_nonblocking(true).unwrap();
    let (child, told) = start_and_read_log(&mut activated(listener.into()));
    assert_eq!(told, ["systemd's socket pool"]);
    let uri = format!("nbd+unix:///a?socket={}", path.display());
    assert_eq!(run(Command::new("nbdinfo").args(["--size", &uri])).trim(), (1 << 20).to_string());
    end(child);
    assert!(path.exists(), "it removed what it did not make");
    // A socket that does not listen: Accept=yes, say.
    let refused = activated(UnixStream::pair().unwrap().0.into()).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("Accept=no"), "{text}");
    std::fs::remove_dir_all(&directory).unwrap();
}
