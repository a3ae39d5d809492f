//! A worker, seen from its supervisor: a child that serves or stands by, and what it says (`link.rs`).

use super::handover::VERSION;
use super::link::{Header, WORKER};
use super::tables::Tables;
use super::{handover, pass};
use crate::listen::Listener;
use crate::pulse::Pulse;
use anyhow::{ensure, Context, Result};
use rustix::net::{send, SendFlags};
use rustix::process::{kill_process, waitpid, Pid, Signal, WaitOptions, WaitStatus};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A process may take so long from its start until it is ready, on a machine with little memory to give.
pub const START_PATIENCE: Duration = Duration::from_secs(60);

pub struct Worker {
    pub pid: Pid,
    pub link: UnixStream,
    pub since: Instant,
    /// It stands by; the version it speaks.
    pub ready: Option<String>,
    pub serves: bool,
    /// It is to find out whether other tiers than those that hold can be had.
    pub trial: bool,
    /// Why it ends, in its own words.
    pub failure: Option<String>,
    /// Nothing more is heard of it.
    pub silent: bool,
    pulse: Pulse,
    /// What it has said of a line that is not whole.
    heard: Vec<u8>,
}

/// What all workers are given.
pub struct Estate {
    pub arena: OwnedFd,
    pub tables: Tables,
    pub listeners: Vec<Listener>,
}

impl Estate {
    /// In the order of a worker's header and of a letter.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let kept = std::iter::once(self.arena.as_fd()).chain(self.tables.descriptors());
        kept.chain(self.listeners.iter().map(|listener| listener.socket.as_fd())).collect()
    }
}

impl Worker {
    /// Starts one of that program.
    pub fn start(program: &Path, estate: &Estate) -> Result<Worker> {
        Worker::start_with(program, estate, None)
    }

    /// The same, with other tiers than those that hold.
    pub fn start_with(program: &Path, estate: &Estate, trial: Option<Vec<String>>) -> Result<Worker> {
        let (link, its) = UnixStream::pair().context("cannot make a socket pair")?;
        let sockets = estate.listeners.iter().map(|listener| listener.name.clone()).collect();
        // What is sent waits for it, as far as the socket holds it: nothing may fail once it is there.
        let is_trial = trial.is_some();
        pass::send(&link, &serde_json::to_string(&Header { sockets, trial })?, &estate.descriptors())?;
        let mut command = handover::again(program);
        // One heap for all its threads (glibc's mallopt(3)): each connection's own would keep two MiB when it has gone.
        command.env("MALLOC_ARENA_MAX", "1");
        command.env(WORKER, VERSION).stdin(OwnedFd::from(its));
        let child = command.spawn().context("cannot start a worker")?;
        // Waited for with all others, those that this process found at its beginning included.
        Ok(Worker { trial: is_trial, ..Worker::of(Pid::from_child(&child), link, false)? })
    }

    pub fn of(pid: Pid, link: UnixStream, serves: bool) -> Result<Worker> {
        link.set_nonblocking(true)?;
        Ok(Worker {
            pid,
            link,
            since: Instant::now(),
            ready: None,
            serves,
            trial: false,
            failure: None,
            silent: false,
            pulse: Pulse::default(),
            heard: Vec::new(),
        })
    }

    /// What it has said since the last call: what the supervisor does not find in this struct afterwards.
    pub fn hear(&mut self) -> Vec<String> {
        let mut piece = [0; 1024];
        loop {
            match self.link.read(&mut piece) {
                Ok(bytes @ 1..) => self.heard.extend_from_slice(&piece[..bytes]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // It is ending: its death comes as a signal.
                Ok(0) | Err(_) => {
                    self.silent = true;
                    break;
                }
            }
        }
        let mut rest = Vec::new();
        while let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&self.heard[..end]).into_owned();
            self.heard.drain(..=end);
            self.pulse.heard();
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("beat", _) => {}
                ("ready", version) => self.ready = Some(version.to_owned()),
                ("serves", _) => self.serves = true,
                ("error", why) => self.failure = Some(why.to_owned()),
                _ => rest.push(line),
            }
        }
        rest
    }

    /// It showed no sign of life for so long, or never got ready. To be asked at every look.
    pub fn hangs(&mut self, watchdog: Duration) -> bool {
        let quiet = self.pulse.quiet_for();
        let patience = if self.ready.is_none() && !self.serves { START_PATIENCE } else { watchdog };
        let hangs = !watchdog.is_zero() && quiet >= patience;
        if hangs {
            // Whoever is told does something about it; that takes its time as well.
            self.pulse.heard();
        }
        hangs
    }

    pub fn tell(&self, line: &str) {
        // One that does not listen is dead, or will be found to hang.
        let _ = send(&self.link, format!("{line}\n").as_bytes(), SendFlags::NOSIGNAL);
    }

    pub fn signal(&self, signal: Signal) {
        // One that is gone has its end told.
        let _ = kill_process(self.pid, signal);
    }
}

/// A child that has ended, and how.
pub fn reap() -> Option<(Pid, WaitStatus)> {
    waitpid(None, WaitOptions::NOHANG).ok().flatten()
}

/// How one ended, for people.
pub fn describe(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended".into(),
    }
}

/// A path that names an open program, whatever lies at the one it was opened by.
pub fn ensure_program(path: &Path) -> Result<std::fs::File> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let is_file = file.metadata().with_context(|| format!("cannot open {}", path.display()))?.is_file();
    ensure!(is_file, "{} is not a program", path.display());
    Ok(file)
}
