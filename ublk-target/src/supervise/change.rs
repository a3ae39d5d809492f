//! Tiers that are changed while the device is in use: by a take-over, as an upgrade is.
//!
//! A worker of the changed tiers is made beside the one that serves (`trial`). It opens the new tier, takes it, makes it
//! one, and says that it is ready, or what is wrong, and then nothing has changed. Once it is ready the changed tiers
//! hold, on the board, for whoever is started from then on, and the worker that serves is killed: a take-over like any
//! other. One of the former tiers stands by until then.
//!
//! Should the new worker not get as far as being live, be it killed or because the store does not open (something lies on
//! a tier that is to go), the tiers before hold again, and so in turn until one is live: the arena opens with one of the
//! two at any time. Both are on the board, so an heir knows them too.

use super::children::{kill, start};
use super::Supervisor;
use crate::board::{Shared, CHANGE_MADE, CHANGE_ORDERED};
use anyhow::{anyhow, Result};
use ghostswap::config::TierConfig;
use std::sync::atomic::Ordering;

/// A change on its way.
pub(super) struct Change {
    order: u64,
    wanted: String,
    /// It holds on the board; what is left is that a worker gets live.
    switched: bool,
    /// What went wrong last.
    why: String,
}

impl Change {
    pub(super) fn of(order: u64, wanted: &str) -> Change {
        Change { order, wanted: wanted.to_owned(), switched: false, why: String::new() }
    }

    pub(super) fn is_switched(&self) -> bool {
        self.switched
    }
}

/// Tiers as they are on the board.
pub fn text_of(tiers: &[TierConfig]) -> String {
    tiers.iter().map(|tier| tier.to_string()).collect::<Vec<_>>().join("\n")
}

/// The tiers that hold: those of the command line, or what they were changed to.
pub fn tiers_of(shared: &Shared, by_command_line: &[TierConfig]) -> Vec<TierConfig> {
    // What is there was read once before it was put there.
    shared.tiers().and_then(|text| parse(&text).ok()).unwrap_or_else(|| by_command_line.to_vec())
}

fn parse(text: &str) -> Result<Vec<TierConfig>> {
    text.lines().map(|line| line.parse().map_err(|e: String| anyhow!(e))).collect()
}

impl Supervisor<'_> {
    /// Begins to change the tiers to those that the agent was told of.
    pub(super) fn change_tiers(&mut self) {
        let (order, wanted) = self.shared.tiers_wanted();
        if let Err(e) = self.try_tiers(order, wanted) {
            self.shared.set_tiers_done(order, &format!("{e:#}"));
        }
    }

    fn try_tiers(&mut self, order: u64, wanted: String) -> Result<()> {
        let tiers = parse(&wanted)?;
        let id = match &self.device {
            Some((id, _)) if self.recoverable && self.can_change() => *id,
            _ => return Err(anyhow!("not now: a take-over is under way, or this kernel has no recovery")),
        };
        // One stays that can take over from the one that serves.
        self.standbys.sort_by_key(|s| !s.ready);
        self.standbys.drain(1.min(self.standbys.len())..).for_each(|s| kill(s.pid, libc::SIGKILL));
        let trial = start(self.add, &tiers, true, &self.arena, &self.shared, self.feed.as_ref(), Some(id))?;
        self.standbys.push(trial);
        self.change = Some(Change::of(order, &wanted));
        Ok(())
    }

    /// Nothing is under way that a change of tiers, or an upgrade, would get into.
    pub(super) fn can_change(&self) -> bool {
        !self.upgrading && self.change.is_none() && self.died.is_none() && !self.stopping()
    }

    /// The worker of the changed tiers is ready: they hold from now on.
    pub(super) fn trial_ready(&mut self) {
        let Some(change) = &mut self.change else { return };
        if !self.shared.switch_tiers(Some(&change.wanted)) {
            return self.end_change("the tiers' description is too long");
        }
        change.switched = true;
        self.tiers = tiers_of(&self.shared, &self.add.tiers);
        self.drop_standbys(false);
        self.kill_active();
    }

    /// What went wrong with a worker while tiers are changed.
    pub(super) fn note_trouble(&mut self, why: &str) {
        if let Some(change) = &mut self.change {
            change.why = why.to_owned();
        }
    }

    /// A worker of the changed tiers will not be ready.
    pub(super) fn trial_failed(&mut self, how: &str) {
        let said = self.change.as_mut().map(|change| std::mem::take(&mut change.why)).filter(|why| !why.is_empty());
        self.end_change(&said.unwrap_or_else(|| format!("a new worker {how}")));
    }

    /// Before a take-over is ordered. `again`: somebody was to be live since before this death. True: it is the one that
    /// the change is made by.
    pub(super) fn settle_tiers(&mut self, again: bool) -> bool {
        let changing = &self.shared.board.tiers_changing;
        // One that is killed for its successor may take long to end, and be found to hang meanwhile: that is no failure of
        // the successor, who was not ordered yet.
        let ordered = changing.load(Ordering::Relaxed) == CHANGE_ORDERED;
        let first = changing.load(Ordering::Relaxed) == CHANGE_MADE;
        if self.change.as_ref().is_some_and(|change| !change.switched) {
            // Whoever is to take over now is to be of the tiers that there were.
            self.drop_standbys(true);
            self.end_change("the worker died meanwhile: try again");
        } else if again && ordered {
            self.shared.switch_tiers(None);
            self.tiers = tiers_of(&self.shared, &self.add.tiers);
            self.standbys.drain(..).for_each(|s| kill(s.pid, libc::SIGKILL));
        }
        if first || ordered {
            self.shared.board.tiers_changing.store(CHANGE_ORDERED, Ordering::Relaxed);
        }
        first
    }

    /// A worker is live, with the tiers that hold.
    pub(super) fn tiers_hold(&mut self) {
        self.shared.board.tiers_changing.store(0, Ordering::Relaxed);
        let Some(change) = &mut self.change else { return };
        let why = match self.shared.tiers().as_ref() == Some(&change.wanted) {
            true => String::new(),
            false if change.why.is_empty() => "the new worker died: try again".into(),
            false => std::mem::take(&mut change.why),
        };
        self.end_change(&why);
    }

    /// A change that an earlier supervisor began: whether it came to its end is not known.
    pub(super) fn end_change_of_another(&self) {
        let ((order, _), (done, _)) = (self.shared.tiers_wanted(), self.shared.tiers_done());
        if order != done {
            self.shared
                .set_tiers_done(order, "the supervisor died meanwhile: see which tiers there are, and try again");
        }
    }

    fn end_change(&mut self, why: &str) {
        if let Some(change) = self.change.take() {
            self.shared.set_tiers_done(change.order, why);
        }
    }

    /// Those of one kind.
    fn drop_standbys(&mut self, trial: bool) {
        self.standbys.iter().filter(|s| s.trial == trial).for_each(|s| kill(s.pid, libc::SIGKILL));
        self.standbys.retain(|s| s.trial != trial);
    }
}
