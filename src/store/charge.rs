//! What each volume holds: charged as its slots change, bounded by its quota, and told tier by tier by a walk.
//!
//! A lane collects what its own changes add up to and charges it to the volume at the end of each epoch: at
//! most sixteen pages later, and without a locked instruction for each page. So a volume may exceed its quota
//! by sixteen pages for each of its lanes.

use super::{bump, Counters, Lane, Shared};
use crate::log::segment::Place;
use crate::map::{Kind, Slot};
use crate::page::{Placement, VolumeId, CLUSTER_PAGES, MAX_VOLUMES, PAGE_BYTES};
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicU8, Ordering};

/// A volume's account.
#[derive(Debug)]
struct Account {
    held_bytes: AtomicI64,
    /// `u64::MAX`: none.
    quota_bytes: AtomicU64,
    /// Where what is written to it may lie.
    placement: AtomicU8,
}

/// The accounts of all volumes that may be.
pub(crate) struct Charges(Box<[Account]>);

/// What a volume holds: pages by kind, and the bytes of their records, headers included, by where they are.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Held {
    /// Pages compressed or raw.
    pub stored_pages: u64,
    /// Pages that one pattern fills, zero apart: their slots are all they cost.
    pub filled_pages: u64,
    /// Pages of zeros that were written.
    pub zero_pages: u64,
    /// Pages that were acknowledged and are gone.
    pub lost_pages: u64,
    /// Bytes of records in memory.
    pub memory_bytes: u64,
    /// Bytes of records on disk tiers.
    pub disk_bytes: u64,
}

impl Charges {
    /// `found`: what the volumes hold that there are already.
    pub fn new(found: &[i64]) -> Charges {
        let account = |v: usize| Account {
            held_bytes: AtomicI64::new(found.get(v).copied().unwrap_or(0)),
            quota_bytes: AtomicU64::new(u64::MAX),
            placement: AtomicU8::new(Placement::Anywhere.code()),
        };
        Charges((0..MAX_VOLUMES).map(account).collect())
    }

    fn of(&self, v: VolumeId) -> &Account {
        &self.0[usize::from(v.0)]
    }

    pub fn held_bytes(&self, v: VolumeId) -> i64 {
        self.of(v).held_bytes.load(Ordering::Relaxed)
    }

    pub fn add(&self, v: VolumeId, bytes: i64) {
        if bytes != 0 {
            self.of(v).held_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Charges what a lane has collected, and which it alone writes.
    pub fn collect(&self, v: VolumeId, counters: &Counters) {
        let bytes = counters.held_bytes.load(Ordering::Relaxed);
        bump(&counters.held_bytes, -bytes);
        self.add(v, bytes);
    }

    pub fn quota_bytes(&self, v: VolumeId) -> u64 {
        self.of(v).quota_bytes.load(Ordering::Relaxed)
    }

    pub fn set_quota(&self, v: VolumeId, bytes: u64) {
        self.of(v).quota_bytes.store(bytes, Ordering::Relaxed);
    }

    pub fn placement(&self, v: VolumeId) -> Placement {
        Placement::of(self.of(v).placement.load(Ordering::Relaxed))
    }

    pub fn set_placement(&self, v: VolumeId, placement: Placement) {
        self.of(v).placement.store(placement.code(), Ordering::Relaxed);
    }

    pub fn is_spent(&self, v: VolumeId) -> bool {
        self.held_bytes(v).max(0) as u64 >= self.quota_bytes(v)
    }
}

/// What a word costs its volume.
pub(super) fn cost(word: Slot) -> i64 {
    match word.kind() {
        Kind::Stored(at) => i64::from(at.share),
        _ => 0,
    }
}

impl Lane {
    /// Looks at every page of the volume. What is written meanwhile may be told or not.
    pub(crate) fn held(&mut self) -> Held {
        let mut held = Held::default();
        let end = (self.store.volume_bytes(self.volume) as usize).div_ceil(CLUSTER_PAGES * PAGE_BYTES);
        let mut cluster = 0;
        while let Some(next) = self.in_epoch(|lane, s| s.map.next_present(&s.arena, lane.volume, cluster, end)) {
            self.in_epoch(|lane, s| {
                for slot in s.map.leaf(&s.arena, lane.volume, next).into_iter().flatten() {
                    held.count(s, Slot(slot.load(Ordering::Acquire)));
                }
            });
            cluster = next + 1;
        }
        held
    }
}

impl Held {
    /// Within an epoch, in which the word was loaded.
    fn count(&mut self, s: &Shared, word: Slot) {
        match word.kind() {
            Kind::Empty | Kind::Frozen => {}
            Kind::Fill(0) => self.zero_pages += 1,
            Kind::Fill(_) => self.filled_pages += 1,
            Kind::Lost => self.lost_pages += 1,
            Kind::Stored(at) => {
                self.stored_pages += 1;
                let below = matches!(s.segments.place(&s.arena, at.segment), Place::Below(_));
                *if below { &mut self.disk_bytes } else { &mut self.memory_bytes } += u64::from(at.share);
            }
        }
    }
}
