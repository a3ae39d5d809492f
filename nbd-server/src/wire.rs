//! Buffered bytes of one connection: two fixed buffers, nothing allocated after `new`.
//!
//! Replies collect in `out` and go to the socket when it is full or when the next request must be
//! waited for; so a burst of pipelined requests costs one read and one write. No reply can be held
//! back while we wait: `fill` is the only place that reads, and it sends first.

use crate::stream::Stream;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::time::{Duration, Instant};

/// Most bytes of data handled at a time, whatever a request's length.
pub const SLICE_BYTES: usize = 256 << 10;
/// Room for headers beside a slice.
const HEADER_ROOM_BYTES: usize = 4096;
const BUFFER_BYTES: usize = SLICE_BYTES + HEADER_ROOM_BYTES;

pub struct Wire {
    stream: Stream,
    input: Vec<u8>,
    start: usize,
    end: usize,
    out: Vec<u8>,
    deadline: Option<Instant>,
}

impl Wire {
    pub fn new(stream: Stream) -> Wire {
        Wire {
            stream,
            input: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
            out: Vec::with_capacity(BUFFER_BYTES),
            deadline: None,
        }
    }

    /// From now on all waiting together must end by then; `None`: wait for ever.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<()> {
        self.deadline = deadline;
        self.apply_deadline()
    }

    fn apply_deadline(&self) -> Result<()> {
        let Some(deadline) = self.deadline else { return self.stream.set_timeout(None) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Err(Error::new(ErrorKind::TimedOut, "the handshake took too long"));
        }
        self.stream.set_timeout(Some(left))
    }

    /// The next `len` bytes, `SLICE_BYTES` at most.
    pub fn take(&mut self, len: usize) -> Result<&[u8]> {
        assert!(len <= SLICE_BYTES, "callers cut data into slices");
        self.fill(len)?;
        let at = self.start;
        self.start += len;
        Ok(&self.input[at..at + len])
    }

    pub fn take_array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    /// True at a clean end: the client closed between two requests.
    pub fn at_end(&mut self) -> Result<bool> {
        match self.fill(1) {
            Ok(()) => Ok(false),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Throws away the next `len` bytes.
    pub fn skip(&mut self, mut len: usize) -> Result<()> {
        while len > 0 {
            let part = len.min(SLICE_BYTES);
            self.take(part)?;
            len -= part;
        }
        Ok(())
    }

    fn fill(&mut self, len: usize) -> Result<()> {
        if self.end - self.start >= len {
            return Ok(());
        }
        self.send()?;
        // To the front if it must be or costs little: a read then has the whole buffer.
        if self.start + len > self.input.len() || self.end - self.start <= HEADER_ROOM_BYTES {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < len {
            if self.deadline.is_some() {
                self.apply_deadline()?;
            }
            match self.stream.read(&mut self.input[self.end..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.end += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Queues `bytes`.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.make_room(bytes.len())?;
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    /// Queues `head` and after it `len` bytes that `fill` writes; when `fill` fails, nothing is
    /// queued and its error is the inner result.
    pub fn put_filled<E>(
        &mut self,
        head: &[u8],
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        self.make_room(head.len() + len)?;
        let before = self.out.len();
        self.out.extend_from_slice(head);
        let data = self.out.len();
        self.out.resize(data + len, 0);
        let filled = fill(&mut self.out[data..]);
        if filled.is_err() {
            self.out.truncate(before);
        }
        Ok(filled)
    }

    fn make_room(&mut self, len: usize) -> Result<()> {
        assert!(len <= BUFFER_BYTES, "callers cut data into slices");
        if self.out.len() + len > BUFFER_BYTES {
            self.send()?;
        }
        Ok(())
    }

    /// Sends all that is queued.
    pub fn send(&mut self) -> Result<()> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out)?;
            self.out.clear();
        }
        Ok(())
    }
}
