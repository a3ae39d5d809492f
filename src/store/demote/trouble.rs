//! What the mover does about a tier that fails, is away, or is another's.
//!
//! A tier to which a write failed rests, longer each time, and is tried again, with a block of a free extent if
//! nothing is to go down; meanwhile the cleaner makes room as if there were no tier. A server that is away is written
//! to when it is back; after the tier's time-out it counts as failing.

use super::{take_noted, Mover};
use crate::io::BLOCK_BYTES;
use crate::store::Shared;
use crate::tier::Lower;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a tier that failed rests at first, and at most.
const REST: Duration = Duration::from_secs(1);
pub(super) const LONGEST_REST: Duration = Duration::from_secs(30);
/// How long a server has to be away to be told of.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// How often to look whether a server's export is still ours, while it is written to.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How the tier stands.
pub(super) struct Standing {
    rest: Duration,
    resting_until: Option<Instant>,
    looked: Option<Instant>,
    told_away: bool,
}

impl Standing {
    pub fn new() -> Standing {
        Standing { rest: REST, resting_until: None, looked: None, told_away: false }
    }

    pub fn rests(&self) -> bool {
        self.resting_until.is_some_and(|until| Instant::now() < until)
    }
}

impl Mover {
    /// A server that is not there. Nobody waits for it here; after a while it counts as failing.
    pub(super) fn is_away(&mut self, lower: &Lower) -> bool {
        let Some(remote) = lower.medium.remote() else { return false };
        let for_long = remote.away();
        let away = for_long.is_some();
        // A connection that breaks and is there again at once is nothing to tell of.
        let tell = for_long.is_some_and(|for_long| self.standing.told_away || for_long >= TELL_AFTER);
        match (tell, std::mem::replace(&mut self.standing.told_away, tell)) {
            (true, false) => remote.tell_why(|why| tracing::warn!("{lower}: {why}; it is waited for")),
            (false, true) => {
                tracing::warn!("{lower}: there again");
                // What it failed for before may be over.
                self.standing.resting_until = None;
            }
            _ => {}
        }
        if away && remote.is_lost() && !lower.counts.failing.load(Ordering::Relaxed) {
            self.judge(lower, Some("it is away".into()));
        }
        away
    }

    /// Looks now and then whether a server's export is still ours, before anything is written there.
    pub(super) fn is_ours(&mut self, lower: &Lower) -> bool {
        let now = Instant::now();
        if self.standing.looked.is_some_and(|at| now - at < LOOK_EVERY) {
            return true;
        }
        let ours = lower.wait_for(|| lower.is_ours(self.tools.block()));
        self.standing.looked = ours.then_some(now);
        if !ours {
            self.judge(lower, Some("it does not answer as the one that it was".into()));
        }
        ours
    }

    /// Whether a tier that failed takes a block of a free extent.
    pub(super) fn probe(&mut self, s: &Shared, lower: &Lower) -> bool {
        let Some(extent) = take_noted(s, lower) else { return false };
        let (buffer, bytes) = self.tools.writes.free().expect("nothing is being written");
        bytes[..BLOCK_BYTES].fill(0);
        self.tools.writes.start(&lower.medium, buffer, BLOCK_BYTES, lower.at(extent));
        let ended = lower.wait_for(|| self.tools.writes.wait(&lower.medium)).expect("it was begun");
        lower.settle(&s.arena, extent, ended.late);
        lower.give(extent);
        // If it takes a block and no segment, the next rest is no shorter.
        let rest = self.standing.rest;
        let taken = ended.result.is_ok();
        self.judge(lower, ended.result.err().map(|e| e.to_string()));
        self.standing.rest = self.standing.rest.max(rest);
        taken
    }

    /// Lets a tier that failed rest, and says so when it begins and when it is over.
    pub(super) fn judge(&mut self, lower: &Lower, failed: Option<String>) {
        let was = lower.counts.failing.swap(failed.is_some(), Ordering::Relaxed);
        match failed {
            Some(why) => {
                if !was {
                    tracing::warn!("{lower}: {why}; what was to go there stays in memory, it is tried again");
                }
                self.standing.resting_until = Some(Instant::now() + self.standing.rest);
                self.standing.rest = (self.standing.rest * 2).min(LONGEST_REST);
            }
            None => {
                if was {
                    tracing::warn!("{lower}: takes pages again");
                }
                (self.standing.rest, self.standing.resting_until) = (REST, None);
            }
        }
    }
}
