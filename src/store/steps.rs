//! A store without threads of its own: a test does growth's and the cleaner's work step by step, so
//! that a history runs the same way every time.

use super::attach::Wanted;
use super::demote::{Mover, Tools};
use super::standby::open_media;
use super::{build, clean::Cleaner, grow::Growth, Owner, Store};
use crate::arena::{host_memory, Spare, Waiting};
use crate::config::StoreConfig;
use crate::error::Result;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What the background threads would do.
pub struct Steps {
    growth: Growth,
    cleaner: Cleaner,
    /// In the order of their tiers.
    movers: Vec<Mover>,
}

impl Steps {
    /// As [`Store::open_arena`], but nothing happens in the background.
    pub fn open(config: StoreConfig, arena: OwnedFd) -> Result<(Store, Steps)> {
        let mut config = config.validate(host_memory()?.0)?;
        let waiting = Waiting::new(arena)?;
        let media = open_media(&mut config, &waiting)?;
        let wanted = media.into_iter().map(|medium| Wanted { medium, new: None }).collect();
        let (shared, growth, _) = build(config, waiting, wanted)?;
        let cleaner = Cleaner::new(shared.clone(), Spare::new());
        let movers = (0..shared.lower.len()).map(|at| {
            let tools = Tools::new(shared.arena.segment_bytes(), shared.lower.len() > 1)?;
            Ok(Mover::new(shared.clone(), at, tools))
        });
        let movers = movers.collect::<Result<_>>()?;
        Ok((Store { owner: Arc::new(Owner { shared, threads: Vec::new() }) }, Steps { growth, cleaner, movers }))
    }

    /// Grows to the reserve.
    pub fn grow(&mut self) -> Result<()> {
        self.growth.step()
    }

    /// Gives back a part of what is free beyond `keep` frames and metadata pages.
    pub fn give_back(&mut self, keep: u32) {
        self.growth.give_back_now(keep);
    }

    /// One look of the cleaner over the table. True: it cleaned something.
    pub fn clean(&mut self) -> bool {
        self.cleaner.step()
    }

    /// A dictionary trained from what is sealed. True: it was better than none, or than the last.
    pub fn train(&mut self) -> bool {
        self.cleaner.train_now()
    }

    /// Seals what the cleaner and the mover have open.
    pub fn close_cleaner(&mut self) {
        self.cleaner.close();
        self.movers.iter_mut().for_each(Mover::close);
    }

    /// The oldest sealed segments down to the first tier, whether memory is short or not. True: some went.
    pub fn demote(&mut self) -> bool {
        self.movers.first_mut().is_some_and(Mover::move_now)
    }

    /// The oldest segments of one tier on to another, by their order, whether that is short of room or not. True: some
    /// went.
    pub fn pass_on(&mut self, from: usize, to: usize) -> bool {
        self.movers.get_mut(to).is_some_and(|mover| mover.pull_now(from))
    }

    /// One extent of each tier emptied, however much of it is live. True: one was.
    pub fn drain(&mut self) -> bool {
        self.movers.iter_mut().map(Mover::drain_now).filter(|done| *done).count() > 0
    }

    /// One extent of each tier compacted, whether they are short or not.
    pub fn compact(&mut self) -> bool {
        self.movers.iter_mut().map(Mover::compact_now).filter(|done| *done).count() > 0
    }
}
