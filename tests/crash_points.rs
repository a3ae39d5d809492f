//! Every crash point, in turn: a scripted history on a store without threads is stopped at the
//! first point it comes to, recovered and compared, then at the second, and so on to its end. And
//! the recovery is stopped as well: at one point each time, at every one for each kind of point.
//!
//! `cargo test -p ghostswap --release --features crash-points --test crash_points`
//!
//! Where one point is passed many times in a row (the 512 slots of a leaf, the 1024 links of a
//! node) the first three passes are taken and then every 61st.

#![allow(unsafe_code, reason = "fork and shared memory")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "crash_points/histories.rs"]
mod histories;
mod ledger;

use ghostswap::config::Limit;
use ghostswap::{create_arena, Lane, Steps, Store, StoreConfig, MAX_VOLUME_BYTES};
use histories::{walk_dictionaries, walk_stores, walk_two};
use ledger::{content, fork, wait, End, Ledger, Shared, PAGE};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

const SIZES: [u64; 2] = [MAX_VOLUME_BYTES, 1 << 30];
const STOPPED: i32 = 42;
const FAR: u64 = (1 << 32) - 40;

// --- the hook -------------------------------------------------------------------------------------

static TARGET: AtomicU64 = AtomicU64::new(u64::MAX);
static PASSED: AtomicU64 = AtomicU64::new(0);
static LAST: AtomicU64 = AtomicU64::new(0);
static IN_A_ROW: AtomicU64 = AtomicU64::new(0);
/// Only those points count that a change of tiers has and nothing else, or that a dictionary has.
static OF_TIERS: AtomicBool = AtomicBool::new(false);
static OF_DICTIONARIES: AtomicBool = AtomicBool::new(false);
const TIERS: [&str; 3] = ["superblock: before a part of the tier", "tier: ", "recovery: the table's end"];
/// Address and length of the name of the point stopped at.
static STOPPED_AT: OnceLock<Shared> = OnceLock::new();

/// Ends the process at the target'th point that counts.
fn hook(name: &'static str) {
    if OF_TIERS.load(Ordering::Relaxed) && !TIERS.iter().any(|beginning| name.starts_with(beginning)) {
        return;
    }
    if OF_DICTIONARIES.load(Ordering::Relaxed) && !name.starts_with("dictionary: ") {
        return;
    }
    let address = name.as_ptr() as u64;
    let in_a_row = if LAST.swap(address, Ordering::Relaxed) == address {
        IN_A_ROW.fetch_add(1, Ordering::Relaxed) + 1
    } else {
        IN_A_ROW.store(0, Ordering::Relaxed);
        0
    };
    if in_a_row >= 3 && in_a_row % 61 != 0 {
        return;
    }
    if PASSED.fetch_add(1, Ordering::Relaxed) == TARGET.load(Ordering::Relaxed) {
        let board = STOPPED_AT.get().unwrap();
        board.at(0).store(address, Ordering::SeqCst);
        board.at(1).store(name.len() as u64, Ordering::SeqCst);
        // SAFETY: ends this process, a child of the test, at once.
        unsafe { libc::_exit(STOPPED) }
    }
}

/// Runs `body` in a child that ends at its `target`th point. None: it came to its end.
fn stopped_at(target: u64, body: impl FnOnce()) -> Option<&'static str> {
    let child = fork(|| {
        PASSED.store(0, Ordering::Relaxed);
        LAST.store(0, Ordering::Relaxed);
        TARGET.store(target, Ordering::Relaxed);
        body();
        0
    });
    match wait(child) {
        End::Exit(0) => None,
        End::Exit(STOPPED) => {
            let board = STOPPED_AT.get().unwrap();
            let (address, len) = (board.at(0).load(Ordering::SeqCst), board.at(1).load(Ordering::SeqCst));
            // SAFETY: a static string of this program, at the same address in the forked child.
            let name = unsafe { std::slice::from_raw_parts(address as *const u8, len as usize) };
            Some(std::str::from_utf8(name).unwrap())
        }
        other => panic!("point {target}: the child ended with {other:?}"),
    }
}

// --- the history ----------------------------------------------------------------------------------

#[derive(Clone, Copy)]
enum Op {
    Create,
    /// Volume, first page, pages, kind of content.
    Write(u8, u64, u64, u64),
    /// Volume, page, sectors, kind of content.
    Sectors(u8, u64, usize, usize, u64),
    /// Volume, first page, pages.
    Discard(u8, u64, u64),
    /// The lanes are closed (their segments sealed) and opened again.
    Reopen,
    Clean,
    CloseCleaner,
    GiveBack,
    /// Some segments down to disk; the emptiest there copied back to memory.
    Demote,
    Compact,
    /// All that is on disk back to memory.
    Drain,
    /// Some segments from the first of two disks on to the second, or back.
    PassOn,
    PassBack,
    /// The memory limit is set, to what it is.
    Limit,
    /// Other settings of the memory tiers are.
    Tune,
    /// All dictionaries but one are dropped by now.
    Drop,
    /// A dictionary is trained from what is sealed, which is better than what there was.
    Train,
}

