//! The cleaner: makes room by copying what is live out of segments that are mostly dead.
//!
//! Story of one victim: choose by cost-benefit; claim it; walk its records; for each page ask the
//! map whether the page's slot still names this very record; append the live ones as survivors;
//! exchange each slot from the old word to the new one (a page written meanwhile keeps its newer
//! word and the copy is dead); set the victim free. It is reused after a grace period.
//!
//! A claimed segment cannot be reused, so a slot word that names it cannot come back with another
//! meaning: the exchange has no ABA.

use super::append::{Appender, Outcome};
use super::recompress::Recompressor;
use super::{grow, Shared};
use crate::log::policy::{cleaning, worth, Candidate, Cleaning};
use crate::log::record::{Header, MAX_GROUP};
use crate::log::segment::Open;
use crate::map::{self, swap_if, Slot, Stored};
use crate::page::{PageNo, SegmentId, VolumeId, PAGE_BYTES};
use crate::sync::yield_now;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Victims taken from one look over the table.
const BATCH: usize = 8;
const NAP: Duration = Duration::from_millis(50);

pub(super) struct Cleaner {
    shared: Arc<Shared>,
    appender: Appender,
    victims: Vec<(f64, u32)>,
    plain: Box<[u8]>,
    recompressor: Option<Recompressor>,
}

impl Cleaner {
    pub fn new(shared: Arc<Shared>) -> Cleaner {
        let plain = vec![0xa5; shared.config.group_pages_seen * PAGE_BYTES].into_boxed_slice();
        let recompressor = shared.config.cold.map(|cold| Recompressor::new(&shared, cold));
        let appender = Appender::new(&shared, 0);
        Cleaner { appender, victims: Vec::with_capacity(BATCH + 1), plain, recompressor, shared }
    }

    pub fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            if !self.step() {
                std::thread::park_timeout(NAP);
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
        let more = match &mut self.recompressor {
            Some(recompressor) if how != Cleaning::Urgent || !cleaned => recompressor.step(&shared),
            _ => false,
        };
        self.release();
        cleaned || more
    }

    /// Seals what survivors went to: nothing more comes.
    pub fn close(&mut self) {
        let shared = self.shared.clone();
        self.appender.close(&shared);
        if let Some(recompressor) = &mut self.recompressor {
            recompressor.appender.close(&shared);
        }
    }

