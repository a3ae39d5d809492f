//! What the service manager keeps for the case that all processes of a device are killed at once: the
//! arena, the board and the feed, by descriptors that it has in store (FDSTORE in sd_notify(3)).
//!
//! The device waits meanwhile, as it does after a worker's death. The manager starts the unit again
//! and passes the descriptors (LISTEN_FDS); of them `find` makes the letter that a supervisor leaves when it
//! dies (`handover.rs`), and from there on it is a succession like any other.
//!
//! While nobody has the arena mapped nothing locks its pages. What keeps them from being swapped out
//! then, to their own device among others, is the tmpfs without swap that they are in, or, before
//! Linux 6.4, the unit's `MemorySwapMax=0`.

use crate::board::Shared;
use crate::device;
use crate::handover::{Letter, Occasion, HANDOVER_VERSION};
use crate::notify::Manager;
use crate::slotfree::Source;
use anyhow::{bail, Context, Result};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

const BOARD: [&str; 5] = ["board0", "board1", "board2", "board3", "board4"];
const FEED: [&str; 4] = ["feed0", "feed1", "feed2", "feed3"];

/// Under which a descriptor is kept: who reads it has to know what it is.
fn name(what: &str) -> String {
    format!("ghostswap-{HANDOVER_VERSION}-{what}")
}

/// What a name says: the version and what it is. None: it is not ours.
fn read(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("ghostswap-")?.split_once('-')
}

/// Has the manager keep it all, if there is one that does.
pub fn keep(manager: &Manager, arena: &OwnedFd, shared: &Shared, feed: Option<&Source>) -> Result<()> {
    let feed = feed.map(Source::descriptors);
    let all = std::iter::once(("arena", arena.as_raw_fd()))
        .chain(BOARD.into_iter().zip(shared.descriptors()))
        .chain(feed.into_iter().flat_map(|feed| FEED.into_iter().zip(feed)));
    for (what, fd) in all {
        manager.keep(&name(what), &borrow(fd))?;
    }
    Ok(())
}

/// A letter of what the manager kept, if the device is there and has no process any more.
pub fn find(id: u32) -> Result<Option<Letter>> {
    let given = sd_listen_fds::get().context("cannot take what the service manager kept")?;
    let mut kept = BTreeMap::new();
    for (called, fd) in given {
        if let Some((version, what)) = called.as_deref().and_then(read) {
            kept.insert(what.to_owned(), (version.to_owned(), fd.into_std()));
        }
    }
    if kept.is_empty() {
        return Ok(None);
    }
    if !device::kernel_has(id) {
        // What was in it went with the device. The next one's is kept under the same names.
        let manager = Manager::from_env();
        for (what, (version, _)) in &kept {
            manager.forget(&format!("ghostswap-{version}-{what}"));
        }
        return Ok(None);
    }
    if let Some((version, _)) = kept.values().find(|(version, _)| *version != HANDOVER_VERSION.to_string()) {
        bail!(
            "ublkb{id} waits for a program whose handover format is {version}, this one's is {HANDOVER_VERSION}: \
             install that one again"
        );
    }
    let mut take = |what: &str| kept.remove(what).map(|(_, fd)| fd);
    let (arena, board, feed) = (take("arena"), BOARD.map(&mut take), FEED.map(&mut take));
    let (Some(arena), [Some(a), Some(b), Some(c), Some(d), Some(e)]) = (arena, board) else {
        bail!("the service manager kept only a part of ublkb{id}: raise FileDescriptorStoreMax in its unit");
    };
    let shared = Shared::of([a, b, c, d, e])?;
    let last = shared.board.supervisor.load(Ordering::Relaxed);
    if is_supervisor(last) {
        bail!("ublkb{id} is served by process {last}, of which no answer comes at this moment");
    }
    // Else a heir has begun (`heir.rs`).
    let own = u64::from(std::process::id());
    if shared.board.supervisor.compare_exchange(last, own, Ordering::Relaxed, Ordering::Relaxed).is_err() {
        bail!("ublkb{id} is being taken over by another process");
    }
    let feed = match feed {
        [Some(a), Some(b), Some(c), Some(d)] => Some([a, b, c, d].map(IntoRawFd::into_raw_fd)),
        _ => None,
    };
    let letter = Letter {
        version: HANDOVER_VERSION,
        occasion: Occasion::Death,
        program: -1,
        arena: arena.into_raw_fd(),
        board: shared.descriptors(),
        feed,
        worker: (shared.board.worker.load(Ordering::Relaxed) as libc::pid_t, None),
        standbys: Vec::new(),
        agent: None,
        device: (id, format!("/dev/ublkb{id}")),
        // Else the device would be gone.
        recoverable: true,
        returned: None,
    };
    // Its descriptors are the letter's.
    std::mem::forget(shared);
    Ok(Some(letter))
}

/// Whether a process with that number is a supervisor of this unit.
fn is_supervisor(pid: u64) -> bool {
    let of = |pid: &str, what: &str| std::fs::read_to_string(format!("/proc/{pid}/{what}")).ok();
    let pid = pid.to_string();
    pid != std::process::id().to_string()
        && of(&pid, "comm").is_some_and(|comm| comm.trim_end() == "ghostswap-ublk")
        && of(&pid, "cgroup") == of("self", "cgroup")
}

#[allow(unsafe_code, reason = "descriptors of others, named by their numbers")]
fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: each is open in whom it was taken from, who is borrowed by the one caller.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_is_kept_and_by_which_version() {
        let version = HANDOVER_VERSION.to_string();
        for what in BOARD.into_iter().chain(FEED).chain(["arena"]) {
            assert_eq!(read(&name(what)), Some((version.as_str(), what)));
        }
        assert_eq!(read("ghostswap-99-arena"), Some(("99", "arena")));
        assert_eq!((read("stored"), read("ghostswap-")), (None, None));
    }

    #[test]
    fn this_process_is_no_supervisor_of_a_unit() {
        assert!(!is_supervisor(u64::from(std::process::id())) && !is_supervisor(1 << 30));
    }
}
