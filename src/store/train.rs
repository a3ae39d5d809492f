//! Training dictionaries from what is stored.
//!
//! Story of one: pages are taken from segments in memory, spread over all of them, each segment claimed as for cleaning
//! while it is looked at; four in five are learned from, the fifth is to judge by: it must be worth having there
//! (`log/policy.rs`, `is_better`), or it is thrown away. Then it is taken into use (`dictionaries.rs`).
//!
//! This is done by the cleaner's thread when nothing waits for it, with memory that the host can spare at that moment and
//! that goes back to it afterwards, and no more often than the share of a processor allows that compressing again has.
//! Some tens of milliseconds each.
//!
//! What a dictionary has learned stays in the arena until no page needs it: pieces of pages that may have been discarded
//! meanwhile.

use super::{grow, Shared, Store};
use crate::arena::Spare;
use crate::codec::{most_payload, train, Codec, Dictionary, TRAINING_BYTES, ZSTD};
use crate::config::{CodecChoice, CPU_PERCENT};
use crate::log::policy::{is_better, rest_after, training, Learned, Lesson, Trial};
use crate::log::record::MAX_GROUP;
use crate::log::segment::Open;
use crate::page::{SegmentId, PAGE_BYTES};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Pages taken at most, and fewer than which nothing is learned from.
const SAMPLES: usize = 640;
const LEAST_SAMPLES: usize = 60;
/// One in so many is to judge by.
const JUDGES: usize = 5;

/// How often to look whether there is something to learn, and until there was: what is written before has no dictionary.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const FIRST_LOOK_EVERY: Duration = Duration::from_millis(50);
/// Or so many times as long as it took.
const FIRST_LOOK_PAUSES: u32 = 20;

impl Store {
    /// Has a dictionary trained from what is stored, however little and whatever there was before; it is taken into use
    /// if it is better. False: no tier uses any.
    pub fn train_dictionary(&self) -> bool {
        let s = self.shared();
        let used = s.config.most_dict_bytes() > 0;
        s.dictionaries.train_now.store(used, Ordering::Relaxed);
        s.wake_cleaner();
        used
    }
}

/// What is remembered from one training to the next.
pub(super) struct Trainer {
    /// When the last one was, or this store was opened, the number that segments were sealed with then, and what there
    /// was to learn from.
    last: Option<(Instant, u64, u64)>,
    /// Trainings in a row that came to nothing while no dictionary is in use. Each learns from other pages.
    in_vain: u32,
    rest_until: Option<Instant>,
    /// The last one found no memory: even who asks for another waits until then.
    no_memory_until: Option<Instant>,
}

impl Trainer {
    pub fn new(s: &Shared) -> Trainer {
        // The one that is there already is as good as one just trained.
        let has_one = s.dictionaries.current() != 0;
        Trainer {
            last: has_one.then(|| (Instant::now(), s.segments.next_sequence(), u64::MAX)),
            in_vain: 0,
            rest_until: None,
            no_memory_until: None,
        }
    }

    /// Trains one, if it is time to. True: it did, be it better or not.
    pub fn step(&mut self, s: &Shared, spare: &mut Spare) -> bool {
        if s.config.most_dict_bytes() == 0 {
            return false;
        }
        let by_hand = s.dictionaries.train_now.load(Ordering::Relaxed);
        let begun = Instant::now();
        let rests = |until: Option<Instant>| until.is_some_and(|until| begun < until);
        if !by_hand && rests(self.rest_until) || rests(self.no_memory_until) {
            return false;
        }
        let lesson = self.lesson(s, begun);
        let first = FIRST_LOOK_EVERY.max(begun.elapsed() * FIRST_LOOK_PAUSES);
        self.rest_until = Some(begun + if self.last.is_some() { LOOK_EVERY } else { first });
        if !by_hand && !training(&lesson) || s.dictionaries.free_number().is_none() {
            return false;
        }
        if spare.bytes_for_anybody() < cost(s) {
            return false;
        }
        s.dictionaries.train_now.store(false, Ordering::Relaxed);
        match learn(s, spare, self.in_vain as usize) {
            Some(better) => {
                let has_none = !better && s.dictionaries.current() == 0;
                self.in_vain = if has_none { self.in_vain.saturating_add(1) } else { 0 };
                self.last = Some((begun, s.segments.next_sequence(), lesson.stored_bytes));
                s.dictionaries.refused.fetch_add((!better).into(), Ordering::Relaxed);
            }
            None => {
                // Who asked for it still waits.
                s.dictionaries.train_now.fetch_or(by_hand, Ordering::Relaxed);
                self.no_memory_until = Some(Instant::now() + LOOK_EVERY);
            }
        }
        let percent = if s.config.cold.is_some() { s.cpu_percent() } else { CPU_PERCENT };
        let now = Instant::now();
        self.rest_until = Some(now + rest_after(now - begun, percent).max(LOOK_EVERY));
        true
    }

    fn lesson(&self, s: &Shared, now: Instant) -> Lesson {
        let segment_bytes = s.arena.segment_bytes() as u64;
        Lesson {
            stored_bytes: eligible(s).map(|(_, live)| u64::from(live)).sum(),
            last: self.last.map(|(then, sequence, from_bytes)| Learned {
                from_bytes,
                seconds: (now - then).as_secs(),
                sealed_bytes: s.segments.next_sequence().saturating_sub(sequence) * segment_bytes,
                in_vain: self.in_vain,
            }),
        }
    }
}

