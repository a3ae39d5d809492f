//! Several tiers below memory: pages go from one to the next, tiers come, go and change their order, one fails, hangs or
//! is damaged; and each page is what it was last.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod nbdkit;
mod on_disk;

use ghostswap::{create_arena, DiskStats, Error, Lane, Standby, Store, StoreConfig};
use nbdkit::Nbdkit;
use on_disk::{check, content, wait_for, write, Dir, PAGE, PAGES};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const RAM: &str = "ram,limit=8M";
const MIB: u64 = 1 << 20;

fn place(dir: &Dir, name: &str) -> PathBuf {
    dir.tier().with_file_name(name)
}

/// A tier in that file of the directory, which is called as the file is.
fn file(dir: &Dir, name: &str, mib: u64) -> String {
    format!("file:{},size={mib}M,prealloc=off,name={name}", place(dir, name).display())
}

fn config(tiers: &[String]) -> StoreConfig {
    let all = std::iter::once(RAM).chain(tiers.iter().map(String::as_str));
    StoreConfig { tiers: all.map(|tier| tier.parse().unwrap()).collect(), ..StoreConfig::default() }
}

fn open(tiers: &[String], arena: &OwnedFd) -> (Store, Lane) {
    let store = Store::open_arena(config(tiers), arena.try_clone().unwrap()).unwrap();
    let volume = store.volumes().into_iter().next().unwrap_or_else(|| store.create_volume(1 << 30).unwrap());
    let lane = volume.lane().unwrap();
    (store, lane)
}

fn new(tiers: &[String]) -> (Store, Lane) {
    open(tiers, &create_arena(false).unwrap())
}

fn disk(store: &Store, name: &str) -> DiskStats {
    store.stats().disks.into_iter().find(|disk| disk.name == name).unwrap()
}

fn used(store: &Store, name: &str) -> u64 {
    disk(store, name).used_bytes
}

fn close(store: Store, lane: Lane) {
    drop(lane);
    store.audit().unwrap();
}

#[test]
fn pages_go_from_memory_to_the_first_tier_and_on_to_the_next() {
    for options in ["", ",encrypt=off"] {
        let dir = Dir::new("several");
        let (store, mut lane) = new(&[file(&dir, "a", 16) + options, file(&dir, "b", 64)]);
        write(&mut lane, 0..PAGES, 1);
        wait_for("passing on", || used(&store, "b") > 4 * MIB && used(&store, "a") <= 14 * MIB);
        check(&mut lane, 0..PAGES, 1);
        check(&mut lane, (0..PAGES).step_by(7), 1);
        write(&mut lane, 0..PAGES, 2);
        check(&mut lane, 0..PAGES, 2);
        let (a, b, stats) = (disk(&store, "a"), disk(&store, "b"), store.stats());
        assert!(a.passed_on_segments > 0 && b.passed_on_segments == 0 && b.fetches > 0, "{stats}");
        let all = stats.disk.clone().unwrap();
        assert_eq!(
            (all.capacity_bytes, all.used_bytes),
            (a.capacity_bytes + b.capacity_bytes, stats.disks.iter().map(|d| d.used_bytes).sum())
        );
        assert_eq!((all.write_errors, all.read_errors, all.corrupt, stats.refused_writes), (0, 0, 0, 0), "{stats}");
        let names: Vec<_> = store.tiers().into_iter().map(|tier| tier.name).collect();
        assert_eq!(names, ["ram", "a", "b"]);
        for line in ["a ", "b "] {
            assert!(stats.to_string().lines().any(|said| said.starts_with(line)), "{stats}");
        }
        let held = store.volumes()[0].held().unwrap();
        assert!(held.disk_bytes > 12 * MIB);
        // All of it dies, on each of them.
        lane.discard(0, 1 << 30).unwrap();
        drop(lane);
        wait_for("all is free", || store.stats().disks.iter().all(|disk| disk.used_bytes == 0));
        store.audit().unwrap();
    }
}

