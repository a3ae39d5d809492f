//! Large requests by several threads: pages of one are compressed apart, so a connection's thread shares them with those
//! of a pool that all connections have together, each through a lane of its own. It answers when all of it is done, so
//! nothing else of a connection is changed by it: neither the order of its requests nor what it waits with.
//!
//! Help is asked for only where it pays (zeros are read in less time than it takes to call somebody) and where a CPU would
//! be idle: with as many connections at work as there are CPUs each has its own.

use ghostswap::{Fetch, Lane, Result, Spare, Volume, PAGE_BYTES};
use rayon_core::{ThreadPool, ThreadPoolBuilder};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::warn;

/// Most threads of a pool.
const MOST_THREADS: usize = 7;
/// Most of them for one connection, each with a lane: a segment or two, and what its codec works in.
const MOST_LANES: usize = 3;
const STACK_BYTES: usize = 256 << 10;
/// What a machine must have free for a lane to be opened, which takes a few MiB: one that swaps to this server, and has none
/// to give, is not to be asked for it on the way.
const SPARE_BYTES: u64 = 64 << 20;
/// The least that is shared, and what is taken of it at a time.
const LEAST_BYTES: usize = 32 << 10;
const PIECE_BYTES: usize = 8 << 10;
/// A request that takes less than this is done sooner alone.
const WORTH: Duration = Duration::from_micros(50);
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
    /// Threads at work: of connections that have requests, and of the pool.
    busy: AtomicUsize,
    /// Lanes that may still be opened for the pool.
    lanes: AtomicUsize,
    spare: Mutex<Spare>,
}

/// Threads that help on this machine: for all CPUs but the one of who is helped.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).saturating_sub(1).min(MOST_THREADS)
}

impl Pool {
    /// Of so many threads, for which the store keeps as many lanes.
    pub fn new(threads: usize) -> Pool {
        if threads == 0 {
            return Pool(None);
        }
        let builder = ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK_BYTES);
        match builder.thread_name(|number| format!("nbd-helper{number}")).build() {
            Ok(pool) => {
                let (busy, lanes, spare) = (AtomicUsize::new(0), AtomicUsize::new(threads), Mutex::new(Spare::new()));
                Pool(Some(Arc::new(Shared { threads: pool, cpus: threads + 1, busy, lanes, spare })))
            }
            Err(why) => {
                warn!("large requests are served by one thread each: {why}");
                Pool(None)
            }
        }
    }

    /// For a connection, which is at work.
    pub fn helpers(&self) -> Helpers {
        if let Some(shared) = &self.0 {
            shared.busy.fetch_add(1, Ordering::Relaxed);
        }
        let (reads, writes) = Default::default();
        Helpers { pool: self.0.clone(), lanes: Vec::new(), rests: false, waits: 0, reads, writes, shared_write: false }
    }
}

impl Shared {
    fn has_memory(&self) -> bool {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
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
        if bytes > 0 {
            self.ns_per_byte = took.as_nanos() as f64 / bytes as f64;
        }
    }

    fn of(self, bytes: usize) -> Duration {
        Duration::from_nanos((self.ns_per_byte * bytes as f64) as u64)
    }
}

