//! A store without threads of its own: a test does growth's and the cleaner's work step by step, so
//! that a history runs the same way every time.

use super::{build, clean::Cleaner, grow::Growth, Owner, Store};
use crate::arena::{host_memory, Waiting};
use crate::config::StoreConfig;
use crate::error::Result;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What the background threads would do.
pub struct Steps {
    growth: Growth,
    cleaner: Cleaner,
}

impl Steps {
    /// As [`Store::open_arena`], but nothing happens in the background.
    pub fn open(config: StoreConfig, arena: OwnedFd) -> Result<(Store, Steps)> {
        let config = config.validate(host_memory()?.0)?;
        let (shared, growth, _) = build(config, Waiting::new(arena)?)?;
        let cleaner = Cleaner::new(shared.clone());
        Ok((Store { owner: Arc::new(Owner { shared, threads: Vec::new() }) }, Steps { growth, cleaner }))
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

    /// Seals what the cleaner has open.
    pub fn close_cleaner(&mut self) {
        self.cleaner.close();
    }
}