/// As many tiers as there may be, each too small for what comes: so all of them are full in the end, and writes are
/// refused, and what was acknowledged is there.
#[test]
fn four_tiers_are_filled_to_the_last() {
    let dir = Dir::new("four");
    let (store, mut lane) = new(&["a", "b", "c", "d"].map(|name| file(&dir, name, 16)));
    let mut pages = 0;
    let full = loop {
        match lane.write(pages * PAGE as u64, &content(pages, 3)) {
            Ok(()) => pages += 1,
            Err(e) => break e,
        }
    };
    assert!(matches!(full, Error::NoSpace), "{full}");
    let stats = store.stats();
    assert!(stats.disks.iter().all(|disk| disk.used_bytes > 13 * MIB), "{stats}");
    assert!(stats.live_bytes > 58 * MIB, "{stats}");
    check(&mut lane, 0..pages, 3);
    let tiers = ["a", "b", "c", "d", "e"].map(|name| file(&dir, name, 16));
    assert!(Store::open(config(&tiers)).map(|_| ()).unwrap_err().to_string().contains("may be 4"));
    close(store, lane);
}

#[test]
fn what_memory_cannot_take_goes_from_a_drained_tier_to_the_others() {
    let dir = Dir::new("drained");
    let arena = create_arena(false).unwrap();
    let (a, b) = (file(&dir, "a", 64), file(&dir, "b", 64));
    let (store, mut lane) = open(std::slice::from_ref(&a), &arena);
    write(&mut lane, 0..PAGES, 1);
    let why = store.empty_tier(Some("a")).unwrap_err().to_string();
    assert!(why.contains("does not fit"), "{why}");
    close(store, lane);
    // To a colder one.
    let (store, mut lane) = open(&[a.clone(), b.clone()], &arena);
    assert!(used(&store, "a") > 12 * MIB && used(&store, "b") == 0);
    assert!(store.empty_tier(None).unwrap_err().to_string().contains("a, b"), "which?");
    assert!(store.empty_tier(Some("c")).is_err());
    wait_for("the claim", || store.empty_tier(Some("a")).is_ok());
    wait_for("draining", || used(&store, "a") == 0);
    assert_eq!(store.tiers()[1].state, "drained");
    check(&mut lane, 0..PAGES, 1);
    close(store, lane);
    // It is done without, and comes back below the other.
    let (store, mut lane) = open(std::slice::from_ref(&b), &arena);
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES / 3, 2);
    close(store, lane);
    let (store, mut lane) = open(&[b.clone(), a.clone()], &arena);
    check(&mut lane, 0..PAGES / 3, 2);
    // From the coldest to a hotter one: there is none colder.
    wait_for("the claim", || store.empty_tier(Some("b")).is_ok());
    wait_for("draining", || used(&store, "b") == 0);
    store.drain_tier(Some("b"), false).unwrap();
    wait_for("the other way", || store.empty_tier(Some("a")).is_ok());
    wait_for("draining", || used(&store, "a") == 0);
    check(&mut lane, PAGES / 3..PAGES, 1);
    check(&mut lane, 0..PAGES / 3, 2);
    close(store, lane);
}

