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

fn set(store: &Store, text: &str) -> Result<(), String> {
    store.set_tier(&text.parse().unwrap()).map_err(|e| e.to_string())
}

#[test]
fn marks_say_how_much_stays_in_memory_but_not_while_the_disk_is_drained() {
    let dir = Dir::new("marks");
    let arena = create_arena(false).unwrap();
    let with = |ram: &str| config(&dir.tier(), ram, "");
    let open = |ram: &str| Store::open_arena(with(ram), arena.try_clone().unwrap()).unwrap();
    let store = open("ram,limit=48M");
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    assert_eq!(store.stats().disk.unwrap().used_bytes, 0, "memory is enough");
    assert!(tier(&store, "ram").what.ends_with("high=auto,low=auto"), "{:?}", store.tiers());
    set(&store, "ram,high=40%,low=20%").unwrap();
    let in_memory = |store: &Store| tier(store, "ram").live_bytes;
    wait_for("moving down", || in_memory(&store) <= 48 * MIB / 5);
    assert!(in_memory(&store) > 48 * MIB / 8, "no more than to the lower mark: {:?}", store.tiers());
    check(&mut lane, 0..PAGES, 1);
    for (bad, why) in [("ram,low=40%", "below"), ("cold,idle=5", "no second"), ("ram,codec=zstd:1", "opened anew")] {
        let said = set(&store, bad).unwrap_err();
        assert!(said.contains(why), "{said}");
    }
    // All or nothing.
    assert!(set(&store, "ram,high=90%,limit=49M").unwrap_err().contains("made for"));
    assert!(tier(&store, "ram").what.ends_with("high=40%,low=20%"), "{:?}", store.tiers());
    drop((lane, store));

    let store = open("ram,limit=48M");
    assert!(tier(&store, "ram").what.ends_with("high=40%,low=20%"), "as it was set: {:?}", store.tiers());
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    store.empty_disk().unwrap();
    wait_for("draining", || tier(&store, "disk").state == "drained");
    check(&mut lane, 0..PAGES, 1);
    store.drain_disk(false).unwrap();
    wait_for("moving down again", || in_memory(&store) <= 48 * MIB / 5);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, 0..PAGES, 2);
    set(&store, "ram,high=auto,low=auto,limit=40M").unwrap();
    assert_eq!(
        (tier(&store, "ram").what.as_str(), tier(&store, "ram").limit_bytes),
        ("codec=lz4,group=4K,high=auto,low=auto", 40 * MIB)
    );
    drop(lane);
    store.audit().unwrap();
    drop(store);
    // Another configuration has its own say.
    let store = open("ram,limit=48M,high=93%,low=1%");
    assert!(tier(&store, "ram").what.ends_with("high=93%,low=1%"), "{:?}", store.tiers());
    assert_eq!(tier(&store, "ram").limit_bytes, 40 * MIB);
}

#[test]
fn a_second_tier_takes_other_settings_at_once() {
    let arena = create_arena(false).unwrap();
    let tiers = ["ram,limit=48M", "ram,codec=zstd:3,group=64K,idle=1h"].map(|tier| tier.parse().unwrap()).to_vec();
    let config = StoreConfig { tiers, ..StoreConfig::default() };
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES / 2, 1);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(store.stats().recompressed_segments, 0);
    set(&store, "cold,idle=0,cpu=100%").unwrap();
    wait_for("compressing again", || tier(&store, "cold").live_bytes > 4 * MIB);
    check(&mut lane, 0..PAGES / 2, 1);
    // Of its own, what the first is to have no more: together no more than the arena was made for.
    assert!(set(&store, "cold,limit=8M").unwrap_err().contains("made for"));
    set(&store, "ram,limit=32M").unwrap();
    set(&store, "cold,limit=8M,idle=7").unwrap();
    let limits = |store: &Store| ["ram", "cold"].map(|name| tier(store, name).limit_bytes / MIB);
    assert_eq!((limits(&store), store.stats().limit_bytes), ([32, 8], 40 * MIB));
    set(&store, "ram,limit=36M").unwrap();
    drop((lane, store));
    let store = Store::open_arena(config, arena).unwrap();
    assert_eq!((limits(&store), store.stats().limit_bytes), ([36, 8], 44 * MIB));
    assert_eq!(tier(&store, "cold").what, "codec=zstd:3,group=64K,idle=7s,cpu=100%");
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    check(&mut lane, 0..PAGES / 2, 1);
    drop(lane);
    store.audit().unwrap();
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
