//! How much more the store can keep: an estimate that errs on the low side.
//!
//! A page costs what pages have cost so far, compressed, plus a quarter for worse content to come, plus
//! metadata. While few pages are there to tell, half a page is assumed. Of the limit an eighth is left
//! for what records never fill: the reserve, open segments, room for the cleaner. And a limit
//! that the machine has no memory for counts only as far as there is some. A disk tier adds what it can
//! hold, and takes records off memory. All are pure functions.

use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: u64 = 4096;
/// Slot, record header and their share of tables.
const METADATA: u64 = 16;
/// Assumed of a page before any was seen.
const UNSEEN: u64 = PAGE / 2;
/// Of the room, as many pages at the assumed cost are taken for seen.
const UNSEEN_SHARE: u64 = 64;
/// Not for records.
const OVERHEAD: u64 = 8;
/// Of the cost, for worse content.
const WORSE: u64 = 4;

/// What the worker publishes of its store. Written by one thread; a reader may see two moments mixed,
/// which an estimate bears.
#[repr(C)]
pub struct Published {
    pages: AtomicU64,
    live_bytes: AtomicU64,
    held_bytes: AtomicU64,
    limit_bytes: AtomicU64,
    disk_bytes: AtomicU64,
}

/// What a store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// Pages with content, those filled with one pattern included.
    pub pages: u64,
    /// What their records take.
    pub live_bytes: u64,
    /// All memory that is held.
    pub held_bytes: u64,
    /// The most that may be.
    pub limit_bytes: u64,
    /// What disk tiers can hold that can be written to.
    pub disk_bytes: u64,
}

impl Published {
    /// For the worker.
    pub fn set(&self, held: Held) {
        self.pages.store(held.pages, Ordering::Relaxed);
        self.live_bytes.store(held.live_bytes, Ordering::Relaxed);
        self.held_bytes.store(held.held_bytes, Ordering::Relaxed);
        self.limit_bytes.store(held.limit_bytes, Ordering::Relaxed);
        self.disk_bytes.store(held.disk_bytes, Ordering::Relaxed);
    }

    /// For everybody else.
    pub fn get(&self) -> Held {
        Held {
            pages: self.pages.load(Ordering::Relaxed),
            live_bytes: self.live_bytes.load(Ordering::Relaxed),
            held_bytes: self.held_bytes.load(Ordering::Relaxed),
            limit_bytes: self.limit_bytes.load(Ordering::Relaxed),
            disk_bytes: self.disk_bytes.load(Ordering::Relaxed),
        }
    }
}

/// How many more pages than the kernel has swapped out now would fit. `used` is how many that are:
/// what the store has beyond them is dead and makes room. `swappable` is how much memory could still be
/// turned into store: what is available, and what can be swapped out.
pub fn fits(held: Held, used: u64, swappable: u64) -> u64 {
    let limit = held.limit_bytes.min(held.held_bytes.saturating_add(swappable));
    // An eighth of the disk is for the dead among the living there.
    let usable = limit - limit / OVERHEAD + (held.disk_bytes - held.disk_bytes / OVERHEAD);
    let unseen = usable / UNSEEN_SHARE / PAGE;
    let seen_cost = (held.live_bytes + unseen * UNSEEN) / (held.pages + unseen).max(1);
    let cost = seen_cost + seen_cost / WORSE + METADATA;
    let taken = held.live_bytes + held.pages * METADATA;
    usable.saturating_sub(taken) / cost + held.pages.saturating_sub(used)
}

/// Bytes of its memory that a kernel spends on swap areas of so many pages, of which so many are used.
/// Measured: before 7.0 mostly by size, since then mostly by use (48 bytes for 512 pages of area).
pub fn kernel_cost(release: &str, pages: u64, used: u64) -> u64 {
    let major: u32 = release.split('.').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    match major {
        0..=6 => pages * 31 / 10,
        _ => pages / 512 * 48 + used * 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn room_follows_limit_ratio_and_memory() {
        let empty = Held { limit_bytes: 512 * MIB, ..Held::default() };
        let at_two_to_one = 448 * MIB / (UNSEEN * 5 / 4 + METADATA);
        assert_eq!(fits(empty, 0, u64::MAX), at_two_to_one);
        assert_eq!(fits(empty, 0, 0), 0, "no memory for it");
        assert!(fits(empty, 0, 256 * MIB) < at_two_to_one * 51 / 100);
        // 4 to 1: about 1 KiB a page.
        let held = Held { pages: 200_000, live_bytes: 200_000 * 1024, held_bytes: 300 * MIB, ..empty };
        let more = fits(held, 200_000, u64::MAX);
        assert!((180_000..210_000).contains(&more), "{more}");
        assert_eq!(fits(held, 150_000, u64::MAX), more + 50_000, "dead pages make room");
        assert_eq!(fits(Held { live_bytes: 460 * MIB, ..held }, 300_000, u64::MAX), 0);
        assert_eq!(fits(Held::default(), 0, 0), 0, "nothing known yet");
        // 1 GiB of disk on top holds as much as 1 GiB of memory does, and is there whatever memory there is.
        let with_disk = Held { disk_bytes: 1024 * MIB, ..empty };
        assert_eq!(fits(with_disk, 0, u64::MAX), fits(Held { limit_bytes: 1536 * MIB, ..empty }, 0, u64::MAX));
        assert_eq!(fits(with_disk, 0, 0), fits(Held { limit_bytes: 1024 * MIB, ..empty }, 0, u64::MAX));
    }

    #[test]
    fn the_promise_is_kept_to_the_end() {
        // Filled step by step with pages that all cost the same, what was promised is never more than
        // what is then found to fit: 7/8 of the limit.
        for cost in [300, 1400, 4096] {
            let limit_bytes = 512 * MIB;
            let most = limit_bytes * 7 / 8 / (cost + METADATA);
            for pages in (most / 8..most).step_by(10_000) {
                let held = Held { pages, live_bytes: pages * cost, held_bytes: 0, limit_bytes, ..Held::default() };
                assert!(pages + fits(held, pages, u64::MAX) <= most, "{cost} {pages}");
            }
        }
    }

    #[test]
    fn the_kernels_cost_is_near_what_was_measured() {
        let tib = 1 << 28;
        assert!((800..860).contains(&(kernel_cost("6.12.95+deb13-cloud-amd64", tib, 0) / 1_000_000)));
        assert!((24..27).contains(&(kernel_cost("7.3.4", tib, 0) / 1_000_000)));
    }
}
