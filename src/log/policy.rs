//! Pure choices: which segment to clean, whether to clean at all, how large the reserve is to be.
//! No clock, no memory, no side effect, so that each can be simulated.

use crate::config::Marks;
use std::time::Duration;

/// What the cleaner knows of a sealed segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub live: u32,
    /// Bytes up to the end of its last record.
    pub used: u32,
    /// Most bytes that a record of its kind has.
    pub record: u32,
    /// Segments sealed since this one was: its age.
    pub age: u64,
}

/// Share of a segment that must be dead for cleaning to pay at all.
const LEAST_GAIN: f64 = 0.02;
/// Dead share of all sealed bytes above which the cleaner works although nobody waits for room.
const DEAD_SHARE: f64 = 0.08;

/// Bytes of a segment that cleaning can gain. A tail too short for one more record is none of them: its
/// records would leave such a tail elsewhere too. (31 incompressible pages fill 128 KiB to 97 %; were the
/// rest a gain, a full store of such pages would be cleaned round and round.)
pub(crate) fn gain(c: &Candidate, capacity: u32) -> u32 {
    let tail = capacity - c.used;
    // What was sealed when its state was looked at may be open again: with live bytes and none used.
    c.used.saturating_sub(c.live) + if tail < c.record { 0 } else { tail }
}

/// Worth of cleaning a segment, by cost-benefit (Rosenblum and Ousterhout, "The Design and
/// Implementation of a Log-Structured File System", section 3.5): room gained times age, over the
/// cost of reading it and writing its live part. None: nothing to gain.
pub(crate) fn worth(c: &Candidate, capacity: u32) -> Option<f64> {
    let gain = f64::from(gain(c, capacity)) / f64::from(capacity);
    if gain < LEAST_GAIN {
        return None;
    }
    // Age counts by its square root: under uniform overwrite plain age picks old full segments
    // over young half-empty ones and cleaning costs rise.
    let live = f64::from(c.live) / f64::from(capacity);
    Some(gain / (1.0 + live) * ((c.age + 1) as f64).sqrt())
}

/// How hard the cleaner is to work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cleaning {
    /// Nothing to do.
    Rest,
    /// Dead bytes are a waste of memory: take the best.
    Tidy,
    /// Writers wait or soon will: take any gain.
    Urgent,
}

/// Chooses how hard to clean.
pub(crate) fn cleaning(
    frames_ready: u32,
    frames_growable: u32,
    reserve: u32,
    sealed_bytes: u64,
    dead_bytes: u64,
) -> Cleaning {
    // At the limit every ready frame counts; before it, growth is to fill the reserve.
    if frames_growable == 0 && frames_ready < reserve.max(4) {
        return Cleaning::Urgent;
    }
    if dead_bytes as f64 > DEAD_SHARE * sealed_bytes as f64 {
        return Cleaning::Tidy;
    }
    Cleaning::Rest
}

/// What the mover knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pressure {
    pub frames_ready: u32,
    pub frames_growable: u32,
    pub frames_limit: u32,
    pub reserve: u32,
    pub marks: Marks,
    /// It moved something the last time it asked.
    pub moving: bool,
}

/// How many segments are to leave memory for disk. Hysteresis: it begins when less is free than the
/// reserve, or a sixteenth of all, and ends when half as much again is. Marks stand in the place of the two shares;
/// never in that of the reserve.
pub(crate) fn demotion(p: &Pressure) -> u32 {
    let free = p.frames_ready + p.frames_growable;
    let left = |percent: u8| (u64::from(p.frames_limit) * u64::from(100 - percent) / 100) as u32;
    let high = p.marks.high.map_or(p.frames_limit / 16, left);
    let begin = p.reserve.max(high);
    let again = match p.marks.high {
        // All of it is never free.
        Some(_) if high >= p.reserve => (begin / 2).min(p.frames_limit.saturating_sub(begin) / 2),
        _ => begin / 2,
    };
    let end = match p.marks.low {
        Some(low) if high >= p.reserve => left(low).max(begin + 1),
        Some(low) => left(low).max(begin + again),
        None => begin + again,
    };
    if free < begin || p.moving && free < end {
        end - free
    } else {
        0
    }
}

/// How many segments are to leave a tier below memory for the next one. Hysteresis: it begins when fewer than an eighth of
/// the extents are free, and ends when half as many again are.
pub(crate) fn overflow(extents: u32, free: u32, moving: bool) -> u32 {
    let begin = (extents / 8).max(1);
    let end = begin + (extents / 16).max(1);
    if free < begin || moving && free < end {
        end - free
    } else {
        0
    }
}

