//! A writer is killed without warning, its arena is taken up by another, and every page is compared
//! with the ledger. Dozens of times over on the same arena, with limits so tiny that cleaning and
//! growth run all the time, the codec and the groups changing from one life to the next.
//!
//! `GHOSTSWAP_RECOVER_LIVES` (default 60) and `GHOSTSWAP_RECOVER_SEED` repeat a run (the instant of
//! a kill excepted).

#![allow(unsafe_code, reason = "fork, kill and shared memory")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ledger;

use ghostswap::{create_arena, Error, Lane, Standby, Store, StoreConfig, MAX_VOLUME_BYTES};
use ledger::{content, ended, fork, kill, wait, End, Ledger, Rng, Shared, PAGE};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const THREADS: u64 = 3;
/// Pages of a thread in each volume.
const RANGE: u64 = 640;
const SIZES: [u64; 3] = [MAX_VOLUME_BYTES, 64 << 20, 1 << 30];
const TIERS: [&str; 7] = [
    "ram,limit=9M,codec=lz4",
    "ram,limit=9M,codec=zstd:1,group=16K",
    "ram,limit=9M,codec=lz4,group=64K",
    "ram,limit=9M,codec=zstd:-1",
    "ram,limit=9M,codec=zstd:1,dict=8K",
    "ram,limit=9M,codec=zstd:1,dict=4K + ram,codec=zstd:3,group=16K,dict=4K,idle=0",
    "ram,limit=9M,codec=lz4 + ram,codec=zstd:1,group=64K,idle=0",
];

fn config(tier: &str) -> StoreConfig {
    StoreConfig {
        tiers: tier.split(" + ").map(|t| t.parse().unwrap()).collect(),
        segment_bytes: Some(64 << 10),
        max_lanes: 9,
        ..StoreConfig::default()
    }
}

/// Page number of page `i` of a thread: stripes of 64 pages that share clusters with other
/// threads, in volume 0 partly at the far end of 16T; whole clusters in volume 2.
fn page_of(volume: usize, t: u64, i: u64) -> u64 {
    let striped = (i / 64 * THREADS + t) * 64 + i % 64;
    match volume {
        0 if i >= RANGE - 128 => (1 << 32) - 64 - (i / 64 * THREADS + t) * 64 + i % 64,
        2 => (i / 512 * THREADS + t) * 512 + i % 512,
        _ => striped,
    }
}

fn entry_of(volume: usize, t: u64, i: u64) -> usize {
    ((volume as u64 * THREADS + t) * RANGE + i) as usize
}

struct Writer<'a> {
    lanes: Vec<Lane>,
    ledger: &'a Ledger,
    thread: u64,
    rng: Rng,
    version: u64,
    buf: Vec<u8>,
}

impl Writer<'_> {
    fn step(&mut self) -> Result<(), String> {
        let volume = self.rng.below(3) as usize;
        let i = self.rng.below(RANGE);
        let run = (self.rng.below(20) + 1).min(64 - i % 64);
        self.version += 1 << 16;
        let kinds = 1 + self.rng.below(15);
        match self.rng.below(100) {
            0..=59 => self.write(volume, i, run, self.version | kinds),
            60..=69 => self.write_sectors(volume, i, self.version | kinds),
            70..=84 => self.discard(volume, i, run),
            85..=87 if volume == 2 => self.discard(volume, 0, 512),
            _ => (0..run).try_for_each(|k| self.check(volume, i + k)),
        }
    }

    fn write(&mut self, volume: usize, i: u64, run: u64, version: u64) -> Result<(), String> {
        let page = page_of(volume, self.thread, i);
        for k in 0..run {
            content(page + k, version + k * 16, &mut self.buf[k as usize * PAGE..][..PAGE]);
            self.ledger.begin(entry_of(volume, self.thread, i + k), 0, 8, version + k * 16);
        }
        let bytes = &self.buf[..run as usize * PAGE];
        let done = self.lanes[volume].try_write(page * PAGE as u64, bytes).map_err(|e| e.to_string())?;
        for k in 0..run {
            let entry = entry_of(volume, self.thread, i + k);
            if (k as usize) < done / PAGE {
                self.ledger.acknowledge(entry);
            } else {
                self.ledger.forget(entry);
            }
        }
        Ok(())
    }

    fn write_sectors(&mut self, volume: usize, i: u64, version: u64) -> Result<(), String> {
        let page = page_of(volume, self.thread, i);
        let from = self.rng.below(7) as usize;
        let to = from + 1 + self.rng.below(7 - from as u64) as usize;
        let entry = entry_of(volume, self.thread, i);
        content(page, version, &mut self.buf[..PAGE]);
        self.ledger.begin(entry, from, to, version);
        let bytes = &self.buf[from * 512..to * 512];
        let at = page * PAGE as u64 + from as u64 * 512;
        match self.lanes[volume].try_write(at, bytes).map_err(|e| e.to_string())? {
            0 => self.ledger.forget(entry),
            _ => self.ledger.acknowledge(entry),
        }
        Ok(())
    }

    fn discard(&mut self, volume: usize, i: u64, run: u64) -> Result<(), String> {
        let page = page_of(volume, self.thread, i);
        (0..run).for_each(|k| self.ledger.begin(entry_of(volume, self.thread, i + k), 0, 8, 0));
        self.lanes[volume].discard(page * PAGE as u64, run * PAGE as u64).map_err(|e| e.to_string())?;
        (0..run).for_each(|k| self.ledger.acknowledge(entry_of(volume, self.thread, i + k)));
        Ok(())
    }

    fn check(&mut self, volume: usize, i: u64) -> Result<(), String> {
        let page = page_of(volume, self.thread, i);
        let got = &mut self.buf[..PAGE];
        self.lanes[volume].read(page * PAGE as u64, got).map_err(|e| e.to_string())?;
        let entry = entry_of(volume, self.thread, i);
        self.ledger.settle(entry, page, got).map_err(|e| format!("volume {volume}: {e}"))
    }
}

