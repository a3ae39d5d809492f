//! A lock-free stack of small indices, for free frames and segment ids. Treiber's stack with a
//! 32-bit tag in the head against ABA; all memory is allocated and touched when it is made.
//!
//! The length is counted apart: `push` counts after the index is in, `pop` reserves from the count
//! before it takes, so that a pop which passed the count always finds an index.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

pub(crate) struct IndexStack {
    head: AtomicU64,
    len: AtomicU32,
    next: Box<[AtomicU32]>,
}

impl IndexStack {
    pub fn new(capacity: usize) -> IndexStack {
        // Written with a value other than zero, so that every page of it is touched now.
        let next = (0..capacity).map(|_| AtomicU32::new(u32::MAX)).collect();
        IndexStack { head: AtomicU64::new(0), len: AtomicU32::new(0), next }
    }

    pub fn len(&self) -> u32 {
        self.len.load(Ordering::Relaxed)
    }

    pub fn push(&self, index: u32) {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            self.next[index as usize].store(head as u32, Ordering::Relaxed);
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(index + 1);
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        self.len.fetch_add(1, Ordering::Release);
    }

    /// Takes an index if more than `keep` are there.
    pub fn pop(&self, keep: u32) -> Option<u32> {
        self.len
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| if n > keep { Some(n - 1) } else { None })
            .ok()?;
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let top = (head as u32).checked_sub(1).expect("the count was reserved, so the stack is not empty");
            let next = self.next[top as usize].load(Ordering::Relaxed);
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(next);
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(top),
                Err(now) => head = now,
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn threads_never_hold_the_same_index() {
        let s = IndexStack::new(8);
        (0..8).for_each(|i| s.push(i));
        let held = std::sync::Mutex::new(HashSet::new());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..if cfg!(miri) { 500 } else { 20_000 } {
                        if let Some(i) = s.pop(2) {
                            assert!(held.lock().unwrap().insert(i));
                            held.lock().unwrap().remove(&i);
                            s.push(i);
                        }
                    }
                });
            }
        });
        assert_eq!(s.len(), 8);
    }
}

#[cfg(all(test, loom))]
#[allow(clippy::arc_with_non_send_sync, reason = "whether the cell is shared rightly is what loom judges")]
mod models {
    use super::*;
    use crate::sync::model;
    use std::sync::Arc;

    /// Two threads take two each of three indices and put them back: nobody holds what the other
    /// holds, and a pop that passed the count finds an index. One that takes two and puts back the
    /// first makes the ABA: what was on top is on top again, over another.
    #[test]
    fn an_index_has_one_holder() {
        model(Some(4), || {
            let stack = Arc::new(IndexStack::new(3));
            (0..3).for_each(|i| stack.push(i));
            let held: Arc<[std::sync::atomic::AtomicBool; 3]> = Arc::default();
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (stack, held) = (stack.clone(), held.clone());
                    loom::thread::spawn(move || {
                        let taken = [stack.pop(0), stack.pop(0)].map(|i| {
                            let i = i? as usize;
                            assert!(!held[i].swap(true, Ordering::SeqCst), "index {i} is held twice");
                            Some(i)
                        });
                        for i in taken.into_iter().flatten() {
                            held[i].store(false, Ordering::SeqCst);
                            stack.push(i as u32);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().expect("a model's thread ends"));
            let mut all = [stack.pop(0), stack.pop(0), stack.pop(0), stack.pop(0)];
            all.sort_unstable();
            assert_eq!(all, [None, Some(0), Some(1), Some(2)]);
        });
    }

    /// What was counted in is there for whoever takes it off the count, and with it what its last
    /// holder did before.
    #[test]
    fn what_passes_the_count_is_there() {
        model(None, || {
            let stack = Arc::new(IndexStack::new(2));
            let page = Arc::new(loom::cell::UnsafeCell::new(0));
            let threads: Vec<_> = (0..2)
                .map(|i| {
                    let (stack, page) = (stack.clone(), page.clone());
                    loom::thread::spawn(move || {
                        if i == 0 {
                            page.with_mut(|_| ());
                            stack.push(0);
                        } else {
                            stack.push(1);
                            stack.pop(1);
                        }
                    })
                })
                .collect();
            if stack.pop(0) == Some(0) {
                page.with_mut(|_| ());
            }
            threads.into_iter().for_each(|t| t.join().expect("a model's thread ends"));
        });
    }
}
