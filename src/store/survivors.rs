//! Survivors: what is live of a segment that is to be free. For each page of each record the map is asked
//! whether the page's slot still names this very record; the live ones are appended elsewhere, and each
//! slot is exchanged from the old word to the new one. A page written meanwhile keeps its newer word, and
//! the copy is dead.
//!
//! The victim is claimed, and a claimed segment cannot be reused, so a slot word that names it cannot come
//! back with another meaning: the exchange has no ABA.

use super::append::{Appender, Outcome};
use super::charge::cost;
use super::Shared;
use crate::log::record::{Header, MAX_GROUP};
use crate::map::{self, swap_if, Slot, Stored};
use crate::page::{PageNo, SegmentId, VolumeId, PAGE_BYTES};

/// Copies survivors, for one thread.
pub(super) struct Copier {
    pub appender: Appender,
    plain: Box<[u8]>,
    epoch: usize,
    /// Dictionary of the victim.
    dictionary: u8,
}

impl Copier {
    /// `epoch`: that of the thread.
    pub fn new(shared: &Shared, appender: Appender, epoch: usize) -> Copier {
        let plain = vec![0xa5; shared.seen().group_pages * PAGE_BYTES].into_boxed_slice();
        Copier { appender, plain, epoch, dictionary: 0 }
    }

    /// For records of another codec and of more pages.
    pub fn equip(&mut self, s: &Shared) {
        s.unpacking.take(self.epoch, &mut self.appender, &mut self.plain);
    }

    /// Copies the live records of a victim whose first `used` bytes `record` gives. False: no room for
    /// them; what was not copied stays.
    pub fn copy<'a>(
        &mut self,
        s: &Shared,
        victim: SegmentId,
        used: usize,
        age_s: u32,
        record: impl Fn(usize) -> Option<(Header, &'a [u8])>,
    ) -> bool {
        self.appender.age_s = Some(age_s);
        self.appender.place(s, s.segments.placement(&s.arena, victim));
        self.dictionary = s.segments.dictionary(&s.arena, victim);
        let mut at = 0;
        while at < used {
            let (header, record) = record(at).expect("a sealed segment is records from end to end");
            if !self.move_record(s, victim, at, header, record) {
                return false;
            }
            at += header.total();
        }
        true
    }

    fn move_record(&mut self, s: &Shared, victim: SegmentId, offset: usize, header: Header, record: &[u8]) -> bool {
        let word = |i: usize| {
            Slot::stored(Stored { segment: victim, offset: offset as u32, index: i as u32, share: header.share(i) })
        };
        let mut live = [false; MAX_GROUP];
        for (i, l) in live.iter_mut().enumerate().take(header.pages) {
            *l = word_of(s, self.epoch, header.volume, page(header, i)) == word(i);
        }
        let count = live.iter().filter(|l| **l).count();
        if count == 0 {
            return true;
        }
        if count == header.pages {
            match self.appender.copy(s, header, record, self.dictionary) {
                Outcome::Done(copy) => {
                    (0..header.pages)
                        .for_each(|i| relocate(s, self.epoch, header.volume, page(header, i), word(i), copy.slot(i)));
                    return true;
                }
                Outcome::NoRoom => return false,
                // A page that was made with a dictionary, or without, and now goes where there is another.
                Outcome::Split => {}
            }
        }
        // A group of which some pages died: the rest is compressed anew.
        let whole = header.pages * PAGE_BYTES;
        if whole > self.plain.len() || !self.appender.codec.knows(header.codec) {
            self.equip(s);
        }
        let number = if header.pages == 1 { self.dictionary } else { 0 };
        let with = s.dictionaries.of(number).expect("the dictionary of a segment that is claimed is in use");
        let mut plain = std::mem::take(&mut self.plain);
        let sound = self.appender.codec.decompress(header.codec, &record[header.bytes()..], &mut plain[..whole], with);
        assert!(sound, "a record in memory decodes: segment {} offset {offset}", victim.0);
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
                    (0..run).for_each(|k| {
                        relocate(s, self.epoch, header.volume, page(header, i + k), word(i + k), copy.slot(k))
                    });
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

/// What names a page now. `epoch` is the caller's own.
pub(super) fn word_of(s: &Shared, epoch: usize, volume: VolumeId, page: PageNo) -> Slot {
    s.epochs.enter(epoch);
    let word = map::load(&s.map, &s.arena, volume, page);
    s.epochs.leave(epoch);
    word
}

/// Points a page's slot to its copy, if it still names the original.
pub(super) fn relocate(s: &Shared, epoch: usize, volume: VolumeId, page: PageNo, old: Slot, new: Slot) {
    s.epochs.enter(epoch);
    let leaf = s.map.leaf(&s.arena, volume, page.cluster());
    crash_point!("clean: copied, slot names the original");
    let moved = leaf.is_some_and(|leaf| swap_if(&leaf[page.slot()], old, new));
    s.epochs.leave(epoch);
    crash_point!("clean: slot names the copy");
    // Exactly one of the two words is out of use now.
    let map::Kind::Stored(dead) = (if moved { old } else { new }).kind() else { return };
    if moved {
        s.charges.add(volume, cost(new) - cost(old));
    }
    s.segments.take_live(&s.arena, dead.segment, dead.share);
}
