//! A socket to a server, with TLS or without, that does not block; and, for the negotiation, one that waits until a
//! given instant.
#![allow(unsafe_code, reason = "poll and eventfd")]

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use std::io::{Error as OsError, ErrorKind, IoSlice, Read, Result, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A peer that vanished while nothing was asked of it is noticed after 30 + 3 × 10 seconds.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TRIES: u32 = 3;
/// What TLS may hold of what is to be sent, and of what has come.
const TLS_BUFFER_BYTES: usize = 64 << 10;

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

    fn silence(&self) {
        let mut count = 0u64;
        // SAFETY: 8 bytes that live.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
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
    Tls(Box<Tls>),
}

pub(super) struct Tls {
    socket: Socket,
    session: ClientConnection,
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
            Transport::Tls(tls) => &tls.socket,
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
        matches!(self, Transport::Tls(tls) if tls.session.wants_write())
    }

    /// Goes on as TLS: from here on what is read and written is its content.
    fn secure(self, config: &Arc<ClientConfig>, name: &ServerName<'static>) -> Result<Transport> {
        let Transport::Plain(socket) = self else { return Ok(self) };
        let mut session = ClientConnection::new(config.clone(), name.clone()).map_err(OsError::other)?;
        session.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        Ok(Transport::Tls(Box::new(Tls { socket, session })))
    }

    /// Says good-bye, if that can be done at once.
    pub fn close(mut self, farewell: &[u8]) {
        if let Transport::Plain(socket) = &self {
            let _ = socket.set_linger(None);
        }
        let _ = self.write(farewell);
    }
}

impl Tls {
    /// Sends what is to be sent, as far as the socket takes it.
    fn push(&mut self) -> Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Takes in what has come. `WouldBlock`: nothing.
    fn pull(&mut self) -> Result<()> {
        if self.session.read_tls(&mut self.socket)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.session.process_new_packets().map_err(|e| OsError::new(ErrorKind::InvalidData, e))?;
        self.push()
    }
}

impl Read for Transport {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        match self {
            Transport::Plain(socket) => socket.read(into),
            Transport::Tls(tls) => loop {
                match tls.session.reader().read(into) {
                    Err(e) if e.kind() == ErrorKind::WouldBlock => tls.pull()?,
                    other => return other,
                }
            },
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
            Transport::Tls(tls) => {
                tls.push()?;
                let n = tls.session.writer().write_vectored(from)?;
                tls.push()?;
                match n {
                    0 => Err(ErrorKind::WouldBlock.into()),
                    n => Ok(n),
                }
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        match self {
            Transport::Plain(_) => Ok(()),
            Transport::Tls(tls) => tls.push(),
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
    pub fn secure(mut self, config: &Arc<ClientConfig>, name: &ServerName<'static>) -> Result<Self> {
        self.transport = self.transport.secure(config, name)?;
        loop {
            let Transport::Tls(tls) = &mut self.transport else { return Ok(self) };
            tls.push()?;
            if !tls.session.is_handshaking() {
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
