//! What carries a connection's bytes: a socket of any family; in tests, memory.

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use socket2::{Socket, TcpKeepalive};
use std::io::{Read, Result, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// A peer that vanished without a word is noticed after 60 + 5 × 12 seconds without an answer from its
/// kernel; one with nothing to say costs a packet a minute.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(12);
const KEEPALIVE_TRIES: u32 = 5;
/// The same for replies that are never acknowledged, during which no keepalive is sent.
const UNACKNOWLEDGED_TIME: Duration = Duration::from_secs(120);

pub trait Transport: Read + Write + Send {
    /// The longest that one read or write may wait; `None`: for ever.
    fn set_timeout(&self, time: Option<Duration>) -> Result<()>;

    /// Whether a read would not wait; if it would, after at most `time`, or as soon as `also` can be read.
    fn wait(&self, also: Option<BorrowedFd<'_>>, time: Duration) -> Result<bool>;

    /// Whether the connection is at its end in both directions. Half of it still has somebody who may listen.
    fn is_cut(&self) -> Result<bool>;

    /// Tells the peer that nothing more comes.
    fn finish(&self) -> Result<()>;
}

impl Transport for Socket {
    fn set_timeout(&self, time: Option<Duration>) -> Result<()> {
        self.set_read_timeout(time).and_then(|()| self.set_write_timeout(time))
    }

    fn wait(&self, also: Option<BorrowedFd<'_>>, time: Duration) -> Result<bool> {
        let own = self.as_fd();
        wait_for(&mut [own, also.unwrap_or(own)].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), time)
    }

    fn is_cut(&self) -> Result<bool> {
        let mut own = [PollFd::new(self, PollFlags::empty())];
        wait_for(&mut own, Duration::ZERO)?;
        Ok(own[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    fn finish(&self) -> Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// Waits until one of them can be read or has failed, or `time` is over. Whether it is the first.
pub fn wait_for(fds: &mut [PollFd<'_>], time: Duration) -> Result<bool> {
    let time = Timespec::try_from(time).map_err(std::io::Error::other)?;
    match poll(fds, Some(&time)) {
        Ok(_) => Ok(fds.first().is_some_and(|first| !first.revents().is_empty())),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Has a TCP socket send replies at once, and notice that its peer is gone. Others know that by themselves.
pub fn prepare(socket: &Socket) -> Result<()> {
    let is_tcp = socket.local_addr()?.as_socket().is_some();
    if is_tcp {
        // A reply must not wait for the acknowledgement of the one before.
        socket.set_tcp_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_TRIES);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIME))?;
    }
    Ok(())
}
