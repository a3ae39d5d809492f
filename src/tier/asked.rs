//! Which segments below are asked for again and again: found by whoever fetches, used by the mover, which brings
//! such a segment up as a whole if memory has room.
//!
//! A small table, each segment at its one place, where the last asked for displaces the one before: what is
//! asked for at random leaves no trace, what is asked for in a row does.

use crate::page::SegmentId;
use std::sync::atomic::{AtomicU64, Ordering};

const PLACES: usize = 64;
/// Fetches from one segment after which all of it is worth having: taking out what a machine swapped asks
/// for each page in turn, and a group or a run of pages is one fetch.
const OFTEN: u64 = 4;

/// 0: nothing · 23..0 segment · 63..24 how often.
pub(crate) struct Asked([AtomicU64; PLACES]);

impl Asked {
    pub fn new() -> Asked {
        Asked(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// Called for each fetch. True: it has come to be worth bringing up just now.
    pub fn note(&self, s: SegmentId) -> bool {
        let place = &self.0[s.0 as usize % PLACES];
        let now = place.load(Ordering::Relaxed);
        let times = if now & 0xff_ffff == u64::from(s.0) { (now >> 24) + 1 } else { 1 };
        // Two lanes at once may count as one.
        place.store(times << 24 | u64::from(s.0), Ordering::Relaxed);
        times == OFTEN
    }

    /// Takes the one out that was asked for most, of those worth bringing up.
    pub fn take(&self) -> Option<SegmentId> {
        let most = self.0.iter().max_by_key(|place| place.load(Ordering::Relaxed))?;
        let now = most.load(Ordering::Relaxed);
        if now >> 24 < OFTEN {
            return None;
        }
        most.store(0, Ordering::Relaxed);
        Some(SegmentId((now & 0xff_ffff) as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_in_a_row_is_found_and_what_at_random_is_not() {
        let asked = Asked::new();
        for round in 0..20 {
            (0..1000).for_each(|s| assert!(!asked.note(SegmentId(s * 7 + round))));
        }
        assert_eq!(asked.take(), None);
        let times = |s, n| (0..n).filter(|_| asked.note(SegmentId(s))).count();
        assert_eq!((times(0, 9), times(0xff_ffff, 5), times(3, 3)), (1, 1, 0));
        assert_eq!([asked.take(), asked.take(), asked.take()], [Some(SegmentId(0)), Some(SegmentId(0xff_ffff)), None]);
    }
}
