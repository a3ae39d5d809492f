//! Growth: the one thread that asks the host for memory and gives it back. It keeps a reserve of
//! frames and metadata pages ready, so that lanes find what they need without asking. It may wait
//! for memory as long as it likes, since nothing waits for it but parked writes; but it waits here,
//! where a signal ends it, and never in the kernel's allocator (`arena/spare.rs`).

use super::append::kept_by_lanes;
use super::recover::most_ids;
use super::Shared;
use crate::arena::{host_memory, host_seconds, Resident, Spare};
use crate::config::Checked;
use crate::error::Result;
use crate::log::policy::{reserve_frames, surplus_frames, Demand};
use crate::page::{FrameNo, MetaNo, SegmentId, PAGE_BYTES};
use crate::sync::nap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Metadata pages to hold ready: leaves for 128 MiB of fresh address space.
const META_RESERVE: u32 = 64;
/// Free metadata pages above which memory goes back.
const META_SURPLUS: u32 = 4 * META_RESERVE;
const META_STEP: u32 = 16;
const NAP: Duration = Duration::from_millis(100);
/// How soon to look again whether the host has memory to spare.
const SPARE_NAP: Duration = Duration::from_millis(1);
/// To be spare beyond a step: what others may take between the look and the step.
const SPARE_MARGIN: u64 = 192 << 10;
/// Surplus must last this long before memory is given back.
const PATIENCE: Duration = Duration::from_millis(500);

/// Segments whose table entries are in use: ids are handed out from 0 up.
pub(super) fn known_segments(s: &Shared) -> u32 {
    s.known.load(Ordering::Acquire)
}

/// Ids that there must be, so that whoever finds a free frame finds an id: one for every frame and one that
/// is being added. Above disks those of all their extents, at once: movers free memory, so they must not wait for the
/// memory of a table entry. (32 bytes for each segment that the disks can hold.)
pub(super) fn wanted_ids(s: &Shared) -> u32 {
    match s.lower.as_slice() {
        [] => (s.held_frames.load(Ordering::Acquire) + 1).min(s.arena.max_frames()),
        lower => most_ids(&s.arena, lower),
    }
}

/// Frames that the limit still allows to grow.
pub(super) fn growable_frames(s: &Shared) -> u32 {
    let left = s.limit_bytes().saturating_sub(s.held_bytes());
    (left / s.arena.segment_bytes() as u64) as u32
}

/// A reserve of which lanes get something.
pub(super) fn least_reserve(config: &Checked) -> u32 {
    kept_by_lanes(config) + 2
}

pub(super) struct Growth {
    shared: Arc<Shared>,
    /// Which frames and metadata pages are resident.
    frames: Resident,
    /// Numbered from 0 here, from 1 in the arena.
    meta: Resident,
    rate_since: Instant,
    taken_then: u64,
    per_second: u64,
    surplus_since: Option<Instant>,
    spare: Spare,
    /// Up to where the memory of an arena that was found is locked; None: all of it is.
    adopted_to: Option<usize>,
}

impl Growth {
    /// With what is resident already; `found`: by an earlier store, so it is not locked yet.
    pub fn new(shared: Arc<Shared>, frames: Resident, meta: Resident, found: bool) -> Growth {
        Growth {
            frames,
            meta,
            rate_since: Instant::now(),
            taken_then: 0,
            per_second: 0,
            surplus_since: None,
            spare: Spare::new(),
            adopted_to: found.then_some(0),
            shared,
        }
    }

