//! A disk tier below a little memory: reads of memory overtake those of the disk, several of which are under way at
//! once, and what a connection may hold for them is bounded.
//!
//! A disk is slow here by being cut off: reads beyond the end of its file are refused, and tried again for a second.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{run, Raw, Server};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const EIO: u32 = 5;
/// Pages written, far more than memory holds. Behind them nothing is stored, which needs no disk.
const PAGES: u64 = 4000;
/// Of these, none is left in memory.
const OLD: u64 = 1000;

fn noise(page: u64) -> Vec<u8> {
    let mut state = page + 1;
    let words = (0..PAGE / 8).flat_map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state ^ state >> 29).to_le_bytes()
    });
    words.collect()
}

struct Below {
    server: Server,
    file: PathBuf,
}

impl Below {
    /// A server whose disk has the oldest of its pages, and whoever wrote them.
    fn start(name: &str, more: &[&str]) -> (Below, Raw) {
        let file = std::env::temp_dir().join(format!("ghostswap-below-{name}-{}", std::process::id()));
        let tier = format!("file:{},size=64M,prealloc=off", file.display());
        let arguments = ["--export", "a,size=64M", "--tier", "ram,limit=8M,codec=lz4", "--tier", &tier];
        let below = Below { server: Server::start(name, &[&arguments[..], more].concat()), file };
        let mut client = below.server.connect();
        client.enter(b"a");
        for page in 0..PAGES {
            client.request(0, 1, page * PAGE, 4096, &noise(page));
            assert_eq!(client.errno(), 0);
        }
        // What is still on its way down.
        std::thread::sleep(Duration::from_millis(500));
        (below, client)
    }

    /// Does `meanwhile` while the disk refuses all reads.
    fn cut_off(&self, meanwhile: impl FnOnce()) {
        let content = std::fs::read(&self.file).unwrap();
        let mut file = OpenOptions::new().write(true).open(&self.file).unwrap();
        file.set_len(0).unwrap();
        meanwhile();
        // From the front, so that no block is there without its content.
        file.write_all(&content).unwrap();
    }

    fn end(self) {
        self.server.end();
        std::fs::remove_file(&self.file).unwrap();
    }
}

fn read_request(cookie: u64, page: u64, pages: u64) -> Vec<u8> {
    let len = (pages * PAGE) as u32;
    let (cookie, offset) = (cookie.to_be_bytes(), (page * PAGE).to_be_bytes());
    [&0x2560_9513u32.to_be_bytes(), &[0; 4][..], &cookie, &offset, &len.to_be_bytes()].concat()
}

/// The next simple reply: whose it is, and its error.
fn reply(client: &mut Raw) -> (u64, u32) {
    let head = client.take(16);
    (u64::from_be_bytes(head[8..].try_into().unwrap()), u32::from_be_bytes(head[4..8].try_into().unwrap()))
}

fn expect_pages(client: &mut Raw, page: u64, pages: u64) {
    let want: Vec<u8> =
        if page < PAGES { (page..page + pages).flat_map(noise).collect() } else { vec![0; (pages * PAGE) as usize] };
    assert!(client.take(want.len()) == want, "something else from page {page} on");
}