const RAW: u64 = 3;
const SMALL: u64 = 6;
const MIDDLE: u64 = 12;
const FILL: u64 = 1;
const PATTERN: u64 = 2;
const ZERO: u64 = 0;
/// Of two vocabularies.
const WORDS: u64 = 14;
const OTHERS: u64 = 15;

fn history() -> Vec<Op> {
    use Op::*;
    vec![
        Create,
        Create,
        Write(0, 0, 34, RAW),
        Demote,
        Write(0, 34, 20, SMALL),
        Write(1, 0, 3, PATTERN),
        Write(1, 3, 2, FILL),
        Sectors(0, 3, 2, 5, MIDDLE),
        Sectors(1, 9, 0, 3, SMALL),
        // Whole segments die: retired at once, or when they are sealed.
        Write(0, 0, 18, RAW),
        Clean,
        Write(0, 20, 20, MIDDLE),
        Discard(0, 36, 5),
        Clean,
        Demote,
        // A leaf and a node come, and go page by page.
        Write(0, FAR, 8, MIDDLE),
        Write(0, FAR, 2, ZERO),
        Discard(0, FAR, 8),
        Clean,
        // A cluster is dropped whole.
        Write(0, 512, 20, SMALL),
        Write(0, 532, 3, FILL),
        Discard(0, 512, 512),
        Clean,
        GiveBack,
        Limit,
        Tune,
        Reopen,
        // Survivors of groups and of single pages.
        Write(1, 16, 32, SMALL),
        Write(0, 2, 30, RAW),
        Reopen,
        Demote,
        Discard(0, 9, 4),
        Compact,
        Clean,
        Demote,
        Discard(1, 18, 3),
        Write(1, 24, 5, RAW),
        Discard(0, 5, 20),
        Clean,
        CloseCleaner,
        Write(1, 0, 6, MIDDLE),
        Clean,
        GiveBack,
    ]
}

/// The pages that the history touches, each with its entry in the ledger.
fn entries() -> BTreeMap<(u8, u64), usize> {
    let near = (0..64).map(|p| (0, p));
    let cluster = (512..540).map(|p| (0, p));
    let far = (FAR..FAR + 8).map(|p| (0, p));
    let other = (0..64).map(|p| (1, p));
    near.chain(cluster).chain(far).chain(other).enumerate().map(|(i, at)| (at, i)).collect()
}

/// A frame of 128K is grown in two steps, so that one can be torn.
fn config(tier: &str) -> StoreConfig {
    StoreConfig {
        tiers: tier.split(" + ").map(|t| t.parse().unwrap()).collect(),
        segment_bytes: Some(if tier.contains("group") { 128 << 10 } else { 64 << 10 }),
        max_lanes: 2,
        ..StoreConfig::default()
    }
}

struct Player<'a> {
    store: Store,
    steps: Steps,
    lanes: Vec<Lane>,
    ledger: &'a Ledger,
    entries: &'a BTreeMap<(u8, u64), usize>,
    version: u64,
}

