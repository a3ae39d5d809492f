//! Loom's models of the store: lanes and the cleaner as they ship, on a simulated arena
//! (`arena/simulated.rs`) so small that everything meets. A leaf has three pages, a node two leaves, a
//! segment two records, and the volume six pages. Nothing here is a copy of what it models.
//!
//! `just loom` runs them. Each page holds a pattern of eight bytes that no slot word can take, so
//! every page is a record. At the end of every interleaving all pages are compared with what they
//! may be, all counts with the pages, and then everything is discarded and must be free again: a
//! leaf, a segment or a byte that was lost on the way is found there.
//!
//! How deep: exhaustive where said `None`, else up to so many preemptions.

use super::clean::Cleaner;
use super::recover::{Found, Pages};
use super::{Lane, Owner, Shared, Store};
use crate::arena::{Arena, Resident, Spare};
use crate::config::{Checked, CodecChoice, Marks};
use crate::log::segment::Segments;
use crate::map::Map;
use crate::page::{VolumeId, PAGE_BYTES};
use crate::sync::{model, yield_now};
use loom::thread;
use std::sync::Arc;

const FRAMES: u32 = 6;
const META: u32 = 8;
const PAGES: u64 = 6;
/// Header and pattern.
const RECORD: u64 = 15;
const PAGE: u64 = PAGE_BYTES as u64;

fn all(len: u32) -> Resident {
    let mut all = Resident::new(len);
    (0..len).for_each(|n| all.set(n));
    all
}

fn store() -> Store {
    let config = Checked {
        limit_bytes: 0,
        codec: CodecChoice::Lz4,
        group_pages: 1,
        dict_bytes: 0,
        max_lanes: 3,
        helper_lanes: 0,
        segment_bytes: 32,
        segment_bytes_given: true,
        hugetlb: false,
        thread_start: None,
        tls: None,
        s3: None,
        group_pages_seen: 1,
        hot_bytes: 1 << 20,
        cold: None,
        marks: Marks::default(),
        codecs_seen: CodecChoice::Lz4.bit(),
        below: Vec::new(),
        names: Vec::new(),
        below_bytes: Vec::new(),
    };
    let found = Found {
        frames: all(FRAMES),
        meta: all(META),
        known: FRAMES,
        pages: Pages::default(),
        volumes: 1,
        held_bytes: vec![0],
        dictionaries: Vec::new(),
    };
    let arena = Arena::simulated(config.segment_bytes as usize, FRAMES, META, PAGES * PAGE);
    let shared = Arc::new(Shared::new(config, arena, Map::new(), Segments::new(FRAMES), Vec::new(), &found));
    Store { owner: Arc::new(Owner { shared, threads: Vec::new() }) }
}

fn lane(store: &Store) -> Lane {
    Lane::open(store.clone(), VolumeId(0), false).expect("a lane is free")
}

/// Content number `n` of a page; 0 is nothing.
fn put(lane: &mut Lane, page: u64, n: u8) {
    let bytes: Vec<u8> = [n, 0, 0, 0, n, 1, 0, 0x40].repeat(PAGE_BYTES / 8);
    assert_eq!(lane.try_write(page * PAGE, &bytes).expect("in range"), PAGE_BYTES, "there is room");
}

fn get(lane: &mut Lane, page: u64) -> u8 {
    let mut bytes = [0xff; PAGE_BYTES];
    lane.read(page * PAGE, &mut bytes).expect("a page decodes");
    assert!(bytes.chunks(8).all(|c| c == &bytes[..8]) && bytes[4] == bytes[0], "a page is of one piece");
    bytes[0]
}

fn discard(lane: &mut Lane, first: u64, pages: u64) {
    lane.discard(first * PAGE, pages * PAGE).expect("in range");
}

/// What must be so when all threads are done; `may` says what a page may be. No lane is open.
fn check(store: &Store, mut cleaner: Cleaner, may: impl Fn(u64, u8) -> bool) {
    let mut last = lane(store);
    let mut stored = 0;
    for page in 0..PAGES {
        let n = get(&mut last, page);
        assert!(may(page, n), "page {page} is {n}");
        stored += u64::from(n != 0);
    }
    let stats = store.stats();
    assert_eq!((stats.stored_pages, stats.live_bytes), (stored, stored * RECORD), "{stats}");
    discard(&mut last, 0, PAGES);
    drop(last);
    cleaner.close();
    cleaner.step();
    cleaner.step();
    let stats = store.stats();
    assert_eq!((stats.stored_pages, stats.live_bytes, stats.map_bytes), (0, 0, 0), "all is discarded: {stats}");
    let arena = &store.shared().arena;
    assert_eq!((arena.frames_ready(), arena.ids_ready(), arena.meta_ready()), (FRAMES, FRAMES, META), "all is free");
}

fn join(threads: Vec<thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|t| t.join().expect("a model's thread ends"));
}

/// Two lanes, and a cleaner with a victim before it: a segment of page 0, which died, and page 1.
fn with_victim() -> (Store, Lane, Lane, Cleaner) {
    let store = store();
    let (mut writer, other) = (lane(&store), lane(&store));
    let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
    (0..3).for_each(|page| put(&mut writer, page, 1));
    put(&mut writer, 0, 2);
    (store, writer, other, cleaner)
}

