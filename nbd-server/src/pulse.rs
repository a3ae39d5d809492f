//! How long somebody has been quiet, as far as that is his doing.
//!
//! Time counts by looks: of what passed between two of them no more than a look may be late. When the whole machine
//! stood still, or so short of memory that nobody got on, whoever looks was late as well, and that time is nobody's
//! silence.

use std::time::{Duration, Instant};

/// How often to look.
pub const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Most that counts between two looks.
const MOST_COUNTED: Duration = Duration::from_secs(1);

pub struct Pulse {
    quiet: Duration,
    looked: Instant,
}

impl Default for Pulse {
    fn default() -> Pulse {
        Pulse { quiet: Duration::ZERO, looked: Instant::now() }
    }
}

impl Pulse {
    pub fn heard(&mut self) {
        self.heard_at(Instant::now());
    }

    fn heard_at(&mut self, now: Instant) {
        (self.quiet, self.looked) = (Duration::ZERO, now);
    }

    /// Looks, and tells for how long there was nothing to hear.
    pub fn quiet_for(&mut self) -> Duration {
        self.at(Instant::now())
    }

    fn at(&mut self, now: Instant) -> Duration {
        self.quiet += now.saturating_duration_since(self.looked).min(MOST_COUNTED);
        self.looked = now;
        self.quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_nobody_looked_does_not_count() {
        let mut pulse = Pulse::default();
        let begun = pulse.looked;
        for look in 1..=20 {
            assert_eq!(pulse.at(begun + LOOK_EVERY * look), LOOK_EVERY * look);
        }
        let stalled = begun + Duration::from_secs(3600);
        assert_eq!(pulse.at(stalled), Duration::from_secs(11));
        pulse.heard_at(stalled + LOOK_EVERY);
        assert_eq!(pulse.at(stalled + LOOK_EVERY * 2), LOOK_EVERY);
    }
}
