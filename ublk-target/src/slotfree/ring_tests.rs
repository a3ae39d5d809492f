//! The ring against a kernel made here: records that wrap, are busy or discarded, nonsense, two that
//! drain; and the order of writes and freed slots, in every interleaving of a small case and under
//! threads.

use super::*;

/// A ring and the kernel's end of it.
struct Kernel {
    consumer: AtomicU64,
    producer: AtomicU64,
    data: Vec<AtomicU64>,
}

impl Kernel {
    fn new(words: usize) -> Kernel {
        let data = (0..words).map(|_| AtomicU64::new(0)).collect();
        Kernel { consumer: AtomicU64::new(0), producer: AtomicU64::new(0), data }
    }

    fn ring(&self) -> Ring<'_> {
        Ring::new(&self.consumer, &self.producer, &self.data)
    }

    fn put(&self, at: u64, word: u64) {
        self.data[(at / WORD) as usize % self.data.len()].store(word, Ordering::Release);
    }

    /// As `bpf_ringbuf_output` begins; None: no room.
    fn reserve(&self, freed: Freed) -> Option<u64> {
        let at = self.producer.load(Ordering::Relaxed);
        let room = self.data.len() as u64 * WORD - (at - self.consumer.load(Ordering::Acquire));
        if room < 16 {
            return None;
        }
        self.put(at, 8 | u64::from(BUSY));
        self.producer.store(at + 16, Ordering::Release);
        self.put(at + 8, freed.page | freed.count << PAGE_BITS);
        Some(at)
    }

    fn submit(&self, at: u64) {
        self.put(at, 8);
    }

    fn tell(&self, page: u64, count: u64) -> bool {
        self.reserve(Freed { page, count }).map(|at| self.submit(at)).is_some()
    }
}

fn drained(ring: &Ring<'_>, budget: u64) -> (Drained, Vec<u64>) {
    let mut pages = Vec::new();
    let (ended, tally) = ring.drain(budget, |freed| pages.push(freed.page));
    assert_eq!(tally.events, pages.len() as u64);
    (ended, pages)
}

#[test]
fn records_come_in_order_however_often_the_ring_wraps() {
    let kernel = Kernel::new(16);
    let ring = kernel.ring();
    assert_eq!(drained(&ring, 9), (Drained::All, vec![]));
    for n in 0..100 {
        assert!(kernel.tell(4 * n, 1) && kernel.tell(4 * n + 2, 1));
        assert_eq!(drained(&ring, 9), (Drained::All, vec![4 * n, 4 * n + 2]));
    }
    assert!((0..8).all(|n| kernel.tell(2 * n, 1)) && !kernel.tell(16, 1), "128 bytes take eight records of 16");
    assert_eq!(drained(&ring, 9).1, [0, 2, 4, 6, 8, 10, 12, 14]);
}

#[test]
fn a_busy_record_holds_up_those_behind_it() {
    let kernel = Kernel::new(16);
    let ring = kernel.ring();
    kernel.tell(1, 1);
    let busy = kernel.reserve(Freed { page: 3, count: 1 }).unwrap();
    kernel.tell(5, 1);
    let gate = ring.gate();
    assert_eq!(drained(&ring, 9), (Drained::Busy, vec![1]));
    assert_eq!(drained(&ring, 9), (Drained::Busy, vec![]));
    assert!(!ring.passed(gate));
    kernel.submit(busy);
    assert_eq!(drained(&ring, 9), (Drained::All, vec![3, 5]));
    assert!(ring.passed(gate));
}

#[test]
fn discarded_and_short_records_are_passed_over() {
    let kernel = Kernel::new(16);
    let ring = kernel.ring();
    let at = kernel.reserve(Freed { page: 1, count: 1 }).unwrap();
    kernel.put(at, 8 | u64::from(DISCARDED));
    kernel.put(16, 4);
    kernel.producer.store(16 + 16, Ordering::Release);
    kernel.tell(3, 1);
    assert_eq!(drained(&ring, 9), (Drained::All, vec![3]));
}

