//! Reading what lies on disk tiers. A lane never waits for a disk of its own accord: it says what must
//! be read, [`Fetch`], whoever serves the request reads that ([`Lane::source`] says how: in its own io_uring, or by
//! a carrier), and the lane takes the pages out of it.
//!
//! Nothing is pinned meanwhile. A segment that dies while it is being fetched may be gone, and its extent
//! may hold another, by the time the blocks are there; then they do not open (`tier/seal.rs`: each is bound
//! to the sequence number of its segment's sealing), and the lane looks the page up anew. Only if the page
//! is still where it was are the blocks damaged. Blocks that do open are what the page was when the fetch
//! began, which is a right answer for a read that was under way.
//!
//! A fetch begins at the first page's record and goes on over the records of the pages behind it in the
//! same request, as far as they lie in the same segment and in reach: what was written together is read
//! together. It goes on further if that was of use lately, and what was fetched is kept for a while (`kept.rs`), so
//! a page beside it costs no read. Whoever has several fetches under way asks of a new one whether one of those brings it
//! ([`Fetch::brings`]), and waits for that if so. If not all of what was read opens, the first page's is read
//! alone: what is damaged is lost, and not what was read with it.

use super::{Lane, Shared};
use crate::error::{Error, Result};
use crate::io::{At, Buffer, Source, BLOCK_BYTES};
use crate::log::record::{most_total, Header, GROUP_HEADER};
use crate::log::segment::{record_of, Below};
use crate::map::{Kind, Slot, Stored};
use crate::page::{PageNo, SegmentId, PAGE_BYTES};
use crate::tier::{Lower, PAYLOAD};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Pauses before a failed read is tried again, when a lane reads for itself.
const RETRIES_MS: [u64; 5] = [1, 10, 50, 200, 700];
/// Blocks fetched at once at least, where pages wait for them.
const REACH_BLOCKS: usize = 8;

/// What is to be read for a page.
#[derive(Clone, Copy, Debug)]
pub struct Fetch {
    at: At,
    bytes: usize,
    /// Of these, those for the first page.
    needed: usize,
    page: PageNo,
    word: Slot,
    stored: Stored,
    below: Below,
    /// Of its dictionary, 0: none. Another may have its number by the time that the blocks are there.
    serial: u32,
    first_block: usize,
}

impl Fetch {
    /// Where its first byte is, of whole blocks of 4096.
    pub fn at(&self) -> At {
        self.at
    }

    /// How much: whole blocks, at most what [`Lane::fetch_bytes`] says.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether this one, once it is there, has all that the other's first page needs.
    pub fn brings(&self, other: &Fetch) -> bool {
        let same = self.stored.segment == other.stored.segment && self.below == other.below;
        let end = |fetch: &Fetch, bytes: usize| fetch.first_block * BLOCK_BYTES + bytes;
        same && self.first_block <= other.first_block && end(other, other.needed) <= end(self, self.bytes)
    }

    /// Whether the word still stands for what was fetched. Within an epoch.
    pub(super) fn stands(&self, s: &Shared, word: Slot) -> bool {
        word == self.word && s.segments.below(&s.arena, self.stored.segment) == Some(self.below)
    }

    /// Blocks up to byte `end` of the segment, as far as a fetch reaches.
    fn reach(&mut self, end: usize, most: usize) -> bool {
        let bytes = (end.div_ceil(PAYLOAD) - self.first_block) * BLOCK_BYTES;
        if bytes > most {
            return false;
        }
        self.bytes = self.bytes.max(bytes);
        true
    }
}

/// What came of a fetch.
#[derive(Debug)]
pub enum Taken {
    /// So many bytes of the request are there. None: look again, the page is elsewhere by now.
    Bytes(usize),
    /// This must be read, it was too little.
    More(Fetch),
}

/// Bytes of the largest fetch, where records hold so many pages at most.
pub(super) fn most_bytes(group_pages: usize) -> usize {
    (most_total(group_pages).div_ceil(PAYLOAD) + 1).max(REACH_BLOCKS) * BLOCK_BYTES
}

