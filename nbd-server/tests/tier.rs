//! Our own server as the tier below another store, with deaths of its worker.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{run, Server};
use ghostswap::{Lane, Store, StoreConfig};
use std::process::Command;
use std::time::Duration;

const PAGE: u64 = 4096;
const PAGES: u64 = 12_000;

/// Half noise.
fn content(page: u64, salt: u64) -> Vec<u8> {
    let mut state = page << 8 | salt;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state ^ state >> 29).to_le_bytes()
    };
    (0..PAGE / 8).flat_map(|n| if n % 2 == 0 { next() } else { [7; 8] }).collect()
}

fn write(lane: &mut Lane, salt: u64) {
    (0..PAGES).for_each(|page| lane.write(page * PAGE, &content(page, salt)).unwrap());
}

fn check(lane: &mut Lane, salt: u64) {
    let mut got = vec![0; PAGE as usize];
    for page in 0..PAGES {
        lane.read(page * PAGE, &mut got).unwrap();
        assert!(got == content(page, salt), "page {page}");
    }
}

#[test]
fn one_store_below_another() {
    let server = Server::start("tier", &["--export", "cold,size=128M", "--tier", "ram,limit=256M,codec=lz4"]);
    let below = format!("nbd:nbd+unix:///cold?socket={},size=96M", server.socket().display());
    let tiers = ["ram,limit=8M", &below].map(|tier| tier.parse().unwrap()).to_vec();
    let store = Store::open(StoreConfig { tiers, ..StoreConfig::default() }).unwrap();
    let volume = store.create_volume(1 << 30).unwrap();
    let mut lane = volume.lane().unwrap();
    write(&mut lane, 1);
    check(&mut lane, 1);
    // Its worker dies, and is followed by another that has the same pages.
    std::thread::scope(|scope| {
        let mut second = volume.lane().unwrap();
        let reads = scope.spawn(move || check(&mut second, 1));
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            run(Command::new("kill").args(["-s", "KILL", &server.worker().to_string()]));
        }
        reads.join().unwrap();
    });
    write(&mut lane, 2);
    check(&mut lane, 2);
    lane.discard(0, 1 << 30).unwrap();
    drop(lane);
    let disk = || store.stats().disk.unwrap();
    while disk().used_bytes > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((disk().write_errors, disk().read_errors, disk().corrupt), (0, 0, 0), "{:?}", disk());
    store.audit().unwrap();
    drop((volume, store));
    server.end();
}
