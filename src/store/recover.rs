//! Recovery: taking up an arena that another store left, be it closed or killed at any instruction.
//!
//! The arena's truth is small: the volumes' sizes, the links and slots reached from their roots,
//! and of each segment that a slot names its frame and, if it was sealed, its used bytes. All
//! else (free lists, live bytes, counters, what is open, being cleaned, retired or half taken out)
//! follows from a walk, and is not read but made anew here:
//!
//! 1. what is resident is asked of the kernel, and mapped as far as the walk needs it
//!    (`arena/scan.rs`; growth locks the rest while the store serves already);
//! 2. live bytes are set to zero (`log/rebuild.rs`);
//! 3. dictionaries are looked at, and the maps are walked, thawed and pruned, pages and live bytes counted
//!    (`map/rebuild.rs`); pages of a segment whose dictionary is not what was put there are lost;
//! 4. segments with live bytes are sealed, all others set free;
//! 5. the tiers below are attached, or let go if nothing lies there (`attach.rs`), and their extents noted;
//! 6. resident memory that nobody reached is free: zeroed if it is metadata, given back if torn.
//!
//! Killed at any point, the walk is done again from the start: no step takes away what a later one
//! of a second try needs (the argument stands in docs/ARCHITECTURE.md). An arena that cannot be is
//! refused before 2 or within 3, where nothing but the in-between is changed; one without its tier within 5, where it is
//! as a recovery leaves it that was killed there.

use super::charge::cost;
use crate::arena::{Arena, InArena, Residency, Resident, MOST_DICTIONARIES};
use crate::error::{Error, Result};
use crate::log::rebuild::Table;
use crate::log::segment::{Place, Segments};
use crate::map::{walk, Kind, Map, Reached, Slot, LOST};
use crate::page::{FrameNo, MetaNo, SegmentId, VolumeId, MAX_TIERS_BELOW};
use crate::tier::Lower;
use std::sync::atomic::Ordering;

/// Pages by kind, as counted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Pages {
    pub stored: i64,
    pub filled: i64,
    pub zero: i64,
    pub lost: i64,
}

impl Pages {
    pub fn count(&mut self, word: Slot) {
        match word.kind() {
            Kind::Stored(_) => self.stored += 1,
            Kind::Fill(0) => self.zero += 1,
            Kind::Fill(_) => self.filled += 1,
            Kind::Lost => self.lost += 1,
            Kind::Empty | Kind::Frozen => {}
        }
    }
}

/// What a store goes on with.
pub(super) struct Found {
    /// Resident frames, and metadata pages numbered from 0.
    pub frames: Resident,
    pub meta: Resident,
    /// Segments whose table entries are in use.
    pub known: u32,
    pub pages: Pages,
    pub volumes: usize,
    /// What each of them holds.
    pub held_bytes: Vec<i64>,
    pub dictionaries: Vec<InArena>,
}

impl Found {
    /// What there is in an arena just made: nothing.
    pub fn nothing(arena: &Arena) -> Found {
        Found {
            frames: Resident::new(arena.max_frames()),
            meta: Resident::new(arena.max_meta()),
            known: 0,
            pages: Pages::default(),
            volumes: 0,
            held_bytes: Vec::new(),
            dictionaries: Vec::new(),
        }
    }
}

/// Heap that taking up an arena of so many frames, segments and metadata pages needs at most at a time: its
/// free lists, the bits of what is found, and some for what has one size in every arena.
pub(super) fn heap_bytes([frames, segments, meta]: [usize; 3]) -> usize {
    // Resident, torn, seen in the table twice; in use, retired, three of the disks'; resident, reached.
    let bits = 4 * frames + 5 * segments + 2 * meta;
    4 * frames + bits / 8 + (64 << 10)
}

/// Ids that a store on this arena needs: one for each frame and extent.
pub(super) fn most_ids(arena: &Arena, lower: &[Lower]) -> u32 {
    (arena.max_frames() + lower.iter().map(Lower::extents).sum::<u32>()).min(arena.max_segments())
}

