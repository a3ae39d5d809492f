//! A tier below memory that comes and goes: an arena is opened without one, with one, with another, and keeps its pages.
//! So it does when the tiers there are get other settings.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod on_disk;

use ghostswap::config::TierSettings;
use ghostswap::{create_arena, Error, Lane, Standby, Store, StoreConfig, TierConfig};
use on_disk::{check, content, wait_for, write, Dir, PAGE};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PAGES: u64 = 1500;
const RAM: &str = "ram,limit=24M";
/// Pages written at once, where they are to be compressed together.
const RUN: usize = 12;

fn without() -> StoreConfig {
    StoreConfig { tiers: vec![RAM.parse().unwrap()], segment_bytes: Some(64 << 10), ..StoreConfig::default() }
}

fn with(path: &Path) -> StoreConfig {
    StoreConfig { segment_bytes: Some(64 << 10), ..on_disk::config(path, RAM, "") }
}

fn open(config: StoreConfig, arena: &OwnedFd) -> (Store, Lane) {
    let store = Store::open_arena(config, arena.try_clone().unwrap()).unwrap();
    let volume = store.volumes().into_iter().next().unwrap_or_else(|| store.create_volume(1 << 30).unwrap());
    let lane = volume.lane().unwrap();
    (store, lane)
}

fn refusal(config: StoreConfig, arena: &OwnedFd) -> String {
    let refused = Store::open_arena(config, arena.try_clone().unwrap());
    refused.map(|_| ()).unwrap_err().to_string()
}

fn disk_live(store: &Store) -> u64 {
    store.tiers().into_iter().find(|tier| tier.name == "disk").unwrap().live_bytes
}

fn fill(store: &Store) {
    wait_for("the claim", || store.write_back(0).is_ok() && disk_live(store) > 1 << 20);
    wait_for("writing back", || !store.stats().disk.unwrap().writing_back);
}

fn drain(store: &Store) {
    store.empty_disk().unwrap();
    wait_for("draining", || store.tiers().iter().any(|tier| tier.state == "drained"));
}

