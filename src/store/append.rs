//! Appending: a run of pages becomes one record at the end of an open segment. Used by lanes for
//! what is written and by the cleaner for survivors. Owns all the memory it needs.

use super::Shared;
use crate::arena::Arena;
use crate::codec::{self, most_payload, Codec, Decoder};
use crate::config::Checked;
use crate::log::record::{Header, GROUP_HEADER, MAX_GROUP, SINGLE_HEADER};
use crate::log::segment::{Kind, Open};
use crate::map::{Slot, Stored};
use crate::page::{PageNo, Placement, VolumeId, PAGE_BYTES};
use std::sync::atomic::Ordering;

/// Frames that all others leave for the cleaner, so that it can always make room: one for each of its
/// streams. Lanes leave as many for the one that compresses again, if there is one.
pub(super) const KEEP_FOR_CLEANER: u32 = 2;

/// Frames that lanes leave: as many for each mover.
pub(super) fn kept_by_lanes(config: &Checked) -> u32 {
    KEEP_FOR_CLEANER * (1 + u32::from(config.cold.is_some()) + config.below.len() as u32)
}

/// Streams keep apart what will die or move at different times.
#[derive(Clone, Copy)]
enum Stream {
    Compressed = 0,
    /// Incompressible pages: the first to go down to lower tiers.
    Raw = 1,
}

/// A record that was appended but that no slot names yet. Its bytes count as live.
#[derive(Clone, Copy)]
pub(super) struct Appended {
    open: Open,
    header: Header,
}

impl Appended {
    /// The slot word for page `index` of the record.
    pub fn slot(&self, index: usize) -> Slot {
        Slot::stored(Stored {
            segment: self.open.segment,
            offset: self.open.used as u32,
            index: index as u32,
            share: self.header.share(index),
        })
    }
}

/// What came of appending.
pub(super) enum Outcome {
    Done(Appended),
    /// The run does not compress as one record: append its pages alone. Of a record that is to be copied: the segment has
    /// another dictionary, so its page is to be compressed anew.
    Split,
    /// No free frame at this moment.
    NoRoom,
}

pub(super) struct Appender {
    pub codec: Codec,
    open: [Option<Open>; 2],
    /// Where a payload is made when the open segment's tail may be too short for it.
    scratch: Box<[u8]>,
    /// Frames to leave for others.
    keep: u32,
    /// What it writes is cold.
    cold: bool,
    /// Single pages that it compresses by zstd are compressed with a dictionary, if there is one.
    uses_dictionaries: bool,
    /// Pages compressed with one since a segment was sealed last.
    with_dictionary: u64,
    /// Where what it writes may lie.
    placement: Placement,
    /// When what it writes was first written; None: now.
    pub age_s: Option<u32>,
}

impl Appender {
    pub fn new(shared: &Shared, keep: u32) -> Appender {
        let codec = Codec::new(shared.config.codec, shared.seen().codecs);
        let uses_dictionaries = shared.config.dict_bytes > 0;
        Appender { uses_dictionaries, ..Appender::with(shared, codec, keep) }
    }

    /// One that compresses pages again, by `codec`. It leaves to the cleaner what that needs.
    pub fn cold(shared: &Shared, codec: Codec) -> Appender {
        let uses_dictionaries = shared.config.cold.is_some_and(|cold| cold.dict_bytes > 0);
        Appender { cold: true, uses_dictionaries, ..Appender::with(shared, codec, KEEP_FOR_CLEANER) }
    }

    fn with(shared: &Shared, codec: Codec, keep: u32) -> Appender {
        let scratch = vec![0xa5; shared.seen().group_pages * PAGE_BYTES].into_boxed_slice();
        Appender {
            codec,
            open: [None; 2],
            scratch,
            keep,
            cold: false,
            uses_dictionaries: false,
            with_dictionary: 0,
            placement: Placement::Anywhere,
            age_s: None,
        }
    }

