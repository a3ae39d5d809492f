//! The mover: writes the oldest segments down to the disk tier when memory runs short, as they are:
//! compressed and packed, several large writes at once.
//!
//! Story of one segment: chosen (what does not compress first, then the oldest; one that was read since
//! it was last chosen is passed over once); claimed as for cleaning, so that nobody else touches it; sealed
//! into a buffer (`tier/seal.rs`) and written to a free extent; one store of its table entry says that it
//! lives there now; its frame is free after a grace period. No slot changes: slots name segments, not
//! places. Killed before that store the segment is in memory and the extent free, after it the reverse.
//!
//! A write that fails leaves the segment where it is. The tier then rests, longer each time, and is tried
//! again, with a block of a free extent if nothing is to go down; meanwhile the cleaner makes room as if there were
//! no tier. A server that is away is written to when it is back; after the tier's time-out it counts as failing.
//!
//! A write to a server may be done later than it seems to have ended, and even after this process has. So it is noted
//! in the arena before it is sent, and its extent kept free while it may come late (`tier/late.rs`).
//!
//! What is asked for again and again is brought up as a whole, in one large read, while memory has more room than
//! would have others go down: so pages that come back one by one, when an area is swapped off or a machine
//! comes to rest, cost few reads. On a machine short of memory nothing comes up that way.
//!
//! By hand all that is older than some age goes down, memory short or not; or the tier is drained: extents are
//! brought up again, while memory has more room than would have others go down.
//!
//! Extents that are mostly dead are read back when free ones run short, and what is live of them written
//! anew, to memory first. The thread may wait for the disk as long as it likes: nothing waits for it but
//! writes that find no room. It asks for no memory: the table is there from the start.

use super::append::{Appender, KEEP_FOR_CLEANER};
use super::survivors::Copier;
use super::{grow, Shared};
use crate::error::Result;
use crate::io::{Buffer, Ring, Transfer, BLOCK_BYTES};
use crate::log::policy::{demotion, Pressure};
use crate::log::segment::record_of;
use crate::page::{ExtentNo, FrameNo, SegmentId};
use crate::stats::DiskStats;
use crate::sync::nap;
use crate::tier::{Lower, PAYLOAD};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Segments written at once.
const WRITES: usize = 4;
const NAP: Duration = Duration::from_millis(50);
/// Segments that cannot be read and are passed over before all are tried again.
const MOST_UNREADABLE: usize = 64;
/// How long a tier that failed rests at first, and at most.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// How long a server has to be away to be told of.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// How often to look whether a server's export is still ours, while it is written to.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What the mover needs that takes memory, made before it is needed.
pub(super) struct Tools {
    ring: Ring,
    buffers: Vec<Buffer>,
}

impl Tools {
    pub fn new(segment_bytes: usize) -> Result<Tools> {
        let bytes = segment_bytes.div_ceil(PAYLOAD) * BLOCK_BYTES;
        let buffers = (0..WRITES).map(|_| Buffer::new(bytes)).collect();
        Ok(Tools { ring: Ring::new(WRITES as u32)?, buffers })
    }
}

pub(super) struct Mover {
    shared: Arc<Shared>,
    tools: Tools,
    copier: Copier,
    /// The likeliest victims: raw, age, segment.
    likely: Vec<(bool, u64, SegmentId)>,
    on_the_way: Vec<OnTheWay>,
    transfers: Vec<Transfer>,
    moving: bool,
    rest: Duration,
    resting_until: Option<Instant>,
    looked: Option<Instant>,
    told_away: bool,
    /// When to look for extents to bring up again, after one for which there was no room, or when too many could not
    /// be read.
    compact_after: Option<Instant>,
    /// Segments that could not be brought up, each by the number of its sealing.
    unreadable: Vec<(SegmentId, u64)>,
}

/// Whatever its age.
#[cfg(feature = "crash-points")]
const ANY: (u32, u64) = (0, u64::MAX);

/// A claimed segment and where it goes.
#[derive(Clone, Copy)]
struct OnTheWay {
    segment: SegmentId,
    frame: FrameNo,
    extent: ExtentNo,
}

