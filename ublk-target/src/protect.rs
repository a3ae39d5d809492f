//! Keeps the daemon alive while it is the swap device: nothing it touches on the I/O path may be
//! paged out, and no thread of it may wait for reclaim to write to its own device.
//!
//! Order: [`process`] first (before any thread and before the store maps its arena), then
//! [`thread`] at the start of every thread, then [`make_resident`] once all threads are up and
//! before the device goes live.
//!
//! Locking is always ONFAULT: the arena is a sparse shared mapping far larger than memory, and a
//! plain MCL_FUTURE would populate all of it.

#![allow(unsafe_code)] // prctl, mlockall, madvise: the process's own memory and attributes.

use anyhow::{bail, Context, Result};
use std::io::Error as OsError;
use std::time::Duration;

const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;
const OOM_SCORE: &str = "/proc/self/oom_score_adj";
const MADV_POPULATE_READ: libc::c_int = 22;
const MADV_POPULATE_WRITE: libc::c_int = 23;
/// Private mappings above this are reservations, not working memory.
const RESERVATION_BYTES: usize = 64 << 20;
/// Real-time priorities: the supervisor's, a take-over's, growth's.
pub const SUPERVISOR_PRIORITY: libc::c_int = 3;
/// A take-over's: growth must not hold it up.
pub const TAKE_OVER_PRIORITY: libc::c_int = 2;
/// The windows': less than all of them.
pub const WINDOWS_PRIORITY: libc::c_int = 1;
const GROWTH_PRIORITY: libc::c_int = 1;
/// How much of the main thread's stack is touched beforehand.
const MAIN_STACK_BYTES: usize = 64 << 10;

/// Whether this process runs as root, where every protection is demanded and not only tried.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// Protects the process as a whole and its calling thread.
pub fn process() -> Result<()> {
    // SAFETY: called before any other thread exists; both options only tune the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        // From the heap, which is made resident, and not from mappings of their own.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
    }
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the pointer is to a live rlimit.
    let rc = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &unlimited) };
    demand(rc == 0, "cannot raise RLIMIT_MEMLOCK")?;
    let killable = std::fs::write(OOM_SCORE, "-1000");
    if is_root() {
        killable.context("cannot exempt the daemon from the OOM killer")?;
    }
    thread()?;
    // SAFETY: ONFAULT locks pages as they come; no memory is touched.
    let rc = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    demand(rc == 0, "cannot lock the daemon's memory")?;
    // A dump would hold up the take-over behind it, and what is swapped out is nobody's business.
    // SAFETY: acts on the process and takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    Ok(())
}

/// What the calling thread has had so far: time on a CPU, page faults, and times that it was put off one.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    cpu: Duration,
    faults: i64,
    put_off: i64,
}

impl Usage {
    /// Now.
    pub fn now() -> Usage {
        // SAFETY: plain data, for which zeros are valid, and live; the call knows the calling thread.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
            usage
        };
        let time = |t: libc::timeval| Duration::from_micros(t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64);
        let cpu = time(usage.ru_utime) + time(usage.ru_stime);
        Usage { cpu, faults: usage.ru_minflt + usage.ru_majflt, put_off: usage.ru_nivcsw }
    }

    /// Since then.
    pub fn since(then: Usage) -> Usage {
        let now = Usage::now();
        Usage {
            cpu: now.cpu.saturating_sub(then.cpu),
            faults: now.faults - then.faults,
            put_off: now.put_off - then.put_off,
        }
    }
}

/// Microseconds on the clock that all processes of a machine share, and no one sets.
pub fn monotonic_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is live.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// Names the calling process, as seen by `ps`.
pub fn name(name: &std::ffi::CStr) {
    // SAFETY: the string is live and ends with NUL.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) };
}

/// Makes the calling thread an IO_FLUSHER and reads it back.
pub fn thread() -> Result<()> {
    demand(become_flusher(), "cannot make a thread an IO_FLUSHER")
}

/// Lets the calling thread wait for swap-out as any other program does: for one that nobody waits for.
pub fn may_wait() {
    // SAFETY: acts on the calling thread and takes no pointers.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0) };
}

fn become_flusher() -> bool {
    // SAFETY: both options act on the calling thread and take no pointers.
    unsafe {
        libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
        libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1
    }
}

/// Whether a thread of this process could become an IO_FLUSHER: tried in one that then ends.
pub fn can_become_flusher() -> bool {
    std::thread::spawn(become_flusher).join().unwrap_or(false)
}

/// Whether this process could exempt itself from the OOM killer: tried and taken back.
pub fn can_avoid_oom_kill() -> bool {
    let Ok(before) = std::fs::read_to_string(OOM_SCORE) else { return false };
    let lowered = std::fs::write(OOM_SCORE, "-1000").is_ok();
    let _ = std::fs::write(OOM_SCORE, before.trim());
    lowered
}

