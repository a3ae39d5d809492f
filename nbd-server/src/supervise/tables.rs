//! The table of exports, and tiers that were changed (`tiers.rs`), which must outlive who made it: in two files without a
//! name, beside the arena.
//!
//! The worker writes each new table, with a number, over the older of the two; whoever comes next reads the one with
//! the highest number that is whole. So a kill in the middle leaves the last one. One process writes at a time: whoever
//! has the arena.
//!
//! ```text
//! 17 {"exports":[{"name":"swap1",…},…],…}⏎
//! ```

use anyhow::{Context, Result};
use rustix::fs::{memfd_create, MemfdFlags};
use std::fs::File;
use std::io::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

pub struct Tables {
    files: [File; 2],
    /// Of the latest.
    number: AtomicU64,
}

impl Tables {
    pub fn new() -> Result<Tables> {
        let file = || memfd_create("ghostswap-table", MemfdFlags::CLOEXEC).context("cannot make a file in memory");
        Ok(Tables::of([file()?, file()?]))
    }

    pub fn of(files: [OwnedFd; 2]) -> Tables {
        Tables { files: files.map(File::from), number: AtomicU64::new(0) }
    }

    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.files[0].as_fd(), self.files[1].as_fd()]
    }

    /// None: there was none yet.
    pub fn latest(&self) -> Result<Option<String>> {
        let mut latest: Option<(u64, String)> = None;
        for file in &self.files {
            let mut bytes = vec![0; file.metadata().context("cannot read the table of exports")?.len() as usize];
            file.read_exact_at(&mut bytes, 0).context("cannot read the table of exports")?;
            let Some((number, table)) = whole(&bytes) else { continue };
            if latest.as_ref().is_none_or(|(before, _)| *before < number) {
                latest = Some((number, table.to_owned()));
            }
        }
        self.number.store(latest.as_ref().map_or(0, |(number, _)| *number), Ordering::Relaxed);
        Ok(latest.map(|(_, table)| table))
    }

    /// After [`Tables::latest`], and by one thread at a time.
    pub fn put(&self, table: &str) -> Result<(), Error> {
        let number = self.number.load(Ordering::Relaxed) + 1;
        let file = &self.files[number as usize % 2];
        file.set_len(0)?;
        file.write_all_at(format!("{number} {table}\n").as_bytes(), 0)?;
        self.number.store(number, Ordering::Relaxed);
        Ok(())
    }
}

fn whole(bytes: &[u8]) -> Option<(u64, &str)> {
    let (number, table) = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?.split_once(' ')?;
    Some((number.parse().ok()?, table))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_that_is_whole_counts() {
        let tables = Tables::new().unwrap();
        assert_eq!(tables.latest().unwrap(), None);
        for table in ["[]", "[1]", "[1,2]"] {
            tables.put(table).unwrap();
            let [first, second] = tables.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
            let next = Tables::of([first, second]);
            assert_eq!(next.latest().unwrap().as_deref(), Some(table));
            assert_eq!(next.number.load(Ordering::Relaxed), tables.number.load(Ordering::Relaxed));
        }
        // Killed at any byte of the next.
        let whole = b"4 [1,2,3]\n";
        for len in 0..whole.len() {
            tables.files[0].set_len(0).unwrap();
            tables.files[0].write_all_at(&whole[..len], 0).unwrap();
            assert_eq!(tables.latest().unwrap().as_deref(), Some("[1,2]"), "{len} bytes");
        }
        tables.put("[4]").unwrap();
        assert_eq!(tables.latest().unwrap().as_deref(), Some("[4]"));
    }
}
