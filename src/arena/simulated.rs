//! What stands in for the mapping (`mapping.rs`) when the models run under loom: words are loom's
//! atomics, and so no file and no memory of the kernel's is behind them. Everything above it, the
//! arena's free lists included, is the code that ships.
//!
//! It checks what the models are about: words are touched only where memory was populated and not
//! given back; and of each byte of a record loom wants to know that whoever reads it knows of the
//! write, and whoever writes it knows of all reads before. A page's words as a leaf and as a node
//! are apart here, so the models say nothing of the one read as the other.
#![allow(unsafe_code, reason = "hands out references into maps that only grow")]

use super::file::ArenaFile;
use super::superblock::{Geometry, Superblock};
use super::{Arena, IndexStack, Linked};
use crate::error::Result;
use crate::page::{FrameNo, MetaNo, SegmentId, VolumeId, PAGE_BYTES};
use crate::sync::{AtomicU32, AtomicU64};
use loom::cell::UnsafeCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

#[derive(Default)]
struct Memory {
    words: BTreeMap<usize, Box<[AtomicU64]>>,
    halves: BTreeMap<usize, Box<[AtomicU32]>>,
    /// Pages of records.
    pages: BTreeMap<usize, Box<[u8]>>,
    /// Who read and who wrote each byte, for loom to judge.
    bytes: BTreeMap<usize, UnsafeCell<()>>,
    resident: BTreeSet<usize>,
}

/// A sparse simulated mapping.
pub(crate) struct Mapping {
    len: usize,
    // Never contended: loom switches threads at its own operations only, none of which is within.
    memory: Mutex<Memory>,
}

impl Mapping {
    pub fn new(_: ArenaFile, len: usize) -> Result<Mapping> {
        Ok(Mapping { len, memory: Mutex::default() })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn file(&self) -> &ArenaFile {
        unreachable!("no model asks for the file")
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().expect("nothing panics while it holds the memory")
    }

    pub fn u64_at(&self, offset: usize) -> &AtomicU64 {
        &self.words_at(offset, 1)[0]
    }

    pub fn words_at(&self, offset: usize, words: usize) -> &[AtomicU64] {
        assert!(self.memory().resident.contains(&(offset / PAGE_BYTES)), "a word at {offset} is in memory");
        let mut memory = self.memory();
        let made = memory.words.entry(offset).or_insert_with(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        // SAFETY: the box stays in the map, unchanged, for as long as self lives.
        unsafe { std::slice::from_raw_parts(made.as_ptr(), words.min(made.len())) }
    }

    pub fn halves_at(&self, offset: usize, halves: usize) -> &[AtomicU32] {
        assert!(self.memory().resident.contains(&(offset / PAGE_BYTES)), "words at {offset} are in memory");
        let mut memory = self.memory();
        let made = memory.halves.entry(offset).or_insert_with(|| (0..halves).map(|_| AtomicU32::new(0)).collect());
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(made.as_ptr(), halves.min(made.len())) }
    }

    fn range(&self, offset: usize, len: usize, look: impl Fn(&UnsafeCell<()>)) -> *mut u8 {
        let mut memory = self.memory();
        for at in offset..offset + len {
            look(memory.bytes.entry(at).or_insert_with(|| UnsafeCell::new(())));
        }
        let page = memory.pages.entry(offset / PAGE_BYTES).or_insert_with(|| vec![0; PAGE_BYTES].into());
        assert!(offset % PAGE_BYTES + len <= PAGE_BYTES, "records of a model lie within a page");
        // SAFETY: in bounds by the assertion.
        unsafe { page.as_mut_ptr().add(offset % PAGE_BYTES) }
    }

    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        let at = self.range(offset, len, |byte| byte.with(|_| ()));
        // SAFETY: the box stays in the map for as long as self lives; that nobody writes the bytes
        // meanwhile is what loom checks at this call and at the next of `tail`.
        unsafe { std::slice::from_raw_parts(at, len) }
    }

    #[allow(clippy::mut_from_ref, reason = "as in mapping.rs")]
    pub fn tail(&self, offset: usize, len: usize) -> &mut [u8] {
        let at = self.range(offset, len, |byte| byte.with_mut(|_| ()));
        // SAFETY: as above; the owner of the open segment makes one such slice at a time.
        unsafe { std::slice::from_raw_parts_mut(at, len) }
    }

    pub fn populate(&self, offset: usize, len: usize) -> Result<()> {
        self.memory().resident.extend(offset / PAGE_BYTES..(offset + len).div_ceil(PAGE_BYTES));
        Ok(())
    }

    pub fn adopt(&self, offset: usize, len: usize) -> Result<()> {
        self.populate(offset, len)
    }

    pub fn give_back(&self, offset: usize, len: usize) -> bool {
        let mut memory = self.memory();
        for page in offset / PAGE_BYTES..(offset + len).div_ceil(PAGE_BYTES) {
            memory.resident.remove(&page);
        }
        true
    }
}

pub(crate) fn host_memory() -> Result<(u64, u64)> {
    Ok((1 << 30, 1 << 30))
}

pub(crate) fn host_seconds() -> Result<u32> {
    Ok(1)
}

impl Arena {
    /// An arena with a volume, and with all of its metadata pages and frames grown and free.
    /// `segment_bytes` divides a page.
    pub(crate) fn simulated(segment_bytes: usize, max_frames: u32, max_meta: u32, volume_bytes: u64) -> Arena {
        let geometry = Geometry { segment_bytes, max_frames, max_meta, max_segments: max_frames, unit: PAGE_BYTES };
        let map = Mapping { len: geometry.layout().end, memory: Mutex::default() };
        map.populate(0, PAGE_BYTES).expect("simulated memory is there");
        Superblock(&map).initialise(&geometry, &[7; 32]);
        let arena = Arena {
            map,
            geometry,
            at: geometry.layout(),
            free_meta: Linked::new(),
            frames: IndexStack::new(max_frames as usize),
            ids: Linked::new(),
        };
        arena.grow_meta(MetaNo(1), max_meta).expect("simulated memory is there");
        for n in (0..max_frames).rev() {
            arena.grow_id(SegmentId(n)).expect("simulated memory is there");
            assert!(matches!(arena.grow_frame(FrameNo(n), |_| true), Ok(true)));
        }
        arena.create_volume(VolumeId(0), volume_bytes).expect("simulated memory is there");
        // Loom wants its atomics made before the threads that share them.
        arena.root(VolumeId(0));
        for m in 1..=max_meta {
            arena.leaf(MetaNo(m));
            arena.node(MetaNo(m));
        }
        for s in 0..max_frames {
            arena.segment_entry(SegmentId(s));
        }
        arena
    }
}