impl Mover {
    pub fn new(shared: Arc<Shared>, tools: Tools) -> Mover {
        let appender = Appender::new(&shared, KEEP_FOR_CLEANER);
        let copier = Copier::new(&shared, appender, shared.mover_epoch());
        Mover {
            tools,
            copier,
            likely: Vec::with_capacity(WRITES * 4 + 1),
            on_the_way: Vec::with_capacity(WRITES),
            transfers: Vec::with_capacity(WRITES),
            moving: false,
            rest: REST,
            resting_until: None,
            looked: None,
            told_away: false,
            compact_after: None,
            unreadable: Vec::with_capacity(MOST_UNREADABLE),
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
        let _busy = shared.quiet[2].lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lower) = &shared.lower else { return false };
        if self.is_away(lower) || !lower.claim() || self.resting_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        lower.tick(&shared.arena, &mut self.tools.buffers[0]);
        let mut wanted = demotion(&pressure(&shared, self.moving));
        let failing = lower.counts.failing.load(Ordering::Relaxed);
        if failing && (wanted == 0 || shared.draining()) && !self.probe(&shared, lower) {
            return false;
        }
        if shared.draining() {
            shared.write_back.store(0, Ordering::Relaxed);
            // As much room as moving down would leave: draining is not to make others wait.
            self.moving = true;
            let drained = wanted == 0 && self.may_compact() && self.bring_up(&shared, lower, |_| true);
            return drained || lower.discard_one(&shared.arena);
        }
        self.moving = wanted > 0;
        if self.promote(&shared, lower) {
            return true;
        }
        let compacted = self.compact(&shared, lower);
        let by_hand = shared.write_back.load(Ordering::Acquire);
        let mut idle_s = 0;
        let mut before = u64::MAX;
        if let (0, Some(age)) = (wanted, by_hand.checked_sub(1)) {
            (wanted, idle_s) = (WRITES as u32, age as u32);
            before = shared.write_back_before.load(Ordering::Relaxed);
        }
        if wanted > 0 && lower.free() > 0 && self.move_some(&shared, lower, wanted as usize, (idle_s, before)) {
            return true;
        }
        if by_hand != 0 {
            // Nothing of that age is left, or it cannot go. Unless the order is a newer one.
            let _ = shared.write_back.compare_exchange(by_hand, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
        compacted || lower.discard_one(&shared.arena)
    }

    /// As a test wants it.
    #[cfg(feature = "crash-points")]
    pub fn move_now(&mut self) -> bool {
        let s = self.shared.clone();
        s.lower.as_ref().is_some_and(|lower| lower.claim() && self.move_some(&s, lower, WRITES, ANY))
    }

    /// The same.
    #[cfg(feature = "crash-points")]
    pub fn compact_now(&mut self) -> bool {
        let s = self.shared.clone();
        s.lower.as_ref().is_some_and(|lower| lower.claim() && self.bring_up(&s, lower, mostly_dead))
    }

    /// Of what was written so many seconds ago, and sealed with a lower number than that. False: nothing could be
    /// moved.
    fn move_some(&mut self, s: &Shared, lower: &Lower, wanted: usize, old: (u32, u64)) -> bool {
        if !self.is_ours(lower) {
            return false;
        }
        self.choose(s, wanted.min(WRITES), old);
        self.claim(s, lower);
        if self.on_the_way.is_empty() {
            return false;
        }
        lower.wait_for(|| self.tools.ring.write(&lower.medium, &self.tools.buffers, &mut self.transfers));
        let (mut failed, mut moved) = (None, 0);
        for i in 0..self.on_the_way.len() {
            let way = self.on_the_way[i];
            match &self.transfers[i].result {
                Ok(()) => {
                    s.segments.move_below(&s.arena, way.segment, way.extent);
                    lower.settle(&s.arena, way.extent, self.transfers[i].late);
                    lower.counts.bytes_written.fetch_add(self.transfers[i].bytes as u64, Ordering::Relaxed);
                    moved += 1;
                }
                Err(e) => {
                    failed.get_or_insert_with(|| e.to_string());
                    lower.settle(&s.arena, way.extent, self.transfers[i].late);
                    lower.give(way.extent);
                    lower.counts.write_errors.fetch_add(1, Ordering::Relaxed);
                }
            }
            s.segments.end_cleaning(&s.arena, way.segment);
        }
        lower.counts.segments_written.fetch_add(moved, Ordering::Relaxed);
        s.epochs.wait(nap);
        for (way, transfer) in self.on_the_way.drain(..).zip(self.transfers.drain(..)) {
            if transfer.result.is_ok() {
                s.arena.put_frame(way.frame);
            }
        }
        self.judge(lower, failed);
        moved > 0
    }

    /// A server that is not there. Nobody waits for it here; after a while it counts as failing.
    fn is_away(&mut self, lower: &Lower) -> bool {
        let Some(remote) = lower.medium.remote() else { return false };
        let for_long = remote.away();
        let away = for_long.is_some();
        // A connection that breaks and is there again at once is nothing to tell of.
        let tell = for_long.is_some_and(|for_long| self.told_away || for_long >= TELL_AFTER);
        match (tell, std::mem::replace(&mut self.told_away, tell)) {
            (true, false) => remote.tell_why(|why| tracing::warn!("{lower}: {why}; it is waited for")),
            (false, true) => tracing::warn!("{lower}: there again"),
            _ => {}
        }
        if away && remote.is_lost() && !lower.counts.failing.load(Ordering::Relaxed) {
            self.judge(lower, Some("it is away".into()));
        }
        away
    }

    /// Looks now and then whether a server's export is still ours, before anything is written there.
    fn is_ours(&mut self, lower: &Lower) -> bool {
        let now = Instant::now();
        if self.looked.is_some_and(|at| now - at < LOOK_EVERY) {
            return true;
        }
        let ours = lower.wait_for(|| lower.is_ours(&mut self.tools.buffers[0]));
        self.looked = ours.then_some(now);
        if !ours {
            self.judge(lower, Some("it does not answer as the one that it was".into()));
        }
        ours
    }

    /// Whether a tier that failed takes a block of a free extent.
    fn probe(&mut self, s: &Shared, lower: &Lower) -> bool {
        let Some(extent) = take_noted(s, lower) else { return false };
        self.tools.buffers[0][..BLOCK_BYTES].fill(0);
        let mut probe = [Transfer { buffer: 0, bytes: BLOCK_BYTES, at: lower.at(extent), result: Ok(()), late: false }];
        lower.wait_for(|| self.tools.ring.write(&lower.medium, &self.tools.buffers, &mut probe));
        lower.settle(&s.arena, extent, probe[0].late);
        lower.give(extent);
        // If it takes a block and no segment, the next rest is no shorter.
        let rest = self.rest;
        self.judge(lower, probe[0].result.as_ref().err().map(ToString::to_string));
        self.rest = self.rest.max(rest);
        probe[0].result.is_ok()
    }

    /// Lets a tier that failed rest, and says so when it begins and when it is over.
    fn judge(&mut self, lower: &Lower, failed: Option<String>) {
        let was = lower.counts.failing.swap(failed.is_some(), Ordering::Relaxed);
        match failed {
            Some(why) => {
                if !was {
                    tracing::warn!("{lower}: {why}; what was to go there stays in memory, it is tried again");
                }
                self.resting_until = Some(Instant::now() + self.rest);
                self.rest = (self.rest * 2).min(LONGEST_REST);
            }
            None => {
                if was {
                    tracing::warn!("{lower}: takes pages again");
                }
                (self.rest, self.resting_until) = (REST, None);
            }
        }
    }

    /// Lists the likeliest victims, the best first: those passed over for having been read come last.
    fn choose(&mut self, s: &Shared, wanted: usize, (idle_s, before): (u32, u64)) {
        self.likely.clear();
        let now = s.clock_s.load(Ordering::Relaxed);
        let is_meant = |id, age| {
            (idle_s == 0 || now.saturating_sub(s.segments.past(&s.arena, id).0) >= idle_s)
                && (before == u64::MAX || s.segments.next_sequence().saturating_sub(age) < before)
        };
        for id in (0..grow::known_segments(s)).map(SegmentId) {
            let Some((live, _, age)) = s.segments.sealed(&s.arena, id) else { continue };
            if live == 0 || !is_meant(id, age) {
                continue;
            }
            let one = (s.segments.is_raw(&s.arena, id), age, id);
            let at = self.likely.partition_point(|other| (other.0, other.1) >= (one.0, one.1));
            if at < WRITES * 4 {
                self.likely.insert(at, one);
                self.likely.truncate(WRITES * 4);
            }
        }
        // As many as are wanted of those that were not read; the others have had their chance now.
        let mut unread = 0;
        for i in 0..self.likely.len() {
            if unread == wanted {
                break;
            }
            if !s.segments.was_read(&s.arena, self.likely[i].2) {
                self.likely.swap(unread, i);
                unread += 1;
            }
        }
        self.likely.truncate(wanted);
    }

    /// Claims what was chosen, takes extents and fills buffers.
    fn claim(&mut self, s: &Shared, lower: &Lower) {
        self.on_the_way.clear();
        self.transfers.clear();
        for (_, _, id) in self.likely.drain(..) {
            let Some(open) = s.segments.begin_cleaning(&s.arena, id) else { continue };
            let sequence = s.segments.sealed_as(&s.arena, id).expect("what is claimed was sealed");
            let Some(extent) = take_noted(s, lower) else {
                s.segments.end_cleaning(&s.arena, id);
                return;
            };
            let buffer = self.on_the_way.len();
            let plain = s.arena.record_bytes(open.frame, 0, open.used);
            let bytes = lower.seal.close(plain, sequence, &mut self.tools.buffers[buffer]);
            self.transfers.push(Transfer { buffer, bytes, at: lower.at(extent), result: Ok(()), late: false });
            self.on_the_way.push(OnTheWay { segment: id, frame: open.frame, extent });
        }
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
            let (live, used, _) = s.segments.sealed_below(&s.arena, id)?;
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
        let blocks = &mut self.tools.buffers[0][..below.used.div_ceil(PAYLOAD) * BLOCK_BYTES];
        let read = lower.wait_for(|| lower.medium.read(blocks, lower.at(below.extent)));
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

fn pressure(s: &Shared, moving: bool) -> Pressure {
    Pressure {
        frames_ready: s.arena.frames_ready(),
        frames_growable: grow::growable_frames(s),
        frames_limit: (s.limit_bytes() / s.arena.segment_bytes() as u64) as u32,
        reserve: s.reserve.load(Ordering::Relaxed),
        moving,
    }
}

fn mostly_dead((live, used): (u32, u32)) -> bool {
    live < used - used / 8
}

/// What lies on the disk tier, and what became of reading and writing it.
pub(super) fn stats(s: &Shared, lower: &Lower) -> DiskStats {
    let count = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
    let live = |id| s.segments.sealed_below(&s.arena, id).map_or(0, |(live, _, _)| u64::from(live));
    let c = &lower.counts;
    DiskStats {
        path: lower.to_string(),
        capacity_bytes: u64::from(lower.extents()) * lower.extent_bytes(),
        used_bytes: u64::from(lower.taken()) * lower.extent_bytes(),
        live_bytes: (0..grow::known_segments(s)).map(SegmentId).map(live).sum(),
        written_bytes: count(&c.bytes_written),
        written_segments: count(&c.segments_written),
        fetches: count(&c.fetches),
        fetched_bytes: count(&c.bytes_fetched),
        compacted_segments: count(&c.compacted),
        promoted_segments: count(&c.promoted),
        write_errors: count(&c.write_errors),
        read_errors: count(&c.read_errors),
        unreadable_bytes: count(&c.unreadable) * lower.extent_bytes(),
        corrupt: count(&c.corrupt),
        last_corrupt: (count(&c.corrupt) > 0).then(|| {
            let page = count(&c.last_corrupt);
            (page >> 32, page & 0xffff_ffff)
        }),
        late_bytes: u64::from(lower.late()) * lower.extent_bytes(),
        failing: c.failing.load(Ordering::Relaxed),
        draining: s.draining(),
        writing_back: s.write_back.load(Ordering::Relaxed) != 0,
    }
}
