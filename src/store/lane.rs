//! A lane: one thread's way into a volume. Everything a request needs was made when the lane was
//! opened; no request allocates, takes a lock or waits for another thread's memory.

use super::append::{kept_by_lanes, Appender, Outcome};
use super::fetch::{most_bytes, piece, Fetch};
use super::kept::Kept;
use super::{Shared, Store};
use crate::codec::{fill, same_filled, Dictionary};
use crate::error::{Error, Result};
use crate::io::Buffer;
use crate::log::record::Header;
use crate::log::segment::Place;
use crate::map::{swap_if, Kind, Slot, Stored};
use crate::page::{PageNo, VolumeId, CLUSTER_PAGES, PAGE_BYTES, SECTOR_BYTES};
use crate::sync::yield_now;
use crate::tier::Lower;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Pages handled within one epoch: bounds how long the cleaner waits for a lane.
const EPOCH_PAGES: usize = 16;
/// A blocking write that makes no progress for this long is refused.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same while a disk tier has not answered. Whoever is to mend a disk may need the memory that waits for
/// it, so it has an end too.
const PATIENCE_WITH_DISK: Duration = Duration::from_secs(10);

/// Where a decoded group stood. A segment that was sealed then and still has that number has the same
/// bytes; of one that was still open this is sure within one epoch only.
#[derive(Clone, Copy)]
struct Decoded {
    at: Stored,
    sealed: Option<u64>,
}

/// One I/O thread's way into a [`crate::Volume`].
pub struct Lane {
    pub(super) store: Store,
    pub(super) volume: VolumeId,
    pub(super) index: usize,
    pub(super) appender: Appender,
    /// The last group decoded, and where it came from: neighbours are often read next, each alone.
    group: Box<[u8]>,
    group_of: Option<Decoded>,
    /// What was last to be written found the volume's quota spent.
    spent: bool,
    /// Room for what this lane reads from disk itself.
    pub(super) blocks: Option<Buffer>,
    /// What it fetched lately.
    pub(super) kept: Option<Kept>,
}

impl Lane {
    pub(crate) fn open(store: Store, volume: VolumeId, helps: bool) -> Result<Lane> {
        let index = store.take_lane(helps)?;
        let s = store.shared();
        let appender = Appender::new(s, kept_by_lanes(&s.config));
        let seen = s.seen().group_pages;
        let group = vec![0xa5; if seen > 1 { seen * PAGE_BYTES } else { 0 }];
        // Whoever is helped reads from disk, as a rule.
        let lower = s.lower.first().filter(|_| !helps);
        let blocks = lower.map(|_| Buffer::new(most_bytes(s.config.most_group_pages())));
        let kept = lower.map(|_| Kept::new());
        Ok(Lane { volume, index, appender, group: group.into(), group_of: None, spent: false, blocks, kept, store })
    }

    /// What is best written by one lane: as many pages as one record may hold.
    pub fn group_bytes(&self) -> usize {
        self.store.shared().config.group_pages * PAGE_BYTES
    }

    /// What is best read by one lane: as many pages as one record was seen to hold, by whomever it was made.
    pub fn seen_group_bytes(&self) -> usize {
        self.group.len().max(PAGE_BYTES)
    }

