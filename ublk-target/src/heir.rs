//! The heir: a thread of the agent that becomes the supervisor when the supervisor dies.
//!
//! The worker serves on by itself: nothing on the I/O path goes through the supervisor, and the arena's
//! file is open in the worker too. But nobody would take over from it. So the agent, which has nothing
//! that others wait for, holds the arena's descriptor and the feed's as well, waits for the supervisor's
//! end by a pidfd, and then becomes the supervisor by `exec` of its own program with the letter that an
//! upgrade leaves (`handover.rs`; there: which processes there are, and what the reader does with it).
//! No process is forked for it, so it takes little memory while the worker is alone.
//!
//! What it does not mend: an agent that is killed together with its supervisor. Then the worker serves
//! on alone, and `ghostswap-ublk list` says that there is no daemon to talk to.

use crate::board::Shared;
use crate::handover::{Letter, Occasion, HANDOVER_VERSION, OWN_PROGRAM};
use crate::slotfree::Source;
use crate::supervise::pidfd;
use crate::{protect, signals};
use anyhow::{Context, Result};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

const STACK_BYTES: usize = 128 << 10;
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_secs(1);
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
            self.wait_for_death();
            loop {
                let why = self.letter(id, &path, &shared).send(OWN_PROGRAM);
                tracing::error!("the supervisor died, and its heir cannot take its place yet: {why:#}");
                std::thread::sleep(TRY_AGAIN);
            }
        };
        let thread = std::thread::Builder::new().name("gs-heir".into()).stack_size(STACK_BYTES);
        thread.spawn(body).context("cannot start the heir's thread").map(drop)
    }

    fn wait_for_death(&self) {
        let Ok(Some(process)) = pidfd(self.supervisor) else { return };
        while alive(self.supervisor) && !signals::poll([process.as_raw_fd()], FOR_EVER)[0] {}
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

/// Whether the supervisor, parent of the agent, lives.
pub fn alive(supervisor: libc::pid_t) -> bool {
    std::os::unix::process::parent_id() == supervisor as u32
}
