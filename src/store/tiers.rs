//! What can be changed of the tiers while a store is open. The memory limit and whether the disk tier is
//! drained are kept in the arena, so that they hold for whoever takes it over.

use super::{grow, Shared, Store};
use crate::arena::host_memory;
use crate::config::{format_size, Limit, MIN_LIMIT_BYTES};
use crate::error::{Error, Result};
use crate::log::segment::Place;
use crate::page::SegmentId;
use crate::stats::TierStats;
use crate::tier::Lower;
use std::sync::atomic::Ordering;
use std::sync::PoisonError;

impl Store {
    /// The tiers, in the order in which pages go down, and what each holds.
    pub fn tiers(&self) -> Vec<TierStats> {
        let s = self.shared();
        let segment = s.arena.segment_bytes() as u64;
        let (mut live, mut cold_segments) = ([0; 3], 0);
        for id in (0..grow::known_segments(s)).map(SegmentId) {
            let bytes = u64::from(s.segments.live(&s.arena, id));
            let cold = s.segments.past(&s.arena, id).1;
            match s.segments.place(&s.arena, id) {
                _ if bytes == 0 => {}
                Place::Below(_) => live[2] += bytes,
                Place::Memory(_) => {
                    live[usize::from(cold)] += bytes;
                    cold_segments += u64::from(cold);
                }
            }
        }
        let c = &s.config;
        let ram = TierStats {
            name: "ram",
            what: format!("{}, {} together", c.codec, format_size((c.group_pages * crate::PAGE_BYTES) as u64)),
            limit_bytes: hot_limit(s),
            held_bytes: s.held_bytes().saturating_sub(cold_segments * segment),
            live_bytes: live[0],
            state: "used",
        };
        let cold = c.cold.map(|cold| TierStats {
            name: "cold",
            what: format!("{}, {} together", cold.codec, format_size((cold.group_pages * crate::PAGE_BYTES) as u64)),
            // Of its own, or what the first tier leaves it.
            limit_bytes: match s.limit_bytes().saturating_sub(hot_limit(s)) {
                0 => s.limit_bytes(),
                own => own,
            },
            held_bytes: cold_segments * segment,
            live_bytes: live[1],
            state: "used",
        });
        let disk = s.lower.as_ref().map(|lower| TierStats {
            name: "disk",
            what: lower.to_string(),
            limit_bytes: u64::from(lower.extents()) * lower.extent_bytes(),
            held_bytes: u64::from(lower.taken()) * lower.extent_bytes(),
            live_bytes: live[2],
            state: match (lower.counts.failing.load(Ordering::Relaxed), s.draining(), lower.taken()) {
                (true, ..) => "failing",
                (_, true, 0) => "drained",
                (_, true, _) => "being drained",
                _ => "used",
            },
        });
        [Some(ram), cold, disk].into_iter().flatten().collect()
    }

    /// Changes how much memory the first tier may hold, everything counted. What is above a lower limit goes back to
    /// the host as room comes, by cleaning and by moving to the disk tier.
    ///
    /// Refused: more than the arena was made for, and less than what is stored needs.
    pub fn set_limit(&self, limit: Limit) -> Result<()> {
        let s = self.shared();
        // A second tier keeps its own.
        let own = s.limit_bytes().saturating_sub(hot_limit(s));
        let bytes = limit.resolve(host_memory()?.0).saturating_add(own);
        let capacity = u64::from(s.arena.max_frames()) * s.arena.segment_bytes() as u64;
        let bad = |why: String| Err(Error::InvalidConfig(why));
        if bytes < MIN_LIMIT_BYTES {
            return bad(format!("a limit of {bytes} bytes is too small: at least 4M"));
        }
        if bytes > capacity.max(s.config.limit_bytes) {
            return bad(format!("the arena was made for a limit of {}: that is the most", format_size(capacity)));
        }
        let _one_at_a_time = s.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = least_limit(s);
        if bytes < needed && bytes < s.limit_bytes() {
            return bad(format!("what is stored needs {} of memory at the least", format_size(needed)));
        }
        // Growth looks at it anew in each step, and may be waiting for memory within one: it is not waited for.
        s.arena.set_limit(s.config.limit_bytes, bytes);
        s.limit.store(bytes, Ordering::Relaxed);
        s.wake_growth();
        s.wake_cleaner();
        s.wake_mover();
        Ok(())
    }

