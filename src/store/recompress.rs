//! Compressing again what has long lain still: the pages of a segment, sorted, in groups of up to sixteen
//! contiguous ones, by a codec that is slower and denser than the one that took them in.
//!
//! Story of one segment: the oldest that is sealed and not cold; claimed as for cleaning; its live pages
//! are listed and sorted by number; each run is decoded, compressed as one record into a segment that is
//! marked cold, and each slot exchanged from the very word that was seen (`survivors.rs` argues why that
//! loses nothing). What does not compress goes as it is, alone. Then the segment is empty and retired.
//!
//! This runs in the cleaner's thread, after cleaning, which matters more. While memory is not short it takes no more
//! than a share of one processor: a segment, some tens of milliseconds, and then rest in proportion. The
//! slower codec is paid for by whoever reads such a page; a page that is written again is hot again.

use super::append::{Appender, Outcome};
use super::survivors::{relocate, word_of};
use super::{Shared, Store};
use crate::codec::{Codec, FILL, RAW};
use crate::config::Cold;
use crate::log::policy::{recompression, Heat, Recompression};
use crate::log::record::{Header, MAX_GROUP};
use crate::log::segment::Open;
use crate::map::{Slot, Stored};
use crate::page::{PageNo, SegmentId, VolumeId, PAGE_BYTES};
use std::sync::atomic::Ordering;

/// Pages sorted at a time: more than a segment of 1 MiB usually holds.
const BATCH: usize = 2048;

/// A live page of the segment: its number within all volumes, the word that names it.
#[derive(Clone, Copy)]
struct Live {
    at: u64,
    word: Slot,
    stored: Stored,
}

impl Live {
    fn volume(&self) -> VolumeId {
        VolumeId((self.at >> 32) as u16)
    }

    fn page(&self) -> PageNo {
        PageNo(self.at as u32)
    }
}

/// What is to be compressed again now: the oldest segment that is sealed and not cold.
pub(super) struct Due {
    pub segment: SegmentId,
    /// And there is more to do at once: memory is short, or somebody asked.
    pub more: bool,
}

pub(super) fn due(s: &Shared) -> Option<Due> {
    let all = s.recompress_all.load(Ordering::Relaxed);
    let found = look(s);
    if found.is_none() {
        s.recompress_all.store(false, Ordering::Relaxed);
    }
    let (segment, heat) = found?;
    let how = if all { Recompression::Fully } else { recompression(&heat) };
    (how != Recompression::Rest).then_some(Due { segment, more: how == Recompression::Fully })
}

/// The oldest, and what the policy is to know.
fn look(s: &Shared) -> Option<(SegmentId, Heat)> {
    let (mut oldest, mut count) = (None, 0u64);
    for id in (0..super::grow::known_segments(s)).map(SegmentId) {
        let Some((_, _, age)) = s.segments.sealed(&s.arena, id) else { continue };
        let (written, cold) = s.segments.past(&s.arena, id);
        if cold {
            continue;
        }
        count += 1;
        // Of those of one second the one that was sealed first.
        let key = (written, std::cmp::Reverse(age));
        if oldest.is_none_or(|(least, _)| key < least) {
            oldest = Some((key, id));
        }
    }
    let ((written, _), id) = oldest?;
    let heat = Heat {
        hot_bytes: count * s.arena.segment_bytes() as u64,
        hot_limit: s.hot_limit(),
        held_bytes: s.held_bytes(),
        limit_bytes: s.limit_bytes(),
        oldest_s: s.clock_s.load(Ordering::Relaxed).saturating_sub(written),
        idle_s: s.idle_s(),
    };
    Some((id, heat))
}

impl Store {
    /// Has all that is not cold yet compressed again, whatever its age, as far as it is sealed. False: the
    /// store has no tier for that.
    pub fn recompress(&self) -> bool {
        let s = self.shared();
        s.recompress_all.store(s.config.cold.is_some(), Ordering::Relaxed);
        s.wake_cleaner();
        s.config.cold.is_some()
    }
}

pub(super) struct Recompressor {
    pub appender: Appender,
    cold: Cold,
    batch: Vec<Live>,
    plain: Box<[u8]>,
    /// The group decoded last, and its offset.
    group: Box<[u8]>,
    group_at: Option<usize>,
}

impl Recompressor {
    /// Makes it, and what reading takes that is compressed again.
    pub fn new(shared: &Shared, cold: Cold) -> Recompressor {
        let codec = Codec::new(cold.codec, shared.seen().codecs);
        shared.begin_cold(cold);
        let room = |pages: usize| vec![0xa5; pages * PAGE_BYTES].into_boxed_slice();
        // Every page of it touched now.
        let nothing = Stored { segment: SegmentId(1), offset: 1, index: 1, share: 1 };
        let mut batch = vec![Live { at: 1, word: Slot(1), stored: nothing }; BATCH];
        batch.clear();
        Recompressor {
            appender: Appender::cold(shared, codec),
            cold,
            batch,
            plain: room(cold.group_pages),
            group: room(shared.seen().group_pages),
            group_at: None,
        }
    }