    /// For records that may be longer from here on, or of another codec. Its scratch is exchanged for a longer one.
    pub fn exchange(&mut self, decoder: &mut Option<Decoder>, scratch: &mut Box<[u8]>) {
        self.codec.exchange(decoder);
        if scratch.len() > self.scratch.len() {
            std::mem::swap(&mut self.scratch, scratch);
        }
    }

    /// Where what comes next may lie. Lanes within an epoch.
    pub fn place(&mut self, s: &Shared, placement: Placement) {
        if placement != self.placement {
            self.close(s);
            self.placement = placement;
        }
    }

    fn seal(&mut self, s: &Shared, open: Open) -> bool {
        if self.with_dictionary > 0 {
            let pages = std::mem::take(&mut self.with_dictionary);
            s.dictionaries.pages.fetch_add(pages, Ordering::Relaxed);
        }
        s.segments.seal(&s.arena, open, self.age_s(s))
    }

    fn age_s(&self, s: &Shared) -> u32 {
        self.age_s.unwrap_or_else(|| s.clock_s.load(Ordering::Relaxed))
    }

    /// Appends 1 to 16 contiguous pages as one record, compressed if that pays.
    pub fn pages(&mut self, s: &Shared, v: VolumeId, first: PageNo, plain: &[u8]) -> Outcome {
        let pages = plain.len() / PAGE_BYTES;
        debug_assert!((1..=MAX_GROUP).contains(&pages));
        let header_bytes = if pages == 1 { SINGLE_HEADER } else { GROUP_HEADER };
        let most = most_payload(plain.len());
        let Some(open) = self.room(s, Stream::Compressed, header_bytes + 1) else { return Outcome::NoRoom };
        let left = s.arena.segment_bytes() - open.used;
        let header = |(codec, payload)| Header { page: first, volume: v, pages, codec, payload };
        // A group is made without one: it has enough to refer to in itself (docs/BENCHMARKS.md).
        let number = if pages == 1 { open.dictionary } else { 0 };
        let with = s.dictionaries.of(number).expect("the dictionary of an open segment is in use");
        self.with_dictionary += u64::from(with.is_some());
        if left >= header_bytes + most {
            // The usual case: compress to where it stays.
            let tail = s.arena.open_tail(open.frame, open.used, header_bytes + most);
            if let Some(packed) = self.codec.compress(plain, &mut tail[header_bytes..], with) {
                return Outcome::Done(self.commit_tail(s, Stream::Compressed, open, header(packed)));
            }
        } else if let Some(packed) = self.codec.compress(plain, &mut self.scratch[..most], with) {
            let header = header(packed);
            let Some(open) = self.room(s, Stream::Compressed, header.total()) else { return Outcome::NoRoom };
            if needs(&header) && open.dictionary != number {
                // That is a new one, of a new dictionary, with room for whatever comes of it.
                return self.pages(s, v, first, plain);
            }
            payload_to(&s.arena, open, &header).copy_from_slice(&self.scratch[..header.payload]);
            return Outcome::Done(self.commit_tail(s, Stream::Compressed, open, header));
        }
        if pages > 1 {
            return Outcome::Split;
        }
        self.payload(s, Stream::Raw, header((codec::RAW, PAGE_BYTES)), plain)
    }

    /// Appends a page that one 8-byte pattern fills.
    pub fn fill(&mut self, s: &Shared, v: VolumeId, page: PageNo, pattern: u64) -> Outcome {
        let header = Header { page, volume: v, pages: 1, codec: codec::FILL, payload: 8 };
        self.payload(s, Stream::Compressed, header, &pattern.to_le_bytes())
    }

