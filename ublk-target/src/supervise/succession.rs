//! From one supervisor to the next: by an upgrade, or by the last one's death (`heir.rs`).
//!
//! Either way a letter says what there is (`handover.rs`), and the process that reads it goes on with
//! the worker that serves. After a death that worker is a *stranger*: no child of this process, so its
//! death comes by a pidfd instead of a signal, and its pipe's other end is gone, which it does not
//! need: it has said that it is live. All others than the worker ended with the pipes of the last
//! supervisor, and are made anew.
//!
//! Nothing is done that cannot be undone before all that can fail has been done: until then the letter
//! can be given back.

use super::{children, kill, Supervisor};
use crate::board::Shared;
use crate::cli::Add;
use crate::handover::{Left, Letter, Occasion, HANDOVER_VERSION};
use crate::slotfree::Source;
use crate::supervise::children::Worker;
use crate::{protect, signals};
use anyhow::{Context, Result};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::Arc;

/// Goes on where another supervisor left off.
pub fn resume(add: &Add, letter: &Letter) -> Result<()> {
    let (mut supervisor, received) = match go_on(add, letter) {
        Ok(begun) => begun,
        Err(e) => return Err(letter.give_back(&e).context(format!("cannot go on: {e:#}"))),
    };
    letter.close();
    let done =
        supervisor.begin_again(letter).and_then(|ended| if ended { Ok(()) } else { supervisor.watch(&received) });
    supervisor.end();
    done
}

/// All that can fail.
fn go_on<'a>(add: &'a Add, letter: &Letter) -> Result<(Supervisor<'a>, OwnedFd)> {
    let received = signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD])?;
    #[cfg(feature = "crash-points")]
    crate::crash::resuming()?;
    protect::process()?;
    protect::first_in_line(protect::SUPERVISOR_PRIORITY);
    let Left { arena, board, feed, pipe } = letter.descriptors()?;
    let shared = Arc::new(Shared::of(board)?);
    let pid = letter.worker.0;
    let (pipe, stranger) = match pipe {
        Some(pipe) => (UnixStream::from(pipe), None),
        None => (UnixStream::pair().context("cannot make a socket pair")?.0, Some(children::stranger(pid)?)),
    };
    if letter.occasion == Occasion::Death || letter.returned.is_some() {
        // Called by a descriptor, it goes by that one's number.
        protect::name(c"ghostswap-ublk");
    }
    if letter.occasion == Occasion::Death {
        // The service manager's watchdog was to watch the one who died. One thread runs yet.
        if std::env::var_os("WATCHDOG_PID").is_some() {
            std::env::set_var("WATCHDOG_PID", std::process::id().to_string());
        }
    }
    let mut supervisor = Supervisor::new(add, arena, shared, feed.map(Source::left), Worker::new(pid, pipe));
    // It serves, or was ordered to.
    supervisor.active.live = true;
    supervisor.stranger = stranger;
    supervisor.device = Some((letter.device.0, letter.device.1.clone().into()));
    supervisor.recoverable = letter.recoverable;
    supervisor.resumed = true;
    Ok((supervisor, received))
}

impl Supervisor<'_> {
    /// Takes possession. True: the device ended with the last supervisor.
    fn begin_again(&mut self, letter: &Letter) -> Result<bool> {
        let (shared, board) = (self.shared.clone(), self.shared.board);
        board.supervisor.store(u64::from(std::process::id()), Ordering::Relaxed);
        self.end_change_of_another();
        let was_upgrading = board.upgrading.swap(0, Ordering::Relaxed) != 0;
        // Their pipes went with whoever wrote the letter.
        letter.standbys.iter().for_each(|pid| kill(*pid, libc::SIGKILL));
        self.agent = letter.agent;
        match (&letter.returned, letter.occasion) {
            (None, Occasion::Upgrade) => {
                self.upgrading = true;
                // Of the older program; its death has its successor started.
                letter.agent.into_iter().for_each(|pid| kill(pid, libc::SIGKILL));
            }
            (Some(why), Occasion::Upgrade) => shared.set_upgrade_error(&format!("the new program gave up: {why}")),
            (_, Occasion::Death) => {
                board.supervisors_lost.fetch_add(1, Ordering::Relaxed);
                if was_upgrading {
                    shared.set_upgrade_error("the new program died at its beginning; the old one serves on");
                }
                let path = letter.device.1.clone();
                self.tell_manager(&path);
            }
        }
        match &self.stranger {
            Some(None) => self.worker_ended(None),
            _ => Ok(false),
        }
    }

    /// Becomes the newer program that the agent was told of. If that fails, all is as before.
    pub(super) fn upgrade(&mut self) {
        let program = self.shared.upgrade_wanted();
        let board = self.shared.board;
        let why = match &self.device {
            Some((id, path)) if self.recoverable && self.can_change() => {
                let pipe = self.active.pipe.get_ref().as_raw_fd();
                let letter = Letter {
                    version: HANDOVER_VERSION,
                    occasion: Occasion::Upgrade,
                    program: -1,
                    arena: self.arena.as_raw_fd(),
                    board: self.shared.descriptors(),
                    feed: self.feed.as_ref().map(Source::descriptors),
                    worker: (self.active.pid, self.stranger.is_none().then_some(pipe)),
                    standbys: self.standbys.iter().map(|s| s.pid).collect(),
                    agent: self.agent,
                    device: (*id, path.to_string_lossy().into_owned()),
                    recoverable: self.recoverable,
                    returned: None,
                };
                board.upgrading.store(1, Ordering::Relaxed);
                let why = letter.send(&program);
                board.upgrading.store(0, Ordering::Relaxed);
                format!("{why:#}")
            }
            _ => "not now: a take-over is under way, or this kernel has no recovery".to_owned(),
        };
        self.shared.set_upgrade_error(&why);
    }
}
