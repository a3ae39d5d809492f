//! Writes that are under way while their thread fills the next buffer: through an io_uring, each from a buffer of
//! its own. What keeps a disk busy from one thread, and no busier than it likes.
//!
//! A buffer goes in pieces, and of those so many are on their way at once as the disk answers soon: whoever reads
//! a page of it meanwhile waits behind them. What becomes an object goes as a whole, and as many at once as there are
//! buffers: that an S3 server takes its time for each says nothing of how many it takes, and reads have connections
//! of their own.
#![allow(unsafe_code, reason = "submitting buffers that stay until the kernel has done with them")]

use super::remote::{decode, Kind, Reply, Request};
use super::{Buffer, Medium};
use crate::error::{system, Error, Result};
use io_uring::{opcode, types, IoUring};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Bytes written at once.
const PIECE_BYTES: usize = 128 << 10;
/// Most pieces on their way: what four of the largest segments come to.
const MOST_PIECES: usize = 32;
/// At first.
const PIECES: usize = 8;
/// A disk that takes so long for a piece has too many, and one that takes less may have more.
const LONG: Duration = Duration::from_millis(40);
const SHORT: Duration = Duration::from_millis(20);

/// How many pieces may be on their way.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window(usize);

impl Window {
    /// After one that took so long with all of them under way.
    fn after(self, took: Duration) -> Window {
        match took {
            _ if took > LONG => Window((self.0 / 2).max(1)),
            _ if took < SHORT => Window((self.0 + 1).min(MOST_PIECES)),
            _ => self,
        }
    }
}

/// One thread's writes.
pub(crate) struct Writes {
    ring: IoUring,
    window: Window,
    buffers: Box<[Buffer]>,
    /// By the buffer's number. None: it is free.
    writes: Box<[Option<Write>]>,
    /// By the number that a piece on its way was given.
    pieces: [Option<Piece>; MOST_PIECES],
}

/// What is to be written of a buffer, and how far that is.
struct Write {
    at: u64,
    bytes: usize,
    begun: usize,
    ended: usize,
    since: Instant,
    result: std::io::Result<()>,
    late: bool,
}

/// A piece on its way.
#[derive(Clone, Copy)]
struct Piece {
    buffer: usize,
    bytes: usize,
    since: Instant,
}

/// A write that has ended.
pub(crate) struct EndedWrite {
    /// The buffer's number.
    pub buffer: usize,
    pub bytes: usize,
    pub took: Duration,
    pub result: std::io::Result<()>,
    /// It may be written there once more, later.
    pub late: bool,
}

impl Writes {
    /// With so many buffers of so many bytes.
    pub fn new(buffers: usize, bytes: usize) -> Result<Writes> {
        let ring = IoUring::new(MOST_PIECES as u32);
        let ring = ring.map_err(|source| Error::System { what: "io_uring_setup", source })?;
        Ok(Writes {
            ring,
            window: Window(PIECES),
            buffers: (0..buffers).map(|_| Buffer::new(bytes)).collect(),
            writes: (0..buffers).map(|_| None).collect(),
            pieces: [None; MOST_PIECES],
        })
    }

    /// A buffer that nothing is written from.
    pub fn free(&mut self) -> Option<(usize, &mut Buffer)> {
        let number = self.writes.iter().position(Option::is_none)?;
        Some((number, &mut self.buffers[number]))
    }

    /// Whether nothing is being written.
    pub fn is_empty(&self) -> bool {
        self.writes.iter().all(Option::is_none)
    }

    /// Begins to write the first `bytes` of a free buffer to byte `at` on.
    pub fn start(&mut self, medium: &Medium, buffer: usize, bytes: usize, at: u64) {
        let write = Write { at, bytes, begun: 0, ended: 0, since: Instant::now(), result: Ok(()), late: false };
        let before = self.writes[buffer].replace(write);
        assert!(before.is_none(), "the buffer was free");
        self.send(medium);
    }

    /// Waits until one has ended. None: there is none.
    pub fn wait(&mut self, medium: &Medium) -> Option<EndedWrite> {
        loop {
            if self.is_empty() {
                return None;
            }
            if let Some(buffer) = self.writes.iter().position(|w| w.as_ref().is_some_and(Write::is_over)) {
                let write = self.writes[buffer].take().expect("it was just seen");
                let took = write.since.elapsed();
                return Some(EndedWrite { buffer, bytes: write.bytes, took, result: write.result, late: write.late });
            }
            self.send(medium);
            self.hear(1);
        }
    }

    /// Sends pieces, of the write first begun first, as far as the window goes.
    fn send(&mut self, medium: &Medium) {
        let on_the_way = self.pieces.iter().flatten().count();
        let most = if medium.takes_parts() { self.window.0 } else { MOST_PIECES };
        for _ in on_the_way..most {
            let due = self.writes.iter().enumerate().filter_map(|(n, write)| {
                let write = write.as_ref()?;
                write.has_more().then_some((write.since, n))
            });
            let Some((_, buffer)) = due.min() else { break };
            self.send_piece(medium, buffer);
        }
        match self.ring.submit() {
            Ok(_) => {}
            // They stay in the ring until the next call.
            Err(e) if is_passing(&e) => {}
            Err(_) => panic!("{}", system("io_uring_enter for a disk tier")),
        }
    }

