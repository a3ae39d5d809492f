//! The heir: a thread of the agent that becomes the supervisor when the supervisor dies.
//!
//! The worker serves on by itself: nothing on the I/O path goes through the supervisor, and the arena's
//! file is open in the worker too. But nobody would take over from it. So the agent, which has nothing
//! that others wait for, holds the arena's descriptor and the feed's as well, waits for the supervisor's
//! end by a pidfd, and then becomes the supervisor by `exec` of its own program with the letter that an
//! upgrade leaves (`handover.rs`; there: which processes there are, and what the reader does with it).
//! No process is forked for it, so it takes little memory while the worker is alone.
//!
//! If the agent was killed together with the supervisor, the worker itself sees to it ([`Guard`]): its main
//! thread, which no I/O waits for, starts the program anew with the same letter. It waits for a while
//! first, and whoever begins says so on the board, so that there are never two.
//!
//! What that does not mend: supervisor, agent and worker killed in the same instant. Then nobody is left but
//! the service manager, if the device is one's unit (`kept.rs`).

use crate::board::Shared;
use crate::handover::{Letter, Occasion, HANDOVER_VERSION, OWN_PROGRAM};
use crate::slotfree::Source;
use crate::supervise::pidfd;
use crate::{protect, signals};
use anyhow::{Context, Result};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

const STACK_BYTES: usize = 128 << 10;
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// How long the worker leaves it to the agent.
const AGENT_FIRST: Duration = Duration::from_secs(3);
const FOR_EVER: Duration = Duration::from_secs(3600);

/// What the supervisor leaves, by numbers that are open in the agent as long as it lives.
pub struct Heritage {
    supervisor: libc::pid_t,
    arena: RawFd,
    feed: Option<[RawFd; 4]>,
    recoverable: bool,
}

impl Heritage {
    /// Of the calling process, before it forks its agent.
    pub fn of(arena: RawFd, feed: Option<&Source>, recoverable: bool) -> Heritage {
        let supervisor = std::process::id() as libc::pid_t;
        Heritage { supervisor, arena, feed: feed.map(Source::descriptors), recoverable }
    }

    /// What the agent must keep.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        std::iter::once(self.arena).chain(self.feed.into_iter().flatten())
    }

    /// Has a thread wait for the supervisor's death.
    pub fn wait(self, id: u32, path: &Path, shared: &Arc<Shared>) -> Result<()> {
        let (path, shared) = (path.to_string_lossy().into_owned(), shared.clone());
        let body = move || {
            // Its successor may be needed by all others.
            protect::store_thread("heir");
            protect::first_in_line(protect::TAKE_OVER_PRIORITY);
            wait_for_death(self.supervisor);
            // Else the worker was first, and the agent's time is over too.
            let (last, own) = (self.supervisor as u64, u64::from(std::process::id()));
            if !succeeds(&shared, last, own) {
                std::process::exit(0);
            }
            loop {
                let why = self.letter(id, &path, &shared).send(OWN_PROGRAM);
                tracing::error!("the supervisor died, and its heir cannot take its place yet: {why:#}");
                std::thread::sleep(TRY_AGAIN);
            }
        };
        let thread = std::thread::Builder::new().name("gs-heir".into()).stack_size(STACK_BYTES);
        thread.spawn(body).context("cannot start the heir's thread").map(drop)
    }

    fn letter(&self, id: u32, path: &str, shared: &Shared) -> Letter {
        Letter {
            version: HANDOVER_VERSION,
            occasion: Occasion::Death,
            program: -1,
            arena: self.arena,
            board: shared.descriptors(),
            feed: self.feed,
            worker: (shared.board.worker.load(Ordering::Relaxed) as libc::pid_t, None),
            standbys: Vec::new(),
            agent: None,
            device: (id, path.to_owned()),
            recoverable: self.recoverable,
            returned: None,
        }
    }
}

/// What a worker knows in case that both supervisor and agent die.
pub struct Guard {
    heritage: Heritage,
    device: (u32, String),
    shared: Arc<Shared>,
    /// What tells of the end of the supervisor with that number.
    watched: (u64, Option<OwnedFd>),
    dead_since: Option<Instant>,
}

