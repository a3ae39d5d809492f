//! Supervisor and worker: the one holds what must not go, the arena with all pages and the sockets that
//! listen; the other serves. A worker that crashes or is killed is followed by another on the same arena, and
//! clients that connect again find their data; meanwhile they wait in the listening sockets' backlog.
//!
//! The worker is this program once more, with the same arguments. Over its standard input, a socket, it
//! gets the arena and the listening sockets (SCM_RIGHTS) and what exports there were; it says each time what
//! exports there are from now on, and learns of the supervisor's end: then it serves on, but nobody follows it.

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
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tracing::{error, warn};

/// Set in the environment of a worker.
const WORKER: &str = "GHOSTSWAP_NBD_WORKER";
/// The running program, even if another lies at its path by now.
const SELF: &str = "/proc/self/exe";
const MOST_SOCKETS: usize = 64;
const MOST_NAMES: usize = 16 << 10;
/// Before another worker follows one that lived for less than `SHORT`: at first, and at most.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_secs(1);

/// What a worker is given.
pub struct Given {
    /// The only descriptor of it here: closing another would give up the arena's lock.
    pub arena: OwnedFd,
    pub listeners: Vec<Listener>,
    /// The exports that the worker before had; None: there was none.
    pub table: Option<String>,
    pub link: Link,
}

/// A worker's connection to its supervisor.
pub struct Link(BufReader<UnixStream>);

struct Worker {
    child: Child,
    since: Instant,
    serves: Arc<AtomicBool>,
    /// Hears what it says until it ends: the last it said of its exports, if it ever served.
    ear: JoinHandle<Option<String>>,
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
    let mut link = BufReader::new(link);
    let mut table = String::new();
    link.read_line(&mut table).context("no supervisor")?;
    let table = Some(table.trim_end().to_owned()).filter(|table| !table.is_empty());
    Ok(Some(Given { arena, listeners, table, link: Link(link) }))
}

impl Link {
    /// What tells the supervisor of exports. The first time it says that the worker serves.
    pub fn teller(&self) -> Result<impl Fn(String) + Send + Sync> {
        let link = self.0.get_ref().try_clone().context("no supervisor")?;
        // A supervisor that is gone is told of elsewhere.
        Ok(move |table: String| drop((&link).write_all(format!("{table}\n").as_bytes())))
    }

    /// From now on hears of the supervisor's end.
    pub fn watch(self) -> Result<()> {
        let mut link = self.0;
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
    let mut table = None;
    let mut worker = Worker::start(arena, listeners, None)?;
    let (mut ending, mut pause) = (false, PAUSE);
    loop {
        let received: Vec<_> = signals.wait().collect();
        for signal in received {
            match signal {
                SIGCHLD => {}
                // Before it serves it does not know that signal, and would end by it.
                SIGUSR1 if worker.serves.load(Ordering::Relaxed) => worker.signal(Signal::USR1),
                SIGUSR1 => {}
                _ => {
                    ending = true;
                    worker.signal(Signal::TERM);
                }
            }
        }
        let Some(status) = worker.child.try_wait().context("cannot wait for the worker")? else { continue };
        let lived = worker.since.elapsed();
        table = worker.last_words().or(table);
        if ending || table.is_none() || status.code() == Some(0) {
            return Ok(code_of(status, ending));
        }
        warn!("the worker ended ({status}); another takes over, and clients may connect again");
        pause = if lived < SHORT { (pause * 2).min(LONGEST_PAUSE) } else { PAUSE };
        std::thread::sleep(pause - PAUSE);
        worker = loop {
            match Worker::start(arena, listeners, table.as_deref()) {
                Ok(worker) => break worker,
                Err(e) => error!("no worker takes over: {e:#}; trying again"),
            }
            std::thread::sleep(LONGEST_PAUSE);
            if signals.pending().any(|signal| signal != SIGUSR1 && signal != SIGCHLD) {
                bail!("told to end while no worker could be started");
            }
        };
    }
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
    fn start(arena: &OwnedFd, listeners: &[Listener], table: Option<&str>) -> Result<Worker> {
        let (link, its) = UnixStream::pair().context("cannot make a socket pair")?;
        ensure!(listeners.len() <= MOST_SOCKETS, "at most {MOST_SOCKETS} sockets to listen at");
        let names: String = listeners.iter().map(|listener| format!("{}\n", listener.name)).collect();
        ensure!(names.len() <= MOST_NAMES, "the names of the sockets are too long");
        let descriptors: Vec<BorrowedFd<'_>> =
            std::iter::once(arena.as_fd()).chain(listeners.iter().map(|listener| listener.socket.as_fd())).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)), "too many sockets");
        // What is sent waits for it, as far as the socket holds it, and so does the ear: nothing may fail once it
        // is there.
        let names = [IoSlice::new(names.as_bytes())];
        sendmsg(&link, &names, &mut ancillary, SendFlags::NOSIGNAL).context("cannot hand over the sockets")?;
        let table = format!("{}\n", table.unwrap_or_default());
        let serves = Arc::new(AtomicBool::new(false));
        let heard = serves.clone();
        let hear = move || {
            // One that is gone already hears no more.
            let _ = (&link).write_all(table.as_bytes());
            let (mut link, mut line, mut last) = (BufReader::new(link), String::new(), None);
            // What it had not said to the end when it died does not count.
            while link.read_line(&mut line).is_ok() && line.ends_with('\n') {
                heard.store(true, Ordering::Relaxed);
                last = Some(line.trim_end().to_owned());
                line.clear();
            }
            last
        };
        let ear = std::thread::Builder::new().name("nbd-ear".into()).spawn(hear).context("cannot start a thread")?;
        let arguments: Vec<OsString> = std::env::args_os().collect();
        let mut command = Command::new(SELF);
        command.arg0(arguments.first().cloned().unwrap_or_else(|| "ghostswap-nbd".into())).args(&arguments[1..]);
        command.env(WORKER, "1").stdin(OwnedFd::from(its));
        for variable in ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"] {
            command.env_remove(variable);
        }
        let child = command.spawn().context("cannot start a worker")?;
        Ok(Worker { child, since: Instant::now(), serves, ear })
    }

    /// Of one that has ended.
    fn last_words(self) -> Option<String> {
        self.ear.join().unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        // One that is gone has its end told.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }
}
