//! Dictionaries in the arena: up to seven at a time, by their numbers, each in metadata pages of its own that the
//! superblock lists. A segment says by its number which one its records were made with, so a dictionary is whole before
//! any segment with its number is opened, and stays until none has it any more.
//!
//! ```text
//! 128 bytes each, the first that of number 1
//! byte 0   31..0 length in bytes · 63..32 serial: a later one has a greater one; 0: there is none
//!      8   XXH3-64 of the bytes, seed: byte 0 to 7
//!      16  16 of 4 bytes: its metadata pages
//! ```
//! The first word is stored last. Killed before, there is none, and its pages are free when the arena is opened again, as
//! is all that nothing leads to. It is cleared first of all when the dictionary is dropped, to the same effect.

use super::superblock::Superblock;
use super::{Arena, Resident};
use crate::codec::{LEAST_BYTES, MOST_BYTES};
use crate::page::{MetaNo, PAGE_BYTES};
use crate::sync::Ordering;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Numbers of dictionaries go from 1 up to this one.
pub(crate) const MOST_DICTIONARIES: u8 = 7;
/// Metadata pages of the largest.
pub(super) const LINKS: usize = MOST_BYTES / PAGE_BYTES;

/// What the superblock says of one that there is.
#[derive(Clone, Copy)]
struct Entry {
    word: u64,
    checksum: u64,
    links: [u32; LINKS],
}

impl Entry {
    fn bytes(&self) -> usize {
        self.word as u32 as usize
    }

    fn links(&self) -> &[u32] {
        &self.links[..self.bytes().div_ceil(PAGE_BYTES)]
    }
}

/// A dictionary as an arena keeps it.
pub(crate) struct InArena {
    pub number: u8,
    pub serial: u32,
    pub bytes: Vec<u8>,
}

impl Arena {
    fn dictionary_entry(&self, number: u8) -> Option<Entry> {
        let (words, links) = Superblock(&self.map).dictionary(number);
        let [word, checksum] = words.map(|word| word.load(Ordering::Acquire));
        let mut entry = Entry { word, checksum, links: [0; LINKS] };
        for (copy, link) in entry.links.iter_mut().zip(links) {
            *copy = link.load(Ordering::Acquire);
        }
        (word != 0).then_some(entry)
    }

    /// The dictionaries of an arena that is being opened, and the numbers of those that are damaged, a bit each.
    /// `resident`: metadata pages that are there; `reached`: those in use, to which are added those of what was found.
    pub fn find_dictionaries(&self, resident: &Resident, reached: &mut Resident) -> (Vec<InArena>, u8) {
        let (mut found, mut damaged) = (Vec::new(), 0);
        for number in 1..=MOST_DICTIONARIES {
            let Some(entry) = self.dictionary_entry(number) else { continue };
            match self.read_dictionary(&entry, resident, reached) {
                Some(bytes) => {
                    entry.links().iter().for_each(|link| reached.set(link - 1));
                    found.push(InArena { number, serial: (entry.word >> 32) as u32, bytes });
                }
                None => damaged |= 1 << number,
            }
        }
        (found, damaged)
    }

    /// None: it is not what was put there.
    fn read_dictionary(&self, entry: &Entry, resident: &Resident, reached: &Resident) -> Option<Vec<u8>> {
        if !(LEAST_BYTES..=MOST_BYTES).contains(&entry.bytes()) {
            return None;
        }
        let is_there = |link: &u32| {
            let page = link.checked_sub(1).filter(|page| *page < self.max_meta());
            page.is_some_and(|page| resident.has(page) && !reached.has(page))
        };
        if !entry.links().iter().all(is_there) {
            return None;
        }
        let words = entry.links().iter().flat_map(|link| self.leaf(MetaNo(*link)));
        let mut bytes: Vec<u8> = words.flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
        bytes.truncate(entry.bytes());
        (xxh3_64_with_seed(&bytes, entry.word) == entry.checksum).then_some(bytes)
    }

    /// Bytes of those that there are, whatever their state.
    pub fn dictionary_bytes(&self) -> [usize; MOST_DICTIONARIES as usize] {
        Superblock(&self.map).dictionary_bytes()
    }

    /// Metadata pages of those that there are.
    pub fn dictionary_pages(&self) -> usize {
        self.dictionary_bytes().iter().map(|bytes| bytes.div_ceil(PAGE_BYTES)).sum()
    }

    /// Puts a dictionary under a number that none has. False: there are too few free metadata pages at this moment.
    /// Within an epoch.
    pub fn put_dictionary(&self, one: &InArena) -> bool {
        assert!((LEAST_BYTES..=MOST_BYTES).contains(&one.bytes.len()), "a dictionary fits its entry");
        let count = one.bytes.len().div_ceil(PAGE_BYTES);
        let mut pages = [MetaNo(0); LINKS];
        for taken in 0..count {
            let Some(page) = self.take_meta() else {
                pages[..taken].iter().for_each(|page| self.put_meta(*page));
                return false;
            };
            pages[taken] = page;
        }
        crash_point!("dictionary: pages taken");
        for (page, content) in pages.iter().zip(one.bytes.chunks(PAGE_BYTES)) {
            for (word, chunk) in self.leaf(*page).iter().zip(content.chunks(8)) {
                let mut whole = [0; 8];
                whole[..chunk.len()].copy_from_slice(chunk);
                word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
            }
            crash_point!("dictionary: written in part");
        }
        let (words, links) = Superblock(&self.map).dictionary(one.number);
        assert_eq!(words[0].load(Ordering::Relaxed), 0, "no dictionary is put in the place of another");
        let word = u64::from(one.serial) << 32 | one.bytes.len() as u64;
        for (link, page) in links.iter().zip(&pages) {
            link.store(page.0, Ordering::Relaxed);
        }
        words[1].store(xxh3_64_with_seed(&one.bytes, word), Ordering::Relaxed);
        crash_point!("dictionary: written, not named");
        words[0].store(word, Ordering::Release);
        crash_point!("dictionary: named");
        true
    }

    /// Drops the dictionary with a number that no segment has. Its pages are free from here on.
    pub fn drop_dictionary(&self, number: u8) {
        let Some(entry) = self.dictionary_entry(number) else { return };
        crash_point!("dictionary: unused, named");
        self.forget_dictionary(number);
        for link in entry.links() {
            crash_point!("dictionary: dropped, pages not free");
            self.zero_meta(MetaNo(*link));
            self.put_meta(MetaNo(*link));
        }
    }

    /// There is none with that number any more; of its pages nothing is said.
    pub fn forget_dictionary(&self, number: u8) {
        Superblock(&self.map).dictionary(number).0[0].store(0, Ordering::Release);
    }
}