    /// Has the disk tier emptied, into memory as far as that has room, and used no more; or used again.
    /// How far it is, [`Store::stats`] tells.
    pub fn drain_disk(&self, drain: bool) -> Result<()> {
        let s = self.shared();
        disk(s)?;
        s.arena.drain().store(drain.into(), Ordering::Release);
        s.wake_mover();
        Ok(())
    }

    /// The same, unless what lies there does not fit into memory.
    pub fn empty_disk(&self) -> Result<()> {
        let s = self.shared();
        disk(s)?;
        let (needed, limit) = (limit_with_all(s), s.limit_bytes());
        if needed > limit {
            let text = format_size;
            let why = format!("what lies there does not fit into memory: {} of {}", text(needed), text(limit));
            return Err(Error::InvalidConfig(why));
        }
        self.drain_disk(true)
    }

    /// Has what was written at least `idle_s` seconds ago moved to the disk tier, whether memory is short
    /// or not. It is over when [`Store::stats`] says so.
    pub fn write_back(&self, idle_s: u32) -> Result<()> {
        let s = self.shared();
        let lower = disk(s)?;
        if s.draining() {
            return Err(Error::InvalidConfig("the disk tier is being drained".into()));
        }
        if lower.counts.failing.load(Ordering::Relaxed) {
            return Err(Error::InvalidConfig("the disk tier fails at this time".into()));
        }
        // What comes later is not meant: or it would not end.
        s.write_back_before.store(s.segments.next_sequence(), Ordering::Relaxed);
        s.write_back.store(u64::from(idle_s) + 1, Ordering::Release);
        s.wake_mover();
        Ok(())
    }
}

fn disk(s: &Shared) -> Result<&Lower> {
    s.lower.as_ref().ok_or_else(|| Error::InvalidConfig("there is no disk tier".into()))
}

/// What the first tier may hold: a limit that was set anew is for it, and the second tier keeps its own.
pub(super) fn hot_limit(s: &Shared) -> u64 {
    (s.config.hot_bytes + s.limit_bytes()).saturating_sub(s.config.limit_bytes)
}

/// What the limit cannot be below: with what is live in memory, less what may go down.
fn least_limit(s: &Shared) -> u64 {
    let below = u64::from(s.room_below()) * s.arena.segment_bytes() as u64;
    let in_memory = |id: &SegmentId| matches!(s.segments.place(&s.arena, *id), Place::Memory(_));
    with_cleaning(s, in_memory).saturating_sub(below) + fixed(s)
}

/// The same, with all that is live, wherever it lies, and nothing below.
fn limit_with_all(s: &Shared) -> u64 {
    with_cleaning(s, |_| true) + fixed(s)
}

/// What is live of some segments, and an eighth more that cleaning does not get at.
fn with_cleaning(s: &Shared, of: impl Fn(&SegmentId) -> bool) -> u64 {
    let known = (0..grow::known_segments(s)).map(SegmentId);
    let live: u64 = known.filter(of).map(|id| u64::from(s.segments.live(&s.arena, id))).sum();
    live + live / 8
}

/// Metadata, and what lanes leave to others.
fn fixed(s: &Shared) -> u64 {
    let metadata = u64::from(s.held_meta.load(Ordering::Relaxed)) * crate::PAGE_BYTES as u64;
    let frames = u64::from(grow::least_reserve(&s.config)) + s.config.max_lanes as u64;
    metadata + frames * s.arena.segment_bytes() as u64
}
