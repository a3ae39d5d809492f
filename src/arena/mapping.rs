//! The mapping itself: a sparse shared file that outlives any pointer into it. Everything in the
//! arena is named by byte offset. With `arena/file.rs` and the codecs' `lz4.rs` and `zstd.rs` the
//! library's only file that holds unsafe code.
//!
//! The whole range is mapped once and locked on fault (`mlock2(MLOCK_ONFAULT)`), so a page that
//! was populated stays resident, and one that was not costs nothing. What an earlier process left
//! resident is neither in this mapping nor locked by it until it is populated again. Populating
//! and giving back is the business of recovery and then of the growth thread alone: no other
//! thread may be the first to touch a page.
//!
//! Sharing: words are reached as atomics. Bytes of records are written through a pointer by the
//! one lane that owns the open segment, and read by others only after the slot word that names
//! them was loaded with Acquire; a segment is reused only after every reader that could hold such
//! a word has left (see `log/epoch.rs`).
#![allow(unsafe_code, reason = "memory mapping and raw access to it")]

use super::file::ArenaFile;
use crate::error::{system, Result};
use crate::sync::{AtomicU32, AtomicU64};
use std::os::fd::AsRawFd;

/// A sparse shared mapping.
pub(crate) struct Mapping {
    base: *mut u8,
    len: usize,
    file: ArenaFile,
}

// SAFETY: the mapping is plain shared memory; all access goes through atomics or through the
// ownership rules of the module's header, none of which depend on the thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all of a file of `len` bytes.
    pub fn new(file: ArenaFile, len: usize) -> Result<Mapping> {
        // SAFETY: a fresh shared mapping of our own file at an address the kernel picks.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.fd().as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(system("mapping the arena"));
        }
        // Without the right to lock (no CAP_IPC_LOCK, small RLIMIT_MEMLOCK) the store works, but
        // its memory can itself be swapped: fine for an export, checked by front ends that swap.
        // SAFETY: the range is our mapping.
        unsafe { libc::mlock2(base, len, libc::MLOCK_ONFAULT as libc::c_uint) };
        // A core dump would write pages out that are nobody's business, and hold up whoever takes over.
        // SAFETY: the range is our mapping.
        unsafe { libc::madvise(base, len, libc::MADV_DONTDUMP) };
        Ok(Mapping { base: base.cast(), len, file })
    }

    pub fn file(&self) -> &ArenaFile {
        &self.file
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn u64_at(&self, offset: usize) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset + 8 <= self.len, "u64 at {offset} lies in the arena");
        // SAFETY: in bounds and aligned by the assertion; the mapping lives as long as self.
        unsafe { &*self.base.add(offset).cast::<AtomicU64>() }
    }

    /// `len / 8` words from `offset` on.
    pub fn words_at(&self, offset: usize, words: usize) -> &[AtomicU64] {
        assert!(offset % 8 == 0 && offset + words * 8 <= self.len, "words at {offset} lie in the arena");
        // SAFETY: in bounds and aligned by the assertion; atomics may be shared.
        unsafe { std::slice::from_raw_parts(self.base.add(offset).cast(), words) }
    }

    /// `halves` 4-byte words from `offset` on.
    pub fn halves_at(&self, offset: usize, halves: usize) -> &[AtomicU32] {
        assert!(offset % 4 == 0 && offset + halves * 4 <= self.len, "words at {offset} lie in the arena");
        // SAFETY: in bounds and aligned by the assertion; atomics may be shared.
        unsafe { std::slice::from_raw_parts(self.base.add(offset).cast(), halves) }
    }

    /// Bytes of complete records. Callers follow the sharing rules of the module's header: the
    /// range was published by a slot word loaded with Acquire in the current epoch, or belongs to
    /// a segment the caller owns.
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset + len <= self.len, "bytes at {offset} lie in the arena");
        // SAFETY: in bounds; published records are not written again while a reader is inside
        // its epoch, so the shared slice stays unchanged for as long as it may be used.
        unsafe { std::slice::from_raw_parts(self.base.add(offset), len) }
    }

    /// The unpublished tail of an open segment, which its one owner may write.
    #[allow(clippy::mut_from_ref, reason = "the range is owned by the lane whose open segment it is")]
    pub fn tail(&self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset + len <= self.len, "tail at {offset} lies in the arena");
        // SAFETY: in bounds; bytes past the owner's fill mark are named by no slot, and the owner
        // makes one such slice at a time.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(offset), len) }
    }

    /// Makes the range resident (and locked). May wait for memory: growth thread and recovery only.
    pub fn populate(&self, offset: usize, len: usize) -> Result<()> {
        self.advise(offset, len, libc::MADV_POPULATE_WRITE)
    }

    /// Takes a range that is in the file already into this mapping (and locks it). Several times as
    /// fast as `populate`, since the kernel maps up to 16 pages at a time; a shared mapping of
    /// memory needs no second fault for the first write.
    pub fn adopt(&self, offset: usize, len: usize) -> Result<()> {
        self.advise(offset, len, libc::MADV_POPULATE_READ)
    }

    /// Gives the range back to the host; it reads as zeros afterwards. False: it stays.
    pub fn give_back(&self, offset: usize, len: usize) -> bool {
        self.file.give_back(offset, len)
    }

    fn advise(&self, offset: usize, len: usize, how: libc::c_int) -> Result<()> {
        assert!(offset + len <= self.len, "populated range lies in the arena");
        let unit = self.file.unit();
        let start = offset / unit * unit;
        let end = (offset + len).div_ceil(unit) * unit;
        // SAFETY: a range of our mapping (its length is a multiple of the unit).
        if unsafe { libc::madvise(self.base.add(start).cast(), end - start, how) } != 0 {
            return Err(system("populating the arena"));
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps what new() mapped; self is gone afterwards and all borrows of it with it.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Memory of the machine and how much of it is free now, in bytes.
pub(crate) fn host_memory() -> Result<(u64, u64)> {
    let info = sysinfo()?;
    let unit = u64::from(info.mem_unit);
    Ok((info.totalram as u64 * unit, info.freeram as u64 * unit))
}

/// Seconds since the host was started: the same clock for every process that has an arena in turn.
pub(crate) fn host_seconds() -> Result<u32> {
    Ok(sysinfo()?.uptime as u32)
}

fn sysinfo() -> Result<libc::sysinfo> {
    // SAFETY: sysinfo fills the zeroed struct we own.
    unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        if libc::sysinfo(&mut info) != 0 {
            return Err(system("sysinfo"));
        }
        Ok(info)
    }
}
