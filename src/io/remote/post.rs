//! Telling requesters of the end: a completion in a requester's own io_uring, as if the kernel had read for it
//! (`IORING_OP_MSG_RING`), or a word on which a thread sleeps.
#![allow(unsafe_code, reason = "futex calls, and a waiter behind an address")]

use super::table::Reply;
use crate::error::{system, Error, Result};
use io_uring::{opcode, types, IoUring};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// Told at once at most.
const BATCH: u32 = 64;
/// Of a result: what was asked may yet be done, later. Set in results of writes and trims only.
const LATE: i32 = 1 << 30;
const LATE_ERRNO: i32 = 1 << 16;

/// A result as requesters get it. `late`: it was sent more than once, or given up after it was sent.
pub(super) fn encode(result: std::result::Result<u32, i32>, late: bool) -> i32 {
    match (result, late) {
        (Ok(bytes), false) => bytes as i32,
        (Ok(bytes), true) => bytes as i32 | LATE,
        (Err(errno), false) => -errno,
        (Err(errno), true) => -(errno | LATE_ERRNO),
    }
}

/// Bytes done, and whether it may be done once more, later.
pub(crate) fn decode(result: i32) -> (std::io::Result<u32>, bool) {
    match result {
        0.. => (Ok((result & !LATE) as u32), result & LATE != 0),
        _ => (Err(std::io::Error::from_raw_os_error(-result & !LATE_ERRNO)), -result & LATE_ERRNO != 0),
    }
}

/// What a thread sleeps on until its request has ended.
pub(super) struct Waiter {
    done: AtomicU32,
    result: AtomicI32,
}

impl Waiter {
    pub fn new() -> Waiter {
        Waiter { done: AtomicU32::new(0), result: AtomicI32::new(0) }
    }

    pub fn wait(&self) -> i32 {
        while self.done.load(Ordering::Acquire) == 0 {
            futex(&self.done, libc::FUTEX_WAIT, 0);
        }
        self.result.load(Ordering::Relaxed)
    }

    /// # Safety
    /// `address` is that of a waiter whose thread has not been told yet.
    unsafe fn tell(address: usize, result: i32) {
        // SAFETY: the waiter stays until `done` says so, below.
        let waiter = unsafe { &*(address as *const Waiter) };
        waiter.result.store(result, Ordering::Relaxed);
        let done = &raw const waiter.done;
        waiter.done.store(1, Ordering::Release);
        // Its thread may be gone by now, and the address anybody's: waking wakes nobody then, or somebody who looks
        // again, as all do that sleep on a futex.
        // SAFETY: the kernel takes the address as a key and does not follow it.
        unsafe { libc::syscall(libc::SYS_futex, done, libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
    }
}

fn futex(word: &AtomicU32, what: libc::c_int, value: u32) {
    // SAFETY: the word is live; no time-out is given. A wait that ends for no reason is begun again.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            what | libc::FUTEX_PRIVATE_FLAG,
            value,
            std::ptr::null::<libc::timespec>(),
        )
    };
}

/// One carrier's way to tell.
pub(super) struct Post {
    ring: IoUring,
    batch: Vec<(Reply, i32)>,
}

impl Post {
    pub fn new() -> Result<Post> {
        let ring = IoUring::new(BATCH).map_err(|source| Error::System { what: "io_uring_setup", source })?;
        Ok(Post { ring, batch: Vec::with_capacity(BATCH as usize) })
    }

    /// Whether the kernel can do it.
    pub fn check() -> Result<()> {
        let mut post = Post::new()?;
        let mut other = IoUring::new(2).map_err(|source| Error::System { what: "io_uring_setup", source })?;
        post.add(Reply::Ring(other.as_raw_fd(), 7), -5);
        post.flush();
        let got = other.completion().next().map(|c| (c.user_data(), c.result()));
        match got {
            Some((7, -5)) => Ok(()),
            _ => Err(Error::InvalidConfig(
                "a tier behind a server needs a kernel whose io_urings tell each other (IORING_OP_MSG_RING, Linux 5.18)".into(),
            )),
        }
    }

    pub fn add(&mut self, reply: Reply, result: i32) {
        match reply {
            // SAFETY: a waiter does not go before it was told, and each request is told of once.
            Reply::Waiter(address) => unsafe { Waiter::tell(address, result) },
            Reply::Ring(..) => {
                if self.batch.len() == BATCH as usize {
                    self.flush();
                }
                // Rings that take nothing at this moment: theirs are tried for as long as it takes.
                while self.batch.len() == BATCH as usize {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    self.flush();
                }
                self.batch.push((reply, result));
            }
            Reply::Connection => {}
        }
    }

    /// True: all of it is told.
    pub fn flush(&mut self) -> bool {
        if self.batch.is_empty() {
            return true;
        }
        for (i, (reply, result)) in self.batch.iter().enumerate() {
            let Reply::Ring(fd, user_data) = *reply else { unreachable!("others are told at once") };
            let entry = opcode::MsgRingData::new(types::Fd(fd), *result, user_data, None).build().user_data(i as u64);
            // SAFETY: it points to nothing.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            pushed.expect("a ring has an entry for each of a batch");
        }
        let mut left = self.batch.len();
        let mut again = 0u64;
        while left > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(_) => panic!("{}", system("io_uring_enter to tell of an end")),
            }
            for done in self.ring.completion() {
                left -= 1;
                // A ring that has no room at this moment, or the kernel no memory. Other errors: it is gone.
                if matches!(-done.result(), libc::EOVERFLOW | libc::EAGAIN | libc::ENOMEM | libc::EINTR) {
                    again |= 1 << done.user_data();
                }
            }
        }
        let mut i = 0;
        self.batch.retain(|_| {
            i += 1;
            again >> (i - 1) & 1 == 1
        });
        self.batch.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_what_they_say() {
        for late in [false, true] {
            assert!(matches!(decode(encode(Ok(1 << 20), late)), (Ok(n), l) if n == 1 << 20 && l == late));
            let (result, l) = decode(encode(Err(libc::ENOSPC), late));
            assert_eq!((result.unwrap_err().raw_os_error(), l), (Some(libc::ENOSPC), late));
        }
    }

    #[test]
    fn rings_and_threads_are_told() {
        Post::check().unwrap();
        let mut post = Post::new().unwrap();
        let waiter = Waiter::new();
        std::thread::scope(|scope| {
            let told = scope.spawn(|| waiter.wait());
            std::thread::sleep(std::time::Duration::from_millis(20));
            post.add(Reply::Waiter(&raw const waiter as usize), 9);
            assert_eq!(told.join().unwrap(), 9);
        });
        let mut ring = IoUring::new(256).unwrap();
        (0..200).for_each(|n| post.add(Reply::Ring(ring.as_raw_fd(), n), n as i32));
        assert!(post.flush());
        let told: Vec<_> = ring.completion().map(|c| (c.user_data(), c.result())).collect();
        assert_eq!(told, (0..200).map(|n| (n, n as i32)).collect::<Vec<_>>());
        // A descriptor that is no ring: nobody to tell.
        post.add(Reply::Ring(0, 1), 1);
        assert!(post.flush());
    }
}
