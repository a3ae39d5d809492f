//! Dictionaries as a store trains, uses and drops them: that pages come back, whoever opens the arena with whatever
//! tiers; what becomes of pages whose dictionary is damaged.

#![allow(unsafe_code, reason = "what it shares with tests of recovery")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ledger;

use ghostswap::{create_arena, Error, Lane, Standby, Store, StoreConfig};
use ledger::{words, Rng, PAGE};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const TIER: &str = "ram,limit=64M,codec=zstd:1,dict=16K";
const PAGES: u64 = 3000;

fn config(tier: &str) -> StoreConfig {
    StoreConfig {
        tiers: tier.split(" + ").map(|t| t.parse().unwrap()).collect(),
        segment_bytes: Some(64 << 10),
        max_lanes: 3,
        ..StoreConfig::default()
    }
}

fn open(tier: &str, arena: &OwnedFd) -> Store {
    Store::open_arena(config(tier), arena.try_clone().unwrap()).unwrap()
}

fn content(page: u64, vocabulary: u64) -> Vec<u8> {
    let mut rng = Rng((page << 8 | vocabulary).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut out = vec![0; PAGE];
    words(vocabulary, &mut rng, &mut out);
    out
}

fn write(lane: &mut Lane, pages: std::ops::Range<u64>, vocabulary: u64) {
    pages.for_each(|page| lane.write(page * PAGE as u64, &content(page, vocabulary)).unwrap());
}

/// Compares pages; how many are lost.
fn check(store: &Store, pages: std::ops::Range<u64>, vocabulary: u64) -> u64 {
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    let mut got = vec![0; PAGE];
    let mut lost = 0;
    for page in pages {
        match lane.read(page * PAGE as u64, &mut got) {
            Ok(()) => assert!(got == content(page, vocabulary), "page {page}"),
            Err(Error::Lost { .. }) => lost += 1,
            Err(other) => panic!("page {page}: {other}"),
        }
    }
    lost
}

fn until(store: &Store, what: &str, is: impl Fn(&ghostswap::Stats) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is(&store.stats()) {
        assert!(Instant::now() < deadline, "not within a minute: {what}\n{}", store.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// By hand, as this is not to wait until a policy would. False: it is no better than what there was.
fn train(store: &Store) -> bool {
    let before = store.stats().dictionaries;
    assert!(store.train_dictionary());
    until(store, "it is trained", |s| {
        s.dictionaries.trained + s.dictionaries.refused > before.trained + before.refused
    });
    store.stats().dictionaries.trained > before.trained
}

/// There is one then, be it that one or one that was trained by itself just before.
fn trained(store: &Store) {
    assert!(train(store) || store.stats().dictionaries.trained > 0, "{}", store.stats());
}

/// Twice as many pages, the first half compressed without and the other with a dictionary.
fn filled(arena: &OwnedFd) -> Store {
    let store = open(TIER, arena);
    let volume = store.create_volume(1 << 40).unwrap();
    write(&mut volume.lane().unwrap(), 0..PAGES, 1);
    let without = store.stats().live_bytes;
    // By itself, as there is enough to learn from, and by nobody else's wish: one is all there is.
    until(&store, "it is trained", |s| s.dictionaries.trained == 1);
    write(&mut volume.lane().unwrap(), PAGES..2 * PAGES, 1);
    let stats = store.stats();
    assert!(stats.dictionaries.pages >= PAGES, "{stats}");
    assert!((stats.live_bytes - without) * 2 < without, "{without} without, then {stats}");
    store
}

#[test]
fn pages_come_back_whoever_opens_the_arena() {
    let arena = create_arena(false).unwrap();
    drop(filled(&arena));
    let mut rng = Rng(11);
    for tier in [
        TIER,
        "ram,limit=64M,codec=lz4",
        "ram,limit=64M,codec=zstd:3",
        "ram,limit=64M,codec=zstd:1,dict=off",
        "ram,limit=64M,codec=lz4 + ram,codec=zstd:3,group=64K,idle=0",
        "ram,limit=64M,codec=zstd:1,group=16K,dict=64K",
        "ram,limit=64M,codec=lz4 + ram,codec=zstd:9,group=4K,idle=1000",
        TIER,
    ] {
        let mut standby = Standby::new(config(tier), arena.try_clone().unwrap()).unwrap();
        standby.keep_up().unwrap();
        let store = standby.open().unwrap();
        assert!(store.stats().dictionaries.count > 0, "{tier}");
        assert_eq!(check(&store, 0..2 * PAGES, 1), 0, "{tier}");
        // Half of the pages die, so that survivors of both kinds go where this store's own pages go.
        let mut lane = store.open_volume(0).unwrap().lane().unwrap();
        let (die, live): (Vec<u64>, Vec<u64>) = (0..2 * PAGES).partition(|_| rng.below(2) == 0);
        die.iter().for_each(|page| lane.discard(page * PAGE as u64, PAGE as u64).unwrap());
        drop(lane);
        until(&store, "survivors are copied", |s| s.cleaned_segments > 0 || s.recompressed_segments > 0);
        live.iter().for_each(|page| assert_eq!(check(&store, *page..page + 1, 1), 0, "{tier}"));
        store.audit().unwrap();
        let mut lane = store.open_volume(0).unwrap().lane().unwrap();
        die.iter().for_each(|page| write(&mut lane, *page..page + 1, 1));
        if store.stats().dictionaries.count == 0 {
            drop((lane, store));
            // This one needed it no more; the next is to have one again.
            let again = open(TIER, &arena);
            trained(&again);
            write(&mut again.open_volume(0).unwrap().lane().unwrap(), 0..2 * PAGES, 1);
        }
    }
}

#[test]
fn another_follows_and_what_nobody_needs_is_dropped() {
    let arena = create_arena(false).unwrap();
    let store = filled(&arena);
    let volume = store.open_volume(0).unwrap();
    // Of the same pages the next ones are soon no better.
    assert!((0..6).any(|_| !train(&store)), "each better than the one before: {}", store.stats());
    write(&mut volume.lane().unwrap(), 0..2 * PAGES, 2);
    assert!(train(&store));
    write(&mut volume.lane().unwrap(), 0..2 * PAGES, 2);
    until(&store, "the first is dropped", |s| s.dictionaries.count == 1 && s.dictionaries.dropped > 0);
    assert_eq!(check(&store, 0..2 * PAGES, 2), 0);
    // Not the current one, though nothing needs it.
    volume.lane().unwrap().discard(0, volume.bytes()).unwrap();
    until(&store, "memory goes back", |s| s.live_bytes == 0);
    store.audit().unwrap();
    assert_eq!(store.stats().dictionaries.count, 1);
    assert!(store.stats().dictionaries.held_bytes < 256 << 10, "{:?}", store.stats().dictionaries);
    drop((volume, store));
    let without = open("ram,limit=64M,codec=lz4", &arena);
    until(&without, "a tier without any drops it", |s| s.dictionaries.count == 0);
    assert!(!without.train_dictionary());
    without.audit().unwrap();
}

#[test]
fn one_is_trained_once_there_is_enough() {
    let arena = create_arena(false).unwrap();
    let store = open("ram,limit=64M,codec=zstd:1", &arena);
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    until(&store, "it is trained", |s| s.dictionaries.trained == 1);
    write(&mut lane, 0..PAGES, 3);
    std::thread::sleep(Duration::from_millis(1500));
    let dictionaries = store.stats().dictionaries;
    assert_eq!((dictionaries.trained, dictionaries.refused), (1, 0), "and not again so soon");
}

/// Its pages in the arena, and what names it, one after another.
#[test]
fn with_a_damaged_dictionary_pages_are_lost_and_none_is_another() {
    for (what, at) in [("content", None), ("length", Some(2048)), ("checksum", Some(2056)), ("page", Some(2064))] {
        let arena = create_arena(false).unwrap();
        drop(filled(&arena));
        let file = File::from(arena.try_clone().unwrap());
        let word = |at: u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        assert_eq!((word(0), word(8)), (u64::from_le_bytes(*b"GHOSTSWP"), ghostswap::ARENA_VERSION));
        // Where metadata pages begin: after the table, in whole pages (docs/FORMAT.md).
        let meta_at = (69_632 + word(72) * 32).next_multiple_of(4096);
        let first_page = word(2064) & 0xffff_ffff;
        let at = at.unwrap_or(meta_at + first_page * 4096 + 1000);
        file.write_all_at(&(word(at) ^ 0x40).to_le_bytes(), at).unwrap();
        let store = open(TIER, &arena);
        let lost = check(&store, 0..2 * PAGES, 1);
        assert!((PAGES / 2..=PAGES + 64).contains(&lost), "{what}: {lost} pages lost");
        assert_eq!(store.stats().lost_pages, lost, "{what}");
        store.audit().unwrap();
        // And it goes on.
        let mut lane = store.open_volume(0).unwrap().lane().unwrap();
        write(&mut lane, 0..2 * PAGES, 1);
        trained(&store);
        write(&mut lane, 0..2 * PAGES, 1);
        assert_eq!(check(&store, 0..2 * PAGES, 1), 0, "{what}");
        assert_eq!(store.stats().lost_pages, 0, "{what}");
    }
}

#[test]
fn what_lies_on_disk_keeps_its_dictionary() {
    let dir = std::env::temp_dir().join(format!("ghostswap-dictionaries-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let tier = format!("{TIER} + file:{},size=64M,prealloc=off", dir.join("cold").display());
    let arena = create_arena(false).unwrap();
    drop(filled(&arena));
    let store = open(&tier, &arena);
    store.write_back(0).unwrap();
    until(&store, "pages go down", |s| s.disk.as_ref().is_some_and(|d| d.live_bytes > 1 << 20 && !d.writing_back));
    // Another one is current, and all that is in memory was made with it.
    let second = store.create_volume(1 << 40).unwrap();
    write(&mut second.lane().unwrap(), 0..PAGES, 2);
    assert!(train(&store));
    // By another lane: one that is open goes on in a segment of the dictionary before.
    write(&mut second.lane().unwrap(), 0..PAGES, 2);
    assert!(store.stats().dictionaries.count > 1);
    drop((second, store));
    let store = open(&tier, &arena);
    assert_eq!(check(&store, 0..2 * PAGES, 1), 0);
    assert!(store.stats().dictionaries.count > 1, "pages on disk need the first");
    store.drain_disk(true).unwrap();
    until(&store, "it is drained", |s| s.disk.as_ref().is_some_and(|d| d.used_bytes == 0));
    assert_eq!(check(&store, 0..2 * PAGES, 1), 0);
    let volume = store.open_volume(0).unwrap();
    volume.lane().unwrap().discard(0, volume.bytes()).unwrap();
    until(&store, "the first is dropped", |s| s.dictionaries.count == 1);
    store.audit().unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}