    /// Reads a range; what was never written reads as zeros.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let (n, fetch) = self.read_or_fetch(offset + done as u64, &mut buf[done..])?;
            done += n;
            if let Some(fetch) = fetch {
                done += self.fetch_now(fetch, offset + done as u64, &mut buf[done..])?;
            }
        }
        Ok(())
    }

    /// Reads a range as far as it lies in memory, without waiting. Returns the bytes done, and if they
    /// are not all what must be read from disk to go on; see [`Lane::take_fetched`].
    pub fn read_or_fetch(&mut self, offset: u64, buf: &mut [u8]) -> Result<(usize, Option<Fetch>)> {
        self.check(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let before = done;
            let fetch = self.in_epoch(|lane, s| {
                for _ in 0..EPOCH_PAGES {
                    let (page, inner, n) = piece(offset + done as u64, buf.len() - done);
                    let word = crate::map::load(&s.map, &s.arena, lane.volume, page);
                    let out = &mut buf[done..done + n];
                    if let Some(mut fetch) = lane.decode_part(s, page, word, inner, out)? {
                        let pages = (inner + buf.len() - done).div_ceil(PAGE_BYTES);
                        lane.widen(s, &mut fetch, pages as u32);
                        return Ok(Some(fetch));
                    }
                    done += n;
                    if done == buf.len() {
                        break;
                    }
                }
                Ok(None)
            })?;
            self.count_reads(done - before);
            if fetch.is_some() {
                return Ok((done, fetch));
            }
        }
        Ok((done, None))
    }

    /// Writes what there is room for at this moment and returns the bytes done. Fewer than asked
    /// for: call again with the rest later. Never waits.
    pub fn try_write(&mut self, offset: u64, data: &[u8]) -> Result<usize> {
        self.check(offset, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let first = PageNo((at / PAGE_BYTES as u64) as u32);
            let inner = (at % PAGE_BYTES as u64) as usize;
            let rest = &data[done..];
            let (asked, written) = if inner == 0 && rest.len() >= PAGE_BYTES {
                let n = (rest.len() / PAGE_BYTES).min(EPOCH_PAGES) * PAGE_BYTES;
                (n, self.in_epoch(|lane, s| lane.write_pages(s, first, &rest[..n])))
            } else {
                let n = rest.len().min(PAGE_BYTES - inner);
                (n, if self.splice(first, inner, n, Some(rest))? { n } else { 0 })
            };
            self.count(|c| &c.writes, written);
            done += written;
            if written < asked {
                if std::mem::take(&mut self.spent) {
                    return Err(self.over_quota());
                }
                self.store.shared().wake_growth();
                self.store.shared().wake_cleaner();
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of the range, waiting for room as long as [`Lane::patience`] says.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let mut done = self.try_write(offset, data)?;
        let mut waited = Duration::ZERO;
        while done < data.len() {
            let more = self.try_write(offset + done as u64, &data[done..])?;
            done += more;
            if more > 0 {
                waited = Duration::ZERO;
                continue;
            }
            self.wait(&mut waited)?;
        }
        Ok(())
    }

    /// Drops the whole pages of a range, which then read as zeros. Parts of pages at its ends are
    /// left as they are.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        let page = PAGE_BYTES as u64;
        let (first, end) = (offset.div_ceil(page), (offset + len) / page);
        let mut at = first;
        while at < end {
            let cluster = (at / CLUSTER_PAGES as u64) as usize;
            let last = end.div_ceil(CLUSTER_PAGES as u64) as usize;
            let next = self.in_epoch(|lane, s| s.map.next_present(&s.arena, lane.volume, cluster, last));
            let Some(next) = next else { break };
            at = at.max((next * CLUSTER_PAGES) as u64);
            if at >= end {
                break;
            }
            let until = end.min(((next + 1) * CLUSTER_PAGES) as u64);
            self.in_epoch(|lane, s| lane.discard_in_cluster(s, next, at, until));
            at = until;
        }
        Ok(())
    }

    /// Makes the range read as zeros, to the byte. Whole pages cost nothing afterwards.
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        let page = PAGE_BYTES as u64;
        let end = offset + len;
        let (first, last) = (offset / page, end / page);
        for (p, from, to) in [
            (first, offset % page, if first == last { end % page } else { page }),
            (last, 0, if first == last { 0 } else { end % page }),
        ] {
            if from < to && to - from < page {
                let mut waited = Duration::ZERO;
                while !self.splice(PageNo(p as u32), from as usize, (to - from) as usize, None)? {
                    self.wait(&mut waited)?;
                }
            }
        }
        self.discard(offset, len)
    }

    /// Nothing to do: a request is done when its slots are committed.
    pub fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    // --- within ---------------------------------------------------------------------------------

    pub(super) fn check(&self, offset: u64, len: u64) -> Result<()> {
        let volume_bytes = self.store.volume_bytes(self.volume);
        if offset.checked_add(len).is_none_or(|end| end > volume_bytes) {
            return Err(Error::OutOfRange { offset, len, volume_bytes });
        }
        if offset % SECTOR_BYTES != 0 || len % SECTOR_BYTES != 0 {
            return Err(Error::Unaligned { offset, len });
        }
        Ok(())
    }

    /// How long a write without any progress is to wait for room before it is refused: longer while a disk
    /// tier, which is to make that room, has not answered.
    pub fn patience(&self) -> Duration {
        match self.store.shared().lower.iter().any(Lower::is_slow) {
            true => PATIENCE_WITH_DISK,
            false => PATIENCE,
        }
    }

    pub(super) fn over_quota(&self) -> Error {
        Error::OverQuota { quota_bytes: self.store.shared().charges.quota_bytes(self.volume) }
    }

    fn wait(&self, waited: &mut Duration) -> Result<()> {
        if *waited >= self.patience() {
            let refused = &self.store.shared().counters[self.index].refused;
            refused.store(refused.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            return Err(Error::NoSpace);
        }
        let nap = Duration::from_micros(500);
        std::thread::sleep(nap);
        *waited += nap;
        Ok(())
    }

    fn count(&self, which: fn(&super::Counters) -> &AtomicU64, bytes: usize) {
        let c = which(&self.store.shared().counters[self.index]);
        c.store(c.load(Ordering::Relaxed) + bytes.div_ceil(PAGE_BYTES) as u64, Ordering::Relaxed);
    }

    pub(super) fn in_epoch<T>(&mut self, body: impl FnOnce(&mut Lane, &Shared) -> T) -> T {
        let shared = self.store.shared().clone();
        shared.epochs.enter(self.index);
        self.group_of = self.group_of.filter(|group| group.sealed.is_some());
        let result = body(self, &shared);
        shared.epochs.leave(self.index);
        shared.charges.collect(self.volume, &shared.counters[self.index]);
        result
    }

    pub(super) fn count_reads(&self, bytes: usize) {
        self.count(|c| &c.reads, bytes);
    }

    /// As `decode`, of a part of the page from byte `inner` on.
    fn decode_part(
        &mut self,
        s: &Shared,
        page: PageNo,
        word: Slot,
        inner: usize,
        out: &mut [u8],
    ) -> Result<Option<Fetch>> {
        if out.len() == PAGE_BYTES {
            return self.decode(s, page, word, out);
        }
        let mut whole = [0u8; PAGE_BYTES];
        let fetch = self.decode(s, page, word, &mut whole)?;
        out.copy_from_slice(&whole[inner..inner + out.len()]);
        Ok(fetch)
    }

    /// Puts the content that `word` stands for into `out`, one page long. Within an epoch. Some: it is
    /// not in memory, and this must be read for it.
    pub(super) fn decode(&mut self, s: &Shared, page: PageNo, word: Slot, out: &mut [u8]) -> Result<Option<Fetch>> {
        let at = match word.kind() {
            Kind::Empty | Kind::Frozen => {
                out.fill(0);
                return Ok(None);
            }
            Kind::Fill(pattern) => {
                fill(pattern, out);
                return Ok(None);
            }
            Kind::Lost => return Err(Error::Lost { page: page.0 }),
            Kind::Stored(at) => at,
        };
        // Only of use for groups.
        let sealed = if self.group.is_empty() { None } else { s.segments.sealed_as(&s.arena, at.segment) };
        let frame = match s.segments.place(&s.arena, at.segment) {
            Place::Memory(frame) => frame,
            Place::Below(_) if self.decoded(at, sealed) => {
                self.copy_of_group(at, out);
                return Ok(None);
            }
            Place::Below(_) => {
                return match self.take_kept(s, page, at, out) {
                    Some(done) => done.map(|()| None),
                    None => self.plan(s, page, word, at).map(Some),
                };
            }
        };
        if !s.lower.is_empty() {
            s.segments.touch(&s.arena, at.segment);
        }
        let record = s.segments.record(&s.arena, frame, at.offset as usize);
        let corrupt = || Error::Corrupt { page: page.0, segment: at.segment.0, offset: at.offset };
        let record = record.ok_or_else(corrupt)?;
        let with = s.dictionaries.of(s.segments.dictionary(&s.arena, at.segment)).ok_or_else(corrupt)?;
        self.decode_record(page, at, record, sealed, with, out).map(|()| None)
    }

    /// Whether the group that was decoded last is this record.
    fn decoded(&self, at: Stored, sealed: Option<u64>) -> bool {
        self.group_of.is_some_and(|group| {
            (group.at.segment, group.at.offset) == (at.segment, at.offset) && group.sealed == sealed
        })
    }

    fn copy_of_group(&self, at: Stored, out: &mut [u8]) {
        out.copy_from_slice(&self.group[at.index as usize * PAGE_BYTES..][..PAGE_BYTES]);
    }

    /// Decodes a page's record, which is that of a segment sealed with that number (None: open) and with that dictionary
    /// for single pages.
    pub(super) fn decode_record(
        &mut self,
        page: PageNo,
        at: Stored,
        (header, record): (Header, &[u8]),
        sealed: Option<u64>,
        with: Option<&Dictionary>,
        out: &mut [u8],
    ) -> Result<()> {
        let corrupt = || Error::Corrupt { page: page.0, segment: at.segment.0, offset: at.offset };
        if header.volume != self.volume
            || header.page.0.checked_add(at.index) != Some(page.0)
            || at.index as usize >= header.pages
        {
            return Err(corrupt());
        }
        let payload = &record[header.bytes()..];
        if !self.appender.codec.knows(header.codec) || header.pages > 1 && header.pages * PAGE_BYTES > self.group.len()
        {
            let s = self.store.shared().clone();
            s.unpacking.take(self.index, &mut self.appender, &mut self.group);
        }
        if header.pages == 1 {
            let sound = self.appender.codec.decompress(header.codec, payload, out, with);
            return if sound { Ok(()) } else { Err(corrupt()) };
        }
        let whole = header.pages * PAGE_BYTES;
        if !self.decoded(at, sealed) {
            self.group_of = None;
            let group = self.group.get_mut(..whole).ok_or_else(corrupt)?;
            if !self.appender.codec.decompress(header.codec, payload, group, None) {
                return Err(corrupt());
            }
            self.group_of = Some(Decoded { at, sealed });
        }
        self.copy_of_group(at, out);
        Ok(())
    }

    /// Writes whole pages, up to sixteen; returns the bytes done. Within an epoch.
    fn write_pages(&mut self, s: &Shared, first: PageNo, data: &[u8]) -> usize {
        self.appender.place(s, s.charges.placement(self.volume));
        let pages = data.len() / PAGE_BYTES;
        let plain = |i: usize, n: usize| &data[i * PAGE_BYTES..(i + n) * PAGE_BYTES];
        let mut i = 0;
        let mut alone_until = 0;
        while i < pages {
            let page = PageNo(first.0 + i as u32);
            let pattern = same_filled(plain(i, 1));
            if let Some(word) = pattern.and_then(Slot::fill) {
                if !self.commit(s, page, word) {
                    break;
                }
                i += 1;
                continue;
            }
            self.spent = s.charges.is_spent(self.volume);
            if self.spent || s.map.leaf_for_write(&s.arena, self.volume, page.cluster()).is_err() {
                break;
            }
            let mut run = 1;
            let outcome = match pattern {
                Some(pattern) => self.appender.fill(s, self.volume, page, pattern),
                None => {
                    if i >= alone_until {
                        let most = s.config.group_pages.min(pages - i);
                        run += (i + 1..i + most).take_while(|&j| same_filled(plain(j, 1)).is_none()).count();
                    }
                    self.appender.pages(s, self.volume, page, plain(i, run))
                }
            };
            match outcome {
                Outcome::Done(record) => {
                    let committed =
                        (0..run).take_while(|&k| self.commit(s, PageNo(page.0 + k as u32), record.slot(k))).count();
                    i += committed;
                    if committed < run {
                        // The rest of the record is dead: no slot names it.
                        (committed..run).for_each(|k| self.forget(s, record.slot(k)));
                        break;
                    }
                }
                Outcome::Split => alone_until = i + run,
                Outcome::NoRoom => break,
            }
        }
        i * PAGE_BYTES
    }

    /// The commit point: one exchange of the slot word, after the record it names is complete.
    /// The old word tells what died. False: the map has no room for the page's leaf.
    ///
    /// Killed before the exchange, the page is what it was and the record is garbage; killed after
    /// it, the page is the new one; counters are rebuilt by a walk in either case. A frozen slot is
    /// never replaced, so a commit cannot vanish with a leaf that is being taken out.
    fn commit(&mut self, s: &Shared, page: PageNo, new: Slot) -> bool {
        loop {
            let Ok(leaf) = s.map.leaf_for_write(&s.arena, self.volume, page.cluster()) else { return false };
            let slot = &leaf[page.slot()];
            let mut old = Slot(slot.load(Ordering::Acquire));
            while !old.is_frozen() {
                crash_point!("commit: record counted, slot old");
                if swap_if(slot, old, new) {
                    crash_point!("commit: slot new, old record counted");
                    let counters = &s.counters[self.index];
                    s.born(counters, new);
                    s.died(counters, old);
                    return true;
                }
                old = Slot(slot.load(Ordering::Acquire));
            }
            yield_now();
        }
    }

    /// Gives up a word that was made but not committed.
    pub(super) fn forget(&self, s: &Shared, word: Slot) {
        if let Kind::Stored(at) = word.kind() {
            s.segments.take_live(&s.arena, at.segment, at.share);
        }
    }

    /// Drops pages `from..until` of one cluster. Within an epoch.
    fn discard_in_cluster(&mut self, s: &Shared, cluster: usize, from: u64, until: u64) {
        let counters = &s.counters[self.index];
        if until - from == CLUSTER_PAGES as u64 {
            s.map.discard_cluster(&s.arena, self.volume, cluster, |word| s.died(counters, word));
            return;
        }
        let mut page = from;
        while page < until {
            let Some(leaf) = s.map.leaf(&s.arena, self.volume, cluster) else { return };
            let slot = &leaf[PageNo(page as u32).slot()];
            let old = Slot(slot.load(Ordering::Acquire));
            if old.is_frozen() {
                yield_now();
            } else if old == Slot::EMPTY || swap_if(slot, old, Slot::EMPTY) {
                crash_point!("discard: slot empty, old record counted");
                s.died(counters, old);
                page += 1;
            }
        }
        s.map.drop_if_empty(&s.arena, self.volume, cluster, PageNo(until as u32).slot());
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Within an epoch, as every sealing of a lane's: until it ends, no segment that was seen
        // sealed and dead comes back as another.
        self.in_epoch(|lane, s| lane.appender.close(s));
        self.store.put_lane(self.index);
    }
}