    fn send_piece(&mut self, medium: &Medium, buffer: usize) {
        let free = self.pieces.iter().position(Option::is_none).expect("the window is no larger than the table");
        let write = self.writes[buffer].as_mut().expect("it has more");
        let most = if medium.takes_parts() { PIECE_BYTES } else { usize::MAX };
        let bytes = (write.bytes - write.begun).min(most);
        let piece = &self.buffers[buffer][write.begun..write.begun + bytes];
        let at = write.at + write.begun as u64;
        write.begun += bytes;
        self.pieces[free] = Some(Piece { buffer, bytes, since: Instant::now() });
        let backing = match medium {
            Medium::Disk(backing) => backing,
            Medium::Remote(remote) => {
                let reply = Reply::Ring(self.ring.as_raw_fd(), free as u64);
                let (buffer, bytes) = (piece.as_ptr() as usize, bytes as u32);
                return remote.push(&Request { kind: Kind::Write, at, bytes, buffer, reply });
            }
        };
        let entry = opcode::Write::new(types::Fd(backing.fd().as_raw_fd()), piece.as_ptr(), bytes as u32).offset(at);
        // SAFETY: the buffer stays, and nobody gets at it, until the piece's completion was seen: see `free` and
        // `Drop`.
        let pushed = unsafe { self.ring.submission().push(&entry.build().user_data(free as u64)) };
        pushed.expect("a ring has an entry for each of its pieces");
    }

    /// Waits for so many completions, and takes what there are.
    fn hear(&mut self, want: usize) {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            Err(e) if is_passing(&e) => {}
            // A ring that cannot be asked any more: the buffers may be in use, so they must not go.
            Err(_) => panic!("{}", system("io_uring_enter for a disk tier")),
        }
        for done in self.ring.completion() {
            let piece = self.pieces[done.user_data() as usize].take().expect("a piece ends once");
            self.window = self.window.after(piece.since.elapsed());
            let write = self.writes[piece.buffer].as_mut().expect("a write has all its pieces heard of");
            write.ended += piece.bytes;
            let (result, late) = decode(done.result());
            write.late |= late;
            let result = match result {
                Ok(n) if n as usize == piece.bytes => Ok(()),
                Ok(_) => Err(ErrorKind::WriteZero.into()),
                Err(e) => Err(e),
            };
            if write.result.is_ok() {
                write.result = result;
            }
        }
    }
}

impl Write {
    /// Of one that failed no more is sent.
    fn has_more(&self) -> bool {
        self.begun < self.bytes && self.result.is_ok()
    }

    fn is_over(&self) -> bool {
        self.ended == self.begun && !self.has_more()
    }
}

impl Drop for Writes {
    fn drop(&mut self) {
        while self.pieces.iter().any(Option::is_some) {
            self.hear(1);
        }
    }
}

/// The kernel has no memory, or no room, at this moment.
fn is_passing(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_disk_gets_one_piece_at_a_time_and_a_fast_one_all() {
        let after =
            |took, times| (0..times).fold(Window(PIECES), |window, _| window.after(Duration::from_millis(took)));
        assert_eq!(after(60, 10), Window(1));
        assert_eq!(after(30, 10), Window(PIECES));
        assert_eq!(after(1, 100), Window(MOST_PIECES));
    }

    #[test]
    fn what_is_written_is_there_and_a_full_disk_is_told() {
        use crate::config::{DiskTier, Place};
        let path = std::env::temp_dir().join(format!("ghostswap-writes-{}", std::process::id()));
        let tier = DiskTier {
            place: Place::File(path.clone()),
            size: Some(4 << 20),
            encrypt: true,
            name: None,
            prealloc: false,
        };
        let backing = Medium::open(&tier, &Default::default()).unwrap();
        let mut writes = Writes::new(2, 300 << 10).unwrap();
        assert!(writes.wait(&backing).is_none());
        for n in 0..2u8 {
            let (buffer, bytes) = writes.free().unwrap();
            bytes.fill(n + 1);
            writes.start(&backing, buffer, 300 << 10, u64::from(n) << 20);
        }
        assert!(writes.free().is_none());
        let ended: Vec<_> = std::iter::from_fn(|| writes.wait(&backing)).collect();
        assert!(ended.len() == 2 && ended.iter().all(|e| e.result.is_ok() && e.bytes == 300 << 10));
        let there = std::fs::read(&path).unwrap();
        assert!(there[..300 << 10].iter().all(|b| *b == 1) && there[1 << 20..].iter().all(|b| *b == 2));
        // Beyond what a file may have.
        let (buffer, _) = writes.free().unwrap();
        writes.start(&backing, buffer, 300 << 10, i64::MAX as u64 & !4095);
        assert!(writes.wait(&backing).unwrap().result.is_err());
        let (buffer, _) = writes.free().unwrap();
        writes.start(&backing, buffer, 300 << 10, 0);
        // Dropped with one under way: waits for it.
        drop(writes);
        std::fs::remove_file(path).unwrap();
    }
}
