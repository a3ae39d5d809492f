//! The segment table when an arena is opened again: live bytes are counted anew from the slots, and
//! every segment ends up sealed or free.
//!
//! Three steps, each of which may be cut short and done again from the first: `begin_recount` sets
//! live bytes to zero, `recount` hears of every slot, `end_recount` gives each segment its state.
//! The old states and the used bytes of sealed segments stay as they are until the last step
//! replaces them one word at a time, so a second try starts from an equally good table.
//!
//! A segment found open has no used bytes on record: they end after the last record that a slot
//! names. What an owner appended later, no slot names. Records stand one after another from the
//! segment's first byte on and each was complete before the next began, so the sealed segment is
//! records from end to end, as the cleaner needs it. Until `end_recount` the word that will say
//! how many bytes are used holds the greatest offset that a slot named.

use super::segment::{
    dictionary_of, word_below, Place, Segments, CLEANING, FREE, OPEN, RETIRED, SEALED, STATE, USED_SHIFT,
};
use crate::arena::{Arena, Resident};
use crate::error::{Error, Result};
use crate::page::{SegmentId, MAX_TIERS_BELOW};
use std::sync::atomic::Ordering;

/// The bit of a segment that has none.
const NO_DICTIONARY: u8 = 1;
const LIVE: u64 = (1 << USED_SHIFT) - 1;

/// What `end_recount` leaves.
pub(crate) struct Table {
    /// Ids of segments that hold anything, and their frames.
    pub ids: Resident,
    pub frames: Resident,
    /// One more than the highest id in use.
    pub end: u32,
    /// How many of them are on which tier below.
    pub below: [u32; MAX_TIERS_BELOW],
}

impl Segments {
    /// Checks the first `entries` of the table and sets all live bytes to zero.
    pub fn begin_recount(&self, arena: &Arena, entries: u32) -> Result<()> {
        let mut frames = Resident::new(arena.max_frames());
        let mut last = arena.sequence();
        for id in 0..entries {
            let e = arena.segment_entry(SegmentId(id));
            // Those of free ones too: no number is given twice, what is on disk rests on that.
            last = last.max(e[2].load(Ordering::Relaxed));
            let word = e[0].load(Ordering::Acquire);
            let state = word & STATE;
            let cannot_be = |what: String| {
                Err(Error::BadArena(format!("segment {id} has state {state} and {what}, which cannot be")))
            };
            match Place::of(word) {
                _ if state == FREE => {}
                Place::Memory(f) if state > RETIRED || f.0 >= arena.max_frames() || frames.has(f.0) => {
                    return cannot_be(format!("frame {}", f.0));
                }
                Place::Memory(f) => frames.set(f.0),
                Place::Below(at) if !matches!(state, SEALED | CLEANING | RETIRED) => {
                    return cannot_be(format!("extent {}", at.extent.0));
                }
                // What is dead there is free from here on; whether the extents can be is asked for what is live.
                Place::Below(_) => {}
            }
        }
        // Only now that all of it was found sound is anything changed.
        for id in 0..entries {
            crash_point!("recovery: live bytes partly cleared");
            let e = arena.segment_entry(SegmentId(id));
            let keep = if e[0].load(Ordering::Relaxed) & STATE == OPEN { 0 } else { !LIVE };
            e[1].store(e[1].load(Ordering::Relaxed) & keep, Ordering::Relaxed);
        }
        self.sequence.store(last + 1, Ordering::Relaxed);
        Ok(())
    }

    /// Counts a page's share of a record. False: there cannot be such a record, or the dictionary that it may have been
    /// made with is none of the `known`, a bit for each number.
    pub fn recount(&self, arena: &Arena, entries: u32, s: SegmentId, (offset, share): (u32, u32), known: u8) -> bool {
        if s.0 >= entries || (offset + share) as usize > arena.segment_bytes() {
            return false;
        }
        let e = arena.segment_entry(s);
        if (known | NO_DICTIONARY) >> dictionary_of(e[3].load(Ordering::Relaxed)) & 1 == 0 {
            return false;
        }
        let word = e[1].load(Ordering::Relaxed);
        let (used, live) = (word >> USED_SHIFT, (word & LIVE) + u64::from(share));
        // Nobody else is at the table yet: plain loads and stores do.
        let used = match e[0].load(Ordering::Relaxed) & STATE {
            _ if live > arena.segment_bytes() as u64 => return false,
            OPEN => used.max(u64::from(offset)),
            SEALED | CLEANING if u64::from(offset) < used => used,
            _ => return false,
        };
        e[1].store(used << USED_SHIFT | live, Ordering::Relaxed);
        true
    }

    /// Seals what holds live bytes and sets the rest free.
    pub fn end_recount(&self, arena: &Arena, entries: u32) -> Result<Table> {
        let (ids, frames) = (Resident::new(entries), Resident::new(arena.max_frames()));
        let mut table = Table { ids, frames, end: 0, below: [0; MAX_TIERS_BELOW] };
        for id in 0..entries {
            let s = SegmentId(id);
            let e = arena.segment_entry(s);
            let (state, place) = parts(e[0].load(Ordering::Relaxed));
            let word = e[1].load(Ordering::Relaxed);
            crash_point!("recovery: table partly rebuilt");
            if word & LIVE == 0 {
                e[0].store(FREE, Ordering::Release);
                continue;
            }
            table.ids.set(id);
            table.end = id + 1;
            let frame = match place {
                Place::Memory(frame) => frame,
                Place::Below(at) => {
                    table.below[at.tier.index()] += 1;
                    e[0].store(SEALED | word_below(at), Ordering::Release);
                    continue;
                }
            };
            if state == OPEN {
                let last = (word >> USED_SHIFT) as usize;
                let Some((header, _)) = self.record(arena, frame, last) else {
                    return Err(Error::BadArena(format!("segment {id} has no record at its last offset, {last}")));
                };
                e[2].store(self.sequence.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
                e[1].store(((last + header.total()) as u64) << USED_SHIFT | word & LIVE, Ordering::Relaxed);
                crash_point!("recovery: used stored, state still open");
            }
            e[0].store(SEALED | u64::from(frame.0) << 32, Ordering::Release);
            table.frames.set(frame.0);
        }
        Ok(table)
    }

    /// Where a segment is that is not free.
    pub fn in_use(&self, arena: &Arena, s: SegmentId) -> Option<Place> {
        let (state, place) = parts(arena.segment_entry(s)[0].load(Ordering::Acquire));
        (state != FREE).then_some(place)
    }
}

fn parts(word: u64) -> (u64, Place) {
    (word & STATE, Place::of(word))
}
