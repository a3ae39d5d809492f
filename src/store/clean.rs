//! The cleaner: makes room by copying what is live out of segments that are mostly dead.
//!
//! Story of one victim: choose by cost-benefit; claim it; copy what is live of it (`survivors.rs`); set
//! it free. It is reused after a grace period.

use super::append::Appender;
use super::recompress::{due, Recompressor};
use super::survivors::Copier;
use super::train::Trainer;
use super::{grow, Shared};
use crate::arena::Spare;
use crate::log::policy::{cleaning, gain, rest_after, worth, Candidate, Cleaning};
use crate::log::record::most_total;
use crate::log::segment::Open;
use crate::page::SegmentId;
use crate::sync::nap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Victims taken from one look over the table.
const BATCH: usize = 8;
const NAP: Duration = Duration::from_millis(50);
/// Groups of 64 segments that share a grace period.
const LOTS: usize = 32;

pub(super) struct Cleaner {
    shared: Arc<Shared>,
    copier: Copier,
    victims: Vec<(f64, SegmentId)>,
    /// Made at once where there is something cold, otherwise when something is due for it; and not before the host
    /// can spare the memory.
    recompressor: Option<Recompressor>,
    trainer: Trainer,
    spare: Spare,
    /// None: whoever takes the steps decides when.
    rest_until: Option<Instant>,
    /// Something is to be compressed again after that rest.
    due_again: bool,
}

impl Cleaner {
    pub fn new(shared: Arc<Shared>, spare: Spare) -> Cleaner {
        let copier = Copier::new(&shared, Appender::new(&shared, 0), shared.cleaner_epoch());
        let mut cleaner = Cleaner {
            copier,
            victims: Vec::with_capacity(BATCH + 1),
            recompressor: None,
            trainer: Trainer::new(&shared),
            spare,
            rest_until: None,
            due_again: false,
            shared,
        };
        if cleaner.shared.has_cold() {
            cleaner.recompressor();
        }
        cleaner
    }

    pub fn run(&mut self) {
        self.rest_until = Some(Instant::now());
        while !self.shared.stop.load(Ordering::Acquire) {
            if !self.step() {
                let rest = self.rest_until.filter(|_| self.due_again);
                let nap = rest.map_or(NAP, |until| until.saturating_duration_since(Instant::now()));
                std::thread::park_timeout(nap.min(NAP));
            }
        }
        self.close();
    }

    /// One look over the table and what comes of it. False: there was nothing to do.
    pub fn step(&mut self) -> bool {
        let shared = self.shared.clone();
        let _busy = shared.quiet[1].lock().unwrap_or_else(PoisonError::into_inner);
        self.release();
        let how = self.choose();
        let before = shared.cleaned.load(Ordering::Relaxed);
        if how != Cleaning::Rest {
            self.clean();
        }
        let cleaned = how != Cleaning::Rest && shared.cleaned.load(Ordering::Relaxed) != before;
        // Making room comes first.
        let more = (how != Cleaning::Urgent || !cleaned) && self.compress_again();
        self.release();
        self.copier.appender.close_old(&shared);
        self.recompressor.iter_mut().for_each(|one| one.appender.close_old(&shared));
        let old = shared.retire_dictionaries();
        if let (Cleaning::Rest | Cleaning::Tidy, Some(id)) = (how, old) {
            // One at a time: nobody waits for it.
            self.clean_one(id);
        }
        let learned = how != Cleaning::Urgent && !more && self.trainer.step(&shared, &mut self.spare);
        cleaned || more || learned
    }

    /// As a test wants it. True: there is one more.
    #[cfg(feature = "crash-points")]
    pub fn train_now(&mut self) -> bool {
        let shared = self.shared.clone();
        let before = shared.dictionaries.trained.load(Ordering::Relaxed);
        shared.dictionaries.train_now.store(true, Ordering::Relaxed);
        self.trainer.step(&shared, &mut self.spare) && shared.dictionaries.trained.load(Ordering::Relaxed) > before
    }

    /// Compresses a segment again, if one is due. True: and there is more to do at once.
    fn compress_again(&mut self) -> bool {
        let shared = self.shared.clone();
        self.due_again = false;
        if shared.config.cold.is_none() {
            return false;
        }
        // To look for it is part of the work: there may be a million segments.
        let begun = Instant::now();
        let Some(due) = due(&shared) else { return false };
        if !due.more && self.rest_until.is_some_and(|until| begun < until) {
            self.due_again = true;
            return false;
        }
        let done = self.recompressor().is_some_and(|recompressor| recompressor.segment(&shared, due.segment));
        if let Some(until) = &mut self.rest_until {
            let now = Instant::now();
            *until = now + rest_after(now - begun, shared.cpu_percent());
        }
        // What had no room is not tried again at once.
        self.due_again = done;
        done && due.more
    }

