//! No allocation, no system call that waits or opens anything, and no page fault on the I/O path:
//! lanes, the cleaner and growth work as confined threads (`confined/mod.rs`), which end the
//! process at the first call that is not on their list.
//!
//! What each may call stands in [`LANE`], [`PATIENT`], [`CLEANER`] and [`GROWTH`]. `futex` and
//! `sched_yield` are all that a lane needs, to wake another thread and to let one finish; the cleaner
//! sleeps while a lane may still look at what it is to set free; so a log record, a look-up of a name or the opening of a file would be caught as surely
//! as an allocation.
//!
//! Each store is so small that writes come back short and the cleaner never rests. After a warm-up
//! page faults are counted too. Halfway everything is discarded until memory goes back to the host,
//! so that the second half grows anew.
#![cfg(all(target_os = "linux", target_env = "gnu"))]
#![allow(unsafe_code, reason = "ends of children and a write that must be caught")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod confined;
mod ledger;
mod nbdkit;

use confined::{confine, faults, tid, CAUGHT};
use ghostswap::{create_arena, Error, Lane, Store, StoreConfig};
use ledger::{fork, wait, End, Rng, PAGE};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, RwLock};
use std::time::{Duration, Instant};

/// `try_write`, `read`, `discard`, and `write_zeroes` of whole pages.
const LANE: &[libc::c_long] = &[libc::SYS_futex, libc::SYS_sched_yield];
/// `write`, and `write_zeroes` of parts of pages, which may have to wait for room: these sleep.
const PATIENT: &[libc::c_long] = &[libc::SYS_futex, libc::SYS_sched_yield, libc::SYS_clock_nanosleep];
/// With a disk lanes read from it when they are asked to read what is there and to wait for it.
const DISK: &[libc::c_long] = &[libc::SYS_futex, libc::SYS_sched_yield, libc::SYS_clock_nanosleep, libc::SYS_pread64];
/// Above a server they wake a carrier, and wait for it.
const SERVER: &[libc::c_long] = &[libc::SYS_futex, libc::SYS_sched_yield, libc::SYS_clock_nanosleep, libc::SYS_write];
/// A carrier connects, sends, receives, tells, and waits in `poll`.
const CARRIER: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_getpeername,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_io_uring_enter,
    libc::SYS_futex,
    libc::SYS_clock_nanosleep,
];
const CLEANER: &[libc::c_long] = PATIENT;
/// Growth makes memory resident, gives it back and asks how much there is (of
/// /proc/zoneinfo too, by a descriptor that was opened before), and sleeps while a lane
/// may still look at what it is to give back. (The clock is asked by a call where the kernel has no
/// vDSO for it.)
const GROWTH: &[libc::c_long] = &[
    libc::SYS_futex,
    libc::SYS_madvise,
    libc::SYS_fallocate,
    libc::SYS_lseek,
    libc::SYS_sysinfo,
    libc::SYS_pread64,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
];

/// Pages of a worker's range: more than the limit holds of all workers' together.
const RANGE_PAGES: u64 = 8 << 10;
const WARM_UP_OPS: u64 = 15_000;
/// In each half.
const OPS: u64 = 40_000;
const WORKERS: u64 = 3;
/// Minor faults that a thread may take after the warm-up: a page that the kernel moves for reasons
/// of its own costs one. Touching fresh memory would cost one for each page of it: thousands.
const MOVED_PAGES: u64 = 4;

/// What the two sides of a worker share.
struct Plan {
    lane: Mutex<Option<Lane>>,
    /// Operations that the worker may have done by now, and has done.
    wanted: AtomicU64,
    done: AtomicU64,
    /// To discard everything rather than to work.
    empty: AtomicU64,
    tid: AtomicI32,
    short: AtomicU64,
    patient: bool,
    /// What else is below memory has lanes call.
    below: Option<&'static [libc::c_long]>,
    base: u64,
}

/// Pages of all kinds, one after another: captured, incompressible, of one pattern, zero.
fn corpus() -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/pages.bin.zst");
    let mut pages = zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap();
    let mut rng = Rng(7);
    let captured = pages.len() / PAGE;
    pages.resize((captured + captured / 8) * PAGE, 0);
    for (i, page) in pages.chunks_exact_mut(PAGE).enumerate().skip(captured) {
        match i % 8 {
            0 => page.fill(0),
            1 => page.fill(i as u8),
            // A pattern that no slot word can hold.
            2 => page.chunks_mut(8).for_each(|c| c.copy_from_slice(b"ABCDEFGH")),
            _ => page.chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes())),
        }
    }
    pages
}

