//! The supervisor's children, and a worker that is another's child: how they are forked, told, killed
//! and seen to end.

#![allow(unsafe_code)] // waitpid, kill, close_range, pidfd_open.

use crate::board::Shared;
use crate::cli::Add;
use crate::daemon::{self, fork};
use crate::slotfree::Source;
use crate::worker::{self, Setup};
use crate::{device, protect};
use anyhow::{Context, Result};
use ghostswap::config::TierConfig;
use std::io::{BufRead, BufReader, Error as OsError, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A worker, seen from its supervisor.
pub struct Worker {
    /// Its process.
    pub pid: libc::pid_t,
    /// Orders down, news up.
    pub pipe: BufReader<UnixStream>,
    /// Since when it is what it is.
    pub since: Instant,
    /// It stands by and waits for nothing but its order.
    pub ready: bool,
    /// It has said that the device is live with it.
    pub live: bool,
    /// It stands by to find out whether other tiers than those that hold can be had.
    pub trial: bool,
}

/// How many can take over at once.
pub fn ready_count(standbys: &[Worker]) -> usize {
    standbys.iter().filter(|s| s.ready).count()
}

impl Worker {
    /// Of a process that runs already.
    pub fn new(pid: libc::pid_t, pipe: UnixStream) -> Worker {
        let pipe = BufReader::with_capacity(512, pipe);
        Worker { pid, pipe, since: Instant::now(), ready: false, live: false, trial: false }
    }

    /// For how long it has served.
    pub fn lived(&self) -> Duration {
        if self.live {
            self.since.elapsed()
        } else {
            Duration::ZERO
        }
    }

    /// What a dead one said had gone wrong, if nobody heard it.
    pub fn last_words(&mut self) -> Option<String> {
        self.pipe.get_ref().set_nonblocking(true).ok()?;
        let lines = self.pipe.by_ref().lines().map_while(Result::ok);
        lines.filter_map(|line| line.strip_prefix("error ").map(str::to_owned)).last()
    }

    /// Tells it.
    pub fn order(&mut self, line: &str) -> std::io::Result<()> {
        self.pipe.get_mut().write_all(format!("{line}\n").as_bytes())
    }
}

/// Forks a worker that stands by, with these tiers; `trial`: if they can be had.
pub fn start(
    add: &Add,
    tiers: &[TierConfig],
    trial: bool,
    arena: &OwnedFd,
    shared: &Arc<Shared>,
    feed: Option<&Source>,
    device: Option<u32>,
) -> Result<Worker> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    let mut tell = theirs.try_clone().context("cannot duplicate a pipe")?;
    let arena = arena.try_clone().context("cannot duplicate the arena's descriptor")?;
    let mut keep = shared.descriptors().to_vec();
    keep.extend([arena.as_raw_fd(), theirs.as_raw_fd(), tell.as_raw_fd()]);
    keep.extend(feed.into_iter().flat_map(Source::descriptors));
    let setup = Setup { add, tiers, trial, arena, shared: shared.clone(), feed, pipe: theirs, device };
    let pid = child(c"gs-worker", keep, || {
        let done = worker::run(setup);
        if let Err(e) = &done {
            daemon::tell_error(&mut tell, e);
        }
        done
    })?;
    Ok(Worker { trial, ..Worker::new(pid, ours) })
}

/// Forks a child that does `work` with these descriptors and ends.
pub fn child(name: &std::ffi::CStr, keep: Vec<RawFd>, work: impl FnOnce() -> Result<()>) -> Result<libc::pid_t> {
    let pid = fork()?;
    if pid == 0 {
        protect::name(name);
        close_others(keep);
        std::process::exit(i32::from(work().is_err()));
    }
    Ok(pid)
}

/// Closes what a child has of its supervisor's: pipes of other workers must end with the supervisor,
/// and the command waits for the end of its own. The child leaves by `exit`, so nothing that still
/// owns one of these numbers is dropped.
fn close_others(mut keep: Vec<RawFd>) {
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    // SAFETY: takes no pointers; see the caller for who owned the descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Forks a child that removes a device of which nobody will take care any more. Speaking to the driver
/// is not for the supervisor itself.
pub fn remover(id: u32) -> Result<Worker> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    let mut tell = theirs.try_clone().context("cannot duplicate a pipe")?;
    // Both ends of its own, so that ours ends when it does.
    let pid = child(c"gs-worker", vec![theirs.as_raw_fd(), tell.as_raw_fd()], || {
        let done = device::remove(id);
        if let Err(e) = &done {
            daemon::tell_error(&mut tell, e);
        }
        done
    })?;
    Ok(Worker::new(pid, ours))
}

/// A descriptor that can be read once the process has ended. None: it has.
pub fn pidfd(pid: libc::pid_t) -> Result<Option<OwnedFd>> {
    // SAFETY: takes no pointers.
    match unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } {
        -1 if OsError::last_os_error().raw_os_error() == Some(libc::ESRCH) => Ok(None),
        -1 => Err(OsError::last_os_error()).context("cannot watch a process"),
        // SAFETY: a fresh descriptor that nobody else owns.
        fd => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })),
    }
}

/// The same of a worker that is no child of ours. One whose number another process has by now has ended.
pub fn stranger(pid: libc::pid_t) -> Result<Option<OwnedFd>> {
    let process = pidfd(pid)?;
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => Ok(process.filter(|_| name.trim_end() == "gs-worker")),
        Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        // One that serves is not to be taken for dead because there was no memory to look.
        Err(e) => Err(e).context("cannot see who serves"),
    }
}

/// Kills a worker that is no child of ours: whoever has its number by now is spared.
pub fn kill_stranger(process: &OwnedFd) {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null pointer stands for an ordinary signal's particulars.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), libc::SIGKILL, none, 0) };
}

/// Sends a child a signal.
pub fn kill(pid: libc::pid_t, signal: libc::c_int) {
    // SAFETY: a child of ours that has not been waited for.
    unsafe { libc::kill(pid, signal) };
}

/// A child that ended, and its wait status.
pub fn reap() -> Option<(libc::pid_t, i32)> {
    let mut status = 0;
    // SAFETY: the status is live; no option blocks.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    (pid > 0).then_some((pid, status))
}

/// How a child ended, for people.
pub fn describe(status: i32) -> String {
    match libc::WIFSIGNALED(status) {
        true => format!("was killed by signal {}", libc::WTERMSIG(status)),
        false => format!("ended with status {}", libc::WEXITSTATUS(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signals::poll;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[test]
    fn the_end_of_any_process_is_noticed() {
        let mut other = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = other.id() as libc::pid_t;
        let process = pidfd(pid).unwrap().unwrap();
        assert_eq!(poll([process.as_raw_fd()], Duration::from_millis(20)), [false]);
        assert!(stranger(pid).unwrap().is_none(), "no worker of ours goes by that name");
        kill_stranger(&process);
        assert_eq!(poll([process.as_raw_fd()], Duration::from_secs(5)), [true]);
        other.wait().unwrap();
        assert!(pidfd(pid).unwrap().is_none());
    }
}
