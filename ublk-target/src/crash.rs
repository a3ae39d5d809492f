//! Deaths at chosen places, for tests in guests: a worker kills itself between two steps of the
//! store. Only in builds with the feature `crash-points` (`scripts/build-crash`), which nobody is to
//! use for anything else.
//!
//! `GHOSTSWAP_CRASH=24,commit:40000,clean:400,recovery:40,any:60000`, in the environment of `add`:
//! the first 24 workers die so. Each takes the next of the kinds in turn and dies at one of its
//! points, after a random number of them from 1 to twice the one given less one. A kind is what the
//! points' names begin with, or one of [`KINDS`]. Who has gone through recovery alive dies soon at any.
//!
//! And supervisors that cannot begin (`supervise/succession.rs`): a file `resume` beside the sockets has
//! the next one that resumes by such a build fail (`fail`) or die (`die`) there; it removes the file.

#![allow(unsafe_code)] // kill.

use crate::board::Shared;
use crate::control;
use anyhow::{bail, Result};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;

/// The variable.
const PLAN: &str = "GHOSTSWAP_CRASH";
/// Kinds of points that go by several names.
const KINDS: [(&str, &[&str]); 2] = [("any", &[""]), ("commit", &["append:", "commit:", "splice:"])];

/// Points to pass before the one to die at.
static LEFT: AtomicU64 = AtomicU64::new(u64::MAX);
/// What the names of the points begin with that count.
static BEGINNINGS: OnceLock<Vec<String>> = OnceLock::new();

/// Any point counts.
static ANY: AtomicBool = AtomicBool::new(false);

/// From here on the calling process may die, if it is one's turn.
pub fn arm(shared: &Shared) {
    let worker = shared.board.generation.load(Ordering::Relaxed);
    let Some((kind, mean)) = std::env::var(PLAN).ok().and_then(|plan| choose(&plan, worker)) else { return };
    let names = KINDS.iter().find(|(name, _)| *name == kind).map(|(_, names)| names.to_vec());
    let names = names.unwrap_or_else(|| vec![kind.as_str()]);
    let _ = BEGINNINGS.set(names.into_iter().map(str::to_owned).collect());
    LEFT.store(RandomState::new().build_hasher().finish() % (2 * mean - 1).max(1), Ordering::Relaxed);
    ghostswap::set_crash_hook(passed);
}

/// The store is open, and no point of recovery will come any more.
pub fn recovered() {
    if BEGINNINGS.get().is_some_and(|all| all.iter().any(|beginning| beginning.starts_with("recovery"))) {
        LEFT.store(LEFT.load(Ordering::Relaxed).min(1000), Ordering::Relaxed);
        ANY.store(true, Ordering::Relaxed);
    }
}

/// What worker number `worker` is to die at, and after how many on average.
fn choose(plan: &str, worker: u64) -> Option<(String, u64)> {
    let (deaths, kinds) = plan.split_once(',')?;
    if worker >= deaths.parse().ok()? {
        return None;
    }
    let kinds: Vec<_> = kinds.split(',').collect();
    let (kind, mean) = kinds[worker as usize % kinds.len()].split_once(':')?;
    Some((kind.to_owned(), mean.parse().ok()?))
}

/// The hook at every point of the store, and what the worker itself passes.
pub fn passed(name: &'static str) {
    let begins = |all: &Vec<String>| all.iter().any(|beginning| name.starts_with(beginning.as_str()));
    if !ANY.load(Ordering::Relaxed) && !BEGINNINGS.get().is_some_and(begins) {
        return;
    }
    if LEFT.fetch_sub(1, Ordering::Relaxed) == 0 {
        tracing::warn!("dies at {name}");
        // SAFETY: no preconditions; it does not return.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// A supervisor is about to go on where another left off.
pub fn resuming() -> Result<()> {
    let file = control::run_dir().join("resume");
    let what = std::fs::read_to_string(&file).unwrap_or_default();
    let _ = std::fs::remove_file(&file);
    match what.trim() {
        "fail" => bail!("told to fail"),
        // SAFETY: no preconditions; it does not return.
        "die" => unsafe { libc::kill(libc::getpid(), libc::SIGKILL) },
        _ => 0,
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_come_in_turn_until_enough_have_died() {
        let of = |worker| choose("3,commit:7,clean:2", worker);
        assert_eq!(of(0), Some(("commit".into(), 7)));
        assert_eq!(of(1), Some(("clean".into(), 2)));
        assert_eq!(of(2), Some(("commit".into(), 7)));
        assert_eq!(of(3), None);
        assert_eq!(choose("", 0), None);
    }
}
