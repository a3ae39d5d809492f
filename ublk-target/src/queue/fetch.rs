//! Reads of what lies on disk, or behind a server: told of in the queue's own ring, while it serves others. A few are under way
//! at a time, each with a buffer of its own; reads beyond them wait their turn. A read for which one that is under way
//! brings all that it needs waits for that one, and finds it with the lane then. A read that the disk
//! refuses is tried again with the next beats, and fails with EIO when it was refused often enough.

#![allow(unsafe_code)] // pwrite to a borrowed descriptor; beginning a read, pushing it on the ring.

use super::{errno, Server, SLICE_BYTES, TIMER};
use ghostswap::{Begun, Buffer, Error, Fetch, Lane, Source, Taken};
use io_uring::squeue::Flags;
use io_uring::{opcode, types};
use libublk::io::{UblkIOCtx, UblkQueue};
use libublk::with_task_io_ring_mut;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Marks a fetch; its place in the low bits.
pub const FETCH: u64 = TIMER | 1 << 32;
/// Fetches under way at a time.
pub const FETCHES: usize = 16;
/// How often a refused read is tried, half a second apart.
const TRIES: u32 = 5;

/// A read under way.
#[derive(Clone, Copy)]
pub struct Read {
    tag: u16,
    offset: u64,
    len: usize,
    done: usize,
    refused: u32,
    /// It waited for another's fetch, which is not to happen twice in a row.
    joined: bool,
}

impl Read {
    pub fn new(tag: u16, offset: u64, len: usize) -> Read {
        Read { tag, offset, len, done: 0, refused: 0, joined: false }
    }
}

struct Place {
    blocks: Buffer,
    /// None: free.
    job: Option<(Read, Fetch)>,
}

/// All that fetching needs, made before the queue serves.
pub struct Fetches {
    places: Vec<Place>,
    /// Reads that wait for a place, and those that wait for the next beat. As many as there are tags.
    waiting: std::collections::VecDeque<Read>,
    refused: Vec<Read>,
    /// Reads for which the fetch of that place brings what they need.
    joined: Vec<(usize, Read, Fetch)>,
    /// None: there is nothing below memory.
    source: Option<Source>,
}

impl Fetches {
    /// `bytes`: of a fetch; 0: there will be none.
    pub fn new(depth: u16, bytes: usize) -> Fetches {
        let depth = if bytes > 0 { usize::from(depth) } else { 0 };
        let mut fetches = Fetches {
            places: Vec::with_capacity(FETCHES),
            waiting: std::collections::VecDeque::with_capacity(depth),
            refused: Vec::with_capacity(depth),
            joined: Vec::with_capacity(depth),
            source: None,
        };
        fetches.fit(bytes);
        fetches
    }

    /// What the store turned out to be.
    pub fn attach(&mut self, lane: &Lane) -> ghostswap::Result<()> {
        self.fit(lane.fetch_bytes());
        // SAFETY: the ring is the thread's own, and open while it lives.
        let ring = unsafe { BorrowedFd::borrow_raw(with_task_io_ring_mut(|ring| ring.as_raw_fd())) };
        self.source = lane.source(ring)?;
        Ok(())
    }

    /// Makes the places large enough.
    fn fit(&mut self, bytes: usize) {
        if bytes > 0 && self.places.first().is_none_or(|place| place.blocks.len() < bytes) {
            self.places.clear();
            self.places.extend((0..FETCHES).map(|_| Place { blocks: Buffer::new(bytes), job: None }));
        }
    }
}

/// Has the kernel make the thread that does this thread's reads of files (io_uring's io-wq), while there is memory for
/// that. One stays for as long as this thread lives.
pub fn prepare_reads_apart() -> std::io::Result<()> {
    with_task_io_ring_mut(|ring| {
        let nothing = opcode::Nop::new().build().flags(Flags::ASYNC);
        // SAFETY: it has no buffers.
        unsafe { ring.submission().push(&nothing) }.map_err(std::io::Error::other)?;
        ring.submit_and_wait(1)?;
        ring.completion().next().map_or(Err(std::io::ErrorKind::WouldBlock.into()), |_| Ok(()))
    })
}

impl Drop for Fetches {
    fn drop(&mut self) {
        // A queue that ends early leaves reads to others, who write to these buffers yet and tell of it.
        if self.places.iter().any(|place| place.job.is_some()) {
            std::mem::forget((std::mem::take(&mut self.places), self.source.take()));
        }
    }
}

