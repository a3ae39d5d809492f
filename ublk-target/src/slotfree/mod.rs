//! The slot-free feed: the kernel tells which swap slots of our device were freed, at once.
//!
//! The swap code tells a block device nothing of single slots: it discards whole clusters of 2 MiB
//! once they are empty, or nothing at all. So dead pages would stay in the store until their slots are
//! used again. A small BPF program (`program`) on the kernel's function that frees slots reports
//! each range into a ring, which the queues drain (`ring`, where the order is argued that keeps a slot
//! used anew from losing its new page). `btf` finds function and members in the running kernel, and
//! `kernel` makes the system calls.
//!
//! [`Source`] is the supervisor's: it makes everything before the first fork and holds the
//! descriptors, so that the program stays whatever becomes of workers. [`Feed`] is a worker's view.
//! Where none of it can be had the device lives on the kernel's discards, and `status` says why.
//!
//! A range that finds the ring full is counted as lost. That costs memory until the slots are used
//! again, and nothing else: a page that is written replaces whatever was there.

#![allow(unsafe_code)] // mmap of the ring.

pub mod btf;
mod kernel;
pub mod program;
pub mod ring;

use crate::board::{Board, Shared};
use anyhow::{bail, ensure, Context, Result};
use btf::Btf;
use clap::ValueEnum;
use program::{Hook, Settings, Target};
use ring::{Drained, Freed, Ring};
use serde_json::{json, Value};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the kernel describes its types.
const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";
/// Where it has the number of its event source for kprobes.
pub const KPROBE_TYPE: &str = "/sys/bus/event_source/devices/kprobe/type";
/// The ring, part of what `handover.rs` counts as one version: 32,768 records, what a process of 128 MiB in single pages
/// leaves behind at once.
const RING_BYTES: usize = 512 << 10;
const PAGE: usize = 4096;

/// What `--slot-free` asks for.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Wish {
    /// The best that this kernel has
    Auto,
    /// A BPF program called by the kernel's function
    Bpf,
    /// A BPF program called by a kprobe on that function
    Kprobe,
    /// Nothing but the kernel's discards
    Discard,
}

/// How the device hears of freed slots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// By discards of whole clusters only.
    Discard,
    /// By a BPF program.
    Bpf,
    /// By one on a kprobe.
    Kprobe,
}

impl Mode {
    const ALL: [Mode; 3] = [Mode::Discard, Mode::Bpf, Mode::Kprobe];

    /// As in `status`.
    pub fn name(self) -> &'static str {
        ["discard", "bpf", "kprobe"][self as usize]
    }

    /// As on the board.
    pub fn from_number(n: u64) -> Mode {
        Mode::ALL.get(n as usize).copied().unwrap_or(Mode::Discard)
    }
}

/// What is held for the feed: the ring, the settings, the program, its place at the function.
pub struct Source([OwnedFd; 4]);

impl Source {
    /// Makes what is wished for, and tells mode and reason: the function, or why there is no feed.
    /// With `auto` that never fails. Nothing reports before [`Source::aim`].
    pub fn make(wish: Wish) -> Result<(Option<Source>, Mode, String)> {
        let hooks: &[Hook] = match wish {
            Wish::Discard => return Ok((None, Mode::Discard, "as asked".into())),
            Wish::Bpf => &[Hook::Fentry],
            Wish::Kprobe => &[Hook::Kprobe],
            Wish::Auto => &[Hook::Fentry, Hook::Kprobe],
        };
        let mut why = String::new();
        match find() {
            Ok(target) => {
                for hook in hooks {
                    let mode = if *hook == Hook::Fentry { Mode::Bpf } else { Mode::Kprobe };
                    match Source::of(&target, *hook) {
                        Ok(source) => return Ok((Some(source), mode, target.name.to_owned())),
                        Err(e) if why.is_empty() => why = format!("{}: {e:#}", mode.name()),
                        Err(e) => why = format!("{why}; {}: {e:#}", mode.name()),
                    }
                }
            }
            Err(e) => why = format!("{e:#}"),
        }
        match wish {
            Wish::Auto => Ok((None, Mode::Discard, why)),
            _ => bail!("no slot-free feed: {why}"),
        }
    }

    fn of(target: &Target, hook: Hook) -> Result<Source> {
        let (ring, settings) = (kernel::ring(RING_BYTES as u32)?, kernel::settings()?);
        let code = program::assemble(target, hook, ring.as_raw_fd(), settings.as_raw_fd())?;
        let program = kernel::load(&code, (hook == Hook::Fentry).then_some(target.id))?;
        let place = match hook {
            Hook::Fentry => kernel::attach_fentry(&program)?,
            Hook::Kprobe => {
                let kind = std::fs::read_to_string(KPROBE_TYPE).context("this kernel has no kprobes")?;
                let kind = kind.trim().parse().context("a bad number of the kprobes' event source")?;
                kernel::attach_kprobe(&program, kind, &CString::new(target.name)?)?
            }
        };
        Ok(Source([ring, settings, program, place]))
    }

    /// What an older supervisor left, by its [`Source::descriptors`].
    pub fn left(descriptors: [OwnedFd; 4]) -> Source {
        Source(descriptors)
    }

