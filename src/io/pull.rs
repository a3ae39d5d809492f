//! One read at a time, of much at once, that is waited for no longer than its thread likes: it may be from a disk that
//! the thread is not to stand still for. It stays under way then, and is waited for again.
#![allow(unsafe_code, reason = "submitting a buffer that stays until the kernel has done with it")]

use super::remote::{decode, Kind, Reply, Request};
use super::{Buffer, Medium};
use crate::error::{system, Error, Result};
use io_uring::{opcode, types, IoUring};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// A thread's.
pub(crate) struct Pull {
    ring: IoUring,
    buffer: Buffer,
    /// Bytes of the read that is under way.
    under_way: Option<usize>,
}

impl Pull {
    /// For so many bytes at most.
    pub fn new(bytes: usize) -> Result<Pull> {
        let ring = IoUring::new(2).map_err(|source| Error::System { what: "io_uring_setup", source })?;
        Ok(Pull { ring, buffer: Buffer::new(bytes), under_way: None })
    }

    /// Begins to read `bytes` from byte `at` on. False: not now.
    pub fn start(&mut self, medium: &Medium, bytes: usize, at: u64) -> bool {
        assert!(self.under_way.is_none(), "one at a time");
        let place = self.buffer[..bytes].as_mut_ptr();
        match medium {
            Medium::Disk(backing) => {
                let entry = opcode::Read::new(types::Fd(backing.fd().as_raw_fd()), place, bytes as u32).offset(at);
                // SAFETY: the buffer stays, and nobody gets at it, until the completion was seen: see `wait` and `Drop`.
                let pushed = unsafe { self.ring.submission().push(&entry.build()) };
                pushed.expect("a ring has an entry for its only read");
            }
            Medium::Remote(remote) => {
                let reply = Reply::Ring(self.ring.as_raw_fd(), 0);
                let request = Request { kind: Kind::Read, at, bytes: bytes as u32, buffer: place as usize, reply };
                if !remote.try_push(&request) {
                    return false;
                }
            }
        }
        self.under_way = Some(bytes);
        true
    }

    /// What was read, or why not. None: that is not known yet after so long.
    pub fn wait(&mut self, patience: Duration) -> Option<std::io::Result<&mut [u8]>> {
        let bytes = self.under_way?;
        let time = types::Timespec::new().sec(patience.as_secs()).nsec(patience.subsec_nanos());
        let done = loop {
            if let Some(done) = self.ring.completion().next() {
                break done;
            }
            match self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time)) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR)) => {}
                // The kernel has no memory, or no room, at this moment; or the time is over.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ETIME)) => {
                    break self.ring.completion().next()?;
                }
                Err(_) => panic!("{}", system("io_uring_enter for a disk tier")),
            }
        };
        self.under_way = None;
        Some(match decode(done.result()).0 {
            Ok(n) if n as usize == bytes => Ok(&mut self.buffer[..bytes]),
            Ok(_) => Err(ErrorKind::UnexpectedEof.into()),
            Err(e) => Err(e),
        })
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        while self.under_way.is_some() {
            let _ = self.wait(Duration::from_secs(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskTier, Place};

    #[test]
    fn what_is_there_is_read_and_what_is_not_is_told() {
        let path = std::env::temp_dir().join(format!("ghostswap-pull-{}", std::process::id()));
        std::fs::write(&path, [7; 8192]).unwrap();
        let place = Place::File(path.clone());
        let tier = DiskTier { place, size: Some(1 << 20), encrypt: true, name: None, prealloc: false };
        let medium = Medium::open(&tier, &Default::default()).unwrap();
        let mut pull = Pull::new(64 << 10).unwrap();
        assert!(pull.wait(Duration::ZERO).is_none());
        assert!(pull.start(&medium, 8192, 0));
        assert_eq!(pull.wait(Duration::from_secs(60)).unwrap().unwrap(), [7; 8192]);
        assert!(pull.start(&medium, 8192, 4096));
        assert!(pull.wait(Duration::from_secs(60)).unwrap().is_err(), "beyond its end");
        // Dropped with one under way: waits for it.
        assert!(pull.start(&medium, 4096, 4096));
        drop(pull);
        std::fs::remove_file(path).unwrap();
    }
}
