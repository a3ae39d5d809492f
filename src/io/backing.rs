//! The file or block device of a disk tier: opened past the page cache, claimed by one store at a time,
//! and marked as ours, so that neither a stranger's data nor another store's is written over.
//!
//! ```text
//! block 0   8 bytes magic · 8 version · 16 id of the tier: the arena that wrote to it has the same
//! then      extents
//! ```
//! Whoever stands by opens it too and does not claim it. The claim is a flock. The kernel drops that with
//! the last reference to the open file, and each read or write that is under way in an io_uring has one,
//! also when its process was killed: so whoever has the claim knows that no earlier store's write is
//! still on its way to the disk. (The process being gone does not tell that.)
#![allow(unsafe_code, reason = "flock, fallocate and BLKDISCARD on our own descriptor")]

use super::{Buffer, BLOCK_BYTES};
use crate::config::{format_size, DiskTier, Place};
use crate::error::{Error, Result};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub(super) const MAGIC: &[u8; 8] = b"GHOSTLOW";
const VERSION: u64 = 1;
const ID_AT: usize = 16;
/// Where file systems, swap areas, volume managers and partition tables say what they are.
pub(super) const SIGNATURES_BYTES: usize = 128 << 10;

/// A file's space is written once before it is used, for so long at most, so many bytes at a time.
const ZEROES_TIME: Duration = Duration::from_secs(60);
const ZEROES_BYTES: usize = 1 << 20;

/// A tier's identity.
pub(crate) type TierKey = [u8; 16];

/// An open file or block device.
pub(crate) struct Backing {
    file: File,
    tier: DiskTier,
    bytes: u64,
    /// Held open for a block device's exclusive use.
    alone: OnceLock<File>,
    /// What it was when it was opened, if it was a tier.
    bore: Option<TierKey>,
}

impl Backing {
    /// Opens it, making a file that is not there. Writes nothing.
    pub fn open(tier: &DiskTier) -> Result<Backing> {
        let path = tier.place.path();
        let file_wanted = matches!(tier.place, Place::File(_));
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        if file_wanted {
            options.create(true).mode(0o600);
        }
        let mut file = options.open(path).map_err(|e| match e.kind() {
            ErrorKind::InvalidInput => {
                bad(tier, "its file system cannot read and write past the page cache (O_DIRECT)")
            }
            _ => bad(tier, &e.to_string()),
        })?;
        let kind = file.metadata().map_err(|e| bad(tier, &e.to_string()))?.file_type();
        match (file_wanted, kind.is_file(), kind.is_block_device()) {
            (true, false, _) => return Err(bad(tier, "it is not a regular file")),
            (false, _, false) => return Err(bad(tier, "it is not a block device")),
            _ => {}
        }
        let there = file.seek(SeekFrom::End(0)).map_err(|e| bad(tier, &e.to_string()))?;
        let bytes = tier.size.unwrap_or(there);
        if !file_wanted && bytes > there {
            return Err(bad(tier, &format!("it has {}, less than size={bytes}", format_size(there))));
        }
        let mut head = Buffer::new(BLOCK_BYTES);
        let bore = file.read_exact_at(&mut head, 0).ok().and_then(|()| id_of(&head));
        Ok(Backing { file, tier: tier.clone(), bytes, alone: OnceLock::new(), bore })
    }

