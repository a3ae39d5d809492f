//! Several writes of buffers at once, through io_uring: what keeps a disk, or a server, busy from one thread.
#![allow(unsafe_code, reason = "submitting buffers that outlive the call")]

use super::remote::{decode, Kind, Reply, Request};
use super::{Buffer, Medium};
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
    /// The same: it may be written there once more, later.
    pub late: bool,
}

impl Ring {
    /// Room for `entries` transfers.
    pub fn new(entries: u32) -> Result<Ring> {
        let ring = IoUring::new(entries.next_power_of_two());
        Ok(Ring { ring: ring.map_err(|source| Error::System { what: "io_uring_setup", source })? })
    }

    /// Writes them all and returns when all have ended, well or not.
    pub fn write(&mut self, medium: &Medium, buffers: &[Buffer], transfers: &mut [Transfer]) {
        for (i, t) in transfers.iter().enumerate() {
            self.begin(medium, t.at, &buffers[t.buffer][..t.bytes], i as u64);
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
                let (result, late) = decode(done.result());
                t.late = late;
                t.result = match result {
                    Ok(n) if n as usize == t.bytes => Ok(()),
                    Ok(_) => Err(std::io::ErrorKind::WriteZero.into()),
                    Err(e) => Err(e),
                };
                left -= 1;
            }
        }
    }

    /// The bytes are to stay until it has ended.
    fn begin(&mut self, medium: &Medium, at: u64, bytes: &[u8], user_data: u64) {
        let backing = match medium {
            Medium::Disk(backing) => backing,
            Medium::Remote(remote) => {
                let reply = Reply::Ring(self.ring.as_raw_fd(), user_data);
                let (buffer, bytes) = (bytes.as_ptr() as usize, bytes.len() as u32);
                return remote.push(&Request { kind: Kind::Write, at, bytes, buffer, reply });
            }
        };
        let fd = types::Fd(backing.fd().as_raw_fd());
        let entry = opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32).offset(at).build();
        // SAFETY: the buffer is borrowed until `write` returns, and by then this has ended: every completion is waited
        // for there.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(user_data)) };
        pushed.expect("a ring has an entry for each of its buffers");
    }
}
