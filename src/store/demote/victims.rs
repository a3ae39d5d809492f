//! Which segments are to leave memory first, and how many memory is short of.

use super::{Order, WRITES};
use crate::config::Marks;
use crate::log::policy::Pressure;
use crate::page::{Placement, SegmentId};
use crate::store::{grow, Shared};
use std::sync::atomic::Ordering;

/// Lists the likeliest victims, the best last. Those that were read since they were last looked at are passed over,
/// as far as there are others.
pub(super) fn choose(likely: &mut Vec<(u8, u64, SegmentId)>, s: &Shared, order: Order) {
    let now = s.clock_s.load(Ordering::Relaxed);
    let is_meant = |id, age| {
        (order.idle_s == 0 || now.saturating_sub(s.segments.past(&s.arena, id).0) >= order.idle_s)
            && (order.before == u64::MAX || s.segments.next_sequence().saturating_sub(age) < order.before)
    };
    for id in (0..grow::known_segments(s)).map(SegmentId) {
        let Some((live, _, age)) = s.segments.sealed(&s.arena, id) else { continue };
        let soon = match s.segments.placement(&s.arena, id) {
            Placement::Memory => continue,
            Placement::Below => 2,
            Placement::Anywhere if order.wanted_below => continue,
            Placement::Anywhere => u8::from(s.segments.is_raw(&s.arena, id)),
        };
        if live == 0 || !is_meant(id, age) {
            continue;
        }
        insert(likely, (soon, age, id));
    }
    prefer_unread(likely, s);
}

/// Keeps the likeliest.
pub(super) fn insert(likely: &mut Vec<(u8, u64, SegmentId)>, one: (u8, u64, SegmentId)) {
    let at = likely.partition_point(|other| (other.0, other.1) >= (one.0, one.1));
    if at < WRITES * 4 {
        likely.insert(at, one);
        likely.truncate(WRITES * 4);
    }
}

/// Keeps of the likeliest those that were not read since this was last asked, as far as there are.
pub(super) fn prefer_unread(likely: &mut Vec<(u8, u64, SegmentId)>, s: &Shared) {
    // As many as are written at once of those that were not read; the others have had their chance now.
    let mut unread = 0;
    for i in 0..likely.len() {
        if unread == WRITES {
            break;
        }
        if !s.segments.was_read(&s.arena, likely[i].2) {
            likely.swap(unread, i);
            unread += 1;
        }
    }
    likely.truncate(WRITES);
    likely.reverse();
}

pub(super) fn pressure(s: &Shared, moving: bool) -> Pressure {
    Pressure {
        frames_ready: s.arena.frames_ready(),
        frames_growable: grow::growable_frames(s),
        frames_limit: (s.limit_bytes() / s.arena.segment_bytes() as u64) as u32,
        reserve: s.reserve.load(Ordering::Relaxed),
        // What comes back from a tier that is being drained may fill memory as if there were none.
        marks: if s.any_draining() { Marks::default() } else { s.marks() },
        moving,
    }
}

pub(super) fn mostly_dead((live, used): (u32, u32)) -> bool {
    live < used - used / 8
}