/// Memory that one takes while it is trained, and after: of the latter what is made of it is a part.
fn cost(s: &Shared) -> u64 {
    let dictionary = Dictionary::memory_bytes(s.config.most_dict_bytes(), &s.config.dict_levels());
    ((SAMPLES + MAX_GROUP) * PAGE_BYTES + 2 * dictionary) as u64 + TRAINING_BYTES
}

/// Pages of what is stored.
struct Samples {
    /// To learn from.
    known: Vec<u8>,
    /// To judge by.
    judges: Vec<u8>,
    /// Which pages are taken: others for each other number.
    choice: usize,
}

impl Samples {
    fn new(choice: usize) -> Samples {
        let judges = SAMPLES.div_ceil(JUDGES);
        let room = |pages| Vec::with_capacity(pages * PAGE_BYTES);
        Samples { known: room(SAMPLES - judges), judges: room(judges), choice }
    }

    fn count(&self) -> usize {
        (self.known.len() + self.judges.len()) / PAGE_BYTES
    }

    fn take(&mut self, page: &[u8]) {
        match self.count() {
            SAMPLES.. => {}
            n if (n + self.choice) % JUDGES == 0 => self.judges.extend_from_slice(page),
            _ => self.known.extend_from_slice(page),
        }
    }
}

/// Segments that can be learned from, and what is live of them.
fn eligible(s: &Shared) -> impl Iterator<Item = (SegmentId, u32)> + '_ {
    (0..grow::known_segments(s)).map(SegmentId).filter_map(|id| {
        let (live, _, _) = s.segments.sealed(&s.arena, id)?;
        (live > 0 && !s.segments.is_raw(&s.arena, id)).then_some((id, live))
    })
}

/// False: nothing better came of it. None: there is no memory for it at this moment, the host's or the arena's.
fn learn(s: &Shared, spare: &mut Spare, choice: usize) -> Option<bool> {
    let levels = s.config.dict_levels();
    let Some(&level) = levels.first() else { return Some(false) };
    let mut codec = Codec::new(CodecChoice::Zstd(level), 0);
    let Samples { known, judges, .. } = samples(s, &mut codec, choice);
    if known.len() + judges.len() < LEAST_SAMPLES * PAGE_BYTES {
        return Some(false);
    }
    // The library asks for the rest, and cannot be told to wait for it.
    if spare.bytes_for_anybody() < TRAINING_BYTES {
        return None;
    }
    let Some(bytes) = train(&known, s.config.most_dict_bytes(), level) else { return Some(false) };
    let Some(dictionary) = Dictionary::new(&bytes, &levels) else { return Some(false) };
    let now = s.dictionaries.get(s.dictionaries.current()).map(|one| &one.dictionary);
    let trial = Trial {
        without: compressed(&mut codec, &judges, None),
        now: now.filter(|now| codec.takes(now)).map(|now| compressed(&mut codec, &judges, Some(now))),
        new: compressed(&mut codec, &judges, Some(&dictionary)),
    };
    match is_better(&trial) {
        false => Some(false),
        true => s.take_up(bytes, dictionary).then_some(true),
    }
}

/// What pages take, each alone.
fn compressed(codec: &mut Codec, pages: &[u8], with: Option<&Dictionary>) -> u64 {
    let mut packed = [0; PAGE_BYTES];
    let most = most_payload(PAGE_BYTES);
    let one = |page| codec.compress(page, &mut packed[..most], with).map_or(PAGE_BYTES, |(_, n)| n) as u64;
    pages.chunks_exact(PAGE_BYTES).map(one).sum()
}

/// Pages of what compresses, as many of each segment.
fn samples(s: &Shared, codec: &mut Codec, choice: usize) -> Samples {
    let mut pages = Samples::new(choice);
    let mut group = vec![0; MAX_GROUP * PAGE_BYTES];
    let count = eligible(s).count();
    if count == 0 {
        return pages;
    }
    // Of many segments a part, of few of each one several.
    let (every, each) = (count.div_ceil(SAMPLES), SAMPLES.div_ceil(count));
    let chosen: Vec<SegmentId> = eligible(s).step_by(every).map(|(id, _)| id).collect();
    for id in chosen {
        let Some(open) = s.segments.begin_cleaning(&s.arena, id) else { continue };
        sample(s, open, each, codec, &mut group, &mut pages);
        s.segments.end_cleaning(&s.arena, id);
    }
    pages
}

/// Adds `each` pages of a claimed segment, be they live or not, as far as there is room.
fn sample(s: &Shared, open: Open, each: usize, codec: &mut Codec, group: &mut [u8], pages: &mut Samples) {
    let records = || {
        let mut at = 0;
        std::iter::from_fn(move || {
            let record = (at < open.used).then(|| s.segments.record(&s.arena, open.frame, at)).flatten()?;
            at += record.0.total();
            Some(record)
        })
    };
    let packed = || records().filter(|(header, _)| header.codec == ZSTD || header.codec == crate::codec::LZ4);
    let every = (packed().count() / each).max(1);
    let with = s.dictionaries.of(open.dictionary).expect("the dictionary of a claimed segment is in use");
    for (header, record) in packed().skip(pages.choice % every).step_by(every).take(each) {
        let whole = &mut group[..header.pages * PAGE_BYTES];
        let with = if header.pages == 1 { with } else { None };
        let sound = codec.decompress(header.codec, &record[header.bytes()..], whole, with);
        if sound {
            pages.take(&whole[..PAGE_BYTES]);
        }
    }
}