/// A connection's share of the pool.
pub struct Helpers {
    pool: Option<Arc<Shared>>,
    lanes: Vec<Lane>,
    /// The connection waits for its client.
    rests: bool,
    /// How often it has since a request was shared.
    waits: u32,
    reads: Pace,
    writes: Pace,
    /// The last write was shared.
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
        let len = data.len();
        if !self.may_share(offset, len) {
            return own.read_or_fetch(offset, data);
        }
        let count = self.gather(volume, self.reads.of(len));
        if count == 0 {
            let begun = Instant::now();
            let read = own.read_or_fetch(offset, data)?;
            self.reads.note(read.0, begun.elapsed());
            return Ok(read);
        }
        let step = PIECE_BYTES.max(own.group_bytes());
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
        let len = data.len();
        if !self.may_share(offset, len) {
            return own.try_write(offset, data);
        }
        let count = self.gather(volume, self.writes.of(len));
        self.shared_write = count > 0;
        if count == 0 {
            let begun = Instant::now();
            let written = own.try_write(offset, data)?;
            self.writes.note(written, begun.elapsed());
            return Ok(written);
        }
        let step = PIECE_BYTES.max(own.group_bytes());
        let undone = AtomicUsize::new(len);
        let pieces = data.chunks(step).enumerate().map(|(number, piece)| (number * step, piece));
        let each = |lane: &mut Lane, at, piece: &[u8]| lane.try_write(at, piece).unwrap_or(0);
        let (bytes, took) = self.share(count, own, &undone, offset, pieces, each);
        self.writes.note(bytes, took);
        let done = undone.into_inner();
        if done == len {
            return Ok(done);
        }
        let written = own.try_write(offset + done as u64, &data[done..]).map(|more| done + more);
        // Without room nobody else is to keep a segment open, which cannot be cleaned.
        if !written.as_ref().is_ok_and(|written| *written == len) {
            self.dismiss();
        }
        written
    }

    /// Whether more of a write is better than soon: it will be shared.
    pub fn want_all(&self) -> bool {
        self.shared_write
    }

    fn may_share(&self, offset: u64, len: usize) -> bool {
        self.pool.is_some() && len >= LEAST_BYTES && (offset | len as u64) % PAGE_BYTES as u64 == 0
    }

    /// How many may help with what takes so long alone, each with a lane.
    fn gather(&mut self, volume: &Volume, alone: Duration) -> usize {
        let Some(pool) = self.pool.as_ref().filter(|_| alone >= WORTH) else { return 0 };
        let idle = pool.cpus.saturating_sub(pool.busy.load(Ordering::Relaxed)).min(MOST_LANES);
        while self.lanes.len() < idle {
            let take = |left: usize| left.checked_sub(1);
            if pool.lanes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
                break;
            }
            match pool.has_memory().then(|| volume.helper_lane()) {
                Some(Ok(lane)) => self.lanes.push(lane),
                // It goes without, and tries again with the next.
                _ => {
                    pool.lanes.fetch_add(1, Ordering::Relaxed);
                    break;
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
        own_part
    }

    /// The connection waits for its client.
    pub fn rest(&mut self) {
        self.set_rests(true);
        self.waits = self.waits.saturating_add(1);
        if self.waits == IDLE_WAITS {
            self.dismiss();
        }
    }

    /// It has something to do.
    pub fn go_on(&mut self) {
        self.set_rests(false);
    }

    fn set_rests(&mut self, rests: bool) {
        let Some(pool) = self.pool.as_ref().filter(|_| self.rests != rests) else { return };
        self.rests = rests;
        match rests {
            true => drop(pool.busy.fetch_sub(1, Ordering::Relaxed)),
            false => drop(pool.busy.fetch_add(1, Ordering::Relaxed)),
        }
    }

    pub fn has_lanes(&self) -> bool {
        !self.lanes.is_empty()
    }

    /// Gives its lanes up, for others.
    pub fn dismiss(&mut self) {
        let Some(pool) = &self.pool else { return };
        let count = self.lanes.len();
        self.lanes.clear();
        pool.lanes.fetch_add(count, Ordering::Relaxed);
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.dismiss();
        self.rest();
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

    /// Helpers that are always called.
    fn eager(pool: &Pool) -> Helpers {
        let mut helpers = pool.helpers();
        (helpers.reads.ns_per_byte, helpers.writes.ns_per_byte) = (1e6, 1e6);
        helpers
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
            let (volume, pool) = (volume(tier, 8 << 20), Pool::new(THREADS));
            let mut own = volume.lane().unwrap();
            let (mut helpers, mut model) = (eager(&pool), vec![0; 8 << 20]);
            for turn in 0..200u64 {
                let (at, len) = (turn as usize * 37 % 1500 * PAGE_BYTES, (8 + turn as usize % 57) * PAGE_BYTES);
                let data = pages(turn, len);
                assert_eq!(helpers.try_write(&mut own, &volume, at as u64, &data).unwrap(), len);
                assert!(helpers.want_all() && helpers.has_lanes());
                model[at..at + len].copy_from_slice(&data);
                helpers.writes.ns_per_byte = 1e6;
                let from = turn as usize * 91 % 1800 * PAGE_BYTES;
                let mut read = vec![0x5a; (8 + turn as usize % 64) * PAGE_BYTES];
                helpers.reads.ns_per_byte = 1e6;
                let (done, fetch) = helpers.read(&mut own, &volume, from as u64, &mut read).unwrap();
                assert!(done == read.len() && fetch.is_none());
                assert!(read == model[from..from + done], "turn {turn}");
            }
            let mut all = vec![0; model.len()];
            own.read(0, &mut all).unwrap();
            assert!(all == model);
        }
    }

    #[test]
    fn a_share_that_finds_no_room_is_no_more_than_was_done() {
        // Pages that do not compress, twice as many as there is room for.
        let (volume, pool) = (volume("ram,limit=8M,codec=lz4", 32 << 20), Pool::new(THREADS));
        let mut own = volume.lane().unwrap();
        let mut helpers = eager(&pool);
        let data: Vec<u8> =
            (0..16u64 << 17).flat_map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n << 32).to_le_bytes()).collect();
        // Room is made meanwhile, and then no more.
        let (mut at, mut refused) = (0, 0);
        while refused < 100 {
            helpers.writes.ns_per_byte = 1e6;
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
    fn none_is_called_where_all_cpus_are_busy_and_lanes_go_back() {
        let (volume, pool) = (volume("ram,limit=64M,codec=lz4", 1 << 20), Pool::new(THREADS));
        let shared = pool.0.clone().unwrap();
        let lanes = || shared.lanes.load(Ordering::Relaxed);
        let mut helpers = eager(&pool);
        let mut others: Vec<Helpers> = (0..THREADS).map(|_| pool.helpers()).collect();
        assert_eq!(helpers.gather(&volume, WORTH), 0, "every CPU has its connection");
        others[0].rest();
        assert_eq!((helpers.gather(&volume, WORTH / 2), lanes()), (0, THREADS), "it is done sooner alone");
        assert_eq!((helpers.gather(&volume, WORTH), lanes()), (1, THREADS - 1));
        others.clear();
        assert_eq!((helpers.gather(&volume, WORTH), lanes()), (THREADS, 0));
        let mut late = eager(&pool);
        assert_eq!(late.gather(&volume, WORTH), 0, "all lanes are in use");
        helpers.rest();
        helpers.dismiss();
        assert_eq!((late.gather(&volume, WORTH), lanes()), (THREADS, 0));
        drop((helpers, late));
        assert_eq!((shared.busy.load(Ordering::Relaxed), lanes()), (0, THREADS));
        let lanes: Vec<Lane> = (0..4).map(|_| volume.lane().unwrap()).collect();
        assert!(volume.lane().is_err() && volume.helper_lane().is_ok(), "{} lanes are for all", lanes.len());
        Pool::new(0).helpers().dismiss();
    }
}
