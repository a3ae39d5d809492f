//! The active worker's pulse: each queue counts a beat on the board twice a second, whatever else it does.

use crate::board::{Shared, MAX_QUEUES};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Signs of life seen of the active worker's queues.
pub struct Pulse {
    beats: [u64; MAX_QUEUES],
    /// When each was last seen to go on.
    since: [Instant; MAX_QUEUES],
}

impl Pulse {
    /// Nothing seen yet.
    pub fn new() -> Pulse {
        Pulse { beats: [0; MAX_QUEUES], since: [Instant::now(); MAX_QUEUES] }
    }

    /// A worker begins.
    pub fn restart(&mut self) {
        self.since = [Instant::now(); MAX_QUEUES];
    }

    /// For how long the quietest queue has shown no sign of life.
    pub fn quiet_for(&mut self, shared: &Shared) -> Duration {
        let now = Instant::now();
        let mut longest = Duration::ZERO;
        for q in 0..shared.board.queues.load(Ordering::Relaxed) as usize {
            let beat = shared.board.beats[q].load(Ordering::Relaxed);
            if beat != self.beats[q] {
                (self.beats[q], self.since[q]) = (beat, now);
            }
            longest = longest.max(now - self.since[q]);
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_stops_is_noticed_and_one_that_goes_on_is_not() {
        let shared = Shared::new().unwrap();
        let mut pulse = Pulse::new();
        shared.board.queues.store(2, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
        shared.board.beats[0].fetch_add(1, Ordering::Relaxed);
        assert!(pulse.quiet_for(&shared) >= Duration::from_millis(20), "queue 1 has not moved");
        shared.board.beats[1].fetch_add(1, Ordering::Relaxed);
        assert!(pulse.quiet_for(&shared) < Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(20));
        pulse.restart();
        assert!(pulse.quiet_for(&shared) < Duration::from_millis(20), "a new worker has its time");
    }
}
