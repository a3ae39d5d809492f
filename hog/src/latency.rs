//! A histogram of times: fixed size, under 2 % of error, no allocation when it counts.
//!
//! Buckets: 64 to every power of two of nanoseconds (below 64 ns, one each).

use serde::Serialize;
use std::time::Duration;

const SUB_BITS: u32 = 6;
const SUBS: usize = 1 << SUB_BITS;
/// Up to 2^40 ns, 18 minutes; longer times count in the last bucket.
const BUCKETS: usize = (40 - SUB_BITS as usize + 1) * SUBS;

/// Times counted so far.
#[derive(Clone)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max_ns: u64,
}

/// The usual numbers of a histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    /// Half were at most this long.
    pub p50_ns: u64,
    /// 99 %.
    pub p99_ns: u64,
    /// 99.9 %.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: vec![0; BUCKETS], count: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// Counts one time.
    pub fn record(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)] += 1;
        self.count += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// The usual numbers; zeros when nothing was counted.
    pub fn percentiles(&self) -> Percentiles {
        Percentiles {
            p50_ns: self.at_most(500),
            p99_ns: self.at_most(990),
            p999_ns: self.at_most(999),
            max_ns: self.max_ns,
        }
    }

    fn at_most(&self, permille: u64) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(permille)).div_ceil(1000);
        let mut seen = 0u128;
        for (number, &count) in self.buckets.iter().enumerate() {
            seen += u128::from(count);
            if count > 0 && seen >= wanted {
                return highest_of(number).min(self.max_ns);
            }
        }
        self.max_ns
    }
}

fn bucket(ns: u64) -> usize {
    if ns < SUBS as u64 {
        return ns as usize;
    }
    let shift = ns.ilog2() - SUB_BITS;
    let number = (shift as usize + 1) * SUBS + (ns >> shift) as usize - SUBS;
    number.min(BUCKETS - 1)
}

/// The longest time that counts in a bucket.
fn highest_of(number: usize) -> u64 {
    if number < SUBS {
        return number as u64;
    }
    let shift = number / SUBS - 1;
    (((number % SUBS + SUBS + 1) as u64) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_the_times_it_names() {
        for ns in (0..5000).chain((0..39).map(|bit| (1u64 << bit) + 12345 % (1 << bit))) {
            let high = highest_of(bucket(ns));
            assert!(ns <= high && high - ns <= ns / 32 + 1, "{ns} counted as {high}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_thousand() {
        let mut times = Histogram::default();
        (1..=1000).for_each(|us| times.record(Duration::from_micros(us)));
        let found = times.percentiles();
        let near = |ns: u64, us: u64| ns.abs_diff(us * 1000) < us * 20;
        assert!(near(found.p50_ns, 500) && near(found.p99_ns, 990) && near(found.p999_ns, 999), "{found:?}");
        assert_eq!(found.max_ns, 1_000_000);
        assert_eq!(Histogram::default().percentiles(), Percentiles::default());
    }
}
