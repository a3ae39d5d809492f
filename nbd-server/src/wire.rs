//! Buffered bytes of one connection, plain or in TLS: two buffers, and what rustls keeps of one record. They are small
//! until a client has come to an export: those who only connect and leave are to cost the others little, and a large
//! buffer is made and given back by changing the address space (malloc(3)), which stops all threads for a moment.
//!
//! Replies collect in `out` and go to the socket when the next request must be waited for, or there is enough of them
//! for the client to work on while we go on: a burst of pipelined writes costs one read and one write, one of reads
//! some more. No reply can be held back while we wait: `fill` is the only place that reads, and it sends first.
//!
//! Nothing that came before TLS is taken for what comes in it: whoever sends on before the handshake
//! is hung up on.

use crate::transport::Transport;
use rustls::{ServerConfig, ServerConnection};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most bytes of data handled at a time, whatever a request's length.
pub const SLICE_BYTES: usize = 256 << 10;
/// Room for headers beside a slice.
const HEADER_ROOM_BYTES: usize = 4096;
/// For a client to close its end, once all has been said.
const GOODBYE_TIME: Duration = Duration::from_secs(1);
const BUFFER_BYTES: usize = SLICE_BYTES + HEADER_ROOM_BYTES;
const SMALL_BYTES: usize = 8 << 10;
/// Replies of which a client has enough to do: four pages.
const ENOUGH_BYTES: usize = 16 << 10;

pub struct Wire {
    link: Link,
    input: Vec<u8>,
    start: usize,
    end: usize,
    out: Vec<u8>,
    out_end: usize,
}

/// The transport, and what is between it and the buffers.
struct Link {
    transport: Box<dyn Transport>,
    tls: Option<Box<ServerConnection>>,
    limit: Limit,
}

/// How long may be waited.
#[derive(Clone, Copy)]
enum Limit {
    /// All waiting together must end by then.
    By(Instant),
    /// For each read or write that brings nothing; `None`: for ever.
    Each(Option<Duration>),
}

impl Wire {
    pub fn new(transport: Box<dyn Transport>) -> Wire {
        Wire {
            link: Link { transport, tls: None, limit: Limit::Each(None) },
            input: vec![0; SMALL_BYTES],
            start: 0,
            end: 0,
            out: vec![0; SMALL_BYTES],
            out_end: 0,
        }
    }

    /// From now on as much as it can is taken and sent at a time.
    pub fn widen(&mut self) {
        for buffer in [&mut self.input, &mut self.out].into_iter().filter(|buffer| buffer.len() < BUFFER_BYTES) {
            // Not by `resize`, which writes all of it: what is never used is to cost no memory.
            let mut wide = vec![0; BUFFER_BYTES];
            wide[..buffer.len()].copy_from_slice(buffer);
            *buffer = wide;
        }
    }

    /// From now on all waiting together must end by then.
    pub fn set_deadline(&mut self, deadline: Instant) -> Result<()> {
        self.link.set_limit(Limit::By(deadline))
    }

    /// From now on no single wait may be longer; `None`: it may take for ever.
    pub fn set_idle_time(&mut self, time: Option<Duration>) -> Result<()> {
        self.link.set_limit(Limit::Each(time))
    }

