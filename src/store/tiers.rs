//! What can be changed of the tiers while a store is open: limits, when pages are compressed again and how eagerly, when
//! segments go down, and whether a disk tier is drained. All of it is kept in the arena, so that it holds for whoever
//! takes it over; a number with the one of the configuration that it stands in the place of, and while that is the same.

use super::{grow, Shared, Store};
use crate::arena::{host_memory, Tuned};
use crate::config::{
    format_size, which, Checked, CodecChoice, Limit, Marks, RamTier, TierName, TierSettings, MIN_LIMIT_BYTES,
};
use crate::error::{Error, Result};
use crate::log::segment::Place;
use crate::page::{SegmentId, TierNo, MAX_TIERS_BELOW};
use crate::stats::TierStats;
use crate::tier::Lower;
use std::sync::atomic::Ordering;
use std::sync::PoisonError;

impl Store {
    /// The tiers, in the order in which pages go down, and what each holds.
    pub fn tiers(&self) -> Vec<TierStats> {
        let s = self.shared();
        let segment = s.arena.segment_bytes() as u64;
        let (mut live, mut below, mut cold_segments) = ([0; 2], [0; MAX_TIERS_BELOW], 0);
        for id in (0..grow::known_segments(s)).map(SegmentId) {
            let bytes = u64::from(s.segments.live(&s.arena, id));
            let cold = s.segments.past(&s.arena, id).1;
            match s.segments.place(&s.arena, id) {
                _ if bytes == 0 => {}
                Place::Below(at) => below[at.tier.index()] += bytes,
                Place::Memory(_) => {
                    live[usize::from(cold)] += bytes;
                    cold_segments += u64::from(cold);
                }
            }
        }
        let c = &s.config;
        let ram = TierStats {
            name: "ram".into(),
            what: format!("{},{}", packing(c.codec, c.group_pages, c.dict_bytes), s.marks()),
            limit_bytes: s.hot_limit(),
            held_bytes: s.held_bytes().saturating_sub(cold_segments * segment),
            live_bytes: live[0],
            state: "used",
        };
        let cold = c.cold.map(|cold| TierStats {
            name: "cold".into(),
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
        let disks = s.lower.iter().zip(c.names.iter().zip(&c.below)).map(|(lower, (name, what))| TierStats {
            name: name.clone(),
            what: what.to_string(),
            limit_bytes: u64::from(lower.extents()) * lower.extent_bytes(),
            held_bytes: u64::from(lower.taken()) * lower.extent_bytes(),
            live_bytes: below[lower.no.index()],
            state: match (lower.counts.failing.load(Ordering::Relaxed), s.draining(lower), lower.taken()) {
                (true, ..) => "failing",
                (_, true, 0) => "drained",
                (_, true, _) => "being drained",
                _ => "used",
            },
        });
        std::iter::once(ram).chain(cold).chain(disks).collect()
    }

    /// Changes how much memory the first tier may hold, everything counted. What is above a lower limit goes back to
    /// the host as room comes, by cleaning and by moving to disk tiers. A second tier keeps its own.
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
        if *settings.name() == TierName::Cold && s.config.cold.is_none() {
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
        s.wake_movers();
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
        s.wake_movers();
        Ok(())
    }

    /// [`Store::drain_tier`] of the only disk tier.
    pub fn drain_disk(&self, drain: bool) -> Result<()> {
        self.drain_tier(None, drain)
    }

    /// [`Store::empty_tier`] of the only disk tier.
    pub fn empty_disk(&self) -> Result<()> {
        self.empty_tier(None)
    }

    /// Has a disk tier emptied, into memory as far as that has room, or else to other disk tiers, and used no more; or
    /// used again. It is the one that [`Store::tiers`] calls so, None: the only one. How far it is, [`Store::stats`] tells.
    pub fn drain_tier(&self, name: Option<&str>, drain: bool) -> Result<()> {
        let s = self.shared();
        let lower = disk(s, name)?;
        s.arena.drain(lower.no).store(drain.into(), Ordering::Release);
        s.wake_movers();
        Ok(())
    }

    /// The same, unless what lies there does not fit into memory and other disk tiers.
    pub fn empty_tier(&self, name: Option<&str>) -> Result<()> {
        let s = self.shared();
        let lower = disk(s, name)?;
        let others = s.lower.iter().filter(|other| other.no != lower.no && !s.draining(other));
        let room = others.map(Lower::room).sum::<u32>();
        let limit = s.limit_bytes().saturating_add(u64::from(room) * s.arena.segment_bytes() as u64);
        let needed = limit_with(s, lower.no);
        // As they are, or what is live of them.
        if lower.taken() > room && needed > limit {
            let text = format_size;
            let where_to = if s.lower.len() > 1 { "memory and the other tiers" } else { "memory" };
            let why = format!("what lies there does not fit into {where_to}: {} of {}", text(needed), text(limit));
            return Err(Error::InvalidConfig(why));
        }
        self.drain_tier(name, true)
    }

    /// Has what was written at least `idle_s` seconds ago moved to the first disk tier that takes it, whether memory is
    /// short or not. It is over when [`Store::stats`] says so.
    pub fn write_back(&self, idle_s: u32) -> Result<()> {
        let s = self.shared();
        let bad = |why: &str| Err(Error::InvalidConfig(why.into()));
        if s.lower.is_empty() {
            return bad("there is no disk tier");
        }
        let mut used = s.lower.iter().filter(|lower| !s.draining(lower)).peekable();
        if used.peek().is_none() {
            return bad("the disk tier is being drained");
        }
        if used.all(|lower| lower.counts.failing.load(Ordering::Relaxed)) {
            return bad("the disk tier fails at this time");
        }
        // What comes later is not meant: or it would not end.
        s.write_back_before.store(s.segments.next_sequence(), Ordering::Relaxed);
        s.write_back.store(u64::from(idle_s) + 1, Ordering::Release);
        s.wake_movers();
        Ok(())
    }
}

fn disk<'s>(s: &'s Shared, name: Option<&str>) -> Result<&'s Lower> {
    Ok(&s.lower[which(&s.config.names, name)?])
}

