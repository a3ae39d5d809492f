//! What to do when the store stays full: the last resort before a machine freezes.
//!
//! At its limit a store cleans, then writes wait, then they are refused. The kernel keeps a page
//! whose write was refused and tries the next; and because swap looks free, it takes reclaim for
//! possible and does not call its OOM killer, for minutes or for ever. Seen on 6.12 and 7.3: every
//! process that needs a page stands still meanwhile. So when refusals have gone on for a while, the
//! agent calls the OOM killer itself (sysrq `f`, Linux `drivers/tty/sysrq.c`): it picks its victim as
//! always. The pages that die with the victim make room.
//!
//! A second victim is asked for only if refusals have gone on long after the first: a large process
//! takes its time to die, and a second call within 2.5 s was seen to hit a bystander.

use std::time::{Duration, Instant};

/// Without a new refusal for this long, the shortage is over.
const OVER: Duration = Duration::from_secs(2);
/// Least time between two victims.
const BETWEEN: Duration = Duration::from_secs(15);

/// Watches one device's refusals.
#[derive(Default)]
pub struct Shortage {
    refused: u64,
    /// When the present run of refusals began, and its latest.
    run: Option<(Instant, Instant)>,
    last_victim: Option<Instant>,
}

impl Shortage {
    /// Takes note of how many writes were refused so far. True: a victim is needed now.
    pub fn look(&mut self, now: Instant, refused: u64, patience: Duration) -> bool {
        let more = refused > self.refused;
        self.refused = refused;
        self.run = match (self.run, more) {
            (Some((began, _)), true) => Some((began, now)),
            (None, true) => Some((now, now)),
            (Some((_, latest)), false) if now - latest >= OVER => None,
            (run, false) => run,
        };
        let Some((began, latest)) = self.run else { return false };
        let due = latest == now && now - began >= patience;
        if due && self.last_victim.is_none_or(|at| now - at >= BETWEEN) {
            self.last_victim = Some(now);
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every half second at these counts; returns the seconds at which a victim was asked for.
    fn victims(refused: impl Fn(f64) -> u64, seconds: u32) -> Vec<f64> {
        let (mut shortage, began) = (Shortage::default(), Instant::now());
        let at = |half: u32| began + Duration::from_millis(500) * half;
        let asked = |half: &u32| shortage.look(at(*half), refused(f64::from(*half) / 2.0), Duration::from_secs(3));
        (0..seconds * 2).filter(asked).map(|half| f64::from(half) / 2.0).collect()
    }

    #[test]
    fn only_refusals_that_go_on_cost_a_victim() {
        assert!(victims(|_| 0, 60).is_empty());
        assert!(victims(|t| if t < 2.0 { t as u64 * 10 } else { 10 }, 60).is_empty(), "a short shortage");
        assert!(victims(|t| t as u64 / 10, 60).is_empty(), "one refusal now and then");
        assert_eq!(victims(|t| if t < 8.0 { (t * 20.0) as u64 } else { 160 }, 60), [3.5]);
    }

    #[test]
    fn a_second_victim_waits() {
        assert_eq!(victims(|t| (t * 20.0) as u64, 40), [3.5, 18.5, 33.5]);
    }
}