/// Nothing comes for a while.
fn assert_silent(client: &mut Raw) {
    client.0.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let kind = client.0.read(&mut [0]).unwrap_err().kind();
    assert!(matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{kind}");
    client.0.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
}

#[test]
fn what_is_in_memory_overtakes_what_is_on_disk() {
    let (below, mut client) = Below::start("overtake", &[]);
    // In one piece: the server looks at what the disk has read when it has answered all of it.
    // And from every segment so little that none comes up to memory.
    let old = |n: u64| n * 37 % OLD;
    let burst = |first: u64, disk: u64, memory: u64| -> Vec<u8> {
        let from_disk = (0..disk).flat_map(|n| read_request(n, old(first + n), 1));
        from_disk.chain((0..memory).flat_map(|n| read_request(disk + n, PAGES + n, 1))).collect()
    };
    for round in 0..3 {
        client.send(&[&burst(round * 8, 8, 4)]);
        let mut order = Vec::new();
        for _ in 0..12 {
            let (cookie, errno) = reply(&mut client);
            assert_eq!(errno, 0);
            expect_pages(&mut client, if cookie < 8 { old(round * 8 + cookie) } else { PAGES + cookie - 8 }, 1);
            order.push(cookie);
        }
        assert_eq!(order[..4], [8, 9, 10, 11], "{order:?}");
        order.sort();
        assert_eq!(order, (0..12).collect::<Vec<_>>());
    }
    // A disk that takes its time keeps nobody waiting but those who want it; writes go on too. Some want what others'
    // reads bring, which fail.
    let beside: Vec<u8> = (0..16).flat_map(|n| read_request(24 + n, 300 + n, 1)).collect();
    below.cut_off(|| {
        client.send(&[&burst(24, 24, 0), &beside, &read_request(90, OLD / 2, 64)]);
        let began = Instant::now();
        for number in 0..20u64 {
            client.request(0, 1, (PAGES + 100 + number) * PAGE, 4096, &[number as u8 + 1; 4096]);
            assert_eq!(client.errno(), 0);
            client.send(&[&read_request(77, PAGES + 100 + number, 1)]);
            assert_eq!(reply(&mut client), (77, 0));
            assert!(client.take(4096) == [number as u8 + 1; 4096]);
        }
        assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
        assert_silent(&mut client);
    });
    let mut waited: Vec<u64> = Vec::new();
    for _ in 0..41 {
        let (cookie, errno) = reply(&mut client);
        assert_eq!(errno, 0, "of {cookie}");
        match cookie {
            90 => expect_pages(&mut client, OLD / 2, 64),
            24.. => expect_pages(&mut client, 300 + cookie - 24, 1),
            _ => expect_pages(&mut client, old(24 + cookie), 1),
        }
        waited.push(cookie);
    }
    waited.sort();
    assert_eq!(waited, (0..40).chain([90]).collect::<Vec<_>>());
    below.end();
}

#[test]
fn a_page_written_or_dropped_while_a_read_of_it_waits() {
    let (below, mut client) = Below::start("race", &[]);
    below.cut_off(|| {
        client.send(&[&(0..20).flat_map(|page| read_request(page, page, 1)).collect::<Vec<_>>()]);
        for page in 0..10 {
            client.request(0, 1, page * PAGE, 4096, &noise(page + 50_000));
            assert_eq!(client.errno(), 0);
        }
        client.request(0, 4, 10 * PAGE, (5 * PAGE) as u32, b"");
        assert_eq!(client.errno(), 0);
        // Whoever asks now is told of that.
        client.send(&[&read_request(70, 3, 1), &read_request(71, 12, 1)]);
        assert_eq!(reply(&mut client), (70, 0));
        assert!(client.take(4096) == noise(50_003));
        assert_eq!(reply(&mut client), (71, 0));
        assert!(client.take(4096) == [0; 4096]);
    });
    for _ in 0..20 {
        let (page, errno) = reply(&mut client);
        assert_eq!(errno, 0);
        let (got, now) = (
            client.take(4096),
            match page {
                0..10 => noise(page + 50_000),
                10..15 => vec![0; 4096],
                _ => noise(page),
            },
        );
        assert!(got == now || got == noise(page), "page {page}");
    }
    below.end();
}

#[test]
fn a_disk_that_fails_is_told_of_and_who_leaves_is_answered_first() {
    let (below, mut client) = Below::start("fails", &[]);
    let mut structured = below.server.connect();
    structured.enter_structured(8, b"a");
    File::create(&below.file).unwrap();
    let began = Instant::now();
    client.send(&[&read_request(1, 5, 1), &read_request(2, PAGES, 2), &read_request(3, 6, 3)]);
    assert_eq!(reply(&mut client), (2, 0));
    expect_pages(&mut client, PAGES, 2);
    client.request(0, 2, 0, 0, b"");
    let mut failed = [reply(&mut client), reply(&mut client)];
    failed.sort();
    assert_eq!(failed, [(1, EIO), (3, EIO)]);
    assert!(began.elapsed() > Duration::from_millis(900), "it was tried again");
    assert!(client.is_hung_up_on());
    structured.send(&[&read_request(1, 5, 1)]);
    let head = structured.take(20);
    assert_eq!(
        (&head[4..8], &head[8..16]),
        (&[0, 1, 128, 2][..], &1u64.to_be_bytes()[..]),
        "the end, an error at a place"
    );
    let told = structured.take(14);
    assert_eq!(
        (told[..4].to_vec(), told[6..].to_vec()),
        (EIO.to_be_bytes().to_vec(), (5 * PAGE).to_be_bytes().to_vec())
    );
    below.end();
}

#[test]
fn large_reads_come_back_whole_in_either_form() {
    let (below, mut client) = Below::start("large", &[]);
    client.send(&[&read_request(1, 0, 3000)]);
    assert_eq!(reply(&mut client), (1, 0));
    expect_pages(&mut client, 0, 3000);
    drop(client);
    let image: Vec<u8> = (0..PAGES).flat_map(noise).collect();
    let back = below.server.directory.join("back");
    // With structured replies, in chunks; 16 requests of 1 MiB at the disk at once.
    let options = ["--connections=1", "--requests=16", "--request-size=1048576"];
    run(Command::new("nbdcopy").args(options).arg(below.server.uri("a")).arg(&back));
    assert!(std::fs::read(&back).unwrap()[..image.len()] == image, "nbdcopy read something else");
    below.end();
}

#[test]
fn a_connection_holds_no_more_than_it_may() {
    // Half of it is for reads: one of a page, and the 32 KiB that may be read for it.
    let (below, mut client) = Below::start("few", &["--max-in-flight", "120K"]);
    below.cut_off(|| {
        client.send(&[
            &read_request(0, 1, 1),
            &read_request(1, PAGES, 1),
            &read_request(2, 2, 1),
            &read_request(3, PAGES, 1),
        ]);
        assert_eq!(reply(&mut client), (1, 0));
        expect_pages(&mut client, PAGES, 1);
        assert_silent(&mut client);
    });
    for (cookie, page) in [(0, 1), (3, PAGES), (2, 2)] {
        assert_eq!(reply(&mut client), (cookie, 0));
        expect_pages(&mut client, page, 1);
    }
    // More than may wait at all is waited for.
    client.send(&[&read_request(4, 100, 32), &read_request(5, PAGES, 1)]);
    assert_eq!(reply(&mut client), (4, 0));
    expect_pages(&mut client, 100, 32);
    assert_eq!(reply(&mut client), (5, 0));
    expect_pages(&mut client, PAGES, 1);
    below.end();

    let (below, mut client) = Below::start("none", &["--max-in-flight", "0"]);
    let mixed: Vec<u64> = (0..200).map(|n| if n % 2 == 0 { n * 31 % OLD } else { PAGES + n }).collect();
    client.send(&[&(0..).zip(&mixed).flat_map(|(n, page)| read_request(n, *page, 1)).collect::<Vec<_>>()]);
    for (number, page) in (0..).zip(mixed) {
        assert_eq!(reply(&mut client), (number, 0), "in order");
        expect_pages(&mut client, page, 1);
    }
    below.end();
    for bad in ["-1", "2G", "much"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"));
        let output = command.args(["--export", "a", "--unix", "/tmp/x", "--max-in-flight", bad]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    }
}

#[test]
fn fio_verifies_far_more_than_memory_holds() {
    let (below, client) = Below::start("fio", &[]);
    drop(client);
    let uri = format!("--uri={}", below.server.uri("a"));
    for (kind, sizes) in [("randwrite", "--bsrange=4k-64k"), ("randrw", "--bs=4k")] {
        let common =
            ["--name=x", "--ioengine=nbd", "--size=48M", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1"];
        let content =
            ["--refill_buffers", "--buffer_compress_percentage=30", "--verify_backlog=512", "--verify_state_save=0"];
        run(Command::new("fio").args(common).args(content).args([&uri, sizes, &format!("--rw={kind}")]));
    }
    below.end();
}