/// One operation. False: it came back short, for want of room.
fn step(lane: &mut Lane, plan: &Plan, rng: &mut Rng, corpus: &[u8], buf: &mut [u8]) -> Result<bool, Error> {
    let pages = if rng.below(8) == 0 { rng.below(32) + 1 } else { rng.below(3) + 1 };
    let at = plan.base + rng.below(RANGE_PAGES - pages) * PAGE as u64;
    let len = pages as usize * PAGE;
    let data = &corpus[rng.below((corpus.len() - len) as u64) as usize / PAGE * PAGE..][..len];
    let sectors = rng.below(7) as usize * 512 + 512;
    match rng.below(100) {
        0..=29 => lane.read(at, &mut buf[..len]).map(|()| true),
        30..=34 => lane.read(at + 512, &mut buf[..sectors]).map(|()| true),
        35..=79 => lane.try_write(at, data).map(|n| n == len),
        80..=84 => lane.try_write(at + 512, &data[..sectors.min(len - 512)]).map(|n| n > 0),
        85..=89 => lane.discard(at, len as u64).map(|()| true),
        90..=94 => lane.write_zeroes(at, len as u64).map(|()| true),
        _ if !plan.patient => Ok(true),
        95..=97 => room(lane.write_zeroes(at + 512, sectors.min(PAGE - 512) as u64)),
        _ => room(lane.write(at, data)),
    }
}

fn room(waited: Result<(), Error>) -> Result<bool, Error> {
    match waited {
        Err(Error::NoSpace) => Ok(false),
        other => other.map(|()| true),
    }
}

/// A worker's life, on a thread of its own. It does not return: confined threads do not.
fn work(plan: &Plan, corpus: &[u8]) -> ! {
    let mut lane = plan.lane.lock().unwrap().take().unwrap();
    let mut rng = Rng(plan.base | 1);
    let mut buf = vec![1; 32 * PAGE];
    plan.tid.store(tid(), Ordering::Release);
    match (plan.below, plan.patient) {
        (Some(calls), _) => confine("a lane above a disk", calls),
        (None, true) => confine("a lane that may wait", PATIENT),
        (None, false) => confine("a lane", LANE),
    }
    let mut done = 0;
    loop {
        if plan.empty.load(Ordering::Acquire) != 0 {
            if lane.discard(plan.base, RANGE_PAGES * PAGE as u64).is_err() {
                confined::end(&["\na lane refused to discard\n"]);
            }
            plan.empty.store(0, Ordering::Release);
        }
        if done == plan.wanted.load(Ordering::Acquire) {
            // At the end the lane is closed by who may.
            if done == WARM_UP_OPS + 2 * OPS {
                break;
            }
            std::thread::park();
            continue;
        }
        match step(&mut lane, plan, &mut rng, corpus, &mut buf) {
            Ok(true) => {}
            Ok(false) => {
                plan.short.fetch_add(1, Ordering::Relaxed);
                let at = plan.base + rng.below(RANGE_PAGES - 300) * PAGE as u64;
                if lane.discard(at, 300 * PAGE as u64).is_err() {
                    confined::end(&["\na lane refused to discard\n"]);
                }
            }
            Err(_) => confined::end(&["\na lane answered with an error\n"]),
        }
        done += 1;
        plan.done.store(done, Ordering::Release);
    }
    match plan.lane.lock() {
        Ok(mut place) => *place = Some(lane),
        Err(_) => confined::end(&["\na lane has nowhere to go\n"]),
    }
    loop {
        std::thread::park();
    }
}

/// Lets the cleaner do as it likes.
fn on_start_but_cleaner(name: &str) {
    match name {
        "cleaner" => LAST_CLEANER.store(tid(), Ordering::Release),
        other => on_start(other),
    }
}

/// Number of the thread of the cleaner that started last.
static LAST_CLEANER: AtomicI32 = AtomicI32::new(0);

