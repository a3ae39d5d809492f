//! Extents to which a write, or trim, may come late: it was sent, and the connection or the process that sent it
//! ended before the answer came, so the server may do it yet. Until that can be no more, nothing else goes there.
//!
//! Whatever is sent is noted in the arena first, so that the next store knows of it too. An answer on the very
//! connection on which it was sent, the only time, takes the note back. Else it stays for [`TICKS`] ticks. A tick is
//! [`TICK`] at whose end the server answered a question: so a server that stands still as a whole, for however long,
//! lets no time pass, and has since had minutes to do what it had been sent.
//!
//! A server that does something later than that, while it answers other questions all the time, may spoil what was
//! written there since. That is found: blocks are sealed (`seal.rs`).

use crate::page::ExtentNo;
use crate::sync::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Extents noted at a time; the arena has a word for each.
pub(crate) const NOTES: usize = 64;
pub(super) const TICK: Duration = Duration::from_secs(10);
/// Five minutes.
const TICKS: u32 = 30;

#[derive(Clone, Copy)]
struct Note {
    extent: u32,
    /// None: it is under way.
    until: Option<u32>,
}

/// The notes, by the number of their word in the arena: an extent's number and one, or 0.
pub(super) struct Late {
    notes: [Option<Note>; NOTES],
    clock: u32,
    ticked: Instant,
}

impl Late {
    pub fn new() -> Late {
        Late { notes: [None; NOTES], clock: 0, ticked: Instant::now() }
    }

    /// What an earlier store noted. Words that cannot be are forgotten.
    pub fn find(&mut self, words: &[AtomicU32], extents: u32) {
        for (note, word) in self.notes.iter_mut().zip(words) {
            let extent = word.load(Ordering::Acquire).wrapping_sub(1);
            *note = (extent < extents).then_some(Note { extent, until: Some(TICKS) });
            if note.is_none() {
                word.store(0, Ordering::Release);
            }
        }
    }

    /// Before anything is sent. False: there are so many notes already.
    pub fn note(&mut self, words: &[AtomicU32], extent: ExtentNo) -> bool {
        let Some(free) = self.notes.iter().position(Option::is_none) else { return false };
        self.notes[free] = Some(Note { extent: extent.0, until: None });
        words[free].store(extent.0 + 1, Ordering::Release);
        true
    }

    /// It was answered, or given up. `late`: it may be done yet.
    pub fn settle(&mut self, words: &[AtomicU32], extent: ExtentNo, late: bool) {
        let is_it = |note: &Option<Note>| note.is_some_and(|n| n.extent == extent.0 && n.until.is_none());
        let Some(at) = self.notes.iter().position(is_it) else { return };
        if late {
            self.notes[at] = Some(Note { extent: extent.0, until: Some(self.clock + TICKS) });
        } else {
            self.notes[at] = None;
            words[at].store(0, Ordering::Release);
        }
    }

    pub fn has(&self, extent: u32) -> bool {
        self.notes.iter().flatten().any(|note| note.extent == extent)
    }

    /// Extents noted, those under way aside.
    pub fn extents(&self) -> impl Iterator<Item = u32> + '_ {
        let all = || self.notes.iter().flatten().filter(|note| note.until.is_some());
        all()
            .enumerate()
            .filter(move |(i, note)| all().take(*i).all(|n| n.extent != note.extent))
            .map(|(_, n)| n.extent)
    }

    /// Whether the server is to be asked something.
    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.ticked + TICK && self.extents().next().is_some()
    }

    /// It was asked, and answered or not.
    pub fn tick(&mut self, words: &[AtomicU32], now: Instant, answered: bool) {
        self.ticked = now;
        if !answered {
            return;
        }
        self.clock += 1;
        for (note, word) in self.notes.iter_mut().zip(words) {
            if note.is_some_and(|n| n.until.is_some_and(|until| until <= self.clock)) {
                *note = None;
                word.store(0, Ordering::Release);
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn words() -> Vec<AtomicU32> {
        (0..NOTES).map(|_| AtomicU32::new(0)).collect()
    }

    #[test]
    fn what_is_late_is_kept_until_the_server_has_answered_for_long() {
        let (words, mut late, now) = (words(), Late::new(), Instant::now());
        assert!(late.note(&words, ExtentNo(7)) && late.note(&words, ExtentNo(9)));
        assert_eq!((words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed)), (8, 10));
        late.settle(&words, ExtentNo(7), false);
        assert!(!late.has(7) && late.has(9) && words[0].load(Ordering::Relaxed) == 0);
        assert!(!late.is_due(now + TICK), "nothing is late");
        late.settle(&words, ExtentNo(9), true);
        assert!(late.is_due(now + TICK) && !late.is_due(now));
        for tick in 0..TICKS {
            assert!(late.has(9), "after {tick} ticks");
            late.tick(&words, now, false);
            late.tick(&words, now, true);
        }
        assert!(!late.has(9) && words.iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn another_store_finds_the_notes_and_there_are_no_more_than_words() {
        let (words, mut first) = (words(), Late::new());
        assert!((0..NOTES as u32).all(|n| first.note(&words, ExtentNo(n))) && !first.note(&words, ExtentNo(99)));
        let mut second = Late::new();
        second.find(&words, 60);
        assert_eq!(second.extents().collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
        assert!(words[60..].iter().all(|word| word.load(Ordering::Relaxed) == 0), "they cannot be");
        // Under way there too: one extent, two notes.
        assert!(second.note(&words, ExtentNo(5)));
        second.settle(&words, ExtentNo(5), true);
        assert_eq!(second.extents().count(), 60);
        (0..TICKS).for_each(|_| second.tick(&words, Instant::now(), true));
        assert_eq!(second.extents().count(), 0);
    }
}
