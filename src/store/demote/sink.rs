//! From one disk tier to another: what a tier has no room for goes on to the next one down that takes it, and what lies on
//! one that is being drained to any that does, where memory does not.
//!
//! It is the mover of the tier that takes it that moves it: so each tier is written to by one thread, which knows how it
//! stands, and one that hangs keeps nobody from going on but that thread. The read from the other tier is waited for no
//! longer than [`PATIENCE`]; one that takes longer stays under way, its segment claimed, while this mover does what else
//! there is to do.
//!
//! Story of one segment: chosen (the oldest; what was read since it was last looked at is passed over once); claimed, so
//! that nobody else touches it; read as a whole and opened, where what is damaged is left as it is, to be found so by who
//! asks for it; sealed for this tier and written to a free extent; one store of its table entry says that it lives there
//! now; the extent that it left is free after a grace period. It keeps the number of its sealing, and so the bytes
//! that are sealed are the same: no nonce stands for two contents. Killed before that store it is where it was, and the
//! new extent free, after it the reverse. Who fetched from where it was finds its own page or, if something else is
//! there by then, nothing that opens, and looks it up anew.

use super::victims::{insert, mostly_dead, prefer_unread, pressure};
use super::{take_noted, Mover, OnTheWay, MOST_A_STEP, MOST_UNREADABLE};
use crate::io::BLOCK_BYTES;
use crate::log::policy::{demotion, overflow};
use crate::log::segment::{Below, Place};
use crate::page::{SegmentId, Spot, MAX_TIERS_BELOW};
use crate::store::{grow, Shared};
use crate::tier::{Lower, PAYLOAD};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long to wait at a time for another tier to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long one that could not be read is left alone.
const REST: Duration = Duration::from_secs(1);

/// How it stands with what comes from other tiers.
pub(super) struct Sinking {
    /// Claimed, and being read.
    reading: Option<(SegmentId, Below)>,
    /// By the order of the tiers: some of it was taken the last time that this was asked.
    moving: [bool; MAX_TIERS_BELOW],
    /// Likewise: when to ask again.
    after: [Option<Instant>; MAX_TIERS_BELOW],
    /// Segments that could not be opened, each by where it is and the number of its sealing.
    damaged: Vec<(SegmentId, Spot, u64)>,
}

impl Sinking {
    pub fn new() -> Sinking {
        Sinking {
            reading: None,
            moving: [false; MAX_TIERS_BELOW],
            after: [None; MAX_TIERS_BELOW],
            damaged: Vec::with_capacity(MOST_UNREADABLE),
        }
    }

    fn rests(&self, from: usize) -> bool {
        self.after[from].is_some_and(|after| Instant::now() < after)
    }
}

impl Mover {
    /// Takes over from others what they are to be rid of. False: there was nothing to do.
    pub(super) fn relieve_others(&mut self, s: &Shared, lower: &Lower) -> bool {
        if s.lower.len() < 2 {
            return false;
        }
        let (mut moved, at) = (false, self.at);
        for from in (0..s.lower.len()).filter(|from| *from != at) {
            let most = self.surplus(s, from) as usize;
            self.sinking.moving[from] = most > 0;
            let can = lower.free() > 0 && s.lower[from].answers() && !self.sinking.rests(from);
            moved |= most > 0 && can && self.pull_some(s, lower, from, most.min(MOST_A_STEP));
        }
        // Whose turn it was no more.
        moved || self.sinking.reading.is_some() && self.pull_some(s, lower, self.at, 0)
    }

    /// How many segments are to come from there to here.
    fn surplus(&self, s: &Shared, from: usize) -> u32 {
        let other = &s.lower[from];
        if s.next_below(from) != Some(self.at) {
            return 0;
        }
        match s.draining(other) {
            // Memory comes first.
            true if demotion(&pressure(s, true)) == 0 => 0,
            true => other.taken(),
            false => overflow(other.extents(), other.free(), self.sinking.moving[from]),
        }
    }

    /// As a test wants it.
    #[cfg(feature = "crash-points")]
    pub fn pull_now(&mut self, from: usize) -> bool {
        let s = self.shared.clone();
        let lower = &s.lower[self.at];
        self.yields = false;
        lower.claim() && from != self.at && from < s.lower.len() && self.pull_some(&s, lower, from, super::WRITES)
    }

    fn pull_some(&mut self, s: &Shared, lower: &Lower, from: usize, most: usize) -> bool {
        self.likely.clear();
        // One that is being read already comes first.
        let most = most.max(self.sinking.reading.is_some().into());
        self.write_some(s, lower, most, |mover| !mover.is_called(s) && mover.pull(s, lower, from))
    }

    /// Memory is short, and what it has no room for is to come here: others can wait.
    fn is_called(&self, s: &Shared) -> bool {
        self.yields && s.first_below().is_none_or(|first| first == self.at) && demotion(&pressure(s, false)) > 0
    }

