//! A socket to a server, with TLS or without, that does not block; and, for the negotiation, one that waits until a
//! given instant.
#![allow(unsafe_code, reason = "poll and eventfd")]

use super::tls::{Secured, Securer};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use std::io::{Error as OsError, ErrorKind, IoSlice, Read, Result, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// A peer that vanished while nothing was asked of it is noticed after 30 + 3 × 10 seconds.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TRIES: u32 = 3;

/// What wakes a carrier.
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub fn new() -> Result<Bell> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(OsError::last_os_error());
        }
        // SAFETY: a descriptor that was just made and is nobody else's.
        Ok(Bell(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub fn ring(&self) {
        let one = 1u64;
        // SAFETY: 8 bytes that live. It cannot fail but when it rings already.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    pub(super) fn silence(&self) {
        let mut count = 0u64;
        // SAFETY: 8 bytes that live.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What a socket is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    Reading,
    /// And for room to write.
    Both,
}

/// Waits for the bell, and for a socket if there is one, but not longer than that.
pub(super) fn wait(bell: &Bell, socket: Option<(RawFd, For)>, most: Duration) {
    let (fd, what) = socket.unwrap_or((-1, For::Reading));
    let events = libc::POLLIN | if what == For::Both { libc::POLLOUT } else { 0 };
    let mut fds = [
        libc::pollfd { fd: bell.0.as_raw_fd(), events: libc::POLLIN, revents: 0 },
        libc::pollfd { fd, events, revents: 0 },
    ];
    let ms = most.as_millis().clamp(1, 60_000) as libc::c_int;
    // SAFETY: two entries that live; a negative descriptor is passed over. Whatever came of it, callers look.
    unsafe { libc::poll(fds.as_mut_ptr(), 2, ms) };
    if fds[0].revents != 0 {
        bell.silence();
    }
}

/// A connection, in the clear or not.
pub(super) enum Transport {
    Plain(Socket),
    Tls(Box<dyn Secured>),
}

/// A socket that is being connected; see [`Patient::connect`].
fn socket_to(address: &SockAddr, unacknowledged: Duration) -> Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    if address.domain() != Domain::UNIX {
        socket.set_tcp_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_TRIES);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(unacknowledged))?;
        // What is not on its way when a connection is given up is not to be sent any more.
        socket.set_linger(Some(Duration::ZERO))?;
    }
    Ok(socket)
}

impl Transport {
    pub fn fd(&self) -> RawFd {
        self.socket().as_raw_fd()
    }

    fn socket(&self) -> &Socket {
        match self {
            Transport::Plain(socket) => socket,
            Transport::Tls(tls) => tls.socket(),
        }
    }

    /// Has what comes next acknowledged at once. A server, or something on the way, that sends a reply's head and waits
    /// with its data for that would keep a page waiting for 40 ms. The kernel forgets it, so before each wait.
    pub fn acknowledge_soon(&self) {
        // Unix sockets do not know it.
        let _ = self.socket().set_tcp_quickack(true);
    }

    /// Something is to be sent that was written already.
    pub fn wants_write(&self) -> bool {
        matches!(self, Transport::Tls(tls) if tls.wants_write())
    }

    /// Goes on as TLS: from here on what is read and written is its content.
    fn secure(self, tls: &dyn Securer) -> Result<Transport> {
        match self {
            Transport::Plain(socket) => tls.secure(socket).map(Transport::Tls),
            Transport::Tls(_) => Ok(self),
        }
    }

    /// Says good-bye, if that can be done at once.
    pub fn close(mut self, farewell: &[u8]) {
        if let Transport::Plain(socket) = &self {
            let _ = socket.set_linger(None);
        }
        let _ = self.write(farewell);
    }
}

impl Read for Transport {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        match self {
            Transport::Plain(socket) => socket.read(into),
            Transport::Tls(tls) => tls.read(into),
        }
    }
}

impl Write for Transport {
    fn write(&mut self, from: &[u8]) -> Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> Result<usize> {
        match self {
            Transport::Plain(socket) => socket.send_vectored_with_flags(from, libc::MSG_NOSIGNAL),
            Transport::Tls(tls) => tls.write_vectored(from),
        }
    }

    fn flush(&mut self) -> Result<()> {
        match self {
            Transport::Plain(_) => Ok(()),
            Transport::Tls(tls) => tls.flush(),
        }
    }
}

/// A transport that is waited for, all together until then, or until somebody wants this to end.
pub(super) struct Patient<'a, Stop: Fn() -> bool> {
    pub transport: Transport,
    pub until: Instant,
    pub bell: &'a Bell,
    pub stop: Stop,
}

impl<'a, Stop: Fn() -> bool> Patient<'a, Stop> {
    pub fn connect(
        address: &SockAddr,
        unacknowledged: Duration,
        until: Instant,
        bell: &'a Bell,
        stop: Stop,
    ) -> Result<Self> {
        let socket = socket_to(address, unacknowledged)?;
        let begun = socket.connect(address);
        let patient = Patient { transport: Transport::Plain(socket), until, bell, stop };
        match begun {
            Ok(()) => return Ok(patient),
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(e) => return Err(e),
        }
        loop {
            patient.pause(For::Both)?;
            let socket = patient.transport.socket();
            if let Some(e) = socket.take_error()? {
                return Err(e);
            }
            match socket.peer_addr() {
                Ok(_) => return Ok(patient),
                Err(e) if e.kind() == ErrorKind::NotConnected => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Turns it into TLS and does its handshake.
    pub fn secure(mut self, tls: &dyn Securer) -> Result<Self> {
        self.transport = self.transport.secure(tls)?;
        loop {
            let Transport::Tls(tls) = &mut self.transport else { return Ok(self) };
            tls.flush()?;
            if !tls.is_handshaking() {
                return Ok(self);
            }
            match tls.pull() {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.pause(For::Reading)?,
                other => other?,
            }
        }
    }

    fn pause(&self, what: For) -> Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() || (self.stop)() {
            return Err(ErrorKind::TimedOut.into());
        }
        let what = if self.transport.wants_write() { For::Both } else { what };
        wait(self.bell, Some((self.transport.fd(), what)), left.min(Duration::from_secs(1)));
        Ok(())
    }
}

impl<Stop: Fn() -> bool> Read for Patient<'_, Stop> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        loop {
            match self.transport.read(into) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.pause(For::Reading)?,
                other => return other,
            }
        }
    }
}

impl<Stop: Fn() -> bool> Write for Patient<'_, Stop> {
    fn write(&mut self, from: &[u8]) -> Result<usize> {
        loop {
            match self.transport.write(from) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.pause(For::Both)?,
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.transport.flush()
    }
}
