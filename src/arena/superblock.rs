//! The superblock: what an arena is, so that another process can open it, and the volumes' sizes.
//!
//! ```text
//! byte 0   magic · 8 version · 16 segment bytes · 24 frames · 32 metadata pages
//!      40  most pages that a record of this arena may hold · 48 codecs in use, a bit each
//!      56  frames ever grown · 64 metadata pages ever grown: the watermarks of hugetlbfs
//!      72  segments that the table has room for · 80 table entries ever grown
//!      88  16 bytes: the first disk tier that pages may lie on, 0: none · 104 32 bytes: the key they are sealed with
//!      136 memory limit by the configuration when 144 was set · 144 the limit in its place, 0: none
//!      152 1: that tier is being drained · 160 its extents
//!      168 no segment was sealed with a greater number when a part of the table was given back
//!      176 a second memory tier's own limit by the configuration when 184 was set · 184 the one in its place, 0: none
//!      192 three words, of idle time, share of a processor, marks: set in the configuration's place, and one; 0: none;
//!          in the upper half the configuration's when it was set
//!      256 the four disk tiers, 64 bytes each: 0 id · 16 being drained · 24 extents (of the first these are above) ·
//!          32 what the place was called where it is, 0: not known
//!     1024 of each of the four 64 of 4 bytes: its extents to which writes may come late, and one; 0: none
//!     2048 the dictionaries (`arena/dictionaries.rs`)
//!     4096 the volumes, 64 bytes each: 0 size in bytes, 0: no such volume · 32 the 8 links of its map's root
//! ```
//! Of the volumes only those 4 KiB are there in which there is one.
//! The magic is stored last, so an arena without it is one that was never handed out: empty. A
//! volume's size is stored last, so a volume without it does not exist.

use super::bound::{bound, AllBound, Bound, TierAt};
use super::dictionaries::{LINKS, MOST_DICTIONARIES};
use super::file::{ArenaFile, START_BYTES};
use super::mapping::Mapping;
use super::{ROOT_ENTRIES, SEGMENT_ENTRY_BYTES};
use crate::config::Checked;
use crate::error::{Error, Result};
use crate::page::{TierNo, VolumeId, MAX_VOLUMES, MAX_VOLUME_BYTES, PAGE_BYTES};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::tier::{MAX_EXTENTS, NOTES};

/// First 8 bytes of an arena.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"GHOSTSWP");
/// Version of the layout of the arenas that are made; one of a later is refused, or of one before [`OLDEST`].
pub const VERSION: u64 = 7;
/// An arena of this version is one of ours with no disk tier but the first. It stays so until there is another, so that
/// whoever made it can have it back.
pub const OLDEST: u64 = 6;

const FRAMES_AT: usize = 24;
const VERSION_AT: usize = 8;
const GROUP_AT: usize = 40;
const CODECS_AT: usize = 48;
const GROWN_FRAMES_AT: usize = 56;
const GROWN_META_AT: usize = 64;
const MAX_SEGMENTS_AT: usize = 72;
const GROWN_IDS_AT: usize = 80;
const KEY_AT: usize = 104;
const LIMIT_OF_AT: usize = 136;
const LIMIT_AT: usize = 144;
const SEQUENCE_AT: usize = 168;
const FIELDS_END: usize = 176;
/// Not among the fields that an arena has before its magic; nor what follows.
const OWN_OF_AT: usize = 176;
const OWN_AT: usize = 184;
const TUNED_AT: usize = 192;
/// Within the superblock's 4 KiB, which are zero where nothing is said of them.
const LATE_AT: usize = 1024;
const DICTIONARIES_AT: usize = 2048;
const DICTIONARY_BYTES: usize = 128;
const VOLUMES_AT: usize = START_BYTES;
const VOLUME_BYTES: usize = 64;
const ROOT_AT: usize = 32;
/// End of the superblock.
const END: usize = VOLUMES_AT + MAX_VOLUMES * VOLUME_BYTES;

