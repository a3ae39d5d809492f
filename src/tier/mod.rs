//! A tier below memory: a file, a block device, a server's export or objects, in extents of one segment each.
//!
//! Which segment lies where, the segment table says; here is only which extents are taken, what became
//! of reading and writing, and what is to be discarded. Extents are taken by the tier's mover alone, and given
//! back by whoever releases a segment, the cleaner or a mover: never on the I/O path, so a mutex does.
//!
//! ```text
//! block 0   the header (`io/backing.rs`)
//! then      extents of as many blocks as the largest segment fills (`seal.rs`)
//! ```

mod asked;
mod late;
mod seal;

pub(crate) use asked::Asked;
pub(crate) use late::NOTES;
pub(crate) use seal::{Seal, PAYLOAD};

use crate::arena::{Arena, Resident};
use crate::error::{Error, Result};
use crate::io::{Medium, TierKey, BLOCK_BYTES, MOST_DISCARDS};
use crate::page::{ExtentNo, TierNo};
use late::{Late, TICK};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Extents that a place of so many bytes has, for segments of so many.
pub(crate) fn extents_in(bytes: u64, segment_bytes: usize) -> u32 {
    let blocks = (bytes / BLOCK_BYTES as u64).saturating_sub(1);
    (blocks / segment_bytes.div_ceil(PAYLOAD) as u64).min(MAX_EXTENTS.into()) as u32
}

/// Segments have numbers of 24 bits, and those in memory need some too. Every arena has room in its table for so many,
/// of all tiers: 256 MiB of address space, of which only what is used is memory.
pub(crate) const MAX_EXTENTS: u32 = 1 << 23;

/// A disk that takes so long to answer is slow, and for how long after that.
const LONG_WAIT: Duration = Duration::from_millis(500);
const SLOW_FOR: Duration = Duration::from_secs(3);
/// One that has not answered for so long is passed over, where there is another: before those who wait for room are
/// refused.
const HANGS_AFTER: Duration = Duration::from_secs(2);

/// What became of reading and writing.
#[derive(Default)]
pub(crate) struct Counts {
    pub segments_written: AtomicU64,
    pub bytes_written: AtomicU64,
    pub fetches: AtomicU64,
    pub bytes_fetched: AtomicU64,
    /// Pages that were in what was fetched for others.
    pub beside: AtomicU64,
    pub compacted: AtomicU64,
    /// Segments brought up because they were asked for again and again.
    pub promoted: AtomicU64,
    /// Segments that went on to another tier.
    pub passed_on: AtomicU64,
    pub write_errors: AtomicU64,
    /// Segments that could not be brought up again.
    pub unreadable: AtomicU64,
    /// And those that another tier's mover could not take over.
    pub not_passed_on: AtomicU64,
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
    /// Those, and what nothing is to be written to for a while.
    kept: Resident,
    /// All but those given back of which the medium does not know yet.
    told: Resident,
    late: Late,
}

/// A tier below memory.
pub(crate) struct Lower {
    /// Its place in the arena.
    pub no: TierNo,
    pub medium: Medium,
    id: TierKey,
    pub seal: Seal,
    pub counts: Counts,
    pub asked: Asked,
    /// It may be written to: no write of an earlier store is on its way any more.
    pub claimed: AtomicBool,
    /// Since when the mover waits for the disk, in milliseconds since `begun`, and one; 0: it does not.
    waiting_since_ms: AtomicU64,
    /// Until when the disk counts as slow after it has answered, in milliseconds since `begun`: what it made room
    /// for is not there the same moment.
    slow_until_ms: AtomicU64,
    begun: Instant,
    extents: u32,
    extent_bytes: u64,
    taken: AtomicU32,
    /// Free, but kept so for a while.
    late: AtomicU32,
    space: Mutex<Space>,
}