/// Takes the arena up and checks all of it: counts against a recount, pages against the ledger.
fn take_up(arena: &OwnedFd, tier: &str, ledger: &Ledger) -> Result<Store, String> {
    checked(Store::open_arena(config(tier), arena.try_clone().unwrap()).map_err(|e| e.to_string())?, ledger)
}

fn checked(store: Store, ledger: &Ledger) -> Result<Store, String> {
    store.audit().map_err(|e| format!("after recovery: {e}"))?;
    let sizes: Vec<u64> = store.volumes().iter().map(|v| v.bytes()).collect();
    if sizes != SIZES[..sizes.len()] {
        return Err(format!("volumes of {sizes:?}"));
    }
    for bytes in &SIZES[sizes.len()..] {
        store.create_volume(*bytes).map_err(|e| e.to_string())?;
    }
    for thread in 0..THREADS {
        let mut writer = writer(&store, ledger, thread, 1);
        for volume in 0..SIZES.len() {
            (0..RANGE).try_for_each(|i| writer.check(volume, i))?;
        }
    }
    store.audit().map_err(|e| format!("after all was read: {e}"))?;
    if store.stats().lost_pages != 0 {
        return Err(format!("{}", store.stats()));
    }
    Ok(store)
}

fn writer<'a>(store: &Store, ledger: &'a Ledger, thread: u64, seed: u64) -> Writer<'a> {
    let lanes = (0..SIZES.len()).map(|v| store.open_volume(v as u16).unwrap().lane().unwrap()).collect();
    Writer { lanes, ledger, thread, rng: Rng(seed), version: seed << 32, buf: vec![0; 512 * PAGE] }
}

