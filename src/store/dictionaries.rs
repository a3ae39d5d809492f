//! The dictionaries that are in use, by number, and the one that new segments are opened with.
//!
//! What compresses and decompresses with one is made beforehand, by whoever opens the store or by the cleaner, and shared
//! by all threads, which only read it. Lanes find it by the number of the segment that they are at: a load.
//!
//! When a dictionary comes: it is whole in the arena (`arena/dictionaries.rs`), then ready here, and only then current.
//! When it goes: a newer one is current; a grace period passes, so that no lane is about to open a segment with the old
//! number; the mover rests, which opens segments outside of epochs; no segment in the table but free ones has the number.
//! From then on none can get it, nor can a lane find a page of it. The arena forgets it, it is taken from its place
//! here, and after another grace period, as a lane may still look at it for a page that it fetched from a disk
//! meanwhile, it is dropped.
//!
//! Lock order: `retire`, the cleaner's, takes the mover's `quiet` after its own, if nobody has it.
#![allow(unsafe_code, reason = "cells that many threads read without a lock")]

use super::{grow, Shared};
use crate::arena::{InArena, MOST_DICTIONARIES};
use crate::codec::Dictionary;
use crate::config::Checked;
use crate::log::policy::emptying;
use crate::log::segment::Place;
use crate::page::{SegmentId, MAX_TIERS_BELOW};
use crate::stats::DictionaryStats;
use crate::sync::nap;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};

/// One that is in use.
pub(crate) struct InUse {
    pub serial: u32,
    pub dictionary: Dictionary,
}

/// All of them.
pub(crate) struct Dictionaries {
    /// By their numbers less one. Null: there is none.
    places: [AtomicPtr<InUse>; MOST_DICTIONARIES as usize],
    /// What new segments get. 0: none.
    current: AtomicU32,
    /// That of the next one. None is given twice: a lane may have noted one before it waited for a disk.
    next_serial: AtomicU32,
    count: AtomicU64,
    bytes: AtomicU64,
    held_bytes: AtomicU64,
    /// Somebody asked for one.
    pub train_now: AtomicBool,
    pub trained: AtomicU64,
    pub refused: AtomicU64,
    pub dropped: AtomicU64,
    /// Pages compressed with one, in segments that were sealed.
    pub pages: AtomicU64,
}

impl Dictionaries {
    /// Makes those ready that an arena has; the latest is current if a tier uses any.
    pub fn new(config: &Checked, found: &[InArena]) -> Dictionaries {
        let levels = config.dict_levels();
        let latest = found.iter().map(|one| one.serial).max();
        let all = Dictionaries {
            places: Default::default(),
            current: AtomicU32::new(0),
            next_serial: AtomicU32::new(latest.unwrap_or(0) + 1),
            count: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            held_bytes: AtomicU64::new(0),
            train_now: AtomicBool::new(false),
            trained: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            pages: AtomicU64::new(0),
        };
        for one in found {
            let is_current = Some(one.serial) == latest && !levels.is_empty();
            // Nothing is compressed with the others any more.
            let levels = if is_current { &levels[..] } else { &[] };
            let dictionary = Dictionary::new(&one.bytes, levels);
            let dictionary = dictionary.expect("what has the checksum of a dictionary is one");
            all.put(one.number, InUse { serial: one.serial, dictionary });
            if is_current {
                all.current.store(one.number.into(), Ordering::Release);
            }
        }
        all
    }

    fn put(&self, number: u8, one: InUse) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(one.dictionary.bytes() as u64, Ordering::Relaxed);
        self.held_bytes.fetch_add(one.dictionary.held_bytes() as u64, Ordering::Relaxed);
        let before = self.place(number).swap(Box::into_raw(Box::new(one)), Ordering::AcqRel);
        assert!(before.is_null(), "no dictionary takes the place of another");
    }

    fn place(&self, number: u8) -> &AtomicPtr<InUse> {
        &self.places[usize::from(number) - 1]
    }

    /// The dictionary with that number. Within an epoch, or while a segment has it, or by the cleaner.
    pub fn get(&self, number: u8) -> Option<&InUse> {
        let there = self.places.get(usize::from(number).checked_sub(1)?)?.load(Ordering::Acquire);
        // SAFETY: null, or what `put` made of a Box, of which nobody has a mutable reference. It is dropped by `retire`
        // alone (or with all of them, when there is nobody left): after it was taken from here and a grace period passed,
        // so after the caller's epoch; and while no segment has the number.
        unsafe { there.as_ref() }
    }

    /// What a segment's pages are made with: none if its number is 0. The outer None: there is no dictionary with that
    /// number, and its pages cannot be read.
    pub fn of(&self, number: u8) -> Option<Option<&Dictionary>> {
        match number {
            0 => Some(None),
            _ => self.get(number).map(|one| Some(&one.dictionary)),
        }
    }

    /// The number for a segment that is opened now. Lanes within an epoch.
    pub fn current(&self) -> u8 {
        self.current.load(Ordering::Acquire) as u8
    }

    fn numbers(&self) -> impl Iterator<Item = u8> + '_ {
        (1..=MOST_DICTIONARIES).filter(|number| !self.place(*number).load(Ordering::Acquire).is_null())
    }

    /// A number that none has.
    pub fn free_number(&self) -> Option<u8> {
        (1..=MOST_DICTIONARIES).find(|number| self.place(*number).load(Ordering::Acquire).is_null())
    }

    /// By anybody, at any time.
    pub fn stats(&self) -> DictionaryStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DictionaryStats {
            count: load(&self.count),
            bytes: load(&self.bytes),
            held_bytes: load(&self.held_bytes),
            trained: load(&self.trained),
            refused: load(&self.refused),
            dropped: load(&self.dropped),
            pages: load(&self.pages),
        }
    }
}

