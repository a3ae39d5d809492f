//! A disk tier below a little memory: what goes down comes back, also by another store, and what is
//! damaged there is found.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod on_disk;

use ghostswap::{create_arena, Error, Placement, Store, StoreConfig, Volume};
use on_disk::{check, config, content, wait_for, write, Dir, PAGE, PAGES};
use std::os::unix::fs::FileExt;

#[test]
fn more_than_memory_holds_comes_back() {
    for (ram, options) in [("ram,limit=8M", ""), ("ram,limit=8M,codec=zstd,group=16K", ",encrypt=off")] {
        let dir = Dir::new("down");
        let store = Store::open(config(&dir.tier(), ram, options)).unwrap();
        let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
        write(&mut lane, 0..PAGES, 1);
        let stats = store.stats();
        let disk = stats.disk.clone().unwrap();
        assert!(stats.held_bytes <= 8 << 20 && disk.live_bytes > 12 << 20, "{stats}");
        check(&mut lane, 0..PAGES, 1);
        check(&mut lane, (0..PAGES).step_by(7), 1);
        // Several pages to a request, and parts of pages.
        let mut buf = vec![0; 23 * PAGE + 512];
        for first in (0..PAGES - 40).step_by(997) {
            lane.read(first * PAGE as u64 + 1024, &mut buf).unwrap();
            let whole: Vec<u8> = (first..first + 25).flat_map(|p| content(p, 1)).collect();
            assert!(buf == whole[1024..1024 + buf.len()], "from page {first}");
        }
        lane.write(5 * PAGE as u64 + 512, &[7; 1024]).unwrap();
        let mut want = content(5, 1);
        want[512..1536].fill(7);
        let mut got = vec![0; PAGE];
        lane.read(5 * PAGE as u64, &mut got).unwrap();
        assert!(got == want, "a part of a page that was on disk is written");
        // All anew, and all of it dies: everything is given back.
        write(&mut lane, 0..PAGES, 2);
        check(&mut lane, 0..PAGES, 2);
        lane.discard(0, 1 << 40).unwrap();
        drop(lane);
        wait_for("giving the disk back", || store.stats().disk.unwrap().used_bytes == 0);
        store.audit().unwrap();
    }
}

