//! Supervisor and worker: the one holds what must not go, the arena with all pages and the sockets that
//! listen; the other serves. A worker that crashes or is killed is followed by another on the same arena, and
//! clients that connect again find their data; meanwhile they wait in the listening sockets' backlog.
//!
//! The worker is this program once more, with the same arguments. Over its standard input, a socket, it
//! gets the arena and the listening sockets (SCM_RIGHTS), says that it serves, and learns of the
//! supervisor's end; then it serves on, but nobody follows it.

use crate::listen::Listener;
use anyhow::{bail, ensure, Context, Result};
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use rustix::process::{kill_process, Pid, Signal};
use signal_hook::consts::{SIGCHLD, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use socket2::Socket;
use std::ffi::OsString;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};
use tracing::{error, warn};

/// Set in the environment of a worker.
const WORKER: &str = "GHOSTSWAP_NBD_WORKER";
/// The running program, even if another lies at its path by now.
const SELF: &str = "/proc/self/exe";
const MOST_SOCKETS: usize = 64;
const MOST_NAMES: usize = 16 << 10;
const SERVES: &[u8] = b"serves";
/// Before another worker follows one that lived for less than `SHORT`: at first, and at most.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_secs(1);

/// What a worker is given.
pub struct Given {
    pub arena: OwnedFd,
    pub listeners: Vec<Listener>,
    link: UnixStream,
}

struct Worker {
    child: Child,
    link: UnixStream,
    since: Instant,
    serves: bool,
}

/// What this process was given, if it is a worker.
pub fn given() -> Result<Option<Given>> {
    if std::env::var_os(WORKER).is_none() {
        return Ok(None);
    }
    let link = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().context("no supervisor")?);
    let mut names = vec![0; MOST_NAMES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(&link, &mut [IoSliceMut::new(&mut names)], &mut ancillary, flags).context("no supervisor")?;
    let names = String::from_utf8_lossy(&names[..got.bytes]).into_owned();
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let names: Vec<&str> = names.lines().collect();
    ensure!(descriptors.len() == names.len() + 1, "the supervisor sent {} descriptors", descriptors.len());
    let arena = descriptors.remove(0);
    let named = descriptors.into_iter().zip(names);
    let listeners = named.map(|(socket, name)| Listener::of(Socket::from(socket), name.to_owned())).collect();
    Ok(Some(Given { arena, listeners, link }))
}

impl Given {
    /// Tells the supervisor, and from now on hears of its end.
    pub fn serves(&mut self) -> Result<()> {
        // One that is gone already is found so below.
        let _ = self.link.write_all(SERVES);
        let mut link = self.link.try_clone().context("no supervisor")?;
        let watch = move || {
            // Nothing more is said; it ends with the supervisor.
            let _ = link.read(&mut [0]);
            error!("the supervisor is gone: should this process die too, all pages are lost");
        };
        std::thread::Builder::new().name("nbd-watch".into()).spawn(watch).context("cannot start a thread")?;
        Ok(())
    }
}

/// Supervises until the worker has ended in order, or the first one cannot begin.
pub fn run(signals: &mut Signals, arena: &OwnedFd, listeners: &[Listener]) -> Result<ExitCode> {
    let mut worker = Worker::start(arena, listeners)?;
    let (mut served, mut ending, mut pause) = (false, false, PAUSE);
    for signal in signals.forever() {
        match signal {
            SIGCHLD => {}
            SIGUSR1 => worker.signal(Signal::USR1),
            _ => {
                ending = true;
                worker.signal(Signal::TERM);
            }
        }
        // Signals that come close together may be told as one.
        let Some(status) = worker.child.try_wait().context("cannot wait for the worker")? else { continue };
        served |= worker.has_served();
        if ending || !served || status.code() == Some(0) {
            return Ok(code_of(status, ending));
        }
        warn!("the worker ended ({status}); another takes over, and clients may connect again");
        pause = if worker.since.elapsed() < SHORT { (pause * 2).min(LONGEST_PAUSE) } else { PAUSE };
        std::thread::sleep(pause - PAUSE);
        worker = loop {
            match Worker::start(arena, listeners) {
                Ok(worker) => break worker,
                Err(e) => error!("no worker takes over: {e:#}; trying again"),
            }
            std::thread::sleep(LONGEST_PAUSE);
        };
    }
    bail!("no signals come any more")
}

fn code_of(status: ExitStatus, ending: bool) -> ExitCode {
    match status.code() {
        Some(code) => ExitCode::from(code as u8),
        // Told to end before it could listen to that.
        None if ending && status.signal() == Some(SIGTERM) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    }
}

impl Worker {
    fn start(arena: &OwnedFd, listeners: &[Listener]) -> Result<Worker> {
        let (link, its) = UnixStream::pair().context("cannot make a socket pair")?;
        ensure!(listeners.len() <= MOST_SOCKETS, "at most {MOST_SOCKETS} sockets to listen at");
        let names: String = listeners.iter().map(|listener| format!("{}\n", listener.name)).collect();
        ensure!(names.len() <= MOST_NAMES, "the names of the sockets are too long");
        let arguments: Vec<OsString> = std::env::args_os().collect();
        let mut command = Command::new(SELF);
        command.arg0(arguments.first().cloned().unwrap_or_else(|| "ghostswap-nbd".into())).args(&arguments[1..]);
        command.env(WORKER, "1").stdin(OwnedFd::from(its));
        for variable in ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"] {
            command.env_remove(variable);
        }
        let child = command.spawn().context("cannot start a worker")?;
        let descriptors: Vec<BorrowedFd<'_>> =
            std::iter::once(arena.as_fd()).chain(listeners.iter().map(|listener| listener.socket.as_fd())).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)), "too many sockets");
        // A worker that has died already is found so by its signal.
        let _ = sendmsg(&link, &[IoSlice::new(names.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL);
        link.set_nonblocking(true).context("cannot set up a socket")?;
        Ok(Worker { child, link, since: Instant::now(), serves: false })
    }

    fn has_served(&mut self) -> bool {
        let mut said = [0; SERVES.len()];
        loop {
            match self.link.read(&mut said) {
                Ok(n) if n > 0 => self.serves = true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => return self.serves,
            }
        }
    }

    fn signal(&self, signal: Signal) {
        // One that is gone has its end told.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }
}