/// A page is written while the cleaner moves it: the copy is dead.
#[test]
fn a_page_is_overwritten_while_it_is_moved() {
    model(Some(2), || {
        let (store, mut writer, other, mut cleaner) = with_victim();
        let threads = vec![thread::spawn(move || {
            put(&mut writer, 1, 3);
            drop(writer);
        })];
        drop(other);
        cleaner.step();
        join(threads);
        check(&store, cleaner, |page, n| n == [2, 3, 1, 0, 0, 0][page as usize]);
    });
}

/// A page is read while the cleaner moves it and its old place is written anew.
#[test]
fn a_page_is_read_while_it_is_moved() {
    model(Some(4), || {
        let (store, mut writer, mut reader, mut cleaner) = with_victim();
        let threads = vec![thread::spawn(move || {
            assert_eq!(get(&mut reader, 1), 1);
            drop(reader);
        })];
        cleaner.step();
        // The victim was the last to be freed, so it is the next to be opened.
        (2..4).for_each(|page| put(&mut writer, page, 3));
        drop(writer);
        join(threads);
        check(&store, cleaner, |page, n| n == [2, 1, 3, 3, 0, 0][page as usize]);
    });
}

/// All three at once.
#[test]
fn a_page_is_read_and_overwritten_while_it_is_moved() {
    model(Some(1), || {
        let (store, mut writer, mut reader, mut cleaner) = with_victim();
        let threads = vec![
            thread::spawn(move || {
                put(&mut writer, 1, 3);
                drop(writer);
            }),
            thread::spawn(move || {
                let (first, then) = (get(&mut reader, 1), get(&mut reader, 1));
                assert!(matches!((first, then), (1, 1 | 3) | (3, 3)), "{first}, then {then}");
                drop(reader);
            }),
        ];
        cleaner.step();
        join(threads);
        check(&store, cleaner, |page, n| n == [2, 3, 1, 0, 0, 0][page as usize]);
    });
}

/// A page is written while it is read: what the slot names is there for who sees the slot.
#[test]
fn a_page_is_read_while_it_is_written() {
    model(None, || {
        let store = store();
        let (mut writer, mut reader) = (lane(&store), lane(&store));
        let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        put(&mut writer, 0, 1);
        let threads = vec![thread::spawn(move || {
            let (first, then) = (get(&mut reader, 1), get(&mut reader, 1));
            assert!(matches!((first, then), (0, 0 | 2) | (2, 2)), "{first}, then {then}");
            drop(reader);
        })];
        put(&mut writer, 1, 2);
        drop(writer);
        join(threads);
        check(&store, cleaner, |page, n| n == [1, 2, 0, 0, 0, 0][page as usize]);
    });
}

/// A page is discarded while the cleaner moves it: the copy is dead.
#[test]
fn a_page_is_discarded_while_it_is_moved() {
    model(Some(3), || {
        let (store, mut writer, other, mut cleaner) = with_victim();
        drop(other);
        let threads = vec![thread::spawn(move || {
            discard(&mut writer, 1, 1);
            drop(writer);
        })];
        cleaner.step();
        join(threads);
        check(&store, cleaner, |page, n| n == [2, 0, 1, 0, 0, 0][page as usize]);
    });
}

/// Whoever writes to a leaf that is being taken out writes to the next one, or keeps this one.
fn discarded_whole_while_written(page: u64) {
    model(Some(4), move || {
        let store = store();
        let (mut writer, mut dropper) = (lane(&store), lane(&store));
        let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        put(&mut writer, 2, 1);
        let threads = vec![
            thread::spawn(move || {
                put(&mut writer, page, 2);
                assert!(matches!(get(&mut writer, page), 0 | 2));
                drop(writer);
            }),
            thread::spawn(move || {
                discard(&mut dropper, 0, 3);
                assert_eq!(get(&mut dropper, 2), 0);
                drop(dropper);
            }),
        ];
        join(threads);
        check(&store, cleaner, |at, n| n == 0 || (at, n) == (page, 2));
    });
}

#[test]
fn a_leaf_is_discarded_whole_while_its_first_page_is_written() {
    discarded_whole_while_written(0);
}

#[test]
fn a_leaf_is_discarded_whole_while_another_page_of_it_is_written() {
    discarded_whole_while_written(1);
}

/// An empty leaf is half frozen, and thawed again since a page of it was written, while all of it
/// is discarded: freezing has one owner, from the first slot to the last.
#[test]
fn a_leaf_is_discarded_whole_while_another_half_freezes_it() {
    model(Some(4), || {
        let store = store();
        let mut writer = lane(&store);
        let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        let shared = store.shared().clone();
        shared.map.leaf_for_write(&shared.arena, VolumeId(0), 0).expect("there is room");
        let threads = vec![thread::spawn(move || {
            shared.epochs.enter(2);
            shared.map.drop_if_empty(&shared.arena, VolumeId(0), 0, 0);
            shared.epochs.leave(2);
        })];
        put(&mut writer, 2, 1);
        discard(&mut writer, 0, 3);
        drop(writer);
        join(threads);
        assert_eq!(store.stats().map_bytes, 0, "nobody saw that all is empty");
        check(&store, cleaner, |_, n| n == 0);
    });
}

