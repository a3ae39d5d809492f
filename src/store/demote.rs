//! The movers: each writes the oldest segments down to its disk tier when memory runs short, as they are:
//! compressed and packed, several at once. Of several tiers the first does that which has room, and neither fails nor
//! hangs; from one tier to another they are moved by the mover of the one that takes them (`demote/sink.rs`).
//!
//! Story of one segment: chosen (what does not compress first, then the oldest; one that was read since
//! it was last chosen is passed over once); claimed as for cleaning, so that nobody else touches it; sealed
//! into a buffer (`tier/seal.rs`) and written to a free extent; one store of its table entry says that it
//! lives there now; its frame is free after a grace period. No slot changes: slots name segments, not
//! places. Killed before that store the segment is in memory and the extent free, after it the reverse.
//!
//! A write that fails leaves the segment where it is (`demote/trouble.rs`).
//!
//! A write to a server may be done later than it seems to have ended, and even after this process has. So it is noted
//! in the arena before it is sent, and its extent kept free while it may come late (`tier/late.rs`).
//!
//! What is asked for again and again is brought up as a whole, in one large read, while memory has more room than
//! would have others go down: so pages that come back one by one, when an area is swapped off or a machine
//! comes to rest, cost few reads. On a machine short of memory nothing comes up that way.
//!
//! What a volume wants to have below goes first, memory short or not; what it wants to have in memory never.
//!
//! By hand all that is older than some age goes down, memory short or not; or the tier is drained: extents are
//! brought up again, while memory has more room than would have others go down.
//!
//! Extents that are mostly dead are read back when free ones run short, and what is live of them written
//! anew, to memory first. The thread may wait for the disk as long as it likes: nothing waits for it but
//! writes that find no room. It asks for no memory: the table is there from the start.

mod sink;
mod trouble;
mod victims;

use super::append::{Appender, KEEP_FOR_CLEANER};
use super::survivors::Copier;
use super::{grow, Shared};
use crate::error::Result;
use crate::io::{EndedWrite, Pull, Writes, BLOCK_BYTES};
use crate::log::policy::demotion;
use crate::log::segment::{record_of, Place};
use crate::page::{ExtentNo, Placement, SegmentId, Spot, MAX_TIERS_BELOW};
use crate::stats::DiskStats;
use crate::sync::nap;
use crate::tier::{Lower, PAYLOAD};
use sink::Sinking;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use trouble::{Standing, LONGEST_REST};
use victims::{choose, mostly_dead, pressure};

/// Segments written at once.
const WRITES: usize = 4;
/// Most segments that one look at what is to be done has written.
const MOST_A_STEP: usize = 64;
const NAP: Duration = Duration::from_millis(50);
/// Segments that cannot be read and are passed over before all are tried again.
const MOST_UNREADABLE: usize = 64;
/// How often to look for what a volume wants to have below, when there was nothing.
const WANTED_EVERY: Duration = Duration::from_millis(500);

/// What the mover needs that takes memory, made before it is needed.
pub(super) struct Tools {
    writes: Writes,
    /// For what comes from other tiers, if there are others.
    pull: Option<Pull>,
}

impl Tools {
    /// `several`: there are other tiers.
    pub fn new(segment_bytes: usize, several: bool) -> Result<Tools> {
        let bytes = segment_bytes.div_ceil(PAYLOAD) * BLOCK_BYTES;
        Ok(Tools { writes: Writes::new(WRITES, bytes)?, pull: several.then(|| Pull::new(bytes)).transpose()? })
    }

    /// Room to read to while nothing is written.
    fn block(&mut self) -> &mut [u8] {
        self.writes.free().expect("nothing is being written").1
    }
}

