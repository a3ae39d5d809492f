//! The kernel's side of a window: a partition of the ghost device, without a partition table, that is a
//! swap area (`BLKPG`, Linux `block/ioctl.c`; `swapon(2)`). What is open is asked of the kernel each
//! time, never remembered: so it is right after a take-over, an upgrade, or anything done by hand.
//!
//! A window that is closed is discarded before its partition goes: `swapoff` discards nothing.

#![allow(unsafe_code)] // ioctl, swapon, an aligned buffer.

use super::policy::Window;
use anyhow::{anyhow, bail, Context, Result};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const PAGE: u64 = 4096;
const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: i32 = 1;
const BLKPG_DEL_PARTITION: i32 = 2;
const BLKDISCARD: libc::c_ulong = 0x1277;
/// Of swapon: the priority follows, discard, what to discard.
const SWAP_FLAG_PREFER: i32 = 0x8000;
const SWAP_FLAG_DISCARD: i32 = 0x10000;
const SWAP_FLAG_DISCARD_PAGES: i32 = 0x40000;

/// Of a swap header: what it ends with, and our label.
const MAGIC: &[u8; 10] = b"SWAPSPACE2";
const LABEL: &[u8; 9] = b"ghostswap";

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Blkpg {
    op: i32,
    flags: i32,
    len: i32,
    data: *const Partition,
}

/// `struct blkpg_partition`, in bytes.
#[repr(C)]
struct Partition {
    start: i64,
    len: i64,
    number: i32,
    names: [u8; 128],
}

/// A line of /proc/swaps; pages.
#[derive(Clone, Debug, PartialEq)]
pub struct Area {
    /// What is swapped to.
    pub path: String,
    /// Without the header.
    pub pages: u64,
    /// In use.
    pub used: u64,
    /// Its priority.
    pub priority: i32,
}

/// A file of /proc or /sys, kept open and with its buffer: to look again asks the kernel for no memory,
/// of which there may be none when it matters.
pub struct Kept {
    file: File,
    text: String,
}

impl Kept {
    /// Opens it.
    pub fn open(path: &Path) -> Result<Kept> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Kept { file, text: String::with_capacity(8192) })
    }

    /// What it says now.
    pub fn read(&mut self) -> Result<&str> {
        self.text.clear();
        self.file.seek(SeekFrom::Start(0)).and_then(|_| self.file.read_to_string(&mut self.text))?;
        Ok(&self.text)
    }
}

/// /proc/swaps.
pub struct Swaps(Kept);

impl Swaps {
    /// Opens it.
    pub fn new() -> Result<Swaps> {
        Kept::open(Path::new("/proc/swaps")).map(Swaps)
    }

    /// All swap areas.
    pub fn areas(&mut self) -> Result<Vec<Area>> {
        self.0.read().map(parse).context("cannot read /proc/swaps")
    }
}

fn parse(swaps: &str) -> Vec<Area> {
    let line = |line: &str| {
        // A path may hold anything but blanks, which are written as \040.
        let mut words = line.split_ascii_whitespace();
        let path = words.next()?.to_owned();
        let mut pages = || Some(words.nth(1)?.parse::<u64>().ok()? / 4);
        let pages = pages()?;
        let used = words.next()?.parse::<u64>().ok()? / 4;
        Some(Area { path, pages, used, priority: words.next()?.parse().ok()? })
    };
    swaps.lines().skip(1).filter_map(line).collect()
}