#[test]
fn the_budget_is_in_pages_and_the_rest_stays() {
    let kernel = Kernel::new(64);
    let ring = kernel.ring();
    (0..6).for_each(|n| assert!(kernel.tell(n, 10)));
    assert_eq!(drained(&ring, 25), (Drained::More, vec![0, 1, 2]));
    let gate = ring.gate();
    assert!(!ring.passed(gate));
    assert_eq!(drained(&ring, 1), (Drained::More, vec![3]));
    assert_eq!(drained(&ring, u64::MAX), (Drained::All, vec![4, 5]));
    assert!(ring.passed(gate));
}

#[test]
fn positions_that_cannot_be_are_not_followed() {
    let kernel = Kernel::new(16);
    let ring = kernel.ring();
    kernel.producer.store(1 << 40, Ordering::Release);
    assert_eq!(drained(&ring, 9), (Drained::All, vec![]));
    assert!(ring.passed(ring.gate()));
    kernel.tell(7, (1 << 24) - 1);
    kernel.tell(8, (1 << 24) - 1);
    assert_eq!(drained(&ring, 9).1, [7]);
    assert_eq!(drained(&ring, 9).1, [8]);
}

#[test]
fn one_drains_and_the_other_does_not_wait() {
    let kernel = Kernel::new(16);
    let ring = kernel.ring();
    kernel.tell(1, 1);
    ring.drain(9, |_| assert_eq!(drained(&ring, 9), (Drained::Elsewhere, vec![])));
    assert_eq!(drained(&ring, 9), (Drained::All, vec![]));
}

#[test]
fn what_a_dead_worker_applied_is_applied_again_and_nothing_else() {
    let kernel = Kernel::new(64);
    kernel.tell(1, 1);
    kernel.tell(3, 1);
    let died = kernel.ring();
    let dying = || {
        died.drain(9, |freed| assert!(freed.page != 3, "killed here"));
    };
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(dying)).is_err());
    assert!(!died.passed(1), "the position moves on after the last of a batch");
    assert_eq!(drained(&kernel.ring(), 9), (Drained::All, vec![1, 3]));
}

#[test]
fn what_follows_one_another_is_applied_as_one() {
    let kernel = Kernel::new(64);
    let ring = kernel.ring();
    for (page, count) in [(5, 1), (6, 2), (8, 1), (20, 1), (4, 1), (5, 1)] {
        kernel.tell(page, count);
    }
    let mut applied = Vec::new();
    let (ended, tally) = ring.drain(9, |freed| {
        assert!(!ring.passed(16), "before the position moves on");
        applied.push((freed.page, freed.count));
    });
    assert_eq!((ended, tally), (Drained::All, Tally { events: 6, pages: 7 }));
    assert_eq!(applied, [(5, 4), (20, 1), (4, 2)]);
    assert!(ring.passed(ring.gate()));
    // What the budget cuts off is applied, and so is what a busy record follows.
    kernel.tell(1, 4);
    kernel.tell(5, 4);
    assert_eq!(drained(&ring, 4), (Drained::More, vec![1]));
    kernel.reserve(Freed { page: 9, count: 1 }).unwrap();
    assert_eq!(drained(&ring, 9), (Drained::Busy, vec![5]));
}

/// One slot, its lives one after the other: the kernel frees it, gives it out again, writes it and
/// waits for the answer. Two queues: one has the write, the other drains. Each step of each is tried
/// in every order; a kill of the worker in the middle as well.
mod every_order {
    #[derive(Clone)]
    struct World {
        /// Positions of events told, of which so many are complete.
        told: u64,
        complete: u64,
        consumer: u64,
        /// What the slot holds: the number of the life that wrote it; 0: nothing.
        slot: u64,
        /// The kernel's step within a life, and which life it is.
        kernel: u8,
        life: u64,
        /// The write under way: its gate; None: not fetched.
        gate: Option<u64>,
        answered: bool,
        /// Who drains (1 the writing queue, 2 the other) and up to where it has applied.
        drains: u8,
        applied: u64,
        kills: u8,
    }

    const LIVES: u64 = 3;

