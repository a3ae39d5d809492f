//! The arena: all that must outlive the daemon, in one sparse shared mapping, named by offsets and
//! indices, never by pointers.
//!
//! ```text
//! 0                 superblock (64 KiB): magic, version, geometry
//! volume roots      64 × 32 KiB: the top node of each volume's map
//! segment table     32 bytes a segment: where it lives, what of it is live
//! metadata pages    4 KiB nodes of the maps, on demand
//! frames            bytes of the segments in memory, on demand
//! ```
//! Free metadata pages hang in a stack through their first word; they are zero but for it. Free
//! frames and segment ids are kept in stacks outside the arena, since a walk rebuilds them.
//!
//! Lock order: none here. Both stacks are lock-free with a tag against ABA.

mod mapping;
mod stack;

pub(crate) use mapping::{host_memory, Mapping};
pub(crate) use stack::IndexStack;

use crate::config::Checked;
use crate::error::Result;
use crate::page::{FrameNo, MetaNo, SegmentId, VolumeId, MAX_VOLUMES, PAGE_BYTES};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// First 8 bytes of an arena.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"GHOSTSWP");
/// Layout version; an arena of another one is refused.
pub(crate) const VERSION: u64 = 1;
/// Entries of a volume's top node.
pub(crate) const ROOT_ENTRIES: usize = 8192;
/// Bytes of a segment table entry.
pub(crate) const SEGMENT_ENTRY_BYTES: usize = 32;

const SUPERBLOCK_BYTES: usize = 64 << 10;
const ROOT_BYTES: usize = ROOT_ENTRIES * 4;
/// Growth touches memory in steps of this, so that one step cannot wait long.
const POPULATE_STEP: usize = 64 << 10;

/// The arena and its free lists.
pub(crate) struct Arena {
    map: Mapping,
    segment_bytes: usize,
    roots_at: usize,
    table_at: usize,
    meta_at: usize,
    frames_at: usize,
    max_frames: u32,
    max_meta: u32,
    meta_head: AtomicU64,
    /// Free metadata pages, populated.
    meta_ready: AtomicU32,
    /// Free frames, populated.
    frames: IndexStack,
    ids: IndexStack,
}

impl Arena {
    pub fn new(c: &Checked) -> Result<Arena> {
        let unit = if c.hugetlb { 2 << 20 } else { PAGE_BYTES };
        let up = |n: usize| n.div_ceil(unit) * unit;
        let segment_bytes = c.segment_bytes as usize;
        let max_frames = (c.limit_bytes / segment_bytes as u64).min((1 << 24) - 1) as u32;
        let max_meta = (c.limit_bytes / PAGE_BYTES as u64).min((1 << 31) - 2) as u32;
        let roots_at = SUPERBLOCK_BYTES;
        let table_at = up(roots_at + MAX_VOLUMES * ROOT_BYTES);
        let meta_at = up(table_at + max_frames as usize * SEGMENT_ENTRY_BYTES);
        // Metadata pages are numbered from 1, so that 0 can mean "none".
        let frames_at = up(meta_at + (max_meta as usize + 1) * PAGE_BYTES);
        let frames_at = frames_at.div_ceil(2 << 20) * (2 << 20);
        let end = up(frames_at + max_frames as usize * segment_bytes);
        let map = Mapping::new(end, c.hugetlb)?;
        map.populate(0, PAGE_BYTES)?;
        for (i, v) in
            [MAGIC, VERSION, segment_bytes as u64, u64::from(max_frames), u64::from(max_meta)].iter().enumerate()
        {
            map.u64_at(i * 8).store(*v, Ordering::Relaxed);
        }
        Ok(Arena {
            map,
            segment_bytes,
            roots_at,
            table_at,
            meta_at,
            frames_at,
            max_frames,
            max_meta,
            meta_head: AtomicU64::new(0),
            meta_ready: AtomicU32::new(0),
            frames: IndexStack::new(max_frames as usize),
            ids: IndexStack::new(max_frames as usize),
        })
    }

    pub fn max_frames(&self) -> u32 {
        self.max_frames
    }
    pub fn max_meta(&self) -> u32 {
        self.max_meta
    }
    pub fn segment_bytes(&self) -> usize {
        self.segment_bytes
    }

    // --- volume roots -------------------------------------------------------------------------

    pub fn populate_root(&self, v: VolumeId) -> Result<()> {
        self.map.populate(self.roots_at + v.0 as usize * ROOT_BYTES, ROOT_BYTES)
    }
    pub fn root(&self, v: VolumeId) -> &[AtomicU32] {
        self.map.halves_at(self.roots_at + v.0 as usize * ROOT_BYTES, ROOT_ENTRIES)
    }

    // --- metadata pages -----------------------------------------------------------------------

    /// A metadata page as a leaf of slots.
    pub fn leaf(&self, m: MetaNo) -> &[AtomicU64] {
        self.map.words_at(self.meta_at + m.0 as usize * PAGE_BYTES, PAGE_BYTES / 8)
    }
    /// A metadata page as an inner node of links.
    pub fn node(&self, m: MetaNo) -> &[AtomicU32] {
        self.map.halves_at(self.meta_at + m.0 as usize * PAGE_BYTES, PAGE_BYTES / 4)
    }
    pub fn meta_ready(&self) -> u32 {
        self.meta_ready.load(Ordering::Relaxed)
    }