    /// What was put goes out plain; whatever is taken and put from now on is in TLS.
    pub fn start_tls(&mut self, config: Arc<ServerConfig>) -> Result<&ServerConnection> {
        self.send()?;
        if self.start != self.end {
            return Err(Error::new(ErrorKind::InvalidData, "bytes between STARTTLS and its answer"));
        }
        self.link.start_tls(config)
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

    /// Bytes that can be taken without asking the socket.
    pub fn there(&self) -> usize {
        self.end - self.start
    }

    /// Whether there is something to take; if not, after at most `time`, or as soon as `also` can be read. Like
    /// all waiting it sends first.
    pub fn wait(&mut self, also: Option<BorrowedFd<'_>>, time: Duration) -> Result<bool> {
        if self.there() > 0 {
            return Ok(true);
        }
        self.send()?;
        self.link.wait(also, time)
    }

    /// Whether nobody is at the other end any more, as far as that is known without reading.
    pub fn is_cut(&self) -> Result<bool> {
        self.link.transport.is_cut()
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
        if len > self.input.len() {
            self.widen();
        }
        // To the front if it must be or costs little: a read then has the whole buffer.
        if self.start + len > self.input.len() || self.end - self.start <= HEADER_ROOM_BYTES {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < len {
            match self.link.read(&mut self.input[self.end..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                read => self.end += read,
            }
        }
        Ok(())
    }

    /// Queues `bytes`.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.make_room(bytes.len())?;
        self.out[self.out_end..self.out_end + bytes.len()].copy_from_slice(bytes);
        self.out_end += bytes.len();
        Ok(())
    }

    /// Queues `head` and after it `len` bytes that `fill` writes; when `fill` fails, nothing is
    /// queued and its error is the inner result. `fill` finds old bytes there and is to write all.
    pub fn put_filled<E>(
        &mut self,
        head: &[u8],
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        self.make_room(head.len() + len)?;
        let data = self.out_end + head.len();
        self.out[self.out_end..data].copy_from_slice(head);
        let filled = fill(&mut self.out[data..data + len]);
        if filled.is_ok() {
            self.out_end = data + len;
        }
        Ok(filled)
    }

    fn make_room(&mut self, len: usize) -> Result<()> {
        assert!(len <= BUFFER_BYTES, "callers cut data into slices");
        if self.out_end >= ENOUGH_BYTES || self.out_end + len > self.out.len() {
            self.send()?;
        }
        if len > self.out.len() {
            self.widen();
        }
        Ok(())
    }

    /// Sends all that is queued.
    pub fn send(&mut self) -> Result<()> {
        let len = std::mem::take(&mut self.out_end);
        self.link.write_all(&self.out[..len])
    }

    /// Sends all that is queued, says that nothing more comes, and gives the client a moment to close first:
    /// over vsock it would not see an end otherwise but an error, over TCP one if it had sent more.
    pub fn close(&mut self) -> Result<()> {
        self.set_deadline(Instant::now() + GOODBYE_TIME)?;
        self.send()?;
        self.link.finish()?;
        // Neither what it still says nor how it ends matters.
        while matches!(self.link.transport.read(&mut self.input), Ok(1..)) && self.link.before_wait().is_ok() {}
        Ok(())
    }
}

impl Link {
    fn set_limit(&mut self, limit: Limit) -> Result<()> {
        self.limit = limit;
        match limit {
            Limit::By(_) => self.before_wait(),
            Limit::Each(time) => self.transport.set_timeout(time),
        }
    }

    /// Before each read or write that may wait.
    fn before_wait(&self) -> Result<()> {
        let Limit::By(deadline) = self.limit else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Err(Error::new(ErrorKind::TimedOut, "time is over"));
        }
        self.transport.set_timeout(Some(left))
    }

    fn start_tls(&mut self, config: Arc<ServerConfig>) -> Result<&ServerConnection> {
        self.tls = Some(Box::new(ServerConnection::new(config).map_err(Error::other)?));
        while self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            self.receive_tls()?;
        }
        Ok(self.tls.as_deref().expect("set above"))
    }

    fn wait(&mut self, also: Option<BorrowedFd<'_>>, time: Duration) -> Result<bool> {
        if self.has_plaintext()? {
            return Ok(true);
        }
        let has_input = self.transport.wait(also, time)?;
        if !has_input || self.tls.is_none() {
            return Ok(has_input);
        }
        // Part of a record, or one of TLS's own: whoever reads now would wait for the rest.
        Ok(self.receive_tls()? == 0 || self.has_plaintext()?)
    }

    /// Whether rustls has bytes, or an end, that have left the socket.
    fn has_plaintext(&mut self) -> Result<bool> {
        let Some(tls) = &mut self.tls else { return Ok(false) };
        let state = tls.process_new_packets().map_err(Error::other)?;
        Ok(state.plaintext_bytes_to_read() > 0 || state.peer_has_closed())
    }

    /// 0: the peer has closed.
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        loop {
            let Some(tls) = &mut self.tls else {
                self.before_wait()?;
                match self.transport.read(into) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    read => return read.map_err(waited_too_long),
                }
            };
            match tls.reader().read(into) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.receive_tls().map(drop)?,
                read => return read,
            }
        }
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.before_wait()?;
        while !bytes.is_empty() {
            match &mut self.tls {
                None => match self.transport.write(bytes) {
                    Ok(0) => return Err(ErrorKind::WriteZero.into()),
                    Ok(written) => bytes = &bytes[written..],
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(waited_too_long(error)),
                },
                Some(tls) => {
                    let taken = tls.writer().write(bytes)?;
                    bytes = &bytes[taken..];
                    self.send_tls()?;
                }
            }
        }
        Ok(())
    }

    /// Takes in what is there of TLS records, and answers what they ask for. 0: the peer has closed.
    fn receive_tls(&mut self) -> Result<usize> {
        self.send_tls()?;
        self.before_wait()?;
        let Some(tls) = &mut self.tls else { return Ok(0) };
        let read = loop {
            match tls.read_tls(&mut self.transport) {
                // The handshake is not over; the reader would not tell.
                Ok(0) if tls.is_handshaking() => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => break read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(waited_too_long(error)),
            }
        };
        if let Err(error) = tls.process_new_packets() {
            // The alert tells the client why; whether it still listens does not matter.
            let _ = self.send_tls();
            return Err(Error::new(ErrorKind::InvalidData, format!("TLS: {error}")));
        }
        self.send_tls().map(|()| read)
    }

    fn send_tls(&mut self) -> Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        while tls.wants_write() {
            match tls.write_tls(&mut self.transport) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(waited_too_long(error)),
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
        }
        self.send_tls()?;
        match self.transport.finish() {
            // It has closed already.
            Err(error) if error.kind() == ErrorKind::NotConnected => Ok(()),
            finished => finished,
        }
    }
}

/// A socket's own word for it is that the resource is temporarily unavailable.
fn waited_too_long(error: Error) -> Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            Error::new(ErrorKind::TimedOut, "waited too long for the client")
        }
        _ => error,
    }
}
