//! `ghostswap-nbd connect` as far as it goes without the kernel's driver: its words with the real server, and what it
//! refuses. The rest is proved in guests (`scripts/vm/nbd --connect`).
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{run, Server};
use ghostswap_nbd::connect::handshake::{negotiate, read_page, Export, Failure};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

fn go(server: &Server, name: &str) -> Result<(UnixStream, Export), Failure> {
    let mut stream = UnixStream::connect(server.socket())?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let export = negotiate(&mut stream, name.as_bytes())?;
    Ok((stream, export))
}

#[test]
fn goes_to_an_export_and_knows_it_again() {
    let control = std::env::temp_dir().join(format!("ghostswap-nbd-connect-{}/control", std::process::id()));
    let control = control.to_str().unwrap();
    let exports = ["--export", "a,size=8M", "--export", "old,size=1M,ro", "--control", control];
    let server = Server::start("connect", &exports);
    let (mut stream, export) = go(&server, "a").unwrap();
    assert_eq!((export.bytes, export.min_block_bytes, export.max_payload_bytes), (8 << 20, 512, 32 << 20));
    assert!(export.can_multi_conn() && !export.is_read_only() && export.identity.is_some());
    let mut page = [1; 4096];
    read_page(&mut stream, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);

    let (_, old) = go(&server, "old").unwrap();
    assert!(old.is_read_only() && old.identity != export.identity);
    let refused = go(&server, "b").err().unwrap().to_string();
    assert_eq!(refused, "the server has no such export");

    // Another worker has the same export.
    let worker = server.worker();
    run(Command::new("kill").args(["-s", "KILL", &worker.to_string()]));
    let end = Instant::now() + Duration::from_secs(20);
    let again = loop {
        match go(&server, "a") {
            Ok((_, again)) => break again,
            Err(failure) => assert!(Instant::now() < end, "{failure}"),
        }
    };
    assert_eq!(again, export);

    // One of the same name is not the same.
    for arguments in [&["remove", "old"][..], &["add", "old,size=1M,ro"]] {
        let exports = [&["exports"], arguments, &["--control", control]].concat();
        run(Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd")).args(exports));
    }
    let (_, new) = go(&server, "old").unwrap();
    assert_eq!(Export { identity: old.identity, ..new }, old);
    assert_ne!(new.identity, old.identity);
    server.end();

    // Nor is one of another server.
    let server = Server::start("connect", &exports);
    let (_, other) = go(&server, "a").unwrap();
    assert_ne!(other.identity, export.identity);
    server.end();
}

#[test]
fn bad_usage_is_told_in_a_line() {
    let long = "x".repeat(256);
    for (arguments, code, why) in [
        (&["connect", "/dev/nbd0", "--unix", "/s"][..], 2, "--export <NAME>"),
        (&["connect", "/dev/nbd0", "--export", "a"], 2, "--unix <PATH>|--tcp <ADDR:PORT>"),
        (&["connect", "/dev/nbd0", "--export", "a", "--unix", "/s", "--tcp", "x:1"], 2, "cannot be used with"),
        (&["connect", "/dev/nbd0", "--export", "a", "--unix", "/s", "--connections", "0"], 2, "1..=16"),
        (&["connect", "/dev/nbd0", "--export", "a", "--unix", "/s", "--timeout", "9"], 2, "--connections 2"),
        (&["connect", "/dev/nbd0", "--export", &long, "--unix", "/s"], 2, "1 to 255 bytes"),
        (&["connect", "/dev/null", "--export", "a", "--unix", "/s"], 2, "/dev/nbd0"),
        (&["disconnect", "/dev/null"], 2, "/dev/nbd0"),
        (&["disconnect"], 2, "<DEVICE>"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && said.contains(why), "{arguments:?}: {output:?}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}
