//! What a queue does for the slot-free feed: it keeps writes back until their gate is passed, and drops
//! what the kernel tells was freed. Queue 0 also waits on the ring while nothing is written. The order
//! that all this keeps is argued in `slotfree/ring.rs`.

#![allow(unsafe_code)] // pushing a poll and a timer on the ring.

use super::{Next, Server, TIMER};
use crate::slotfree::ring::{Drained, Freed};
use ghostswap::{Lane, PAGE_BYTES};
use io_uring::{opcode, types};
use libublk::with_task_io_ring_mut;

/// Marks that freed slots were told of, and that enough time has passed to look what they are.
pub const TOLD: u64 = TIMER | 2;
pub const GATHERED: u64 = TIMER | 3;
/// How long freed slots are gathered before they are looked at.
static GATHER: types::Timespec = types::Timespec::new().nsec(2_000_000);
/// Freed pages dropped at a time; reads come in between.
const DROP_PAGES: u64 = 512;

/// Whether a queue waits on the ring; one does.
#[derive(Clone, Copy, PartialEq)]
pub enum Watch {
    /// Not yet: it is to.
    Idle,
    /// It does.
    Waiting,
    /// A word came: it does again once all is drained.
    Told,
    /// Another queue does, or there is no feed.
    Never,
}

/// What a queue has undertaken to drain. Any may: who drains in part must see to the rest, since the
/// kernel wakes nobody for it.
#[derive(Clone, Copy, PartialEq)]
pub enum Owed {
    Nothing,
    /// In a moment, when more has come.
    Soon,
    Now,
}

impl Server<'_> {
    /// Drops some of what was told, if nobody else does.
    pub(super) fn drop_some(&mut self) -> Drained {
        let (Some(feed), lane) = (&self.feed, &mut self.lane) else { return Drained::All };
        let ended = feed.drain(DROP_PAGES, |freed| drop_freed(lane, freed));
        if self.owed == Owed::Nothing && matches!(ended, Drained::More | Drained::Busy) {
            self.owed = Owed::Now;
        }
        ended
    }

    /// Whether a write must wait until older freed slots were dropped, and what to do meanwhile.
    pub(super) fn held_at_gate(&mut self, gate: u64) -> Option<Next> {
        let feed = self.feed.as_ref()?;
        if feed.ring().passed(gate) {
            return None;
        }
        match self.drop_some() {
            _ if self.feed.as_ref()?.ring().passed(gate) => None,
            Drained::More => Some(Next::Poll),
            _ => Some(Next::Soon),
        }
    }

    /// Drops what this queue has undertaken to.
    pub(super) fn work_on_feed(&mut self, next: Next) -> Next {
        match self.drop_some() {
            Drained::More => return Next::Poll,
            Drained::All => {
                self.owed = Owed::Nothing;
                if self.watch == Watch::Told {
                    self.watch = Watch::Idle;
                }
            }
            Drained::Busy | Drained::Elsewhere => self.owed = self.gather(),
        }
        next
    }

    /// Waits on the ring; submitted with the next batch. A full queue of entries is not for long.
    pub(super) fn wait_at_feed(&mut self) {
        let Some(feed) = &self.feed else { return };
        let poll = opcode::PollAdd::new(types::Fd(feed.descriptor()), libc::POLLIN as u32).build().user_data(TOLD);
        // SAFETY: the descriptor is open as long as the process lives.
        let pushed = with_task_io_ring_mut(|ring| unsafe { ring.submission().push(&poll) }.is_ok());
        if pushed {
            self.watch = Watch::Waiting;
        }
    }

    /// Starts the time to gather in; without room for it there is none.
    pub(super) fn gather(&self) -> Owed {
        let timer = opcode::Timeout::new(&GATHER).build().user_data(GATHERED);
        // SAFETY: the time is a static.
        let pushed = with_task_io_ring_mut(|ring| unsafe { ring.submission().push(&timer) }.is_ok());
        if pushed {
            Owed::Soon
        } else {
            Owed::Now
        }
    }
}

/// What lies beyond the device is none of its pages.
fn drop_freed(lane: &mut Lane, freed: Freed) {
    let bytes = |pages: u64| pages.checked_mul(PAGE_BYTES as u64);
    if let (Some(offset), Some(len)) = (bytes(freed.page), bytes(freed.count)) {
        let _ = lane.discard(offset, len);
    }
}
