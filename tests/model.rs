//! The store against a plain `BTreeMap`: random reads, writes, discards and zeroes over several
//! volumes and threads, with limits so tiny that cleaning runs all the time.
//!
//! Each thread owns a range of each volume and keeps the model of it, so every read can be checked
//! to the byte while all threads share segments, cleaner and map (ranges meet within clusters, so
//! leaves are made and taken out by several threads at once).
//!
//! `GHOSTSWAP_MODEL_OPS` (operations in all, default 200000) and `GHOSTSWAP_MODEL_SEED` repeat a run.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ghostswap::config::Limit;
use ghostswap::{Error, PageKind, Store, StoreConfig};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const THREADS: u64 = 4;
/// Pages of a thread's range in one volume; ranges interleave in stripes of 64 pages.
const RANGE_PAGES: u64 = 640;

/// xorshift64*: small, seeded, good enough to choose operations.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// A page's content: zero, same-filled (also with patterns that need a record), compressible to
/// various degrees, random.
fn content(rng: &mut Rng, out: &mut [u8]) {
    let kind = rng.below(16);
    match kind {
        0 => out.fill(0),
        1 => out.fill(rng.next() as u8),
        2 => {
            let p = rng.next().to_le_bytes();
            out.chunks_mut(8).for_each(|c| c.copy_from_slice(&p[..c.len()]));
        }
        3 => out.chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()[..c.len()])),
        14 | 15 => words(PHASE.load(Ordering::Relaxed), rng, out),
        _ => {
            let step = rng.below(61) + 1;
            let salt = rng.next();
            let noisy = out.len() * (kind as usize - 3) / 26;
            for (i, b) in out.iter_mut().enumerate() {
                *b = ((i as u64 / step) ^ salt) as u8;
            }
            out[..noisy].chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()[..c.len()]));
        }
    }
}

/// The vocabulary of the time: what was a good dictionary once is none for long.
static PHASE: AtomicU64 = AtomicU64::new(0);