/// Ends the load, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// They are known again by what they bear, wherever they stand, and keep what lies there.
#[test]
fn tiers_are_added_reordered_and_removed_under_load() {
    let dir = Dir::new("order");
    let arena = create_arena(false).unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| file(&dir, name, 64));
    // What each life has, and which of them is emptied in it.
    let lives: [(&[&String], Option<&str>); 9] = [
        (&[&b], None),
        (&[&a, &b], None),
        (&[&a, &b, &c], Some("b")),
        (&[&c, &a], None),
        (&[&a, &b, &c], Some("a")),
        (&[&c, &b], Some("c")),
        (&[&b], None),
        (&[&b, &c, &a], Some("b")),
        (&[&a, &c], None),
    ];
    let mut salts = vec![0u64; PAGES as usize / 2];
    for (life, (tiers, emptied)) in lives.iter().enumerate() {
        let tiers: Vec<String> = tiers.iter().map(|tier| (*tier).clone()).collect();
        let (store, mut lane) = open(&tiers, &arena);
        if life == 0 {
            write(&mut lane, 0..salts.len() as u64, 0);
        }
        let volume = store.volumes().remove(0);
        let done = AtomicBool::new(false);
        let half = salts.len() / 2;
        std::thread::scope(|scope| {
            let done = &done;
            let over = Over(done);
            for (n, mine) in salts.chunks_mut(half).enumerate() {
                let mut lane = volume.lane().unwrap();
                scope.spawn(move || {
                    let mut at = life * 7919 % half;
                    let mut turns = 0;
                    while turns < 4000 || !done.load(Ordering::Relaxed) {
                        (at, turns) = ((at * 5 + 3) % mine.len(), turns + 1);
                        let page = (n * half + at) as u64;
                        check(&mut lane, page..page + 1, mine[at]);
                        if turns % 3 == 0 {
                            mine[at] = (life as u64 + 1) << 32 | turns;
                            write(&mut lane, page..page + 1, mine[at]);
                        }
                    }
                });
            }
            if let Some(name) = emptied {
                wait_for("the claim", || store.empty_tier(Some(name)).is_ok());
                wait_for("draining", || used(&store, name) == 0);
            } else {
                wait_for("the claim", || store.write_back(0).is_ok());
            }
            drop(over);
        });
        for (page, salt) in salts.iter().enumerate() {
            check(&mut lane, page as u64..page as u64 + 1, *salt);
        }
        drop((volume, lane));
        store.audit().unwrap_or_else(|why| panic!("life {life}: {why}"));
        let stats = store.stats();
        assert_eq!((stats.refused_writes, stats.lost_pages), (0, 0), "life {life}: {stats}");
        drop(store);
        // None can be done without that holds something.
        if *emptied == Some("b") {
            let refused = Store::open_arena(config(&[]), arena.try_clone().unwrap()).map(|_| ());
            assert!(refused.unwrap_err().to_string().contains("open it with that tier"));
            let other = Store::open_arena(config(&[file(&dir, "x", 64)]), arena.try_clone().unwrap()).map(|_| ());
            assert!(other.unwrap_err().to_string().contains("not the one"));
        }
    }
}

#[test]
fn a_standby_takes_a_new_tier_beside_those_that_there_are() {
    let dir = Dir::new("beside");
    let arena = create_arena(false).unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| file(&dir, name, 16));
    let (store, mut lane) = open(std::slice::from_ref(&b), &arena);
    write(&mut lane, 0..PAGES / 3, 1);
    let attempt = |tiers: &[String]| -> Result<Standby, Error> {
        let mut standby = Standby::new(config(tiers), arena.try_clone().unwrap())?;
        standby.try_tiers(&[])?;
        Ok(standby)
    };
    std::fs::write(place(&dir, "c"), "dear all").unwrap();
    let refused = attempt(&[b.clone(), c]).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("something else"), "{refused}");
    let standby = attempt(&[a, b]).unwrap();
    drop((lane, store));
    let store = standby.open().unwrap();
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    check(&mut lane, 0..PAGES / 3, 1);
    write(&mut lane, 0..PAGES / 2, 2);
    assert!(used(&store, "a") > MIB, "{}", store.stats());
    check(&mut lane, 0..PAGES / 2, 2);
    close(store, lane);
}

