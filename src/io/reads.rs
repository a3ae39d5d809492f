//! Reads that are under way while their thread does other things: told of in an io_uring of its own, each into
//! a buffer of its own. Its descriptor is readable once one has ended, so it can be waited for beside others.
#![allow(unsafe_code, reason = "submitting buffers that stay until the kernel has done with them")]

use super::{At, Begun, Buffer, Source};
use crate::error::{Error, Result};
use crate::Lane;
use io_uring::{opcode, squeue, types, IoUring};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// One thread's reads.
pub struct Reads {
    ring: IoUring,
    source: Source,
    /// By the number that a read was given. None: that number is free.
    buffers: Vec<Option<(Buffer, usize)>>,
    /// Reads that could not begin yet, and from where on.
    held_back: Vec<(usize, At)>,
}

/// A read that has ended.
pub struct EndedRead {
    /// What [`Reads::start`] called it.
    pub number: usize,
    /// The bytes read, in its first ones.
    pub buffer: Buffer,
    /// Whether all of them are there.
    pub result: std::io::Result<()>,
}

impl Reads {
    /// For at most so many at a time of a lane's store. None: there is nothing to be read from.
    pub fn new(lane: &Lane, most: usize) -> Result<Option<Reads>> {
        let ring = new_ring(most)?;
        let source = lane.source(ring_fd(&ring))?;
        Ok(source.map(|source| Reads::of(ring, source, most)))
    }

    fn of(ring: IoUring, source: Source, most: usize) -> Reads {
        Reads { ring, source, buffers: (0..most).map(|_| None).collect(), held_back: Vec::with_capacity(most) }
    }

    /// Whether none is under way.
    pub fn is_empty(&self) -> bool {
        self.buffers.iter().all(Option::is_none)
    }

    /// Begins to read `bytes` (whole blocks, not none) from there on, and says what number it has: less
    /// than the most there may be, and no other that is under way has it. None: so many are under way.
    pub fn start(&mut self, at: At, bytes: usize) -> Option<usize> {
        let number = self.buffers.iter().position(Option::is_none)?;
        self.buffers[number] = Some((Buffer::new(bytes), bytes));
        if !self.begin(number, at) {
            self.held_back.push((number, at));
        }
        Some(number)
    }

    /// False: not now.
    fn begin(&mut self, number: usize, at: At) -> bool {
        let (buffer, bytes) = self.buffers[number].as_mut().expect("a read has a buffer");
        let (place, bytes, user_data) = (buffer.as_mut_ptr(), *bytes, number as u64);
        // SAFETY: the buffer is kept until the read's completion was seen: see `ended` and `Drop`. Moving it
        // does not move its bytes. The source goes after that.
        match unsafe { self.source.begin(at, bytes, place, user_data) } {
            Begun::ByOthers => return true,
            Begun::NotNow => return false,
            Begun::ByYou { fd, apart } => {
                let entry = opcode::Read::new(types::Fd(fd), place, bytes as u32).offset(at.byte()).build();
                let entry = entry.flags(if apart { squeue::Flags::ASYNC } else { squeue::Flags::empty() });
                // SAFETY: as above.
                let pushed = unsafe { self.ring.submission().push(&entry.user_data(user_data)) };
                pushed.expect("a ring has an entry for each of its reads");
            }
        }
        self.submit();
        true
    }

    fn begin_held_back(&mut self) {
        while let Some((number, at)) = self.held_back.last().copied() {
            if !self.begin(number, at) {
                return;
            }
            self.held_back.pop();
        }
    }

    /// One that has ended, if there is one.
    pub fn ended(&mut self) -> Option<EndedRead> {
        if !self.ring.submission().is_empty() {
            self.submit();
        }
        self.begin_held_back();
        let done = self.ring.completion().next()?;
        let number = done.user_data() as usize;
        let (buffer, bytes) = self.buffers[number].take().expect("a read ends once");
        let result = match done.result() {
            n if n == bytes as i32 => Ok(()),
            n if n < 0 => Err(std::io::Error::from_raw_os_error(-n)),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        };
        Some(EndedRead { number, buffer, result })
    }

    /// What the kernel has no memory for at this moment stays in the ring, and goes with the next try.
    fn submit(&self) {
        match self.ring.submit() {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            Err(e) => panic!("io_uring_enter to read: {e}"),
        }
    }
}

impl AsFd for Reads {
    fn as_fd(&self) -> BorrowedFd<'_> {
        ring_fd(&self.ring)
    }
}

fn new_ring(most: usize) -> Result<IoUring> {
    let entries = most.next_power_of_two() as u32;
    IoUring::new(entries).map_err(|source| Error::System { what: "io_uring_setup", source })
}

fn ring_fd(ring: &IoUring) -> BorrowedFd<'_> {
    // SAFETY: the ring's descriptor is open as long as the ring is.
    unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }
}

impl Drop for Reads {
    fn drop(&mut self) {
        while !self.is_empty() {
            while self.ended().is_some() {}
            // Others are asked for many at this moment. It is not for long.
            if !self.held_back.is_empty() {
                std::thread::sleep(std::time::Duration::from_millis(1));
                continue;
            }
            if !self.is_empty() && self.ring.submit_and_wait(1).is_err_and(|e| e.kind() != ErrorKind::Interrupted) {
                // The kernel, or a carrier, may write to the buffers yet: they must not go.
                return std::mem::forget(std::mem::take(&mut self.buffers));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::BLOCK_BYTES;
    use crate::page::TierNo;

    #[test]
    fn many_at_once_each_with_its_own_bytes() {
        let path = std::env::temp_dir().join(format!("ghostswap-reads-{}", std::process::id()));
        let bytes: Vec<u8> = (0..8 * BLOCK_BYTES).map(|i| (i / BLOCK_BYTES + 1) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut reads = Reads::of(new_ring(4).unwrap(), Source::disk(file.as_raw_fd()), 4);
        let start = |reads: &mut Reads, block: usize| {
            reads.start(At::new(TierNo(0), (block * BLOCK_BYTES) as u64), BLOCK_BYTES)
        };
        // The last one is beyond the end of the file.
        let mut blocks: Vec<usize> = [0, 3, 7, 8].into();
        let numbers: Vec<_> = blocks.iter().map(|block| start(&mut reads, *block).unwrap()).collect();
        assert!(start(&mut reads, 1).is_none(), "no more than it was made for");
        while !blocks.is_empty() {
            let Some(ended) = reads.ended() else { continue };
            let which = numbers.iter().position(|n| *n == ended.number).unwrap();
            let block = [0, 3, 7, 8][which];
            blocks.retain(|b| *b != block);
            assert_eq!(ended.result.is_ok(), block < 8, "block {block}");
            assert!(block == 8 || ended.buffer.iter().all(|b| *b == block as u8 + 1), "block {block}");
        }
        assert!(reads.is_empty());
        start(&mut reads, 5).unwrap();
        // Dropped with one under way: waits for it.
    }
}