impl Server<'_> {
    /// Serves a read as far as memory goes, and fetches what it needs of the disk.
    pub(super) fn go_on(&mut self, queue: &UblkQueue<'_>, mut read: Read) {
        while read.done < read.len {
            let slice = &mut self.buf[..SLICE_BYTES.min(read.len - read.done)];
            let (n, fetch) = match self.lane.read_or_fetch(read.offset + read.done as u64, slice) {
                Ok(found) => found,
                Err(e) => return self.answer(queue, read.tag, errno(&e)),
            };
            if !self.hand_over(queue, &mut read, n) {
                return self.answer(queue, read.tag, -libc::EIO);
            }
            if let Some(fetch) = fetch {
                return self.fetch(read, fetch);
            }
        }
        self.answer(queue, read.tag, read.len as i32);
    }

    /// Gives the kernel the buffer's first bytes, which are the read's next.
    fn hand_over(&self, queue: &UblkQueue<'_>, read: &mut Read, bytes: usize) -> bool {
        if bytes == 0 {
            return true;
        }
        let at = UblkIOCtx::ublk_user_copy_pos(queue.get_qid(), read.tag, read.done as u32);
        let slice = &self.buf[..bytes];
        // SAFETY: the buffer is live and as long as said; the descriptor is open while the queue is.
        let n = unsafe { libc::pwrite(self.cdev, slice.as_ptr().cast(), slice.len(), at as libc::off_t) };
        read.done += bytes;
        n == bytes as isize
    }

    fn fetch(&mut self, mut read: Read, fetch: Fetch) {
        if !std::mem::take(&mut read.joined) {
            let brings = |place: &Place| place.job.is_some_and(|(_, under_way)| under_way.brings(&fetch));
            if let Some(place) = self.fetches.places.iter().position(brings) {
                return self.fetches.joined.push((place, Read { joined: true, ..read }, fetch));
            }
        }
        match self.fetches.places.iter().position(|place| place.job.is_none()) {
            Some(free) if self.start(free, &fetch) => self.fetches.places[free].job = Some((read, fetch)),
            _ => self.fetches.waiting.push_back(read),
        }
    }

    /// False: the ring is full, or so many are under way, which is not for long.
    fn start(&mut self, place: usize, fetch: &Fetch) -> bool {
        let Some(source) = &self.fetches.source else { return false };
        let blocks = &mut self.fetches.places[place].blocks[..fetch.bytes()];
        let (buffer, user_data) = (blocks.as_mut_ptr(), FETCH | place as u64);
        // SAFETY: the buffer, which is as long, and the source stay until the read has ended: see `Drop`.
        match unsafe { source.begin(fetch.at(), fetch.bytes(), buffer, user_data) } {
            Begun::ByOthers => true,
            Begun::NotNow => false,
            Begun::ByYou { fd, apart } => {
                let entry = opcode::Read::new(types::Fd(fd), buffer, fetch.bytes() as u32).offset(fetch.at().byte());
                let entry = entry.build().flags(if apart { Flags::ASYNC } else { Flags::empty() });
                // SAFETY: as above.
                with_task_io_ring_mut(|ring| unsafe { ring.submission().push(&entry.user_data(user_data)).is_ok() })
            }
        }
    }

    /// A fetch has ended, well or not.
    pub(super) fn fetched(&mut self, queue: &UblkQueue<'_>, place: usize, result: i32) {
        // Others may join the next one of this place before these have been seen to.
        let joined = self.fetches.joined.iter().filter(|(at, ..)| *at == place).count();
        let at = &mut self.fetches.places[place];
        let Some((mut read, fetch)) = at.job.take() else { return };
        if result != fetch.bytes() as i32 {
            self.refuse(queue, read, &fetch, result);
            for _ in 0..joined {
                if let Some((read, fetch)) = self.joined(place) {
                    self.refuse(queue, read, &fetch, result);
                }
            }
            return self.next_waiting(queue);
        }
        let slice = &mut self.buf[..SLICE_BYTES.min(read.len - read.done)];
        match self.lane.take_fetched(&fetch, &mut at.blocks, read.offset + read.done as u64, slice) {
            Ok(Taken::Bytes(n)) if self.hand_over(queue, &mut read, n) => self.go_on(queue, read),
            Ok(Taken::Bytes(_)) => self.answer(queue, read.tag, -libc::EIO),
            Ok(Taken::More(more)) => self.fetch(read, more),
            Err(e) => self.answer(queue, read.tag, errno(&e)),
        }
        for _ in 0..joined {
            if let Some((read, _)) = self.joined(place) {
                self.go_on(queue, read);
            }
        }
        self.next_waiting(queue);
    }

    /// One that waited for the fetch of a place, and what it would have fetched itself.
    fn joined(&mut self, place: usize) -> Option<(Read, Fetch)> {
        let which = self.fetches.joined.iter().position(|(at, ..)| *at == place)?;
        let (_, read, fetch) = self.fetches.joined.remove(which);
        Some((read, fetch))
    }

    fn next_waiting(&mut self, queue: &UblkQueue<'_>) {
        if let Some(read) = self.fetches.waiting.pop_front() {
            self.go_on(queue, read);
        }
    }

    fn refuse(&mut self, queue: &UblkQueue<'_>, mut read: Read, fetch: &Fetch, result: i32) {
        let source = std::io::Error::from_raw_os_error(if result < 0 { -result } else { libc::EIO });
        let error: Error = self.lane.fetch_failed(fetch, source);
        // The kernel had no memory for it, or for a thread that does it: that says nothing of the disk.
        if !matches!(-result, libc::ENOMEM | libc::EAGAIN | libc::ECANCELED) {
            read.refused += 1;
        }
        if read.refused < TRIES {
            self.fetches.refused.push(read);
        } else {
            self.answer(queue, read.tag, errno(&error));
        }
    }

    /// Tries again what was refused, and what found the ring full with nothing under way to wake it.
    pub(super) fn fetch_again(&mut self, queue: &UblkQueue<'_>) {
        for _ in 0..self.fetches.refused.len() {
            if let Some(read) = self.fetches.refused.pop() {
                self.go_on(queue, read);
            }
        }
        self.next_waiting(queue);
    }
}