/// What is known of the pages that could be compressed again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heat {
    /// Bytes of sealed segments that are not cold, and how many there may be.
    pub hot_bytes: u64,
    pub hot_limit: u64,
    /// All memory held, and its limit.
    pub held_bytes: u64,
    pub limit_bytes: u64,
    /// Seconds since the oldest of them was written, and after how many it is to be done.
    pub oldest_s: u32,
    pub idle_s: u32,
}

/// How eagerly to compress pages again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Recompression {
    /// Nothing to do.
    Rest,
    /// A segment now and then: nobody waits for it.
    Gently,
    /// One after another: memory is short.
    Fully,
}

/// Chooses how eagerly to compress the oldest segment again. Memory is short when the tier above holds
/// more than it may, or all of it seven eighths of what it may: then age does not matter.
pub(crate) fn recompression(h: &Heat) -> Recompression {
    if h.hot_bytes > h.hot_limit || h.held_bytes > h.limit_bytes / 8 * 7 {
        return Recompression::Fully;
    }
    if h.oldest_s >= h.idle_s {
        return Recompression::Gently;
    }
    Recompression::Rest
}

/// How long to leave old pages alone after having compressed some again for so long, to take no more than a share of
/// one processor.
pub(crate) fn rest_after(worked: Duration, cpu_percent: u8) -> Duration {
    worked * (100 - u32::from(cpu_percent.min(100))) / u32::from(cpu_percent.max(1))
}

/// What is known when a dictionary could be trained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lesson {
    /// Live bytes of what there is to learn from.
    pub stored_bytes: u64,
    /// None: there was no training yet.
    pub last: Option<Learned>,
}

/// The last training.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Learned {
    /// Live bytes of what there was to learn from.
    pub from_bytes: u64,
    /// Since then.
    pub seconds: u64,
    /// Of segments sealed since then.
    pub sealed_bytes: u64,
    /// So many in a row, this one the last, came to nothing, and no dictionary is in use.
    pub in_vain: u32,
}

/// From less no dictionary comes that is good for what follows.
const LEAST_LESSON: u64 = 4 << 20;
/// Seconds between two trainings at least.
const TRAINING_EVERY_S: u64 = 600;
/// But so many while a store fills, which is when it has become so many times as large, and twice as many each time while
/// none was good enough.
const FILLING_EVERY_S: u64 = 10;
const FILLED_TIMES: u64 = 16;

/// Whether to train one: as soon as there is enough to learn from; then again, some time after, when as much was written
/// anew as there is, or when what was learned from is little beside it, or, from other pages, when none came of it. Whether
/// the content has changed by that, only the new one tells.
pub(crate) fn training(l: &Lesson) -> bool {
    let has_changed = |last: &Learned| last.seconds >= TRAINING_EVERY_S && last.sealed_bytes >= l.stored_bytes;
    let has_filled = |last: &Learned| {
        last.seconds >= FILLING_EVERY_S && l.stored_bytes >= last.from_bytes.saturating_mul(FILLED_TIMES)
    };
    let has_none = |last: &Learned| {
        last.in_vain > 0 && last.seconds >= (FILLING_EVERY_S << (last.in_vain - 1).min(6)).min(TRAINING_EVERY_S)
    };
    let again = |last: &Learned| has_changed(last) || has_filled(last) || has_none(last);
    l.stored_bytes >= LEAST_LESSON && l.last.is_none_or(|last| again(&last))
}

/// What pages that were not learned from take: without any dictionary, with the one in use, with the new one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trial {
    pub without: u64,
    pub now: Option<u64>,
    pub new: u64,
}

/// Whether the new one is to be used. One dictionary in the place of another must make pages smaller by a fiftieth, or it
/// is not worth compressing survivors anew. The first may make them larger by as much as a fortieth: it is there for its
/// speed. (zstd's fast levels take the statistics of a dictionary without asking what those of the page would be: that is
/// where both come from.)
pub(crate) fn is_better(t: &Trial) -> bool {
    let bearable = t.new * 40 <= t.without * 41;
    bearable && t.now.is_none_or(|now| t.new * 50 <= now * 49)
}

/// Whether to compress anew what is left of an old dictionary's pages, `left_bytes` of `stored_bytes`, so that it can be
/// dropped: when that is little, or there is no number for another one.
pub(crate) fn emptying(left_bytes: u64, stored_bytes: u64, numbers_free: bool) -> bool {
    left_bytes * 32 <= stored_bytes || !numbers_free
}