    /// Reads a segment in, and begins to write it. False: there is none, or no buffer, or the other tier takes long.
    fn pull(&mut self, s: &Shared, lower: &Lower, from: usize) -> bool {
        // One that took long is only looked at.
        let patience = if self.sinking.reading.is_some() { Duration::ZERO } else { PATIENCE };
        if self.tools.writes.free().is_none() || self.sinking.reading.is_none() && !self.begin_pull(s, from) {
            return false;
        }
        let (segment, below) = self.sinking.reading.expect("it was begun");
        let other = s.lower_at(below.at.tier).expect("what is below lies on a tier of the store");
        let pull = self.tools.pull.as_mut().expect("there are several tiers");
        let Some(read) = pull.wait(patience) else { return false };
        self.sinking.reading = None;
        let plain = read.ok().map(|blocks| other.seal.open(blocks, 0, below.sequence));
        let extent = match plain {
            Some(Some(_)) => take_noted(s, lower),
            _ => None,
        };
        let (Some(Some(plain)), Some(extent)) = (plain, extent) else {
            s.segments.end_cleaning(&s.arena, segment);
            match plain {
                None => self.unanswered(s, other),
                Some(None) => self.note_damaged(s, segment, &below),
                // There is no room here by now.
                Some(Some(_)) => {}
            }
            return false;
        };
        let (buffer, blocks) = self.tools.writes.free().expect("there was one");
        let bytes = lower.seal.close(&plain[..below.used], below.sequence, blocks);
        self.on_the_way[buffer] = Some(OnTheWay { segment, from: Place::Below(below.at), extent });
        self.tools.writes.start(&lower.medium, buffer, bytes, lower.at(extent));
        true
    }

    /// What is being read is to stay where it is: nothing can be written here at this moment.
    pub(super) fn let_go(&mut self, s: &Shared) {
        let Some((segment, _)) = self.sinking.reading else { return };
        if self.tools.pull.as_mut().is_some_and(|pull| pull.wait(Duration::ZERO).is_some()) {
            s.segments.end_cleaning(&s.arena, segment);
            self.sinking.reading = None;
        }
    }

    /// Claims the likeliest segment there and begins to read it. False: there is none.
    fn begin_pull(&mut self, s: &Shared, from: usize) -> bool {
        let other = &s.lower[from];
        if from == self.at {
            return false;
        }
        if self.likely.is_empty() {
            self.choose_from(s, other);
        }
        while let Some((_, _, segment)) = self.likely.pop() {
            let Some(below) = s.segments.begin_cleaning_below(&s.arena, segment) else { continue };
            let bytes = below.used.div_ceil(PAYLOAD) * BLOCK_BYTES;
            let pull = self.tools.pull.as_mut().expect("there are several tiers");
            if below.at.tier == other.no && pull.start(&other.medium, bytes, other.at(below.at.extent)) {
                self.sinking.reading = Some((segment, below));
                return true;
            }
            s.segments.end_cleaning(&s.arena, segment);
        }
        false
    }

    /// Lists the likeliest, the best last: the oldest, those that are mostly dead after all others, as there compaction
    /// makes more room for less.
    fn choose_from(&mut self, s: &Shared, other: &Lower) {
        for id in (0..grow::known_segments(s)).map(SegmentId) {
            let Some((live, used, age)) = s.segments.sealed_below(&s.arena, id, other.no) else { continue };
            let is_damaged = |(bad, spot, as_): &(SegmentId, Spot, u64)| {
                *bad == id && spot.tier == other.no && s.segments.sealed_as(&s.arena, id) == Some(*as_)
            };
            if live > 0 && !self.sinking.damaged.iter().any(is_damaged) {
                insert(&mut self.likely, (u8::from(!mostly_dead((live, used))), age, id));
            }
        }
        prefer_unread(&mut self.likely, s);
    }

    fn unanswered(&mut self, s: &Shared, other: &Lower) {
        other.counts.read_errors.fetch_add(1, Ordering::Relaxed);
        if let Some(from) = s.lower.iter().position(|lower| lower.no == other.no) {
            self.sinking.after[from] = Some(Instant::now() + REST);
        }
    }

    /// Its pages are found damaged when they are asked for. The others' turn.
    fn note_damaged(&mut self, s: &Shared, segment: SegmentId, below: &Below) {
        let damaged = &mut self.sinking.damaged;
        damaged.retain(|(id, _, as_)| s.segments.sealed_as(&s.arena, *id) == Some(*as_));
        if damaged.len() == MOST_UNREADABLE {
            damaged.clear();
        }
        damaged.push((segment, below.at, below.sequence));
        for other in &s.lower {
            let count = damaged.iter().filter(|(_, spot, _)| spot.tier == other.no).count();
            other.counts.not_passed_on.store(count as u64, Ordering::Relaxed);
        }
    }
}

/// A segment has left that extent for another tier.
pub(super) fn left(s: &Shared, from: Spot) {
    let other = s.lower_at(from.tier).expect("it lay on a tier of the store");
    other.counts.passed_on.fetch_add(1, Ordering::Relaxed);
    other.give(from.extent);
    // Its mover may tell the medium that nothing lies there.
    s.wake_movers();
}