const MAX_FRAMES: u32 = (1 << 24) - 1;
const MAX_META: u32 = (1 << 31) - 2;

/// What decides where everything is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Geometry {
    pub segment_bytes: usize,
    pub max_frames: u32,
    pub max_meta: u32,
    /// In memory and below: as many as there could be, whether there is a tier below or not.
    pub max_segments: u32,
    pub unit: usize,
}

/// Byte offsets of the arena's parts.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub table_at: usize,
    pub meta_at: usize,
    pub frames_at: usize,
    pub end: usize,
}

impl Geometry {
    /// What the configuration asks for.
    pub fn wanted(c: &Checked, unit: usize) -> Geometry {
        let max_frames = (c.limit_bytes / u64::from(c.segment_bytes)).min(u64::from(MAX_FRAMES)) as u32;
        Geometry {
            segment_bytes: c.segment_bytes as usize,
            max_frames,
            max_segments: (max_frames + MAX_EXTENTS).min(MAX_FRAMES),
            max_meta: (c.limit_bytes / PAGE_BYTES as u64).min(u64::from(MAX_META)) as u32,
            unit,
        }
    }

    /// What an arena says of itself. None: it is empty.
    pub fn found(file: &ArenaFile) -> Result<Option<Geometry>> {
        let start = file.start()?;
        let word = |i: usize| u64::from_le_bytes(start[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
        let bad = |why: String| Err(Error::BadArena(why));
        match (word(0), word(1)) {
            (MAGIC, OLDEST..=VERSION) => {}
            (MAGIC, other) => {
                return bad(format!("its format is version {other}; this program reads {OLDEST} to {VERSION}"));
            }
            (0, 0 | OLDEST..=VERSION) if start[FIELDS_END..].iter().all(|b| *b == 0) && nothing_after_start(file)? => {
                return Ok(None)
            }
            _ => return bad("it is not an arena of ghostswap: its magic is missing".into()),
        }
        let sound = word(2).is_power_of_two()
            && (64 << 10..=1 << 20).contains(&word(2))
            && (1..=u64::from(MAX_FRAMES)).contains(&word(3))
            && (1..=u64::from(MAX_META)).contains(&word(4))
            && (word(3)..=u64::from(MAX_FRAMES)).contains(&word(MAX_SEGMENTS_AT / 8));
        let g = Geometry {
            segment_bytes: word(2) as usize,
            max_frames: word(3) as u32,
            max_meta: word(4) as u32,
            max_segments: word(MAX_SEGMENTS_AT / 8) as u32,
            unit: file.unit(),
        };
        if !sound || g.layout().end as u64 != file.len()? {
            return bad(format!(
                "{} frames of {} bytes and {} metadata pages do not make up its {} bytes",
                word(3),
                word(2),
                word(4),
                file.len()?
            ));
        }
        Ok(Some(g))
    }

    pub fn layout(&self) -> Layout {
        let up = |n: usize| n.div_ceil(self.unit) * self.unit;
        let table_at = up(END);
        let meta_at = up(table_at + self.max_segments as usize * SEGMENT_ENTRY_BYTES);
        // Metadata pages are numbered from 1, so that 0 can mean "none".
        let frames_at = (meta_at + (self.max_meta as usize + 1) * PAGE_BYTES).div_ceil(2 << 20) * (2 << 20);
        let end = up(frames_at + self.max_frames as usize * self.segment_bytes);
        Layout { table_at, meta_at, frames_at, end }
    }
}

/// True if the file holds nothing but perhaps its first page. A hugetlb file cannot tell; there
/// the first page, all zero, has to do.
fn nothing_after_start(file: &ArenaFile) -> Result<bool> {
    Ok(file.hugetlb() || file.next_data(START_BYTES, usize::MAX)?.is_none())
}

/// What else can be set of tiers, each a number.
#[derive(Clone, Copy)]
pub(crate) enum Tuned {
    /// Seconds after which pages are compressed again.
    Idle = 0,
    /// Percent of a processor that this may take.
    Cpu = 1,
    /// When segments go down: two numbers, so that both change at once.
    Marks = 2,
}

/// The superblock of a mapped arena.
pub(super) struct Superblock<'a>(pub &'a Mapping);

impl<'a> Superblock<'a> {
    /// Makes an empty arena one. Killed before the magic, it stays empty.
    pub fn initialise(&self, g: &Geometry, key: &[u8; 32]) {
        let fields = [VERSION, g.segment_bytes as u64, u64::from(g.max_frames), u64::from(g.max_meta)];
        let places = (8..).step_by(8).zip(fields).chain([(MAX_SEGMENTS_AT, u64::from(g.max_segments))]);
        for (at, v) in places.chain((KEY_AT..).step_by(8).zip(words(key))) {
            crash_point!("superblock: before a field");
            self.0.u64_at(at).store(v, Ordering::Relaxed);
        }
        crash_point!("superblock: before the magic");
        self.0.u64_at(0).store(MAGIC, Ordering::Release);
        crash_point!("superblock: after the magic");
    }