/// For the store's background threads, which have no one to return an error to: a thread that
/// could wait on the device it serves must not run at all.
pub fn store_thread(name: &str) {
    if let Err(e) = thread() {
        tracing::error!("thread {name}: {e:#}");
        std::process::abort();
    }
    match name {
        // What a carrier sends takes memory of the kernel, for a page that is to make room.
        "growth" | "carrier" => first_in_line(GROWTH_PRIORITY),
        _ => as_any_other(),
    }
}

/// Lets the calling thread run and allocate before those who fill memory: a real-time thread runs
/// at once, and the page allocator lets it below the `min` watermark where others wait (Linux
/// `mm/page_alloc.c`, `ALLOC_MIN_RESERVE`). For threads that sleep nearly always, and for a
/// take-over. What they start begins so too, since it may need memory before it can say what it is.
/// Refused (a container, say), a thread works as any other.
pub fn first_in_line(priority: libc::c_int) {
    if !become_real_time(priority) {
        tracing::debug!("no real-time priority {priority}: {}", OsError::last_os_error());
    }
}

fn become_real_time(priority: libc::c_int) -> bool {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: acts on the calling thread; the parameter is live.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) == 0 }
}

/// Whether a thread of this process could be first in line: tried in one that then ends.
pub fn can_be_first_in_line() -> bool {
    std::thread::spawn(|| become_real_time(SUPERVISOR_PRIORITY)).join().unwrap_or(false)
}

/// Takes that back.
pub fn as_any_other() {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: acts on the calling thread; the parameter is live. Giving up a priority is allowed.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &param) };
}

fn demand(ok: bool, what: &str) -> Result<()> {
    if ok || !is_root() {
        return Ok(());
    }
    bail!("{what}: {}", OsError::last_os_error())
}

/// Brings every private mapping into memory, where the lock keeps it. Returns the bytes covered.
pub fn make_resident() -> Result<usize> {
    touch_main_stack();
    let maps = std::fs::read_to_string("/proc/self/maps").context("cannot read /proc/self/maps")?;
    let mut covered = 0;
    for line in maps.lines() {
        let Some((start, len, advice)) = wanted(line) else { continue };
        // SAFETY: populating neither changes nor unmaps anything; a mapping that has gone away
        // since it was listed makes the call fail.
        let rc = unsafe { libc::madvise(start as *mut libc::c_void, len, advice) };
        if rc == 0 {
            covered += len;
        } else {
            tracing::warn!("not made resident: {line}: {}", OsError::last_os_error());
        }
    }
    Ok(covered)
}

/// What to populate of one line of /proc/self/maps, and how.
fn wanted(line: &str) -> Option<(usize, usize, libc::c_int)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let perms = fields.next()?.as_bytes();
    let name = fields.nth(3).unwrap_or("");
    let start = usize::from_str_radix(start, 16).ok()?;
    let len = usize::from_str_radix(end, 16).ok()?.checked_sub(start)?;
    let special = name.starts_with("[v"); // [vvar], [vvar_vclock], [vdso], [vsyscall]
    let shared = perms.get(3) != Some(&b'p');
    if special || shared || len > RESERVATION_BYTES {
        return None;
    }
    match (perms.first(), perms.get(1)) {
        (_, Some(b'w')) => Some((start, len, MADV_POPULATE_WRITE)),
        (Some(b'r'), _) => Some((start, len, MADV_POPULATE_READ)),
        _ => None,
    }
}

#[inline(never)]
fn touch_main_stack() {
    let mut space = [0u8; MAIN_STACK_BYTES];
    for at in (0..MAIN_STACK_BYTES).step_by(4096) {
        space[at] = 1;
    }
    std::hint::black_box(&mut space);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_private_accessible_mappings_only() {
        let w = |rest: &str| wanted(&format!("7f0000000000-7f0000002000 {rest}"));
        assert_eq!(w("rw-p 00000000 00:00 0 [heap]"), Some((0x7f00_0000_0000, 8192, MADV_POPULATE_WRITE)));
        assert_eq!(w("r-xp 00000000 08:01 7 /bin/x"), Some((0x7f00_0000_0000, 8192, MADV_POPULATE_READ)));
        assert_eq!(w("rw-s 00000000 00:01 7 /memfd:ghostswap (deleted)"), None);
        assert_eq!(w("---p 00000000 00:00 0"), None);
        assert_eq!(w("r--p 00000000 00:00 0 [vvar]"), None);
        assert_eq!(wanted("7f0000000000-7f0010000000 rw-p 00000000 00:00 0"), None);
    }

    #[test]
    fn makes_itself_resident() {
        assert!(make_resident().unwrap() > 0);
    }
}
