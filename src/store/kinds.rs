//! What lies where in a volume: runs of pages of one kind, for those who copy or draw it.

use super::Lane;
use crate::error::Result;
use crate::map::{Kind, Slot};
use crate::page::{CLUSTER_PAGES, PAGE_BYTES};
use std::sync::atomic::Ordering;

/// What a page is. The numbers are public: NBD clients see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageKind {
    /// Never written, or discarded: reads as zeros and costs nothing.
    Empty = 0,
    /// Written as zeros: a slot and nothing else.
    Zero = 1,
    /// One pattern of 8 bytes throughout: a slot and nothing else.
    Filled = 2,
    /// A record holds it (of some patterns, too).
    Stored = 3,
    /// Its content is gone; reading it is an error.
    Lost = 4,
}

impl PageKind {
    fn of(word: Slot) -> PageKind {
        match word.kind() {
            Kind::Empty | Kind::Frozen => PageKind::Empty,
            Kind::Fill(0) => PageKind::Zero,
            Kind::Fill(_) => PageKind::Filled,
            Kind::Stored(_) => PageKind::Stored,
            Kind::Lost => PageKind::Lost,
        }
    }
}

impl Lane {
    /// Tells what the pages of a range are, in runs of bytes from its beginning, none of which is like
    /// the one before, until `tell` says false. Of pages that are written meanwhile it tells what they
    /// were or are. Space that was never written is passed over, 2 GiB a step.
    pub fn kinds(&mut self, offset: u64, len: u64, mut tell: impl FnMut(PageKind, u64) -> bool) -> Result<()> {
        self.check(offset, len)?;
        let cluster_bytes = (CLUSTER_PAGES * PAGE_BYTES) as u64;
        let end = offset + len;
        let mut run = (PageKind::Empty, 0);
        // False: no more is wanted.
        let mut add = |kind: PageKind, bytes: u64| {
            if kind == run.0 {
                run.1 += bytes;
                return true;
            }
            let before = std::mem::replace(&mut run, (kind, bytes));
            before.1 == 0 || tell(before.0, before.1)
        };
        let mut at = offset;
        while at < end {
            let cluster = (at / cluster_bytes) as usize;
            let last = end.div_ceil(cluster_bytes) as usize;
            let present = self.in_epoch(|lane, s| s.map.next_present(&s.arena, lane.volume, cluster, last));
            let begins = present.map_or(end, |n| (n as u64 * cluster_bytes).clamp(at, end));
            if begins > at && !add(PageKind::Empty, begins - at) {
                return Ok(());
            }
            at = begins;
            if at == end {
                break;
            }
            let cluster = (at / cluster_bytes) as usize;
            let first = (at % cluster_bytes) as usize / PAGE_BYTES;
            let left = end.div_ceil(PAGE_BYTES as u64) - at / PAGE_BYTES as u64;
            let last = CLUSTER_PAGES.min(first + left.min(CLUSTER_PAGES as u64) as usize);
            let mut kinds = [PageKind::Empty; CLUSTER_PAGES];
            let kinds = &mut kinds[first..last];
            self.in_epoch(|lane, s| {
                let Some(leaf) = s.map.leaf(&s.arena, lane.volume, cluster) else { return };
                for (kind, slot) in kinds.iter_mut().zip(&leaf[first..last]) {
                    *kind = PageKind::of(Slot(slot.load(Ordering::Acquire)));
                }
            });
            for kind in kinds {
                let until = (at / PAGE_BYTES as u64 + 1) * PAGE_BYTES as u64;
                let bytes = until.min(end) - at;
                if !add(*kind, bytes) {
                    return Ok(());
                }
                at += bytes;
            }
        }
        if run.1 > 0 {
            tell(run.0, run.1);
        }
        Ok(())
    }
}
