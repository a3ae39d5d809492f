//! A store without threads of its own: a test does growth's and the cleaner's work step by step, so
//! that a history runs the same way every time.

use super::demote::{Mover, Tools};
use super::{build, clean::Cleaner, grow::Growth, Owner, Store};
use crate::arena::{host_memory, Spare, Waiting};
use crate::config::StoreConfig;
use crate::error::Result;
use crate::io::Medium;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What the background threads would do.
pub struct Steps {
    growth: Growth,
    cleaner: Cleaner,
    mover: Option<Mover>,
}

impl Steps {
    /// As [`Store::open_arena`], but nothing happens in the background.
    pub fn open(config: StoreConfig, arena: OwnedFd) -> Result<(Store, Steps)> {
        let mut config = config.validate(host_memory()?.0)?;
        let waiting = Waiting::new(arena)?;
        let medium = config.below.as_ref().map(|tier| Medium::open(tier, &config.callers())).transpose()?;
        if let Some(medium) = &medium {
            config.below_bytes = medium.bytes(waiting.segment_bytes().is_none())?.unwrap_or(0);
        }
        let (shared, growth, _) = build(config, waiting, medium, None)?;
        let cleaner = Cleaner::new(shared.clone(), Spare::new());
        let tools = shared.lower.is_some().then(|| Tools::new(shared.arena.segment_bytes())).transpose()?;
        let mover = tools.map(|tools| Mover::new(shared.clone(), tools));
        Ok((Store { owner: Arc::new(Owner { shared, threads: Vec::new() }) }, Steps { growth, cleaner, mover }))
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
        if let Some(mover) = &mut self.mover {
            mover.close();
        }
    }

    /// The oldest sealed segments down, whether memory is short or not. True: some went.
    pub fn demote(&mut self) -> bool {
        self.mover.as_mut().is_some_and(Mover::move_now)
    }

    /// One extent emptied, however much of it is live. True: one was.
    pub fn drain(&mut self) -> bool {
        self.mover.as_mut().is_some_and(Mover::drain_now)
    }

    /// One extent compacted, whether they are short or not.
    pub fn compact(&mut self) -> bool {
        self.mover.as_mut().is_some_and(Mover::compact_now)
    }
}