impl<'a> Player<'a> {
    fn open(arena: &OwnedFd, tier: &str, ledger: &'a Ledger, entries: &'a BTreeMap<(u8, u64), usize>) -> Player<'a> {
        let (store, steps) = Steps::open(config(tier), arena.try_clone().unwrap()).unwrap();
        Player { store, steps, lanes: Vec::new(), ledger, entries, version: 1 << 20 }
    }

    fn open_lanes(&mut self) {
        self.lanes.clear();
        self.lanes = self.store.volumes().iter().map(|v| v.lane().unwrap()).collect();
    }

    fn play(&mut self, op: Op) {
        self.steps.grow().unwrap();
        match op {
            Op::Create => {
                self.store.create_volume(SIZES[self.lanes.len()]).unwrap();
                self.open_lanes();
            }
            Op::Write(v, first, pages, kind) => self.write(v, first, pages, kind),
            Op::Sectors(v, page, from, to, kind) => {
                let mut bytes = [0; PAGE];
                let version = self.next(kind);
                content(page, version, &mut bytes);
                let entry = self.entries[&(v, page)];
                self.ledger.begin(entry, from, to, version);
                let at = page * PAGE as u64 + from as u64 * 512;
                let sectors = &bytes[from * 512..to * 512];
                assert_eq!(self.lanes[v as usize].try_write(at, sectors).unwrap(), sectors.len());
                self.ledger.acknowledge(entry);
            }
            Op::Discard(v, first, pages) => {
                let touched: Vec<usize> =
                    (first..first + pages).filter_map(|p| self.entries.get(&(v, p)).copied()).collect();
                touched.iter().for_each(|e| self.ledger.begin(*e, 0, 8, 0));
                self.lanes[v as usize].discard(first * PAGE as u64, pages * PAGE as u64).unwrap();
                touched.iter().for_each(|e| self.ledger.acknowledge(*e));
            }
            Op::Reopen => {
                self.lanes.clear();
                self.open_lanes();
            }
            Op::Clean => drop(self.steps.clean()),
            Op::CloseCleaner => self.steps.close_cleaner(),
            Op::GiveBack => self.steps.give_back(1),
            Op::Demote => drop(self.steps.demote()),
            Op::Compact => drop(self.steps.compact()),
            Op::PassOn => drop(self.steps.pass_on(0, 1)),
            Op::PassBack => drop(self.steps.pass_on(1, 0)),
            Op::Drain => {
                for disk in self.store.stats().disks {
                    self.store.drain_tier(Some(&disk.name), true).unwrap();
                }
                for turn in 0.. {
                    if self.store.stats().disk.unwrap().used_bytes == 0 {
                        break;
                    }
                    assert!(turn < 1000, "it does not get empty");
                    self.steps.drain();
                    self.steps.close_cleaner();
                    self.steps.clean();
                    self.steps.grow().unwrap();
                }
            }
            Op::Drop => assert_eq!(self.store.stats().dictionaries.count, 1, "{}", self.store.stats()),
            Op::Train => assert!(self.steps.train(), "{}", self.store.stats()),
            Op::Limit => {
                let limit = self.store.tiers()[0].limit_bytes;
                self.store.set_limit(Limit::Bytes(limit)).unwrap();
            }
            Op::Tune => {
                let set = |text: &str| self.store.set_tier(&text.parse().unwrap()).unwrap();
                set("ram,high=90%,low=80%");
                if self.store.tiers().iter().any(|tier| tier.name == "cold") {
                    set("ram,limit=4M");
                    set("cold,limit=4M,idle=5,cpu=50%");
                }
            }
        }
    }

    fn next(&mut self, kind: u64) -> u64 {
        self.version += 1 << 8;
        self.version | kind
    }

    /// In requests of up to 16 pages, as a kernel's swap-out comes.
    fn write(&mut self, v: u8, first: u64, pages: u64, kind: u64) {
        for from in (first..first + pages).step_by(16) {
            let run: Vec<u64> = (from..(from + 16).min(first + pages)).collect();
            let version = self.next(kind);
            let mut bytes = vec![0; run.len() * PAGE];
            for (page, out) in run.iter().zip(bytes.chunks_mut(PAGE)) {
                content(*page, version, out);
                self.ledger.begin(self.entries[&(v, *page)], 0, 8, version);
            }
            // Of the frames that there are lanes leave some to each that makes room.
            self.steps.grow().unwrap();
            assert_eq!(
                self.lanes[v as usize].try_write(from * PAGE as u64, &bytes).unwrap(),
                bytes.len(),
                "{}",
                self.store.stats()
            );
            run.iter().for_each(|page| self.ledger.acknowledge(self.entries[&(v, *page)]));
        }
    }

    /// Compares all pages with the ledger, and all counts with a recount.
    fn check(&mut self) {
        self.lanes.clear();
        self.store.audit().unwrap();
        let what = &self.store.tiers()[0].what;
        let both = ["high=auto,low=auto", "high=90%,low=80%"];
        assert!(both.iter().any(|marks| what.ends_with(marks)), "half a setting: {what}");
        self.open_lanes();
        let mut got = [0; PAGE];
        for ((v, page), entry) in self.entries {
            match self.lanes.get_mut(*v as usize) {
                Some(lane) => lane.read(page * PAGE as u64, &mut got).unwrap(),
                None => got.fill(0),
            }
            self.ledger.settle(*entry, *page, &got).unwrap();
        }
        self.lanes.clear();
    }

    /// Goes on after a recovery: everything once more, and nothing may be in the way.
    fn go_on(&mut self) {
        self.version = 1 << 40;
        self.open_lanes();
        while self.lanes.len() < SIZES.len() {
            self.play(Op::Create);
        }
        for op in [
            // What earlier stores had open takes a frame each, however little is in it.
            Op::Clean,
            Op::Clean,
            Op::Write(1, 0, 40, MIDDLE),
            Op::Write(0, 0, 33, RAW),
            Op::Write(0, FAR, 8, SMALL),
            Op::Discard(0, 512, 512),
            Op::Demote,
            Op::Clean,
            Op::Clean,
            Op::Compact,
            Op::GiveBack,
        ] {
            self.play(op);
        }
        self.check();
        assert_eq!(self.store.stats().lost_pages, 0);
    }
}