/// The partitions of a device, whether swap areas or not; unused, without priority.
pub fn partitions(disk: &Path) -> Result<Vec<Window>> {
    let name = name(disk)?;
    let dir = Path::new("/sys/block").join(name);
    let number = |of: &Path, what| {
        let text = std::fs::read_to_string(of.join(what)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?.flatten() {
        let file = entry.file_name();
        let Some(n) = file.to_str().and_then(|f| f.strip_prefix(name)?.strip_prefix('p')?.parse().ok()) else {
            continue;
        };
        let (Some(start), Some(pages)) = (number(&entry.path(), "start"), number(&entry.path(), "size")) else {
            continue;
        };
        found.push(Window { number: n, start: start / 8, pages: pages / 8, ..Window::default() });
    }
    found.sort_by_key(|w| w.number);
    Ok(found)
}

/// Those of the partitions that are swap areas, with what the kernel says of them.
pub fn windows(disk: &Path, partitions: &[Window], areas: &[Area]) -> Vec<Window> {
    let of = |w: &Window| {
        let path = node(disk, w.number);
        let area = areas.iter().find(|a| Path::new(&a.path) == path)?;
        Some(Window { used: area.used, priority: area.priority, ..w.clone() })
    };
    partitions.iter().filter_map(of).collect()
}

/// A partition's node.
pub fn node(disk: &Path, number: u32) -> PathBuf {
    PathBuf::from(format!("{}p{number}", disk.display()))
}

/// Where the kernel tells the device's size, in sectors.
pub fn size_file(disk: &Path) -> Result<PathBuf> {
    Ok(Path::new("/sys/block").join(name(disk)?).join("size"))
}

/// Whether a partition was made a swap area by us: only such a one may be dropped.
pub fn is_ours(disk: &Path, number: u32) -> bool {
    signature(&node(disk, number)).is_some_and(|label| label == *LABEL)
}

/// Says why a device that is no swap area yet may not become one: what is on it would be lost.
/// `pages` is how many it holds.
pub fn check_free(disk: &Path, pages: u64) -> Result<()> {
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(disk);
    opened.with_context(|| format!("{} is in use by something else", disk.display()))?;
    // What was swap before is of no worth.
    if pages > 1 && signature(disk).is_none() {
        bail!(
            "{} holds {pages} pages of something that is no swap: blkdiscard {} first, if it is not needed",
            disk.display(),
            disk.display()
        );
    }
    Ok(())
}

/// The label of a swap header, if there is one; read around the page cache.
fn signature(device: &Path) -> Option<[u8; 9]> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(device).ok()?;
    let mut header = Header([0; PAGE as usize]);
    file.read_exact(&mut header.0).ok()?;
    let label = header.0[1052..1061].try_into().ok()?;
    header.0.ends_with(MAGIC).then_some(label)
}

/// Makes a window a swap area.
pub fn open(disk: &Path, window: &Window, discards: bool) -> Result<()> {
    let file = File::open(disk).with_context(|| format!("cannot open {}", disk.display()))?;
    blkpg(&file, BLKPG_ADD_PARTITION, window).with_context(|| format!("cannot add partition {}", window.number))?;
    let done = swap_on(&node(disk, window.number), window.pages, window.priority, discards);
    if done.is_err() {
        let _ = blkpg(&file, BLKPG_DEL_PARTITION, window);
    }
    done
}

/// Drops a window that is no swap area any more, with all that it held. One that is gone is no error.
pub fn drop_window(disk: &Path, number: u32) -> Result<()> {
    let node = node(disk, number);
    // Exclusively: never what somebody else has taken.
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(&node);
    match opened {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("cannot open {}", node.display())),
        Ok(partition) => discard(&partition)?,
    }
    let file = File::open(disk).with_context(|| format!("cannot open {}", disk.display()))?;
    blkpg(&file, BLKPG_DEL_PARTITION, &Window { number, ..Window::default() })
        .with_context(|| format!("cannot remove partition {number}"))
}

/// Discards all of an open device.
fn discard(device: &File) -> Result<()> {
    let mut device = device;
    let len = device.seek(SeekFrom::End(0))?;
    let range = [0u64, len];
    // SAFETY: an ioctl that reads two integers, which are live.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context("cannot discard what a window held"),
    }
}