fn words(vocabulary: u64, rng: &mut Rng, out: &mut [u8]) {
    for word in out.chunks_mut(32) {
        let mut letters = Rng((vocabulary << 8 | rng.below(128)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        word.iter_mut().for_each(|b| *b = b'a' + letters.below(26) as u8);
    }
}

/// Dictionaries are trained one after another, and pages change from one to the next.
fn train(store: &Store, working: &AtomicU64) {
    while working.load(Ordering::Relaxed) > 0 {
        store.train_dictionary();
        std::thread::sleep(Duration::from_millis(30));
        PHASE.fetch_add(1, Ordering::Relaxed);
    }
}

/// Page number in the volume of page `i` of thread `t`'s range.
fn page_of(t: u64, i: u64, far: bool) -> u64 {
    let near = (i / 64 * THREADS + t) * 64 + i % 64;
    // The last stripes stand near the end of a 16T volume: inner nodes come and go.
    if far && i >= RANGE_PAGES - 128 {
        (1 << 32) - 1 - near
    } else {
        near
    }
}

struct Worker {
    store: Store,
    lane: ghostswap::Lane,
    model: BTreeMap<u64, Vec<u8>>,
    thread: u64,
    far: bool,
}

impl Worker {
    fn step(&mut self, rng: &mut Rng, buf: &mut [u8]) -> Result<(), String> {
        let i = rng.below(RANGE_PAGES);
        // A run that stays within the stripe (and ascends in the volume).
        let run = if self.far && i >= RANGE_PAGES - 128 { 1 } else { (rng.below(20) + 1).min(64 - i % 64) };
        let page = page_of(self.thread, i, self.far);
        match rng.below(100) {
            0..=33 => self.read(page, run, buf),
            34..=39 => self.kinds(page, run),
            40..=76 => {
                let bytes = &mut buf[..(run * PAGE) as usize];
                bytes.chunks_mut(PAGE as usize).for_each(|p| content(rng, p));
                self.write(page * PAGE, run, bytes.to_vec())
            }
            77..=84 => {
                // Sectors within the run: read-modify-write at the edges.
                let from = rng.below(run * 8);
                let n = rng.below(run * 8 - from) + 1;
                let mut bytes = vec![0; (n * 512) as usize];
                content(rng, &mut bytes);
                self.write(page * PAGE + from * 512, n, bytes)
            }
            85..=92 => {
                self.lane.discard(page * PAGE, run * PAGE).map_err(|e| e.to_string())?;
                (page..page + run).for_each(|p| drop(self.model.remove(&p)));
                Ok(())
            }
            _ => {
                let from = rng.below(run * 8);
                let n = rng.below(run * 8 - from) + 1;
                let at = page * PAGE + from * 512;
                self.lane.write_zeroes(at, n * 512).map_err(|e| e.to_string())?;
                self.put(at, &vec![0; (n * 512) as usize]);
                Ok(())
            }
        }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        for (k, sector) in bytes.chunks(512).enumerate() {
            let pos = at + k as u64 * 512;
            let page = self.model.entry(pos / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
            page[(pos % PAGE) as usize..][..512].copy_from_slice(sector);
        }
    }

    fn write(&mut self, at: u64, _n: u64, bytes: Vec<u8>) -> Result<(), String> {
        self.lane.write(at, &bytes).map_err(|e| format!("write at {at}: {e}\n{}", self.store.stats()))?;
        self.put(at, &bytes);
        Ok(())
    }

    /// Zeros are never told to be stored, nor anything else to be zeros.
    fn kinds(&mut self, page: u64, run: u64) -> Result<(), String> {
        let mut told = Vec::new();
        let tell = |kind, bytes| {
            told.push((kind, bytes));
            true
        };
        self.lane.kinds(page * PAGE, run * PAGE, tell).map_err(|e| e.to_string())?;
        if told.windows(2).any(|two| two[0].0 == two[1].0)
            || told.iter().map(|(_, bytes)| bytes).sum::<u64>() != run * PAGE
        {
            return Err(format!("runs from page {page} on: {told:?} for {run} pages"));
        }
        let kinds = told.iter().flat_map(|(kind, bytes)| std::iter::repeat_n(*kind, (bytes / PAGE) as usize));
        for (p, kind) in (page..).zip(kinds) {
            let content = self.model.get(&p).map_or(&[][..], |content| content);
            let fits = match kind {
                PageKind::Empty | PageKind::Zero => content.iter().all(|b| *b == 0),
                PageKind::Filled => content.chunks(8).all(|word| *word == content[..8] && word.iter().any(|b| *b != 0)),
                PageKind::Stored => content.iter().any(|b| *b != 0),
                PageKind::Lost => false,
            };
            if !fits {
                return Err(format!("page {p} is told to be {kind:?}"));
            }
        }
        Ok(())
    }

    fn read(&mut self, page: u64, run: u64, buf: &mut [u8]) -> Result<(), String> {
        let buf = &mut buf[..(run * PAGE) as usize];
        self.lane.read(page * PAGE, buf).map_err(|e| e.to_string())?;
        for (k, got) in buf.chunks(PAGE as usize).enumerate() {
            let p = page + k as u64;
            let good = match self.model.get(&p) {
                Some(want) => want == got,
                None => got.iter().all(|b| *b == 0),
            };
            if !good {
                return Err(format!("page {p} differs from the model"));
            }
        }
        Ok(())
    }
}

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().unwrap())
}

/// One of the threads that work.
struct Works<'a>(&'a AtomicU64);

impl Drop for Works<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Now and then what is in memory goes down, all that is below comes up as far as there is room, memory gets
/// less for a moment: none of which may be seen in a page.
fn change_tiers(store: &Store, working: &AtomicU64) {
    let limit = store.tiers()[0].limit_bytes;
    let nap = || std::thread::sleep(Duration::from_millis(7));
    let names: Vec<String> = store.stats().disks.into_iter().map(|disk| disk.name).collect();
    for turn in 0.. {
        if working.load(Ordering::Relaxed) == 0 {
            break;
        }
        let name = Some(names[turn % names.len()].as_str());
        store.write_back(0).unwrap();
        nap();
        store.drain_tier(name, true).unwrap();
        nap();
        store.drain_tier(name, false).unwrap();
        // With less, or refused because more is needed at this moment.
        let _ = store.set_limit(Limit::Bytes(limit - (1 << 20)));
        nap();
        store.set_limit(Limit::Bytes(limit)).unwrap();
        nap();
    }
}