/// As when an area is swapped off: pages come back one by one, and go.
#[test]
fn what_is_asked_for_page_by_page_comes_up_as_a_whole() {
    let dir = Dir::new("promote");
    let store = Store::open(config(&dir.tier(), "ram,limit=24M", "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    write(&mut lane, 20_000..26_000, 2);
    wait_for("moving down", || store.stats().disk.unwrap().live_bytes > 12 << 20);
    // Hardly anything comes up while memory is short: what moving down left of room.
    check(&mut lane, 0..300, 1);
    let disk = store.stats().disk.unwrap();
    assert!(disk.promoted_segments <= 8, "{disk:?}");
    lane.discard(20_000 * PAGE as u64, 6000 * PAGE as u64).unwrap();
    wait_for("memory", || store.stats().held_bytes < 20 << 20);
    let disk = || store.stats().disk.unwrap();
    let before = disk();
    for first in (0..PAGES).step_by(100) {
        check(&mut lane, first..first + 100, 1);
        lane.discard(first * PAGE as u64, 100 * PAGE as u64).unwrap();
        // The kernel takes a while for each page too.
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let after = disk();
    assert!(after.promoted_segments > 20, "{after:?}");
    assert!(after.fetches - before.fetches < PAGES / 4, "{after:?}");
    drop(lane);
    wait_for("giving the disk back", || disk().used_bytes == 0);
    store.audit().unwrap();
}

#[test]
fn half_dead_extents_make_room_for_others() {
    let dir = Dir::new("compact");
    let store = Store::open(config(&dir.tier(), "ram,limit=8M", "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    // Some 45 MB, of which every other page dies; then as much again, which only fits in their place.
    write(&mut lane, 0..18_000, 1);
    (0..18_000).step_by(2).for_each(|p| lane.discard(p * PAGE as u64, PAGE as u64).unwrap());
    write(&mut lane, 30_000..39_000, 2);
    (30_000..39_000).step_by(2).for_each(|p| lane.discard(p * PAGE as u64, PAGE as u64).unwrap());
    write(&mut lane, 40_000..49_000, 3);
    check(&mut lane, (1..18_000).step_by(2), 1);
    check(&mut lane, (30_001..39_000).step_by(2), 2);
    check(&mut lane, 40_000..49_000, 3);
    let disk = store.stats().disk.unwrap();
    assert!(disk.compacted_segments > 0, "{disk:?}");
    drop(lane);
    store.audit().unwrap();
}

#[test]
fn another_store_finds_what_went_down() {
    let dir = Dir::new("again");
    let arena = create_arena(false).unwrap();
    let config = on_disk::config(&dir.tier(), "ram,limit=8M", "");
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    drop((lane, store));
    // An arena whose pages went to disk is not opened without it, nor with another's.
    let bare = StoreConfig { tiers: vec!["ram,limit=8M".parse().unwrap()], ..StoreConfig::default() };
    let why = Store::open_arena(bare, arena.try_clone().unwrap()).err().unwrap().to_string();
    assert!(why.contains("disk tier"), "{why}");
    let other = Dir::new("other");
    drop(Store::open(on_disk::config(&other.tier(), "ram,limit=8M", "")).unwrap());
    let wrong = on_disk::config(&other.tier(), "ram,limit=8M", "");
    let why = Store::open_arena(wrong, arena.try_clone().unwrap()).err().unwrap().to_string();
    assert!(why.contains("not the one"), "{why}");
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES / 2, 2);
    check(&mut lane, 0..PAGES / 2, 2);
    check(&mut lane, PAGES / 2..PAGES, 1);
    let why = Store::open(config).err().unwrap().to_string();
    assert!(why.contains("another store has it"), "{why}");
    drop(lane);
    store.audit().unwrap();
}

#[test]
fn damage_is_found_and_is_one_pages_own() {
    for options in ["", ",encrypt=off"] {
        let dir = Dir::new("damage");
        let store = Store::open(config(&dir.tier(), "ram,limit=8M", options)).unwrap();
        let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
        write(&mut lane, 0..PAGES, 1);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(dir.tier()).unwrap();
        // Nothing that can be recognised, if it is encrypted: half of a page is its number's low byte.
        let mut all = vec![0; 64 << 20];
        let n = file.read_at(&mut all, 0).unwrap();
        let readable = all[4096..n].windows(64).any(|w| w[0] != 0 && w.iter().all(|b| *b == w[0]));
        assert!(!readable, "lz4 leaves no run of one byte, AES nothing at all");
        let mut byte = [0];
        for at in (8192 + 100..20 << 20).step_by(1 << 20) {
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
        let (mut damaged, mut buf) = (0, vec![0; PAGE]);
        for page in 0..PAGES {
            match lane.read(page * PAGE as u64, &mut buf) {
                Ok(()) => assert!(buf == content(page, 1), "page {page}"),
                Err(Error::Corrupt { page: named, .. }) if u64::from(named) == page => damaged += 1,
                Err(e) => panic!("page {page}: {e}"),
            }
        }
        assert!((10..200).contains(&damaged), "{damaged} pages damaged");
        assert_eq!(store.stats().disk.unwrap().corrupt, damaged);
        // A page that is written anew is well again.
        write(&mut lane, 0..PAGES, 2);
        check(&mut lane, 0..PAGES, 2);
    }
}

/// As the kernel's readahead asks: each page alone, in the order in which they were written out.
#[test]
fn what_lies_beside_comes_along_and_at_random_nothing_does() {
    let dir = Dir::new("beside");
    let store = Store::open(config(&dir.tier(), "ram,limit=8M", "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    let disk = || store.stats().disk.unwrap();
    let before = disk();
    check(&mut lane, 0..4000, 1);
    let (reads, beside) = (disk().fetches - before.fetches, disk().beside_pages - before.beside_pages);
    assert!(beside > 3 * reads && reads + beside <= 4000 && beside > 2000, "{beside} pages with {reads} reads");
    // No more than a page needs, once that has proved to be of no use.
    let scattered = |n: u64| (n * 7919 + 13) % 4000;
    check(&mut lane, (0..100).map(scattered), 1);
    let before = disk();
    check(&mut lane, (100..900).map(scattered), 1);
    let (reads, bytes) = (disk().fetches - before.fetches, disk().fetched_bytes - before.fetched_bytes);
    assert!(bytes / reads <= 9000, "{bytes} bytes in {reads} reads");
}

/// One volume in memory only, one below at once, one as it comes; cleaning keeps them apart, and so does another store.
#[test]
fn volumes_lie_where_they_may() {
    let dir = Dir::new("placement");
    let arena = create_arena(false).unwrap();
    let config = on_disk::config(&dir.tier(), "ram,limit=24M", "");
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let volumes: Vec<_> = (0..3).map(|_| store.create_volume(1 << 30).unwrap()).collect();
    let place = |volumes: &[Volume]| {
        volumes[0].set_placement(Placement::Memory).unwrap();
        volumes[1].set_placement(Placement::Below).unwrap();
    };
    place(&volumes);
    let mut lanes: Vec<_> = volumes.iter().map(|v| v.lane().unwrap()).collect();
    write(&mut lanes[0], 0..2000, 1);
    write(&mut lanes[1], 0..2000, 2);
    wait_for("moving down", || volumes[1].held().unwrap().memory_bytes < 1 << 20);
    assert_eq!(volumes[0].held().unwrap().disk_bytes, 0, "memory is not short, and it would not go");
    // Memory gets short, and much of each dies.
    write(&mut lanes[2], 0..PAGES, 3);
    for round in 0..3 {
        for lane in &mut lanes[..2] {
            (round..2000).step_by(7).for_each(|p| lane.discard(p * PAGE as u64, PAGE as u64).unwrap());
        }
        write(&mut lanes[2], 0..PAGES, 4 + round);
        assert_eq!(volumes[0].held().unwrap().disk_bytes, 0, "round {round}: {}", store.stats());
    }
    assert!(store.stats().cleaned_segments > 0);
    assert!(volumes[2].held().unwrap().disk_bytes > 4 << 20);
    let left = |p: &u64| p % 7 > 2;
    check(&mut lanes[0], (0..2000).filter(left), 1);
    check(&mut lanes[1], (0..2000).filter(left), 2);
    check(&mut lanes[2], 0..PAGES, 6);
    drop((lanes, volumes, store));
    let store = Store::open_arena(config, arena).unwrap();
    let volumes = store.volumes();
    place(&volumes);
    write(&mut volumes[2].lane().unwrap(), 0..PAGES, 7);
    assert_eq!(volumes[0].held().unwrap().disk_bytes, 0);
    check(&mut volumes[0].lane().unwrap(), (0..2000).filter(left), 1);
    store.audit().unwrap();
    let bare = Store::open(StoreConfig { tiers: vec!["ram,limit=8M".parse().unwrap()], ..StoreConfig::default() });
    let nowhere = bare.unwrap().create_volume(1 << 30).unwrap().set_placement(Placement::Below);
    assert!(nowhere.is_err(), "there is nothing below");
}
