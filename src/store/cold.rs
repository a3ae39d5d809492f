//! What it takes to read pages that were compressed again, by another codec and in larger groups than what is
//! written: some two hundred KiB for each thread that may meet one. It is made when the first of them is about to
//! be, so that a store that never got there has none of it, and before it is: an I/O thread that meets one finds
//! its share, and asks for no memory.
//!
//! A thread's share is put under its number by the cleaner, before the first such record is committed. The thread
//! sees the record only after that (it loads the slot with Acquire), and takes the share once. So the mutex is
//! never waited for.
//!
//! A store that is opened on an arena that may hold such records has all of it from the start; see `Lane::open`.

use super::append::Appender;
use super::Shared;
use crate::codec::Decoder;
use crate::config::{Checked, CodecChoice, Cold};
use crate::page::PAGE_BYTES;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// What is made for a thread at most, in bytes, and for the one that compresses beside that.
const SHARE_BYTES: u64 = 256 << 10;
const COMPRESSOR_BYTES: u64 = 2 << 20;

/// The shares of all threads that decode.
pub(crate) struct Unpacking {
    begun: AtomicBool,
    shares: Box<[Place]>,
}

struct Place {
    there: AtomicBool,
    share: Mutex<Share>,
}

/// What a thread decodes such records with.
#[derive(Default)]
pub(crate) struct Share {
    decoder: Option<Decoder>,
    group: Box<[u8]>,
    /// Only for those who make records of several pages too.
    scratch: Box<[u8]>,
}

impl Share {
    fn new(cold: Cold, makes: bool) -> Share {
        let room = |pages: usize| vec![0xa5; pages * PAGE_BYTES].into_boxed_slice();
        let decoder = matches!(cold.codec, CodecChoice::Zstd(_)).then(Decoder::new);
        Share { decoder, group: room(cold.group_pages), scratch: room(if makes { cold.group_pages } else { 0 }) }
    }
}

/// Most pages to a record that there may be, and codecs, a bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    pub group_pages: usize,
    pub codecs: u64,
}

impl Seen {
    fn and(self, cold: Cold) -> Seen {
        Seen { group_pages: self.group_pages.max(cold.group_pages), codecs: self.codecs | cold.codec.bit() }
    }
}

impl Unpacking {
    pub fn new(config: &Checked) -> Unpacking {
        let seen = Seen { group_pages: config.group_pages_seen, codecs: config.codecs_seen };
        let begun = config.cold.is_none_or(|cold| seen.and(cold) == seen);
        let place = |_| Place { there: AtomicBool::new(false), share: Mutex::default() };
        // The lanes', the cleaner's, the movers'.
        let threads = config.max_lanes + 1 + config.below.len();
        Unpacking { begun: AtomicBool::new(begun), shares: (0..threads).map(place).collect() }
    }

    fn put(&self, thread: usize, share: Share) {
        let place = &self.shares[thread];
        *place.share.lock().unwrap_or_else(PoisonError::into_inner) = share;
        place.there.store(true, Ordering::Release);
    }

    /// Exchanges what a thread decodes with for its share, if that is there and was not taken.
    pub(super) fn take(&self, thread: usize, appender: &mut Appender, group: &mut Box<[u8]>) {
        let place = &self.shares[thread];
        if place.there.load(Ordering::Acquire) && place.there.swap(false, Ordering::AcqRel) {
            let share = &mut *place.share.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(group, &mut share.group);
            appender.exchange(&mut share.decoder, &mut share.scratch);
        }
    }
}

impl Shared {
    /// What the arena may hold by now.
    pub fn seen(&self) -> Seen {
        let seen = Seen { group_pages: self.config.group_pages_seen, codecs: self.config.codecs_seen };
        match self.config.cold {
            Some(cold) if self.unpacking.begun.load(Ordering::Acquire) => seen.and(cold),
            _ => seen,
        }
    }

    /// Whether the arena may hold what was compressed again.
    pub fn has_cold(&self) -> bool {
        self.config.cold.is_some() && self.unpacking.begun.load(Ordering::Acquire)
    }

    /// Bytes that beginning to compress again takes.
    pub fn cost_of_cold(&self) -> u64 {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|taken| **taken).count();
        COMPRESSOR_BYTES + SHARE_BYTES * (lanes + 1 + self.lower.len()) as u64
    }

    /// Makes sure that whoever meets such a record can read it. Cleaner only.
    pub fn begin_cold(&self, cold: Cold) {
        // No lane is opened meanwhile: it would go without.
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if self.unpacking.begun.load(Ordering::Acquire) {
            return;
        }
        let others = std::iter::repeat_n(true, 1 + self.lower.len());
        let threads = lanes.iter().copied().chain(others).enumerate();
        for (thread, _) in threads.filter(|(_, decodes)| *decodes) {
            self.unpacking.put(thread, Share::new(cold, thread >= lanes.len()));
        }
        self.arena.allow(cold.group_pages, cold.codec.bit());
        self.unpacking.begun.store(true, Ordering::Release);
    }
}
