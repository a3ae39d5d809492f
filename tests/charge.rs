//! What each volume holds, tier by tier, and what its quota does: while pages are written, cleaned, compressed
//! again and moved down, and in the next store on the arena.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod on_disk;

use ghostswap::{create_arena, Error, Held, Lane, Store, StoreConfig, Volume};
use on_disk::{check, config, content, wait_for, write, Dir, PAGE, PAGES};

const MIB: u64 = 1 << 20;

/// Pages that were written, zeros and patterns apart.
fn stored(held: Held) -> u64 {
    assert_eq!(held.lost_pages, 0);
    held.stored_pages
}

fn bytes(volume: &Volume) -> u64 {
    let held = volume.held().unwrap();
    held.memory_bytes + held.disk_bytes
}

fn refused(lane: &mut Lane, page: u64) -> bool {
    match lane.write(page * PAGE as u64, &content(page, 9)) {
        Ok(()) => false,
        Err(Error::OverQuota { .. }) => true,
        Err(e) => panic!("page {page}: {e}"),
    }
}

#[test]
fn each_volume_is_charged_with_what_it_holds_in_each_tier() {
    let dir = Dir::new("charge");
    let arena = create_arena(false).unwrap();
    let config = config(&dir.tier(), "ram,limit=32M,group=16K", "");
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let volumes: Vec<Volume> = (0..3).map(|_| store.create_volume(1 << 44).unwrap()).collect();
    let mut lanes: Vec<Lane> = volumes.iter().map(|v| v.lane().unwrap()).collect();
    assert_eq!(volumes[0].held().unwrap(), Held::default());
    // More than memory holds, in turn, so that segments of both go down and are compacted there.
    for round in 1..4 {
        write(&mut lanes[0], 0..PAGES, round);
        write(&mut lanes[1], (0..PAGES).step_by(3), round);
    }
    lanes[1].write(1 << 43, &[0; PAGE]).unwrap();
    lanes[1].write((1 << 43) + 8192, &[7; PAGE]).unwrap();
    wait_for("moving down", || store.stats().disk.unwrap().used_bytes > 0);
    drop(lanes);
    store.audit().unwrap();
    let held: Vec<Held> = volumes.iter().map(|v| v.held().unwrap()).collect();
    assert_eq!([stored(held[0]), stored(held[1]), stored(held[2])], [PAGES, PAGES.div_ceil(3), 0]);
    assert_eq!((held[1].zero_pages, held[1].filled_pages), (1, 1));
    assert!(held[0].disk_bytes > 0 && held[0].memory_bytes > 0, "{held:?}");
    let sum: u64 = volumes.iter().map(bytes).sum();
    assert_eq!(sum, store.stats().live_bytes);
    // The next store counts the same.
    let before: Vec<u64> = volumes.iter().map(Volume::held_bytes).collect();
    assert_eq!(before.iter().sum::<u64>(), sum);
    drop((volumes, store));
    let again = Store::open_arena(config, arena).unwrap();
    assert_eq!(again.volumes().iter().map(Volume::held_bytes).collect::<Vec<_>>(), before);
    check(&mut again.open_volume(0).unwrap().lane().unwrap(), 0..PAGES, 3);
    again.volumes()[0].reset(1 << 30).unwrap();
    assert_eq!(again.volumes()[0].held().unwrap(), Held::default());
    assert_eq!(again.volumes()[1].held_bytes(), before[1]);
}

#[test]
fn a_volume_at_its_quota_refuses_what_needs_room_until_it_discards() {
    let config = StoreConfig { tiers: vec!["ram,limit=64M".parse().unwrap()], ..StoreConfig::default() };
    let store = Store::open(config).unwrap();
    let (small, other) = (store.create_volume(1 << 40).unwrap(), store.create_volume(1 << 40).unwrap());
    small.set_quota(Some(4 * MIB));
    let mut lane = small.lane().unwrap();
    let first = (0..PAGES).find(|page| refused(&mut lane, *page)).unwrap();
    let most = 4 * MIB + 16 * (PAGE as u64 + 7);
    assert!((4 * MIB..most).contains(&small.held_bytes()), "{} at page {first}", small.held_bytes());
    assert!(first * 1024 > small.held_bytes() / 4, "it counts compressed bytes");
    // An overwrite may take more than what it replaces; and a part of a page is a page.
    assert!(refused(&mut lane, 0));
    assert!(matches!(lane.write(512, &content(0, 8)[..512]), Err(Error::OverQuota { .. })));
    // Reading, zeros and patterns need no room, nor do others care.
    check(&mut lane, 0..first, 9);
    lane.write(1 << 39, &[0; PAGE]).unwrap();
    lane.write((1 << 39) + PAGE as u64, &[7; PAGE]).unwrap();
    write(&mut other.lane().unwrap(), 0..100, 1);
    lane.discard(0, 64 * PAGE as u64).unwrap();
    assert!(small.held_bytes() < 4 * MIB);
    assert!(!refused(&mut lane, 0));
    // Raised, and none.
    small.set_quota(Some(5 * MIB));
    let second = (first..PAGES).find(|page| refused(&mut lane, *page)).unwrap();
    small.set_quota(None);
    assert!(second > first && (second..PAGES).all(|page| !refused(&mut lane, page)));
    check(&mut lane, 64..PAGES, 9);
}