/// Found by who reads it, and by the mover that would have passed it on, which leaves it where it is.
#[test]
fn what_is_damaged_on_one_of_them_is_named_and_the_rest_is_there() {
    let dir = Dir::new("several-damaged");
    let arena = create_arena(false).unwrap();
    let (a, b) = (file(&dir, "a", 16), file(&dir, "b", 64));
    let (store, mut lane) = open(&[a.clone(), b.clone()], &arena);
    write(&mut lane, 0..PAGES, 1);
    wait_for("passing on", || used(&store, "b") > 4 * MIB);
    close(store, lane);
    for name in ["a", "b"] {
        let file = std::fs::OpenOptions::new().write(true).open(place(&dir, name)).unwrap();
        // No more segments than are remembered to be so.
        for block in 1..60 {
            file.write_all_at(&[0x55; 64], block * 7 * PAGE as u64 + 512).unwrap();
        }
    }
    let (store, mut lane) = open(&[a, b], &arena);
    let mut got = vec![0; PAGE];
    let mut damaged = 0;
    for page in 0..PAGES {
        match lane.read(page * PAGE as u64, &mut got) {
            Ok(()) => assert!(got == content(page, 1), "page {page}"),
            Err(Error::Corrupt { page: named, .. }) => {
                assert_eq!(u64::from(named), page);
                damaged += 1;
            }
            Err(e) => panic!("page {page}: {e}"),
        }
    }
    let stats = store.stats();
    assert!(stats.disks.iter().all(|disk| disk.corrupt > 10), "{stats}");
    assert_eq!(stats.disk.clone().unwrap().corrupt, damaged, "{stats}");
    // What can be moved is, the rest stays and is told of.
    wait_for("the claim", || store.empty_tier(Some("a")).is_ok());
    wait_for("all but that", || {
        let a = disk(&store, "a");
        a.used_bytes <= a.unreadable_bytes && a.used_bytes > 0
    });
    // Written anew they are well.
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, 0..PAGES, 2);
    wait_for("all of it", || used(&store, "a") == 0);
    close(store, lane);
}

fn server(dir: &Dir, more: &[&str]) -> Nbdkit {
    Nbdkit::start(dir.tier().parent().unwrap(), &[&["--filter=error", "memory", "80M"], more].concat())
}

fn nbd(server: &Nbdkit) -> String {
    format!("nbd:{},size=64M,timeout=2s,name=nbd", server.uri())
}

#[test]
fn a_tier_that_fails_is_passed_over_until_it_is_well() {
    let dir = Dir::new("passed-over");
    let no_writes = place(&dir, "no-writes");
    let when = format!("error-pwrite-file={}", no_writes.display());
    let server = server(&dir, &["error-pwrite-rate=100%", &when]);
    let (store, mut lane) = new(&[nbd(&server), file(&dir, "b", 64)]);
    write(&mut lane, 0..PAGES / 2, 1);
    assert!(used(&store, "nbd") > MIB && used(&store, "b") == 0, "{}", store.stats());
    std::fs::write(&no_writes, "").unwrap();
    write(&mut lane, PAGES / 2..PAGES, 1);
    let stats = store.stats();
    assert!(disk(&store, "nbd").failing && used(&store, "b") > 4 * MIB && stats.refused_writes == 0, "{stats}");
    check(&mut lane, 0..PAGES, 1);
    std::fs::remove_file(&no_writes).unwrap();
    wait_for("trying it again", || !disk(&store, "nbd").failing);
    let before = disk(&store, "nbd").written_bytes;
    write(&mut lane, 0..PAGES, 2);
    assert!(disk(&store, "nbd").written_bytes > before + 8 * MIB, "{}", store.stats());
    check(&mut lane, 0..PAGES, 2);
    close(store, lane);
}

