//! Quiescent-state reclamation: who may still be looking at memory that was taken out of use.
//!
//! A lane announces the current epoch before it loads a slot or a link, and clears it when it
//! holds none any more. The cleaner takes a segment or a node out of reach first, then advances
//! the epoch and waits until every lane is outside or has announced the new epoch.
//!
//! Why that is enough: `enter` stores the announcement and then issues a SeqCst fence before any
//! load; `wait` issues one between the unlinking and its scan. So either the scan sees the
//! announcement (and waits), or the lane's loads come after the unlinking (and cannot find what
//! was unlinked). The scan may see the next announcement instead of the leaving before it: so both
//! are Release, and either tells that what the lane read until then was read before.
//! A lane never blocks inside an epoch: it neither sleeps nor waits for memory.

use crate::sync::{fence, spin_loop, AtomicU64, Ordering};

#[repr(align(128))]
struct Announced(AtomicU64);

pub(crate) struct Epochs {
    global: AtomicU64,
    lanes: Box<[Announced]>,
}

const OUTSIDE: u64 = 0;

impl Epochs {
    pub fn new(lanes: usize) -> Epochs {
        Epochs { global: AtomicU64::new(1), lanes: (0..lanes).map(|_| Announced(AtomicU64::new(OUTSIDE))).collect() }
    }

    pub fn enter(&self, lane: usize) {
        let now = self.global.load(Ordering::Relaxed);
        self.lanes[lane].0.store(now, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    pub fn leave(&self, lane: usize) {
        self.lanes[lane].0.store(OUTSIDE, Ordering::Release);
    }

    /// Returns once nobody can hold what was unlinked before the call; calls `pause` between looks
    /// at a lane that takes its time.
    pub fn wait(&self, pause: impl Fn()) {
        let target = self.global.fetch_add(1, Ordering::AcqRel) + 1;
        fence(Ordering::SeqCst);
        for lane in &self.lanes {
            let mut spins = 0u32;
            loop {
                let seen = lane.0.load(Ordering::Acquire);
                if seen == OUTSIDE || seen >= target {
                    break;
                }
                spins += 1;
                if spins < 64 {
                    spin_loop();
                } else {
                    pause();
                }
            }
        }
    }
}

#[cfg(all(test, loom))]
#[allow(clippy::arc_with_non_send_sync, reason = "whether the cell is shared rightly is what loom judges")]
mod models {
    use super::*;
    use crate::sync::model;
    use loom::cell::UnsafeCell;
    use std::sync::Arc;

    /// Lanes read what a link leads to, within an epoch each time; the link is cut, and after a
    /// grace period what it led to is written anew.
    fn reuse(preemptions: Option<usize>, lanes: usize, visits: usize) {
        model(preemptions, move || {
            let epochs = Arc::new(Epochs::new(lanes));
            let link = Arc::new(AtomicU64::new(1));
            let page = Arc::new(UnsafeCell::new(0));
            let threads: Vec<_> = (0..lanes)
                .map(|lane| {
                    let (epochs, link, page) = (epochs.clone(), link.clone(), page.clone());
                    loom::thread::spawn(move || {
                        for _ in 0..visits {
                            epochs.enter(lane);
                            if link.load(Ordering::Acquire) == 1 {
                                page.with(|_| ());
                            }
                            epochs.leave(lane);
                        }
                    })
                })
                .collect();
            link.store(0, Ordering::Release);
            epochs.wait(crate::sync::yield_now);
            page.with_mut(|_| ());
            threads.into_iter().for_each(|t| t.join().expect("a model's thread ends"));
        });
    }

    #[test]
    fn nothing_is_reused_under_a_lane() {
        reuse(None, 1, 2);
    }

    #[test]
    fn nothing_is_reused_under_two_lanes() {
        reuse(Some(3), 2, 2);
    }
}
