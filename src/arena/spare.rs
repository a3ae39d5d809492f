//! How much memory the host can give at once: without reclaiming any, without waiting.
//!
//! The page allocator lets ordinary tasks down to each zone's `min` watermark and real-time tasks
//! down to half of it (Linux `mm/page_alloc.c`, `ALLOC_MIN_RESERVE`); who finds less reclaims, and
//! a task that may not start I/O then goes round in the allocator until somebody else frees
//! memory, deaf to SIGKILL. Growth must not: a killed worker would not end while the device that
//! could free memory waits for its end. So growth asks here first and sleeps in user space.
//!
//! It stops at three quarters of `min`: above what a real-time task is refused, by a margin for
//! what others take meanwhile; below what all others are refused, so those who free memory to go on
//! themselves feed growth. The quarter beneath is left to a take-over.
//!
//! A thread that is not real-time has to ask for what is spare for anybody: what lies above `low`, where the kernel
//! begins to reclaim.
//!
//! Zones are asked of `/proc/zoneinfo`, which is slow, once in a while; in between the free memory
//! of the machine (`sysinfo`) is taken to have changed in the zones that count.

use super::host_memory;
use crate::page::PAGE_BYTES;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const REFRESH: Duration = Duration::from_secs(1);
const TEXT_BYTES: usize = 8 << 10;

/// Watches the host's free memory. Allocates only when made.
pub struct Spare {
    zones: Option<File>,
    text: Box<[u8]>,
    /// Free bytes that cannot be had at once, by a real-time task and by others.
    out_of_reach: [u64; 2],
    asked: Option<Instant>,
}

impl Spare {
    /// Begins to watch.
    #[allow(clippy::new_without_default, reason = "it opens a file")]
    pub fn new() -> Spare {
        // Without /proc all free memory counts, as if there were no watermarks.
        let zones = File::open("/proc/zoneinfo").ok();
        let text = vec![0; if zones.is_some() { TEXT_BYTES } else { 0 }].into_boxed_slice();
        Spare { zones, text, out_of_reach: [0; 2], asked: None }
    }

    /// Bytes that can be had at once, by a real-time task.
    pub fn bytes(&mut self) -> u64 {
        self.within_reach()[0]
    }

    /// Bytes that any task can have at once.
    pub fn bytes_for_anybody(&mut self) -> u64 {
        self.within_reach()[1]
    }

    fn within_reach(&mut self) -> [u64; 2] {
        let Ok((_, free)) = host_memory() else { return [0; 2] };
        if self.asked.is_none_or(|at| at.elapsed() >= REFRESH) {
            self.asked = Some(Instant::now());
            if let Some((free, within_reach)) = self.read_zones() {
                self.out_of_reach = within_reach.map(|bytes| free - bytes);
            }
        }
        self.out_of_reach.map(|bytes| free.saturating_sub(bytes))
    }

    /// Bytes free, and of them within reach of real-time tasks and of others. None: the text is not as expected.
    fn read_zones(&mut self) -> Option<(u64, [u64; 2])> {
        let zones = self.zones.as_ref()?;
        let mut sum = Zones::default();
        // The text is longer the more CPUs there are: read piece by piece, a cut line kept.
        let (mut at, mut kept) = (0, 0);
        loop {
            let n = zones.read_at(&mut self.text[kept..], at).ok()?;
            if n == 0 {
                return sum.bytes();
            }
            at += n as u64;
            let all = kept + n;
            let whole = self.text[..all].iter().rposition(|b| *b == b'\n')? + 1;
            std::str::from_utf8(&self.text[..whole]).ok()?.lines().try_for_each(|line| sum.add(line))?;
            self.text.copy_within(whole..all, 0);
            kept = all - whole;
        }
    }
}

/// Over all zones what is free, and what of it lies above three quarters of `min`, or above `low`, and the zone's
/// protection from allocations that could go elsewhere.
#[derive(Default)]
struct Zones {
    free_pages: u64,
    reach_pages: [u64; 2],
    free: Option<u64>,
    min: Option<u64>,
    low: Option<u64>,
}

impl Zones {
    /// Takes in a line of /proc/zoneinfo. None: it is not as expected.
    fn add(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("Node"), _) => (self.free, self.min, self.low) = (None, None, None),
            // "pages free N": the heading of a zone's figures.
            (Some("pages"), Some("free")) => self.free = Some(words.next()?.parse().ok()?),
            (Some("min"), Some(n)) if self.min.is_none() => self.min = Some(n.parse().ok()?),
            (Some("low"), Some(n)) if self.low.is_none() => self.low = Some(n.parse().ok()?),
            (Some("protection:"), Some(_)) => {
                // Its last entry is for allocations that may come from any zone, as ours do.
                let last = line.trim_end().trim_end_matches(')').rsplit([' ', '(']).next()?;
                let protected: u64 = last.parse().ok()?;
                let (free, floors) = (self.free?, [self.min? * 3 / 4, self.low?]);
                self.free_pages += free;
                for (reach, floor) in self.reach_pages.iter_mut().zip(floors) {
                    *reach += free.saturating_sub(floor + protected);
                }
            }
            _ => {}
        }
        Some(())
    }

    fn bytes(&self) -> Option<(u64, [u64; 2])> {
        let page = PAGE_BYTES as u64;
        (self.free_pages > 0).then_some((self.free_pages * page, self.reach_pages.map(|pages| pages * page)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 5
  pages free     1083
        boost    0
        min      174
        low      217
        high     260
        spanned  4095
        present  3998
        managed  3840
        cma      0
        protection: (0, 930, 930, 930, 930)
      nr_free_pages 1083
Node 0, zone    DMA32
  pages free     12000
        boost    0
        min      8000
        low      10000
        protection: (0, 0, 0, 0, 0)
Node 0, zone   Normal
  pages free     0
        min      0
        low      0
        protection: (0, 0, 0, 0, 0)
";

    #[test]
    fn counts_what_lies_above_three_quarters_of_min_and_above_low() {
        let page = PAGE_BYTES as u64;
        // Of the first zone 1083 - 130 - 930 and nothing, of the second 12000 - 6000 and 12000 - 10000.
        let mut zones = Zones::default();
        TEXT.lines().for_each(|line| zones.add(line).unwrap());
        assert_eq!(zones.bytes(), Some((13083 * page, [(23 + 6000) * page, 2000 * page])));
        assert_eq!(Zones::default().bytes(), None);
    }

    #[test]
    fn this_machine_has_some_to_spare() {
        let mut spare = Spare::new();
        let (free, within_reach) = spare.read_zones().unwrap();
        assert!(within_reach[1] > 0 && within_reach[1] < within_reach[0] && within_reach[0] < free);
        assert!(spare.bytes() > spare.bytes_for_anybody() && spare.bytes_for_anybody() > 0);
    }
}
