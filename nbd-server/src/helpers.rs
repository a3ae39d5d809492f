//! Large requests by several threads: pages of one are compressed apart, so a connection's thread shares them with those
//! of a pool that all connections have together, each through a lane of its own. It answers when all of it is done, so
//! nothing else of a connection is changed by it: neither the order of its requests nor what it waits with.
//!
//! Help is asked for only where it pays (zeros are read in less time than it takes to call somebody) and where a CPU would
//! be idle: with as many connections at work in the store as there are CPUs each has its own.

use ghostswap::{Fetch, Lane, Result, Spare, Volume, PAGE_BYTES};
use rayon_core::{ThreadPool, ThreadPoolBuilder};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use tracing::warn;

/// Most threads of a pool.
const MOST_THREADS: usize = 7;
/// Most of them for one connection, each with a lane: a segment or two, and what its codec works in.
const MOST_HELPERS: usize = 3;
const STACK_BYTES: usize = 256 << 10;
/// What a machine must have free for a lane to be opened, which takes a few MiB: one that swaps to this server, and has none
/// to give, is not to be asked for it on the way.
const SPARE_BYTES: u64 = 64 << 20;
/// The least that is shared, and what is taken of it at a time.
const LEAST_BYTES: usize = 32 << 10;
const PIECE_BYTES: usize = 8 << 10;
/// A request that takes less than this is done sooner alone.
const WORTH: Duration = Duration::from_micros(50);
/// Requests in a row that were worth it, before a lane is opened: that takes a millisecond and more.
const WORTH_A_LANE: u32 = 4;
/// Shared requests that took longer than they would have alone (each tells against as much as two that did not), before it
/// goes alone, and for how many requests then.
const MOST_SLOW: u32 = 8;
const ALONE_REQUESTS: u32 = 64;
/// Without helpers after a write that found no room: what each keeps open cannot be cleaned.
const NO_ROOM_TIME: Duration = Duration::from_secs(1);
/// So long a helper's last piece is waited for awake: to be woken takes as long.
const AWAKE: Duration = Duration::from_micros(40);
/// How long a connection without requests keeps its lanes, and how often it may have waited for requests, none of which
/// was shared: as long as it has lanes it waits for that time before it waits on.
pub const IDLE_TIME: Duration = Duration::from_secs(1);
const IDLE_WAITS: u32 = 64;

/// Helpers of all connections. None of them: each does its own.
#[derive(Clone, Default)]
pub struct Pool(Option<Arc<Shared>>);

struct Shared {
    threads: ThreadPool,
    cpus: usize,
    /// Threads that are in the store: of connections, and of the pool.
    busy: AtomicUsize,
    /// Lanes that may still be opened for the pool.
    lanes: AtomicUsize,
    spare: Mutex<Spare>,
}

/// CPUs of this machine.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Threads that help there: for all CPUs but the one of who is helped.
pub fn threads(cpus: usize) -> usize {
    cpus.saturating_sub(1).min(MOST_THREADS)
}

impl Pool {
    /// Of so many threads, for which the store keeps as many lanes.
    pub fn new(threads: usize, cpus: usize) -> Pool {
        if threads == 0 {
            return Pool(None);
        }
        let builder = ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK_BYTES);
        match builder.thread_name(|number| format!("nbd-helper{number}")).build() {
            Ok(pool) => {
                let (busy, lanes, spare) = (AtomicUsize::new(0), AtomicUsize::new(threads), Mutex::new(Spare::new()));
                Pool(Some(Arc::new(Shared { threads: pool, cpus, busy, lanes, spare })))
            }
            Err(why) => {
                warn!("large requests are served by one thread each: {why}");
                Pool(None)
            }
        }
    }

    pub fn helpers(&self) -> Helpers {
        let (lanes, waits, worth, slow, alone, no_room) = Default::default();
        let (reads, writes) = Default::default();
        let pool = self.0.clone();
        Helpers { pool, lanes, waits, worth, slow, alone, no_room, reads, writes, shared_write: false }
    }
}

