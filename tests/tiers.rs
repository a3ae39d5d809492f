//! Tiers that are changed while the store is in use: the memory limit, draining, writing back by hand. What is
//! set holds for the next store on the arena too.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod on_disk;

use ghostswap::config::Limit;
use ghostswap::{create_arena, Store, StoreConfig, TierStats};
use on_disk::{check, config, wait_for, write, Dir, PAGE, PAGES};

const MIB: u64 = 1 << 20;

fn tier(store: &Store, name: &str) -> TierStats {
    store.tiers().into_iter().find(|tier| tier.name == name).unwrap()
}

#[test]
fn a_lower_limit_is_reached_by_moving_down_and_a_higher_one_refused() {
    let dir = Dir::new("limit");
    let arena = create_arena(false).unwrap();
    let config = config(&dir.tier(), "ram,limit=48M", "");
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    assert_eq!(store.stats().disk.unwrap().used_bytes, 0, "memory is enough");
    store.set_limit(Limit::Bytes(16 * MIB)).unwrap();
    wait_for("giving memory back", || store.stats().held_bytes <= 16 * MIB);
    assert!(tier(&store, "disk").live_bytes > 8 * MIB, "{:?}", store.tiers());
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, 0..PAGES, 2);
    assert!(store.stats().held_bytes <= 16 * MIB);
    for (limit, why) in [(49 * MIB, "made for"), (1 << 20, "too small")] {
        let said = store.set_limit(Limit::Bytes(limit)).unwrap_err().to_string();
        assert!(said.contains(why), "{said}");
    }
    store.set_limit(Limit::Bytes(20 * MIB)).unwrap();
    drop((lane, store));
    // For the same configuration it holds on; another one has its own say.
    let again = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    assert_eq!(again.stats().limit_bytes, 20 * MIB);
    let mut lane = again.open_volume(0).unwrap().lane().unwrap();
    check(&mut lane, 0..PAGES, 2);
    drop((lane, again));
    let other = on_disk::config(&dir.tier(), "ram,limit=40M", "");
    assert_eq!(Store::open_arena(other, arena).unwrap().stats().limit_bytes, 40 * MIB);
}

#[test]
fn without_a_disk_no_limit_is_set_that_the_pages_do_not_fit() {
    let config = StoreConfig { tiers: vec!["ram,limit=48M".parse().unwrap()], ..StoreConfig::default() };
    let store = Store::open(config).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    let why = store.set_limit(Limit::Bytes(16 * MIB)).unwrap_err().to_string();
    assert!(why.contains("needs"), "{why}");
    assert!(store.drain_disk(true).is_err() && store.write_back(0).is_err(), "there is none");
    lane.discard((PAGES / 4 * PAGE as u64) & !0x1f_ffff, 1 << 29).unwrap();
    wait_for("room", || store.set_limit(Limit::Bytes(16 * MIB)).is_ok());
    wait_for("giving memory back", || store.stats().held_bytes <= 16 * MIB);
    check(&mut lane, 0..PAGES / 5, 1);
    drop(lane);
    store.audit().unwrap();
}

#[test]
fn a_drained_disk_is_empty_and_stays_so() {
    let dir = Dir::new("drain");
    let arena = create_arena(false).unwrap();
    let config = config(&dir.tier(), "ram,limit=48M", "");
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    store.write_back(0).unwrap();
    wait_for("writing back", || !store.stats().disk.unwrap().writing_back);
    let disk = tier(&store, "disk");
    assert!(disk.live_bytes > 24 * MIB && tier(&store, "ram").live_bytes < MIB, "{:?}", store.tiers());
    // Nothing is as old as that.
    write(&mut lane, 0..PAGES / 2, 2);
    let before = tier(&store, "ram").live_bytes;
    store.write_back(3600).unwrap();
    wait_for("writing nothing back", || !store.stats().disk.unwrap().writing_back);
    assert!(tier(&store, "ram").live_bytes >= before);
    // What is read in a row comes up again, as far as memory has room.
    check(&mut lane, 0..PAGES / 2, 2);
    check(&mut lane, PAGES / 2..PAGES, 1);

    store.drain_disk(true).unwrap();
    assert!(store.write_back(0).is_err(), "there and back");
    wait_for("draining", || tier(&store, "disk").state == "drained");
    assert_eq!(tier(&store, "disk").live_bytes, 0);
    check(&mut lane, 0..PAGES / 2, 2);
    check(&mut lane, PAGES / 2..PAGES, 1);
    drop((lane, store));
    let store = Store::open_arena(config, arena).unwrap();
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES / 2, 3);
    assert_eq!(tier(&store, "disk").state, "drained", "as the store before left it");
    store.drain_disk(false).unwrap();
    store.write_back(0).unwrap();
    wait_for("writing back again", || tier(&store, "disk").live_bytes > 8 * MIB);
    check(&mut lane, 0..PAGES / 2, 3);
    check(&mut lane, PAGES / 2..PAGES, 1);
    drop(lane);
    wait_for("rest", || !store.stats().disk.unwrap().writing_back);
    store.audit().unwrap();
}

#[test]
fn draining_takes_no_memory_that_writes_need() {
    let dir = Dir::new("full");
    let store = Store::open(config(&dir.tier(), "ram,limit=8M", "")).unwrap();
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    store.drain_disk(true).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    let disk = tier(&store, "disk");
    assert!(disk.state == "being drained" && disk.live_bytes > 12 * MIB, "{disk:?}");
    // What is dropped makes room, and so do pages that are written in the place of those below.
    lane.discard(0, PAGES * 9 / 10 * PAGE as u64).unwrap();
    wait_for("draining", || tier(&store, "disk").state == "drained");
    check(&mut lane, PAGES * 9 / 10..PAGES, 1);
}
