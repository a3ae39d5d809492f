//! Quiescent-state reclamation: who may still be looking at memory that was taken out of use.
//!
//! A lane announces the current epoch before it loads a slot or a link, and clears it when it
//! holds none any more. The cleaner takes a segment or a node out of reach first, then advances
//! the epoch and waits until every lane is outside or has announced the new epoch.
//!
//! Why that is enough: `enter` stores the announcement and then issues a SeqCst fence before any
//! load; `wait` issues one between the unlinking and its scan. So either the scan sees the
//! announcement (and waits), or the lane's loads come after the unlinking (and cannot find what
//! was unlinked). A lane never blocks inside an epoch: it neither sleeps nor waits for memory.

use crate::sync::{fence, spin_loop, yield_now, AtomicU64, Ordering};

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
        self.lanes[lane].0.store(now, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub fn leave(&self, lane: usize) {
        self.lanes[lane].0.store(OUTSIDE, Ordering::Release);
    }

    /// Returns once nobody can hold what was unlinked before the call.
    pub fn wait(&self) {
        fence(Ordering::SeqCst);
        let target = self.global.fetch_add(1, Ordering::SeqCst) + 1;
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
                    yield_now();
                }
            }
        }
    }
}
