//! What a lane fetched lately from below memory, opened: pages that lie beside what was asked for are often asked
//! for next, each alone. (The kernel's readahead asks for eight that were written out together.)
//!
//! A ring of bytes in which what is newest displaces the oldest. Nothing in it has to be forgotten: a sealed segment
//! has a number that no other sealing has, its bytes do not change, and who looks here has just read that
//! number in the table.
//!
//! How much more than what is asked for is worth reading: twice as much as last time when some of it was of use,
//! half as much when it was displaced unused ([`Ahead`]).

use crate::page::SegmentId;

/// Bytes kept for a lane: what is read at most at once, twice.
pub(super) const RING_BYTES: usize = 64 << 10;
const RUNS: usize = 32;
/// Most blocks that are read beyond what is asked for.
const MOST_AHEAD: usize = 8;

/// Bytes of a segment, from `first` on.
#[derive(Clone, Copy)]
struct Run {
    segment: SegmentId,
    sequence: u64,
    first: usize,
    at: usize,
    len: usize,
    used: bool,
}

/// A lane's.
pub(super) struct Kept {
    bytes: Box<[u8]>,
    runs: [Option<Run>; RUNS],
    next_run: usize,
    next_at: usize,
    ahead: Ahead,
}

impl Kept {
    pub fn new() -> Kept {
        // Not zero, so that the memory is there.
        let bytes = vec![0xa5; RING_BYTES].into();
        Kept { bytes, runs: [None; RUNS], next_run: 0, next_at: 0, ahead: Ahead::default() }
    }

    /// Blocks to read beyond what is asked for.
    pub fn ahead(&self) -> usize {
        self.ahead.blocks
    }

    /// Keeps these bytes of a segment, unless they are too many.
    pub fn keep(&mut self, segment: SegmentId, sequence: u64, first: usize, plain: &[u8]) {
        let len = plain.len();
        if len > self.bytes.len() / 2 {
            return;
        }
        let at = if self.next_at + len > self.bytes.len() { 0 } else { self.next_at };
        let displaced = |run: &Run| run.at < at + len && at < run.at + run.len;
        for place in 0..RUNS {
            if self.runs[place].is_some_and(|run| place == self.next_run || displaced(&run)) {
                let run = self.runs[place].take();
                self.ahead.displaced(run.is_some_and(|run| run.used));
            }
        }
        self.bytes[at..at + len].copy_from_slice(plain);
        self.runs[self.next_run] = Some(Run { segment, sequence, first, at, len, used: false });
        self.next_run = (self.next_run + 1) % RUNS;
        self.next_at = at + len;
    }

    /// What is kept of a sealed segment from byte `from` on, the newest, and which run it is of.
    pub fn find(&self, segment: SegmentId, sequence: u64, from: usize) -> Option<(usize, &[u8])> {
        let back = (1..=RUNS).map(|n| (self.next_run + RUNS - n) % RUNS);
        back.filter_map(|place| Some((place, self.runs[place]?))).find_map(|(place, run)| {
            let of_it = run.segment == segment && run.sequence == sequence;
            let skip = from.checked_sub(run.first).filter(|skip| of_it && *skip < run.len)?;
            Some((place, &self.bytes[run.at + skip..run.at + run.len]))
        })
    }

    /// Some of that run was of use.
    pub fn was_of_use(&mut self, run: usize) {
        if let Some(run) = self.runs[run].as_mut().filter(|run| !run.used) {
            run.used = true;
            self.ahead.of_use();
        }
    }

    /// Some of what was read was damaged: from here on no more than what is asked for.
    pub fn damaged(&mut self) {
        self.ahead = Ahead::default();
    }
}

/// How many blocks are read ahead, by what became of those before.
#[derive(Clone, Copy, Default)]
struct Ahead {
    blocks: usize,
}

impl Ahead {
    fn of_use(&mut self) {
        self.blocks = (self.blocks * 2).clamp(1, MOST_AHEAD);
    }

    fn displaced(&mut self, used: bool) {
        if !used {
            self.blocks /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SegmentId = SegmentId(7);

    #[test]
    fn what_is_kept_is_found_until_it_is_displaced() {
        let mut kept = Kept::new();
        let plain: Vec<u8> = (0..12_000).map(|i| (i % 251) as u8).collect();
        kept.keep(A, 5, 4080, &plain);
        assert_eq!(kept.find(A, 5, 4080).unwrap().1, plain);
        assert_eq!(kept.find(A, 5, 4180).unwrap().1, &plain[100..]);
        for (segment, sequence, from) in [(A, 6, 4080), (SegmentId(8), 5, 4080), (A, 5, 4079), (A, 5, 16_080)] {
            assert!(kept.find(segment, sequence, from).is_none());
        }
        // Five go in: the sixth displaces the first.
        for n in 1..5 {
            kept.keep(A, 5 + n, 0, &plain);
        }
        assert!(kept.find(A, 5, 4080).is_some());
        kept.keep(A, 20, 0, &plain);
        assert!(kept.find(A, 5, 4080).is_none() && kept.find(A, 6, 0).is_some());
        assert_eq!(kept.find(A, 20, 11_999).unwrap().1, &plain[11_999..]);
        // What would displace half of all is not kept.
        kept.keep(A, 21, 0, &[1; RING_BYTES / 2 + 1]);
        assert!(kept.find(A, 21, 0).is_none());
        // Small ones displace by number.
        (0..RUNS as u64).for_each(|n| kept.keep(A, 100 + n, 0, &[1; 8]));
        assert!(kept.find(A, 20, 0).is_none() && kept.find(A, 100, 0).is_some());
    }

    #[test]
    fn reading_ahead_grows_with_use_and_ends_without() {
        let mut kept = Kept::new();
        assert_eq!(kept.ahead(), 0);
        for want in [1, 2, 4, 8, 8] {
            kept.keep(A, 1, 0, &[1; 4080]);
            let (run, _) = kept.find(A, 1, 100).unwrap();
            kept.was_of_use(run);
            assert_eq!(kept.ahead(), want);
        }
        (0..RUNS as u64 + 4).for_each(|n| kept.keep(A, 2 + n, 0, &[1; 4080]));
        assert_eq!(kept.ahead(), 0);
    }
}
