//! Swapping a window off: slowly if wanted, and to be broken off at any time.
//!
//! `swapoff(2)` goes on until all pages are back or it fails; but a signal ends it, with the area in use
//! again as it then is (Linux `mm/swapfile.c`, `try_to_unuse`). So it runs in a process of its own, for a
//! slice at a time. That process may be the OOM killer's, which takes whoever swaps off first: that, too,
//! only ends the slice, and for good, since memory would not hold the rest.
//!
//! [`Retreat::step`] is to be called every few tens of milliseconds until it says that it is over.

#![allow(unsafe_code)] // fork, swapoff, waitpid.

use anyhow::{bail, Context, Result};
use std::ffi::CString;
use std::path::Path;
use std::time::{Duration, Instant};

const PR_SET_IO_FLUSHER: libc::c_int = 57;
/// A slice's length at most, if the rate is limited.
const SLICE: Duration = Duration::from_millis(200);

/// A window on its way out.
pub struct Retreat {
    area: CString,
    /// Pages a second; None: as fast as it goes.
    rate: Option<u64>,
    child: Option<libc::pid_t>,
    /// A slice's begin and how much was used then.
    slice: (Instant, u64),
    /// When the next one may begin.
    due: Instant,
    /// Slices ended by us, not by the kernel.
    cut: bool,
}

/// How far it is.
#[derive(Debug, PartialEq)]
pub enum Progress {
    /// Not yet over.
    Going,
    /// No swap area any more.
    Over,
}

impl Retreat {
    /// Nothing begins before the first step.
    pub fn new(area: &Path, rate: Option<u64>) -> Result<Retreat> {
        let area = CString::new(area.as_os_str().as_encoded_bytes()).context("bad path")?;
        let now = Instant::now();
        Ok(Retreat { area, rate, child: None, slice: (now, 0), due: now, cut: false })
    }

    /// Goes on; `used` pages are in the area now.
    pub fn step(&mut self, used: u64) -> Result<Progress> {
        let now = Instant::now();
        let Some(pid) = self.child else {
            if now >= self.due {
                self.child = Some(self.start()?);
                self.slice = (now, used);
            }
            return Ok(Progress::Going);
        };
        if let Some(status) = ended(pid, libc::WNOHANG) {
            self.child = None;
            return self.judge(status, used);
        }
        if let Some(rate) = self.rate.filter(|_| now - self.slice.0 >= SLICE && used > 0) {
            self.stop();
            // As long as what was done should have taken.
            let done = self.slice.1.saturating_sub(used);
            let should = Duration::from_secs_f64(done as f64 / rate.max(1) as f64);
            self.due = now.max(self.slice.0 + should);
        }
        Ok(Progress::Going)
    }

    fn judge(&mut self, status: i32, used: u64) -> Result<Progress> {
        if libc::WIFEXITED(status) {
            return match libc::WEXITSTATUS(status) {
                0 => Ok(Progress::Over),
                // Not there any more: somebody else was faster.
                libc::EINVAL => Ok(Progress::Over),
                libc::ENOMEM => bail!("memory would not hold the {} MiB that are swapped out there", used >> 8),
                errno => Err(std::io::Error::from_raw_os_error(errno)).context("swapoff failed"),
            };
        }
        if std::mem::take(&mut self.cut) {
            return Ok(Progress::Going);
        }
        bail!("the kernel broke it off for want of memory, with {} MiB still swapped out there", used >> 8)
    }

    /// Ends the slice that runs. The area is in use again.
    fn stop(&mut self) {
        let Some(pid) = self.child.take() else { return };
        // SAFETY: a child of ours that has not been waited for.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        self.cut = true;
        if let Some(status) = ended(pid, 0) {
            // It may have been over just then; the next slice finds no area.
            let _ = self.judge(status, 0);
        }
        self.cut = false;
    }

    fn start(&self) -> Result<libc::pid_t> {
        // SAFETY: the child makes system calls only, none of which allocates in this process.
        match unsafe { libc::fork() } {
            -1 => Err(std::io::Error::last_os_error()).context("cannot fork"),
            0 => {
                // SAFETY: the string was made before the fork. Its memory is no daemon's: it may wait
                // for other swap, so it must be no IO_FLUSHER. It must not outlive who watches it.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0);
                    let rc = libc::swapoff(self.area.as_ptr());
                    libc::_exit(if rc == 0 { 0 } else { *libc::__errno_location() });
                }
            }
            pid => Ok(pid),
        }
    }
}

impl Drop for Retreat {
    fn drop(&mut self) {
        self.stop();
    }
}

fn ended(pid: libc::pid_t, how: libc::c_int) -> Option<i32> {
    let mut status = 0;
    // SAFETY: the status is live; a child of ours that has not been waited for.
    (unsafe { libc::waitpid(pid, &mut status, how) } == pid).then_some(status)
}