/// What a file holds, where anything was written.
fn bytes_of(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn a_tier_is_added_filled_drained_and_removed_again_and_again() {
    let cycles = std::env::var("GHOSTSWAP_TIER_CYCLES").ok().map_or(12, |n| n.parse().unwrap());
    let dir = Dir::new("change");
    let arena = create_arena(false).unwrap();
    // The newest content of each page.
    let mut salts = vec![0; PAGES as usize];
    let (store, mut lane) = open(without(), &arena);
    write(&mut lane, 0..PAGES, 0);
    drop((lane, store));
    let compare = |lane: &mut Lane, salts: &[u64]| {
        (0..PAGES).for_each(|page| check(lane, page..page + 1, salts[page as usize]));
    };
    let rewrite = |lane: &mut Lane, salts: &mut [u64], salt: u64| {
        let step = salt as usize % 5 + 2;
        for page in (salt % 3..PAGES).step_by(step) {
            write(lane, page..page + 1, salt);
            salts[page as usize] = salt;
        }
    };
    for n in 0..cycles {
        // Two of them in turn; each bears what it was last.
        let path = dir.tier().with_extension((n % 2).to_string());
        let (mut store, mut lane) = open(with(&path), &arena);
        assert_eq!(disk_live(&store), 0);
        rewrite(&mut lane, &mut salts, 1000 + n);
        fill(&store);
        // While some lie there it cannot be done without.
        if n % 4 == 0 {
            drop((lane, store));
            assert!(refusal(without(), &arena).contains("open it with that tier"));
            assert!(refusal(with(&dir.tier()), &arena).contains("not the one"), "another");
            (store, lane) = open(with(&path), &arena);
        }
        compare(&mut lane, &salts);
        rewrite(&mut lane, &mut salts, 2000 + n);
        drain(&store);
        rewrite(&mut lane, &mut salts, 3000 + n);
        compare(&mut lane, &salts);
        drop(lane);
        store.audit().unwrap();
        drop(store);
        let left = bytes_of(&path);
        // Every other time the next tier comes in its place at once.
        if n % 2 == 0 {
            let (store, mut lane) = open(without(), &arena);
            assert!(store.tiers().iter().all(|tier| tier.name != "disk"));
            assert!(store.empty_disk().is_err());
            rewrite(&mut lane, &mut salts, 4000 + n);
            compare(&mut lane, &salts);
            drop(lane);
            store.audit().unwrap();
            assert!(store.stats().table_bytes <= 64 << 10, "{}", store.stats().table_bytes);
        }
        assert!(bytes_of(&path) == left, "something was written to a tier that is none any more");
    }
}

#[test]
fn codecs_groups_and_other_settings_change_again_and_again() {
    let cycles = std::env::var("GHOSTSWAP_TIER_CYCLES").ok().map_or(21, |n| n.parse().unwrap());
    let dir = Dir::new("set");
    let arena = create_arena(false).unwrap();
    let disk = format!("file:{},size=64M,prealloc=off", dir.tier().display());
    let mut tiers: Vec<TierConfig> =
        ["ram,limit=24M", "ram,codec=zstd:3,group=64K,idle=0", &disk].map(|tier| tier.parse().unwrap()).to_vec();
    let changes = [
        "ram,codec=zstd:1",
        "cold,group=16K",
        "ram,group=64K",
        "ram,codec=lz4",
        "cold,codec=zstd:9,group=64K",
        "ram,group=4K,codec=zstd:-1",
        "ram,codec=lz4",
        "cold,codec=lz4,group=32K",
        "cold,codec=zstd:3,group=64K",
    ];
    let mut salts = vec![0u64; PAGES as usize];
    for n in 0..cycles {
        let config = StoreConfig { tiers: tiers.clone(), segment_bytes: Some(64 << 10), ..StoreConfig::default() };
        let (store, lane) = open(config, &arena);
        // Two that write, each its own half of the pages, while one after another setting changes in the open store.
        let volume = store.volumes().remove(0);
        drop(lane);
        let half = salts.len() / 2;
        std::thread::scope(|scope| {
            for (i, mine) in salts.chunks_mut(half).enumerate() {
                let mut lane = volume.lane().unwrap();
                scope.spawn(move || {
                    let base = (i * half) as u64;
                    for turn in 0..3 {
                        let salt = (n + 1) * 100 + turn;
                        for first in
                            (0..mine.len()).step_by(RUN).filter(|run| n == 0 || (run / RUN + turn as usize) % 3 == 0)
                        {
                            let run = first..(first + RUN).min(mine.len());
                            let bytes: Vec<u8> =
                                run.clone().flat_map(|page| content(base + page as u64, salt)).collect();
                            lane.write((base + first as u64) * PAGE as u64, &bytes).unwrap();
                            mine[run].fill(salt);
                            let other = first * 7 % mine.len();
                            if mine[other] > 0 {
                                check(&mut lane, base + other as u64..base + other as u64 + 1, mine[other]);
                            }
                        }
                    }
                });
            }
            for (at, settings) in [
                "ram,high=30%,low=10%",
                "cold,idle=1h",
                "ram,high=auto,low=auto,limit=20M",
                "cold,idle=0",
                "ram,limit=24M,high=10%",
            ]
            .iter()
            .enumerate()
            {
                std::thread::sleep(Duration::from_millis(10 + at as u64));
                store.set_tier(&settings.parse().unwrap()).unwrap();
            }
        });
        let mut lane = volume.lane().unwrap();
        (0..PAGES).for_each(|page| check(&mut lane, page..page + 1, salts[page as usize]));
        drop((lane, volume));
        let settings: TierSettings = changes[n as usize % changes.len()].parse().unwrap();
        tiers = settings.apply(&tiers).unwrap();
        store.audit().unwrap();
        assert!(store.tiers()[0].what.ends_with("high=10%,low=auto"), "cycle {n}: {:?}", store.tiers());
        wait_for("moving down", || disk_live(&store) > 1 << 20);
    }
}

#[test]
fn what_cannot_be_a_tier_is_refused_and_nothing_is_lost() {
    let dir = Dir::new("refused");
    let arena = create_arena(false).unwrap();
    let (store, mut lane) = open(without(), &arena);
    write(&mut lane, 0..PAGES, 7);
    // By one that stands by, while the store is in use.
    let attempt = |config: StoreConfig| -> Result<Standby, Error> {
        let mut standby = Standby::new(config, arena.try_clone().unwrap())?;
        standby.try_tiers(&[])?;
        Ok(standby)
    };
    let refused = |path: &Path| attempt(with(path)).map(|_| ()).unwrap_err().to_string();
    let letter = dir.tier().with_extension("letter");
    std::fs::write(&letter, "dear all").unwrap();
    assert!(refused(&letter).contains("something else"));
    assert_eq!(bytes_of(&letter), b"dear all");
    let nowhere = PathBuf::from("/nowhere/cold");
    assert!(refused(&nowhere).contains("/nowhere/cold"));
    let taken = dir.tier().with_extension("taken");
    let other = Store::open(with(&taken)).unwrap();
    assert!(refused(&taken).contains("another store has it"));
    drop(other);
    check(&mut lane, 0..PAGES, 7);
    // One that can be is the standby's from then on, and the next store's.
    let standby = attempt(with(&dir.tier())).unwrap();
    assert!(refused(&dir.tier()).contains("another store has it"));
    drop((lane, store));
    let store = standby.open().unwrap();
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES / 2, 8);
    fill(&store);
    check(&mut lane, 0..PAGES / 2, 8);
    check(&mut lane, PAGES / 2..PAGES, 7);
    drop(lane);
    store.audit().unwrap();
}

#[test]
fn what_does_not_fit_into_memory_stays_below() {
    let dir = Dir::new("toomuch");
    let store = Store::open(on_disk::config(&dir.tier(), "ram,limit=8M", "")).unwrap();
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    write(&mut lane, 0..on_disk::PAGES, 1);
    let why = store.empty_disk().unwrap_err().to_string();
    assert!(why.contains("does not fit"), "{why}");
    assert!(store.tiers().iter().any(|tier| tier.name == "disk" && tier.state == "used"), "{:?}", store.tiers());
    lane.discard(0, on_disk::PAGES * 9 / 10 * PAGE as u64).unwrap();
    wait_for("room", || store.empty_disk().is_ok());
    wait_for("draining", || store.tiers().iter().any(|tier| tier.state == "drained"));
    check(&mut lane, on_disk::PAGES * 9 / 10..on_disk::PAGES, 1);
}

#[test]
fn an_arena_costs_no_more_for_the_room_that_it_has_below() {
    let (store, lane) = open(without(), &create_arena(false).unwrap());
    drop(lane);
    let blocks = |store: &Store| {
        let fd = store.arena_fd().try_clone_to_owned().unwrap();
        // Forgotten, not closed: that would give the arena's lock up.
        let file = std::mem::ManuallyDrop::new(std::fs::File::from(fd));
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512
    };
    let (there, stats) = (blocks(&store), store.stats());
    // The superblock, a page of volumes, a page of table.
    assert!(there <= stats.held_bytes + 4 * PAGE as u64, "{there} bytes with {} held", stats.held_bytes);
}
