//! The tier below memory: a file or a block device, in extents of one segment each.
//!
//! Which segment lies where, the segment table says; here is only which extents are taken, what became
//! of reading and writing, and what is to be discarded. Extents are taken by the mover alone, and given
//! back by whoever releases a segment, the cleaner or the mover: never on the I/O path, so a mutex does.
//!
//! ```text
//! block 0   the backing's header
//! then      extents of as many blocks as the largest segment fills (`seal.rs`)
//! ```

mod asked;
mod seal;

pub(crate) use asked::Asked;
pub(crate) use seal::{Seal, PAYLOAD};

use crate::arena::Resident;
use crate::error::{Error, Result};
use crate::io::{Backing, TierKey, BLOCK_BYTES};
use crate::page::ExtentNo;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Extents that a place of so many bytes has, for segments of so many.
pub(crate) fn extents_in(bytes: u64, segment_bytes: usize) -> u32 {
    let blocks = (bytes / BLOCK_BYTES as u64).saturating_sub(1);
    (blocks / segment_bytes.div_ceil(PAYLOAD) as u64).min(MAX_EXTENTS) as u32
}

/// Segments have numbers of 24 bits, and those in memory need some too.
const MAX_EXTENTS: u64 = 1 << 23;

/// A disk that takes so long to answer is slow, and for how long after that.
const LONG_WAIT: Duration = Duration::from_millis(500);
const SLOW_FOR: Duration = Duration::from_secs(3);

/// What became of reading and writing.
#[derive(Default)]
pub(crate) struct Counts {
    pub segments_written: AtomicU64,
    pub bytes_written: AtomicU64,
    pub fetches: AtomicU64,
    pub bytes_fetched: AtomicU64,
    pub compacted: AtomicU64,
    /// Segments brought up because they were asked for again and again.
    pub promoted: AtomicU64,
    pub write_errors: AtomicU64,
    /// Segments that could not be brought up again.
    pub unreadable: AtomicU64,
    pub read_errors: AtomicU64,
    /// Blocks that were not what was written there.
    pub corrupt: AtomicU64,
    /// The last page that was found so: volume and number.
    pub last_corrupt: AtomicU64,
    /// The last write did not succeed.
    pub failing: AtomicBool,
}

struct Space {
    taken: Resident,
    /// All but those given back of which the backing does not know yet.
    told: Resident,
}

/// The tier below memory.
pub(crate) struct Lower {
    pub backing: Backing,
    id: TierKey,
    pub seal: Seal,
    pub counts: Counts,
    pub asked: Asked,
    /// It may be written to: no write of an earlier store is on its way any more.
    pub claimed: AtomicBool,
    /// The mover waits for the disk at this moment.
    waiting: AtomicBool,
    /// Until when the disk counts as slow after it has answered, in milliseconds since `begun`: what it made room
    /// for is not there the same moment.
    slow_until_ms: AtomicU64,
    begun: Instant,
    extents: u32,
    extent_bytes: u64,
    taken: AtomicU32,
    space: Mutex<Space>,
}

impl Lower {
    /// `key`: what is sealed with; None: nothing is encrypted.
    pub fn new(backing: Backing, id: TierKey, key: Option<&[u8; 32]>, extents: u32, segment_bytes: usize) -> Lower {
        let mut told = Resident::new(extents);
        (0..extents).for_each(|n| told.set(n));
        let extent_bytes = (segment_bytes.div_ceil(PAYLOAD) * BLOCK_BYTES) as u64;
        Lower {
            seal: Seal::new(key),
            backing,
            id,
            counts: Counts::default(),
            asked: Asked::new(),
            claimed: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            slow_until_ms: AtomicU64::new(0),
            begun: Instant::now(),
            extents,
            extent_bytes,
            taken: AtomicU32::new(0),
            space: Mutex::new(Space { taken: Resident::new(extents), told }),
        }
    }

    pub fn extents(&self) -> u32 {
        self.extents
    }

    pub fn extent_bytes(&self) -> u64 {
        self.extent_bytes
    }

    pub fn taken(&self) -> u32 {
        self.taken.load(Ordering::Relaxed)
    }

    pub fn free(&self) -> u32 {
        self.extents - self.taken()
    }

    /// Segments that may be expected to find room there: none while it fails.
    pub fn room(&self) -> u32 {
        if self.counts.failing.load(Ordering::Relaxed) || !self.claimed.load(Ordering::Relaxed) {
            0
        } else {
            self.free()
        }
    }

    /// Whether it may be written to; tries to make it so. Mover only.
    pub fn claim(&self) -> bool {
        let claimed = self.claimed.load(Ordering::Relaxed)
            || self.backing.claim().is_ok() && self.backing.check(&self.id).is_ok();
        self.claimed.store(claimed, Ordering::Relaxed);
        claimed
    }

    /// Does what waits for the disk. Mover only.
    pub fn wait_for<T>(&self, body: impl FnOnce() -> T) -> T {
        let since = Instant::now();
        self.waiting.store(true, Ordering::Relaxed);
        let done = body();
        self.took(since.elapsed());
        self.waiting.store(false, Ordering::Relaxed);
        done
    }

    /// Notes how long something took that the mover asked of the disk.
    pub fn took(&self, time: Duration) {
        if time >= LONG_WAIT {
            let until = self.begun.elapsed() + SLOW_FOR;
            self.slow_until_ms.store(until.as_millis() as u64, Ordering::Relaxed);
        }
    }

    /// The disk has not answered the mover yet, or not for long: it is slow, which is not the same as full.
    pub fn is_slow(&self) -> bool {
        let until = || u128::from(self.slow_until_ms.load(Ordering::Relaxed));
        self.waiting.load(Ordering::Relaxed) || self.begun.elapsed().as_millis() < until()
    }

    /// Byte offset of an extent on the backing.
    pub fn at(&self, extent: ExtentNo) -> u64 {
        BLOCK_BYTES as u64 + u64::from(extent.0) * self.extent_bytes
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lowest free extent: segments that go down together lie together.
    pub fn take(&self) -> Option<ExtentNo> {
        let mut space = self.space();
        let extent = space.taken.lowest_absent()?;
        space.taken.set(extent);
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(ExtentNo(extent))
    }

    /// Notes an extent that recovery found in use.
    pub fn found(&self, extent: ExtentNo) -> Result<()> {
        let mut space = self.space();
        if extent.0 >= self.extents || space.taken.has(extent.0) {
            let why = format!("extent {} of its disk tier cannot be, or is in use twice", extent.0);
            return Err(Error::BadArena(why));
        }
        space.taken.set(extent.0);
        self.taken.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub fn give(&self, extent: ExtentNo) {
        let mut space = self.space();
        space.taken.clear(extent.0);
        space.told.clear(extent.0);
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }

    /// Tells the backing of one extent that is free and that it does not know of. Mover only, so that no
    /// extent is taken meanwhile. False: there is none.
    pub fn discard_one(&self) -> bool {
        let extent = {
            let mut space = self.space();
            let Some(extent) = space.told.lowest_absent() else { return false };
            space.told.set(extent);
            if space.taken.has(extent) {
                return true;
            }
            extent
        };
        self.wait_for(|| self.backing.discard(self.at(ExtentNo(extent)), self.extent_bytes));
        true
    }
}

impl fmt::Display for Lower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.backing.fmt(f)
    }
}