/// The part of a request that lies within its next page: the page, its first byte, how many.
pub(super) fn piece(at: u64, len: usize) -> (PageNo, usize, usize) {
    let inner = (at % PAGE_BYTES as u64) as usize;
    (PageNo((at / PAGE_BYTES as u64) as u32), inner, len.min(PAGE_BYTES - inner))
}

impl Lane {
    /// Room that a fetch may need, aligned to 4096. 0: there is no disk tier.
    pub fn fetch_bytes(&self) -> usize {
        let s = self.store.shared();
        s.lower.first().map_or(0, |_| most_bytes(s.config.most_group_pages()))
    }

    /// How fetches are read by a thread with an io_uring of its own. None: there is no tier below.
    pub fn source(&self, ring: BorrowedFd<'_>) -> Result<Option<Source>> {
        let mut source = Source::default();
        let all = &self.store.shared().lower;
        all.iter().try_for_each(|lower| source.add(lower.no, &lower.medium, ring))?;
        Ok((!all.is_empty()).then_some(source))
    }

    /// Takes pages out of what was fetched: the first bytes of the rest of a request, `offset` being what
    /// the fetch was for.
    pub fn take_fetched(&mut self, fetch: &Fetch, blocks: &mut [u8], offset: u64, buf: &mut [u8]) -> Result<Taken> {
        let s = self.store.shared().clone();
        let lower = tier_of(&s, fetch);
        lower.counts.fetches.fetch_add(1, Ordering::Relaxed);
        lower.counts.bytes_fetched.fetch_add(fetch.bytes as u64, Ordering::Relaxed);
        note(&s, lower, fetch.stored.segment);
        let blocks = &mut blocks[..fetch.bytes];
        let Some(plain) = lower.seal.open(blocks, fetch.first_block as u32, fetch.below.sequence) else {
            return self.unopened(lower, fetch);
        };
        if let Some(kept) = &mut self.kept {
            kept.keep(fetch.stored.segment, fetch.below.sequence, fetch.first_block * PAYLOAD, plain);
        }
        let mut done = 0;
        while done < buf.len() {
            let (page, inner, n) = piece(offset + done as u64, buf.len() - done);
            let word = if done == 0 { Some(fetch.word) } else { self.still_there(fetch, page) };
            let Some(Kind::Stored(at)) = word.map(Slot::kind) else { break };
            let begin = (at.offset as usize).checked_sub(fetch.first_block * PAYLOAD);
            let rest = begin.and_then(|begin| plain.get(begin..)).unwrap_or_default();
            match record_of(|n| rest.get(..n)) {
                Some((header, record)) => {
                    let out = &mut buf[done..done + n];
                    if !self.decode_fetched(fetch, page, at, (header, record), (inner, out))? {
                        break;
                    }
                    done += n;
                }
                None if done == 0 => return self.longer(fetch, rest).map(Taken::More),
                None => break,
            }
        }
        self.count_reads(done);
        Ok(Taken::Bytes(done))
    }

    /// The word of another page, if it lies in the segment that was fetched from.
    fn still_there(&mut self, fetch: &Fetch, page: PageNo) -> Option<Slot> {
        self.in_epoch(|lane, s| {
            let word = crate::map::load(&s.map, &s.arena, lane.volume, page);
            let same = matches!(word.kind(), Kind::Stored(at) if at.segment == fetch.stored.segment);
            (same && s.segments.below(&s.arena, fetch.stored.segment) == Some(fetch.below)).then_some(word)
        })
    }

    /// The content of a page that lies in what was fetched for another. None: it does not. Within an epoch.
    pub(super) fn take_kept(&mut self, s: &Shared, page: PageNo, at: Stored, out: &mut [u8]) -> Option<Result<()>> {
        let below = s.segments.below(&s.arena, at.segment)?;
        let lower = s.lower_at(below.at.tier)?;
        let with = s.dictionaries.of(below.dictionary)?;
        let mut kept = self.kept.take()?;
        let found = kept.find(at.segment, below.sequence, at.offset as usize);
        let record = found.and_then(|(run, rest)| Some((run, record_of(|n| rest.get(..n))?)));
        let taken = record.map(|(run, record)| {
            let sealed = Some(below.sequence);
            (run, self.decode_record(page, at, record, sealed, with, out))
        });
        let done = taken.map(|(run, done)| {
            kept.was_of_use(run);
            lower.counts.beside.fetch_add(1, Ordering::Relaxed);
            s.segments.touch(&s.arena, at.segment);
            note(s, lower, at.segment);
            done
        });
        self.kept = Some(kept);
        done
    }

