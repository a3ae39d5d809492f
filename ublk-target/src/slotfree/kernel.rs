//! What is asked of the kernel: two maps, the program, and its place at the function.
//!
//! `bpf(2)` and `perf_event_open(2)` as they are, since there is little of them. Their arguments
//! are structures of which the kernel takes the size it is given and zeros for the rest, so only the
//! words that matter are filled in; each by its place in Linux `include/uapi/linux/bpf.h`.

#![allow(unsafe_code)] // bpf, perf_event_open, ioctl.

use super::program::Settings;
use anyhow::{anyhow, Context, Result};
use std::ffi::CStr;
use std::io::Error as OsError;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;

const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_RINGBUF: u32 = 27;
const MMAPABLE: u32 = 1 << 10;
const PROG_TYPE_KPROBE: u32 = 2;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_FENTRY: u32 = 24;
/// What helpers for tracing ask for; the program is under the project's own licence too.
const LICENSE: &CStr = c"Dual MIT/GPL";
const NAME: [u8; 9] = *b"ghostswap";
/// Room for the verifier's last words.
const LOG_BYTES: usize = 64 << 10;

const IOC_ENABLE: libc::c_ulong = 0x2400;
const IOC_SET_BPF: libc::c_ulong = 0x4004_2408;
const FLAG_FD_CLOEXEC: libc::c_ulong = 8;

/// `union bpf_attr`, as far as it is used here.
#[repr(C, align(8))]
struct Attr([u8; 128]);

impl Attr {
    fn new() -> Attr {
        Attr([0; 128])
    }

    fn word(mut self, at: usize, value: u32) -> Attr {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn long(mut self, at: usize, value: u64) -> Attr {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn name(mut self, at: usize) -> Attr {
        self.0[at..at + NAME.len()].copy_from_slice(&NAME);
        self
    }

    /// # Safety
    /// Addresses in it must be of live memory, as large as the command takes it for.
    unsafe fn call(&self, command: libc::c_int) -> std::result::Result<libc::c_long, OsError> {
        // SAFETY: the caller's promise; the structure is as long as said.
        match unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_ptr(), self.0.len()) } {
            -1 => Err(OsError::last_os_error()),
            n => Ok(n),
        }
    }

    /// # Safety
    /// As for `call`; the command must be one that makes a descriptor.
    unsafe fn make(&self, command: libc::c_int) -> std::result::Result<OwnedFd, OsError> {
        // SAFETY: the caller's promise; a descriptor that bpf returns is new and close-on-exec.
        unsafe { self.call(command).map(|fd| OwnedFd::from_raw_fd(fd as RawFd)) }
    }
}

/// Makes the ring: `bytes` is a power of two and a multiple of a page.
pub fn ring(bytes: u32) -> Result<OwnedFd> {
    let attr = Attr::new().word(0, MAP_TYPE_RINGBUF).word(12, bytes).name(28);
    // SAFETY: no addresses in it.
    unsafe { attr.make(MAP_CREATE) }.context("the kernel makes no ring buffer for BPF")
}

/// Makes the settings.
pub fn settings() -> Result<OwnedFd> {
    let bytes = std::mem::size_of::<Settings>() as u32;
    let attr = Attr::new().word(0, MAP_TYPE_ARRAY).word(4, 4).word(8, bytes).word(12, 1).word(16, MMAPABLE).name(28);
    // SAFETY: no addresses in it.
    unsafe { attr.make(MAP_CREATE) }.context("the kernel makes no array for BPF")
}

/// Writes the settings.
pub fn set(map: &OwnedFd, settings: &Settings) -> Result<()> {
    let key = 0u32;
    let (key, value) = ((&raw const key) as u64, std::ptr::from_ref(settings) as u64);
    let attr = Attr::new().word(0, map.as_raw_fd() as u32).long(8, key).long(16, value);
    // SAFETY: a key of 4 bytes and a value of the map's size, both live.
    unsafe { attr.call(MAP_UPDATE_ELEM) }.context("cannot tell the BPF program its device")?;
    Ok(())
}

/// Loads the program for the function with this number, or for a kprobe.
pub fn load(code: &[u64], fentry: Option<u32>) -> Result<OwnedFd> {
    let base = || {
        let kind = if fentry.is_some() { PROG_TYPE_TRACING } else { PROG_TYPE_KPROBE };
        let attr = Attr::new().word(0, kind).word(4, code.len() as u32).long(8, code.as_ptr() as u64);
        let attr = attr.long(16, LICENSE.as_ptr() as u64).name(48);
        match fentry {
            Some(id) => attr.word(68, TRACE_FENTRY).word(108, id),
            None => attr,
        }
    };
    // SAFETY: instructions and licence are live, and as long as said or ended by NUL.
    let refused = match unsafe { base().make(PROG_LOAD) } {
        Ok(program) => return Ok(program),
        Err(e) => e,
    };
    // Once more, for the reason.
    let mut log = vec![0u8; LOG_BYTES];
    let attr = base().word(24, 1).word(28, log.len() as u32).long(32, log.as_mut_ptr() as u64);
    // SAFETY: as above, and the log is as long as said.
    let again = unsafe { attr.make(PROG_LOAD) };
    let said = String::from_utf8_lossy(&log);
    let said = said.trim_end_matches('\0').trim_end();
    let reason = said.lines().rev().find(|l| !l.starts_with("processed ") && !l.is_empty()).unwrap_or("").to_owned();
    again.map_err(|_| anyhow!("the kernel refuses the program: {refused} {reason}"))
}

/// Has the function call the program, until the descriptor is closed everywhere.
pub fn attach_fentry(program: &OwnedFd) -> Result<OwnedFd> {
    let attr = Attr::new().word(8, program.as_raw_fd() as u32);
    // SAFETY: no addresses in it.
    unsafe { attr.make(RAW_TRACEPOINT_OPEN) }.context("the kernel does not attach the BPF program")
}

/// The same by a kprobe. `kind` is the number of the kernel's event source for them.
pub fn attach_kprobe(program: &OwnedFd, kind: u32, function: &CStr) -> Result<OwnedFd> {
    // `struct perf_event_attr`: type, size, config, sample_period, then words not used here;
    // config1 (the name) and config2 (the offset) at 56 and 64.
    let mut attr = [0u64; 14];
    attr[0] = u64::from(kind) | (std::mem::size_of_val(&attr) as u64) << 32;
    attr[2] = 1;
    attr[7] = function.as_ptr() as u64;
    // SAFETY: the structure is as long as it says, and the name lives.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), -1, 0, -1, FLAG_FD_CLOEXEC) };
    if fd < 0 {
        return Err(OsError::last_os_error()).context("the kernel sets no kprobe");
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let event = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    for (what, with) in [(IOC_SET_BPF, program.as_raw_fd()), (IOC_ENABLE, 0)] {
        // SAFETY: takes no pointers.
        if unsafe { libc::ioctl(event.as_raw_fd(), what as _, with) } != 0 {
            return Err(OsError::last_os_error()).context("the kernel does not run the BPF program at a kprobe");
        }
    }
    Ok(event)
}
