//! The audit: everything the store counts, counted once more from the arena, and compared. What
//! recovery and the running store claim, this checks, down to the pages that the kernel says are
//! resident. Slow and allocating: for tests and for doubts.

use super::charge::cost;
use super::recover::Pages;
use super::{Counters, Shared, Store};
use crate::arena::{Residency, Resident};
use crate::log::segment::Place;
use crate::map::{walk, Kind, Reached};
use crate::page::{SegmentId, TierNo, VolumeId};
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::PoisonError;

impl Store {
    /// Compares all counts with the arena. Err: one line for each that is wrong, or says that
    /// lanes are open, while which nothing can be compared. Background threads rest meanwhile.
    pub fn audit(&self) -> std::result::Result<(), String> {
        let s = self.shared();
        let _growth = s.quiet[0].lock().unwrap_or_else(PoisonError::into_inner);
        let _cleaner = s.quiet[1].lock().unwrap_or_else(PoisonError::into_inner);
        let _movers: Vec<_> =
            s.quiet[2..].iter().map(|quiet| quiet.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        let lanes = s.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if lanes.iter().any(|taken| *taken) {
            return Err("lanes are open".into());
        }
        let there = s.arena.residency().map_err(|e| e.to_string())?;
        let mut wrong = String::new();
        let nodes = maps(s, &there.meta, &mut wrong)?;
        memory(s, &there, nodes, &mut wrong);
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(wrong)
        }
    }
}

fn same(wrong: &mut String, what: &str, claimed: u64, counted: u64) {
    if claimed != counted {
        // Writing to a string cannot fail.
        let _ = writeln!(wrong, "{what}: {claimed} claimed, {counted} counted");
    }
}

/// Pages by kind and live bytes. Returns the metadata pages in use.
fn maps(s: &Shared, resident: &Resident, wrong: &mut String) -> std::result::Result<u64, String> {
    let mut live = vec![0u64; s.known.load(Ordering::Acquire) as usize];
    let (mut pages, mut unknown) = (Pages::default(), 0);
    let mut reached = Reached::new(&s.arena, false);
    let volumes = *s.volumes.lock().unwrap_or_else(PoisonError::into_inner);
    let claimed_nodes = s.map.nodes.load(Ordering::Relaxed);
    // The walk changes nothing here: no discard is under way, so nothing is frozen.
    for v in 0..volumes {
        let mut held = 0;
        let seen = |word: crate::map::Slot| {
            pages.count(word);
            held += cost(word);
            if let Kind::Stored(at) = word.kind() {
                match live.get_mut(at.segment.0 as usize) {
                    Some(live) => *live += u64::from(at.share),
                    None => unknown += 1,
                }
            }
            word
        };
        walk(&s.arena, VolumeId(v as u16), resident, &mut reached, seen).map_err(|e| e.to_string())?;
        let claimed = s.charges.held_bytes(VolumeId(v as u16));
        same(wrong, &format!("bytes of volume {v}"), claimed as u64, held as u64);
    }
    for (id, live) in live.iter().enumerate() {
        let id = id as u32;
        let claimed = s.segments.live(&s.arena, SegmentId(id));
        same(wrong, &format!("live bytes of segment {id}"), u64::from(claimed), *live);
    }
    same(wrong, "pages in segments that are not known", 0, unknown);
    let sum = |f: fn(&Counters) -> &AtomicI64| s.counters.iter().map(|c| f(c).load(Ordering::Relaxed)).sum::<i64>();
    same(wrong, "stored pages", sum(|c| &c.stored_pages) as u64, pages.stored as u64);
    same(wrong, "filled pages", sum(|c| &c.filled_pages) as u64, pages.filled as u64);
    same(wrong, "zero pages", sum(|c| &c.zero_pages) as u64, pages.zero as u64);
    same(wrong, "lost pages", sum(|c| &c.lost_pages) as u64, pages.lost as u64);
    same(wrong, "map nodes", claimed_nodes, u64::from(reached.pages.count()));
    Ok(claimed_nodes)
}

/// No extent holds two segments, and none lies where the tier has none.
fn twice(s: &Shared, no: TierNo, places: &[Place], wrong: &mut String) {
    let Some(lower) = s.lower_at(no) else { return };
    let mut seen = Resident::new(lower.extents());
    for place in places {
        let Place::Below(at) = place else { continue };
        if at.tier == no && at.extent.0 < lower.extents() && !seen.has(at.extent.0) {
            seen.set(at.extent.0);
        }
    }
    same(wrong, &format!("different extents of disk tier {}", no.0), u64::from(lower.taken()), seen.count().into());
}

/// Every resident page is in use, or free and on its stack.
fn memory(s: &Shared, there: &Residency, nodes: u64, wrong: &mut String) {
    let held_frames = u64::from(s.held_frames.load(Ordering::Relaxed));
    let held_meta = u64::from(s.held_meta.load(Ordering::Relaxed));
    let known = s.known.load(Ordering::Acquire);
    let places: Vec<Place> = (0..known).filter_map(|id| s.segments.in_use(&s.arena, SegmentId(id))).collect();
    let used = places.len() as u64;
    let on = |no| places.iter().filter(|place| matches!(place, Place::Below(at) if at.tier == no)).count() as u64;
    for no in TierNo::all() {
        let taken = s.lower_at(no).map_or(0, |lower| u64::from(lower.taken()));
        same(wrong, &format!("extents in use of disk tier {}", no.0), taken, on(no));
        twice(s, no, &places, wrong);
    }
    let below = places.iter().filter(|place| matches!(place, Place::Below(_))).count() as u64;
    same(wrong, "frames used and ready", used - below + u64::from(s.arena.frames_ready()), held_frames);
    same(wrong, "frames resident", held_frames, u64::from(there.frames.count()));
    same(wrong, "frames torn", 0, u64::from(there.torn.count()));
    same(wrong, "segment ids", u64::from(known), used + u64::from(s.arena.ids_ready()));
    let unknown = (0..known).map(SegmentId).filter(|id| s.segments.in_use(&s.arena, *id).is_some());
    let unknown = unknown.filter(|id| s.dictionaries.of(s.segments.dictionary(&s.arena, *id)).is_none()).count();
    same(wrong, "segments whose dictionary is not there", 0, unknown as u64);
    let waiting = u64::from(s.map.waiting(&s.arena)) + s.arena.dictionary_pages() as u64;
    let ready = u64::from(s.arena.meta_ready());
    same(wrong, "metadata used, retired, of dictionaries and ready", nodes + waiting + ready, held_meta);
    same(wrong, "metadata resident", held_meta, u64::from(there.meta.count()));
}