impl Drop for Dictionaries {
    fn drop(&mut self) {
        for place in &mut self.places {
            let there = std::mem::replace(place.get_mut(), std::ptr::null_mut());
            if !there.is_null() {
                // SAFETY: made of a Box by `put`; nobody else has a reference to all of this.
                drop(unsafe { Box::from_raw(there) });
            }
        }
    }
}

impl Shared {
    /// Takes a new dictionary into use. False: there is no room for it at this moment. Cleaner only.
    pub fn take_up(&self, bytes: Vec<u8>, dictionary: Dictionary) -> bool {
        let all = &self.dictionaries;
        let Some(number) = all.free_number() else { return false };
        let serial = all.next_serial.load(Ordering::Relaxed);
        self.epochs.enter(self.cleaner_epoch());
        let put = self.arena.put_dictionary(&InArena { number, serial, bytes });
        self.epochs.leave(self.cleaner_epoch());
        if !put {
            return false;
        }
        all.next_serial.store(serial + 1, Ordering::Relaxed);
        all.put(number, InUse { serial, dictionary });
        all.current.store(number.into(), Ordering::Release);
        all.trained.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Drops those that nothing is compressed with any more. Returns a segment in memory to be cleaned, whatever is live
    /// of it, so that another can be dropped. Cleaner only.
    pub fn retire_dictionaries(&self) -> Option<SegmentId> {
        let all = &self.dictionaries;
        let current = all.current();
        if all.numbers().all(|number| number == current) {
            return None;
        }
        // Of a mover that panicked nothing is opened any more.
        let mut movers = self.quiet[2..].iter().map(Mutex::try_lock);
        let movers_rest: [_; MAX_TIERS_BELOW] = std::array::from_fn(|_| movers.next().expect("each has one"));
        if movers_rest.iter().any(|rests| matches!(rests, Err(TryLockError::WouldBlock))) {
            return None;
        }
        self.epochs.wait(nap);
        let census = self.census();
        for number in
            (1..=MOST_DICTIONARIES).filter(|number| *number != current && !census[usize::from(*number)].in_use)
        {
            let there = all.place(number).load(Ordering::Acquire);
            if there.is_null() {
                continue;
            }
            self.arena.drop_dictionary(number);
            all.place(number).store(std::ptr::null_mut(), Ordering::Release);
            self.epochs.wait(nap);
            // SAFETY: made of a Box by `put`, and taken from its place by this thread, the only one that does; whoever had
            // a reference to it has left its epoch, and no segment has the number.
            let gone = unsafe { Box::from_raw(there) };
            all.count.fetch_sub(1, Ordering::Relaxed);
            all.bytes.fetch_sub(gone.dictionary.bytes() as u64, Ordering::Relaxed);
            all.held_bytes.fetch_sub(gone.dictionary.held_bytes() as u64, Ordering::Relaxed);
            all.dropped.fetch_add(1, Ordering::Relaxed);
        }
        let others = (1..=MOST_DICTIONARIES).filter(|number| *number != current);
        let others = others.map(|number| &census[usize::from(number)]).filter(|one| !one.below);
        let least = others.filter(|one| one.sealed.is_some()).min_by_key(|one| one.live_bytes)?;
        let stored: u64 = census.iter().map(|one| one.live_bytes).sum();
        emptying(least.live_bytes, stored, all.free_number().is_some()).then_some(least.sealed).flatten()
    }

    /// By their numbers what segments have them.
    fn census(&self) -> [Count; MOST_DICTIONARIES as usize + 1] {
        let mut census = [Count::default(); MOST_DICTIONARIES as usize + 1];
        for id in (0..grow::known_segments(self)).map(SegmentId) {
            let Some(place) = self.segments.in_use(&self.arena, id) else { continue };
            let one = &mut census[usize::from(self.segments.dictionary(&self.arena, id))];
            one.in_use = true;
            one.below |= matches!(place, Place::Below(_));
            one.live_bytes += u64::from(self.segments.live(&self.arena, id));
            if self.segments.sealed(&self.arena, id).is_some() {
                one.sealed = Some(id);
            }
        }
        census
    }
}

/// What segments with one number there are.
#[derive(Clone, Copy, Default)]
struct Count {
    in_use: bool,
    /// One of them on a disk.
    below: bool,
    live_bytes: u64,
    /// One that is sealed, in memory.
    sealed: Option<SegmentId>,
}