    /// What was read beyond the first page may be all that is damaged.
    fn unopened(&mut self, lower: &Lower, fetch: &Fetch) -> Result<Taken> {
        if self.still_there(fetch, fetch.page) != Some(fetch.word) {
            return Ok(Taken::Bytes(0));
        }
        if let Some(kept) = &mut self.kept {
            kept.damaged();
        }
        if fetch.needed < fetch.bytes {
            return Ok(Taken::More(Fetch { bytes: fetch.needed, ..*fetch }));
        }
        let page = u64::from(self.volume.0) << 32 | u64::from(fetch.page.0);
        lower.counts.last_corrupt.store(page, Ordering::Relaxed);
        lower.counts.corrupt.fetch_add(1, Ordering::Relaxed);
        let Stored { segment, offset, .. } = fetch.stored;
        Err(Error::Corrupt { page: fetch.page.0, segment: segment.0, offset })
    }

    /// False: its dictionary is gone, and so its segment, and the page is elsewhere by now.
    fn decode_fetched(
        &mut self,
        fetch: &Fetch,
        page: PageNo,
        at: Stored,
        record: (Header, &[u8]),
        (inner, out): (usize, &mut [u8]),
    ) -> Result<bool> {
        let mut whole = [0u8; PAGE_BYTES];
        let target = if out.len() == PAGE_BYTES { &mut *out } else { &mut whole };
        let sealed = Some(fetch.below.sequence);
        let there = if fetch.serial == 0 {
            self.decode_record(page, at, record, sealed, None, target).map(|()| true)
        } else {
            self.in_epoch(|lane, s| match s.dictionaries.get(fetch.below.dictionary) {
                Some(one) if one.serial == fetch.serial => {
                    lane.decode_record(page, at, record, sealed, Some(&one.dictionary), target).map(|()| true)
                }
                _ => Ok(false),
            })
        }?;
        if out.len() != PAGE_BYTES {
            out.copy_from_slice(&whole[inner..inner + out.len()]);
        }
        Ok(there)
    }

    /// The fetch for a record of which the first one had the header, and not all.
    fn longer(&self, fetch: &Fetch, rest: &[u8]) -> Result<Fetch> {
        let at = fetch.stored;
        let corrupt = || Error::Corrupt { page: fetch.page.0, segment: at.segment.0, offset: at.offset };
        let header = Header::read(rest).ok_or_else(corrupt)?;
        let mut more = *fetch;
        let reached = more.reach(at.offset as usize + header.total(), self.fetch_bytes());
        more.needed = more.bytes;
        if reached && more.bytes > fetch.bytes {
            Ok(more)
        } else {
            Err(corrupt())
        }
    }

    /// What to read for a page that is below. Within an epoch.
    pub(super) fn plan(&self, s: &Shared, page: PageNo, word: Slot, at: Stored) -> Result<Fetch> {
        let corrupt = || Error::Corrupt { page: page.0, segment: at.segment.0, offset: at.offset };
        let below = s.segments.below(&s.arena, at.segment).ok_or_else(corrupt)?;
        let lower = s.lower_at(below.at.tier).ok_or_else(corrupt)?;
        s.segments.touch(&s.arena, at.segment);
        let named = s.dictionaries.get(below.dictionary);
        // A group's share does not tell how many share; a page alone costs what its record takes.
        let group_pages = if below.cold { s.config.most_group_pages() } else { s.config.group_pages };
        let likely = if group_pages > 1 { (at.share as usize + 1) * group_pages } else { at.share as usize };
        let first_block = at.offset as usize / PAYLOAD;
        let mut fetch = Fetch {
            at: At::new(lower.no, lower.at(below.at.extent) + (first_block * BLOCK_BYTES) as u64),
            bytes: 0,
            needed: 0,
            page,
            word,
            stored: at,
            below,
            serial: if below.dictionary == 0 { 0 } else { named.ok_or_else(corrupt)?.serial },
            first_block,
        };
        let most = most_bytes(s.config.most_group_pages());
        let end = at.offset as usize + likely.max(GROUP_HEADER);
        fetch.reach(end.min(below.used).min((first_block + most / BLOCK_BYTES) * PAYLOAD), most);
        fetch.needed = fetch.bytes;
        Ok(fetch)
    }