fn run(tier: &str) {
    let slow = if tier.contains("file:") { 4 } else { 1 };
    let ops = env("GHOSTSWAP_MODEL_OPS", 200_000) / 7 / slow;
    let seed = env(
        "GHOSTSWAP_MODEL_SEED",
        Instant::now().elapsed().as_nanos() as u64 ^ u64::from(std::process::id()) << 20 ^ 0x9e37_79b9,
    );
    println!("{tier}: {ops} operations; repeat with GHOSTSWAP_MODEL_SEED={seed} cargo test --release --test model");
    let config = StoreConfig {
        tiers: tier.split(" + ").map(|t| t.parse().unwrap()).collect(),
        segment_bytes: Some(64 << 10),
        max_lanes: 16,
        ..StoreConfig::default()
    };
    let store = Store::open(config).unwrap();
    let volumes = [store.create_volume(ghostswap::MAX_VOLUME_BYTES).unwrap(), store.create_volume(64 << 20).unwrap()];
    let working = AtomicU64::new(THREADS);
    std::thread::scope(|scope| {
        if tier.contains(" + file") {
            scope.spawn(|| change_tiers(&store, &working));
        }
        if tier.contains("dict=") {
            scope.spawn(|| train(&store, &working));
        }
        for thread in 0..THREADS {
            let working = &working;
            let mut workers: Vec<_> = volumes
                .iter()
                .map(|v| Worker {
                    store: store.clone(),
                    lane: v.lane().unwrap(),
                    model: BTreeMap::new(),
                    thread,
                    far: v.bytes() > 1 << 40,
                })
                .collect();
            scope.spawn(move || {
                // Also if it panics.
                let _works = Works(working);
                let mut rng = Rng(seed.wrapping_mul(thread * 2 + 1) | 1);
                let mut buf = vec![0; 64 * PAGE as usize];
                for op in 0..ops / THREADS {
                    let w = rng.below(2) as usize;
                    if let Err(e) = workers[w].step(&mut rng, &mut buf) {
                        panic!("seed {seed}, thread {thread}, volume {w}, operation {op}: {e}");
                    }
                }
                for w in &mut workers {
                    for i in 0..RANGE_PAGES {
                        let page = page_of(thread, i, w.far);
                        w.read(page, 1, &mut buf).unwrap_or_else(|e| panic!("seed {seed}, at the end: {e}"));
                    }
                }
            });
        }
    });
    let full = store.stats();
    println!("{full}");
    assert!(full.cleaned_segments > 0, "the limit is tiny enough for the cleaner to work");
    assert_eq!(full.recompressed_segments > 0, tier.contains(" + ram"), "only with a second tier");
    let dictionaries = &full.dictionaries;
    let in_play = dictionaries.pages > 0 && dictionaries.trained > 0;
    assert!(in_play || !tier.contains("dict="), "dictionaries are in play");
    assert_eq!(full.disk.as_ref().is_some_and(|disk| disk.fetches > 0), tier.contains(" + file"), "only with a disk");
    for v in &volumes {
        v.lane().unwrap().discard(0, v.bytes()).unwrap();
    }
    // It waits for the cleaner, whose copy of a page just discarded counts until it finds out.
    store.audit().unwrap();
    let stats = store.stats();
    assert_eq!((stats.stored_pages, stats.filled_pages, stats.zero_pages), (0, 0, 0), "{stats}");
    assert_eq!(stats.live_bytes, 0, "exact accounting: {stats}");
    assert_eq!(stats.map_bytes, 0, "every leaf and node is given back: {stats}");
}

/// Most pages lie on disk, and what is there dies as fast as it goes down.
#[test]
fn lz4_pages_above_a_disk() {
    run_on_disk("ram,limit=6M,codec=lz4", "");
}