impl Shared {
    /// If that can be told at once.
    fn has_memory(&self) -> bool {
        let mut spare = match self.spare.try_lock() {
            Ok(spare) => spare,
            Err(TryLockError::Poisoned(spare)) => spare.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        spare.bytes_for_anybody() >= SPARE_BYTES
    }
}

/// What bytes took lately.
#[derive(Clone, Copy, Default)]
struct Pace {
    ns_per_byte: f64,
}

impl Pace {
    fn note(&mut self, bytes: usize, took: Duration) {
        // Where nothing is done, by room or from a disk, there is nothing to help with.
        self.ns_per_byte = if bytes > 0 { took.as_nanos() as f64 / bytes as f64 } else { 0.0 };
    }

    fn of(self, bytes: usize) -> Duration {
        Duration::from_nanos((self.ns_per_byte * bytes as f64) as u64)
    }
}

/// A connection's share of the pool.
pub struct Helpers {
    pool: Option<Arc<Shared>>,
    lanes: Vec<Lane>,
    /// How often the connection has waited for its client since a request was shared.
    waits: u32,
    /// Requests lately, one after another, that were worth sharing.
    worth: u32,
    /// How often help did not help, see [`MOST_SLOW`]; and requests until it is called again.
    slow: u32,
    alone: u32,
    /// When a write found no room.
    no_room: Option<Instant>,
    reads: Pace,
    writes: Pace,
    /// The last write of those that may be shared was.
    shared_write: bool,
}

impl Helpers {
    /// As [`Lane::read_or_fetch`], by several lanes where that pays.
    pub fn read(
        &mut self,
        own: &mut Lane,
        volume: &Volume,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(usize, Option<Fetch>)> {
        self.enter();
        let read = self.read_within(own, volume, offset, data);
        self.leave();
        read
    }

    fn read_within(
        &mut self,
        own: &mut Lane,
        volume: &Volume,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(usize, Option<Fetch>)> {
        let len = data.len();
        if !self.may_share(offset, len) {
            return own.read_or_fetch(offset, data);
        }
        let step = PIECE_BYTES.max(own.seen_group_bytes());
        let count = self.gather(volume, self.reads.of(len), len.div_ceil(step));
        if count == 0 {
            let begun = Instant::now();
            let read = own.read_or_fetch(offset, data)?;
            self.reads.note(read.0, begun.elapsed());
            return Ok(read);
        }
        let undone = AtomicUsize::new(len);
        let pieces = data.chunks_mut(step).enumerate().map(|(number, piece)| (number * step, piece));
        // Who was helped finds out what is wrong with one that was not done.
        let each = |lane: &mut Lane, at, piece: &mut [u8]| lane.read_or_fetch(at, piece).map_or(0, |(done, _)| done);
        let (bytes, took) = self.share(count, own, &undone, offset, pieces, each);
        self.reads.note(bytes, took);
        let done = undone.into_inner();
        if done == len {
            return Ok((done, None));
        }
        let (more, fetch) = own.read_or_fetch(offset + done as u64, &mut data[done..])?;
        Ok((done + more, fetch))
    }

    /// As [`Lane::try_write`], by several lanes where that pays. What was written of it beyond what is said to be done is
    /// written again.
    pub fn try_write(&mut self, own: &mut Lane, volume: &Volume, offset: u64, data: &[u8]) -> Result<usize> {
        self.enter();
        let written = self.write_within(own, volume, offset, data);
        self.leave();
        written
    }

    fn write_within(&mut self, own: &mut Lane, volume: &Volume, offset: u64, data: &[u8]) -> Result<usize> {
        let len = data.len();
        if !self.may_share(offset, len) {
            return own.try_write(offset, data);
        }
        let step = PIECE_BYTES.max(own.group_bytes());
        let count = if self.found_no_room() { 0 } else { self.gather(volume, self.writes.of(len), len.div_ceil(step)) };
        self.shared_write = count > 0;
        if count == 0 {
            let begun = Instant::now();
            let written = own.try_write(offset, data)?;
            self.writes.note(written, begun.elapsed());
            return Ok(written);
        }
        let undone = AtomicUsize::new(len);
        let pieces = data.chunks(step).enumerate().map(|(number, piece)| (number * step, piece));
        let each = |lane: &mut Lane, at, piece: &[u8]| lane.try_write(at, piece).unwrap_or(0);
        let (bytes, took) = self.share(count, own, &undone, offset, pieces, each);
        self.writes.note(bytes, took);
        let done = undone.into_inner();
        if done == len {
            return Ok(done);
        }
        own.try_write(offset + done as u64, &data[done..]).map(|more| done + more)
    }

    /// The connection's thread is in the store.
    fn enter(&self) {
        if let Some(pool) = &self.pool {
            pool.busy.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn leave(&self) {
        if let Some(pool) = &self.pool {
            pool.busy.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whether more of a write is better than soon: it will be shared.
    pub fn want_all(&self, offset: u64, len: usize) -> bool {
        self.shared_write && self.may_share(offset, len)
    }

    fn may_share(&self, offset: u64, len: usize) -> bool {
        self.pool.is_some() && len >= LEAST_BYTES && (offset | len as u64) % PAGE_BYTES as u64 == 0
    }

    fn found_no_room(&mut self) -> bool {
        self.no_room = self.no_room.filter(|since| since.elapsed() < NO_ROOM_TIME);
        self.no_room.is_some()
    }

    /// How many may help with what takes so long alone and has so many pieces, each with a lane.
    fn gather(&mut self, volume: &Volume, alone: Duration, pieces: usize) -> usize {
        let most = MOST_HELPERS.min(pieces - 1);
        let Some(pool) = self.pool.as_ref().filter(|_| alone >= WORTH && most > 0) else {
            self.worth = 0;
            return 0;
        };
        if self.alone > 0 {
            self.alone -= 1;
            return 0;
        }
        self.worth = self.worth.saturating_add(1);
        let idle = pool.cpus.saturating_sub(pool.busy.load(Ordering::Relaxed)).min(most);
        if self.lanes.len() < idle && self.worth >= WORTH_A_LANE {
            let take = |left: usize| left.checked_sub(1);
            if pool.lanes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
                match pool.has_memory().then(|| volume.helper_lane()) {
                    Some(Ok(lane)) => self.lanes.push(lane),
                    // It goes without, and tries again with the next.
                    _ => drop(pool.lanes.fetch_add(1, Ordering::Relaxed)),
                }
            }
        }
        idle.min(self.lanes.len())
    }

    /// Has all pieces done by `own` and so many helpers, up to the first that cannot be. Lowers `undone` to where in the
    /// request that was. What `own` did of it, and how long that took.
    fn share<P: AsRef<[u8]> + Send>(
        &mut self,
        count: usize,
        own: &mut Lane,
        undone: &AtomicUsize,
        offset: u64,
        pieces: impl Iterator<Item = (usize, P)> + Send,
        each: impl Fn(&mut Lane, u64, P) -> usize + Sync,
    ) -> (usize, Duration) {
        let Some(pool) = &self.pool else { return Default::default() };
        let all = undone.load(Ordering::Relaxed);
        let (pieces, at_work) = (Mutex::new(pieces), &AtomicUsize::new(0));
        // Those before a piece were taken before it, and are done or lower `undone` further.
        let next = || match undone.load(Ordering::Relaxed) == all {
            true => pieces.lock().unwrap_or_else(PoisonError::into_inner).next(),
            false => None,
        };
        let work = |lane: &mut Lane| {
            let mut bytes = 0;
            while let Some((from, piece)) = next() {
                let len = piece.as_ref().len();
                let done = each(lane, offset + from as u64, piece);
                if done < len {
                    undone.fetch_min(from + done, Ordering::Relaxed);
                }
                bytes += done;
            }
            bytes
        };
        self.waits = 0;
        pool.busy.fetch_add(count, Ordering::Relaxed);
        let begun = Instant::now();
        let own_part = pool.threads.in_place_scope(|scope| {
            let work = &work;
            for lane in &mut self.lanes[..count] {
                scope.spawn(move |_| {
                    at_work.fetch_add(1, Ordering::Relaxed);
                    work(lane);
                    at_work.fetch_sub(1, Ordering::Release);
                });
            }
            let begun = Instant::now();
            let part = (work(own), begun.elapsed());
            let done = Instant::now();
            while at_work.load(Ordering::Acquire) > 0 && done.elapsed() < AWAKE {
                std::hint::spin_loop();
            }
            part
        });
        pool.busy.fetch_sub(count, Ordering::Relaxed);
        let mut pace = Pace::default();
        pace.note(own_part.0, own_part.1);
        self.judge(own_part.0 > 0 && begun.elapsed() > pace.of(all));
        own_part
    }

    /// Of a shared request, whether it took longer than it would have alone.
    fn judge(&mut self, is_slow: bool) {
        self.slow = if is_slow { self.slow + 2 } else { self.slow.saturating_sub(1) };
        if self.slow >= MOST_SLOW {
            (self.slow, self.alone) = (0, ALONE_REQUESTS);
        }
    }

    /// A write found no room: nobody else is to keep a segment open, which cannot be cleaned, nor soon again.
    pub fn no_room(&mut self) {
        self.no_room = Some(Instant::now());
        self.dismiss();
    }

    /// The connection waits for its client.
    pub fn rest(&mut self) {
        self.waits = self.waits.saturating_add(1);
        if self.waits == IDLE_WAITS {
            self.dismiss();
        }
    }

    pub fn has_lanes(&self) -> bool {
        !self.lanes.is_empty()
    }

    /// Gives its lanes up, for others.
    pub fn dismiss(&mut self) {
        self.worth = 0;
        let Some(pool) = &self.pool else { return };
        let count = self.lanes.len();
        self.lanes.clear();
        pool.lanes.fetch_add(count, Ordering::Relaxed);
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.dismiss();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ghostswap::{Store, StoreConfig};

    const THREADS: usize = 3;

    fn volume(tier: &str, bytes: u64) -> Volume {
        let tiers = vec![tier.parse().unwrap()];
        let store =
            Store::open(StoreConfig { tiers, max_lanes: 4 + THREADS, helper_lanes: THREADS, ..Default::default() });
        store.unwrap().create_volume(bytes).unwrap()
    }

    fn pool() -> Pool {
        Pool::new(THREADS, THREADS + 1)
    }

    /// Helpers that are called for the next request.
    fn eager(pool: &Pool) -> Helpers {
        let mut helpers = pool.helpers();
        helpers.urge();
        helpers
    }

    impl Helpers {
        fn urge(&mut self) {
            (self.reads.ns_per_byte, self.writes.ns_per_byte) = (1e6, 1e6);
            (self.worth, self.slow, self.alone, self.no_room) = (WORTH_A_LANE, 0, 0, None);
        }
    }

    /// Pages that do not compress.
    fn noise(bytes: usize) -> Vec<u8> {
        let word = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n << 32).to_le_bytes();
        (0..bytes as u64 / 8).flat_map(word).collect()
    }

    fn pages(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut all = vec![0; bytes];
        for page in all.chunks_mut(PAGE_BYTES) {
            match next() % 4 {
                0 => {}
                1 => page.fill(next() as u8),
                2 => page.chunks_mut(8).for_each(|word| word.copy_from_slice(&(next() % 1000).to_le_bytes())),
                _ => page.chunks_mut(8).for_each(|word| word.copy_from_slice(&next().to_le_bytes())),
            }
        }
        all
    }

    #[test]
    fn what_is_shared_is_written_and_read_as_by_one() {
        for tier in ["ram,limit=64M,codec=lz4", "ram,limit=64M,codec=zstd:1,group=16K"] {
            let (volume, pool) = (volume(tier, 8 << 20), pool());
            let mut own = volume.lane().unwrap();
            let (mut helpers, mut model) = (eager(&pool), vec![0; 8 << 20]);
            for turn in 0..200u64 {
                let (at, len) = (turn as usize * 37 % 1500 * PAGE_BYTES, (8 + turn as usize % 57) * PAGE_BYTES);
                let data = pages(turn, len);
                assert_eq!(helpers.try_write(&mut own, &volume, at as u64, &data).unwrap(), len);
                assert!(helpers.want_all(0, len) && !helpers.want_all(512, len) && helpers.has_lanes());
                model[at..at + len].copy_from_slice(&data);
                let from = turn as usize * 91 % 1800 * PAGE_BYTES;
                let mut read = vec![0x5a; (8 + turn as usize % 64) * PAGE_BYTES];
                helpers.urge();
                let (done, fetch) = helpers.read(&mut own, &volume, from as u64, &mut read).unwrap();
                assert!(done == read.len() && fetch.is_none());
                assert!(read == model[from..from + done], "turn {turn}");
                helpers.urge();
            }
            let mut all = vec![0; model.len()];
            own.read(0, &mut all).unwrap();
            assert!(all == model);
        }
    }

    #[test]
    fn a_share_that_finds_no_room_is_no_more_than_was_done() {
        // Pages that do not compress, twice as many as there is room for.
        let (volume, pool) = (volume("ram,limit=8M,codec=lz4", 32 << 20), pool());
        let mut own = volume.lane().unwrap();
        let mut helpers = eager(&pool);
        let data = noise(16 << 20);
        // Room is made meanwhile, and then no more.
        let (mut at, mut refused) = (0, 0);
        while refused < 100 {
            helpers.urge();
            let done = helpers.try_write(&mut own, &volume, at as u64, &data[at..at + (256 << 10)]).unwrap();
            refused = if done == 0 { refused + 1 } else { 0 };
            at += done;
            std::thread::sleep(Duration::from_millis(u64::from(done == 0)));
        }
        assert!((4 << 20..9 << 20).contains(&at), "{at}");
        let mut read = vec![0; at];
        own.read(0, &mut read).unwrap();
        assert!(read == data[..at]);
    }

    #[test]
    fn a_share_that_spends_the_quota_is_refused_and_loses_nothing_before() {
        let (volume, pool) = (volume("ram,limit=64M,codec=lz4", 32 << 20), pool());
        volume.set_quota(Some(4 << 20));
        let mut own = volume.lane().unwrap();
        let (mut helpers, data, mut at) = (eager(&pool), noise(16 << 20), 0);
        let why = loop {
            helpers.urge();
            match helpers.try_write(&mut own, &volume, at as u64, &data[at..at + (256 << 10)]) {
                Ok(done) => at += done,
                Err(why) => break why,
            }
        };
        assert!(matches!(why, ghostswap::Error::OverQuota { .. }) && helpers.has_lanes(), "{why}");
        // Each lane may exceed it by sixteen pages.
        assert!((3 << 20..=(4 << 20) + (1 + THREADS) * 16 * PAGE_BYTES).contains(&at), "{at}");
        let mut read = vec![0; at];
        own.read(0, &mut read).unwrap();
        assert!(read == data[..at]);
    }

    #[test]
    fn a_share_that_meets_the_disk_ends_there_and_is_read_on_from_it() {
        let directory = std::env::temp_dir().join(format!("ghostswap-helpers-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let tiers = ["ram,limit=8M,codec=lz4".into(), format!("file:{},size=64M", directory.join("f").display())];
        let tiers = tiers.iter().map(|tier: &String| tier.parse().unwrap()).collect();
        let config = StoreConfig { tiers, max_lanes: 4 + THREADS, helper_lanes: THREADS, ..Default::default() };
        let store = Store::open(config).unwrap();
        let (volume, pool) = (store.create_volume(32 << 20).unwrap(), pool());
        let mut own = volume.lane().unwrap();
        let (mut helpers, data, mut at) = (eager(&pool), noise(24 << 20), 0);
        let until = Instant::now() + Duration::from_secs(60);
        while at < data.len() {
            helpers.urge();
            let end = data.len().min(at + (256 << 10));
            let done = helpers.try_write(&mut own, &volume, at as u64, &data[at..end]).unwrap();
            at += done;
            assert!(Instant::now() < until, "no room comes after {at}");
            std::thread::sleep(Duration::from_millis(u64::from(done == 0)));
        }
        let (mut read, mut fetched, mut at) = (vec![0; 256 << 10], 0, 0);
        while at < data.len() {
            helpers.urge();
            let (done, fetch) = helpers.read(&mut own, &volume, at as u64, &mut read).unwrap();
            assert_eq!(done < read.len(), fetch.is_some());
            if fetch.is_some() {
                fetched += 1;
                // As a lane that helps can, too.
                let by = helpers.lanes.first_mut().filter(|_| fetched % 2 == 0).unwrap_or(&mut own);
                by.read((at + done) as u64, &mut read[done..]).unwrap();
            }
            assert!(read == data[at..at + read.len()], "at {at}");
            at += read.len();
        }
        assert!(fetched > 10, "{fetched}");
        drop((helpers, own, volume, store));
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn none_is_called_where_all_cpus_are_busy_and_lanes_go_back() {
        let (volume, pool) = (volume("ram,limit=64M,codec=lz4", 1 << 20), pool());
        let shared = pool.0.clone().unwrap();
        let lanes = || shared.lanes.load(Ordering::Relaxed);
        let mut helpers = pool.helpers();
        let others: Vec<Helpers> = (1..THREADS).map(|_| pool.helpers()).collect();
        helpers.enter();
        others.iter().for_each(Helpers::enter);
        for turn in 0..10 {
            let count = usize::from(turn >= WORTH_A_LANE - 1);
            assert_eq!((helpers.gather(&volume, WORTH, 8), lanes()), (count, THREADS - count), "turn {turn}");
        }
        assert_eq!(helpers.gather(&volume, WORTH, 1), 0, "there is one piece");
        assert_eq!(helpers.gather(&volume, WORTH / 2, 8), 0, "it is done sooner alone");
        others[0].enter();
        assert_eq!(helpers.gather(&volume, WORTH, 8), 0, "every CPU is busy");
        others[0].leave();
        others.iter().for_each(Helpers::leave);
        helpers.urge();
        assert_eq!(helpers.gather(&volume, WORTH, 2), 1, "two pieces are for two");
        for count in 2..=THREADS {
            assert_eq!(helpers.gather(&volume, WORTH, 8), count, "one lane a request");
        }
        let mut late = eager(&pool);
        assert_eq!(late.gather(&volume, WORTH, 8), 0, "all lanes are in use");
        helpers.no_room();
        assert!(helpers.found_no_room() && !late.found_no_room());
        assert_eq!((late.gather(&volume, WORTH, 8), lanes()), (1, THREADS - 1));
        for _ in 0..MOST_SLOW {
            late.judge(true);
            late.judge(false);
        }
        assert_eq!(late.gather(&volume, WORTH, 8), 0, "help did not help");
        late.alone = 0;
        assert!(late.gather(&volume, WORTH, 8) > 0);
        helpers.leave();
        drop((helpers, late));
        assert_eq!((shared.busy.load(Ordering::Relaxed), lanes()), (0, THREADS));
        let lanes: Vec<Lane> = (0..4).map(|_| volume.lane().unwrap()).collect();
        assert!(volume.lane().is_err() && volume.helper_lane().is_ok(), "{} lanes are for all", lanes.len());
        Pool::new(0, 1).helpers().dismiss();
    }
}