    /// Frees what was retired, after one grace period for all of it.
    fn release(&mut self) {
        let s = &*self.shared;
        if !s.segments.any_retired() && !s.map.any_retired() {
            return;
        }
        let nodes = s.map.take_retired();
        // Only groups of segments that are known can have a bit set.
        let groups = (grow::known_segments(s) as usize).div_ceil(64).min(s.segments.retired_groups());
        for group in 0..groups.max(1) {
            let mut bits = s.segments.take_retired(group);
            if bits == 0 && !(group == 0 && nodes != 0) {
                continue;
            }
            s.epochs.wait(yield_now);
            if group == 0 {
                s.map.release(&s.arena, nodes);
            }
            while bits != 0 {
                s.segments.release(&s.arena, SegmentId(group as u32 * 64 + bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    /// Looks over the table once: how hard to work, and on what.
    fn choose(&mut self) -> Cleaning {
        let s = &*self.shared;
        self.victims.clear();
        let capacity = s.arena.segment_bytes() as u32;
        let (mut sealed, mut live_all) = (0u64, 0u64);
        for id in 0..grow::known_segments(s) {
            let Some((live, _, age)) = s.segments.sealed(&s.arena, SegmentId(id)) else { continue };
            sealed += u64::from(capacity);
            live_all += u64::from(live);
            let Some(w) = worth(&Candidate { live, age }, capacity) else { continue };
            let at = self.victims.partition_point(|(other, _)| *other >= w);
            if at < BATCH {
                self.victims.insert(at, (w, id));
                self.victims.truncate(BATCH);
            }
        }
        let reserve = s.reserve.load(Ordering::Relaxed).max(grow::least_reserve(&s.config));
        cleaning(s.arena.frames_ready(), grow::growable_frames(s), reserve, sealed, live_all)
    }

    fn clean(&mut self) {
        for i in 0..self.victims.len() {
            let id = SegmentId(self.victims[i].1);
            let shared = self.shared.clone();
            let Some(victim) = shared.segments.begin_cleaning(&shared.arena, id) else { continue };
            let (age_s, cold) = shared.segments.past(&shared.arena, id);
            let room = match &mut self.recompressor {
                // What is cold stays so: its survivors go to its own stream.
                Some(own) if cold => {
                    std::mem::swap(&mut self.appender, &mut own.appender);
                    let room = self.move_survivors(&shared, victim, age_s);
                    if let Some(own) = &mut self.recompressor {
                        std::mem::swap(&mut self.appender, &mut own.appender);
                    }
                    room
                }
                _ => self.move_survivors(&shared, victim, age_s),
            };
            shared.segments.end_cleaning(&shared.arena, id);
            if !room {
                return;
            }
            shared.cleaned.fetch_add(1, Ordering::Relaxed);
            if shared.arena.frames_ready() < 4 {
                self.release();
            }
        }
    }

    /// Copies the live records of a victim. False: no room for them; what was not copied stays.
    fn move_survivors(&mut self, s: &Shared, victim: Open, age_s: u32) -> bool {
        self.appender.age_s = Some(age_s);
        let mut at = 0;
        while at < victim.used {
            let (header, record) =
                s.segments.record(&s.arena, victim.frame, at).expect("a sealed segment is records from end to end");
            if !self.move_record(s, victim, at, header, record) {
                return false;
            }
            at += header.total();
        }
        true
    }

    fn move_record(&mut self, s: &Shared, victim: Open, offset: usize, header: Header, record: &[u8]) -> bool {
        let word = |i: usize| {
            Slot::stored(Stored {
                segment: victim.segment,
                offset: offset as u32,
                index: i as u32,
                share: header.share(i),
            })
        };
        let mut live = [false; MAX_GROUP];
        for (i, l) in live.iter_mut().enumerate().take(header.pages) {
            *l = word_of(s, header.volume, page(header, i)) == word(i);
        }
        let count = live.iter().filter(|l| **l).count();
        if count == 0 {
            return true;
        }
        if count == header.pages {
            let Outcome::Done(copy) = self.appender.copy(s, header, record) else { return false };
            (0..header.pages).for_each(|i| relocate(s, header.volume, page(header, i), word(i), copy.slot(i)));
            return true;
        }
        // A group of which some pages died: the rest is compressed anew.
        let whole = header.pages * PAGE_BYTES;
        let mut plain = std::mem::take(&mut self.plain);
        let sound = self.appender.codec.decompress(header.codec, &record[header.bytes()..], &mut plain[..whole]);
        assert!(sound, "a record in memory decodes: segment {} offset {offset}", victim.segment.0);
        let moved = self.move_rest(s, header, &live, &plain[..whole], word);
        self.plain = plain;
        moved
    }

    fn move_rest(
        &mut self,
        s: &Shared,
        header: Header,
        live: &[bool; MAX_GROUP],
        plain: &[u8],
        word: impl Fn(usize) -> Slot,
    ) -> bool {
        let mut i = 0;
        let mut alone_until = 0;
        while i < header.pages {
            let most = if i < alone_until { 1 } else { header.pages - i };
            let run = live[i..i + most].iter().take_while(|l| **l).count();
            if run == 0 {
                i += 1;
                continue;
            }
            let bytes = &plain[i * PAGE_BYTES..(i + run) * PAGE_BYTES];
            match self.appender.pages(s, header.volume, page(header, i), bytes) {
                Outcome::Done(copy) => {
                    (0..run).for_each(|k| relocate(s, header.volume, page(header, i + k), word(i + k), copy.slot(k)));
                    i += run;
                }
                Outcome::Split => alone_until = i + run,
                Outcome::NoRoom => return false,
            }
        }
        true
    }
}

fn page(header: Header, i: usize) -> PageNo {
    PageNo(header.page.0 + i as u32)
}

/// What names a page now.
pub(super) fn word_of(s: &Shared, volume: VolumeId, page: PageNo) -> Slot {
    let lane = s.config.max_lanes;
    s.epochs.enter(lane);
    let word = map::load(&s.map, &s.arena, volume, page);
    s.epochs.leave(lane);
    word
}

/// Points a page's slot to its copy, if it still names the original.
pub(super) fn relocate(s: &Shared, volume: VolumeId, page: PageNo, old: Slot, new: Slot) {
    let lane = s.config.max_lanes;
    s.epochs.enter(lane);
    let leaf = s.map.leaf(&s.arena, volume, page.cluster());
    crash_point!("clean: copied, slot names the original");
    let moved = leaf.is_some_and(|leaf| swap_if(&leaf[page.slot()], old, new));
    s.epochs.leave(lane);
    crash_point!("clean: slot names the copy");
    // Exactly one of the two words is out of use now.
    let map::Kind::Stored(dead) = (if moved { old } else { new }).kind() else { return };
    s.segments.take_live(&s.arena, dead.segment, dead.share);
}