    /// Has the fetch go on over the pages behind its first one, and then as far as was of use lately. Within an epoch.
    pub(super) fn widen(&self, s: &Shared, fetch: &mut Fetch, pages: u32) {
        self.widen_over(s, fetch, pages);
        let most = most_bytes(s.config.most_group_pages());
        let ahead = self.kept.as_ref().map_or(0, |kept| kept.ahead());
        let blocks = (fetch.bytes / BLOCK_BYTES + ahead).min(most / BLOCK_BYTES);
        let end = ((fetch.first_block + blocks) * PAYLOAD).min(fetch.below.used);
        fetch.reach(end, most);
    }

    fn widen_over(&self, s: &Shared, fetch: &mut Fetch, pages: u32) {
        for i in 1..pages {
            let Some(page) = fetch.page.0.checked_add(i) else { return };
            let Kind::Stored(at) = crate::map::load(&s.map, &s.arena, self.volume, PageNo(page)).kind() else { return };
            let behind = at.segment == fetch.stored.segment && at.offset >= fetch.stored.offset;
            let end = (at.offset + at.share).min(fetch.below.used as u32) as usize;
            if !behind || !fetch.reach(end, most_bytes(s.config.most_group_pages())) {
                return;
            }
        }
    }

    /// Reads what a fetch asks for and takes it, waiting for the disk.
    pub(super) fn fetch_now(&mut self, mut fetch: Fetch, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let s = self.store.shared().clone();
        let lower = tier_of(&s, &fetch);
        // One that helps has none until it does this.
        let room = || Buffer::new(most_bytes(s.config.most_group_pages()));
        let mut blocks = self.blocks.take().unwrap_or_else(room);
        let taken = loop {
            if let Err(source) = read(lower, &fetch, &mut blocks) {
                if self.still_there(&fetch, fetch.page) != Some(fetch.word) {
                    // It is elsewhere by now, where it may be read.
                    break Ok(0);
                }
                break Err(Error::Unreadable { page: fetch.page.0, segment: fetch.stored.segment.0, source });
            }
            match self.take_fetched(&fetch, &mut blocks, offset, buf) {
                Ok(Taken::More(more)) => fetch = more,
                Ok(Taken::Bytes(n)) => break Ok(n),
                Err(e) => break Err(e),
            }
        };
        self.blocks = Some(blocks);
        taken
    }

    /// Counts a read that the disk refused. The error for a page that is given up on.
    pub fn fetch_failed(&self, fetch: &Fetch, source: std::io::Error) -> Error {
        tier_of(self.store.shared(), fetch).counts.read_errors.fetch_add(1, Ordering::Relaxed);
        Error::Unreadable { page: fetch.page.0, segment: fetch.stored.segment.0, source }
    }
}

fn tier_of<'s>(s: &'s Shared, fetch: &Fetch) -> &'s Lower {
    s.lower_at(fetch.below.at.tier).expect("what is fetched lies on a tier of the store")
}

/// Notes that pages of a segment are asked for.
fn note(s: &Shared, lower: &Lower, segment: SegmentId) {
    if lower.asked.note(segment) {
        s.wake_movers();
    }
}

fn read(lower: &Lower, fetch: &Fetch, blocks: &mut [u8]) -> std::io::Result<()> {
    let mut pauses = RETRIES_MS.iter();
    loop {
        match lower.medium.read(&mut blocks[..fetch.bytes], fetch.at.byte()) {
            Ok(()) => return Ok(()),
            Err(e) => {
                lower.counts.read_errors.fetch_add(1, Ordering::Relaxed);
                let Some(pause) = pauses.next() else { return Err(e) };
                std::thread::sleep(Duration::from_millis(*pause));
            }
        }
    }
}
