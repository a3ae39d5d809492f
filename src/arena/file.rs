//! The file under the arena: made here, or handed over by whoever kept it while no store was open.
//!
//! Holding it: a store takes a POSIX write lock on its arena's file. The kernel drops such a lock
//! when the last thread of its process has given up its files, and by then none of them runs in
//! user mode any more. So whoever has the lock knows that no store of another process writes to
//! the arena, a killed one included. (Closing any descriptor of the file gives the lock up: a
//! process that opens a store keeps no other descriptor of its arena that it might close.)
//!
//! What is resident: `SEEK_DATA` tells, on a memfd, what was populated and not given back.
//! hugetlbfs cannot tell; there nothing is ever given back, and the superblock's watermarks do.
#![allow(unsafe_code, reason = "fcntl, fstatfs, lseek and fallocate on our own descriptor; mounting")]

use crate::error::{system, Error, Result};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// Bytes of the superblock that carry anything.
pub(super) const START_BYTES: usize = 4096;

/// Fills the bytes from the kernel's random generator.
pub(super) fn random(bytes: &mut [u8]) -> Result<()> {
    // SAFETY: the kernel writes to the slice we own; up to 256 bytes come at once.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n == bytes.len() as isize {
        Ok(())
    } else {
        Err(system("getrandom"))
    }
}

/// Makes an empty file for an arena, close-on-exec. Whoever is to outlive the store holds it and
/// hands a duplicate to [`crate::Store::open_arena`].
///
/// Where it may, it makes the file on a tmpfs of its own that never swaps (`noswap`, Linux 6.4,
/// needs CAP_SYS_ADMIN): its pages stay in memory whoever maps them, and also while nobody does. A
/// memfd's pages stay only while a process that lives has them locked.
pub fn create_arena(hugetlb: bool) -> Result<OwnedFd> {
    if !hugetlb {
        if let Some(fd) = create_noswap() {
            return Ok(fd);
        }
    }
    let flags = libc::MFD_CLOEXEC | if hugetlb { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: a constant NUL-terminated name and valid flags.
    let fd = unsafe { libc::memfd_create(c"ghostswap".as_ptr(), flags) };
    if fd < 0 {
        return Err(system("memfd_create for the arena"));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A nameless file on a tmpfs that is mounted nowhere and goes with the file.
fn create_noswap() -> Option<OwnedFd> {
    // Linux include/uapi/linux/mount.h.
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_SET_FLAG: libc::c_uint = 0;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let null = std::ptr::null::<libc::c_char>();
    let owned = |fd: libc::c_long| {
        // SAFETY: a fresh descriptor that nobody else owns.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
    };
    // SAFETY: a constant NUL-terminated name.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    let set = |cmd: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: constant NUL-terminated strings or null, as the command wants.
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), cmd, key, value, 0) == 0 }
    };
    // The store has a limit of its own.
    let made = set(FSCONFIG_SET_FLAG, c"noswap".as_ptr(), null)
        && set(FSCONFIG_SET_STRING, c"size".as_ptr(), c"100%".as_ptr())
        && set(FSCONFIG_SET_STRING, c"huge".as_ptr(), c"never".as_ptr())
        && set(FSCONFIG_CMD_CREATE, null, null);
    if !made {
        return None;
    }
    // SAFETY: a configured context; no attributes.
    let mount = owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: a constant NUL-terminated name; the mode is given as O_TMPFILE wants it.
    owned(unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600) }.into())
}

/// The arena's file; once claimed, locked against stores of other processes for as long as it lives.
pub(crate) struct ArenaFile {
    file: File,
    hugetlb: bool,
}

impl ArenaFile {
    /// Not claimed yet: for looking only.
    pub fn new(fd: OwnedFd) -> Result<ArenaFile> {
        // SAFETY: fstatfs fills the zeroed struct we own.
        let hugetlb = unsafe {
            let mut fs: libc::statfs = std::mem::zeroed();
            if libc::fstatfs(fd.as_raw_fd(), &mut fs) != 0 {
                return Err(system("fstatfs of the arena"));
            }
            fs.f_type as u64 & 0xffff_ffff == HUGETLBFS_MAGIC
        };
        Ok(ArenaFile { file: fd.into(), hugetlb })
    }

    /// Takes the lock that keeps stores of other processes out.
    pub fn claim(&self) -> Result<()> {
        lock(&self.file)
    }

    /// Whether another process has taken it.
    pub fn in_use(&self) -> Result<bool> {
        let mut whole = whole_file();
        // SAFETY: fcntl reads and fills the struct we own.
        let asked = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETLK, &mut whole) };
        match asked {
            0 => Ok(whole.l_type != libc::F_UNLCK as libc::c_short),
            _ => Err(system("asking who has the arena's file")),
        }
    }

    pub fn hugetlb(&self) -> bool {
        self.hugetlb
    }

    /// Unit of residence.
    pub fn unit(&self) -> usize {
        if self.hugetlb {
            2 << 20
        } else {
            4096
        }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(failed("sizing the arena"))?.len())
    }

    pub fn resize(&self, len: usize) -> Result<()> {
        self.file.set_len(len as u64).map_err(failed("sizing the arena"))
    }

    /// The file's first bytes, zeros past its end. Makes nothing resident.
    pub fn start(&self) -> Result<[u8; START_BYTES]> {
        let mut start = [0; START_BYTES];
        let mut done = 0;
        while done < start.len() {
            match self.file.read_at(&mut start[done..], done as u64).map_err(failed("reading the arena"))? {
                0 => break,
                n => done += n,
            }
        }
        Ok(start)
    }

    /// The first run of resident bytes at or after `from`, cut off at `end`. Not on hugetlbfs.
    pub fn next_data(&self, from: usize, end: usize) -> Result<Option<Range<usize>>> {
        let Some(start) = self.next_resident(from, end)? else { return Ok(None) };
        let until = self.seek(start, libc::SEEK_HOLE)?.unwrap_or(end);
        Ok(Some(start..until.min(end)))
    }

    /// The first resident byte at or after `from`, below `end`. Quick where the run is long: its end
    /// is not looked for. Not on hugetlbfs.
    pub fn next_resident(&self, from: usize, end: usize) -> Result<Option<usize>> {
        Ok(self.seek(from, libc::SEEK_DATA)?.filter(|start| *start < end))
    }

    fn seek(&self, from: usize, whence: libc::c_int) -> Result<Option<usize>> {
        // SAFETY: moves the file position, which nobody uses.
        let at = unsafe { libc::lseek(self.file.as_raw_fd(), from as libc::off_t, whence) };
        if at >= 0 {
            return Ok(Some(at as usize));
        }
        match std::io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            source => Err(Error::System { what: "asking what of the arena is resident", source }),
        }
    }

    /// Gives the range back to the host; it reads as zeros afterwards. Hugetlb pages stay.
    pub fn give_back(&self, offset: usize, len: usize) -> bool {
        if self.hugetlb {
            return false;
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: punching a hole in our own file; also drops the pages from the mapping.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as libc::off_t, len as libc::off_t) == 0 }
    }
}

/// A write lock on all of a file.
fn whole_file() -> libc::flock {
    // SAFETY: plain data, for which zeros are valid.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = libc::F_WRLCK as libc::c_short;
    whole
}

fn lock(fd: &File) -> Result<()> {
    // SAFETY: fcntl reads the struct we own.
    let taken = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLK, &whole_file()) };
    if taken == 0 {
        return Ok(());
    }
    let source = std::io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(Error::BadArena("another process has a store open on it".into())),
        _ => Err(Error::System { what: "locking the arena's file", source }),
    }
}

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::System { what, source }
}
