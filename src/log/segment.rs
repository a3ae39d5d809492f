//! Segments: runs of records. The table in the arena says of each where it lives and how much of
//! it is live; a lane or the cleaner appends to the open ones it owns.
//!
//! ```text
//! entry word 0   7..0 state · 8 below: on a disk tier · 10..9 which one, by its place in the arena · 63..32 frame, or
//!                extent if below; of a free one the next free one and one (`arena/linked.rs`)
//!            1   31..0 live bytes · 63..32 bytes used
//!            2   sequence number at sealing: the age
//!            3   31..0 when it was sealed, in seconds of the host's running · 32 cold: compressed again ·
//!                33 raw: what does not compress · 34 read since the mover last looked ·
//!                36..35 where its pages may lie: 0 anywhere, 1 in memory, 2 below ·
//!                39..37 the dictionary that every zstd record of a single page in it was made with, 0: none
//! ```
//! States: free → open → sealed → retired → free, and sealed ↔ cleaning. Live bytes are added
//! before the slot that names them is committed and taken off after the slot that named them was
//! exchanged, so they never fall short of the truth. Whoever brings a sealed segment to zero
//! retires it; the exchange of the state word makes sure that this happens once. (Lanes do all of
//! this within an epoch: so what was seen sealed and dead is not another segment by the exchange.)
//!
//! Killed between any two of these stores, the table is good enough for `log/rebuild.rs`: a slot
//! names only segments that are open, sealed or being cleaned, and `bytes used` of the latter two
//! was stored before their state.

use crate::arena::Arena;
use crate::log::record::{Header, GROUP_HEADER, SINGLE_HEADER};
use crate::page::{ExtentNo, FrameNo, Placement, SegmentId, Spot, TierNo};
use crate::sync::{fence, AtomicU64, Ordering};

pub(super) const STATE: u64 = 0xff;
pub(super) const FREE: u64 = 0;
pub(super) const OPEN: u64 = 1;
pub(super) const SEALED: u64 = 2;
pub(super) const CLEANING: u64 = 3;
pub(super) const RETIRED: u64 = 4;
pub(super) const USED_SHIFT: u32 = 32;
const COLD: u64 = 1 << 32;
const RAW: u64 = 1 << 33;
const READ: u64 = 1 << 34;
const PLACEMENT_SHIFT: u32 = 35;
const PLACEMENT: u64 = 3 << PLACEMENT_SHIFT;
const DICTIONARY_SHIFT: u32 = 37;
const DICTIONARY: u64 = 7 << DICTIONARY_SHIFT;
/// What of word 3 stays when a segment is sealed.
const KIND: u64 = COLD | RAW | PLACEMENT | DICTIONARY;
/// The number in the state's upper half is an extent.
pub(super) const BELOW: u64 = 1 << 8;
const TIER_SHIFT: u32 = 9;
const TIER: u64 = 3 << TIER_SHIFT;

/// Where a segment lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Memory(FrameNo),
    Below(Spot),
}

impl Place {
    pub(super) fn of(word: u64) -> Place {
        let n = (word >> 32) as u32;
        match word & BELOW {
            0 => Place::Memory(FrameNo(n)),
            _ => Place::Below(Spot { tier: TierNo(((word & TIER) >> TIER_SHIFT) as u8), extent: ExtentNo(n) }),
        }
    }
}

/// What an entry says of where it lies, but for the state.
pub(super) fn word_below(at: Spot) -> u64 {
    u64::from(at.extent.0) << 32 | of_tier(at.tier)
}

fn of_tier(tier: TierNo) -> u64 {
    BELOW | u64::from(tier.0) << TIER_SHIFT & TIER
}

/// A segment on disk, as it was when this was made: its records lie in that extent for as long as the
/// segment has that sequence number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Below {
    pub at: Spot,
    pub sequence: u64,
    pub used: usize,
    pub cold: bool,
    /// Number of its dictionary.
    pub dictionary: u8,
}