impl Guard {
    /// Of the worker that serves the device.
    pub fn of(arena: RawFd, feed: Option<&Source>, (id, path): (u32, &Path), shared: &Arc<Shared>) -> Guard {
        // A device that cannot be handed on has no use for a take-over, but for an agent.
        let heritage = Heritage::of(arena, feed, true);
        let device = (id, path.to_string_lossy().into_owned());
        Guard { heritage, device, shared: shared.clone(), watched: (0, None), dead_since: None }
    }

    /// Looks whether there is a supervisor, and starts one if there is none for long.
    pub fn look(&mut self) {
        let supervisor = self.shared.board.supervisor.load(Ordering::Relaxed);
        if self.watched.0 != supervisor {
            // Without memory to look it may live as well.
            let Ok(process) = pidfd(supervisor as libc::pid_t) else { return };
            self.watched = (supervisor, process);
            self.dead_since = None;
        }
        let lives = self.watched.1.as_ref().is_some_and(|p| !signals::poll([p.as_raw_fd()], Duration::ZERO)[0]);
        if lives {
            self.dead_since = None;
            return;
        }
        let since = *self.dead_since.get_or_insert_with(Instant::now);
        // The order on the board is from the dead one's number to this one's and on to the next's.
        let own = u64::from(std::process::id());
        if since.elapsed() < AGENT_FIRST || !(supervisor == own || succeeds(&self.shared, supervisor, own)) {
            return;
        }
        self.dead_since = Some(Instant::now());
        self.watched = (own, None);
        let (id, path) = &self.device;
        match self.heritage.letter(*id, path, &self.shared).start(OWN_PROGRAM) {
            Ok(pid) => {
                tracing::warn!("supervisor and agent died; process {pid} is to be the next supervisor");
                // However long it takes to begin, there must not be a second.
                self.watched.1 = until_known(pid);
            }
            Err(e) => tracing::error!("supervisor and agent died, and there can be no other yet: {e:#}"),
        }
    }
}

/// What tells of a process's end; it may have to wait for the memory to know.
fn until_known(pid: u32) -> Option<OwnedFd> {
    loop {
        match pidfd(pid as libc::pid_t) {
            Ok(process) => return process,
            Err(_) => std::thread::sleep(TRY_AGAIN),
        }
    }
}

/// Whether this one is to see to the succession: nobody else has begun.
fn succeeds(shared: &Shared, last: u64, own: u64) -> bool {
    shared.board.supervisor.compare_exchange(last, own, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

/// Its children are given away before a process's end is told.
fn wait_for_death(supervisor: libc::pid_t) {
    let process = pidfd(supervisor).ok().flatten();
    while alive(supervisor) {
        match &process {
            Some(process) => drop(signals::poll([process.as_raw_fd()], FOR_EVER)),
            None => std::thread::sleep(TRY_AGAIN),
        }
    }
}

/// Whether the supervisor, parent of the agent, lives.
pub fn alive(supervisor: libc::pid_t) -> bool {
    std::os::unix::process::parent_id() == supervisor as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_two_heirs_succeeds() {
        let shared = Shared::new().unwrap();
        shared.board.supervisor.store(5, Ordering::Relaxed);
        assert!(succeeds(&shared, 5, 6));
        assert!(!succeeds(&shared, 5, 7), "the other was first");
        assert_eq!(shared.board.supervisor.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn a_guard_leaves_it_to_the_agent_first() {
        let shared = Arc::new(Shared::new().unwrap());
        let mut guard = Guard::of(0, None, (3, Path::new("/dev/ublkb3")), &shared);
        let here = u64::from(std::process::id());
        shared.board.supervisor.store(here, Ordering::Relaxed);
        guard.look();
        assert!(guard.dead_since.is_none(), "it lives");
        // A number that no process can have.
        shared.board.supervisor.store(1 << 30, Ordering::Relaxed);
        guard.look();
        assert!(guard.dead_since.is_some());
        assert_eq!(shared.board.supervisor.load(Ordering::Relaxed), 1 << 30, "not yet its turn");
        shared.board.supervisor.store(here, Ordering::Relaxed);
        guard.look();
        assert!(guard.dead_since.is_none(), "the agent was in time");
    }
}
