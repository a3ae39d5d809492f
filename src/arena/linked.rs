//! A lock-free stack of numbers, from 1 up, whose links lie in the things that are numbered: it takes no memory of its
//! own, however many there might be. Treiber's, with a 32-bit tag in the head against ABA.
//!
//! Whoever takes one reads the link of what is on top, which another may have taken and be using by then: so a link is
//! a word that may be read at any time, whatever it holds, and the tag makes that exchange fail.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

pub(super) struct Linked {
    head: AtomicU64,
    len: AtomicU32,
}

impl Linked {
    pub fn new() -> Linked {
        Linked { head: AtomicU64::new(0), len: AtomicU32::new(0) }
    }

    pub fn len(&self) -> u32 {
        self.len.load(Ordering::Relaxed)
    }

    /// Puts a number on top; `link` stores, beside it, the one below, or 0.
    pub fn push(&self, n: u32, link: impl Fn(u32)) {
        // Counted first: the count may run ahead of the stack but never below zero.
        self.len.fetch_add(1, Ordering::Relaxed);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            link(head as u32);
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(n);
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes the number on top; `next` reads what `link` stored beside it.
    pub fn pop(&self, next: impl Fn(u32) -> u32) -> Option<u32> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let top = head as u32;
            if top == 0 {
                return None;
            }
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(next(top));
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.len.fetch_sub(1, Ordering::Relaxed);
                    return Some(top);
                }
                Err(now) => head = now,
            }
        }
    }
}