pub(super) struct Mover {
    shared: Arc<Shared>,
    /// Where its tier stands in their order.
    at: usize,
    tools: Tools,
    copier: Copier,
    /// The likeliest victims: how soon, age, segment.
    likely: Vec<(u8, u64, SegmentId)>,
    /// When to look next for what a volume wants to have below.
    look_after: Instant,
    /// By the buffer that they are written from.
    on_the_way: [Option<OnTheWay>; WRITES],
    moving: bool,
    standing: Standing,
    /// When to look for extents to bring up again, after one for which there was no room, or when too many could not
    /// be read.
    compact_after: Option<Instant>,
    /// Segments that could not be brought up, each by the number of its sealing.
    unreadable: Vec<(SegmentId, u64)>,
    sinking: Sinking,
    /// What other tiers are to be rid of waits while memory is short.
    yields: bool,
}

/// What is to go down.
#[derive(Clone, Copy)]
struct Order {
    /// What was written so many seconds ago, 0: whatever its age.
    idle_s: u32,
    /// What was sealed with a lower number.
    before: u64,
    /// So many segments at most.
    most: usize,
    /// No more than memory is short of.
    by_pressure: bool,
    /// Only what a volume wants to have there.
    wanted_below: bool,
}

const BY_PRESSURE: Order =
    Order { idle_s: 0, before: u64::MAX, most: MOST_A_STEP, by_pressure: true, wanted_below: false };

/// A claimed segment and where it goes.
#[derive(Clone, Copy)]
struct OnTheWay {
    segment: SegmentId,
    from: Place,
    extent: ExtentNo,
}

impl Mover {
    /// `at`: where its tier stands in their order.
    pub fn new(shared: Arc<Shared>, at: usize, tools: Tools) -> Mover {
        let appender = Appender::new(&shared, KEEP_FOR_CLEANER);
        let copier = Copier::new(&shared, appender, shared.mover_epoch(at));
        Mover {
            at,
            tools,
            copier,
            likely: Vec::with_capacity(WRITES * 4 + 1),
            look_after: Instant::now(),
            on_the_way: [None; WRITES],
            moving: false,
            standing: Standing::new(),
            compact_after: None,
            unreadable: Vec::with_capacity(MOST_UNREADABLE),
            sinking: Sinking::new(),
            yields: true,
            shared,
        }
    }

