//! What of an arena is resident when a new process opens it, and making it so for this process:
//! pages that an earlier one populated are in the file, but in no page table of ours and not locked
//! by us. And the few steps of recovery that concern memory alone.
//!
//! Locking takes the kernel some 0.1 to 0.2 s for each GiB, and nobody can be served meanwhile if
//! it is done first. So only metadata is taken over whole at once, and of frames the page tables:
//! from then on the first touch of a page is a fault that finds all it needs and waits for nothing.
//! The growth thread locks the rest, a slice at a time (`adopt_slice`). Until it has, the pages are
//! as safe as the supervisor's own lock on them makes them.

use super::superblock::Superblock;
use super::{Arena, Resident, SEGMENT_ENTRY_BYTES};
use crate::error::Result;
use crate::page::{FrameNo, MetaNo, SegmentId, PAGE_BYTES};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Address space behind one page table.
pub(super) const PAGE_TABLE_BYTES: usize = 2 << 20;
/// Bytes locked between two looks at the reserve.
const ADOPT_SLICE: usize = 32 << 20;

/// What is resident.
pub(crate) struct Residency {
    /// Segment table entries from 0 on.
    pub entries: u32,
    /// Metadata pages, numbered from 0 here, from 1 in the arena.
    pub meta: Resident,
    /// Whole frames.
    pub frames: Resident,
    /// Frames of which a part is there: growth or giving back was cut short.
    pub torn: Resident,
}

impl Arena {
    /// Finds what is resident, and takes the metadata and the frames' page tables over. Waits for
    /// no new memory but that of page tables, unless something was swapped out.
    pub fn residency(&self) -> Result<Residency> {
        let mut found = Residency {
            entries: 0,
            meta: Resident::new(self.max_meta()),
            frames: Resident::new(self.max_frames()),
            torn: Resident::new(self.max_frames()),
        };
        if self.map.file().hugetlb() {
            for range in self.grown() {
                self.map.adopt(range.start, range.len())?;
                self.note(&mut found, range);
            }
            return Ok(found);
        }
        let mut from = 0;
        while let Some(range) = self.map.file().next_data(from, self.at.end)? {
            from = range.end;
            let metadata = range.start..range.end.min(self.at.frames_at);
            if !metadata.is_empty() {
                self.map.adopt(metadata.start, metadata.len())?;
            }
            self.adopt_tables(range.start.max(self.at.frames_at)..range.end)?;
            self.note(&mut found, range);
        }
        Ok(found)
    }