    /// What a worker keeps, too: should the supervisor be killed, the feed goes on with the worker.
    pub fn descriptors(&self) -> [RawFd; 4] {
        [0, 1, 2, 3].map(|i| self.0[i].as_raw_fd())
    }

    /// From here on freed slots on this device are reported.
    pub fn aim(&self, device: &Path) -> Result<()> {
        let name = device.file_name().and_then(|name| name.to_str()).context("a device without a name")?;
        let text = std::fs::read_to_string(format!("/sys/block/{name}/dev")).context("a device without a number")?;
        let disk = disk_number(&text).with_context(|| format!("a bad device number: {text}"))?;
        kernel::set(&self.0[1], &Settings { disk, lost: 0 })
    }
}

/// Finds the function of the running kernel.
pub fn find() -> Result<Target> {
    ensure!(cfg!(target_endian = "little") && cfg!(target_pointer_width = "64"), "not on this processor");
    // SAFETY: takes no pointers.
    ensure!(unsafe { libc::sysconf(libc::_SC_PAGESIZE) } == PAGE as libc::c_long, "pages are not 4 KiB here");
    let text = std::fs::read(BTF_PATH).context("this kernel describes no types (no BTF)")?;
    Target::find(&Btf::parse(&text)?)
}

/// `MAJOR:MINOR` as the program compares it.
fn disk_number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(u64::from(major.parse::<u32>().ok()?) << 32 | u64::from(minor.parse::<u32>().ok()?))
}

/// The feed as a worker's queues use it.
pub struct Feed {
    ring: Ring<'static>,
    lost: &'static AtomicU64,
    fd: RawFd,
    board: &'static Board,
}

impl Feed {
    /// Maps it. The kernel has filled these pages when it made the ring: no faults follow.
    pub fn map(source: &Source, shared: &Shared) -> Result<Feed> {
        let [ring, settings, _, _] = source.descriptors();
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let consumer = map(ring, 0, PAGE, writable)?;
        // The kernel maps the data twice in a row; once will do.
        let producer = map(ring, PAGE, PAGE + RING_BYTES, libc::PROT_READ)?;
        let settings = map(settings, 0, PAGE, libc::PROT_READ)?;
        let words = RING_BYTES / std::mem::size_of::<u64>();
        // SAFETY: three mappings that stay, page-aligned, of at least these lengths, which are only
        // ever looked at as atomic words; the settings' second word is the count of lost ranges.
        let (consumer, producer, data, lost) = unsafe {
            let data = producer.add(PAGE).cast::<AtomicU64>();
            let lost = settings.cast::<AtomicU64>().add(std::mem::offset_of!(Settings, lost) / 8);
            (&*consumer.cast(), &*producer.cast(), std::slice::from_raw_parts(data, words), &*lost)
        };
        Ok(Feed { ring: Ring::new(consumer, producer, data), lost, fd: ring, board: shared.board })
    }

    /// The order of writes and freed slots: see there.
    pub fn ring(&self) -> &Ring<'static> {
        &self.ring
    }

    /// Readable when there is something to drain.
    pub fn descriptor(&self) -> RawFd {
        self.fd
    }

    /// Applies what has come, and counts it.
    pub fn drain(&self, budget: u64, apply: impl FnMut(Freed)) -> Drained {
        let (ended, tally) = self.ring.drain(budget, apply);
        self.board.slot_free.events.fetch_add(tally.events, Ordering::Relaxed);
        self.board.slot_free.pages.fetch_add(tally.pages, Ordering::Relaxed);
        ended
    }

    /// Ranges that found the ring full.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

fn map(fd: RawFd, offset: usize, len: usize, prot: libc::c_int) -> Result<*mut u8> {
    // SAFETY: a fresh mapping at an address the kernel picks.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, offset as libc::off_t) };
    if at == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error()).context("cannot map the ring of freed slots");
    }
    Ok(at.cast())
}

/// What `status` tells: for programs and for people.
pub fn describe(shared: &Shared, feed: Option<&Feed>) -> (Value, String) {
    let (mode, reason) = shared.slot_free();
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let (events, pages) = (count(&shared.board.slot_free.events), count(&shared.board.slot_free.pages));
    let lost = feed.map_or(0, Feed::lost);
    let value = json!({"mode": mode.name(), "reason": reason, "events": events, "pages": pages, "lost": lost});
    let line = match mode {
        Mode::Discard => format!("slot-free discards only: {reason}"),
        _ => format!("slot-free {} on {reason}: {pages} pages in {events} ranges, {lost} ranges lost", mode.name()),
    };
    (value, line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_keep_their_names_and_numbers() {
        for mode in Mode::ALL {
            assert_eq!(Mode::from_number(mode as u64), mode);
        }
        assert_eq!((Mode::from_number(1).name(), Mode::from_number(9).name()), ("bpf", "discard"));
    }

    #[test]
    fn device_numbers_are_taken_as_the_program_compares_them() {
        assert_eq!(disk_number("259:3\n"), Some(259 << 32 | 3));
        for bad in ["", "259", "259:x", "a:3"] {
            assert_eq!(disk_number(bad), None, "{bad}");
        }
    }
}