    pub fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            if !self.step() {
                std::thread::park_timeout(NAP);
            }
        }
        self.close();
    }

    /// Seals what survivors went to.
    pub fn close(&mut self) {
        self.copier.appender.close(&self.shared.clone());
    }

    /// Some segments down, or one extent compacted or discarded. False: there was nothing to do.
    pub fn step(&mut self) -> bool {
        let shared = self.shared.clone();
        let _busy = shared.quiet[2 + self.at].lock().unwrap_or_else(PoisonError::into_inner);
        self.copier.appender.close_old(&shared);
        let lower = &shared.lower[self.at];
        if self.is_away(lower) || !lower.claim() || self.standing.rests() {
            self.let_go(&shared);
            return false;
        }
        lower.tick(&shared.arena, self.tools.block());
        let short = demotion(&pressure(&shared, self.moving));
        // One tier takes what memory has no room for. If none can, each tries.
        let is_first = shared.first_below().is_none_or(|first| first == self.at);
        let wanted = if is_first { short } else { 0 };
        let failing = lower.counts.failing.load(Ordering::Relaxed);
        if failing && (wanted == 0 || shared.draining(lower)) && !self.probe(&shared, lower) {
            return false;
        }
        if shared.draining(lower) {
            self.let_go(&shared);
            if is_first {
                shared.write_back.store(0, Ordering::Relaxed);
            }
            // As much room as moving down would leave: draining is not to make others wait.
            self.moving = true;
            let drained = short == 0 && self.may_compact() && self.bring_up(&shared, lower, |_| true);
            return drained || lower.discard_some(&shared.arena);
        }
        self.moving = wanted > 0;
        if self.promote(&shared, lower) {
            return true;
        }
        let compacted = self.compact(&shared, lower);
        let by_hand = if is_first { shared.write_back.load(Ordering::Acquire) } else { 0 };
        let order = match by_hand.checked_sub(1) {
            Some(age) if wanted == 0 => Some(Order {
                idle_s: age as u32,
                before: shared.write_back_before.load(Ordering::Relaxed),
                by_pressure: false,
                ..BY_PRESSURE
            }),
            _ => (wanted > 0).then_some(BY_PRESSURE),
        };
        if order.is_some_and(|order| lower.free() > 0 && self.move_some(&shared, lower, order)) {
            return true;
        }
        if by_hand != 0 {
            // Nothing of that age is left, or it cannot go. Unless the order is a newer one.
            let _ = shared.write_back.compare_exchange(by_hand, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
        let sank = self.relieve_others(&shared, lower);
        is_first && self.move_wanted(&shared, lower) || sank || compacted || lower.discard_some(&shared.arena)
    }

    /// What a volume wants to have below, a part at a time.
    fn move_wanted(&mut self, s: &Shared, lower: &Lower) -> bool {
        if !s.some_below.load(Ordering::Relaxed) || Instant::now() < self.look_after {
            return false;
        }
        let order = Order { by_pressure: false, wanted_below: true, ..BY_PRESSURE };
        let moved = lower.free() > 0 && self.move_some(s, lower, order);
        if !moved {
            self.look_after = Instant::now() + WANTED_EVERY;
        }
        moved
    }

    /// As a test wants it.
    #[cfg(feature = "crash-points")]
    pub fn move_now(&mut self) -> bool {
        let s = self.shared.clone();
        let (order, lower) = (Order { most: WRITES, by_pressure: false, ..BY_PRESSURE }, &s.lower[self.at]);
        lower.claim() && self.move_some(&s, lower, order)
    }

    /// The same.
    #[cfg(feature = "crash-points")]
    pub fn compact_now(&mut self) -> bool {
        let s = self.shared.clone();
        let lower = &s.lower[self.at];
        lower.claim() && self.bring_up(&s, lower, mostly_dead)
    }

    /// The same.
    #[cfg(feature = "crash-points")]
    pub fn drain_now(&mut self) -> bool {
        let s = self.shared.clone();
        let lower = &s.lower[self.at];
        lower.claim() && self.bring_up(&s, lower, |_| true)
    }

    /// False: nothing could be moved. While segments are written, the next ones are sealed.
    fn move_some(&mut self, s: &Shared, lower: &Lower, order: Order) -> bool {
        self.likely.clear();
        self.write_some(s, lower, order.most, |mover| mover.is_wanted(s, order) && mover.begin(s, lower, order))
    }

    /// Writes what `begin` begins to write, until that says that there is no more, and so many at most. False: nothing
    /// was.
    fn write_some(&mut self, s: &Shared, lower: &Lower, most: usize, begin: impl Fn(&mut Mover) -> bool) -> bool {
        if !self.is_ours(lower) {
            return false;
        }
        let (mut begun, mut moved, mut failed) = (0, 0, None);
        loop {
            while failed.is_none() && begun < most && begin(self) {
                begun += 1;
            }
            let Some(ended) = lower.wait_for(|| self.tools.writes.wait(&lower.medium)) else { break };
            lower.took(ended.took);
            match self.end(s, lower, ended) {
                Ok(()) => moved += 1,
                Err(e) => {
                    failed.get_or_insert_with(|| e.to_string());
                }
            }
        }
        if begun > 0 {
            self.judge(lower, failed);
        }
        moved > 0
    }

    fn is_wanted(&self, s: &Shared, order: Order) -> bool {
        // What is on its way leaves memory when it is there.
        let on_the_way = self.on_the_way.iter().flatten().count();
        !order.by_pressure || demotion(&pressure(s, true)) as usize > on_the_way
    }

    /// Claims the likeliest segment, takes an extent, and begins to write. False: there is none, or no buffer.
    fn begin(&mut self, s: &Shared, lower: &Lower, order: Order) -> bool {
        let Some((buffer, blocks)) = self.tools.writes.free() else { return false };
        if self.likely.is_empty() {
            choose(&mut self.likely, s, order);
        }
        while let Some((_, _, segment)) = self.likely.pop() {
            let Some(open) = s.segments.begin_cleaning(&s.arena, segment) else { continue };
            let sequence = s.segments.sealed_as(&s.arena, segment).expect("what is claimed was sealed");
            let Some(extent) = take_noted(s, lower) else {
                s.segments.end_cleaning(&s.arena, segment);
                return false;
            };
            let plain = s.arena.record_bytes(open.frame, 0, open.used);
            let bytes = lower.seal.close(plain, sequence, blocks);
            self.on_the_way[buffer] = Some(OnTheWay { segment, from: Place::Memory(open.frame), extent });
            self.tools.writes.start(&lower.medium, buffer, bytes, lower.at(extent));
            return true;
        }
        false
    }

    /// What was written lives there from here on; what was not stays where it is.
    fn end(&mut self, s: &Shared, lower: &Lower, ended: EndedWrite) -> std::io::Result<()> {
        let way = self.on_the_way[ended.buffer].take().expect("a segment is written from each buffer");
        if ended.result.is_ok() {
            let to = Spot { tier: lower.no, extent: way.extent };
            match way.from {
                Place::Memory(_) => s.segments.move_below(&s.arena, way.segment, to),
                Place::Below(_) => s.segments.move_on(&s.arena, way.segment, to),
            }
            lower.counts.bytes_written.fetch_add(ended.bytes as u64, Ordering::Relaxed);
            lower.counts.segments_written.fetch_add(1, Ordering::Relaxed);
        }
        lower.settle(&s.arena, way.extent, ended.late);
        if ended.result.is_err() {
            lower.give(way.extent);
            lower.counts.write_errors.fetch_add(1, Ordering::Relaxed);
        }
        s.segments.end_cleaning(&s.arena, way.segment);
        if ended.result.is_ok() {
            s.epochs.wait(nap);
            match way.from {
                Place::Memory(frame) => s.arena.put_frame(frame),
                Place::Below(from) => sink::left(s, from),
            }
        }
        ended.result
    }

    /// Reads the emptiest extent back if free ones are short, and copies what is live of it.
    fn compact(&mut self, s: &Shared, lower: &Lower) -> bool {
        lower.free() < lower.extents() / 8 && self.may_compact() && self.bring_up(s, lower, mostly_dead)
    }

    /// Brings up what is asked for again and again. False: there is nothing, or memory is not to be filled.
    fn promote(&mut self, s: &Shared, lower: &Lower) -> bool {
        if demotion(&pressure(s, true)) > 0 || !self.may_compact() {
            return false;
        }
        let Some(id) = lower.asked.take() else { return false };
        if s.segments.placement(&s.arena, id) == Placement::Below {
            return false;
        }
        // Its pages are in use: they are as good as written now.
        let up = self.bring_up_one(s, lower, id, Some(s.clock_s.load(Ordering::Relaxed)));
        lower.counts.promoted.fetch_add(up.into(), Ordering::Relaxed);
        up
    }

    fn may_compact(&self) -> bool {
        self.compact_after.is_none_or(|after| Instant::now() >= after)
    }

    /// Copies what is live of the emptiest extent that is `wanted`, by its live and used bytes, to memory.
    fn bring_up(&mut self, s: &Shared, lower: &Lower, wanted: impl Fn((u32, u32)) -> bool) -> bool {
        let emptiest = (0..grow::known_segments(s)).map(SegmentId).filter_map(|id| {
            let (live, used, _) = s.segments.sealed_below(&s.arena, id, lower.no)?;
            let passed_over =
                self.unreadable.iter().any(|(bad, as_)| *bad == id && s.segments.sealed_as(&s.arena, id) == Some(*as_));
            (live > 0 && wanted((live, used)) && !passed_over).then_some((live, id))
        });
        let Some((_, id)) = emptiest.min_by_key(|(live, _)| *live) else { return false };
        let up = self.bring_up_one(s, lower, id, None);
        lower.counts.compacted.fetch_add(up.into(), Ordering::Relaxed);
        up
    }

    /// Copies what is live of an extent to memory, as old as it was unless told.
    fn bring_up_one(&mut self, s: &Shared, lower: &Lower, id: SegmentId, age_s: Option<u32>) -> bool {
        let Some(below) = s.segments.begin_cleaning_below(&s.arena, id) else { return false };
        if below.at.tier != lower.no {
            // It went on to another tier since it was chosen.
            s.segments.end_cleaning(&s.arena, id);
            return false;
        }
        let blocks = &mut self.tools.block()[..below.used.div_ceil(PAYLOAD) * BLOCK_BYTES];
        let read = lower.wait_for(|| lower.medium.read(blocks, lower.at(below.at.extent)));
        let plain = read.is_ok().then(|| lower.seal.open(blocks, 0, below.sequence)).flatten();
        let copied = plain.map(|plain| {
            let age_s = age_s.unwrap_or_else(|| s.segments.past(&s.arena, id).0);
            let record = |at: usize| plain.get(at..below.used).and_then(|rest| record_of(|n| rest.get(..n)));
            self.copier.copy(s, id, below.used, age_s, record)
        });
        s.segments.end_cleaning(&s.arena, id);
        match copied {
            Some(true) => {
                s.wake_cleaner();
                return true;
            }
            // No room in memory at this moment.
            Some(false) => self.compact_after = Some(Instant::now() + NAP),
            // It cannot be read, or is damaged: its pages are found so when they are asked for. The others' turn.
            None => self.unreadable.push((id, below.sequence)),
        }
        lower.counts.unreadable.store(self.unreadable.len() as u64, Ordering::Relaxed);
        if self.unreadable.len() == MOST_UNREADABLE {
            self.unreadable.clear();
            self.compact_after = Some(Instant::now() + LONGEST_REST);
        }
        false
    }
}

/// An extent to write to; that it is written to, the next store would know.
fn take_noted(s: &Shared, lower: &Lower) -> Option<ExtentNo> {
    let extent = lower.take()?;
    let noted = lower.note(&s.arena, extent);
    if !noted {
        lower.give(extent);
    }
    noted.then_some(extent)
}

/// What lies on each disk tier, and what became of reading and writing it.
pub(super) fn stats(s: &Shared) -> Vec<DiskStats> {
    let mut live = [0; MAX_TIERS_BELOW];
    for id in (0..grow::known_segments(s)).map(SegmentId) {
        if let Place::Below(at) = s.segments.place(&s.arena, id) {
            live[at.tier.index()] += s.segments.sealed_below(&s.arena, id, at.tier).map_or(0, |one| u64::from(one.0));
        }
    }
    let named = s.lower.iter().zip(&s.config.names);
    named.map(|(lower, name)| stats_of(s, lower, name, live[lower.no.index()])).collect()
}

fn stats_of(s: &Shared, lower: &Lower, name: &str, live_bytes: u64) -> DiskStats {
    let count = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
    let c = &lower.counts;
    DiskStats {
        name: name.into(),
        path: lower.to_string(),
        capacity_bytes: u64::from(lower.extents()) * lower.extent_bytes(),
        used_bytes: u64::from(lower.taken()) * lower.extent_bytes(),
        live_bytes,
        written_bytes: count(&c.bytes_written),
        written_segments: count(&c.segments_written),
        fetches: count(&c.fetches),
        fetched_bytes: count(&c.bytes_fetched),
        beside_pages: count(&c.beside),
        compacted_segments: count(&c.compacted),
        promoted_segments: count(&c.promoted),
        passed_on_segments: count(&c.passed_on),
        write_errors: count(&c.write_errors),
        read_errors: count(&c.read_errors),
        // Some may be dead by now.
        unreadable_bytes: count(&c.unreadable).max(count(&c.not_passed_on)).min(lower.taken().into())
            * lower.extent_bytes(),
        corrupt: count(&c.corrupt),
        last_corrupt: (count(&c.corrupt) > 0).then(|| {
            let page = count(&c.last_corrupt);
            (page >> 32, page & 0xffff_ffff)
        }),
        late_bytes: u64::from(lower.late()) * lower.extent_bytes(),
        failing: c.failing.load(Ordering::Relaxed),
        draining: s.draining(lower),
        writing_back: s.write_back.load(Ordering::Relaxed) != 0,
    }
}