    /// None: there is no tier for that, or no memory at this moment.
    fn recompressor(&mut self) -> Option<&mut Recompressor> {
        let shared = &self.shared;
        if let (None, Some(cold)) = (&self.recompressor, shared.config.cold) {
            if self.spare.bytes_for_anybody() >= shared.cost_of_cold() {
                self.recompressor = Some(Recompressor::new(shared, cold));
                self.copier.equip(shared);
            }
        }
        self.recompressor.as_mut()
    }

    /// Seals what survivors went to: nothing more comes.
    pub fn close(&mut self) {
        let shared = self.shared.clone();
        self.copier.appender.close(&shared);
        if let Some(recompressor) = &mut self.recompressor {
            recompressor.appender.close(&shared);
        }
    }

    /// Frees what was retired, after one grace period for as much of it as `lots` holds.
    fn release(&mut self) {
        let s = &*self.shared;
        if !s.segments.any_retired() && !s.map.any_retired() {
            return;
        }
        let mut nodes = s.map.take_retired();
        // Only groups of segments that are known can have a bit set.
        let groups = (grow::known_segments(s) as usize).div_ceil(64).min(s.segments.retired_groups());
        let mut taken = (0..groups).map(|group| (group, s.segments.take_retired(group))).filter(|(_, bits)| *bits != 0);
        loop {
            let (mut lots, mut count) = ([(0, 0); LOTS], 0);
            for lot in taken.by_ref().take(LOTS) {
                lots[count] = lot;
                count += 1;
            }
            if count == 0 && nodes == 0 {
                return;
            }
            s.epochs.wait(nap);
            s.map.release(&s.arena, std::mem::take(&mut nodes));
            for (group, mut bits) in lots.into_iter().take(count) {
                while bits != 0 {
                    let id = SegmentId(group as u32 * 64 + bits.trailing_zeros());
                    if let Some(at) = s.segments.release(&s.arena, id) {
                        s.lower_at(at.tier).expect("what was below lay on a tier of the store").give(at.extent);
                    }
                    bits &= bits - 1;
                }
            }
        }
    }

    /// Looks over the table once: how hard to work, and on what.
    fn choose(&mut self) -> Cleaning {
        let s = &*self.shared;
        self.victims.clear();
        let capacity = s.arena.segment_bytes() as u32;
        let (mut sealed, mut dead) = (0u64, 0u64);
        for id in (0..grow::known_segments(s)).map(SegmentId) {
            let Some((live, used, age)) = s.segments.sealed(&s.arena, id) else { continue };
            let pages = if s.segments.is_raw(&s.arena, id) { 1 } else { s.seen().group_pages };
            let candidate = Candidate { live, used, record: most_total(pages) as u32, age };
            sealed += u64::from(capacity);
            dead += u64::from(gain(&candidate, capacity));
            let Some(w) = worth(&candidate, capacity) else { continue };
            let at = self.victims.partition_point(|(other, _)| *other >= w);
            if at < BATCH {
                self.victims.insert(at, (w, id));
                self.victims.truncate(BATCH);
            }
        }
        let reserve = s.reserve.load(Ordering::Relaxed).max(grow::least_reserve(&s.config));
        // Where movers can make room, cleaning is for what is dead, not for the last byte.
        let growable = grow::growable_frames(s) + s.room_below();
        cleaning(s.arena.frames_ready(), growable, reserve, sealed, dead)
    }

    fn clean(&mut self) {
        for i in 0..self.victims.len() {
            let id = self.victims[i].1;
            if !self.clean_one(id) {
                return;
            }
            if self.shared.arena.frames_ready() < 4 {
                self.release();
            }
        }
    }

    /// False: no room for what is live of it.
    fn clean_one(&mut self, id: SegmentId) -> bool {
        let shared = self.shared.clone();
        let Some(victim) = shared.segments.begin_cleaning(&shared.arena, id) else { return true };
        let (age_s, cold) = shared.segments.past(&shared.arena, id);
        if cold {
            self.recompressor();
        }
        let room = match &mut self.recompressor {
            // What is cold stays so: its survivors go to its own stream.
            Some(own) if cold => {
                std::mem::swap(&mut self.copier.appender, &mut own.appender);
                let room = move_survivors(&mut self.copier, &shared, victim, age_s);
                std::mem::swap(&mut self.copier.appender, &mut own.appender);
                room
            }
            _ => move_survivors(&mut self.copier, &shared, victim, age_s),
        };
        shared.segments.end_cleaning(&shared.arena, id);
        shared.cleaned.fetch_add(room.into(), Ordering::Relaxed);
        room
    }
}

fn move_survivors(copier: &mut Copier, s: &Shared, victim: Open, age_s: u32) -> bool {
    let record = |at| s.segments.record(&s.arena, victim.frame, at);
    copier.copy(s, victim.segment, victim.used, age_s, record)
}
