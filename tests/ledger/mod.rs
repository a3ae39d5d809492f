//! What tests of recovery share: a ledger in shared memory of what was begun and what was
//! acknowledged, which outlives a killed writer, and a fork.
//!
//! The ledger has for each sector of each page the version last *begun* and the one last
//! *acknowledged*; a version number determines the sector's bytes. A writer notes begun, does it,
//! notes acknowledged. So at any instant a page must be as begun says or as acknowledged says, all
//! of it the one or all of it the other.
#![allow(dead_code, reason = "each test uses its part")]

use std::sync::atomic::{AtomicU64, Ordering};

pub const PAGE: usize = 4096;
const SECTORS: usize = 8;

/// xorshift64*: small, seeded, good enough to choose operations.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// The page that a version stands for. Version 0 is a page never written or discarded.
pub fn content(page: u64, version: u64, out: &mut [u8]) {
    if version == 0 {
        return out.fill(0);
    }
    let mut rng = Rng((version.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ page << 17) | 1);
    for _ in 0..4 {
        rng.next();
    }
    match version % 16 {
        0 => out.fill(0),
        1 => out.fill(rng.next() as u8),
        2 => {
            let p = rng.next().to_le_bytes();
            out.chunks_mut(8).for_each(|c| c.copy_from_slice(&p));
        }
        3 | 4 => out.chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes())),
        kind @ (14 | 15) => words((version >> 33) % 4 * 2 + kind % 2, &mut rng, out),
        kind => {
            let (step, salt) = (rng.below(61) + 1, rng.next());
            out.iter_mut().enumerate().for_each(|(i, b)| *b = ((i as u64 / step) ^ salt) as u8);
            let noisy = out.len() * (kind as usize - 3) / 26;
            out[..noisy].chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()[..c.len()]));
        }
    }
}

/// Words of a vocabulary, each page with others of them: what a dictionary is good for.
pub fn words(vocabulary: u64, rng: &mut Rng, out: &mut [u8]) {
    for word in out.chunks_mut(32) {
        let mut letters = Rng((vocabulary << 8 | rng.below(128)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        word.iter_mut().for_each(|b| *b = b'a' + letters.below(26) as u8);
    }
}

/// Words in memory that a forked child shares.
pub struct Shared {
    base: *mut AtomicU64,
    len: usize,
}

// SAFETY: plain shared memory, reached as atomics only.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    pub fn new(len: usize) -> Shared {
        // SAFETY: a fresh anonymous mapping, zeroed, never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Shared { base: base.cast(), len }
    }

    pub fn at(&self, i: usize) -> &AtomicU64 {
        assert!(i < self.len);
        // SAFETY: in bounds of the mapping, which is never unmapped.
        unsafe { &*self.base.add(i) }
    }
}

/// Begun and acknowledged versions of `pages` pages.
pub struct Ledger {
    words: Shared,
}

impl Ledger {
    pub fn new(pages: usize) -> Ledger {
        Ledger { words: Shared::new(pages * SECTORS * 2) }
    }

    fn begun(&self, entry: usize, sector: usize) -> &AtomicU64 {
        self.words.at((entry * SECTORS + sector) * 2)
    }

    fn acknowledged(&self, entry: usize, sector: usize) -> &AtomicU64 {
        self.words.at((entry * SECTORS + sector) * 2 + 1)
    }

    /// Sectors `from..to` of an entry are about to get a version.
    pub fn begin(&self, entry: usize, from: usize, to: usize, version: u64) {
        (from..to).for_each(|s| self.begun(entry, s).store(version, Ordering::SeqCst));
    }

    /// What was begun is done.
    pub fn acknowledge(&self, entry: usize) {
        for s in 0..SECTORS {
            self.acknowledged(entry, s).store(self.begun(entry, s).load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    /// What was begun was not done at all.
    pub fn forget(&self, entry: usize) {
        for s in 0..SECTORS {
            self.begun(entry, s).store(self.acknowledged(entry, s).load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    /// Checks what was read of an entry, and takes from it whether what was in flight was done.
    pub fn settle(&self, entry: usize, page: u64, got: &[u8]) -> Result<(), String> {
        let versions = |of: fn(&Ledger, usize, usize) -> &AtomicU64| -> Vec<u64> {
            (0..SECTORS).map(|s| of(self, entry, s).load(Ordering::SeqCst)).collect()
        };
        let (begun, acknowledged) = (versions(Ledger::begun), versions(Ledger::acknowledged));
        if got == expected(page, &acknowledged) {
            self.forget(entry);
            return Ok(());
        }
        if begun != acknowledged && got == expected(page, &begun) {
            self.acknowledge(entry);
            return Ok(());
        }
        Err(format!("page {page} is neither as acknowledged ({acknowledged:x?}) nor as begun ({begun:x?})"))
    }
}

fn expected(page: u64, versions: &[u64]) -> Vec<u8> {
    let mut whole = vec![0; PAGE];
    let mut out = vec![0; PAGE];
    let mut made = None;
    for (s, &v) in versions.iter().enumerate() {
        if made != Some(v) {
            content(page, v, &mut whole);
            made = Some(v);
        }
        out[s * 512..][..512].copy_from_slice(&whole[s * 512..][..512]);
    }
    out
}

/// Runs `body` in a forked child, which then ends with `status`, and returns its process id.
pub fn fork(body: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child runs `body` on this thread alone and ends without unwinding or destructors;
    // the allocator is made for this, and no lock of this process is held by this thread.
    unsafe {
        match libc::fork() {
            0 => {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
                libc::_exit(status)
            }
            -1 => panic!("fork: {}", std::io::Error::last_os_error()),
            pid => pid,
        }
    }
}

/// How a child ended.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum End {
    Exit(i32),
    Signal(i32),
}

fn wait_with(pid: libc::pid_t, options: i32) -> Option<End> {
    let mut status = 0;
    // SAFETY: waits for a child of ours and fills the word we own.
    let got = unsafe { libc::waitpid(pid, &mut status, options) };
    assert!(got == pid || (got == 0 && options != 0), "waitpid: {}", std::io::Error::last_os_error());
    (got == pid).then(|| {
        if libc::WIFSIGNALED(status) {
            End::Signal(libc::WTERMSIG(status))
        } else {
            End::Exit(libc::WEXITSTATUS(status))
        }
    })
}

pub fn wait(pid: libc::pid_t) -> End {
    wait_with(pid, 0).unwrap()
}

/// None: it still runs.
pub fn ended(pid: libc::pid_t) -> Option<End> {
    wait_with(pid, libc::WNOHANG)
}

pub fn kill(pid: libc::pid_t) {
    // SAFETY: a child of ours that was not waited for yet.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}