/// And what is in the first goes on to the second, as fast as it comes.
#[test]
fn lz4_pages_above_two_disks() {
    let dir = std::env::temp_dir().join(format!("ghostswap-model-{}-two", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let disk = |name: &str, size| format!("file:{},size={size}", dir.join(name).display());
    run(&format!("ram,limit=6M,codec=lz4 + {} + {},encrypt=off", disk("a", "16M"), disk("b", "24M")));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn cold_groups_above_a_disk() {
    run_on_disk("ram,limit=6M,codec=lz4 + ram,limit=4M,codec=zstd:3,group=64K,idle=0s", ",encrypt=off");
}

fn run_on_disk(ram: &str, options: &str) {
    let dir = std::env::temp_dir().join(format!("ghostswap-model-{}-{}", std::process::id(), options.len()));
    std::fs::create_dir_all(&dir).unwrap();
    run(&format!("{ram} + file:{},size=24M{options}", dir.join("cold").display()));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn lz4_single_pages() {
    run("ram,limit=14M,codec=lz4");
}

#[test]
fn lz4_groups() {
    run("ram,limit=14M,codec=lz4,group=64K");
}

/// Pages are compressed again as soon as they are sealed.
#[test]
fn lz4_pages_and_cold_zstd_groups() {
    run("ram,limit=10M,codec=lz4 + ram,limit=4M,codec=zstd:3,group=64K,idle=0s");
}

#[test]
fn zstd_groups() {
    run("ram,limit=14M,codec=zstd:1,group=16K");
}

#[test]
fn zstd_single_pages() {
    run("ram,limit=14M,codec=zstd:-1");
}

#[test]
fn zstd_single_pages_with_dictionaries() {
    run("ram,limit=12M,codec=zstd:1,dict=8K");
}

/// Cold pages that stand alone have one too.
#[test]
fn zstd_pages_and_cold_ones_with_dictionaries() {
    run("ram,limit=10M,codec=zstd:-1,dict=8K + ram,limit=4M,codec=zstd:3,group=16K,dict=8K,idle=0s");
}

#[test]
fn zstd_pages_with_dictionaries_above_a_disk() {
    run_on_disk("ram,limit=6M,codec=zstd:1,dict=8K", ",prealloc=off");
}

#[test]
fn at_the_limit_writes_are_refused_and_nothing_acknowledged_is_lost() {
    let config = StoreConfig { tiers: vec!["ram,limit=8M".parse().unwrap()], ..StoreConfig::default() };
    let store = Store::open(config).unwrap();
    let volume = store.create_volume(1 << 30).unwrap();
    let mut lane = volume.lane().unwrap();
    let mut rng = Rng(42);
    let mut pages = Vec::new();
    loop {
        let page: Vec<u8> = (0..512).flat_map(|_| rng.next().to_le_bytes()).collect();
        match lane.write(pages.len() as u64 * PAGE, &page) {
            Ok(()) => pages.push(page),
            Err(Error::NoSpace) => break,
            Err(e) => panic!("{e}"),
        }
    }
    assert!(pages.len() > 1500, "8M hold more than 6M of incompressible pages: {}", pages.len());
    let mut got = vec![0; PAGE as usize];
    for (i, page) in pages.iter().enumerate() {
        lane.read(i as u64 * PAGE, &mut got).unwrap();
        assert!(got == *page, "page {i}");
    }
    // Nothing is dead, so there is nothing to clean: a full store does not turn round and round.
    assert_eq!(store.stats().cleaned_segments, 0);
    lane.discard(0, 4 << 20).unwrap();
    lane.write(512 << 20, &pages[0]).unwrap();
}

#[test]
fn memory_goes_back_when_everything_is_discarded() {
    let config = StoreConfig { tiers: vec!["ram,limit=256M".parse().unwrap()], ..StoreConfig::default() };
    let store = Store::open(config).unwrap();
    let idle = store.stats().held_bytes;
    let volume = store.create_volume(1 << 40).unwrap();
    let mut lane = volume.lane().unwrap();
    let mut rng = Rng(7);
    let mut buf = vec![0; 64 * PAGE as usize];
    for i in 0..400u64 {
        buf.chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()));
        lane.write(i * buf.len() as u64, &buf).unwrap();
    }
    let peak = store.stats().held_bytes;
    lane.discard(0, volume.bytes()).unwrap();
    // Open segments belong to the lane until it closes.
    drop(lane);
    let deadline = Instant::now() + Duration::from_secs(20);
    assert!(peak > 100 << 20);
    // The cleaner's open segment and a little metadata may be on top.
    while store.stats().held_bytes > idle + (2 << 20) {
        assert!(Instant::now() < deadline, "held {}, idle {idle}, peak {peak}", store.stats().held_bytes);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(store.stats().stored_pages, 0);
}