/// The same where the pages are discarded one by one: the leaf goes when it is empty, and stays
/// where the write came first.
#[test]
fn a_leaf_is_emptied_while_it_is_written() {
    model(Some(5), || {
        let store = store();
        let (mut writer, mut dropper) = (lane(&store), lane(&store));
        let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        put(&mut writer, 1, 1);
        let threads = vec![
            thread::spawn(move || {
                put(&mut writer, 0, 2);
                assert_eq!(get(&mut writer, 0), 2);
                drop(writer);
            }),
            thread::spawn(move || {
                discard(&mut dropper, 1, 1);
                drop(dropper);
            }),
        ];
        join(threads);
        check(&store, cleaner, |page, n| n == [2, 0, 0, 0, 0, 0][page as usize]);
    });
}

/// Two lanes each empty their half of a leaf, or of a node: one of them sees that all is empty.
fn emptied_by_two(pages: [u64; 2]) {
    model(Some(4), move || {
        let store = store();
        let mut lanes = [lane(&store), lane(&store)];
        let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        // Each into a segment of its own: they are to have nothing else in common.
        lanes.iter_mut().zip(pages).for_each(|(lane, page)| put(lane, page, 1));
        let threads = lanes.into_iter().zip(pages).map(|(mut lane, page)| {
            thread::spawn(move || {
                discard(&mut lane, page, 1);
                drop(lane);
            })
        });
        join(threads.collect());
        assert_eq!(store.stats().map_bytes, 0, "nobody saw that all is empty");
        check(&store, cleaner, |_, n| n == 0);
    });
}

#[test]
fn a_leaf_is_emptied_by_two() {
    emptied_by_two([0, 1]);
}

#[test]
fn a_node_is_emptied_by_two() {
    emptied_by_two([0, 3]);
}

/// What one lane freezes and has to thaw again, since another writes to it, that other may empty
/// while it is frozen.
#[test]
fn a_leaf_is_emptied_while_another_half_freezes_it() {
    model(Some(4), || {
        let store = store();
        let (mut writer, mut dropper) = (lane(&store), lane(&store));
        let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        put(&mut dropper, 0, 1);
        let threads = vec![
            thread::spawn(move || {
                put(&mut writer, 1, 2);
                discard(&mut writer, 1, 1);
                drop(writer);
            }),
            thread::spawn(move || {
                discard(&mut dropper, 0, 1);
                drop(dropper);
            }),
        ];
        join(threads);
        assert_eq!(store.stats().map_bytes, 0, "nobody saw that all is empty");
        check(&store, cleaner, |_, n| n == 0);
    });
}

/// A page of the map is reused, for another leaf, after its grace period, while it is read.
#[test]
fn a_leaf_is_reused_while_it_is_read() {
    model(Some(4), || {
        let store = store();
        let (mut reader, mut writer) = (lane(&store), lane(&store));
        let mut cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        put(&mut writer, 0, 1);
        put(&mut writer, 1, 1);
        let threads = vec![thread::spawn(move || {
            assert!(matches!(get(&mut reader, 0), 0 | 1));
            drop(reader);
        })];
        discard(&mut writer, 0, 3);
        cleaner.step();
        put(&mut writer, 3, 2);
        put(&mut writer, 4, 3);
        drop(writer);
        join(threads);
        check(&store, cleaner, |page, n| n == [0, 0, 0, 2, 3, 0][page as usize]);
    });
}

/// A lane closes, and so seals its segment, while another brings it to zero; it is freed, opened,
/// filled and sealed again.
#[test]
fn a_segment_dies_while_it_is_sealed() {
    model(Some(4), || {
        let store = store();
        let (mut closer, mut writer) = (lane(&store), lane(&store));
        let mut cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        put(&mut closer, 0, 1);
        let threads = vec![thread::spawn(move || drop(closer))];
        discard(&mut writer, 0, 1);
        cleaner.step();
        (1..4).for_each(|page| put(&mut writer, page, 2));
        drop(writer);
        join(threads);
        check(&store, cleaner, |page, n| n == [0, 2, 2, 2, 0, 0][page as usize]);
    });
}

/// Growth gives a metadata page back to the host while a lane takes one.
#[test]
fn metadata_is_given_back_while_it_is_taken() {
    model(Some(4), || {
        let store = store();
        let mut writer = lane(&store);
        let cleaner = Cleaner::new(store.shared().clone(), Spare::new());
        let shared = store.shared().clone();
        let threads = vec![thread::spawn(move || {
            put(&mut writer, 0, 1);
            drop(writer);
        })];
        let given = shared.arena.shrink_meta(|| shared.epochs.wait(yield_now)).expect("one is free");
        yield_now();
        shared.arena.grow_meta(given, 1).expect("simulated memory is there");
        join(threads);
        check(&store, cleaner, |page, n| n == [1, 0, 0, 0, 0, 0][page as usize]);
    });
}