/// Walks an arena and rebuilds everything that is not in it. `attach` hears how many segments are on which tier below.
pub(super) fn recover(
    arena: &Arena,
    segments: &mut Segments,
    map: &Map,
    attach: impl FnOnce([u32; MAX_TIERS_BELOW]) -> Result<Vec<Lower>>,
) -> Result<(Found, Vec<Lower>)> {
    let volumes = arena.volumes()?;
    let mut there = arena.residency()?;
    let entries = there.entries;
    crash_point!("recovery: resident");
    mend(arena, segments, &mut there)?;
    segments.begin_recount(arena, entries)?;
    let mut pages = Pages::default();
    let mut reached = Reached::new(arena, true);
    let (dictionaries, damaged) = arena.find_dictionaries(&there.meta, &mut reached.pages);
    let known = dictionaries.iter().fold(0, |known, one| known | 1 << one.number);
    let of_dictionaries = reached.pages.count();
    let mut held_bytes = vec![0; volumes.len()];
    for (v, held) in held_bytes.iter_mut().enumerate() {
        walk(arena, VolumeId(v as u16), &there.meta, &mut reached, |word| {
            let known = match word.kind() {
                Kind::Stored(at) => segments.recount(arena, entries, at.segment, (at.offset, at.share), known),
                _ => true,
            };
            let word = if known { word } else { LOST };
            pages.count(word);
            *held += cost(word);
            word
        })?;
    }
    map.nodes.store(u64::from(reached.pages.count() - of_dictionaries), Ordering::Relaxed);
    if pages.lost > 0 {
        tracing::error!("{} pages are lost: their slots named segments that cannot be, or be read", pages.lost);
    }
    let table = segments.end_recount(arena, entries)?;
    // No segment has them any more.
    for number in (1..=MOST_DICTIONARIES).filter(|number| damaged >> number & 1 == 1) {
        tracing::error!("dictionary {number} is damaged: pages compressed with it are lost");
        arena.forget_dictionary(number);
    }
    crash_point!("recovery: table rebuilt");
    let lower = attach(table.below)?;
    note_extents(arena, segments, &table, &lower)?;
    let needed = if lower.is_empty() { there.frames.count() } else { most_ids(arena, &lower) };
    let known = table.end.max(needed);
    arena.populate_entries(known)?;
    arena.give_entries_back(known, entries, segments.next_sequence() - 1);
    // One that was in use may have a greater number than any that this store makes.
    segments.make_room(known.max(most_ids(arena, &lower)));
    // The lowest come out first.
    (0..known).rev().filter(|id| !table.ids.has(*id)).for_each(|id| arena.adopt_id(id));
    there.frames.descending().filter(|f| !table.frames.has(*f)).for_each(|f| arena.adopt_frame(FrameNo(f)));
    for f in there.torn.descending() {
        crash_point!("recovery: torn frame there");
        arena.drop_torn_frame(FrameNo(f));
    }
    there.meta.descending().filter(|m| !reached.pages.has(*m)).for_each(|m| arena.adopt_meta(MetaNo(m + 1)));
    let (frames, meta, volumes) = (there.frames, there.meta, volumes.len());
    Ok((Found { frames, meta, known, pages, volumes, held_bytes, dictionaries }, lower))
}

/// Tells the tiers which of their extents are in use.
fn note_extents(arena: &Arena, segments: &Segments, table: &Table, all: &[Lower]) -> Result<()> {
    for id in (0..table.end).filter(|id| table.ids.has(*id)) {
        if let Place::Below(at) = segments.place(arena, SegmentId(id)) {
            let lower =
                all.iter().find(|lower| lower.no == at.tier).expect("all tiers that have segments are attached");
            lower.found(at.extent)?;
        }
    }
    Ok(())
}

/// A frame in use is resident as a whole. Should a part be gone (somebody else punched the file),
/// what was in it does not decode, and that is found when it is read; all else is served.
fn mend(arena: &Arena, segments: &Segments, there: &mut Residency) -> Result<()> {
    for id in 0..there.entries {
        let Some(Place::Memory(f)) = segments.in_use(arena, SegmentId(id)) else { continue };
        if f.0 >= arena.max_frames() {
            return Err(Error::BadArena(format!("segment {id} has frame {}, which cannot be", f.0)));
        }
        if !there.frames.has(f.0) {
            arena.mend_frame(f)?;
            there.frames.set(f.0);
            there.torn.clear(f.0);
        }
    }
    Ok(())
}
