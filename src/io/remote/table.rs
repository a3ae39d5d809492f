//! Where requests are handed to the carriers: a table of places, so that whoever asks neither locks, waits nor
//! allocates. No order is kept here; carriers empty it as soon as they look.
//!
//! ```text
//! state of a place   free → filling (its requester's) → ready → emptying (a carrier's) → free
//! ```
//! A place's words belong to whoever exchanged its state for `filling` or `emptying`. The store that makes it ready
//! releases them to the carrier, the one that makes it free to the next requester.

use crate::sync::{AtomicU32, AtomicU64, Ordering};
use std::os::fd::RawFd;

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Trim,
}

/// Who is told of the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reply {
    /// A completion with this user data, in the io_uring of this descriptor.
    Ring(RawFd, u64),
    /// The [`super::post::Waiter`] at this address.
    Waiter(usize),
    /// The connection itself.
    Connection,
}

/// A request. Its buffer stays what it is until whoever is told has been told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    pub kind: Kind,
    pub at: u64,
    pub bytes: u32,
    /// Address of its first byte. None to trim.
    pub buffer: usize,
    pub reply: Reply,
}

const FREE: u32 = 0;
const FILLING: u32 = 1;
const READY: u32 = 2;
const EMPTYING: u32 = 3;

struct Place {
    state: AtomicU32,
    at: AtomicU64,
    /// Bytes above, kind below.
    what: AtomicU64,
    buffer: AtomicU64,
    /// Who is told: kind of reply above, descriptor below.
    who: AtomicU64,
    /// User data or address.
    what_for: AtomicU64,
}

/// The places.
pub(super) struct Table {
    places: Box<[Place]>,
    /// Where the next requester looks first.
    next: AtomicU32,
    /// How many are ready: wraps below zero while a carrier is ahead of a requester's counting.
    ready: AtomicU32,
}

impl Table {
    pub fn new(places: usize) -> Table {
        let zero = || AtomicU64::new(0);
        let place = || Place {
            state: AtomicU32::new(FREE),
            at: zero(),
            what: zero(),
            buffer: zero(),
            who: zero(),
            what_for: zero(),
        };
        let places = (0..places).map(|_| place()).collect();
        Table { places, next: AtomicU32::new(0), ready: AtomicU32::new(0) }
    }

    /// False: all places are taken at this moment.
    pub fn push(&self, request: &Request) -> bool {
        let first = self.next.fetch_add(1, Ordering::Relaxed) as usize;
        let len = self.places.len();
        let mine = |place: &&Place| exchange(place, FREE, FILLING);
        let Some(place) = (0..len).map(|i| &self.places[(first + i) % len]).find(mine) else { return false };
        place.put(request);
        place.state.store(READY, Ordering::Release);
        self.ready.fetch_add(1, Ordering::SeqCst);
        true
    }

    /// Whether there is something to take. True at last after each [`Table::push`].
    pub fn has_any(&self) -> bool {
        self.ready.load(Ordering::SeqCst) as i32 > 0
    }

    pub fn pop(&self) -> Option<Request> {
        if !self.has_any() {
            return None;
        }
        let place = self.places.iter().find(|place| exchange(place, READY, EMPTYING))?;
        let request = place.get();
        place.state.store(FREE, Ordering::Release);
        self.ready.fetch_sub(1, Ordering::SeqCst);
        Some(request)
    }
}

fn exchange(place: &Place, from: u32, to: u32) -> bool {
    place.state.load(Ordering::Relaxed) == from
        && place.state.compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed).is_ok()
}

impl Place {
    fn put(&self, request: &Request) {
        let (reply, fd, what_for) = match request.reply {
            Reply::Ring(fd, user_data) => (0u64, fd as u32, user_data),
            Reply::Waiter(address) => (1, 0, address as u64),
            Reply::Connection => (2, 0, 0),
        };
        self.at.store(request.at, Ordering::Relaxed);
        self.what.store(u64::from(request.bytes) << 8 | request.kind as u64, Ordering::Relaxed);
        self.buffer.store(request.buffer as u64, Ordering::Relaxed);
        self.who.store(reply << 32 | u64::from(fd), Ordering::Relaxed);
        self.what_for.store(what_for, Ordering::Relaxed);
    }

    fn get(&self) -> Request {
        let (what, who) = (self.what.load(Ordering::Relaxed), self.who.load(Ordering::Relaxed));
        let what_for = self.what_for.load(Ordering::Relaxed);
        Request {
            kind: match what & 0xff {
                0 => Kind::Read,
                1 => Kind::Write,
                _ => Kind::Trim,
            },
            at: self.at.load(Ordering::Relaxed),
            bytes: (what >> 8) as u32,
            buffer: self.buffer.load(Ordering::Relaxed) as usize,
            reply: match who >> 32 {
                0 => Reply::Ring(who as u32 as RawFd, what_for),
                1 => Reply::Waiter(what_for as usize),
                _ => Reply::Connection,
            },
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn requests_come_out_as_they_went_in_and_no_more_than_there_are_places() {
        let table = Table::new(3);
        let of = |kind, reply| Request { kind, at: 1 << 40, bytes: u32::MAX, buffer: usize::MAX, reply };
        let all = [
            of(Kind::Read, Reply::Ring(7, u64::MAX)),
            of(Kind::Write, Reply::Waiter(usize::MAX)),
            of(Kind::Trim, Reply::Connection),
        ];
        for _ in 0..5 {
            assert!(table.pop().is_none());
            assert!(all.iter().all(|r| table.push(r)) && !table.push(&all[0]) && table.has_any());
            let mut out: Vec<_> = std::iter::from_fn(|| table.pop()).collect();
            out.sort_by_key(|r| r.kind as u8);
            assert_eq!(out, all);
            assert!(!table.has_any());
        }
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    fn request(n: u64) -> Request {
        Request { kind: Kind::Read, at: n, bytes: n as u32, buffer: n as usize, reply: Reply::Ring(1, n) }
    }

    /// Two requesters, a place and a carrier: each request comes out once and whole, or was refused.
    #[test]
    fn a_place_has_one_owner() {
        crate::sync::model(Some(4), || {
            let table = Arc::new(Table::new(1));
            let pushers: Vec<_> = (1..=2)
                .map(|n| {
                    let table = table.clone();
                    thread::spawn(move || table.push(&request(n)))
                })
                .collect();
            let mut out: Vec<_> = table.pop().into_iter().collect();
            let pushed = pushers.into_iter().map(|p| p.join().unwrap()).filter(|ok| *ok).count();
            out.extend(std::iter::from_fn(|| table.pop()));
            assert_eq!(out.len(), pushed);
            assert!(out.iter().all(|r| *r == request(r.at)) && !table.has_any());
        });
    }
}