#[test]
fn one_that_hangs_or_dies_keeps_nobody_else_from_going_on() {
    let dir = Dir::new("hangs");
    let mut server = server(&dir, &[]);
    let (store, mut lane) = new(&[nbd(&server), file(&dir, "b", 64)]);
    write(&mut lane, 0..PAGES / 3, 1);
    server.signal("STOP");
    // Memory is full of what was to go there. The next tier takes it, before anybody is refused.
    let begun = Instant::now();
    write(&mut lane, PAGES / 3..PAGES, 1);
    let stats = store.stats();
    assert!(used(&store, "b") > 4 * MIB && stats.refused_writes == 0, "{stats}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    server.signal("CONT");
    // It was away for longer than it is waited for: until it is connected to again, its pages cannot be read.
    let mut got = vec![0; PAGE];
    wait_for("taking it back", || lane.read(0, &mut got).is_ok() && !disk(&store, "nbd").failing);
    check(&mut lane, 0..PAGES, 1);
    // What lies there cannot be moved while it is away; all else goes on.
    server.kill();
    store.drain_tier(Some("nbd"), true).unwrap();
    write(&mut lane, PAGES..PAGES + PAGES / 2, 1);
    check(&mut lane, PAGES..PAGES + PAGES / 2, 1);
    assert!(used(&store, "nbd") > 0, "it forgot all, and what lay there is not elsewhere");
    close(store, lane);
}

/// Memory, a file, a server, and back: its pages come again in another store.
#[test]
fn pages_go_on_to_a_server_and_are_found_there_by_the_next_store() {
    let dir = Dir::new("on-to-nbd");
    let arena = create_arena(false).unwrap();
    let server = server(&dir, &[]);
    let tiers = [file(&dir, "a", 16), nbd(&server)];
    let (store, mut lane) = open(&tiers, &arena);
    write(&mut lane, 0..PAGES, 1);
    wait_for("passing on", || used(&store, "nbd") > 4 * MIB && used(&store, "a") <= 14 * MIB);
    close(store, lane);
    for turn in 0..3 {
        // In the other order too.
        let tiers = if turn == 1 { [tiers[1].clone(), tiers[0].clone()] } else { tiers.clone() };
        let (store, mut lane) = open(&tiers, &arena);
        check(&mut lane, 0..PAGES, 1);
        close(store, lane);
    }
    let (store, mut lane) = open(&tiers, &arena);
    wait_for("the claim", || store.empty_tier(Some("a")).is_ok());
    wait_for("draining", || used(&store, "a") == 0);
    check(&mut lane, 0..PAGES, 1);
    close(store, lane);
    let (store, mut lane) = open(&tiers[1..], &arena);
    check(&mut lane, 0..PAGES, 1);
    close(store, lane);
}

/// What a program left that knew of one tier below: its format, and no word of what the tier's place was called.
#[test]
fn an_arena_of_one_tier_is_read_and_stays_what_it_is_until_there_is_another() {
    let dir = Dir::new("one-tier");
    let server = server(&dir, &[]);
    let (a, b) = (file(&dir, "a", 64), file(&dir, "b", 64));
    for first in [a, nbd(&server)] {
        let arena = create_arena(false).unwrap();
        let (store, mut lane) = open(std::slice::from_ref(&first), &arena);
        write(&mut lane, 0..PAGES, 1);
        close(store, lane);
        let word = |at: u64, put: Option<u64>| {
            let file = std::fs::File::from(arena.try_clone().unwrap());
            put.into_iter().for_each(|word| file.write_all_at(&word.to_le_bytes(), at).unwrap());
            let mut got = [0; 8];
            file.read_exact_at(&mut got, at).unwrap();
            u64::from_le_bytes(got)
        };
        assert!(word(8, None) == ghostswap::ARENA_VERSION && word(288, None) != 0);
        word(8, Some(ghostswap::OLDEST_ARENA_VERSION));
        word(288, Some(0));
        let (store, mut lane) = open(std::slice::from_ref(&first), &arena);
        check(&mut lane, 0..PAGES, 1);
        close(store, lane);
        assert!(word(8, None) == ghostswap::OLDEST_ARENA_VERSION && word(288, None) != 0);
        let (store, mut lane) = open(&[b.clone(), first], &arena);
        check(&mut lane, 0..PAGES, 1);
        write(&mut lane, 0..PAGES / 2, 2);
        check(&mut lane, 0..PAGES / 2, 2);
        close(store, lane);
        assert_eq!(word(8, None), ghostswap::ARENA_VERSION);
    }
}