    /// Adds what this store may write, before it writes any of it, and returns what the arena may
    /// hold by now: most pages to a record, codecs.
    pub fn allow(&self, group_pages: usize, codecs: u64) -> (usize, u64) {
        let group = self.0.u64_at(GROUP_AT).fetch_max(group_pages as u64, Ordering::Release);
        let before = self.0.u64_at(CODECS_AT).fetch_or(codecs, Ordering::Release);
        (group_pages.max(group as usize), codecs | before)
    }

    /// The same, of what was allowed so far.
    pub fn allowed(&self) -> (usize, u64) {
        let word = |at| self.0.u64_at(at).load(Ordering::Acquire);
        (word(GROUP_AT) as usize, word(CODECS_AT))
    }

    /// How many there may be.
    pub fn frames(&self) -> usize {
        self.0.u64_at(FRAMES_AT).load(Ordering::Relaxed) as usize
    }

    pub fn grown_frames(&self) -> &'a AtomicU64 {
        self.0.u64_at(GROWN_FRAMES_AT)
    }

    pub fn grown_ids(&self) -> &'a AtomicU64 {
        self.0.u64_at(GROWN_IDS_AT)
    }

    /// What pages on disk are sealed with. It never leaves the arena, which is never swapped out.
    pub fn key(&self) -> [u8; 32] {
        self.bytes(KEY_AT)
    }

    /// The disk tiers that this arena's pages go to.
    pub fn tiers(&self) -> AllBound {
        std::array::from_fn(|no| bound(TierNo(no as u8), |at| self.0.u64_at(at).load(Ordering::Acquire)))
    }

    /// Binds a place of the arena's to a disk tier, before anything goes there; it is bound to none. Killed half-way it
    /// still is. Programs that know of one tier only cannot read what comes of more.
    pub fn set_tier(&self, no: TierNo, tier: &Bound) {
        let at = TierAt::of(no);
        if no != TierNo(0) {
            self.0.u64_at(VERSION_AT).store(VERSION, Ordering::Release);
        }
        let before = [(at.drain, 0), (at.extents, u64::from(tier.extents)), (at.place, tier.place)];
        for (at, v) in before.into_iter().chain((at.id..).step_by(8).zip(words(&tier.id))) {
            crash_point!("superblock: before a part of the tier");
            self.0.u64_at(at).store(v, Ordering::Release);
        }
    }

    /// Its place is called so by now.
    pub fn rename_tier(&self, no: TierNo, place: u64) {
        self.0.u64_at(TierAt::of(no).place).store(place, Ordering::Release);
    }

    /// Binds that place to none: nothing is there, and nobody will look there again. The first store does it. What it was
    /// called stays: should it come back, writes that may come late are known.
    pub fn forget_tier(&self, no: TierNo) {
        let at = TierAt::of(no);
        for at in [at.id, at.id + 8, at.drain, at.extents] {
            crash_point!("superblock: before a part of the tier is forgotten");
            self.0.u64_at(at).store(0, Ordering::Release);
        }
    }

    /// What a place was called that is bound to none.
    pub fn place_before(&self, no: TierNo) -> u64 {
        self.0.u64_at(TierAt::of(no).place).load(Ordering::Acquire)
    }

    /// Numbers up to this one were given to sealed segments, whatever the table says.
    pub fn sequence(&self) -> &'a AtomicU64 {
        self.0.u64_at(SEQUENCE_AT)
    }

    /// The limit that was set in the place of the configuration's, while that is the same.
    pub fn limit(&self, configured: u64) -> Option<u64> {
        let [of, set] = [LIMIT_OF_AT, LIMIT_AT].map(|at| self.0.u64_at(at).load(Ordering::Acquire));
        (set != 0 && of == configured).then_some(set)
    }

    /// Sets it. Killed half-way there is none.
    pub fn set_limit(&self, configured: u64, bytes: u64) {
        for (at, v) in [(LIMIT_AT, 0), (LIMIT_OF_AT, configured), (LIMIT_AT, bytes)] {
            crash_point!("superblock: before a part of the limit");
            self.0.u64_at(at).store(v, Ordering::Release);
        }
    }

    /// What a second tier may hold beside the first, likewise.
    pub fn own_limit(&self, configured: u64) -> Option<u64> {
        let [of, set] = [OWN_OF_AT, OWN_AT].map(|at| self.0.u64_at(at).load(Ordering::Acquire));
        (set != 0 && of == configured).then_some(set)
    }

    /// Likewise.
    pub fn set_own_limit(&self, configured: u64, bytes: u64) {
        for (at, v) in [(OWN_AT, 0), (OWN_OF_AT, configured), (OWN_AT, bytes)] {
            crash_point!("superblock: before a part of a second tier's limit");
            self.0.u64_at(at).store(v, Ordering::Release);
        }
    }

    /// Another setting in the configuration's place, likewise.
    pub fn tuned(&self, what: Tuned, configured: u32) -> Option<u32> {
        let word = self.0.u64_at(TUNED_AT + what as usize * 8).load(Ordering::Acquire);
        let set = (word as u32).checked_sub(1)?;
        ((word >> 32) as u32 == configured).then_some(set)
    }

    /// Likewise.
    pub fn tune(&self, what: Tuned, configured: u32, set: u32) {
        crash_point!("superblock: before a setting");
        let word = u64::from(configured) << 32 | u64::from(set.saturating_add(1));
        self.0.u64_at(TUNED_AT + what as usize * 8).store(word, Ordering::Release);
    }

    /// Not zero: the disk tier is to be empty.
    pub fn drain(&self, no: TierNo) -> &'a AtomicU64 {
        self.0.u64_at(TierAt::of(no).drain)
    }

    /// Where on it writes of this store may land when it is no more.
    pub fn late(&self, no: TierNo) -> &'a [AtomicU32] {
        self.0.halves_at(LATE_AT + no.index() * NOTES * 4, NOTES)
    }

    /// What is said of the dictionary with that number: length and serial, checksum; its pages.
    pub fn dictionary(&self, number: u8) -> ([&'a AtomicU64; 2], &'a [AtomicU32]) {
        let at = DICTIONARIES_AT + usize::from(number - 1) * DICTIONARY_BYTES;
        ([self.0.u64_at(at), self.0.u64_at(at + 8)], self.0.halves_at(at + 16, LINKS))
    }

    /// How long each of them is, 0: there is none.
    pub fn dictionary_bytes(&self) -> [usize; MOST_DICTIONARIES as usize] {
        std::array::from_fn(|i| self.dictionary(i as u8 + 1).0[0].load(Ordering::Acquire) as u32 as usize)
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (i, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&self.0.u64_at(at + i * 8).load(Ordering::Acquire).to_le_bytes());
        }
        bytes
    }

    pub fn grown_meta(&self) -> &'a AtomicU64 {
        self.0.u64_at(GROWN_META_AT)
    }

    pub fn volume_bytes(&self, v: VolumeId) -> &'a AtomicU64 {
        self.0.u64_at(volume_at(v))
    }

    pub fn root(&self, v: VolumeId) -> &'a [AtomicU32] {
        self.0.halves_at(volume_at(v) + ROOT_AT, ROOT_ENTRIES)
    }

    /// Makes room for a volume.
    pub fn populate_volume(&self, v: VolumeId) -> Result<()> {
        self.0.populate(volume_at(v), VOLUME_BYTES)
    }

    /// Sizes of the volumes there are.
    pub fn volumes(&self) -> Result<Vec<u64>> {
        let mut sizes = Vec::new();
        for v in (0..MAX_VOLUMES as u16).map(VolumeId) {
            let first_of_page = volume_at(v) % PAGE_BYTES == 0;
            if first_of_page && sizes.last() == Some(&0) {
                break;
            }
            if first_of_page {
                self.populate_volume(v)?;
            }
            sizes.push(self.volume_bytes(v).load(Ordering::Acquire));
        }
        let count = sizes.iter().take_while(|b| **b != 0).count();
        let sound = |b: &u64| *b % PAGE_BYTES as u64 == 0 && *b <= MAX_VOLUME_BYTES;
        if !sizes[..count].iter().all(sound) || sizes[count..].iter().any(|b| *b != 0) {
            return Err(Error::BadArena("its volumes' sizes make no sense".into()));
        }
        sizes.truncate(count);
        Ok(sizes)
    }
}