    /// Appends a record that exists already, as it is. `dictionary`: that of its segment.
    pub fn copy(&mut self, s: &Shared, header: Header, record: &[u8], dictionary: u8) -> Outcome {
        if needs(&header) {
            let Some(open) = self.room(s, Stream::Compressed, header.total()) else { return Outcome::NoRoom };
            if open.dictionary != dictionary {
                return Outcome::Split;
            }
        }
        let stream = if header.codec == codec::RAW { Stream::Raw } else { Stream::Compressed };
        self.payload(s, stream, header, &record[header.bytes()..])
    }

    fn payload(&mut self, s: &Shared, stream: Stream, header: Header, payload: &[u8]) -> Outcome {
        let Some(open) = self.room(s, stream, header.total()) else { return Outcome::NoRoom };
        payload_to(&s.arena, open, &header).copy_from_slice(payload);
        Outcome::Done(self.commit_tail(s, stream, open, header))
    }

    /// Ends a record whose payload stands in the tail: from here on its bytes count.
    fn commit_tail(&mut self, s: &Shared, stream: Stream, open: Open, header: Header) -> Appended {
        crash_point!("append: payload without header");
        header.write(s.arena.open_tail(open.frame, open.used, header.bytes()));
        crash_point!("append: record complete, not counted");
        s.segments.add_live(&s.arena, open.segment, header.total() as u32);
        self.open[stream as usize] = Some(Open { used: open.used + header.total(), ..open });
        Appended { open, header }
    }

    /// The stream's open segment with at least `bytes` left, a new one if need be.
    fn room(&mut self, s: &Shared, stream: Stream, bytes: usize) -> Option<Open> {
        let place = &mut self.open[stream as usize];
        if let Some(open) = *place {
            if s.arena.segment_bytes() - open.used >= bytes {
                return Some(open);
            }
            *place = None;
            if self.seal(s, open) {
                s.wake_cleaner();
            }
        }
        let dictionary = self.dictionary(s, stream);
        let kind = Kind { cold: self.cold, raw: matches!(stream, Stream::Raw), placement: self.placement, dictionary };
        let opened = s.segments.open(&s.arena, self.keep, kind, self.age_s(s));
        let place = &mut self.open[stream as usize];
        *place = opened;
        s.frames_taken.fetch_add(u64::from(place.is_some()), Ordering::Relaxed);
        let ready = s.arena.frames_ready();
        let reserve = s.reserve.load(Ordering::Relaxed);
        if ready <= reserve / 2 + 2 {
            s.wake_growth();
            s.wake_cleaner();
            s.wake_movers();
        }
        *place
    }

    /// What a segment that is opened now has for its single pages.
    fn dictionary(&self, s: &Shared, stream: Stream) -> u8 {
        if !self.uses_dictionaries || matches!(stream, Stream::Raw) {
            return 0;
        }
        let number = s.dictionaries.current();
        let taken = s.dictionaries.get(number).is_some_and(|one| self.codec.takes(&one.dictionary));
        if taken {
            number
        } else {
            0
        }
    }

    /// Seals what is open with a dictionary that no new segment gets: it could not be dropped while that is open, and
    /// who knows when more comes.
    pub fn close_old(&mut self, s: &Shared) {
        let current = s.dictionaries.current();
        let is_old = |open: &Open| open.dictionary != 0 && open.dictionary != current;
        for place in 0..self.open.len() {
            if let Some(open) = self.open[place].take_if(|open| is_old(open)) {
                self.seal(s, open);
            }
        }
    }

    /// Seals what is open: nothing more comes.
    pub fn close(&mut self, s: &Shared) {
        for open in std::mem::take(&mut self.open).into_iter().flatten() {
            self.seal(s, open);
        }
        s.wake_cleaner();
    }
}

/// Whether a record can be read only with the dictionary, or without one, that its segment has.
fn needs(header: &Header) -> bool {
    header.pages == 1 && header.codec == codec::ZSTD
}

fn payload_to<'a>(arena: &'a Arena, open: Open, header: &Header) -> &'a mut [u8] {
    arena.open_tail(open.frame, open.used + header.bytes(), header.payload)
}