    impl World {
        fn steps(&self, gated: bool) -> Vec<World> {
            let mut next = Vec::new();
            let mut step = |change: &dyn Fn(&mut World)| {
                let mut w = self.clone();
                change(&mut w);
                next.push(w);
            };
            // The kernel: tells of the slot's end, completes the record, gives the slot out again.
            match self.kernel {
                0 if self.life < LIVES => step(&|w| (w.kernel, w.told) = (1, w.told + 1)),
                1 => step(&|w| (w.kernel, w.complete) = (2, w.told)),
                2 => step(&|w| (w.kernel, w.life, w.gate, w.answered) = (3, w.life + 1, None, false)),
                // The write is under way until it is answered; then the slot may be freed at any time.
                3 if self.answered => step(&|w| w.kernel = 0),
                _ => {}
            }
            let writing = self.kernel == 3 && !self.answered;
            if writing && self.gate.is_none() {
                step(&|w| w.gate = Some(w.told));
            }
            if writing && self.gate.is_some_and(|gate| !gated || self.consumer >= gate) {
                step(&|w| (w.slot, w.answered) = (w.life, true));
            }
            for who in [1, 2] {
                if self.drains == 0 && self.consumer < self.complete {
                    step(&|w| (w.drains, w.applied) = (who, w.consumer));
                }
                if self.drains == who && self.applied < self.complete {
                    step(&|w| (w.slot, w.applied) = (0, w.applied + 1));
                }
                if self.drains == who && self.applied > self.consumer {
                    step(&|w| (w.consumer, w.drains) = (w.applied, 0));
                }
            }
            if self.kills > 0 {
                // The flag and what was fetched die; position and slot stay; the write comes again.
                step(&|w| (w.kills, w.drains, w.gate) = (w.kills - 1, 0, None));
            }
            next
        }

        /// While a life goes on and its write was answered, the slot holds what it wrote.
        fn right(&self) -> bool {
            !(self.kernel == 3 && self.answered) || self.slot == self.life
        }

        fn key(&self) -> impl std::hash::Hash + Eq {
            let a = (self.told, self.complete, self.consumer, self.slot, self.kernel, self.life);
            (a, self.gate, self.answered, self.drains, self.applied, self.kills)
        }
    }

    /// Whether every reachable state is right, and how many there are.
    fn explore(gated: bool) -> (bool, usize) {
        let start = World {
            told: 0,
            complete: 0,
            consumer: 0,
            slot: 7,
            kernel: 0,
            life: 0,
            gate: None,
            answered: false,
            drains: 0,
            applied: 0,
            kills: 2,
        };
        let (mut seen, mut open) = (std::collections::HashSet::new(), vec![start]);
        while let Some(world) = open.pop() {
            if !world.right() {
                return (false, seen.len());
            }
            open.extend(world.steps(gated).into_iter().filter(|w| seen.insert(w.key())));
        }
        (true, seen.len())
    }

    #[test]
    fn a_slot_used_again_keeps_its_page() {
        let (right, states) = explore(true);
        assert!(right && states > 100, "{states} states");
    }

    #[test]
    fn without_the_gate_it_does_not() {
        assert!(!explore(false).0);
    }
}

/// The same with the real ring and threads: two kernels that free, reuse and write slots, and the queues
/// that serve them.
#[test]
fn slots_used_again_keep_their_pages_under_threads() {
    use std::sync::atomic::AtomicU64 as Slot;
    const SLOTS: usize = 4;
    const LIVES: u64 = 20_000;
    let kernel = Kernel::new(64);
    let ring = kernel.ring();
    let producers = std::sync::Mutex::new(());
    let store: Vec<Slot> = (0..2 * SLOTS).map(|_| Slot::new(0)).collect();
    let clear = |freed: Freed| {
        let range = freed.page as usize..(freed.page + freed.count) as usize;
        store[range].iter().for_each(|s| s.store(0, Ordering::Relaxed));
    };
    let queue = |which: usize| {
        for life in 1..=LIVES {
            let slot = which * SLOTS + life as usize % SLOTS;
            // The last life ends; the kernel tells, or finds no room.
            {
                let _turn = producers.lock().unwrap();
                kernel.tell(slot as u64, 1);
            }
            // The next one's write is fetched, waits at its gate, and is stored.
            let gate = ring.gate();
            while !ring.passed(gate) {
                ring.drain(3, clear);
                std::thread::yield_now();
            }
            store[slot].store(life, Ordering::Relaxed);
            ring.drain(1, clear);
            assert_eq!(store[slot].load(Ordering::Relaxed), life, "slot {slot} lost its page");
        }
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(|| queue(0)), scope.spawn(|| queue(1))];
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}