fn volume_at(v: VolumeId) -> usize {
    VOLUMES_AT + usize::from(v.0) * VOLUME_BYTES
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes")))
}

#[cfg(test)]
mod tests {
    use super::super::bound::tiers_of;
    use super::*;

    #[test]
    fn bytes_are_as_docs_format_says() {
        let geometry =
            Geometry { segment_bytes: 64 << 10, max_frames: 64, max_meta: 1024, max_segments: 70, unit: 4096 };
        let file = ArenaFile::new(super::super::create_arena(false).unwrap()).unwrap();
        assert_eq!(Geometry::found(&file).unwrap(), None);
        file.resize(geometry.layout().end).unwrap();
        assert_eq!(Geometry::found(&file).unwrap(), None, "sparse: still empty");
        let map = Mapping::new(file, geometry.layout().end).unwrap();
        let block = Superblock(&map);
        block.initialise(&geometry, &[7; 32]);
        assert_eq!(block.tiers(), [None; 4]);
        let bound = |id, extents| Bound { id: [id; 16], extents, place: 0x11 };
        block.set_tier(TierNo(0), &bound(3, 6));
        assert_eq!((block.tiers(), block.key()), ([Some(bound(3, 6)), None, None, None], [7; 32]));
        block.sequence().store(12, Ordering::Relaxed);
        assert_eq!((block.limit(9), block.frames()), (None, 64));
        block.set_limit(9, 7);
        block.drain(TierNo(0)).store(1, Ordering::Relaxed);
        block.late(TierNo(0))[63].store(8, Ordering::Relaxed);
        block.set_tier(TierNo(2), &bound(5, 9));
        block.drain(TierNo(2)).store(1, Ordering::Relaxed);
        block.late(TierNo(3))[63].store(4, Ordering::Relaxed);
        assert_eq!((block.limit(9), block.limit(8)), (Some(7), None));
        assert_eq!((block.own_limit(0), block.tuned(Tuned::Cpu, 25)), (None, None));
        block.set_own_limit(0, 5);
        assert_eq!((block.own_limit(0), block.own_limit(1)), (Some(5), None));
        let all = [(Tuned::Idle, u32::MAX, 0), (Tuned::Cpu, 25, 3), (Tuned::Marks, 0, 0x5a50)];
        all.iter().for_each(|(what, of, set)| block.tune(*what, *of, *set));
        for (what, of, set) in all {
            assert_eq!((block.tuned(what, of), block.tuned(what, 7)), (Some(set), None));
        }
        assert_eq!(block.allow(4, 0b10), (4, 0b10));
        assert_eq!(block.allow(1, 0b100), (4, 0b110));
        block.volume_bytes(VolumeId(1)).store(8192, Ordering::Relaxed);
        assert_eq!(block.dictionary_bytes(), [0; 7]);
        let (words, links) = block.dictionary(7);
        [0x0000_0009_0000_1000, 0x55].iter().zip(words).for_each(|(value, word)| word.store(*value, Ordering::Relaxed));
        links[15].store(11, Ordering::Relaxed);
        assert_eq!((links.len(), block.dictionary_bytes()), (16, [0, 0, 0, 0, 0, 0, 4096]));
        let start = map.file().start().unwrap();
        assert_eq!(tiers_of(&start), block.tiers());
        assert_eq!(block.tiers(), [Some(bound(3, 6)), None, Some(bound(5, 9)), None]);
        assert_eq!((&start[256..288], &start[288..296]), (&[0; 32][..], &[0x11, 0, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!((&start[384..400], &start[400], &start[408], &start[416]), (&[5; 16][..], &1, &9, &0x11));
        assert_eq!(start[2044..2048], 4u32.to_le_bytes());
        assert_eq!(start[..8], *b"GHOSTSWP");
        assert_eq!((&start[88..104], &start[104..136]), (&[3; 16][..], &[7; 32][..]));
        assert_eq!(start[1024 + 63 * 4..1024 + 64 * 4], 8u32.to_le_bytes());
        assert_eq!(start[2048..2816], [0; 768]);
        assert_eq!(start[2816..2832], [0, 16, 0, 0, 9, 0, 0, 0, 0x55, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((&start[2832 + 60..2832 + 64], &start[2896..]), (&[11, 0, 0, 0][..], &[0; 1200][..]));
        let fields = [(8, VERSION), (16, 65536), (24, 64), (32, 1024), (40, 4), (48, 6), (56, 0), (72, 70)];
        for (at, want) in fields.into_iter().chain([(136, 9), (144, 7), (152, 1), (160, 6), (168, 12)]) {
            assert_eq!(start[at..at + 8], want.to_le_bytes(), "at {at}");
        }
        block.root(VolumeId(1))[7].store(5, Ordering::Relaxed);
        assert_eq!(map.u64_at(4096 + 64).load(Ordering::Relaxed), 8192);
        assert_eq!(map.halves_at(4096 + 64 + 32, 8)[7].load(Ordering::Relaxed), 5);
        assert!(block.volumes().is_err(), "a volume after a gap");
        block.volume_bytes(VolumeId(0)).store(4096, Ordering::Relaxed);
        assert_eq!(block.volumes().unwrap(), [4096, 8192]);
        // Those of the first page are as many as it has room for.
        (0..64).for_each(|v| block.volume_bytes(VolumeId(v)).store(4096, Ordering::Relaxed));
        assert_eq!(block.volumes().unwrap().len(), 64);
        (64..1024).for_each(|v| block.volume_bytes(VolumeId(v)).store(8192, Ordering::Relaxed));
        assert_eq!(block.volumes().unwrap().len(), MAX_VOLUMES);
        block.forget_tier(TierNo(0));
        assert_eq!((block.tiers()[0], block.drain(TierNo(0)).load(Ordering::Relaxed)), (None, 0));
        assert_eq!((block.place_before(TierNo(0)), block.tiers()[2]), (0x11, Some(bound(5, 9))));
        // As a program made it that knows of one tier.
        map.u64_at(8).store(OLDEST, Ordering::Relaxed);
        assert_eq!(Geometry::found(map.file()).unwrap(), Some(geometry));
        block.set_tier(TierNo(0), &bound(3, 6));
        assert_eq!(map.u64_at(8).load(Ordering::Relaxed), OLDEST);
        block.set_tier(TierNo(1), &bound(4, 6));
        assert_eq!(map.u64_at(8).load(Ordering::Relaxed), VERSION);
        assert_eq!(Geometry::found(map.file()).unwrap(), Some(geometry));
    }
}