/// What the growth thread knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    pub ram_bytes: u64,
    pub free_bytes: u64,
    pub limit_bytes: u64,
    pub segment_bytes: u64,
    /// Frames taken by writers and the cleaner within the last second or so.
    pub frames_per_second: u64,
}

/// Frames to hold ready. Small while the host has memory to spare, since a frame is had at once
/// then; before the host runs short, enough for the bursts in which the kernel swaps out while
/// growth waits for memory; more as the swap-out rate asks.
pub(crate) fn reserve_frames(d: &Demand) -> u32 {
    let idle = (d.ram_bytes / 512).clamp(1 << 20, 8 << 20);
    let burst = (d.ram_bytes / 64).clamp(8 << 20, 256 << 20);
    let short = d.free_bytes < d.ram_bytes / 4;
    let base = if short || d.frames_per_second > 0 { burst } else { idle };
    let by_rate = (d.frames_per_second * d.segment_bytes / 2).min(d.ram_bytes / 12);
    let bytes = base.max(by_rate).min(d.limit_bytes / 8);
    (bytes.div_ceil(d.segment_bytes) as u32).max(4)
}

/// Free frames to give back to the host. Hysteresis: it begins at half as much again as the
/// reserve, so that what the next burst needs is not given back, and ends at the reserve.
pub(crate) fn surplus_frames(reserve: u32, frames_ready: u32, giving_back: bool) -> u32 {
    let begin = if giving_back { reserve } else { reserve + reserve / 2 + 1 };
    if frames_ready > begin {
        frames_ready - reserve
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_segments_are_left_alone_and_emptier_or_older_ones_preferred() {
        let at = |live, age| worth(&Candidate { live, used: 1000, record: 10, age }, 1000);
        assert!(at(990, 9).is_none());
        assert!(at(100, 5) > at(900, 5));
        assert!(at(500, 50) > at(500, 5));
        // All that is used is live: a short tail is no gain, a long one is.
        let tail = |used| worth(&Candidate { live: used, used, record: 100, age: 5 }, 1000);
        assert!(tail(901).is_none() && tail(900).is_some());
    }

    #[test]
    fn pages_are_compressed_again_when_old_or_when_memory_is_short() {
        let h = Heat { hot_bytes: 10, hot_limit: 50, held_bytes: 60, limit_bytes: 100, oldest_s: 9, idle_s: 10 };
        assert_eq!(recompression(&h), Recompression::Rest);
        assert_eq!(recompression(&Heat { oldest_s: 10, ..h }), Recompression::Gently);
        assert_eq!(recompression(&Heat { hot_bytes: 51, ..h }), Recompression::Fully);
        assert_eq!(recompression(&Heat { held_bytes: 90, ..h }), Recompression::Fully);
    }

    #[test]
    fn work_and_rest_make_up_the_share() {
        let rest = |percent| rest_after(Duration::from_millis(30), percent).as_millis();
        assert_eq!([1, 25, 50, 100].map(rest), [2970, 90, 30, 0]);
    }

    #[test]
    fn segments_go_down_from_one_mark_to_the_other() {
        let marks = Marks::default();
        let p = Pressure { frames_ready: 4, frames_growable: 6, frames_limit: 160, reserve: 8, marks, moving: false };
        assert_eq!(demotion(&p), 0);
        assert_eq!(demotion(&Pressure { frames_growable: 5, ..p }), 6);
        assert_eq!(demotion(&Pressure { moving: true, ..p }), 5);
        assert_eq!(demotion(&Pressure { moving: true, frames_growable: 11, ..p }), 0);
        assert_eq!(demotion(&Pressure { reserve: 12, ..p }), 8);
    }

    #[test]
    fn segments_leave_a_tier_from_one_mark_to_the_other() {
        assert_eq!([20, 19, 0].map(|free| overflow(160, free, false)), [0, 11, 30]);
        assert_eq!([30, 29].map(|free| overflow(160, free, true)), [0, 1]);
        assert_eq!([(2, false), (1, false), (0, false), (1, true)].map(|(f, m)| overflow(4, f, m)), [0, 0, 2, 1]);
    }

    #[test]
    fn marks_say_when_and_the_reserve_has_its_way() {
        let p = |free, reserve, high, low, moving| {
            let marks = Marks { high, low };
            demotion(&Pressure { frames_ready: 0, frames_growable: free, frames_limit: 200, reserve, marks, moving })
        };
        assert_eq!([20, 19].map(|free| p(free, 8, Some(90), Some(80), false)), [0, 21]);
        assert_eq!([40, 39].map(|free| p(free, 8, Some(90), Some(80), true)), [0, 1]);
        // One of them alone.
        assert_eq!([40, 39].map(|free| p(free, 8, Some(80), None, false)), [0, 21]);
        assert_eq!([140, 139].map(|free| p(free, 8, Some(30), None, false)), [0, 31]);
        assert_eq!([12, 11].map(|free| p(free, 8, None, Some(50), false)), [0, 89]);
        // More is to be free than the marks would leave, and what is done is more than a segment now and then.
        assert_eq!([25, 24].map(|free| p(free, 25, Some(93), Some(92), false)), [0, 13]);
        for limit in [0, 1, 3, 64, 1 << 24] {
            for (high, low) in [(93, 92), (50, 1), (2, 1)] {
                for (reserve, free) in [(0, 0), (6, 5), (1 << 20, 7), (4, limit)] {
                    let marks = Marks { high: Some(high), low: Some(low) };
                    let p = Pressure {
                        frames_ready: 0,
                        frames_growable: free,
                        frames_limit: limit,
                        reserve,
                        marks,
                        moving: true,
                    };
                    assert!(free >= reserve || demotion(&p) >= reserve - free, "{p:?}");
                }
            }
        }
    }

    #[test]
    fn trains_when_there_is_enough_and_again_when_it_is_another() {
        let l = |stored: u64, last| training(&Lesson { stored_bytes: stored << 20, last });
        assert_eq!([3, 4, 400].map(|stored| l(stored, None)), [false, true, true]);
        let after = |from: u64, seconds, sealed: u64| {
            Some(Learned { from_bytes: from << 20, seconds, sealed_bytes: sealed << 20, in_vain: 0 })
        };
        let changed = [(600, 40), (599, 40), (600, 39)].map(|(seconds, sealed)| l(40, after(40, seconds, sealed)));
        assert_eq!(changed, [true, false, false]);
        let filled = [(64, 10), (64, 9), (63, 10)].map(|(stored, seconds)| l(stored, after(4, seconds, stored - 4)));
        assert_eq!(filled, [true, false, false]);
        let found = Learned { from_bytes: u64::MAX, seconds: 599, sealed_bytes: u64::MAX, in_vain: 0 };
        assert!(!l(1 << 20, Some(found)));
        let in_vain =
            |in_vain, seconds| l(40, Some(Learned { from_bytes: 40 << 20, seconds, sealed_bytes: 0, in_vain }));
        assert!([(1, 10), (2, 20), (3, 40), (40, 600)].into_iter().all(|(n, s)| in_vain(n, s) && !in_vain(n, s - 1)));
        assert!(emptying(10, 320, true) && !emptying(10, 319, true) && emptying(10, 10, false));
        let better = |without, now, new| is_better(&Trial { without, now, new });
        assert!(better(1000, None, 1000) && better(1000, None, 1025) && !better(1000, None, 1026));
        assert!(better(1000, Some(1000), 980) && !better(1000, Some(1000), 981) && !better(1000, Some(1200), 1100));
    }

    #[test]
    fn reserve_grows_before_the_host_runs_short() {
        let mut d = Demand {
            ram_bytes: 1 << 30,
            free_bytes: 800 << 20,
            limit_bytes: 512 << 20,
            segment_bytes: 1 << 20,
            frames_per_second: 0,
        };
        let idle = reserve_frames(&d);
        d.free_bytes = 100 << 20;
        let short = reserve_frames(&d);
        d.frames_per_second = 500;
        assert!(idle < short && short < reserve_frames(&d));
        assert_eq!(surplus_frames(10, 10, true), 0);
        assert_eq!(surplus_frames(10, 14, false), 0);
        assert_eq!(surplus_frames(10, 14, true), 4);
        assert_eq!(surplus_frames(10, 20, false), 10);
    }

    #[test]
    fn cleans_when_writers_wait_or_much_is_dead() {
        assert_eq!(cleaning(1, 0, 8, 100, 0), Cleaning::Urgent);
        assert_eq!(cleaning(8, 5, 8, 1000, 200), Cleaning::Tidy);
        assert_eq!(cleaning(8, 5, 8, 1000, 50), Cleaning::Rest);
    }
}
