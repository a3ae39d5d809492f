//! What carries a connection's bytes: a socket of any family; in tests, memory.

use socket2::{Socket, TcpKeepalive};
use std::io::{ErrorKind, Read, Result, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
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

    /// Whether a read would not wait, after at most `time`. Changes the limit that was set.
    fn has_input(&self, time: Duration) -> Result<bool>;

    /// Tells the peer that nothing more comes.
    fn finish(&self) -> Result<()>;
}

impl Transport for Socket {
    fn set_timeout(&self, time: Option<Duration>) -> Result<()> {
        self.set_read_timeout(time).and_then(|()| self.set_write_timeout(time))
    }

    fn has_input(&self, time: Duration) -> Result<bool> {
        self.set_read_timeout(Some(time))?;
        match self.peek(&mut [MaybeUninit::uninit()]) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn finish(&self) -> Result<()> {
        self.shutdown(Shutdown::Write)
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