impl Lower {
    /// `key`: what is sealed with; None: nothing is encrypted.
    pub fn new(
        no: TierNo,
        medium: Medium,
        id: TierKey,
        key: Option<&[u8; 32]>,
        (extents, segment_bytes): (u32, usize),
    ) -> Lower {
        let mut told = Resident::new(extents);
        (0..extents).for_each(|n| told.set(n));
        let extent_bytes = (segment_bytes.div_ceil(PAYLOAD) * BLOCK_BYTES) as u64;
        Lower {
            no,
            seal: Seal::new(key),
            medium,
            id,
            counts: Counts::default(),
            asked: Asked::new(),
            claimed: AtomicBool::new(false),
            waiting_since_ms: AtomicU64::new(0),
            slow_until_ms: AtomicU64::new(0),
            begun: Instant::now(),
            extents,
            extent_bytes,
            taken: AtomicU32::new(0),
            late: AtomicU32::new(0),
            space: Mutex::new(Space {
                taken: Resident::new(extents),
                kept: Resident::new(extents),
                told,
                late: Late::new(),
            }),
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

    /// Free ones that nothing is to be written to for a while.
    pub fn late(&self) -> u32 {
        self.late.load(Ordering::Relaxed)
    }

    pub fn free(&self) -> u32 {
        self.extents.saturating_sub(self.taken() + self.late())
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
        let try_it = || self.medium.claim().is_ok() && self.medium.check(&self.id).is_ok();
        let claimed = self.claimed.load(Ordering::Relaxed) || self.wait_for(try_it);
        self.claimed.store(claimed, Ordering::Relaxed);
        claimed
    }

    /// Does what waits for the disk. Mover only.
    pub fn wait_for<T>(&self, body: impl FnOnce() -> T) -> T {
        let since = Instant::now();
        self.waiting_since_ms.store(self.begun.elapsed().as_millis() as u64 + 1, Ordering::Relaxed);
        let done = body();
        self.took(since.elapsed());
        self.waiting_since_ms.store(0, Ordering::Relaxed);
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
        let away = || self.medium.remote().is_some_and(|remote| remote.comes_and_goes(SLOW_FOR));
        let waits = self.waiting_since_ms.load(Ordering::Relaxed) != 0;
        waits || self.begun.elapsed().as_millis() < until() || away()
    }

    /// It does not answer, for longer than others are to wait for it.
    pub fn hangs(&self) -> bool {
        let since = self.waiting_since_ms.load(Ordering::Relaxed);
        let waits = || self.begun.elapsed().saturating_sub(Duration::from_millis(since - 1)) >= HANGS_AFTER;
        let away = || self.medium.remote().is_some_and(|r| r.away().is_some_and(|time| time >= HANGS_AFTER));
        since != 0 && waits() || away()
    }

    /// It can be read from, for all that is known.
    pub fn answers(&self) -> bool {
        !self.hangs() && self.medium.remote().is_none_or(|remote| remote.is_up())
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
        let extent = space.kept.lowest_absent()?;
        space.taken.set(extent);
        space.kept.set(extent);
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(ExtentNo(extent))
    }

    /// Notes an extent that recovery found in use.
    pub fn found(&self, extent: ExtentNo) -> Result<()> {
        let mut space = self.space();
        if extent.0 >= self.extents || space.taken.has(extent.0) {
            let why = format!("extent {} of its disk tier {self} cannot be, or is in use twice", extent.0);
            return Err(Error::BadArena(why));
        }
        space.taken.set(extent.0);
        space.kept.set(extent.0);
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.recount_late(&space);
        Ok(())
    }

    pub fn give(&self, extent: ExtentNo) {
        let mut space = self.space();
        space.taken.clear(extent.0);
        space.told.clear(extent.0);
        if !space.late.has(extent.0) {
            space.kept.clear(extent.0);
        }
        self.taken.fetch_sub(1, Ordering::Relaxed);
        self.recount_late(&space);
    }

    fn recount_late(&self, space: &Space) {
        let late = space.late.extents().filter(|extent| !space.taken.has(*extent)).count();
        self.late.store(late as u32, Ordering::Relaxed);
    }

    /// Learns where an earlier store's writes may still land. Before any extent is found or taken.
    pub fn find_late(&self, arena: &Arena) {
        if self.medium.remote().is_none() {
            return;
        }
        let mut space = self.space();
        let space = &mut *space;
        space.late.find(arena.late(self.no), self.extents);
        space.late.extents().for_each(|extent| space.kept.set(extent));
        self.recount_late(space);
    }

    /// Before something is sent to an extent. False: not now. Mover only, as are the next two.
    pub fn note(&self, arena: &Arena, extent: ExtentNo) -> bool {
        self.medium.remote().is_none() || self.space().late.note(arena.late(self.no), extent)
    }

    /// It has ended. `late`: it may be done yet.
    pub fn settle(&self, arena: &Arena, extent: ExtentNo, late: bool) {
        if self.medium.remote().is_some() {
            let mut space = self.space();
            space.late.settle(arena.late(self.no), extent, late);
            self.recount_late(&space);
        }
    }

    /// Lets time pass for what is late, if the server answers, and is ours. `block`: room to read one.
    pub fn tick(&self, arena: &Arena, block: &mut [u8]) {
        let now = Instant::now();
        if !self.space().late.is_due(now) {
            return;
        }
        let answered = self.wait_for(|| self.is_ours(block)) && now.elapsed() < TICK;
        let mut space = self.space();
        let space = &mut *space;
        let (mut before, mut count) = ([0; NOTES], 0);
        for extent in space.late.extents() {
            (before[count], count) = (extent, count + 1);
        }
        space.late.tick(arena.late(self.no), now, answered);
        for extent in &before[..count] {
            if !space.late.has(*extent) && !space.taken.has(*extent) {
                // What came late lies there.
                space.kept.clear(*extent);
                space.told.clear(*extent);
            }
        }
        self.recount_late(space);
    }

    /// Whether it is still the one that it was: nothing tells when another store takes a server's export.
    pub fn is_ours(&self, block: &mut [u8]) -> bool {
        self.medium.remote().is_none_or(|remote| remote.is_ours(&self.id, &mut block[..BLOCK_BYTES]))
    }

    /// Tells the medium of an extent, or some, that is free and that it does not know of. Mover only, so that no
    /// extent is taken meanwhile. False: there is none.
    pub fn discard_some(&self, arena: &Arena) -> bool {
        let (mut at, mut count) = ([0; MOST_DISCARDS], 0);
        let mut extents = [ExtentNo(0); MOST_DISCARDS];
        while count < self.medium.discards_at_once() {
            let extent = {
                let mut space = self.space();
                let Some(extent) = space.told.lowest_absent() else { break };
                space.told.set(extent);
                if space.kept.has(extent) {
                    continue;
                }
                ExtentNo(extent)
            };
            if !self.note(arena, extent) {
                self.space().told.clear(extent.0);
                break;
            }
            (at[count], extents[count]) = (self.at(extent), extent);
            count += 1;
        }
        if count == 0 {
            return false;
        }
        let late = self.wait_for(|| self.medium.discard(&at[..count], self.extent_bytes));
        for (extent, late) in extents[..count].iter().zip(late) {
            self.settle(arena, *extent, late);
            if late {
                self.space().kept.set(extent.0);
            }
        }
        true
    }
}

impl fmt::Display for Lower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.medium.fmt(f)
    }
}
