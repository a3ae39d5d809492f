//! A supervisor becomes a newer program by `exec`, letting go of nothing: it stays the same process, the workers stay
//! its children.
//!
//! Before that a worker of the new program was started and got ready (`supervise.rs`): so the program can be called,
//! takes these arguments, reads this arena's format and this table of exports, and speaks this version. Then the
//! supervisor leaves a *letter*: a socket as standard input, in which what is to be kept lies with words that say what
//! it is. A program that cannot begin after all calls the old one back, whose file comes with the letter, with the
//! reason; so does one whose worker does not get to serve. One that dies at its beginning is a supervisor that died:
//! the worker serves on.
//!
//! A signal that comes between `exec` and the new program's first steps ends it by its default action: that is some
//! milliseconds.

use super::pass;
use super::tables::Tables;
use super::worker::{Estate, Worker};
use crate::listen::Listener;
use anyhow::{anyhow, ensure, Context, Error, Result};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use signal_hook::consts::SIGPIPE;
use socket2::Socket;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// Of the letter and of the words between supervisor and worker.
pub const VERSION: &str = "3";
/// In the environment of a program that was left a letter: its version.
const LETTER: &str = "GHOSTSWAP_NBD_LETTER";
const SYSTEMD: [&str; 3] = ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"];

/// What happened to a server since it was started.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct History {
    pub upgrades: u64,
    pub take_overs: u64,
    /// From a worker's end until the next one served; None: it does not yet.
    pub last_take_over_us: Option<u64>,
    pub longest_take_over_us: u64,
    /// Why the last upgrade that was asked for was not done.
    pub upgrade_error: Option<String>,
    /// Times that the tiers were changed.
    #[serde(default)]
    pub tier_changes: u64,
    /// Why the last change of them was not done.
    #[serde(default)]
    pub tier_error: Option<String>,
}

/// What is left beside descriptors, which are in this order: the estate's, the old program's file, links to the
/// worker and to the standby as far as there are any.
#[derive(Serialize, Deserialize)]
struct Letter {
    /// Where newer programs are looked for.
    path: PathBuf,
    /// Names of the listening sockets, and files to be removed in the end.
    sockets: Vec<(String, Option<PathBuf>)>,
    worker: Option<i32>,
    /// Of the program that is called.
    standby: Option<i32>,
    /// Other children, of which none is needed any more.
    others: Vec<i32>,
    history: History,
    /// Why it comes back from the program that it was left to.
    returned: Option<String>,
}

/// What a supervisor leaves, and the next one finds.
pub struct Left {
    pub path: PathBuf,
    pub estate: Estate,
    pub worker: Option<Worker>,
    pub standby: Option<Worker>,
    pub others: Vec<Pid>,
    pub history: History,
    pub returned: Option<String>,
    /// The program that left it.
    pub program: File,
}

/// The command that calls a program with this one's arguments, for a role to be set in its environment.
pub fn again(program: &Path) -> Command {
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program);
    command.arg0(arguments.next().unwrap_or_else(|| OsString::from("ghostswap-nbd"))).args(arguments);
    for name in SYSTEMD.into_iter().chain([LETTER, super::link::WORKER]) {
        command.env_remove(name);
    }
    command
}

/// A path that leads to an open file, in this process and in one that it forks, until that has called it.
pub fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Whether a supervisor left a letter to this program.
pub fn is_called() -> bool {
    std::env::var_os(LETTER).is_some()
}

/// Becomes the program. Returns only the reason why not; then all is as before.
pub fn call(
    program: &File,
    path: &Path,
    estate: &Estate,
    [worker, standby]: [Option<&Worker>; 2],
    others: &[Pid],
    history: &History,
    returned: Option<String>,
) -> Error {
    let called = || -> Result<std::io::Error> {
        let own = File::open("/proc/self/exe").context("cannot open the running program")?;
        let letter = Letter {
            path: path.into(),
            sockets: estate.listeners.iter().map(|l| (l.name.clone(), l.file().map(Path::to_owned))).collect(),
            worker: worker.map(|worker| worker.pid.as_raw_pid()),
            standby: standby.map(|standby| standby.pid.as_raw_pid()),
            others: others.iter().map(|pid| pid.as_raw_pid()).collect(),
            history: history.clone(),
            returned,
        };
        let mut descriptors: Vec<BorrowedFd<'_>> = estate.descriptors();
        descriptors.push(own.as_fd());
        descriptors.extend([worker, standby].into_iter().flatten().map(|worker| worker.link.as_fd()));
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        pass::send(&ours, &serde_json::to_string(&letter)?, &descriptors)?;
        let mut command = again(&path_of(program));
        Ok(command.env(LETTER, VERSION).stdin(OwnedFd::from(theirs)).exec())
    };
    let why = match called() {
        Ok(error) => anyhow!("cannot call {}: {error}", path.display()),
        Err(why) => why,
    };
    // Who calls a program gets back what a program begins with: such a signal ends it. Whoever reads the log may go, and
    // the pages must not go with him.
    let _ = signal_hook::flag::register(SIGPIPE, Arc::default());
    // The letter is not to lie here.
    if let Ok(null) = File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(null);
    }
    why
}

/// The letter that was left to this program.
pub fn take_letter() -> Result<Left> {
    let version = std::env::var_os(LETTER).unwrap_or_default();
    // One thread runs yet, and none of this is for the workers.
    std::env::remove_var(LETTER);
    ensure!(version == VERSION, "it is of version {}, not {VERSION}", version.to_string_lossy());
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let (words, descriptors) = pass::receive(&socket)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    let letter: Letter = serde_json::from_str(&words)?;
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().ok_or_else(|| anyhow!("a descriptor is missing"));
    let arena = next()?;
    let tables = Tables::of([next()?, next()?]);
    let mut listeners = Vec::new();
    for (name, file) in letter.sockets {
        listeners.push(Listener::left(Socket::from(next()?), name, file));
    }
    let program = next()?.into();
    let mut child = |pid: Option<i32>, serves| -> Result<Option<Worker>> {
        let Some(pid) = pid else { return Ok(None) };
        Worker::of(Pid::from_raw(pid).context("a process has no number")?, next()?.into(), serves).map(Some)
    };
    let (worker, standby) = (child(letter.worker, true)?, child(letter.standby, false)?);
    Ok(Left {
        path: letter.path,
        estate: Estate { arena, tables, listeners },
        worker,
        standby,
        others: letter.others.into_iter().filter_map(Pid::from_raw).collect(),
        history: letter.history,
        returned: letter.returned,
        program,
    })
}
