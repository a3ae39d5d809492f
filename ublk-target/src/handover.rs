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
//! (`check`); should one be called all the same, it calls the old program back.

#![allow(unsafe_code)] // exec and the descriptors it is to keep.

use anyhow::{anyhow, bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

/// Of the letter, the board and the workers' words together.
pub const HANDOVER_VERSION: u32 = 4;
const LETTER: &str = "GHOSTSWAP_HANDOVER";

/// What a supervisor leaves to the next.
#[derive(Serialize, Deserialize)]
pub struct Letter {
    /// [`HANDOVER_VERSION`].
    pub version: u32,
    /// The program that writes this, to be called back.
    pub program: RawFd,
    /// The arena's file.
    pub arena: RawFd,
    /// The board's descriptors.
    pub board: [RawFd; 5],
    /// The slot-free feed's, if there is one.
    pub feed: Option<[RawFd; 4]>,
    /// The worker that serves: its process and its pipe.
    pub worker: (libc::pid_t, RawFd),
    /// Other children, to be replaced.
    pub standbys: Vec<libc::pid_t>,
    /// Likewise.
    pub agent: Option<libc::pid_t>,
    /// The device's number and path.
    pub device: (u32, String),
}

/// The letter that an older supervisor left to this program, if it is one's first call.
pub fn take_letter() -> Result<Option<Letter>> {
    let Some(text) = std::env::var_os(LETTER) else { return Ok(None) };
    // One thread runs yet.
    std::env::remove_var(LETTER);
    let letter = text.to_str().ok_or_else(|| anyhow!("not text")).and_then(|text| {
        let any: Value = serde_json::from_str(text)?;
        if any["version"] != HANDOVER_VERSION {
            if let Some(old) = any["program"].as_i64() {
                let why = call(&format!("/proc/self/fd/{old}"), text);
                bail!("version {} is unknown here, and the old program does not come back: {why:#}", any["version"]);
            }
        }
        Ok(serde_json::from_value(any)?)
    });
    letter.map(Some).context("cannot read what the supervisor before left")
}

impl Letter {
    /// Calls the program. Returns only if that cannot be done, with everything as it was.
    pub fn send(mut self, program: &str) -> anyhow::Error {
        // Opened, not named: the file may have been replaced by the new one.
        let own = match File::open("/proc/self/exe") {
            Ok(own) => own,
            Err(e) => return anyhow!("cannot open the running program: {e}"),
        };
        self.program = own.as_raw_fd();
        let kept = self.kept();
        kept.iter().for_each(|fd| keep_over_exec(*fd, true));
        let error = match serde_json::to_string(&self) {
            Ok(text) => call(program, &text),
            Err(e) => e.into(),
        };
        kept.iter().for_each(|fd| keep_over_exec(*fd, false));
        error
    }

    fn kept(&self) -> Vec<RawFd> {
        let some = [self.program, self.arena, self.worker.1].into_iter();
        some.chain(self.board).chain(self.feed.into_iter().flatten()).collect()
    }

    /// Takes the descriptors into ownership, close-on-exec again. The old program's is closed.
    pub fn descriptors(&self) -> (OwnedFd, [OwnedFd; 5], Option<[OwnedFd; 4]>, OwnedFd) {
        self.kept().into_iter().for_each(|fd| keep_over_exec(fd, false));
        // SAFETY: they were left to this program, which has not touched them yet and does so once.
        let own = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
        drop(own(self.program));
        (own(self.arena), self.board.map(own), self.feed.map(|feed| feed.map(own)), own(self.worker.1))
    }
}

/// Becomes another program with the same arguments. Returns only the reason why not.
fn call(program: &str, letter: &str) -> anyhow::Error {
    let strings = |all: Vec<OsString>| all.iter().map(|s| CString::new(s.as_bytes())).collect::<Result<Vec<_>, _>>();
    let entry = |name: &OsString, value: &OsString| {
        let mut entry = name.clone();
        entry.push("=");
        entry.push(value);
        entry
    };
    let mut environment: Vec<OsString> = std::env::vars_os().map(|(name, value)| entry(&name, &value)).collect();
    environment.push(entry(&LETTER.into(), &letter.into()));
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
    json!({"handover_version": HANDOVER_VERSION, "arena_version": ghostswap::ARENA_VERSION})
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
        if there != new || there.is_null() {
            bail!("the running daemon's {what} format is {there}, the new program's is {new}: nothing was changed");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_format_is_taken_over() {
        assert!(check(&formats(), &formats()).is_ok());
        let mut newer = formats();
        newer["arena_version"] = (ghostswap::ARENA_VERSION + 1).into();
        assert!(check(&formats(), &newer).unwrap_err().to_string().contains("arena format"));
        assert!(check(&json!({}), &formats()).is_err());
        assert!(check(&json!({}), &json!({})).is_err());
    }
}
