//! Live upgrade: a supervisor becomes a newer program without letting go of anything.
//!
//! The old supervisor calls `exec` on the new program and leaves it a letter in the environment:
//! which descriptors are what, who the worker is, and how the device was added. The process stays
//! the same, so workers stay its children and the arena's file stays open. The new supervisor forks a
//! standby of its own program and, once that is ready, kills the old worker: from there on it is a
//! take-over like any other, the one path that is tested most. If no standby becomes ready, the old
//! worker serves on.
//!
//! The letter's version covers its own form, the board's layout and the words on a worker's pipe.
//! A program that does not know the version of what runs is refused before anything is done
//! (`check`). One that is called all the same, or that cannot begin, calls back the old program, whose
//! file it was left, with the reason; the descriptors are closed only when it has begun. One that
//! dies at its beginning is a supervisor that died: see `heir.rs`, which writes the same letter.

#![allow(unsafe_code)] // exec and the descriptors it is to keep.

use anyhow::{anyhow, bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Of the letter, the board and the workers' words together.
pub const HANDOVER_VERSION: u32 = 6;
const LETTER: &str = "GHOSTSWAP_HANDOVER";
/// Beside a letter that comes back: why.
const RETURNED: &str = "GHOSTSWAP_HANDOVER_RETURNED";
/// Between two tries to begin, when there is no other program to try.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// The program that runs, even if its file was replaced or removed.
pub const OWN_PROGRAM: &str = "/proc/self/exe";

/// Why a letter was written.
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Occasion {
    /// A newer program is to replace all processes.
    Upgrade,
    /// The supervisor died.
    Death,
}

/// What a supervisor leaves to the next.
#[derive(Serialize, Deserialize)]
pub struct Letter {
    /// [`HANDOVER_VERSION`].
    pub version: u32,
    /// Why.
    pub occasion: Occasion,
    /// The program that writes this, to be called back.
    pub program: RawFd,
    /// The arena's file.
    pub arena: RawFd,
    /// The board's descriptors.
    pub board: [RawFd; 5],
    /// The slot-free feed's, if there is one.
    pub feed: Option<[RawFd; 4]>,
    /// The worker that serves: its process and, unless it is another supervisor's child, its pipe.
    pub worker: (libc::pid_t, Option<RawFd>),
    /// Other children, to be replaced.
    pub standbys: Vec<libc::pid_t>,
    /// Likewise.
    pub agent: Option<libc::pid_t>,
    /// The device's number and path.
    pub device: (u32, String),
    /// It can be handed from one worker to another.
    pub recoverable: bool,
    /// Why this comes back from the program that it was left to.
    #[serde(skip)]
    pub returned: Option<String>,
}

/// A letter's descriptors.
pub struct Left {
    /// The arena's file.
    pub arena: OwnedFd,
    /// The board's.
    pub board: [OwnedFd; 5],
    /// The feed's.
    pub feed: Option<[OwnedFd; 4]>,
    /// The worker's pipe.
    pub pipe: Option<OwnedFd>,
}

/// The letter that an older supervisor left to this program, if it is one's first call.
pub fn take_letter() -> Result<Option<Letter>> {
    let Some(text) = std::env::var_os(LETTER) else { return Ok(None) };
    let returned = std::env::var_os(RETURNED).map(|why| why.to_string_lossy().into_owned());
    // One thread runs yet.
    std::env::remove_var(LETTER);
    std::env::remove_var(RETURNED);
    let letter = text.to_str().ok_or_else(|| anyhow!("not text")).and_then(|text| {
        let any: Value = serde_json::from_str(text)?;
        if any["version"] != HANDOVER_VERSION {
            if let Some(old) = any["program"].as_i64() {
                let unknown = format!("version {} is unknown to the program that was called", any["version"]);
                let why = call(&format!("/proc/self/fd/{old}"), text, Some(&unknown));
                bail!("{unknown}, and the old one does not come back: {why:#}");
            }
        }
        Ok(Letter { returned, ..serde_json::from_value(any)? })
    });
    letter.map(Some).context("cannot read what the supervisor before left")
}

impl Letter {
    /// Becomes the program. Returns only if that cannot be done, with everything as it was.
    pub fn send(self, program: &str) -> anyhow::Error {
        match self.with_text(|text| -> Result<()> { Err(call(program, text, None)) }) {
            Err(why) => why,
            Ok(()) => anyhow!("{program} came back"),
        }
    }

    /// Starts the program as a process of its own, by the like of vfork: the memory of this one, which may
    /// serve I/O, is not made to be copied on write. Its descriptors are open in both.
    pub fn start(self, program: &str) -> Result<u32> {
        let mut args = std::env::args_os();
        let mut command = Command::new(program);
        if let Some(own_name) = args.next() {
            command.arg0(own_name);
        }
        command.args(args);
        self.with_text(|text| {
            let started = command.env(LETTER, text).spawn().with_context(|| format!("cannot start {program}"));
            started.map(|process| process.id())
        })
    }

    /// Lets a program have the letter and what it names.
    fn with_text<T>(mut self, give: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        // Opened, not named: the file may have been replaced by the new one.
        let own = File::open(OWN_PROGRAM).context("cannot open the running program")?;
        self.program = own.as_raw_fd();
        let kept = self.kept();
        kept.iter().for_each(|fd| keep_over_exec(*fd, true));
        let done = serde_json::to_string(&self).map_err(Into::into).and_then(|text| give(&text));
        kept.iter().for_each(|fd| keep_over_exec(*fd, false));
        done
    }

    fn kept(&self) -> Vec<RawFd> {
        let some = [self.program, self.arena].into_iter();
        some.chain(self.board).chain(self.feed.into_iter().flatten()).chain(self.worker.1).collect()
    }

    /// The descriptors, doubled: the letter's own stay as they are until [`Letter::close`], so that it can
    /// be given back.
    pub fn descriptors(&self) -> Result<Left> {
        let double = |fd: &RawFd| {
            // SAFETY: it was left to this program, which closes it in `close` only.
            unsafe { BorrowedFd::borrow_raw(*fd) }
                .try_clone_to_owned()
                .context("a descriptor that was left is not there")
        };
        fn all<const N: usize>(fds: &[RawFd; N], double: impl Fn(&RawFd) -> Result<OwnedFd>) -> Result<[OwnedFd; N]> {
            let doubled = fds.iter().map(double).collect::<Result<Vec<_>>>()?;
            doubled.try_into().map_err(|_| anyhow!("a number of descriptors changed"))
        }
        Ok(Left {
            arena: double(&self.arena)?,
            board: all(&self.board, double)?,
            feed: self.feed.as_ref().map(|feed| all(feed, double)).transpose()?,
            pipe: self.worker.1.as_ref().map(double).transpose()?,
        })
    }

    /// Closes its own descriptors: they have been taken over.
    pub fn close(&self) {
        // SAFETY: they were left to this program, and nothing else here owns these numbers.
        self.kept().into_iter().for_each(|fd| drop(unsafe { OwnedFd::from_raw_fd(fd) }));
    }

    /// Gives the letter back to the program that wrote it, which may be this one: then it tries again in
    /// a while, since to end would be to leave the worker alone. Returns only the reason why not.
    pub fn give_back(&self, why: &anyhow::Error) -> anyhow::Error {
        if self.occasion == Occasion::Death || self.returned.is_some() {
            std::thread::sleep(TRY_AGAIN);
        }
        let why = self.returned.clone().unwrap_or_else(|| format!("{why:#}"));
        match serde_json::to_string(self) {
            Ok(text) => call(&format!("/proc/self/fd/{}", self.program), &text, Some(&why)),
            Err(e) => e.into(),
        }
    }
}

/// Becomes another program with the same arguments. Returns only the reason why not.
fn call(program: &str, letter: &str, returned: Option<&str>) -> anyhow::Error {
    let strings = |all: Vec<OsString>| all.iter().map(|s| CString::new(s.as_bytes())).collect::<Result<Vec<_>, _>>();
    let entry = |name: &OsString, value: &OsString| {
        let mut entry = name.clone();
        entry.push("=");
        entry.push(value);
        entry
    };
    let mut environment: Vec<OsString> = std::env::vars_os().map(|(name, value)| entry(&name, &value)).collect();
    environment.push(entry(&LETTER.into(), &letter.into()));
    environment.extend(returned.map(|why| entry(&RETURNED.into(), &why.replace('\0', " ").into())));
    let (path, args, environment) =
        match (CString::new(program), strings(std::env::args_os().collect()), strings(environment)) {
            (Ok(path), Ok(args), Ok(environment)) => (path, args, environment),
            _ => return anyhow!("a NUL in a path or an argument"),
        };
    let pointers = |all: &[CString]| all.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>();
    let (argv, envp) = (pointers(&args), pointers(&environment));
    // SAFETY: all strings and both null-ended arrays live until the call returns, if it does.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    anyhow!("cannot call {program}: {}", std::io::Error::last_os_error())
}

fn keep_over_exec(fd: RawFd, keep: bool) {
    // SAFETY: sets a flag of an open descriptor.
    unsafe { libc::fcntl(fd, libc::F_SETFD, if keep { 0 } else { libc::FD_CLOEXEC }) };
}

/// What this program hands over and takes over.
pub fn formats() -> Value {
    json!({
        "handover_version": HANDOVER_VERSION,
        "arena_version": ghostswap::ARENA_VERSION,
        "oldest_arena_version": ghostswap::OLDEST_ARENA_VERSION,
    })
}

/// The same of another program, asked of itself.
pub fn formats_of(program: &Path) -> Result<Value> {
    let shown = program.display();
    let said = Command::new(program).arg("formats").output().with_context(|| format!("cannot run {shown}"))?;
    serde_json::from_slice(&said.stdout).map_err(|_| anyhow!("{shown} is not a ghostswap-ublk that can take over"))
}

/// Whether a program of these formats can take over from the daemon that runs, by its status.
pub fn check(device: &Value, formats: &Value) -> Result<()> {
    for what in ["handover", "arena"] {
        let key = format!("{what}_version");
        let (there, new) = (&device[&key], &formats[&key]);
        // What a program made that knows of one disk tier reads as it is, and can be given back.
        let oldest = formats["oldest_arena_version"].as_u64().unwrap_or(u64::MAX);
        let older = what == "arena"
            && there.as_u64().is_some_and(|version| (oldest..=new.as_u64().unwrap_or(0)).contains(&version));
        if there != new && !older || there.is_null() {
            bail!("the running daemon's {what} format is {there}, the new program's is {new}: nothing was changed");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn only_a_known_format_is_taken_over() {
        assert!(check(&formats(), &formats()).is_ok());
        let mut newer = formats();
        newer["arena_version"] = (ghostswap::ARENA_VERSION + 1).into();
        // It says which it reads.
        assert!(check(&formats(), &newer).is_ok());
        newer["oldest_arena_version"] = (ghostswap::ARENA_VERSION + 1).into();
        assert!(check(&formats(), &newer).unwrap_err().to_string().contains("arena format"));
        assert!(check(&json!({}), &formats()).is_err());
        let mut older = formats();
        older["arena_version"] = ghostswap::OLDEST_ARENA_VERSION.into();
        assert!(check(&older, &formats()).is_ok(), "of a program that knows one tier below");
        older["arena_version"] = (ghostswap::OLDEST_ARENA_VERSION - 1).into();
        assert!(check(&older, &formats()).is_err());
        assert!(check(&json!({}), &json!({})).is_err());
    }

    /// A letter with descriptors of its own.
    fn letter() -> Letter {
        let fd = || OwnedFd::from(File::open("/dev/null").unwrap()).into_raw_fd();
        Letter {
            version: HANDOVER_VERSION,
            occasion: Occasion::Upgrade,
            program: fd(),
            arena: fd(),
            board: [(); 5].map(|()| fd()),
            feed: None,
            worker: (7, Some(fd())),
            standbys: vec![8],
            agent: None,
            device: (3, "/dev/ublkb3".into()),
            recoverable: true,
            returned: None,
        }
    }

    #[test]
    fn a_letter_can_be_given_back_until_it_is_closed() {
        // SAFETY: asks for a flag of whatever has the number, if anything has.
        let is_open = |fd: &RawFd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0;
        let letter = letter();
        let left = letter.descriptors().unwrap();
        assert!(letter.kept().iter().all(is_open), "its own stay");
        assert!(left.pipe.is_some() && left.feed.is_none());
        assert_ne!(left.arena.as_raw_fd(), letter.arena);
        // Numbers of descriptors are reused by other tests' threads, so only ours are looked at.
        let twins = [left.arena.as_raw_fd(), left.board[4].as_raw_fd()];
        letter.close();
        assert!(twins.iter().all(is_open), "what was taken stays");
        let gone = Letter { arena: RawFd::MAX, ..letter };
        assert!(gone.descriptors().is_err());
    }

    #[test]
    fn a_letter_is_read_as_it_was_written() {
        let written = Letter { occasion: Occasion::Death, worker: (7, None), ..letter() };
        let read: Letter = serde_json::from_str(&serde_json::to_string(&written).unwrap()).unwrap();
        assert!(read.occasion == Occasion::Death && read.worker == (7, None) && read.returned.is_none());
        assert_eq!((read.kept(), read.device, read.recoverable), (written.kept(), written.device, true));
    }
}
