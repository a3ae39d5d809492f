//! The mapping itself: a sparse memfd that outlives any pointer into it. Everything in the arena
//! is named by byte offset. The library's only file with `codec/lz4.rs` that holds unsafe code.
//!
//! The whole range is mapped once and locked on fault (`mlock2(MLOCK_ONFAULT)`), so a page that
//! was populated stays resident, and one that was not costs nothing. Populating and giving back is
//! the business of the growth thread alone: no other thread may be the first to touch a page.
//!
//! Sharing: words are reached as atomics. Bytes of records are written through a pointer by the
//! one lane that owns the open segment, and read by others only after the slot word that names
//! them was loaded with Acquire; a segment is reused only after every reader that could hold such
//! a word has left (see `log/epoch.rs`).
#![allow(unsafe_code, reason = "memory mapping and raw access to it")]

use crate::error::{system, Result};
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A sparse shared mapping.
pub(crate) struct Mapping {
    base: *mut u8,
    len: usize,
    fd: libc::c_int,
    hugetlb: bool,
}

// SAFETY: the mapping is plain shared memory; all access goes through atomics or through the
// ownership rules of the module's header, none of which depend on the thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn new(len: usize, hugetlb: bool) -> Result<Mapping> {
        let flags = libc::MFD_CLOEXEC | if hugetlb { libc::MFD_HUGETLB } else { 0 };
        // SAFETY: a constant NUL-terminated name and valid flags.
        let fd = unsafe { libc::memfd_create(c"ghostswap".as_ptr(), flags) };
        if fd < 0 {
            return Err(system("memfd_create for the arena"));
        }
        // From here the descriptor is closed by Drop on every path.
        let mut mapping = Mapping { base: std::ptr::null_mut(), len: 0, fd, hugetlb };
        // SAFETY: fd is ours.
        if unsafe { libc::ftruncate(fd, len as libc::off_t) } != 0 {
            return Err(system("sizing the arena"));
        }
        // SAFETY: a fresh shared mapping of our own file at an address the kernel picks.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(system("mapping the arena"));
        }
        mapping.base = base.cast();
        mapping.len = len;
        // Without the right to lock (no CAP_IPC_LOCK, small RLIMIT_MEMLOCK) the store works, but
        // its memory can itself be swapped: fine for an export, checked by front ends that swap.
        // SAFETY: the range is our mapping.
        unsafe { libc::mlock2(base, len, libc::MLOCK_ONFAULT as libc::c_uint) };
        Ok(mapping)
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

    /// Makes the range resident (and locked). May wait for memory: growth thread only.
    pub fn populate(&self, offset: usize, len: usize) -> Result<()> {
        assert!(offset + len <= self.len, "populated range lies in the arena");
        let unit = if self.hugetlb { 2 << 20 } else { 4096 };
        let start = offset / unit * unit;
        let end = (offset + len).div_ceil(unit) * unit;
        // SAFETY: a range of our mapping (its length is a multiple of the unit).
        let done = unsafe { libc::madvise(self.base.add(start).cast(), end - start, libc::MADV_POPULATE_WRITE) };
        if done != 0 {
            return Err(system("populating the arena"));
        }
        Ok(())
    }

    /// Gives the range back to the host; it reads as zeros afterwards. Hugetlb pages stay.
    pub fn give_back(&self, offset: usize, len: usize) -> bool {
        if self.hugetlb {
            return false;
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: punching a hole in our own file; also drops the pages from the mapping.
        unsafe { libc::fallocate(self.fd, mode, offset as libc::off_t, len as libc::off_t) == 0 }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps what new() mapped (if it did) and closes our descriptor; self is gone
        // afterwards and all borrows of it with it.
        unsafe {
            if !self.base.is_null() {
                libc::munmap(self.base.cast(), self.len);
            }
            libc::close(self.fd);
        }
    }
}

/// Memory of the machine and how much of it is free now, in bytes.
pub(crate) fn host_memory() -> Result<(u64, u64)> {
    // SAFETY: sysinfo fills the zeroed struct we own.
    let info = unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        if libc::sysinfo(&mut info) != 0 {
            return Err(system("sysinfo"));
        }
        info
    };
    let unit = u64::from(info.mem_unit);
    Ok((info.totalram as u64 * unit, info.freeram as u64 * unit))
}