    pub fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            if let Err(e) = self.step() {
                // The host refuses memory: writes park and cleaning goes on; try again.
                tracing::warn!("the store cannot grow: {e}");
            }
            if !self.adopt() {
                std::thread::park_timeout(NAP);
            }
        }
    }

    /// Locks some more of the memory of an arena that was found. False: all of it is.
    fn adopt(&mut self) -> bool {
        let Some(from) = self.adopted_to else { return false };
        let shared = self.shared.clone();
        let _busy = shared.quiet[0].lock().unwrap_or_else(PoisonError::into_inner);
        self.adopted_to = shared.arena.adopt_slice(from).unwrap_or_else(|e| {
            tracing::warn!("the arena is not locked from byte {from} on: {e}");
            None
        });
        true
    }

    /// Brings the reserve to where the policy wants it.
    pub fn step(&mut self) -> Result<()> {
        let s = self.shared.clone();
        let _busy = s.quiet[0].lock().unwrap_or_else(PoisonError::into_inner);
        let (ram_bytes, free_bytes) = host_memory()?;
        s.clock_s.store(host_seconds()?, Ordering::Relaxed);
        self.measure_rate(&s);
        let reserve = reserve_frames(&Demand {
            ram_bytes,
            free_bytes,
            limit_bytes: s.limit_bytes(),
            segment_bytes: s.arena.segment_bytes() as u64,
            frames_per_second: self.per_second,
        });
        let reserve = reserve.max(least_reserve(&s.config));
        s.reserve.store(reserve, Ordering::Relaxed);
        self.grow_meta(&s)?;
        self.grow_ids(&s)?;
        while s.arena.frames_ready() < reserve && growable_frames(&s) > 0 && !s.stop.load(Ordering::Relaxed) {
            let Some(f) = self.frames.lowest_absent() else { break };
            if !self.grow_ids(&s)? {
                break;
            }
            let spare = &mut self.spare;
            if !s.arena.grow_frame(FrameNo(f), |bytes| wait_for_spare(spare, &s, bytes))? {
                break;
            }
            self.frames.set(f);
            s.held_frames.fetch_add(1, Ordering::Release);
            self.grow_meta(&s)?;
        }
        // A limit that was lowered: as frames come free, they go.
        while s.held_bytes() > s.limit_bytes() && self.trade_frame(&s, least_reserve(&s.config)) {}
        self.give_back(&s, reserve);
        Ok(())
    }

    /// Makes the ids that are needed. False: the store is closing.
    fn grow_ids(&mut self, s: &Shared) -> Result<bool> {
        let wanted = wanted_ids(s);
        for id in known_segments(s)..wanted {
            if !wait_for_spare(&mut self.spare, s, PAGE_BYTES) {
                return Ok(false);
            }
            s.arena.grow_id(SegmentId(id))?;
            s.known.store(id + 1, Ordering::Release);
        }
        Ok(true)
    }

    fn measure_rate(&mut self, s: &Shared) {
        let elapsed = self.rate_since.elapsed();
        if elapsed >= Duration::from_secs(1) {
            let taken = s.frames_taken.load(Ordering::Relaxed);
            self.per_second = ((taken - self.taken_then) as f64 / elapsed.as_secs_f64()) as u64;
            self.taken_then = taken;
            self.rate_since = Instant::now();
        }
    }

    fn grow_meta(&mut self, s: &Shared) -> Result<()> {
        let step_bytes = u64::from(META_STEP) * PAGE_BYTES as u64;
        let want = META_RESERVE.min(s.arena.max_meta() / 16);
        while s.arena.meta_ready() < want {
            if s.held_bytes() + step_bytes > s.limit_bytes() && !self.trade_frame(s, 2) {
                return Ok(());
            }
            let Some(first) = self.meta.lowest_absent() else { return Ok(()) };
            let count =
                (first..first + META_STEP).take_while(|&n| n < s.arena.max_meta() && !self.meta.has(n)).count() as u32;
            if !wait_for_spare(&mut self.spare, s, step_bytes as usize) {
                return Ok(());
            }
            s.arena.grow_meta(MetaNo(first + 1), count)?;
            (first..first + count).for_each(|n| self.meta.set(n));
            s.held_meta.fetch_add(count, Ordering::Relaxed);
        }
        Ok(())
    }

    /// At the limit a free frame becomes room for metadata: without a leaf no page can be stored.
    fn trade_frame(&mut self, s: &Shared, keep: u32) -> bool {
        let Some(f) = s.arena.shrink_frame(keep) else { return false };
        self.frames.clear(f.0);
        s.held_frames.fetch_sub(1, Ordering::Relaxed);
        true
    }

    /// Gives back what is free beyond `keep` of each kind, at once.
    #[cfg(feature = "crash-points")]
    pub fn give_back_now(&mut self, keep: u32) {
        let s = self.shared.clone();
        let (frames, meta) = (s.arena.frames_ready(), s.arena.meta_ready());
        self.shrink(&s, keep, frames.saturating_sub(keep), meta.saturating_sub(keep));
    }

    fn give_back(&mut self, s: &Shared, reserve: u32) {
        let frames = surplus_frames(reserve, s.arena.frames_ready(), self.surplus_since.is_some());
        let meta = s.arena.meta_ready().saturating_sub(META_SURPLUS);
        if frames == 0 && meta == 0 {
            self.surplus_since = None;
            return;
        }
        let since = *self.surplus_since.get_or_insert_with(Instant::now);
        if since.elapsed() < PATIENCE {
            return;
        }
        self.shrink(s, reserve, frames, meta);
    }

    fn shrink(&mut self, s: &Shared, reserve: u32, frames: u32, meta: u32) {
        // A part at a time: demand may come back while this goes on.
        for _ in 0..frames.div_ceil(4) {
            let Some(f) = s.arena.shrink_frame(reserve) else { break };
            self.frames.clear(f.0);
            s.held_frames.fetch_sub(1, Ordering::Relaxed);
        }
        for _ in 0..meta.div_ceil(4) {
            let Some(m) = s.arena.shrink_meta(|| s.epochs.wait(nap)) else { break };
            self.meta.clear(m.0 - 1);
            s.held_meta.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Waits until the host can give `bytes` at once. False: the store is closing.
fn wait_for_spare(spare: &mut Spare, s: &Shared, bytes: usize) -> bool {
    while spare.bytes() < bytes as u64 + SPARE_MARGIN {
        if s.stop.load(Ordering::Relaxed) {
            return false;
        }
        std::thread::park_timeout(SPARE_NAP);
    }
    true
}
