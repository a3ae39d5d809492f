//! The arena: all that must outlive the daemon, in one sparse shared mapping, named by offsets and
//! indices, never by pointers.
//!
//! ```text
//! 0                 superblock (68 KiB): magic, version, geometry; the volumes: sizes, roots of their maps
//! segment table     32 bytes a segment, in memory or below: where it lives, what of it is live. There is room for
//!                   every segment that a tier below could hold, be there one or not; resident is what is in use
//! metadata pages    4 KiB nodes of the maps, on demand
//! frames            bytes of the segments in memory, on demand
//! ```
//! Free metadata pages hang in a stack through their first word; they are zero but for it. So do free segment ids
//! through the upper half of their entry's first word. Free frames are kept in a stack outside the arena. None of the
//! three is trusted when an arena is opened again: what no slot and no link leads to is free.
//!
//! Lock order: none here. The stacks are lock-free with a tag against ABA.

mod bound;
mod dictionaries;
mod file;
mod linked;
#[cfg_attr(loom, path = "simulated.rs")]
mod mapping;
mod resident;
mod scan;
mod spare;
mod stack;
mod standby;
mod superblock;

pub(crate) use bound::{AllBound, Bound};
pub(crate) use dictionaries::{InArena, MOST_DICTIONARIES};
pub use file::create_arena;
pub(crate) use mapping::{host_memory, host_seconds};
pub(crate) use resident::Resident;
pub(crate) use scan::Residency;
pub use spare::Spare;
pub(crate) use standby::Waiting;
pub(crate) use superblock::Tuned;
pub use superblock::{OLDEST as OLDEST_ARENA_VERSION, VERSION as ARENA_VERSION};

use crate::config::Checked;
use crate::error::{Error, Result};
use crate::page::{FrameNo, MetaNo, SegmentId, TierNo, VolumeId, CLUSTER_PAGES, PAGE_BYTES};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use linked::Linked;
use mapping::Mapping;
use stack::IndexStack;
use std::os::fd::BorrowedFd;
use superblock::{Geometry, Layout, Superblock};

/// Links of a volume's root.
pub(crate) const ROOT_ENTRIES: usize = if cfg!(loom) { 1 } else { 8 };
/// Entries of an inner node.
pub(crate) const NODE_ENTRIES: usize = if cfg!(loom) { 2 } else { 1024 };
/// Bytes of a segment table entry.
pub(crate) const SEGMENT_ENTRY_BYTES: usize = 32;

/// Growth touches memory in steps of this, so that one step cannot wait long.
const POPULATE_STEP: usize = 64 << 10;

/// Bytes of the kernel's random generator.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    file::random(&mut bytes)?;
    Ok(bytes)
}

/// The arena and its free lists.
pub(crate) struct Arena {
    map: Mapping,
    geometry: Geometry,
    at: Layout,
    /// Free metadata pages, populated.
    free_meta: Linked,
    /// Free frames, populated.
    frames: IndexStack,
    /// Free segment ids and one, their entries populated.
    ids: Linked,
}

impl Arena {
    /// Opens the arena in a file, an empty one being made an arena by the configuration. True: it
    /// was there already, and nothing in it is free until recovery has walked it. The
    /// configuration is fitted to what it finds.
    pub fn open(c: &mut Checked, waiting: Waiting) -> Result<(Arena, bool)> {
        let map = waiting.claim()?;
        let file = map.file();
        if c.hugetlb && !file.hugetlb() {
            return Err(Error::BadArena("it is not made of huge pages, which were asked for".into()));
        }
        let found = Geometry::found(file)?;
        let geometry = match found {
            Some(g) => {
                c.fit(g.segment_bytes, u64::from(g.max_frames) * g.segment_bytes as u64)?;
                g
            }
            None => Geometry::wanted(c, file.unit()),
        };
        let at = geometry.layout();
        if found.is_none() {
            file.resize(at.end)?;
        }
        let map = map.of_len(at.end)?;
        map.populate(0, PAGE_BYTES)?;
        if found.is_none() {
            Superblock(&map).initialise(&geometry, &random()?);
        }
        (c.group_pages_seen, c.codecs_seen) = Superblock(&map).allow(c.group_pages_seen, c.codecs_seen);
        let arena = Arena {
            map,
            geometry,
            at,
            free_meta: Linked::new(),
            frames: IndexStack::new(geometry.max_frames as usize),
            ids: Linked::new(),
        };
        Ok((arena, found.is_some()))
    }

    /// Frames and metadata pages of one that is made by this configuration.
    pub fn wanted(c: &Checked) -> [usize; 2] {
        let geometry = Geometry::wanted(c, PAGE_BYTES);
        [geometry.max_frames as usize, geometry.max_meta as usize]
    }

