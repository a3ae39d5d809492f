//! The two processes of `add`: one that serves the device and one that waits until it is live.
//!
//! In the background the daemon is a grandchild in a session of its own and the waiting process is
//! the command itself. In the foreground the command serves and a child of it waits. They speak
//! over a socket pair: `live PATH` or `error MESSAGE`, one line. All forks happen before any thread.

#![allow(unsafe_code)] // fork, setsid, dup2.

use anyhow::{anyhow, bail, Context, Result};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Which process this is after the fork.
pub enum Role {
    /// Serves the device and tells the other.
    Daemon(UnixStream),
    /// Waits to be told.
    Waiter(UnixStream),
}

/// Splits the process in two.
pub fn split(foreground: bool) -> Result<Role> {
    let (reader, writer) = UnixStream::pair().context("cannot make a socket pair")?;
    let child = fork()? == 0;
    if foreground {
        return Ok(if child { Role::Waiter(reader) } else { Role::Daemon(writer) });
    }
    if !child {
        reap_any();
        return Ok(Role::Waiter(reader));
    }
    // SAFETY: no preconditions; a fresh child is never a group leader.
    unsafe { libc::setsid() };
    if fork()? != 0 {
        std::process::exit(0);
    }
    std::env::set_current_dir("/").context("cannot leave the working directory")?;
    leave_terminal()?;
    Ok(Role::Daemon(writer))
}

/// Forks; 0 in the child.
pub fn fork() -> Result<libc::pid_t> {
    // SAFETY: the process has one thread, so the child may go on as any program may.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("cannot fork"),
        pid => Ok(pid),
    }
}

/// Takes the exit status of the process between command and daemon.
fn reap_any() {
    // SAFETY: a null status is allowed.
    unsafe { libc::wait(std::ptr::null_mut()) };
}

fn leave_terminal() -> Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    for fd in 0..3 {
        // SAFETY: both descriptors are open; the standard streams hold no buffered data yet.
        unsafe { libc::dup2(null.as_raw_fd(), fd) };
    }
    Ok(())
}

/// Tells the waiter that the device is live. A waiter that has gone away does not matter.
pub fn tell_live(pipe: &mut UnixStream, path: &Path) {
    let _ = writeln!(pipe, "live {}", path.display());
}

/// Tells the waiter why there will be no device.
pub fn tell_error(pipe: &mut UnixStream, error: &anyhow::Error) {
    let line = format!("{error:#}").replace('\n', " ");
    let _ = writeln!(pipe, "error {line}");
}

/// Waits for the daemon's word.
pub fn wait_live(mut pipe: UnixStream) -> Result<PathBuf> {
    let mut said = String::new();
    pipe.read_to_string(&mut said).context("cannot hear from the daemon")?;
    let line = said.lines().next().unwrap_or("");
    match line.split_once(' ') {
        Some(("live", path)) => Ok(PathBuf::from(path)),
        Some(("error", why)) => Err(anyhow!("{why}")),
        _ => bail!("the daemon died before the device was live; see /run/ghostswap and the kernel's log"),
    }
}

/// Makes the device a swap area and turns it on. Without discards the kernel uses half-empty
/// clusters again before it takes fresh ones.
pub fn swap_on(device: &Path, discard: bool) -> Result<()> {
    run(std::process::Command::new("mkswap").arg(device), "mkswap")?;
    let discards = discard.then_some("--discard");
    run(std::process::Command::new("swapon").args(discards).arg(device), "swapon")
}

/// Runs a program; what it says last is why it failed.
pub fn run(command: &mut std::process::Command, name: &str) -> Result<()> {
    let done = command.stdout(std::process::Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if done.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&done.stderr);
    bail!("{name} failed: {}", why.trim().lines().last().unwrap_or("no reason given"))
}
