//! A client's socket, Unix or TCP.

use std::io::{Read, Result, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub fn try_clone(&self) -> Result<Stream> {
        Ok(match self {
            Stream::Unix(socket) => Stream::Unix(socket.try_clone()?),
            Stream::Tcp(socket) => Stream::Tcp(socket.try_clone()?),
        })
    }

    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        match self {
            Stream::Unix(socket) => socket.shutdown(how),
            Stream::Tcp(socket) => socket.shutdown(how),
        }
    }

    /// The longest that one read or write may wait.
    pub fn set_timeout(&self, time: Option<Duration>) -> Result<()> {
        match self {
            Stream::Unix(socket) => socket.set_read_timeout(time).and_then(|()| socket.set_write_timeout(time)),
            Stream::Tcp(socket) => socket.set_read_timeout(time).and_then(|()| socket.set_write_timeout(time)),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        match self {
            Stream::Unix(socket) => socket.read(buf),
            Stream::Tcp(socket) => socket.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> Result<usize> {
        match self {
            Stream::Unix(socket) => socket.write(buf),
            Stream::Tcp(socket) => socket.write(buf),
        }
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