    /// Bytes that may be used.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn is_file(&self) -> bool {
        matches!(self.tier.place, Place::File(_))
    }

    /// Takes it for this process alone: nobody else can mount it, swap to it or claim it.
    pub fn claim(&self) -> Result<()> {
        // SAFETY: takes no pointers; the descriptor is ours.
        if unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(bad(&self.tier, "another store has it"));
        }
        let Place::Block(path) = &self.tier.place else { return Ok(()) };
        let alone = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
        let alone = alone.map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => bad(&self.tier, "it is mounted, swapped to or otherwise in use"),
            _ => bad(&self.tier, &e.to_string()),
        })?;
        // A second claim changes nothing.
        let _ = self.alone.set(alone);
        Ok(())
    }

    /// Makes it a tier with this identity, unless it holds what is not ours, and takes its space.
    pub fn initialise(&self, id: &TierKey) -> Result<()> {
        let io = |e: std::io::Error| bad(&self.tier, &e.to_string());
        let mut start = Buffer::new(SIGNATURES_BYTES);
        let mut there = 0;
        while there < start.len() {
            match self.file.read_at(&mut start[there..], there as u64).map_err(io)? {
                0 => break,
                n => there += n,
            }
        }
        check_free(&self.tier, &start[..there])?;
        if self.is_file() {
            let before = self.file.metadata().map_err(io)?.len();
            self.file.set_len(self.bytes).map_err(io)?;
            if self.tier.prealloc {
                self.take_space().inspect_err(|_| {
                    // What there was room for is not to be kept from others.
                    let _ = self.file.set_len(before);
                })?;
            }
        }
        self.file.write_all_at(&head_of(id), 0).map_err(io)
    }

    fn take_space(&self) -> Result<()> {
        // Linux include/uapi/linux/falloc.h, from 6.17 on: as blocks that were written to, if the device can say of them
        // that they are zero. To others the first write waits for the file system, and that for memory.
        const WRITE_ZEROES: libc::c_int = 0x80;
        // SAFETY: takes no pointers; the descriptor is ours.
        let take = |mode| unsafe { libc::fallocate(self.file.as_raw_fd(), mode, 0, self.bytes as libc::off_t) == 0 };
        if take(WRITE_ZEROES) {
            return Ok(());
        }
        if take(0) {
            return self.write_zeroes();
        }
        let e = std::io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::ENOSPC) => Err(bad(&self.tier, &format!("there is no room for {}", format_size(self.bytes)))),
            Some(libc::EOPNOTSUPP) => {
                tracing::warn!("{}: its space cannot be taken beforehand", self.tier.place.path().display());
                Ok(())
            }
            _ => Err(bad(&self.tier, &e.to_string())),
        }
    }

    /// Writes to all of it, as far as that goes in a bounded time.
    fn write_zeroes(&self) -> Result<()> {
        let (mut zeroes, begun) = (Buffer::new(ZEROES_BYTES), Instant::now());
        zeroes.fill(0);
        let (mut at, end) = (0, self.bytes / BLOCK_BYTES as u64 * BLOCK_BYTES as u64);
        while at < end {
            if begun.elapsed() >= ZEROES_TIME {
                let (text, path) = (format_size, self.tier.place.path().display());
                tracing::warn!("{path}: {} of {} were written beforehand", text(at), text(self.bytes));
                break;
            }
            let n = zeroes.len().min((end - at) as usize);
            self.file.write_all_at(&zeroes[..n], at).map_err(|e| bad(&self.tier, &e.to_string()))?;
            at += n as u64;
        }
        Ok(())
    }

    /// What it was when it was opened, if it was a tier. Waits for nothing, which matters to who takes over.
    pub fn bore(&self) -> Option<TierKey> {
        self.bore
    }

    /// Makes sure that it is the one with this identity.
    pub fn check(&self, id: &TierKey) -> Result<()> {
        let mut head = Buffer::new(BLOCK_BYTES);
        let read = match self.file.read_exact_at(&mut head, 0) {
            // A file that was made just now.
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => false,
            Err(e) => return Err(bad(&self.tier, &e.to_string())),
            Ok(()) => true,
        };
        match read && is_head_of(&head, id) {
            true => Ok(()),
            false => Err(bad(&self.tier, "it is not the one that this arena's pages went to")),
        }
    }

    /// Reads all of the buffer from byte `at` on.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }

    /// Tells that a range holds nothing any more. A file whose space was taken beforehand keeps it.
    pub fn discard(&self, at: u64, bytes: u64) {
        match self.tier.place {
            Place::File(_) if self.tier.prealloc => {}
            Place::File(_) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: takes no pointers; the descriptor is ours. What cannot be punched stays.
                let _ =
                    unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at as libc::off_t, bytes as libc::off_t) };
            }
            Place::Block(_) | Place::Nbd(_) | Place::S3(_) => {
                // Linux include/uapi/linux/fs.h: _IO(0x12, 119).
                const BLKDISCARD: libc::c_ulong = 0x1277;
                let range = [at, bytes];
                // SAFETY: the kernel reads the two words. Devices that cannot discard say so.
                let _ = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
            }
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tier.place.path().display().fmt(f)
    }
}

/// The first block of the tier with this identity.
pub(super) fn head_of(id: &TierKey) -> Buffer {
    let mut head = Buffer::new(BLOCK_BYTES);
    head.fill(0);
    head[..8].copy_from_slice(MAGIC);
    head[8..16].copy_from_slice(&VERSION.to_le_bytes());
    head[ID_AT..ID_AT + 16].copy_from_slice(id);
    head
}

/// Whether this is the first block of the tier with this identity.
pub(super) fn is_head_of(head: &[u8], id: &TierKey) -> bool {
    id_of(head).as_ref() == Some(id)
}

/// The identity of the tier whose first block this is. None: it is no tier's.
fn id_of(head: &[u8]) -> Option<TierKey> {
    let is_one = head.starts_with(MAGIC) && head[8..16] == VERSION.to_le_bytes();
    is_one.then(|| head[ID_AT..ID_AT + 16].try_into().ok()).flatten()
}

/// Whether a place that begins with this may be made a tier. True: it was one.
pub(super) fn check_free(tier: &DiskTier, start: &[u8]) -> Result<bool> {
    let ours = start.starts_with(MAGIC);
    match !ours && start.iter().any(|b| *b != 0) {
        true => Err(bad(tier, "it holds something else: remove that first (rm, wipefs -a)")),
        false => Ok(ours),
    }
}

pub(super) fn bad(tier: &DiskTier, why: &str) -> Error {
    Error::BadTier { tier: tier.place.path().display().to_string(), why: why.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tier(path: &std::path::Path) -> DiskTier {
        DiskTier { place: Place::File(path.into()), size: Some(1 << 20), encrypt: true, name: None, prealloc: false }
    }

    #[test]
    fn a_file_is_ours_or_it_is_left_alone() {
        let dir = std::env::temp_dir().join(format!("ghostswap-backing-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("cold");
        let first = Backing::open(&tier(&path)).unwrap();
        first.claim().unwrap();
        first.initialise(&[7; 16]).unwrap();
        first.check(&[7; 16]).unwrap();
        assert!(first.check(&[8; 16]).is_err(), "of another arena");
        let second = Backing::open(&tier(&path)).unwrap();
        assert!(second.claim().is_err(), "it is taken");
        drop(first);
        second.claim().unwrap();
        second.initialise(&[9; 16]).unwrap();
        let letter = dir.join("letter");
        std::fs::write(&letter, "dear all").unwrap();
        let third = Backing::open(&tier(&letter)).unwrap();
        let why = third.initialise(&[9; 16]).unwrap_err().to_string();
        assert!(why.contains("something else"), "{why}");
        assert_eq!(std::fs::read(&letter).unwrap(), b"dear all");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