impl Shared {
    /// The disk tier at that place of the arena. None: it has none there.
    pub fn lower_at(&self, no: TierNo) -> Option<&Lower> {
        self.lower.iter().find(|lower| lower.no == no)
    }

    /// It is to be empty: nothing goes there, and what is there comes back, or goes to others.
    pub fn draining(&self, lower: &Lower) -> bool {
        self.arena.drain(lower.no).load(Ordering::Relaxed) != 0
    }

    pub fn any_draining(&self) -> bool {
        self.lower.iter().any(|lower| self.draining(lower))
    }

    /// Segments that may be expected to find room on disk tiers.
    pub fn room_below(&self) -> u32 {
        self.lower.iter().filter(|lower| !self.draining(lower)).map(Lower::room).sum()
    }

    /// Where in their order the tier stands to which goes what memory has no room for. None: none takes anything at this
    /// moment.
    pub fn first_below(&self) -> Option<usize> {
        self.lower.iter().position(|lower| self.takes(lower))
    }

    /// The same for what a disk tier has no room for; of one that is being drained a hotter one too, if no other.
    pub fn next_below(&self, from: usize) -> Option<usize> {
        let hotter = if self.lower.get(from).is_some_and(|lower| self.draining(lower)) { from } else { 0 };
        (from + 1..self.lower.len()).chain((0..hotter).rev()).find(|at| self.takes(&self.lower[*at]))
    }

    fn takes(&self, lower: &Lower) -> bool {
        !self.draining(lower) && lower.room() > 0 && !lower.hangs()
    }

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

/// The same, with all that is live in memory and on that tier, and nothing below.
fn limit_with(s: &Shared, no: TierNo) -> u64 {
    let meant = |id: &SegmentId| match s.segments.place(&s.arena, *id) {
        Place::Memory(_) => true,
        Place::Below(at) => at.tier == no,
    };
    with_cleaning(s, meant) + fixed(s)
}

/// What is live of some segments, and an eighth more that cleaning does not get at.
fn with_cleaning(s: &Shared, of: impl Fn(&SegmentId) -> bool) -> u64 {
    let known = (0..grow::known_segments(s)).map(SegmentId);
    let live: u64 = known.filter(of).map(|id| u64::from(s.segments.live(&s.arena, id))).sum();
    live + live / 8
}

/// Metadata, and what lanes leave to others; those that help are given up where there is no room.
fn fixed(s: &Shared) -> u64 {
    let metadata = u64::from(s.held_meta.load(Ordering::Relaxed)) * crate::PAGE_BYTES as u64;
    let frames = u64::from(grow::least_reserve(&s.config)) + (s.config.max_lanes - s.config.helper_lanes) as u64;
    metadata + frames * s.arena.segment_bytes() as u64
}
