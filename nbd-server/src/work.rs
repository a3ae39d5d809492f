//! What a connection's thread is at, seen by another: whether it goes on.
//!
//! Only steps that wait for nothing count: neither for the client, nor for room, nor for the disk. One of them takes
//! milliseconds; a thread that is at one for many seconds never ends it.

use crate::pulse::Pulse;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Steps begun and ended: odd while the thread is at one.
#[derive(Default)]
pub struct Work(AtomicU64);

impl Work {
    /// Does a step. By the one thread whose work it is.
    pub fn step<T>(&self, step: impl FnOnce() -> T) -> T {
        self.0.fetch_add(1, Ordering::Relaxed);
        let done = step();
        self.0.fetch_add(1, Ordering::Relaxed);
        done
    }
}

/// Who looks at it from time to time.
pub struct Watched {
    work: Arc<Work>,
    seen: u64,
    pulse: Pulse,
}

impl Watched {
    pub fn new(work: Arc<Work>) -> Watched {
        Watched { work, seen: 0, pulse: Pulse::default() }
    }

    /// For how long it has been at the same step.
    pub fn stands_for(&mut self) -> Duration {
        let now = self.work.0.load(Ordering::Relaxed);
        if now != self.seen || now % 2 == 0 {
            self.seen = now;
            self.pulse.heard();
            return Duration::ZERO;
        }
        self.pulse.quiet_for()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_thread_that_never_ends_a_step_is_noticed_and_one_that_waits_or_goes_on_is_not() {
        let work = Arc::new(Work::default());
        let mut watched = Watched::new(work.clone());
        let (step, steps) = channel::<Duration>();
        let thread = std::thread::spawn(move || {
            for length in steps {
                work.step(|| std::thread::sleep(length));
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(watched.stands_for(), Duration::ZERO, "it waits");
        step.send(Duration::from_millis(300)).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(watched.stands_for(), Duration::ZERO, "it has just begun");
        std::thread::sleep(Duration::from_millis(50));
        assert!(watched.stands_for() >= Duration::from_millis(50), "it stands");
        drop(step);
        thread.join().unwrap();
        assert_eq!(watched.stands_for(), Duration::ZERO, "it waits again");
    }
}