    /// A free metadata page, all zero. None: growth is behind.
    pub fn take_meta(&self) -> Option<MetaNo> {
        let mut head = self.meta_head.load(Ordering::Acquire);
        loop {
            let top = head as u32;
            if top == 0 {
                return None;
            }
            // The page may be taken and in use by another thread by now: then this reads some
            // word of it, and the tag makes the exchange fail.
            let next = self.node(MetaNo(top))[0].load(Ordering::Acquire);
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(next);
            match self.meta_head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.node(MetaNo(top))[0].store(0, Ordering::Relaxed);
                    self.meta_ready.fetch_sub(1, Ordering::Relaxed);
                    return Some(MetaNo(top));
                }
                Err(now) => head = now,
            }
        }
    }

    /// Puts back a page that is all zero and that nobody can reach any more.
    pub fn put_meta(&self, m: MetaNo) {
        // Counted first: the count may run ahead of the stack but never below zero.
        self.meta_ready.fetch_add(1, Ordering::Relaxed);
        let mut head = self.meta_head.load(Ordering::Relaxed);
        loop {
            self.node(m)[0].store(head as u32, Ordering::Relaxed);
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(m.0);
            match self.meta_head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Makes a run of metadata pages resident and free. Growth thread only.
    pub fn grow_meta(&self, first: MetaNo, count: u32) -> Result<()> {
        self.map.populate(self.meta_at + first.0 as usize * PAGE_BYTES, count as usize * PAGE_BYTES)?;
        for i in 0..count {
            self.put_meta(MetaNo(first.0 + i));
        }
        Ok(())
    }

    /// Gives a free page's memory back to the host. Growth thread only.
    pub fn shrink_meta(&self) -> Option<MetaNo> {
        let m = self.take_meta()?;
        if self.map.give_back(self.meta_at + m.0 as usize * PAGE_BYTES, PAGE_BYTES) {
            return Some(m);
        }
        self.put_meta(m);
        None
    }

    // --- segments and frames ------------------------------------------------------------------

    /// The segment table entry, four words.
    pub fn segment_entry(&self, s: SegmentId) -> &[AtomicU64] {
        self.map.words_at(self.table_at + s.0 as usize * SEGMENT_ENTRY_BYTES, SEGMENT_ENTRY_BYTES / 8)
    }

    pub fn frames_ready(&self) -> u32 {
        self.frames.len()
    }

    /// A segment id with a frame, leaving `keep` frames for others.
    pub fn take_segment(&self, keep: u32) -> Option<(SegmentId, FrameNo)> {
        let frame = self.frames.pop(keep)?;
        // There are as many ids as frames that were ever populated, and every segment in memory
        // holds one of each, so an id is there whenever a frame is.
        let id = self.ids.pop(0).expect("a free segment id for every free frame");
        Some((SegmentId(id), FrameNo(frame)))
    }

    pub fn put_segment(&self, s: SegmentId, f: FrameNo) {
        self.ids.push(s.0);
        self.frames.push(f.0);
    }

    /// Makes a frame resident and free. Growth thread only; may wait for memory.
    pub fn grow_frame(&self, f: FrameNo, first_time: bool) -> Result<()> {
        let at = self.frame_at(f);
        let mut done = 0;
        while done < self.segment_bytes {
            self.map.populate(at + done, POPULATE_STEP.min(self.segment_bytes))?;
            done += POPULATE_STEP;
        }
        if first_time {
            self.map.populate(self.table_at + f.0 as usize * SEGMENT_ENTRY_BYTES, SEGMENT_ENTRY_BYTES)?;
            self.ids.push(f.0);
        }
        self.frames.push(f.0);
        Ok(())
    }

    /// Gives a free frame's memory back to the host. Growth thread only.
    pub fn shrink_frame(&self, keep: u32) -> Option<FrameNo> {
        let f = FrameNo(self.frames.pop(keep)?);
        if self.map.give_back(self.frame_at(f), self.segment_bytes) {
            return Some(f);
        }
        self.frames.push(f.0);
        None
    }

    fn frame_at(&self, f: FrameNo) -> usize {
        self.frames_at + f.0 as usize * self.segment_bytes
    }

    /// Published bytes of a segment in memory; the rules of `Mapping::bytes` hold.
    pub fn record_bytes(&self, f: FrameNo, offset: usize, len: usize) -> &[u8] {
        assert!(offset + len <= self.segment_bytes, "a record lies within its segment");
        self.map.bytes(self.frame_at(f) + offset, len)
    }

    /// The unwritten tail of an open segment; the rules of `Mapping::tail` hold.
    #[allow(clippy::mut_from_ref, reason = "see Mapping::tail")]
    pub fn open_tail(&self, f: FrameNo, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset + len <= self.segment_bytes, "a tail lies within its segment");
        self.map.tail(self.frame_at(f) + offset, len)
    }
}
