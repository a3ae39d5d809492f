//! Signals as a descriptor, and waiting for it and others.

#![allow(unsafe_code)] // signalfd, poll.

use anyhow::{Context, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Blocks the signals; from here on they are read from the descriptor. Before any thread starts.
pub fn block(wanted: &[libc::c_int]) -> Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; the new descriptor is owned by
    // nothing else.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in wanted {
            libc::sigaddset(&mut set, *signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(std::io::Error::last_os_error()).context("cannot receive signals"),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// The next signal that has come.
pub fn next(signals: &OwnedFd) -> Option<libc::c_int> {
    // SAFETY: plain data, for which zeros are valid.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let len = std::mem::size_of_val(&info);
    // SAFETY: the buffer is as long as said.
    let read = unsafe { libc::read(signals.as_raw_fd(), (&raw mut info).cast(), len) };
    (read == len as isize).then_some(info.ssi_signo as libc::c_int)
}

/// Which of the descriptors can be read; waits for one. A negative number is passed over.
pub fn poll<const N: usize>(fds: [RawFd; N], timeout: Duration) -> [bool; N] {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the array is live and its length is given.
    unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, timeout.as_millis() as libc::c_int) };
    polled.map(|p| p.revents != 0)
}
