//! Several writes of buffers at once, through io_uring: what keeps a disk busy from one thread.
#![allow(unsafe_code, reason = "submitting buffers that outlive the call")]

use super::{Backing, Buffer};
use crate::error::{system, Error, Result};
use io_uring::{opcode, types, IoUring};
use std::os::fd::AsRawFd;

/// A ring for one thread.
pub(crate) struct Ring {
    ring: IoUring,
}

/// What is to be written of a buffer, where to, and what came of it.
pub(crate) struct Transfer {
    /// The buffer's number.
    pub buffer: usize,
    /// Its first bytes.
    pub bytes: usize,
    /// Byte offset on disk.
    pub at: u64,
    /// Set by the call.
    pub result: std::io::Result<()>,
}

impl Ring {
    /// Room for `entries` transfers.
    pub fn new(entries: u32) -> Result<Ring> {
        let ring = IoUring::new(entries.next_power_of_two());
        Ok(Ring { ring: ring.map_err(|source| Error::System { what: "io_uring_setup", source })? })
    }

    /// Writes them all and returns when all have ended, well or not.
    pub fn write(&mut self, backing: &Backing, buffers: &[Buffer], transfers: &mut [Transfer]) {
        let fd = types::Fd(backing.fd().as_raw_fd());
        for (i, t) in transfers.iter().enumerate() {
            let bytes = &buffers[t.buffer][..t.bytes];
            let entry = opcode::Write::new(fd, bytes.as_ptr(), t.bytes as u32).offset(t.at).build();
            // SAFETY: the buffer is borrowed until this returns, and by then the write has ended: below
            // every completion is waited for.
            let pushed = unsafe { self.ring.submission().push(&entry.user_data(i as u64)) };
            pushed.expect("a ring has an entry for each of its buffers");
        }
        let mut left = transfers.len();
        while left > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                // A ring that cannot be asked any more: the buffers may be in use, so they must not go.
                Err(_) => panic!("{}", system("io_uring_enter for a disk tier")),
            }
            for done in self.ring.completion() {
                let t = &mut transfers[done.user_data() as usize];
                t.result = match done.result() {
                    n if n == t.bytes as i32 => Ok(()),
                    n if n < 0 => Err(std::io::Error::from_raw_os_error(-n)),
                    _ => Err(std::io::ErrorKind::WriteZero.into()),
                };
                left -= 1;
            }
        }
    }
}
