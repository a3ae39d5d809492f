//! What tests of a disk tier share: a place for it, and pages that are known again.
#![allow(dead_code, reason = "each test file is a program of its own, and none uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ghostswap::{Lane, StoreConfig};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub const PAGE: usize = 4096;
pub const PAGES: u64 = 12_000;

/// A directory that goes with the test.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("ghostswap-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    pub fn tier(&self) -> PathBuf {
        self.0.join("cold")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn config(path: &Path, ram: &str, options: &str) -> StoreConfig {
    let disk = format!("file:{},size=64M,prealloc=off{options}", path.display());
    StoreConfig { tiers: vec![ram.parse().unwrap(), disk.parse().unwrap()], ..StoreConfig::default() }
}

/// About half of it compresses; every fifth page does not.
pub fn content(page: u64, salt: u64) -> Vec<u8> {
    let mut x = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt | 1;
    let noisy = if page % 5 == 0 { PAGE } else { PAGE / 2 };
    let mut out = vec![page as u8; PAGE];
    out[..noisy].chunks_exact_mut(8).for_each(|c| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        c.copy_from_slice(&x.to_le_bytes());
    });
    out
}

pub fn write(lane: &mut Lane, pages: impl Iterator<Item = u64>, salt: u64) {
    for page in pages {
        lane.write(page * PAGE as u64, &content(page, salt)).unwrap();
    }
}

pub fn check(lane: &mut Lane, pages: impl Iterator<Item = u64>, salt: u64) {
    let mut buf = vec![0; PAGE];
    for page in pages {
        lane.read(page * PAGE as u64, &mut buf).unwrap();
        assert!(buf == content(page, salt), "page {page}");
    }
}

pub fn wait_for(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        // A tier that failed again and again rests for up to 30 s.
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}
