//! The hogged memory: one anonymous mapping, split between threads page by page.
//!
//! Thread t of n owns pages t, t+n, t+2n…: neighbours belong to different threads, so swap
//! readahead and clusters are shared by them, as in real programs. A `Share` is the only way to
//! the pages, and shares never overlap; that is what makes the unsafe code here sound.
#![allow(unsafe_code)] // Maps memory and installs the SIGBUS handler.

use crate::pages::{Page, PAGE_BYTES};
use std::io::{Error, Result};
use std::marker::PhantomData;
use std::ptr::{null_mut, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What to ask of the kernel about huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Huge pages wherever possible.
    Always,
    /// Small pages only.
    Never,
    /// The system's setting.
    Default,
}

/// Anonymous memory.
pub struct Area {
    start: NonNull<Page>,
    pages: usize,
}

impl Area {
    /// Maps `pages` pages; no memory is used before they are written.
    pub fn map(pages: usize, huge: HugePages) -> Result<Area> {
        let bytes = pages.checked_mul(PAGE_BYTES).ok_or_else(|| Error::from_raw_os_error(libc::ENOMEM))?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches
        // no memory that exists.
        let start = unsafe { libc::mmap(null_mut(), bytes, prot, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<Page>()).expect("mmap without MAP_FIXED never maps address 0");
        let area = Area { start, pages };
        let advice = match huge {
            HugePages::Always => libc::MADV_HUGEPAGE,
            HugePages::Never => libc::MADV_NOHUGEPAGE,
            HugePages::Default => return Ok(area),
        };
        // SAFETY: the range is the mapping made above, and the advice changes no content.
        if unsafe { libc::madvise(start.as_ptr().cast(), bytes, advice) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(area)
    }

    /// Hands out the pages to `threads` owners.
    pub fn split(&mut self, threads: usize) -> Vec<Share<'_>> {
        let share = |first| Share {
            start: self.start,
            first,
            stride: threads,
            pages: self.pages.saturating_sub(first).div_ceil(threads),
            area: PhantomData,
        };
        (0..threads).map(share).collect()
    }

    /// From now on a page that the swap device cannot return ends the process with a line that
    /// names it, and status 1, rather than with a bare SIGBUS.
    pub fn report_lost_pages(&self) -> Result<()> {
        AREA_START.store(self.start.as_ptr() as usize, Ordering::Relaxed);
        AREA_PAGES.store(self.pages, Ordering::Relaxed);
        // SAFETY: an all-zero sigaction is a valid value of that C structure.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: `action` is initialised, and the handler has the signature that SA_SIGINFO asks
        // for and calls only async-signal-safe functions.
        match unsafe { libc::sigaction(libc::SIGBUS, &action, null_mut()) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`; shares borrow the area, so none is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.pages * PAGE_BYTES) };
    }
}

/// The pages of one thread.
pub struct Share<'a> {
    start: NonNull<Page>,
    first: usize,
    stride: usize,
    pages: usize,
    area: PhantomData<&'a mut Area>,
}

// SAFETY: a share reaches only the pages whose index is `first` modulo `stride`; shares of one
// split have different `first`s, and the area cannot be split again while they live.
unsafe impl Send for Share<'_> {}

impl Share<'_> {
    /// How many pages this share has.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The index in the area of the share's `nth` page.
    pub fn index(&self, nth: usize) -> usize {
        self.first + nth * self.stride
    }

    /// Gives `count` pages from the `nth` on back to the system; they read as zeros then.
    pub fn free(&mut self, nth: usize, count: usize) {
        assert!(nth + count <= self.pages, "pages {nth} to {} of a share of {}", nth + count, self.pages);
        // Neighbours of a share that is not the only one belong to others.
        let (calls, pages) = if self.stride == 1 { (1, count) } else { (count, 1) };
        for n in nth..nth + calls {
            // SAFETY: these pages are inside the mapping and of this share, which is borrowed as one
            // for writing; anonymous memory is valid as zeros.
            let at = unsafe { self.start.add(self.index(n)) };
            // SAFETY: likewise.
            let rc = unsafe { libc::madvise(at.as_ptr().cast(), pages * PAGE_BYTES, libc::MADV_DONTNEED) };
            assert!(rc == 0, "the system takes no memory back: {}", Error::last_os_error());
        }
    }

    /// The share's `nth` page.
    pub fn page(&mut self, nth: usize) -> &mut Page {
        assert!(nth < self.pages, "page {nth} of a share of {}", self.pages);
        // SAFETY: `index(nth)` is inside the mapping, as `nth` is inside the share; anonymous
        // memory is initialised (to zero), and no other share reaches this page.
        unsafe { self.start.add(self.index(nth)).as_mut() }
    }
}

/// Keeps `bytes` in memory, so that reading them does not disturb what is measured. Best effort:
/// without the right or the limit for it, nothing happens.
pub fn keep_in_memory(bytes: &[u8]) {
    // SAFETY: mlock changes no content, and the range is a live slice.
    unsafe { libc::mlock(bytes.as_ptr().cast(), bytes.len()) };
}

static AREA_START: AtomicUsize = AtomicUsize::new(0);
static AREA_PAGES: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, and for SIGBUS it has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let page = address.wrapping_sub(AREA_START.load(Ordering::Relaxed)) / PAGE_BYTES;
    let mut line = Line { bytes: [0; 96], len: 0 };
    if page < AREA_PAGES.load(Ordering::Relaxed) {
        line.push(b"ghostswap-hog: page ");
        line.push_number(page);
        line.push(b": lost (SIGBUS: the swap device did not return it)\n");
    } else {
        line.push(b"ghostswap-hog: SIGBUS outside the area\n");
    }
    // SAFETY: write and _exit are async-signal-safe, and the buffer is ours.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(1);
    }
}

/// Text made without allocation or locks, as a signal handler must.
struct Line {
    bytes: [u8; 96],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for &byte in text.iter().take(self.bytes.len() - self.len) {
            self.bytes[self.len] = byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: usize) {
        if number >= 10 {
            self.push_number(number / 10);
        }
        self.push(&[b'0' + (number % 10) as u8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_every_page_once() {
        for (pages, threads) in [(0, 1), (1, 4), (10, 3), (64, 4)] {
            let mut area = Area::map(pages.max(1), HugePages::Default).unwrap();
            area.pages = pages;
            let mut seen = vec![0; pages];
            for share in area.split(threads) {
                (0..share.pages()).for_each(|nth| seen[share.index(nth)] += 1);
            }
            area.pages = pages.max(1);
            assert!(seen.iter().all(|&times| times == 1), "{pages} pages, {threads} threads: {seen:?}");
        }
    }

    #[test]
    fn pages_hold_what_is_written() {
        let mut area = Area::map(9, HugePages::Never).unwrap();
        for mut share in area.split(2) {
            for nth in 0..share.pages() {
                let index = share.index(nth) as u8;
                assert_eq!(share.page(nth)[0], 0);
                share.page(nth).fill(index);
            }
        }
        let mut all = area.split(1);
        assert!((0..9).all(|nth| *all[0].page(nth) == [nth as u8; PAGE_BYTES]));
    }

    #[test]
    fn freed_pages_are_zero_and_others_are_not() {
        for threads in [1, 2] {
            let mut area = Area::map(8, HugePages::Never).unwrap();
            area.split(1)[0].page(0).fill(1);
            let mut shares = area.split(threads);
            (0..shares[0].pages()).for_each(|nth| shares[0].page(nth).fill(7));
            shares.iter_mut().skip(1).for_each(|s| (0..s.pages()).for_each(|nth| s.page(nth).fill(7)));
            shares[0].free(1, 2);
            let (mut freed, step) = (Vec::new(), threads);
            drop(shares);
            let mut all = area.split(1);
            (0..8).for_each(|nth| {
                if *all[0].page(nth) == [0; PAGE_BYTES] {
                    freed.push(nth)
                }
            });
            assert_eq!(freed, [step, 2 * step], "{threads} threads");
        }
    }
}