    /// Compresses one segment again. False: no room, or somebody was faster. What was not moved stays.
    pub fn segment(&mut self, s: &Shared, id: SegmentId) -> bool {
        let Some(victim) = s.segments.begin_cleaning(&s.arena, id) else { return false };
        self.appender.age_s = Some(s.segments.past(&s.arena, id).0);
        self.appender.place(s, s.segments.placement(&s.arena, id));
        self.group_at = None;
        let mut at = 0;
        let mut room = true;
        while room && at < victim.used {
            at = self.list(s, victim, at);
            room = self.move_batch(s, victim);
        }
        s.segments.end_cleaning(&s.arena, id);
        if room {
            s.recompressed.fetch_add(1, Ordering::Relaxed);
        }
        room
    }

    /// Lists live pages from the record at `at` on, sorted. Returns where it stopped.
    fn list(&mut self, s: &Shared, victim: Open, mut at: usize) -> usize {
        self.batch.clear();
        while at < victim.used && self.batch.len() + MAX_GROUP <= BATCH {
            let (header, _) = record(s, victim, at);
            for i in 0..header.pages {
                let stored =
                    Stored { segment: victim.segment, offset: at as u32, index: i as u32, share: header.share(i) };
                let page = header.page.0 + i as u32;
                let word = Slot::stored(stored);
                if word_of(s, s.cleaner_epoch(), header.volume, PageNo(page)) == word {
                    self.batch.push(Live { at: u64::from(header.volume.0) << 32 | u64::from(page), word, stored });
                }
            }
            at += header.total();
        }
        self.batch.sort_unstable_by_key(|live| live.at);
        at
    }

    /// False: no room.
    fn move_batch(&mut self, s: &Shared, victim: Open) -> bool {
        let mut i = 0;
        let mut alone_until = 0;
        while i < self.batch.len() {
            let first = self.batch[i];
            let (header, bytes) = record(s, victim, first.stored.offset as usize);
            if header.codec == RAW || header.codec == FILL {
                let Outcome::Done(copy) = self.appender.copy(s, header, bytes, victim.dictionary) else { return false };
                relocate(s, s.cleaner_epoch(), first.volume(), first.page(), first.word, copy.slot(0));
                i += 1;
                continue;
            }
            let most = if i < alone_until { 1 } else { self.cold.group_pages };
            let run = self.decode_run(s, victim, i, most);
            match self.appender.pages(s, first.volume(), first.page(), &self.plain[..run * PAGE_BYTES]) {
                Outcome::Done(copy) => {
                    for (k, live) in self.batch[i..i + run].iter().enumerate() {
                        relocate(s, s.cleaner_epoch(), live.volume(), live.page(), live.word, copy.slot(k));
                    }
                    i += run;
                }
                Outcome::Split => alone_until = i + run,
                Outcome::NoRoom => return false,
            }
        }
        true
    }

    /// Decodes contiguous compressed pages from the `i`th on, `most` of them. Returns how many.
    fn decode_run(&mut self, s: &Shared, victim: Open, i: usize, most: usize) -> usize {
        let mut run = 0;
        let with = s.dictionaries.of(victim.dictionary).expect("the dictionary of a claimed segment is in use");
        while run < most && i + run < self.batch.len() {
            let live = self.batch[i + run];
            if live.at != self.batch[i].at + run as u64 || live.volume() != self.batch[i].volume() {
                break;
            }
            let offset = live.stored.offset as usize;
            let (header, bytes) = record(s, victim, offset);
            if run > 0 && (header.codec == RAW || header.codec == FILL) {
                break;
            }
            let payload = &bytes[header.bytes()..];
            let plain = &mut self.plain[run * PAGE_BYTES..(run + 1) * PAGE_BYTES];
            let codec = &mut self.appender.codec;
            let sound = if header.pages == 1 {
                codec.decompress(header.codec, payload, plain, with)
            } else {
                let whole = &mut self.group[..header.pages * PAGE_BYTES];
                let there = self.group_at == Some(offset) || codec.decompress(header.codec, payload, whole, None);
                self.group_at = Some(offset);
                plain.copy_from_slice(&whole[live.stored.index as usize * PAGE_BYTES..][..PAGE_BYTES]);
                there
            };
            assert!(sound, "a record in memory decodes: segment {} offset {offset}", victim.segment.0);
            run += 1;
        }
        run
    }
}

fn record(s: &Shared, victim: Open, at: usize) -> (Header, &[u8]) {
    s.segments.record(&s.arena, victim.frame, at).expect("a sealed segment is records from end to end")
}
