//! The supervisor's signals, as sockets that can be waited for beside others.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::low_level::pipe;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

pub struct Signals {
    /// SIGTERM and SIGINT, SIGUSR1, SIGCHLD.
    sockets: [UnixStream; 3],
}

impl Signals {
    pub fn new() -> Result<Signals> {
        let caught = |signals: &[i32]| -> Result<UnixStream> {
            let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
            for signal in signals {
                let theirs = theirs.try_clone().context("cannot duplicate a socket")?;
                pipe::register(*signal, theirs).context("cannot catch signals")?;
            }
            ours.set_nonblocking(true)?;
            Ok(ours)
        };
        Ok(Signals { sockets: [caught(&[SIGTERM, SIGINT])?, caught(&[SIGUSR1])?, caught(&[SIGCHLD])?] })
    }

    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        self.sockets.each_ref().map(|socket| socket.as_fd())
    }

    /// Whether the server is to end, and whether to tell statistics, since the last call.
    pub fn received(&self) -> (bool, bool) {
        let [ends, tells, _] = self.sockets.each_ref().map(|mut socket| {
            let mut any = false;
            while matches!(socket.read(&mut [0; 64]), Ok(1..)) {
                any = true;
            }
            any
        });
        (ends, tells)
    }
}