    /// Takes the first page of each page table of the range over, and so the table.
    fn adopt_tables(&self, range: Range<usize>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            self.map.adopt(at, 1)?;
            at = (at / PAGE_TABLE_BYTES + 1) * PAGE_TABLE_BYTES;
        }
        Ok(())
    }

    /// Takes a slice of what is resident from offset `from` on over, locked. Returns where to go on,
    /// or None at the end. Growth thread only: nobody else gives back what was found resident.
    pub fn adopt_slice(&self, from: usize) -> Result<Option<usize>> {
        if self.map.file().hugetlb() {
            return Ok(None);
        }
        let Some(range) = self.map.file().next_data(from, self.at.end)? else { return Ok(None) };
        let end = range.end.min(range.start + ADOPT_SLICE);
        self.map.adopt(range.start, end - range.start)?;
        Ok(Some(end))
    }

    /// Where hugetlbfs keeps all that was ever grown.
    fn grown(&self) -> [Range<usize>; 4] {
        let block = Superblock(&self.map);
        let frames = block.grown_frames().load(Ordering::Acquire).min(u64::from(self.max_frames())) as usize;
        let ids = block.grown_ids().load(Ordering::Acquire).min(u64::from(self.max_segments())) as usize;
        let meta = block.grown_meta().load(Ordering::Acquire).min(u64::from(self.max_meta())) as usize;
        let at = &self.at;
        [
            0..at.table_at,
            at.table_at..at.table_at + ids * SEGMENT_ENTRY_BYTES,
            at.meta_at + PAGE_BYTES..at.meta_at + (meta + 1) * PAGE_BYTES,
            at.frames_at..at.frames_at + frames * self.segment_bytes(),
        ]
    }

    fn note(&self, found: &mut Residency, range: Range<usize>) {
        let within = |start: usize, end: usize| {
            let (from, to) = (range.start.max(start), range.end.min(end));
            (from < to).then(|| from - start..to - start)
        };
        if let Some(table) = within(self.at.table_at, self.at.meta_at) {
            found.entries = ((table.end / SEGMENT_ENTRY_BYTES) as u32).min(self.max_segments());
        }
        let first_meta = self.at.meta_at + PAGE_BYTES;
        if let Some(meta) = within(first_meta, first_meta + self.max_meta() as usize * PAGE_BYTES) {
            (meta.start / PAGE_BYTES..meta.end.div_ceil(PAGE_BYTES)).for_each(|n| found.meta.set(n as u32));
        }
        let size = self.segment_bytes();
        if let Some(frames) = within(self.at.frames_at, self.at.frames_at + self.max_frames() as usize * size) {
            for f in frames.start / size..frames.end.div_ceil(size) {
                let whole = frames.start <= f * size && (f + 1) * size <= frames.end;
                if whole { &mut found.frames } else { &mut found.torn }.set(f as u32);
            }
        }
    }

    /// Makes the first entries of the segment table resident.
    pub fn populate_entries(&self, entries: u32) -> Result<()> {
        if entries == 0 {
            return Ok(());
        }
        self.map.populate(self.at.table_at, entries as usize * SEGMENT_ENTRY_BYTES)
    }

    /// Gives the memory of the table's entries from the `known`th on back, up to the `entries`th: nothing is in
    /// them but numbers that segments were sealed with, of which `sequence` is the greatest. Of hugetlbfs it stays.
    pub fn give_entries_back(&self, known: u32, entries: u32, sequence: u64) {
        let from = (self.at.table_at + known as usize * SEGMENT_ENTRY_BYTES).next_multiple_of(PAGE_BYTES);
        let end = (self.at.table_at + entries as usize * SEGMENT_ENTRY_BYTES).next_multiple_of(PAGE_BYTES);
        let block = Superblock(&self.map);
        if from >= end.min(self.at.meta_at) || self.map.file().hugetlb() {
            return;
        }
        // No number is given twice: what is on a disk rests on that.
        block.sequence().fetch_max(sequence, Ordering::Release);
        crash_point!("recovery: the table's end there");
        if self.map.give_back(from, end.min(self.at.meta_at) - from) {
            block.grown_ids().store(u64::from(known), Ordering::Release);
        }
    }

    /// The greatest number that a segment was sealed with when a part of the table was given back.
    pub fn sequence(&self) -> u64 {
        Superblock(&self.map).sequence().load(Ordering::Acquire)
    }

    /// Makes what is missing of a frame resident.
    pub fn mend_frame(&self, f: FrameNo) -> Result<()> {
        self.populate_frame(f, |_| true).map(|_| ())
    }

    /// Gives what there is of an unused frame back to the host.
    pub fn drop_torn_frame(&self, f: FrameNo) {
        self.map.give_back(self.frame_at(f), self.segment_bytes());
    }

    /// Puts a resident frame that no segment has among the free ones.
    pub fn adopt_frame(&self, f: FrameNo) {
        self.frames.push(f.0);
    }

    /// Puts a segment id that is not in use among the free ones.
    pub fn adopt_id(&self, id: u32) {
        self.put_id(SegmentId(id));
    }

    /// Puts a resident metadata page that nothing leads to among the free ones, whatever it holds.
    pub fn adopt_meta(&self, m: MetaNo) {
        self.zero_meta(m);
        crash_point!("recovery: a metadata page zeroed, not yet free");
        self.put_meta(m);
    }
}
