//! Writing a part of a page: read, changed, written whole, against the very word that was read.

use super::append::Outcome;
use super::fetch::Fetch;
use super::{Lane, Shared};
use crate::codec::same_filled;
use crate::error::Result;
use crate::map::{swap_if, Slot};
use crate::page::{PageNo, PAGE_BYTES};
use crate::sync::yield_now;
use std::sync::atomic::Ordering;

/// What came of replacing a part of a page.
enum Splice {
    Done,
    NoRoom,
    /// Another write came between.
    Again,
    Fetch(Fetch),
}

impl Lane {
    /// Replaces `len` bytes within a page, by `data` or by zeros, against the very word it was
    /// read from: a write to other bytes of the page in between makes it start anew. False: no
    /// room at this moment.
    ///
    /// The rest of a page that lies on disk is waited for. (A kernel that swaps writes whole pages.)
    pub(super) fn splice(&mut self, page: PageNo, inner: usize, len: usize, data: Option<&[u8]>) -> Result<bool> {
        let mut plain = [0u8; PAGE_BYTES];
        let mut fetched = None;
        loop {
            let part = (inner, len, data);
            match self.in_epoch(|lane, s| lane.splice_once(s, page, part, &mut plain, fetched))? {
                Splice::Done => return Ok(true),
                Splice::NoRoom => return Ok(false),
                Splice::Again => fetched = None,
                Splice::Fetch(fetch) => {
                    let n = self.fetch_now(fetch, u64::from(page.0) * PAGE_BYTES as u64, &mut plain)?;
                    fetched = (n == PAGE_BYTES).then_some(fetch);
                }
            }
        }
    }

    /// `fetched`: what `plain` was fetched by.
    fn splice_once(
        &mut self,
        s: &Shared,
        page: PageNo,
        (inner, len, data): (usize, usize, Option<&[u8]>),
        plain: &mut [u8; PAGE_BYTES],
        fetched: Option<Fetch>,
    ) -> Result<Splice> {
        self.appender.place(s, s.charges.placement(self.volume));
        let Ok(leaf) = s.map.leaf_for_write(&s.arena, self.volume, page.cluster()) else { return Ok(Splice::NoRoom) };
        let slot = &leaf[page.slot()];
        let old = Slot(slot.load(Ordering::Acquire));
        if old.is_frozen() {
            yield_now();
            return Ok(Splice::Again);
        }
        if !fetched.is_some_and(|fetch| fetch.stands(s, old)) {
            if let Some(fetch) = self.decode(s, page, old, plain)? {
                return Ok(Splice::Fetch(fetch));
            }
        }
        match data {
            Some(data) => plain[inner..inner + len].copy_from_slice(&data[..len]),
            None => plain[inner..inner + len].fill(0),
        }
        let pattern = same_filled(plain);
        let new = match pattern.and_then(Slot::fill) {
            Some(word) => word,
            None if s.charges.is_spent(self.volume) => return Err(self.over_quota()),
            None => {
                let outcome = match pattern {
                    Some(pattern) => self.appender.fill(s, self.volume, page, pattern),
                    None => self.appender.pages(s, self.volume, page, plain),
                };
                match outcome {
                    Outcome::Done(record) => record.slot(0),
                    Outcome::Split | Outcome::NoRoom => return Ok(Splice::NoRoom),
                }
            }
        };
        crash_point!("splice: record counted, slot old");
        if !swap_if(slot, old, new) {
            self.forget(s, new);
            return Ok(Splice::Again);
        }
        let counters = &s.counters[self.index];
        s.born(counters, new);
        s.died(counters, old);
        Ok(Splice::Done)
    }
}
