//! A store without room: reads and discards overtake the writes that wait for some.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{Raw, Server};
use std::time::{Duration, Instant};

const ENOSPC: u32 = 28;
const PAGE: u64 = 4096;

fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed + 1;
    let words = (0..PAGE / 8).flat_map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state ^ state >> 29).to_le_bytes()
    });
    words.collect()
}

/// Fills the store with what does not compress; pages that it took.
fn fill(client: &mut Raw) -> u64 {
    for page in 0..16384 {
        client.request(0, 1, page * PAGE, 4096, &noise(page));
        let errno = client.errno();
        if errno != 0 {
            assert_eq!(errno, ENOSPC);
            return page;
        }
    }
    panic!("the store never becomes full");
}

#[test]
fn what_needs_no_room_overtakes_what_does() {
    let server = Server::start("room", &["--export", "a,size=64M", "--tier", "ram,limit=24M,codec=lz4"]);
    let mut client = server.connect();
    client.enter(b"a");
    let pages = fill(&mut client);
    assert!(pages > 1000, "{pages} pages filled it");

    // The read's reply comes first, then the refusal.
    let began = Instant::now();
    client.request(0, 1, 40 << 20, 4096, &noise(1 << 20));
    client.request(0, 0, 7 * PAGE, 4096, b"");
    assert_eq!(client.errno(), 0);
    assert!(client.take(4096) == noise(7));
    let read_after = began.elapsed();
    assert_eq!(client.errno(), ENOSPC);
    assert!(began.elapsed() >= Duration::from_millis(1900) && read_after < began.elapsed());

    // More than may be parked at once, and a write that may not be at all: each is refused, none is lost.
    (0..100u64).for_each(|number| client.request(0, 1, (41 << 20) + number * PAGE, 4096, &noise(number)));
    let large: Vec<u8> = (0..512).flat_map(noise).collect();
    client.request(0, 1, 48 << 20, large.len() as u32, &large);
    (0..101).for_each(|_| assert_eq!(client.errno(), ENOSPC));

    // Room that a discard behind them makes is theirs.
    for number in 0..32u64 {
        client.request(0, 1, (42 << 20) + number * PAGE, 4096, &noise(5000 + number));
    }
    client.request(0, 4, 0, (pages / 2 * PAGE) as u32, b"");
    (0..33).for_each(|_| assert_eq!(client.errno(), 0));
    for number in 0..32u64 {
        client.request(0, 0, (42 << 20) + number * PAGE, 4096, b"");
        assert_eq!(client.errno(), 0);
        assert!(client.take(4096) == noise(5000 + number));
    }
    // Who disconnects with writes that wait is answered first.
    let rest = fill_again(&mut client, 44 << 20);
    client.request(0, 1, 60 << 20, 4096, &noise(9));
    client.request(0, 2, 0, 0, b"");
    assert_eq!(client.errno(), ENOSPC, "after {rest} more");
    assert!(client.is_hung_up_on());
    server.end();
}

fn fill_again(client: &mut Raw, from: u64) -> u64 {
    for number in 0..4096 {
        client.request(0, 1, from + number * PAGE, 4096, &noise(100_000 + number));
        if client.errno() != 0 {
            return number;
        }
    }
    panic!("the store never becomes full again");
}

#[test]
fn what_waits_for_room_goes_with_a_client_that_hangs_up() {
    let server = Server::start("hung-up", &["--export", "a,size=64M", "--tier", "ram,limit=24M,codec=lz4"]);
    let mut stays = server.connect();
    stays.enter(b"a");
    let pages = fill(&mut stays);
    // As many as may wait at once, and more.
    for (count, at) in [(32, 40 << 20), (100, 50 << 20)] {
        let mut leaves = server.connect();
        leaves.enter(b"a");
        (0..count).for_each(|number| leaves.request(0, 1, at + number * PAGE, 4096, &noise(number)));
        std::thread::sleep(Duration::from_millis(50));
        drop(leaves);
    }
    std::thread::sleep(Duration::from_millis(200));
    stays.request(0, 4, 0, (pages / 2 * PAGE) as u32, b"");
    assert_eq!(stays.errno(), 0);
    std::thread::sleep(Duration::from_millis(200));
    for page in (0..32).map(|n| (40 << 20) / PAGE + n).chain((0..100).map(|n| (50 << 20) / PAGE + n)) {
        assert!(stays.read_page(page).iter().all(|byte| *byte == 0), "page {page} was written for nobody");
    }
    server.end();
}
