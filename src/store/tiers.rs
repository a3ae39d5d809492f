//! What can be changed of the tiers while a store is open: limits, when pages are compressed again and how eagerly, when
//! segments go down, and whether the disk tier is drained. All of it is kept in the arena, so that it holds for whoever
//! takes it over; a number with the one of the configuration that it stands in the place of, and while that is the same.

use super::{grow, Shared, Store};
use crate::arena::{host_memory, Tuned};
use crate::config::{
    format_size, Checked, CodecChoice, Limit, Marks, RamTier, TierName, TierSettings, MIN_LIMIT_BYTES,
};
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
            what: format!("{},{}", packing(c.codec, c.group_pages, c.dict_bytes), s.marks()),
            limit_bytes: s.hot_limit(),
            held_bytes: s.held_bytes().saturating_sub(cold_segments * segment),
            live_bytes: live[0],
            state: "used",
        };
        let cold = c.cold.map(|cold| TierStats {
            name: "cold",
            what: {
                let how = packing(cold.codec, cold.group_pages, cold.dict_bytes);
                format!("{how},idle={}s,cpu={}%", s.idle_s(), s.cpu_percent())
            },
            // Of its own, or what the first tier leaves it.
            limit_bytes: match s.own_limit.load(Ordering::Relaxed) {
                0 => s.limit_bytes(),
                own => own,
            },
            held_bytes: cold_segments * segment,
            live_bytes: live[1],
            state: "used",
        });
        let disk = s.lower.as_ref().map(|lower| TierStats {
            name: "disk",
            what: c.below.as_ref().map_or_else(|| lower.to_string(), ToString::to_string),
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
    /// the host as room comes, by cleaning and by moving to the disk tier. A second tier keeps its own.
    ///
    /// Refused: more than the arena was made for, and less than what is stored needs.
    pub fn set_limit(&self, limit: Limit) -> Result<()> {
        let s = self.shared();
        let _one_at_a_time = s.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_limits(Some(limit), None)
    }

    /// Changes what can be changed of a memory tier without opening the store anew, all or nothing: limits as
    /// [`Store::set_limit`] does, when and how eagerly pages are compressed again, when segments go down.
    pub fn set_tier(&self, settings: &TierSettings) -> Result<()> {
        let s = self.shared();
        let bad = |why: &str| Err(Error::InvalidConfig(why.into()));
        if let (_, Some(later)) = settings.split() {
            return bad(&format!("the store has to be opened anew for that: {later}"));
        }
        if settings.name() == TierName::Cold && s.config.cold.is_none() {
            return bad("there is no second memory tier");
        }
        let _one_at_a_time = s.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = RamTier {
            idle_s: Some(s.idle_s()),
            cpu_percent: Some(s.cpu_percent()),
            marks: s.marks(),
            ..RamTier::default()
        };
        let wanted = settings.of_ram(now).map_err(Error::InvalidConfig)?;
        let limit = (wanted.limit != Limit::Default).then_some(wanted.limit);
        match settings.name() {
            TierName::Cold => self.set_limits(None, limit)?,
            _ => self.set_limits(limit, None)?,
        }
        s.tune(Tuned::Idle, wanted.idle_s.unwrap_or_default());
        s.tune(Tuned::Cpu, wanted.cpu_percent.unwrap_or_default().into());
        s.tune(Tuned::Marks, pair_of(wanted.marks));
        s.wake_cleaner();
        s.wake_mover();
        Ok(())
    }

    /// Of the first tier and of a second one's own, None: as it is. By one at a time.
    fn set_limits(&self, hot: Option<Limit>, own: Option<Limit>) -> Result<()> {
        let s = self.shared();
        if hot.is_none() && own.is_none() {
            return Ok(());
        }
        let ram_bytes = host_memory()?.0;
        let resolve = |limit: Option<Limit>, now| limit.map_or(now, |limit| limit.resolve(ram_bytes));
        let own_bytes = resolve(own, s.own_limit.load(Ordering::Relaxed));
        let bytes = resolve(hot, s.hot_limit()).saturating_add(own_bytes);
        let capacity = u64::from(s.arena.max_frames()) * s.arena.segment_bytes() as u64;
        let bad = |why: String| Err(Error::InvalidConfig(why));
        if bytes < MIN_LIMIT_BYTES {
            return bad(format!("a limit of {bytes} bytes is too small: at least 4M"));
        }
        if bytes > capacity.max(s.config.limit_bytes) {
            return bad(format!("the arena was made for a limit of {}: that is the most", format_size(capacity)));
        }
        let needed = least_limit(s);
        if bytes < needed && bytes < s.limit_bytes() {
            return bad(format!("what is stored needs {} of memory at the least", format_size(needed)));
        }
        // Growth looks at it anew in each step, and may be waiting for memory within one: it is not waited for.
        if own.is_some() {
            s.arena.set_own_limit(s.config.limit_bytes.saturating_sub(s.config.hot_bytes), own_bytes);
            s.own_limit.store(own_bytes, Ordering::Relaxed);
        }
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

impl Shared {
    /// What the first tier may hold.
    pub fn hot_limit(&self) -> u64 {
        self.limit_bytes().saturating_sub(self.own_limit.load(Ordering::Relaxed))
    }

    /// Seconds after which pages are compressed again.
    pub fn idle_s(&self) -> u32 {
        self.tuned(Tuned::Idle)
    }

    /// Of a processor, what that may take.
    pub fn cpu_percent(&self) -> u8 {
        self.tuned(Tuned::Cpu) as u8
    }

    /// When segments go down.
    pub fn marks(&self) -> Marks {
        let [high, low, ..] = self.tuned(Tuned::Marks).to_le_bytes().map(|mark| Some(mark).filter(|mark| *mark > 0));
        Marks { high, low }
    }

    fn tuned(&self, what: Tuned) -> u32 {
        self.tuned[what as usize].load(Ordering::Relaxed)
    }

    fn tune(&self, what: Tuned, value: u32) {
        if self.tuned(what) != value {
            self.arena.tune(what, configured(&self.config, what), value);
            self.tuned[what as usize].store(value, Ordering::Relaxed);
        }
    }
}

/// As the configuration has it.
pub(super) fn configured(config: &Checked, what: Tuned) -> u32 {
    match what {
        Tuned::Idle => config.cold.map_or(0, |cold| cold.idle_s),
        Tuned::Cpu => config.cold.map_or(0, |cold| cold.cpu_percent.into()),
        Tuned::Marks => pair_of(config.marks),
    }
}

fn pair_of(marks: Marks) -> u32 {
    u32::from_le_bytes([marks.high.unwrap_or(0), marks.low.unwrap_or(0), 0, 0])
}

/// In the words of `--tier`.
fn packing(codec: CodecChoice, group_pages: usize, dict_bytes: usize) -> String {
    let dict = if dict_bytes > 0 { format!(",dict={}K", dict_bytes / 1024) } else { String::new() };
    format!("codec={codec},group={}K{dict}", group_pages * crate::PAGE_BYTES / 1024)
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