/// A life: stands by until it is the life's turn, takes the arena up, checks it, writes until it is
/// killed.
fn live(arena: &OwnedFd, tier: &str, ledger: &Ledger, board: &Shared, seed: u64, life: u64) -> Result<(), String> {
    let mut standby = Standby::new(config(tier), arena.try_clone().unwrap()).map_err(|e| e.to_string())?;
    while board.at(2).load(Ordering::SeqCst) < life {
        standby.keep_up().map_err(|e| e.to_string())?;
        std::thread::sleep(Duration::from_millis(1));
    }
    let store = checked(standby.open().map_err(|e| e.to_string())?, ledger)?;
    board.at(0).fetch_add(1, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|t| {
                let mut writer = writer(&store, ledger, t, seed.wrapping_mul(2 * t + 3) | 1);
                let store = &store;
                scope.spawn(move || -> Result<(), String> {
                    for step in 0u64.. {
                        writer.step().map_err(|e| format!("thread {t}: {e}"))?;
                        if t == 0 && step % 64 == 0 {
                            store.train_dictionary();
                            board.at(3).store(store.stats().dictionaries.pages, Ordering::Relaxed);
                        }
                        if t == 1 && step % 32 == 0 && store.stats().disks.len() > 1 {
                            let drain = step / 32 % 3 > 0;
                            store.drain_tier(Some("a"), drain).map_err(|e| e.to_string())?;
                            if !drain {
                                // Refused while neither is claimed.
                                let _ = store.write_back(0);
                            }
                        }
                        board.at(1).store(store.stats().cleaned_segments, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap())
    })
}

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().unwrap())
}

#[test]
fn killed_at_any_moment_nothing_acknowledged_is_lost() {
    kill_again_and_again("");
}

/// Memory holds a part of it.
#[test]
fn killed_at_any_moment_nothing_on_disk_is_lost() {
    let file = std::env::temp_dir().join(format!("ghostswap-recover-{}", std::process::id()));
    kill_again_and_again(&format!(" + file:{},size=64M", file.display()));
    std::fs::remove_file(file).unwrap();
}

/// Two, in one order or the other, of which one is drained now and then: so pages go from one to the other.
#[test]
fn killed_at_any_moment_nothing_on_two_disks_is_lost() {
    let [a, b] = ["a", "b"].map(|name| {
        let file = std::env::temp_dir().join(format!("ghostswap-recover-{name}-{}", std::process::id()));
        (format!(" + file:{},size=16M,name={name}", file.display()), file)
    });
    kill_above(&[format!("{}{}", a.0, b.0), format!("{}{}", b.0, a.0)]);
    [a, b].into_iter().for_each(|(_, file)| std::fs::remove_file(file).unwrap());
}

fn kill_again_and_again(disk: &str) {
    kill_above(&[disk.to_string()]);
}

/// Each life above one of these.
fn kill_above(disks: &[String]) {
    let lives = env("GHOSTSWAP_RECOVER_LIVES", 60);
    let clock = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = env("GHOSTSWAP_RECOVER_SEED", clock & 0xffff_ffff);
    let arena = create_arena(false).unwrap();
    let ledger = Ledger::new(SIZES.len() * THREADS as usize * RANGE as usize);
    // 0: lives that came to write; 1: segments cleaned in the present one; 2: the present one; 3: pages compressed with a
    // dictionary in it.
    let board = Shared::new(4);
    let mut rng = Rng(seed | 1);
    let (mut cleaned, mut early, mut with_dictionary) = (0, 0, 0);
    let begin = |life: u64, rng: &mut Rng| {
        let disk = &disks[rng.below(disks.len() as u64) as usize];
        let tier = format!("{}{disk}", TIERS[rng.below(TIERS.len() as u64) as usize]);
        let life_seed = rng.next() >> 33 | 1;
        fork(|| match live(&arena, &tier, &ledger, &board, life_seed, life) {
            Ok(()) => 0,
            Err(e) => {
                eprintln!("seed {seed}, life {life}, {tier}: {e}");
                1
            }
        })
    };
    let mut next = None;
    for life in 0..lives {
        let before = board.at(0).load(Ordering::SeqCst);
        board.at(1).store(0, Ordering::SeqCst);
        board.at(3).store(0, Ordering::SeqCst);
        board.at(2).store(life, Ordering::SeqCst);
        let child = next.take().unwrap_or_else(|| begin(life, &mut rng));
        // Every second stands by while the one before it writes.
        if life + 1 < lives && rng.below(2) == 0 {
            next = Some(begin(life + 1, &mut rng));
        }
        // Every fourth is killed while it recovers or checks, the rest while they write.
        if rng.below(4) != 0 {
            let late = Instant::now() + Duration::from_secs(30);
            while board.at(0).load(Ordering::SeqCst) == before {
                assert_eq!(ended(child), None, "seed {seed}, life {life}: the child ended early");
                assert!(Instant::now() < late, "seed {seed}, life {life}: no recovery within 30 s");
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(Duration::from_micros(rng.below(150_000)));
            // Some live longer if none was long enough to train a dictionary, as on a busy machine.
            let until = Instant::now() + Duration::from_secs(2);
            let none = || with_dictionary + board.at(3).load(Ordering::SeqCst) == 0;
            while life > lives / 2 && none() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
        } else {
            std::thread::sleep(Duration::from_micros(rng.below(12_000)));
        }
        kill(child);
        assert_eq!(wait(child), End::Signal(libc::SIGKILL), "seed {seed}, life {life}");
        early += u64::from(board.at(0).load(Ordering::SeqCst) == before);
        cleaned += board.at(1).load(Ordering::SeqCst);
        with_dictionary += board.at(3).load(Ordering::SeqCst);
    }
    println!("seed {seed}: {lives} lives, {early} of them killed before they wrote, {cleaned} segments cleaned");
    println!("{with_dictionary} pages compressed with a dictionary");
    assert!(with_dictionary > 0 || lives < 40, "dictionaries were in play");
    assert!(cleaned > lives, "the limit is tiny enough for the cleaner to work: {cleaned}");
    let store = take_up(&arena, &format!("{}{}", TIERS[0], disks[0]), &ledger)
        .unwrap_or_else(|e| panic!("seed {seed}, at the end: {e}"));
    for v in store.volumes() {
        v.lane().unwrap().discard(0, v.bytes()).unwrap();
    }
    store.audit().unwrap_or_else(|e| panic!("seed {seed}, all discarded: {e}"));
    let stats = store.stats();
    assert_eq!((stats.stored_pages, stats.filled_pages, stats.zero_pages), (0, 0, 0), "seed {seed}: {stats}");
    assert_eq!((stats.live_bytes, stats.map_bytes), (0, 0), "seed {seed}: {stats}");
}

fn filled(store: &Store, bytes: u64, pages: u64) {
    let volume = store.create_volume(bytes).unwrap();
    let mut lane = volume.lane().unwrap();
    let mut page = vec![0; PAGE];
    for p in 0..pages {
        content(p, 16 + p % 16, &mut page);
        lane.write(p * PAGE as u64, &page).unwrap();
    }
}

fn compare(store: &Store, volume: u16, pages: u64) {
    let mut lane = store.open_volume(volume).unwrap().lane().unwrap();
    let (mut got, mut want) = (vec![0; PAGE], vec![0; PAGE]);
    for p in 0..pages {
        lane.read(p * PAGE as u64, &mut got).unwrap();
        content(p, 16 + p % 16, &mut want);
        assert!(got == want, "page {p}");
    }
}

#[test]
fn a_store_closed_in_order_is_found_again() {
    let store = Store::open(config("ram,limit=16M")).unwrap();
    filled(&store, 1 << 30, 1000);
    filled(&store, 2 << 30, 500);
    let before = store.stats();
    let arena = store.arena_fd().try_clone_to_owned().unwrap();
    drop(store);
    // Another codec, a lower limit, fewer lanes; segments keep their size though none is asked for.
    let other = StoreConfig {
        tiers: vec!["ram,limit=12M,codec=zstd:3,group=32K".parse().unwrap()],
        max_lanes: 1,
        ..StoreConfig::default()
    };
    let store = Store::open_arena(other, arena.try_clone().unwrap()).unwrap();
    store.audit().unwrap();
    let after = store.stats();
    assert_eq!(
        (after.stored_pages, after.filled_pages, after.zero_pages, after.live_bytes, after.map_bytes),
        (before.stored_pages, before.filled_pages, before.zero_pages, before.live_bytes, before.map_bytes)
    );
    assert_eq!((after.volumes, after.virtual_bytes, after.segment_bytes), (2, 3 << 30, 64 << 10));
    assert_eq!(store.volumes().iter().map(|v| v.id()).collect::<Vec<_>>(), [0, 1]);
    compare(&store, 0, 1000);
    compare(&store, 1, 500);
    assert!(matches!(store.open_volume(2), Err(Error::NoVolume { volume: 2 })));
    assert_eq!(store.create_volume(4096).unwrap().id(), 2);
}

/// An arena with something in it, and nobody at it.
fn left_behind() -> OwnedFd {
    let arena = create_arena(false).unwrap();
    let store = Store::open_arena(config("ram,limit=16M"), arena.try_clone().unwrap()).unwrap();
    filled(&store, 1 << 30, 600);
    arena
}

fn poke(arena: &OwnedFd, at: u64, word: u64) -> u64 {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::from(arena.try_clone().unwrap());
    let mut old = [0; 8];
    file.read_exact_at(&mut old, at).unwrap();
    file.write_all_at(&word.to_le_bytes(), at).unwrap();
    u64::from_le_bytes(old)
}

fn peek(arena: &OwnedFd, at: u64) -> u64 {
    let word = poke(arena, at, 0);
    poke(arena, at, word);
    word
}

fn refusal(arena: &OwnedFd, config: StoreConfig) -> String {
    match Store::open_arena(config, arena.try_clone().unwrap()) {
        Err(Error::BadArena(why)) => why,
        Err(e) => panic!("refused with {e}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn what_is_no_arena_of_ours_is_refused_and_keeps_what_it_holds() {
    let arena = left_behind();
    let tier = "ram,limit=16M";
    let frames = peek(&arena, 24);
    for (at, word, says) in [
        (0, 0, "magic"),
        (0, u64::from_le_bytes(*b"SWAPSPCE"), "magic"),
        (8, 1, "version 1; this program reads 6 to 7"),
        (8, 5, "version 5"),
        (16, 4096, "do not make up"),
        (24, frames + 1, "do not make up"),
        (4096, 4097, "sizes"),
        (4096 + 2 * 64, 4096, "sizes"),
    ] {
        let old = poke(&arena, at, word);
        let why = refusal(&arena, config(tier));
        assert!(why.contains(says) && !why.contains('\n'), "{at}: {why}");
        poke(&arena, at, old);
    }
    let other = StoreConfig { segment_bytes: Some(128 << 10), ..config(tier) };
    assert!(refusal(&arena, other).contains("65536"));
    assert!(refusal(&arena, StoreConfig { hugetlb: true, ..config(tier) }).contains("huge"));
    // A link into the blue, and one page linked twice.
    let root = 4096 + 32;
    let link = peek(&arena, root);
    for wrong in [link & !0xffff_ffff | 0x7fff_fff0, link << 32 | link] {
        poke(&arena, root, wrong);
        assert!(refusal(&arena, config(tier)).contains("linked twice"));
        poke(&arena, root, link);
    }
    let store = Store::open_arena(config(tier), arena.try_clone().unwrap()).unwrap();
    store.audit().unwrap();
    compare(&store, 0, 600);
}

#[test]
fn a_slot_that_cannot_be_costs_its_page_alone() {
    let arena = left_behind();
    // As docs/FORMAT.md says where things are.
    let segments = peek(&arena, 72);
    let meta = (4096 + 1024 * 64 + segments * 32).div_ceil(4096) * 4096;
    let upper = peek(&arena, 4096 + 32) & 0xffff_ffff;
    let node = peek(&arena, meta + upper * 4096) & 0xffff_ffff;
    let leaf = peek(&arena, meta + node * 4096) & 0xffff_ffff;
    let slot = meta + leaf * 4096 + 5 * 8;
    assert_eq!(peek(&arena, slot) & 3, 2, "page 5 is stored");
    poke(&arena, slot, 2 | 0xff_ffff << 39 | 100 << 2);
    let store = Store::open_arena(config("ram,limit=16M"), arena.try_clone().unwrap()).unwrap();
    store.audit().unwrap();
    assert_eq!(store.stats().lost_pages, 1);
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    let mut page = vec![0; PAGE];
    assert!(matches!(lane.read(5 * PAGE as u64, &mut page), Err(Error::Lost { page: 5 })));
    content(5, 16 + 5, &mut page);
    lane.write(5 * PAGE as u64, &page).unwrap();
    drop(lane);
    compare(&store, 0, 600);
    assert_eq!(store.stats().lost_pages, 0);
    store.audit().unwrap();
}

#[test]
fn an_arena_not_finished_is_begun_anew_and_other_data_is_not_touched() {
    let sized = create_arena(false).unwrap();
    std::fs::File::from(sized.try_clone().unwrap()).set_len(123 << 20).unwrap();
    poke(&sized, 8, 6);
    let store = Store::open_arena(config("ram,limit=16M"), sized).unwrap();
    filled(&store, 1 << 30, 10);
    compare(&store, 0, 10);
    let foreign = create_arena(false).unwrap();
    std::fs::File::from(foreign.try_clone().unwrap()).set_len(1 << 20).unwrap();
    poke(&foreign, 1 << 19, 77);
    assert!(refusal(&foreign, config("ram,limit=16M")).contains("magic"));
    assert_eq!(peek(&foreign, 1 << 19), 77);
}

#[test]
fn a_volume_grows_under_an_open_lane_and_stays_so() {
    let store = Store::open(config("ram,limit=16M")).unwrap();
    let volume = store.create_volume(1 << 20).unwrap();
    let mut lane = volume.lane().unwrap();
    let page = vec![7; PAGE];
    assert!(matches!(lane.write(1 << 20, &page), Err(Error::OutOfRange { .. })));
    for bad in [4096, (1 << 20) + 1, MAX_VOLUME_BYTES + 4096] {
        assert!(matches!(volume.grow(bad), Err(Error::InvalidConfig(_))), "{bad}");
    }
    volume.grow(1 << 30).unwrap();
    lane.write((1 << 30) - PAGE as u64, &page).unwrap();
    let arena = store.arena_fd().try_clone_to_owned().unwrap();
    drop((lane, volume, store));
    let store = Store::open_arena(config("ram,limit=16M"), arena).unwrap();
    let volume = store.open_volume(0).unwrap();
    let mut got = vec![0; PAGE];
    volume.lane().unwrap().read((1 << 30) - PAGE as u64, &mut got).unwrap();
    assert_eq!((volume.bytes(), got), (1 << 30, page));
}

#[test]
fn a_second_process_is_kept_out() {
    let arena = create_arena(false).unwrap();
    let store = Store::open_arena(config("ram,limit=16M"), arena.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let second = || {
        fork(|| match Store::open_arena(config("ram,limit=16M"), arena.try_clone().unwrap()) {
            Err(Error::BadArena(why)) if why.contains("another process") => 7,
            Err(_) => 8,
            Ok(_) => 9,
        })
    };
    assert_eq!(wait(second()), End::Exit(7));
    drop(store);
    assert_eq!(wait(second()), End::Exit(9));
}

/// Needs 32 free huge pages (`sysctl vm.nr_hugepages=32`); says so and rests without them.
#[test]
fn an_arena_of_huge_pages_is_found_again() {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = info.lines().find_map(|l| l.strip_prefix("HugePages_Free:")?.trim().parse::<u64>().ok());
    if free.unwrap_or(0) < 32 {
        println!("not run: fewer than 32 free huge pages");
        return;
    }
    let config = || StoreConfig { hugetlb: true, ..config("ram,limit=16M") };
    let arena = create_arena(true).unwrap();
    let store = Store::open_arena(config(), arena.try_clone().unwrap()).unwrap();
    filled(&store, 1 << 30, 600);
    let before = store.stats();
    drop(store);
    for _ in 0..2 {
        let store = Store::open_arena(config(), arena.try_clone().unwrap()).unwrap();
        store.audit().unwrap();
        compare(&store, 0, 600);
        let after = store.stats();
        assert_eq!((after.stored_pages, after.held_bytes), (before.stored_pages, before.held_bytes));
    }
    let store = Store::open_arena(config(), arena).unwrap();
    filled(&store, 1 << 30, 600);
    compare(&store, 1, 600);
}

/// Bytes of the arena's mapping in this process that are locked: the greatest `Locked:` there is.
fn locked_bytes() -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let sizes = maps.lines().filter_map(|l| l.strip_prefix("Locked:")?.trim().strip_suffix(" kB")?.parse().ok());
    sizes.max().unwrap_or(0u64) * 1024
}

/// How long it takes with a gibibyte stored: `cargo test --release --test recover -- --ignored --nocapture`.
#[test]
#[ignore = "takes two gibibytes of memory"]
fn a_gibibyte_is_taken_up_quickly() {
    for tier in ["ram,limit=2G", "ram,limit=2G,codec=zstd:1,group=64K"] {
        let config = || StoreConfig { tiers: vec![tier.parse().unwrap()], ..StoreConfig::default() };
        let arena = create_arena(false).unwrap();
        let store = Store::open_arena(config(), arena.try_clone().unwrap()).unwrap();
        let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
        let mut rng = Rng(3);
        let mut run = vec![0; 16 * PAGE];
        for i in 0.. {
            run.chunks_mut(PAGE).for_each(|p| {
                p[..PAGE / 2].chunks_mut(8).for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
            });
            lane.write(i * run.len() as u64, &run).unwrap();
            if i % 64 == 0 && store.stats().live_bytes >= 1 << 30 {
                break;
            }
        }
        drop(lane);
        let before = store.stats();
        drop(store);
        let begun = Instant::now();
        let store = Store::open_arena(config(), arena.try_clone().unwrap()).unwrap();
        println!("{tier}: {} pages in {} bytes: {:?}", before.stored_pages, before.live_bytes, begun.elapsed());
        assert_eq!(store.stats().stored_pages, before.stored_pages);
        store.audit().unwrap();
        while locked_bytes() < before.live_bytes {
            assert!(begun.elapsed() < Duration::from_secs(20), "{} locked", locked_bytes());
            std::thread::sleep(Duration::from_millis(1));
        }
        println!("all locked after {:?}", begun.elapsed());
    }
}