/// What a new segment is for.
#[derive(Clone, Copy, Default)]
pub(crate) struct Kind {
    /// Pages that are compressed again, and not to be a third time.
    pub cold: bool,
    /// Pages that do not compress.
    pub raw: bool,
    /// Where its pages may lie.
    pub placement: Placement,
    /// Number of the dictionary that its records of single pages are made with, if zstd makes them.
    pub dictionary: u8,
}

/// The segment table, with what is counted over all of it.
pub(crate) struct Segments {
    pub(super) sequence: AtomicU64,
    /// Retired segments wait here for their grace period: a bit each.
    retired: Box<[AtomicU64]>,
    retired_any: AtomicU64,
}

/// An open segment, owned by one lane or the cleaner.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    pub segment: SegmentId,
    pub frame: FrameNo,
    pub used: usize,
    pub dictionary: u8,
}

impl Segments {
    /// Of a store whose segments' ids are all below `ids`: those of the frames and extents that it has.
    pub fn new(ids: u32) -> Segments {
        let mut segments =
            Segments { sequence: AtomicU64::new(1), retired: Box::new([]), retired_any: AtomicU64::new(0) };
        segments.make_room(ids);
        segments
    }

    /// The same, once it is known. Nothing was retired yet.
    pub fn make_room(&mut self, ids: u32) {
        self.retired = (0..ids.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    }

    pub fn open(&self, arena: &Arena, keep: u32, kind: Kind, age_s: u32) -> Option<Open> {
        let (segment, frame) = arena.take_segment(keep)?;
        let e = arena.segment_entry(segment);
        debug_assert_eq!(e[0].load(Ordering::Relaxed) & STATE, FREE);
        e[1].store(0, Ordering::Relaxed);
        let placement = u64::from(kind.placement.code()) << PLACEMENT_SHIFT;
        let number = u64::from(kind.dictionary) << DICTIONARY_SHIFT;
        let bits = if kind.cold { COLD } else { 0 } | if kind.raw { RAW } else { 0 } | placement | number;
        e[3].store(bits | u64::from(age_s), Ordering::Relaxed);
        crash_point!("open: counts cleared, state still free");
        e[0].store(OPEN | u64::from(frame.0) << 32, Ordering::Release);
        Some(Open { segment, frame, used: 0, dictionary: kind.dictionary })
    }

    /// Where a segment lives. Within an epoch: until it ends, a frame that is found here stays what it is.
    pub fn place(&self, arena: &Arena, s: SegmentId) -> Place {
        Place::of(arena.segment_entry(s)[0].load(Ordering::Acquire))
    }

    /// What is to be known of a segment below to fetch from it. None: it is not there, or not any more.
    /// Within an epoch.
    pub fn below(&self, arena: &Arena, s: SegmentId) -> Option<Below> {
        let e = arena.segment_entry(s);
        let state = e[0].load(Ordering::Acquire);
        let Place::Below(at) = Place::of(state) else { return None };
        if state & STATE == FREE {
            return None;
        }
        let (counts, sequence) = (e[1].load(Ordering::Relaxed), e[2].load(Ordering::Relaxed));
        let kind = e[3].load(Ordering::Relaxed);
        let (cold, dictionary) = (kind & COLD != 0, dictionary_of(kind));
        Some(Below { at, sequence, used: (counts >> USED_SHIFT) as usize, cold, dictionary })
    }

    /// Notes that a page of it was read, for the mover.
    pub fn touch(&self, arena: &Arena, s: SegmentId) {
        let word = &arena.segment_entry(s)[3];
        if word.load(Ordering::Relaxed) & READ == 0 {
            word.fetch_or(READ, Ordering::Relaxed);
        }
    }

    /// Whether a segment was read since this was last asked, and whether it is of what does not compress.
    pub fn was_read(&self, arena: &Arena, s: SegmentId) -> bool {
        let word = &arena.segment_entry(s)[3];
        word.load(Ordering::Relaxed) & READ != 0 && word.fetch_and(!READ, Ordering::Relaxed) & READ != 0
    }

    pub fn is_raw(&self, arena: &Arena, s: SegmentId) -> bool {
        arena.segment_entry(s)[3].load(Ordering::Relaxed) & RAW != 0
    }

    /// Where a segment's pages may lie.
    pub fn placement(&self, arena: &Arena, s: SegmentId) -> Placement {
        let word = arena.segment_entry(s)[3].load(Ordering::Relaxed);
        Placement::of(((word & PLACEMENT) >> PLACEMENT_SHIFT) as u8)
    }

    /// The number of the dictionary that a segment's records of single pages were made with, as far as zstd made them.
    pub fn dictionary(&self, arena: &Arena, s: SegmentId) -> u8 {
        dictionary_of(arena.segment_entry(s)[3].load(Ordering::Relaxed))
    }

    /// Moves a claimed segment, whose records were written there, to an extent. Its frame may be used
    /// again after a grace period.
    pub fn move_below(&self, arena: &Arena, s: SegmentId, to: Spot) {
        crash_point!("demote: written, still in memory");
        arena.segment_entry(s)[0].store(CLEANING | word_below(to), Ordering::Release);
        crash_point!("demote: below, frame not free");
    }

    /// The same of one below, from one tier to another. It has the number of its sealing as before, and so the same
    /// bytes: whoever kept some of them may go on with those.
    pub fn move_on(&self, arena: &Arena, s: SegmentId, to: Spot) {
        crash_point!("sink: written, still where it was");
        arena.segment_entry(s)[0].store(CLEANING | word_below(to), Ordering::Release);
        crash_point!("sink: on the next tier, extent not free");
    }

    /// Counts bytes that a slot is about to name.
    pub fn add_live(&self, arena: &Arena, s: SegmentId, bytes: u32) {
        arena.segment_entry(s)[1].fetch_add(u64::from(bytes), Ordering::Relaxed);
    }

    /// Counts bytes that no slot names any more. True: a segment was retired by it.
    pub fn take_live(&self, arena: &Arena, s: SegmentId, bytes: u32) -> bool {
        let before = arena.segment_entry(s)[1].fetch_sub(u64::from(bytes), Ordering::AcqRel);
        let live = before as u32;
        assert!(live >= bytes, "segment {} has {live} live bytes, {bytes} died", s.0);
        live == bytes && self.retire_if_dead(arena, s)
    }

    /// `age_s`: when its content was written, in seconds of the host's running.
    pub fn seal(&self, arena: &Arena, open: Open, age_s: u32) -> bool {
        let e = arena.segment_entry(open.segment);
        e[3].store(e[3].load(Ordering::Relaxed) & KIND | u64::from(age_s), Ordering::Relaxed);
        e[2].store(self.sequence.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        crash_point!("seal: sequence stored");
        e[1].fetch_add((open.used as u64) << USED_SHIFT, Ordering::AcqRel);
        crash_point!("seal: used stored, state still open");
        e[0].store(SEALED | u64::from(open.frame.0) << 32, Ordering::Release);
        crash_point!("seal: sealed");
        self.retire_if_dead(arena, open.segment)
    }

    /// Any that is sealed from now on has this number or a greater one.
    pub fn next_sequence(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    fn retire_if_dead(&self, arena: &Arena, s: SegmentId) -> bool {
        let e = arena.segment_entry(s);
        // The caller sealed the segment or took live bytes off it. Of one that does this and one
        // that does that at the same time, one at least sees what the other did.
        fence(Ordering::SeqCst);
        let state = e[0].load(Ordering::Acquire);
        if state & STATE != SEALED || e[1].load(Ordering::Acquire) as u32 != 0 {
            return false;
        }
        let retired = state & !STATE | RETIRED;
        if e[0].compare_exchange(state, retired, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return false;
        }
        crash_point!("retire: retired, on no list");
        self.retired[s.0 as usize / 64].fetch_or(1 << (s.0 % 64), Ordering::Release);
        self.retired_any.fetch_add(1, Ordering::Release);
        true
    }

    /// Claims a sealed segment in memory, to clean it or to move it.
    pub fn begin_cleaning(&self, arena: &Arena, s: SegmentId) -> Option<Open> {
        let (state, used) = self.claim(arena, s, 0)?;
        let dictionary = self.dictionary(arena, s);
        Some(Open { segment: s, frame: FrameNo((state >> 32) as u32), used, dictionary })
    }

    /// Claims a sealed segment below, to clean it.
    pub fn begin_cleaning_below(&self, arena: &Arena, s: SegmentId) -> Option<Below> {
        self.claim(arena, s, BELOW)?;
        self.below(arena, s)
    }

    fn claim(&self, arena: &Arena, s: SegmentId, below: u64) -> Option<(u64, usize)> {
        let e = arena.segment_entry(s);
        let state = e[0].load(Ordering::Acquire);
        if state & (STATE | BELOW) != SEALED | below {
            return None;
        }
        e[0].compare_exchange(state, state & !STATE | CLEANING, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        crash_point!("clean: claimed");
        Some((state, (e[1].load(Ordering::Acquire) >> USED_SHIFT) as usize))
    }

    /// Ends cleaning: retired if nothing is live in it now, else sealed as before (and retired by
    /// whoever takes the last live bytes).
    pub fn end_cleaning(&self, arena: &Arena, s: SegmentId) {
        let e = arena.segment_entry(s);
        let state = e[0].load(Ordering::Relaxed);
        crash_point!("clean: moved, still claimed");
        e[0].store(state & !STATE | SEALED, Ordering::Release);
        crash_point!("clean: sealed again");
        self.retire_if_dead(arena, s);
    }

    pub fn any_retired(&self) -> bool {
        self.retired_any.load(Ordering::Acquire) != 0
    }

    /// Retired segments of one group of 64, taken off the list. They may be released after a
    /// grace period that begins after this call.
    pub fn take_retired(&self, group: usize) -> u64 {
        let bits = self.retired[group].swap(0, Ordering::AcqRel);
        self.retired_any.fetch_sub(u64::from(bits.count_ones()), Ordering::AcqRel);
        bits
    }

    pub fn retired_groups(&self) -> usize {
        self.retired.len()
    }

    /// Frees a retired segment after its grace period. Returns where it was, if it was below.
    pub fn release(&self, arena: &Arena, s: SegmentId) -> Option<Spot> {
        let e = arena.segment_entry(s);
        let state = e[0].load(Ordering::Relaxed);
        debug_assert_eq!(state & STATE, RETIRED);
        crash_point!("release: still retired");
        e[0].store(FREE, Ordering::Relaxed);
        crash_point!("release: free, on no stack");
        match Place::of(state) {
            Place::Memory(frame) => {
                arena.put_segment(s, frame);
                None
            }
            Place::Below(at) => {
                arena.put_id(s);
                Some(at)
            }
        }
    }

    /// Live and used bytes of a segment and its age, if it is sealed, in memory.
    pub fn sealed(&self, arena: &Arena, s: SegmentId) -> Option<(u32, u32, u64)> {
        self.counts(arena, s, SEALED)
    }

    /// The same, if it is sealed, on this tier.
    pub fn sealed_below(&self, arena: &Arena, s: SegmentId, tier: TierNo) -> Option<(u32, u32, u64)> {
        self.counts(arena, s, SEALED | of_tier(tier))
    }

    fn counts(&self, arena: &Arena, s: SegmentId, wanted: u64) -> Option<(u32, u32, u64)> {
        let e = arena.segment_entry(s);
        if e[0].load(Ordering::Acquire) & (STATE | BELOW | TIER) != wanted {
            return None;
        }
        let counts = e[1].load(Ordering::Relaxed);
        let age = self.sequence.load(Ordering::Relaxed).saturating_sub(e[2].load(Ordering::Relaxed));
        Some((counts as u32, (counts >> USED_SHIFT) as u32, age))
    }

    /// The number that a segment was given when it was sealed, which no other sealing has; None: it is
    /// not sealed now. Its records do not change from then on until it is free.
    pub fn sealed_as(&self, arena: &Arena, s: SegmentId) -> Option<u64> {
        let e = arena.segment_entry(s);
        matches!(e[0].load(Ordering::Acquire) & STATE, SEALED | CLEANING).then(|| e[2].load(Ordering::Relaxed))
    }

    /// When a sealed segment's content was written, and whether it is cold.
    pub fn past(&self, arena: &Arena, s: SegmentId) -> (u32, bool) {
        let word = arena.segment_entry(s)[3].load(Ordering::Relaxed);
        (word as u32, word & COLD != 0)
    }

    /// Live bytes of a segment in any state but free.
    pub fn live(&self, arena: &Arena, s: SegmentId) -> u32 {
        let e = arena.segment_entry(s);
        match e[0].load(Ordering::Acquire) & STATE {
            FREE | RETIRED => 0,
            _ => e[1].load(Ordering::Relaxed) as u32,
        }
    }

    /// The record at an offset of a segment that the caller may read. Looks at no byte past it:
    /// what follows may be written at this moment. None: no record that ends within the segment.
    pub fn record<'a>(&self, arena: &'a Arena, frame: FrameNo, offset: usize) -> Option<(Header, &'a [u8])> {
        let left = arena.segment_bytes().checked_sub(offset)?;
        record_of(|n| (n <= left).then(|| arena.record_bytes(frame, offset, n)))
    }
}

/// The number that an entry's last word has.
pub(super) fn dictionary_of(word: u64) -> u8 {
    ((word & DICTIONARY) >> DICTIONARY_SHIFT) as u8
}

/// The record that begins where `bytes` begins; `bytes` gives that many, or None if there are not.
pub(crate) fn record_of<'a>(bytes: impl Fn(usize) -> Option<&'a [u8]>) -> Option<(Header, &'a [u8])> {
    let head = bytes(SINGLE_HEADER)?;
    let head = if Header::is_group(head) { bytes(GROUP_HEADER)? } else { head };
    let header = Header::read(head)?;
    Some((header, bytes(header.total())?))
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::model;
    use std::sync::Arc;

    /// A segment is sealed, or set free by the cleaner, while its two records die: it is retired,
    /// once, and whoever finds it so knows of all that was done to it.
    fn retired_once(cleaned: bool) {
        model(None, move || {
            let arena = Arc::new(Arena::simulated(32, 2, 1, 4096));
            let segments = Arc::new(Segments::new(2));
            let open = segments.open(&arena, 0, Kind::default(), 0).expect("a frame is free");
            let s = open.segment;
            segments.add_live(&arena, s, 30);
            if cleaned {
                segments.seal(&arena, open, 0);
                segments.begin_cleaning(&arena, s).expect("it is sealed");
            }
            // A slot names each record until it is dead.
            let slots: Arc<[AtomicU64; 2]> = Arc::new([AtomicU64::new(1), AtomicU64::new(1)]);
            let threads: Vec<_> = (0..2)
                .map(|i| {
                    let (arena, segments, slots) = (arena.clone(), segments.clone(), slots.clone());
                    loom::thread::spawn(move || {
                        slots[i].store(0, Ordering::Relaxed);
                        segments.take_live(&arena, s, 15);
                    })
                })
                .collect();
            match cleaned {
                true => segments.end_cleaning(&arena, s),
                false => {
                    segments.seal(&arena, open, 0);
                }
            }
            if segments.take_retired(0) != 0 {
                assert!(slots.iter().all(|slot| slot.load(Ordering::Relaxed) == 0), "a slot names it still");
                segments.release(&arena, s);
            }
            threads.into_iter().for_each(|t| t.join().expect("a model's thread ends"));
            if segments.any_retired() {
                assert_eq!(segments.take_retired(0), 1 << s.0);
                segments.release(&arena, s);
            }
            assert_eq!((arena.frames_ready(), arena.ids_ready()), (2, 2), "it was not retired");
            assert!(!segments.any_retired(), "it was retired twice");
        });
    }

    #[test]
    fn a_segment_that_dies_while_it_is_sealed_is_retired_once() {
        retired_once(false);
    }

    #[test]
    fn a_segment_that_dies_while_it_is_cleaned_is_retired_once() {
        retired_once(true);
    }
}