// --- the walk -------------------------------------------------------------------------------------

/// Stops the history at its `target`th point, then the recovery at its `again`th. Returns the
/// names of the points; the first None: the history came to its end.
fn stop_twice(tier: &str, history: &[Op], target: u64, again: u64) -> (Option<&'static str>, Option<&'static str>) {
    stop_twice_and_open(tier, history, target, again, tier)
}

/// The same, with other tiers from the recovery on.
fn stop_twice_and_open(
    tier: &str,
    history: &[Op],
    target: u64,
    again: u64,
    next: &str,
) -> (Option<&'static str>, Option<&'static str>) {
    let arena = create_arena(false).unwrap();
    let entries = entries();
    let ledger = Ledger::new(entries.len());
    let first = stopped_at(target, || {
        let mut player = Player::open(&arena, tier, &ledger, &entries);
        history.iter().for_each(|op| player.play(*op));
    });
    let second = stopped_at(again, || drop(Player::open(&arena, next, &ledger, &entries)));
    let outcome = std::panic::catch_unwind(|| {
        let mut player = Player::open(&arena, next, &ledger, &entries);
        player.check();
        player.go_on();
    });
    if outcome.is_err() {
        panic!("{tier}: stopped at point {target}, {first:?}, and in recovery at {again}, {second:?}");
    }
    (first, second)
}

/// Names of all crash points in the sources.
fn all_points() -> BTreeSet<String> {
    let mut folders = vec![std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut names = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for file in std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()) {
            if file.is_dir() {
                folders.push(file);
                continue;
            }
            let text = std::fs::read_to_string(file).unwrap();
            names.extend(text.split("crash_point!(\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_string()));
        }
    }
    names
}

fn walk(tier: &str, visited: &Mutex<BTreeSet<String>>) {
    // With a disk, which takes its time, the recoveries of only those kinds that nothing else has.
    let known = if tier.contains("file:") { visited.lock().unwrap().clone() } else { BTreeSet::new() };
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let (mut stops, mut kinds_in_full) = (0, 0);
    for target in 0.. {
        let (first, second) = stop_twice(tier, &history(), target, target * 7 % 31);
        let mut names: Vec<_> = first.into_iter().chain(second).collect();
        stops += 1;
        if first.is_some_and(|name| seen.insert(name) && !known.contains(name)) {
            // The first of its kind: every point of the recovery in turn.
            kinds_in_full += 1;
            for again in 0.. {
                let (_, second) = stop_twice(tier, &history(), target, again);
                stops += 1;
                names.extend(second);
                if second.is_none() {
                    break;
                }
            }
        }
        visited.lock().unwrap().extend(names.iter().map(|n| n.to_string()));
        if first.is_none() {
            println!("{tier}: {target} points, {kinds_in_full} kinds, {stops} recoveries stopped and repeated");
            return;
        }
    }
}

#[test]
fn stopped_at_any_point_nothing_acknowledged_is_lost() {
    STOPPED_AT.get_or_init(|| Shared::new(3));
    ghostswap::set_crash_hook(hook);
    let visited = Mutex::new(BTreeSet::new());
    let again = "ram,limit=8M,codec=lz4 + ram,codec=zstd:1,group=16K,idle=0";
    let file = std::env::temp_dir().join(format!("ghostswap-crash-{}", std::process::id()));
    let disk = format!("ram,limit=4M,codec=lz4 + file:{},size=16M,prealloc=off", file.display());
    for tier in ["ram,limit=4M,codec=lz4", "ram,limit=8M,codec=lz4,group=16K", again, &disk] {
        walk(tier, &visited);
    }
    walk_dictionaries(&disk.replace("lz4", "zstd:1,dict=8K"), &visited);
    walk_stores(&file.display().to_string(), &visited);
    let at = |name: &str| format!("file:{}{name},size=16M,prealloc=off", file.display());
    walk_two("ram,limit=8M,codec=lz4", [&at("c"), &format!("{},encrypt=off", at("d"))], &visited);
    for name in ["", "a", "b", "c", "d"] {
        std::fs::remove_file(format!("{}{name}", file.display())).unwrap();
    }
    let missed: Vec<_> = all_points().difference(&visited.lock().unwrap()).cloned().collect();
    assert!(missed.is_empty(), "never stopped at: {missed:?}");
}