    pub fn max_frames(&self) -> u32 {
        self.geometry.max_frames
    }
    pub fn max_segments(&self) -> u32 {
        self.geometry.max_segments
    }
    pub fn max_meta(&self) -> u32 {
        self.geometry.max_meta
    }
    pub fn segment_bytes(&self) -> usize {
        self.geometry.segment_bytes
    }
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.map.file().fd()
    }

    // --- the disk tiers -----------------------------------------------------------------------

    /// The disk tiers that pages may lie on, by their places here. None: nothing of it is there.
    pub fn tiers(&self) -> AllBound {
        Superblock(&self.map).tiers()
    }
    pub fn set_tier(&self, no: TierNo, tier: &Bound) {
        Superblock(&self.map).set_tier(no, tier);
    }
    /// What its place is called, by a number.
    pub fn rename_tier(&self, no: TierNo, place: u64) {
        Superblock(&self.map).rename_tier(no, place);
    }
    /// There is none there any more.
    pub fn forget_tier(&self, no: TierNo) {
        Superblock(&self.map).forget_tier(no);
    }
    /// What was bound there before was called so.
    pub fn place_before(&self, no: TierNo) -> u64 {
        Superblock(&self.map).place_before(no)
    }
    /// Not zero: it is to be empty.
    pub fn drain(&self, no: TierNo) -> &AtomicU64 {
        Superblock(&self.map).drain(no)
    }
    /// Extents of it to which writes of this store may come late: a number and one each, or 0.
    pub fn late(&self, no: TierNo) -> &[AtomicU32] {
        Superblock(&self.map).late(no)
    }
    /// Most extents that there may be, of all tiers.
    pub fn max_extents(&self) -> u32 {
        self.max_segments() - self.max_frames()
    }
    /// The limit that was set in the place of the configuration's.
    pub fn limit(&self, configured: u64) -> Option<u64> {
        Superblock(&self.map).limit(configured)
    }
    pub fn set_limit(&self, configured: u64, bytes: u64) {
        Superblock(&self.map).set_limit(configured, bytes);
    }
    /// The same of a second tier's own.
    pub fn own_limit(&self, configured: u64) -> Option<u64> {
        Superblock(&self.map).own_limit(configured)
    }
    pub fn set_own_limit(&self, configured: u64, bytes: u64) {
        Superblock(&self.map).set_own_limit(configured, bytes);
    }
    /// Likewise.
    pub fn tuned(&self, what: Tuned, configured: u32) -> Option<u32> {
        Superblock(&self.map).tuned(what, configured)
    }
    pub fn tune(&self, what: Tuned, configured: u32, set: u32) {
        Superblock(&self.map).tune(what, configured, set);
    }
    /// Notes what is about to be written: most pages to a record, codecs.
    pub fn allow(&self, group_pages: usize, codecs: u64) {
        Superblock(&self.map).allow(group_pages, codecs);
    }
    pub fn key(&self) -> [u8; 32] {
        Superblock(&self.map).key()
    }

    // --- volumes ------------------------------------------------------------------------------

    /// Sizes of the volumes there are.
    pub fn volumes(&self) -> Result<Vec<u64>> {
        Superblock(&self.map).volumes()
    }

    /// Makes a volume: its size, stored last, says that it exists.
    pub fn create_volume(&self, v: VolumeId, bytes: u64) -> Result<()> {
        Superblock(&self.map).populate_volume(v)?;
        crash_point!("volume: there is room, size not stored");
        Superblock(&self.map).volume_bytes(v).store(bytes, Ordering::Release);
        Ok(())
    }

    /// Size of a volume that there is, and where it is kept.
    pub fn volume_bytes(&self, v: VolumeId) -> &AtomicU64 {
        Superblock(&self.map).volume_bytes(v)
    }

    pub fn root(&self, v: VolumeId) -> &[AtomicU32] {
        Superblock(&self.map).root(v)
    }

    // --- metadata pages -----------------------------------------------------------------------

    /// A metadata page as a leaf of slots.
    pub fn leaf(&self, m: MetaNo) -> &[AtomicU64] {
        self.map.words_at(self.at.meta_at + m.0 as usize * PAGE_BYTES, CLUSTER_PAGES)
    }
    /// A metadata page as an inner node of links.
    pub fn node(&self, m: MetaNo) -> &[AtomicU32] {
        self.map.halves_at(self.at.meta_at + m.0 as usize * PAGE_BYTES, NODE_ENTRIES)
    }
    /// Zeroes a metadata page that nobody else can reach, be it leaf or node.
    pub fn zero_meta(&self, m: MetaNo) {
        self.leaf(m).iter().for_each(|w| w.store(0, Ordering::Relaxed));
        // There a leaf and a node share no memory.
        #[cfg(loom)]
        self.node(m).iter().for_each(|w| w.store(0, Ordering::Relaxed));
    }
    pub fn meta_ready(&self) -> u32 {
        self.free_meta.len()
    }

    /// A free metadata page, all zero. None: growth is behind. Within an epoch, for all but growth,
    /// which alone gives pages back.
    pub fn take_meta(&self) -> Option<MetaNo> {
        let top = self.free_meta.pop(|top| self.node(MetaNo(top))[0].load(Ordering::Acquire))?;
        self.node(MetaNo(top))[0].store(0, Ordering::Relaxed);
        Some(MetaNo(top))
    }

    /// Puts back a page that is all zero and that nobody can reach any more.
    pub fn put_meta(&self, m: MetaNo) {
        self.free_meta.push(m.0, |next| self.node(m)[0].store(next, Ordering::Relaxed));
    }

    /// Makes a run of metadata pages resident and free. Growth thread only.
    pub fn grow_meta(&self, first: MetaNo, count: u32) -> Result<()> {
        self.map.populate(self.at.meta_at + first.0 as usize * PAGE_BYTES, count as usize * PAGE_BYTES)?;
        crash_point!("grow metadata: resident, not counted");
        for i in 0..count {
            self.put_meta(MetaNo(first.0 + i));
        }
        let grown = u64::from(first.0 + count - 1);
        Superblock(&self.map).grown_meta().fetch_max(grown, Ordering::Release);
        Ok(())
    }

    /// Gives a free page's memory back to the host, after a grace period: a lane in `take_meta` may
    /// be about to look at it, and would be the one to ask the host for it anew. Growth thread only.
    pub fn shrink_meta(&self, grace: impl Fn()) -> Option<MetaNo> {
        let m = self.take_meta()?;
        grace();
        crash_point!("shrink metadata: taken, still resident");
        if self.map.give_back(self.at.meta_at + m.0 as usize * PAGE_BYTES, PAGE_BYTES) {
            return Some(m);
        }
        self.put_meta(m);
        None
    }

    // --- segments and frames ------------------------------------------------------------------

    /// The segment table entry, four words.
    pub fn segment_entry(&self, s: SegmentId) -> &[AtomicU64] {
        self.map.words_at(self.at.table_at + s.0 as usize * SEGMENT_ENTRY_BYTES, SEGMENT_ENTRY_BYTES / 8)
    }

    pub fn ids_ready(&self) -> u32 {
        self.ids.len()
    }
    pub fn frames_ready(&self) -> u32 {
        self.frames.len()
    }

    /// A segment id with a frame, leaving `keep` frames for others.
    pub fn take_segment(&self, keep: u32) -> Option<(SegmentId, FrameNo)> {
        let frame = self.frames.pop(keep)?;
        // There are as many ids as frames and segments below together (`store/grow.rs`, wanted_ids),
        // and every segment holds one, so an id is there whenever a frame is.
        let next = |top: u32| (self.segment_entry(SegmentId(top - 1))[0].load(Ordering::Acquire) >> 32) as u32;
        let id = self.ids.pop(next).expect("a free segment id for every free frame") - 1;
        Some((SegmentId(id), FrameNo(frame)))
    }

    pub fn put_segment(&self, s: SegmentId, f: FrameNo) {
        self.put_id(s);
        self.put_frame(f);
    }

    /// Whose entry's state is free, which is 0: above it in the same word stands the next free one, and one.
    pub fn put_id(&self, s: SegmentId) {
        let word = &self.segment_entry(s)[0];
        self.ids.push(s.0 + 1, |next| word.store(u64::from(next) << 32, Ordering::Relaxed));
    }

    pub fn put_frame(&self, f: FrameNo) {
        self.frames.push(f.0);
    }

    /// Makes a table entry resident and its id free. Growth thread only.
    pub fn grow_id(&self, s: SegmentId) -> Result<()> {
        self.map.populate(self.at.table_at + s.0 as usize * SEGMENT_ENTRY_BYTES, SEGMENT_ENTRY_BYTES)?;
        Superblock(&self.map).grown_ids().fetch_max(u64::from(s.0) + 1, Ordering::Release);
        crash_point!("grow id: resident, not counted");
        self.put_id(s);
        Ok(())
    }

    /// Makes a frame resident and free. Growth thread only. `may` is asked for the bytes of each
    /// step; where it says no the frame stays as it is, to be gone on with, and this is false.
    pub fn grow_frame(&self, f: FrameNo, may: impl FnMut(usize) -> bool) -> Result<bool> {
        if !self.populate_frame(f, may)? {
            return Ok(false);
        }
        Superblock(&self.map).grown_frames().fetch_max(u64::from(f.0) + 1, Ordering::Release);
        crash_point!("grow frame: resident, not counted");
        self.put_frame(f);
        Ok(true)
    }

    fn populate_frame(&self, f: FrameNo, mut may: impl FnMut(usize) -> bool) -> Result<bool> {
        let at = self.frame_at(f);
        for done in (0..self.segment_bytes()).step_by(POPULATE_STEP) {
            // Apart, so that a test that stops at each kind of point leaves a torn frame behind.
            if done > 0 {
                crash_point!("grow frame: partly resident");
            } else {
                crash_point!("grow frame: nothing resident");
            }
            if !may(POPULATE_STEP) {
                return Ok(false);
            }
            self.map.populate(at + done, POPULATE_STEP.min(self.segment_bytes()))?;
        }
        Ok(true)
    }

    /// Gives a free frame's memory back to the host. Growth thread only.
    pub fn shrink_frame(&self, keep: u32) -> Option<FrameNo> {
        let f = FrameNo(self.frames.pop(keep)?);
        crash_point!("shrink frame: taken, still resident");
        if self.map.give_back(self.frame_at(f), self.segment_bytes()) {
            return Some(f);
        }
        self.frames.push(f.0);
        None
    }

    fn frame_at(&self, f: FrameNo) -> usize {
        self.at.frames_at + f.0 as usize * self.segment_bytes()
    }

    /// Published bytes of a segment in memory; the rules of `Mapping::bytes` hold.
    pub fn record_bytes(&self, f: FrameNo, offset: usize, len: usize) -> &[u8] {
        assert!(offset + len <= self.segment_bytes(), "a record lies within its segment");
        self.map.bytes(self.frame_at(f) + offset, len)
    }

    /// The unwritten tail of an open segment; the rules of `Mapping::tail` hold.
    #[allow(clippy::mut_from_ref, reason = "see Mapping::tail")]
    pub fn open_tail(&self, f: FrameNo, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset + len <= self.segment_bytes(), "a tail lies within its segment");
        self.map.tail(self.frame_at(f) + offset, len)
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;

    /// The same of segment ids, whose links lie in words that their holders write as well.
    #[test]
    fn an_id_has_one_holder() {
        model(Some(3), || {
            let arena = Arc::new(Arena::simulated(64, 3, 1, 4096));
            let held: Arc<[AtomicBool; 3]> = Arc::default();
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (arena, held) = (arena.clone(), held.clone());
                    loom::thread::spawn(move || {
                        let taken = [arena.take_segment(0), arena.take_segment(0)];
                        for (s, f) in taken.iter().flatten() {
                            assert!(!held[s.0 as usize].swap(true, Ordering::SeqCst), "id {} is held twice", s.0);
                            // Open, and free again.
                            arena.segment_entry(*s)[0].store(1 | u64::from(f.0) << 32, Ordering::Release);
                            arena.segment_entry(*s)[0].store(0, Ordering::Relaxed);
                        }
                        for (s, f) in taken.into_iter().flatten() {
                            held[s.0 as usize].store(false, Ordering::SeqCst);
                            arena.put_segment(s, f);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().expect("a model's thread ends"));
            assert_eq!((arena.ids_ready(), arena.frames_ready()), (3, 3));
            let mut all = [(); 4].map(|()| arena.take_segment(0).map(|(s, _)| s.0));
            all.sort_unstable();
            assert_eq!(all, [None, Some(0), Some(1), Some(2)]);
        });
    }
    use crate::sync::model;
    use std::sync::atomic::AtomicBool;
    use std::sync::Arc;

    /// As `stack::models::an_index_has_one_holder`, of metadata pages. (The models of the store have
    /// the rest: growth that gives a page back under a lane's eyes.)
    #[test]
    fn a_metadata_page_has_one_holder() {
        model(Some(3), || {
            let arena = Arc::new(Arena::simulated(64, 1, 3, 4096));
            let held: Arc<[AtomicBool; 4]> = Arc::default();
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (arena, held) = (arena.clone(), held.clone());
                    loom::thread::spawn(move || {
                        let taken = [arena.take_meta(), arena.take_meta()];
                        for m in taken.iter().flatten() {
                            assert!(!held[m.0 as usize].swap(true, Ordering::SeqCst), "page {} is held twice", m.0);
                            assert_eq!(arena.node(*m)[0].load(Ordering::Relaxed), 0, "a free page is zero");
                        }
                        for m in taken.into_iter().flatten() {
                            held[m.0 as usize].store(false, Ordering::SeqCst);
                            arena.put_meta(m);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().expect("a model's thread ends"));
            assert_eq!(arena.meta_ready(), 3);
            let mut all = [arena.take_meta(), arena.take_meta(), arena.take_meta()].map(|m| m.map(|m| m.0));
            all.sort_unstable();
            assert_eq!(all, [Some(1), Some(2), Some(3)]);
        });
    }
}
