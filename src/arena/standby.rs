//! An arena that waits to be opened: mapped beforehand, so that a take-over asks for no memory.
//!
//! Whoever stands by maps the file that another process's store is using, reads nothing of it and
//! holds no lock on it. Page tables are the largest thing that opening it would need, two for each
//! GiB in a thousand; [`Waiting::keep_up`] makes them as the other store grows, by taking over one
//! page of each. A page table stays when the other store gives its pages back.

use super::bound::{tiers_of, AllBound};
use super::dictionaries::MOST_DICTIONARIES;
use super::file::ArenaFile;
use super::mapping::Mapping;
use super::scan::PAGE_TABLE_BYTES;
use super::superblock::{Geometry, Superblock};
use super::{Spare, POPULATE_STEP, SEGMENT_ENTRY_BYTES};
use crate::codec::MOST_BYTES;
use crate::config::Checked;
use crate::error::Result;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

/// What a page table and the page in it may take.
const TABLE_COST: u64 = 64 << 10;

/// An arena's file, mapped if it is an arena already, not claimed.
pub(crate) struct Waiting {
    map: MaybeMapped,
    /// Page tables that are there, by their number in the mapping.
    tables: Vec<bool>,
}

/// A file with or without its mapping.
pub(crate) enum MaybeMapped {
    Mapped(Mapping),
    File(ArenaFile),
}

impl MaybeMapped {
    pub fn file(&self) -> &ArenaFile {
        match self {
            MaybeMapped::Mapped(map) => map.file(),
            MaybeMapped::File(file) => file,
        }
    }

    /// The mapping of all `len` bytes, made now if need be.
    pub fn of_len(self, len: usize) -> Result<Mapping> {
        match self {
            MaybeMapped::Mapped(map) => {
                assert_eq!(map.len(), len, "an arena keeps its size");
                Ok(map)
            }
            MaybeMapped::File(file) => Mapping::new(file, len),
        }
    }
}

impl Waiting {
    pub fn new(fd: OwnedFd) -> Result<Waiting> {
        let file = ArenaFile::new(fd)?;
        // What is wrong with an arena is said when it is opened.
        let end = match Geometry::found(&file) {
            Ok(Some(geometry)) if !file.hugetlb() => geometry.layout().end,
            _ => return Ok(Waiting { map: MaybeMapped::File(file), tables: Vec::new() }),
        };
        let map = MaybeMapped::Mapped(Mapping::new(file, end)?);
        Ok(Waiting { map, tables: vec![false; end.div_ceil(PAGE_TABLE_BYTES)] })
    }

    /// Bytes of the segments of an arena that is one already.
    pub fn segment_bytes(&self) -> Option<usize> {
        self.geometry().map(|g| g.segment_bytes)
    }

    /// Frames and metadata pages that an arena that is one already may have.
    pub fn sizes(&self) -> Option<[usize; 2]> {
        self.geometry().map(|g| [g.max_frames as usize, g.max_meta as usize])
    }

    /// The former alone, without asking the kernel where it is mapped.
    pub fn frames(&self) -> Option<usize> {
        match &self.map {
            MaybeMapped::Mapped(map) => Some(Superblock(map).frames()),
            MaybeMapped::File(_) => self.sizes().map(|[frames, _]| frames),
        }
    }

    /// Table entries that were grown in an arena that is one already.
    pub fn entries(&self) -> usize {
        let MaybeMapped::Mapped(map) = &self.map else { return 0 };
        Superblock(map).grown_ids().load(Ordering::Acquire) as usize
    }

    /// The tiers below that it is bound to.
    pub fn tiers(&self) -> AllBound {
        match &self.map {
            MaybeMapped::Mapped(map) => Superblock(map).tiers(),
            MaybeMapped::File(file) => {
                let start = self.geometry().and_then(|_| file.start().ok());
                start.map_or_else(AllBound::default, |start| tiers_of(&start))
            }
        }
    }

    fn geometry(&self) -> Option<Geometry> {
        Geometry::found(self.map.file()).ok().flatten()
    }

    /// Makes the first entries of the table of an arena that another process uses resident, a step at a time, each when
    /// `may` says so. Nothing in them changes by that.
    pub fn populate_entries(&self, entries: usize, mut may: impl FnMut(usize) -> bool) -> Result<bool> {
        let (MaybeMapped::Mapped(map), Some(geometry)) = (&self.map, self.geometry()) else { return Ok(true) };
        let bytes = entries.min(geometry.max_segments as usize) * SEGMENT_ENTRY_BYTES;
        for done in (0..bytes).step_by(POPULATE_STEP) {
            if !may(POPULATE_STEP) {
                return Ok(false);
            }
            map.populate(geometry.layout().table_at + done, POPULATE_STEP.min(bytes - done))?;
        }
        Ok(true)
    }

    /// What an arena that is one already may hold: most pages to a record, codecs.
    pub fn seen(&self) -> Option<(usize, u64)> {
        let MaybeMapped::Mapped(map) = &self.map else { return None };
        Some(Superblock(map).allowed())
    }

    /// Bytes of each of its dictionaries, 0: there is none.
    pub fn dictionary_bytes(&self) -> [usize; MOST_DICTIONARIES as usize] {
        match &self.map {
            MaybeMapped::Mapped(map) => Superblock(map).dictionary_bytes().map(|bytes| bytes.min(MOST_BYTES)),
            MaybeMapped::File(_) => Default::default(),
        }
    }

    /// Makes page tables for what has become resident. Stops where the host has no memory to give
    /// at once, to go on the next time.
    pub fn keep_up(&mut self, spare: &mut Spare) -> Result<()> {
        let MaybeMapped::Mapped(map) = &self.map else { return Ok(()) };
        let mut table = 0;
        while let Some(missing) = self.tables[table..].iter().position(|there| !there) {
            table += missing;
            let Some(at) = map.file().next_resident(table * PAGE_TABLE_BYTES, map.len())? else { break };
            table = at / PAGE_TABLE_BYTES;
            if self.tables[table] {
                continue;
            }
            if spare.bytes() < TABLE_COST {
                break;
            }
            map.adopt(at, 1)?;
            self.tables[table] = true;
        }
        Ok(())
    }

    /// What is wrong with the arena, as far as that can be told while another has it.
    pub fn check(&self, config: &Checked) -> Result<()> {
        let Some(found) = Geometry::found(self.map.file())? else { return Ok(()) };
        let bytes = u64::from(found.max_frames) * found.segment_bytes as u64;
        config.clone().fit(found.segment_bytes, bytes)
    }

    /// Whether another process has it.
    pub fn in_use(&self) -> Result<bool> {
        self.map.file().in_use()
    }

    /// Makes the arena this process's own, or says that another has it.
    pub fn claim(self) -> Result<MaybeMapped> {
        self.map.file().claim()?;
        Ok(self.map)
    }
}
