//! Rude clients against the real server: it stays, gives back what they held, and serves others meanwhile.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{qemu_io, Raw, Server};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

impl Server {
    fn of_proc(&self, what: &str) -> String {
        format!("/proc/{}/{what}", self.worker())
    }

    fn count(&self, what: &str) -> usize {
        std::fs::read_dir(self.of_proc(what)).unwrap().count()
    }

    fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(self.of_proc("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Waits until nothing is left of clients but the `open` that still are.
    fn assert_given_back(&self, before: (usize, usize), open: usize) {
        let end = Instant::now() + Duration::from_secs(15);
        loop {
            // A connection is a thread, and a socket with its second descriptor.
            let (threads, files) = (self.count("task"), self.count("fd"));
            if threads <= before.0 + open && files <= before.1 + 2 * open {
                return;
            }
            assert!(Instant::now() < end, "threads {threads}, files {files}; before: {before:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn held(&self) -> (usize, usize) {
        // The connection that `start` tried.
        std::thread::sleep(Duration::from_millis(300));
        (self.count("task"), self.count("fd"))
    }
}

/// Writes and reads back until told to stop; how often it did.
fn polite(client: &mut Raw, stop: &AtomicBool) -> u64 {
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let (offset, byte) = (round % 256 * 4096, round as u8 | 1);
        client.request(0, 1, offset, 4096, &[byte; 4096]);
        assert_eq!(client.errno(), 0);
        client.request(0, 0, offset, 4096, b"");
        assert_eq!(client.errno(), 0);
        assert_eq!(client.take(4096), [byte; 4096]);
        round += 1;
    }
    round
}

/// Runs `rudeness` while a polite client works on export a.
fn beside_a_polite_client(server: &Server, rudeness: impl FnOnce()) {
    let mut client = server.connect();
    client.enter(b"a");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| polite(&mut client, &stop));
        rudeness();
        // Served meanwhile, and once more after it.
        std::thread::sleep(Duration::from_millis(100));
        stop.store(true, Ordering::Relaxed);
        assert!(working.join().unwrap() > 10);
    });
}

/// The first words of a client that goes to export b.
fn whole_handshake() -> Vec<u8> {
    let name = b"\0\0\0\x01b";
    let contexts = [&name[..], b"\0\0\0\x01\0\0\0\x0fbase:allocation"].concat();
    let options = [(8u32, vec![]), (3, vec![]), (6, [&name[..], &[0; 2]].concat()), (10, contexts)];
    let options = options.into_iter().chain([(7, [&name[..], b"\0\x01\0\x03"].concat())]);
    let sent = options.flat_map(|(option, data)| {
        [b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), &data].concat()
    });
    3u32.to_be_bytes().into_iter().chain(sent).collect()
}

#[test]
fn handshakes_cut_anywhere() {
    let server = Server::start("cut", &["--export", "a,size=1M", "--export", "b,size=1M"]);
    let before = server.held();
    let whole = whole_handshake();
    beside_a_polite_client(&server, || {
        for cut in 0..=whole.len() {
            server.connect().send(&[&whole[..cut]]);
            // And one that stays until the server has read all of it.
            if cut % 8 == 0 {
                let mut client = server.connect();
                client.send(&[&whole[..cut]]);
                client.0.shutdown(std::net::Shutdown::Write).unwrap();
                assert!(client.is_hung_up_on(), "cut at {cut}");
            }
        }
    });
    server.assert_given_back(before, 0);
    server.end();
}

#[test]
fn ten_thousand_connections_opened_and_dropped() {
    let arguments = ["--export", "a,size=1M", "--export", "b,size=1M", "--max-connections", "40"];
    let server = Server::start("dropped", &arguments);
    let before = server.held();
    beside_a_polite_client(&server, || {
        let whole = whole_handshake();
        let storm = |from: usize| {
            for number in from..from + 2500 {
                // The listener's queue may be full for a moment.
                let Ok(socket) = std::os::unix::net::UnixStream::connect(server.socket()) else { continue };
                Raw(socket).send(&[&whole[..number % (whole.len() + 1)]]);
            }
        };
        let warm = || {
            storm(0);
            server.resident_kib()
        };
        let first = warm();
        storm(2500);
        storm(5000);
        storm(7500);
        let last = server.resident_kib();
        // What the first quarter left, allocator's leftovers included, and no more of it.
        assert!(last < first + (24 << 10), "{first} KiB after a quarter, {last} KiB in the end");
    });
    server.assert_given_back(before, 0);
    server.end();
}

#[test]
fn clients_that_vanish_in_the_midst_of_requests() {
    let server = Server::start("vanish", &["--export", "a,size=1M", "--export", "b,size=64M"]);
    let before = server.held();
    beside_a_polite_client(&server, || {
        for (command, len, data) in [
            (1, 32 << 20, &[7; 1 << 20][..]),
            (1, 4096, &[7; 4095]),
            (1, u32::MAX, &[7; 100_000]),
            (0, 32 << 20, b""),
            (7, 4096, &[0; 13]),
            (6, 64 << 20, &[0x25, 0x60]),
        ] {
            for _ in 0..20 {
                let mut client = server.connect();
                client.enter(b"b");
                client.request(0, command, 0, len, data);
            }
        }
    });
    server.assert_given_back(before, 0);
    // Of a write that never came whole, whole slices may be there, and nothing beyond what was sent.
    qemu_io(&format!("nbd+unix:///b?socket={}", server.socket().display()), &["read -P 0 1M 63M"]);
    server.end();
}

#[test]
fn slow_readers_and_slow_writers() {
    let server = Server::start("slow", &["--export", "a,size=1M", "--export", "b,size=64M"]);
    let before = server.held();
    qemu_io(&format!("nbd+unix:///b?socket={}", server.socket().display()), &["write -P 7 0 64M"]);
    let mut slow: Vec<Raw> = (0..8).map(|_| server.connect()).collect();
    for client in &mut slow {
        client.enter(b"b");
        (0..100).for_each(|_| client.request(0, 0, 0, 32 << 20, b""));
    }
    beside_a_polite_client(&server, || {
        // A request in pieces of a byte is a request.
        let mut writer = server.connect();
        writer.enter(b"b");
        let cookie = 0x1122_3344_5566_7788u64.to_be_bytes();
        let head = [&0x2560_9513u32.to_be_bytes(), &[0, 0, 0, 1][..], &cookie, &(32u64 << 20).to_be_bytes()].concat();
        for byte in [&head[..], &64u32.to_be_bytes(), &[9; 64]].concat() {
            writer.send(&[&[byte]]);
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(writer.errno(), 22, "64 bytes are no sector");
        // What it asks for is bounded by what it takes: eight of them hold their buffers and no more.
        assert!(server.resident_kib() < 160 << 10, "{} KiB", server.resident_kib());
    });
    // The slow ones are owed what they asked for, in order.
    for client in &mut slow {
        assert_eq!(client.errno(), 0);
        assert_eq!(client.take(1 << 20), vec![7; 1 << 20]);
    }
    drop(slow);
    server.assert_given_back(before, 0);
    server.end();
}