/// Makes a whole device one swap area; `pages` includes the header.
pub fn swap_on(device: &Path, pages: u64, priority: i32, discards: bool) -> Result<()> {
    write_header(device, pages)?;
    let path = CString::new(device.as_os_str().as_encoded_bytes())?;
    let discard = if discards { SWAP_FLAG_DISCARD | SWAP_FLAG_DISCARD_PAGES } else { 0 };
    // SAFETY: the path is live and ends with NUL.
    if unsafe { libc::swapon(path.as_ptr(), SWAP_FLAG_PREFER | priority.clamp(0, 0x7fff) | discard) } == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    if e.raw_os_error() == Some(libc::EPERM) && crate::protect::is_root() {
        return Err(anyhow!(TooManyAreas));
    }
    Err(e).with_context(|| format!("cannot swap to {}", device.display()))
}

/// The kernel has as many swap areas as it can.
#[derive(Debug)]
pub struct TooManyAreas;

impl std::fmt::Display for TooManyAreas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the kernel takes no more swap areas")
    }
}

impl std::error::Error for TooManyAreas {}

/// A page for O_DIRECT.
#[repr(C, align(4096))]
struct Header([u8; PAGE as usize]);

/// What `mkswap` writes (Linux `include/linux/swap.h`, `union swap_header`), around the page cache.
fn write_header(device: &Path, pages: u64) -> Result<()> {
    let Ok(last) = u32::try_from(pages - 1) else { bail!("a swap area has at most 16T") };
    let mut header = Header([0; PAGE as usize]);
    header.0[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
    header.0[1028..1032].copy_from_slice(&last.to_ne_bytes());
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    let digits: Vec<u8> = uuid.bytes().filter_map(|b| (b as char).to_digit(16)).map(|d| d as u8).collect();
    for (i, pair) in digits.chunks_exact(2).take(16).enumerate() {
        header.0[1036 + i] = pair[0] << 4 | pair[1];
    }
    header.0[1052..1061].copy_from_slice(LABEL);
    header.0[PAGE as usize - 10..].copy_from_slice(MAGIC);
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .with_context(|| format!("cannot open {}", device.display()))?;
    file.write_all(&header.0).with_context(|| format!("cannot write a swap header to {}", device.display()))
}

fn blkpg(disk: &File, op: i32, window: &Window) -> Result<()> {
    let (start, len) = ((window.start * PAGE) as i64, (window.pages * PAGE) as i64);
    let partition = Partition { start, len, number: window.number as i32, names: [0; 128] };
    let arg = Blkpg { op, flags: 0, len: std::mem::size_of::<Partition>() as i32, data: &raw const partition };
    // SAFETY: an ioctl that reads the argument and what it points to, both live and of the kernel's layout.
    match unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const arg) } {
        0 => Ok(()),
        _ => match std::io::Error::last_os_error() {
            e if op == BLKPG_DEL_PARTITION && e.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            e => Err(e.into()),
        },
    }
}

fn name(disk: &Path) -> Result<&str> {
    disk.file_name().and_then(|n| n.to_str()).ok_or_else(|| anyhow!("no device: {}", disk.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_partitions_that_are_swap_areas() {
        let swaps = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
            /dev/ublkb0p1                           partition\t262140\t\t4096\t\t100\n\
            /dev/ublkb0p11                          partition\t8\t\t0\t\t98\n\
            /a\\040file                              file\t\t8\t\t4\t\t-2\n";
        let areas = parse(swaps);
        assert_eq!(areas.len(), 3);
        assert_eq!(areas[2], Area { path: "/a\\040file".into(), pages: 2, used: 1, priority: -2 });
        let partition = |number| Window { number, start: 0, pages: 65536, ..Window::default() };
        let found = windows(Path::new("/dev/ublkb0"), &[partition(1), partition(2)], &areas);
        assert_eq!(found, [Window { used: 1024, priority: 100, ..partition(1) }]);
    }

    #[test]
    fn the_kernels_structures_have_their_size() {
        assert_eq!((std::mem::size_of::<Partition>(), std::mem::size_of::<Blkpg>()), (152, 24));
    }
}
