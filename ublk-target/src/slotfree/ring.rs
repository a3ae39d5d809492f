//! Our end of the ring through which the kernel tells of freed slots.
//!
//! A BPF ring buffer (Linux `kernel/bpf/ringbuf.c`) has two positions in bytes that only grow, each
//! on a page of its own, and the data. The kernel moves the *producer* on when it reserves a record,
//! marked busy, and takes the mark off when the record is complete; so positions are given out in
//! order, and a record may be seen before it can be read. We move the *consumer* on. Its page is the
//! kernel's memory, so it outlives whoever drains.
//!
//! ```text
//! record   | length:30 discarded:1 busy:1 | page offset:32 | page: 40, number of pages: 24 |
//! ```
//!
//! # The order
//!
//! A slot that is freed and used anew must not lose its new page to the old event. Three rules:
//!
//! 1. Whoever takes a write from the kernel then reads the producer's position: the write's *gate*.
//! 2. The consumer's position moves past a record only after the record was applied to the store.
//! 3. No page of a write is stored before the consumer's position has reached the write's gate.
//!
//! An event older than the write lies before its gate: the kernel tells of the slot's end before the
//! slot can be given out again, and the write comes after that. By 3 and 2 it was applied before the
//! write's pages are there. An event for the same slot that lies at or after the gate is younger than
//! the write, and a slot is not freed while a write to it is under way: so it comes after the answer
//! to the write, and may be applied whenever. That a worker dies changes nothing: what its successor
//! applies again lies at or after the consumer's position, and no write with a gate beyond that was
//! stored. `docs/ARCHITECTURE.md` has the kernel's side of it.
//!
//! One thread drains at a time, behind a flag in this process that dies with it. Nobody waits for the
//! flag: who finds it taken does something else.
//!
//! # Who is woken
//!
//! The kernel wakes those who poll the ring only for a record that lies at the consumer's position when
//! it is completed. So what came while a thread drained wakes nobody, and the thread that drained owes it
//! the next look: after it moved the position on it reads the producer's once more, with a fence in
//! between (the kernel has one between completing a record and reading our position), and says
//! [`Drained::All`] only if nothing was added. On any other answer it must drain again.

use super::program::PAGE_BITS;
use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};

/// The word before a record's content, and its two marks.
const HEADER_BYTES: u64 = 8;
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const WORD: u64 = 8;

/// Slots that were freed, as pages of the whole device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Freed {
    /// The first.
    pub page: u64,
    /// How many.
    pub count: u64,
}

/// How draining ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Drained {
    /// Nothing is left.
    All,
    /// The budget is spent.
    More,
    /// The kernel has not completed the next record.
    Busy,
    /// Another thread drains.
    Elsewhere,
}

/// What was applied.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Records.
    pub events: u64,
    /// Pages in them.
    pub pages: u64,
}

/// The ring.
pub struct Ring<'a> {
    consumer: &'a AtomicU64,
    producer: &'a AtomicU64,
    /// A power of two of words.
    data: &'a [AtomicU64],
    draining: AtomicBool,
}

impl<'a> Ring<'a> {
    /// A ring of these parts. The number of words must be a power of two.
    pub fn new(consumer: &'a AtomicU64, producer: &'a AtomicU64, data: &'a [AtomicU64]) -> Ring<'a> {
        assert!(data.len().is_power_of_two(), "a ring of {} words", data.len());
        Ring { consumer, producer, data, draining: AtomicBool::new(false) }
    }

    /// The gate of a write that has just been taken from the kernel.
    pub fn gate(&self) -> u64 {
        self.producer.load(Ordering::Acquire)
    }

    /// Whether all that lies before a gate was applied.
    pub fn passed(&self, gate: u64) -> bool {
        self.consumer.load(Ordering::Acquire) >= gate
    }

    /// Applies records, oldest first, until `budget` pages were in them. Those that follow one another in the area are
    /// applied as one: a process's slots die one by one, but in a row.
    pub fn drain(&self, budget: u64, mut apply: impl FnMut(Freed)) -> (Drained, Tally) {
        let mut tally = Tally::default();
        if self.draining.swap(true, Ordering::Acquire) {
            return (Drained::Elsewhere, tally);
        }
        let mut moved_to = self.consumer.load(Ordering::Relaxed);
        let mut at = moved_to;
        let mut run: Option<Freed> = None;
        let ended = loop {
            let end = self.producer.load(Ordering::Acquire);
            // More than there is room for is not a position: nothing is to be read there.
            if at == end || end.wrapping_sub(at) > self.bytes() {
                at = end;
                if at == moved_to {
                    break Drained::All;
                }
                run.take().into_iter().for_each(&mut apply);
                self.consumer.store(at, Ordering::Release);
                moved_to = at;
                // See "Who is woken".
                fence(Ordering::SeqCst);
                continue;
            }
            if tally.pages >= budget {
                break Drained::More;
            }
            let mark = self.word(at, Ordering::Acquire) as u32;
            if mark & BUSY != 0 {
                break Drained::Busy;
            }
            let len = u64::from(mark & !DISCARDED);
            if mark & DISCARDED == 0 && len >= WORD {
                let word = self.word(at + HEADER_BYTES, Ordering::Relaxed);
                let freed = Freed { page: word & ((1 << PAGE_BITS) - 1), count: word >> PAGE_BITS };
                match &mut run {
                    Some(run) if run.page.checked_add(run.count) == Some(freed.page) => run.count += freed.count,
                    _ => run.replace(freed).into_iter().for_each(&mut apply),
                }
                tally.events += 1;
                tally.pages = tally.pages.saturating_add(freed.count);
            }
            at += (HEADER_BYTES + len).next_multiple_of(WORD);
        };
        run.into_iter().for_each(&mut apply);
        if at != moved_to {
            self.consumer.store(at, Ordering::Release);
        }
        self.draining.store(false, Ordering::Release);
        (ended, tally)
    }

    fn bytes(&self) -> u64 {
        self.data.len() as u64 * WORD
    }

    fn word(&self, at: u64, order: Ordering) -> u64 {
        self.data[(at / WORD) as usize & (self.data.len() - 1)].load(order)
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