fn on_start(name: &str) {
    match name {
        "cleaner" => {
            LAST_CLEANER.store(tid(), Ordering::Release);
            confine("the cleaner", CLEANER);
        }
        // It waits for the disk, and asks for memory where nobody waits for it.
        "mover" => {}
        "carrier" => confine("a carrier", CARRIER),
        _ => confine("growth", GROWTH),
    }
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is() {
        assert!(Instant::now() < deadline, "not within two minutes: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A store, and the number of its cleaner's thread.
fn open(config: StoreConfig, arena: OwnedFd) -> (Store, libc::pid_t) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _mine = ONE_AT_A_TIME.lock().unwrap();
    LAST_CLEANER.store(0, Ordering::Release);
    let store = Store::open_arena(config, arena).unwrap();
    until("the cleaner starts", || LAST_CLEANER.load(Ordering::Acquire) != 0);
    (store, LAST_CLEANER.load(Ordering::Acquire))
}

struct Bench {
    store: Store,
    cleaner: libc::pid_t,
    plans: Vec<Arc<Plan>>,
    threads: Vec<std::thread::Thread>,
}

impl Bench {
    fn open(tier: &str, arena: OwnedFd, on_start: fn(&str)) -> Bench {
        let (store, cleaner) = open(StoreConfig { thread_start: Some(on_start), ..config(tier) }, arena);
        let volume = store.volumes().pop().unwrap_or_else(|| store.create_volume(1 << 40).unwrap());
        let corpus: Arc<Vec<u8>> = Arc::new(corpus());
        let (mut plans, mut threads) = (Vec::new(), Vec::new());
        for k in 0..WORKERS {
            let plan = Arc::new(Plan {
                lane: Mutex::new(Some(volume.lane().unwrap())),
                wanted: AtomicU64::new(0),
                done: AtomicU64::new(0),
                empty: AtomicU64::new(0),
                tid: AtomicI32::new(0),
                short: AtomicU64::new(0),
                patient: k == 0,
                below: match tier {
                    _ if tier.contains("file:") => Some(DISK),
                    _ if tier.contains("nbd:") => Some(SERVER),
                    _ => None,
                },
                base: k * 3 * RANGE_PAGES * PAGE as u64,
            });
            let (its, corpus) = (plan.clone(), corpus.clone());
            threads.push(std::thread::spawn(move || work(&its, &corpus)).thread().clone());
            plans.push(plan);
        }
        Bench { store, cleaner, plans, threads }
    }

    /// Lets the workers do `ops` more and waits for them.
    fn run(&self, ops: u64) {
        for plan in &self.plans {
            plan.wanted.fetch_add(ops, Ordering::Release);
        }
        self.wake();
        let all_done = || self.plans.iter().all(|p| p.done.load(Ordering::Acquire) == p.wanted.load(Ordering::Relaxed));
        until("the workers' operations", all_done);
    }

    fn empty(&self) {
        self.plans.iter().for_each(|p| p.empty.store(1, Ordering::Release));
        self.wake();
        until("all is discarded", || self.plans.iter().all(|p| p.empty.load(Ordering::Acquire) == 0));
    }

    fn wake(&self) {
        self.threads.iter().for_each(|t| t.unpark());
    }

    /// Minor and major page faults of the cleaner and of each lane so far.
    fn faults(&self) -> Vec<(u64, u64)> {
        let lanes = self.plans.iter().map(|p| p.tid.load(Ordering::Acquire));
        std::iter::once(self.cleaner).chain(lanes).map(faults).collect()
    }

    fn short(&self) -> u64 {
        self.plans.iter().map(|p| p.short.load(Ordering::Relaxed)).sum()
    }
}

fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(confined::prepare);
}

/// Taken for writing to fork: it write-protects the private memory of all threads, and each page of
/// it that they write to next costs them a fault.
static FORK: RwLock<()> = RwLock::new(());

fn config(tier: &str) -> StoreConfig {
    StoreConfig {
        tiers: tier.split(" + ").map(|t| t.parse().unwrap()).collect(),
        segment_bytes: Some(64 << 10),
        max_lanes: WORKERS as usize,
        ..StoreConfig::default()
    }
}

fn confined_store(tier: &str) {
    confined_store_on(tier, create_arena(false).unwrap(), on_start);
}

fn confined_store_on(tier: &str, arena: OwnedFd, on_start: fn(&str)) {
    confined_store_checked(tier, arena, on_start, |_| {}, |_| true);
}

/// With something done after the warm-up, and looked at in the end.
fn confined_store_checked(
    tier: &str,
    arena: OwnedFd,
    on_start: fn(&str),
    after_warm_up: impl FnOnce(&Store),
    is_as_wanted: impl Fn(&ghostswap::Stats) -> bool,
) {
    let _no_fork = FORK.read().unwrap();
    confined_store_with(tier, arena, on_start, after_warm_up, is_as_wanted);
}

/// `after_warm_up`: what is done then.
fn confined_store_with(
    tier: &str,
    arena: OwnedFd,
    on_start: fn(&str),
    after_warm_up: impl FnOnce(&Store),
    is_as_wanted: impl Fn(&ghostswap::Stats) -> bool,
) {
    prepare();
    let bench = Bench::open(tier, arena, on_start);
    bench.run(WARM_UP_OPS);
    after_warm_up(&bench.store);
    let before = bench.faults();
    bench.run(OPS);
    let full = bench.store.stats();
    assert!(bench.short() > 100, "writes came back short: {}", bench.short());
    assert!(full.cleaned_segments > 100, "the cleaner worked: {full}");
    bench.empty();
    until("memory goes back", || bench.store.stats().held_bytes < full.held_bytes / 2);
    bench.run(OPS);
    let after = bench.store.stats();
    println!("{tier}: {} writes short\n{after}", bench.short());
    assert!(after.held_bytes > full.held_bytes * 3 / 4, "memory grew again: {after}");
    assert!(after.cleaned_segments > full.cleaned_segments, "the cleaner worked again: {after}");
    assert!(is_as_wanted(&after), "{after}");
    let now = bench.faults();
    println!("minor and major faults of the cleaner and of each lane: {before:?}, at the end {now:?}");
    for (then, now) in before.iter().zip(&now) {
        assert_eq!(now.1, then.1, "major page faults");
        assert!(now.0 - then.0 <= MOVED_PAGES, "minor page faults: {}", now.0 - then.0);
    }
    until("lanes come back", || bench.plans.iter().all(|p| p.lane.lock().unwrap().is_some()));
    bench.plans.iter().for_each(|p| drop(p.lane.lock().unwrap().take()));
    bench.store.audit().unwrap();
    // Its threads cannot end, being confined: they go with the process.
    std::mem::forget(bench);
}

#[test]
fn lz4_single_pages() {
    confined_store("ram,limit=14M,codec=lz4");
}

#[test]
fn zstd_single_pages() {
    confined_store("ram,limit=14M,codec=zstd:1,dict=off");
}

#[test]
fn lz4_groups() {
    confined_store("ram,limit=14M,codec=lz4,group=64K");
}

#[test]
fn zstd_groups() {
    confined_store("ram,limit=14M,codec=zstd:3,group=64K");
}

const WITH_DICTIONARIES: &str = "ram,limit=14M,codec=zstd:1,dict=16K";

/// An arena that has one already, and is taken up with it: the cleaner too is confined.
#[test]
fn zstd_single_pages_with_a_dictionary() {
    let arena = create_arena(false).unwrap();
    let store = Store::open_arena(config(WITH_DICTIONARIES), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    // What it is learned from and judged by follows from where pages came to lie, and of these pages not every choice makes
    // one that is good enough. Written anew they lie elsewhere.
    until("a dictionary is trained", || {
        let before = store.stats().dictionaries.refused;
        lane.write(0, &corpus()[..6 << 20]).unwrap();
        store.train_dictionary();
        let decided = || store.stats().dictionaries;
        until("one is judged", || decided().trained > 0 || decided().refused > before);
        decided().trained > 0
    });
    drop((lane, store));
    let compressed = |stats: &ghostswap::Stats| stats.dictionaries.pages > 10_000 && stats.dictionaries.trained == 0;
    confined_store_checked(WITH_DICTIONARIES, arena, on_start, |_| {}, compressed);
}

/// One is trained and used, and another, while lanes work: by the cleaner, which takes what memory that needs.
#[test]
fn zstd_single_pages_and_the_first_dictionary() {
    let trained = |stats: &ghostswap::Stats| stats.dictionaries.pages > 1000 && stats.dictionaries.trained > 0;
    // By itself, there being enough to learn from. An order might be carried out after that, while faults are counted.
    let by_itself = |store: &Store| until("a dictionary is trained", || store.stats().dictionaries.trained > 0);
    confined_store_checked(WITH_DICTIONARIES, create_arena(false).unwrap(), on_start_but_cleaner, by_itself, trained);
}

const AGAIN: &str = "ram,limit=14M,codec=lz4 + ram,codec=zstd:3,group=64K,idle=0";

/// Where some are already: the cleaner too is confined.
#[test]
fn pages_compressed_again() {
    let arena = create_arena(false).unwrap();
    let store = Store::open_arena(config(AGAIN), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
    lane.write(0, &corpus()[..1 << 20]).unwrap();
    until("pages are compressed again", || store.stats().recompressed_segments > 0);
    drop((lane, store));
    confined_store_on(AGAIN, arena, on_start);
}

/// Where the first are made meanwhile: by the cleaner, which makes what that takes; not by those who read them.
#[test]
fn the_first_pages_compressed_again() {
    confined_store_on(AGAIN, create_arena(false).unwrap(), on_start_but_cleaner);
}

/// The lanes of which most pages lie on disk.
#[test]
fn lz4_single_pages_above_a_disk() {
    let file = std::env::temp_dir().join(format!("ghostswap-no-alloc-{}", std::process::id()));
    confined_store(&format!("ram,limit=10M,codec=lz4 + file:{},size=16M", file.display()));
    std::fs::remove_file(file).unwrap();
}

/// The same above two, of which the first passes on to the second.
#[test]
fn lz4_single_pages_above_two_disks() {
    let [a, b] = ["a", "b"].map(|name| {
        std::env::temp_dir().join(format!("ghostswap-no-alloc-{name}-{}", std::process::id())).display().to_string()
    });
    confined_store(&format!("ram,limit=10M,codec=lz4 + file:{a},size=16M + file:{b},size=16M"));
    [a, b].into_iter().for_each(|file| std::fs::remove_file(file).unwrap());
}

/// The lanes, and the carriers between them and a server, which dies once and is there again.
#[test]
fn lz4_single_pages_above_a_server() {
    // Starting a server is a fork.
    let _alone = FORK.write().unwrap();
    let dir = std::env::temp_dir().join(format!("ghostswap-no-alloc-nbd-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("cold");
    std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let mut server = nbdkit::Nbdkit::start(&dir, &["file", file.to_str().unwrap()]);
    let tier = format!("ram,limit=10M,codec=lz4 + nbd:{},size=16M", server.uri());
    let restart = |_: &Store| {
        server.kill();
        server.start_again();
    };
    confined_store_with(&tier, create_arena(false).unwrap(), on_start, restart, |_| true);
    std::fs::remove_dir_all(dir).unwrap();
}

/// That a confined thread is caught at each of these is what the tests above rest on.
#[test]
fn what_is_forbidden_is_caught() {
    let _alone = FORK.write().unwrap();
    let forbidden: [(&str, fn()); 6] = [
        ("an allocation", || drop(std::hint::black_box(vec![1u8; 100]))),
        ("one by a C library", || drop(std::hint::black_box(zstd::bulk::Compressor::new(1)))),
        ("an opened file", || drop(std::hint::black_box(std::fs::File::open("/")))),
        ("a line on standard error", || {
            // SAFETY: a constant byte.
            let _ = unsafe { libc::write(2, b"\n".as_ptr().cast(), 1) };
        }),
        ("a sleep", || std::thread::sleep(Duration::from_nanos(1))),
        ("a panic", || assert!(std::hint::black_box(false))),
    ];
    for (what, does) in forbidden {
        let child = fork(|| {
            prepare();
            confine("a child", LANE);
            does();
            0
        });
        assert_eq!(wait(child), End::Exit(CAUGHT), "{what}");
    }
    let child = fork(|| {
        prepare();
        confine("a child", LANE);
        std::thread::yield_now();
        // SAFETY: ends the child without a destructor, which is not confined's to run.
        unsafe { libc::_exit(0) }
    });
    assert_eq!(wait(child), End::Exit(0), "what is allowed is not caught");
}
