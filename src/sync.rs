//! Atomics, fences and yielding as the lock-free code takes them: the standard library's, or, built
//! with `--cfg loom`, those of loom, which runs a model through every interleaving of its threads
//! and every value that a load may see by the memory model.
//!
//! What is only counted (lanes' counters, what growth holds) stays with the standard library: no
//! decision of the lock-free code rests on it.

pub(crate) use std::sync::atomic::Ordering;

#[cfg(not(loom))]
pub(crate) use std::{
    hint::spin_loop,
    sync::atomic::{fence, AtomicU32, AtomicU64},
    thread::yield_now,
};

#[cfg(loom)]
pub(crate) use loom::{
    hint::spin_loop,
    sync::atomic::{fence, AtomicU32, AtomicU64},
    thread::yield_now,
};

/// Time for a thread that is off its CPU to come back. Sleep, not yield: who spins takes from it the very time that it
/// waits for, and one of higher priority yields to nobody.
#[cfg(not(loom))]
pub(crate) fn nap() {
    std::thread::sleep(std::time::Duration::from_micros(100));
}

#[cfg(loom)]
pub(crate) use loom::thread::yield_now as nap;

/// Runs a model, by default with at most `preemptions` switches away from a thread that could go on
/// (loom's measure of depth; `LOOM_MAX_PREEMPTIONS` says otherwise). None: all there are.
#[cfg(all(test, loom))]
pub(crate) fn model(preemptions: Option<usize>, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    builder.max_branches = 20_000;
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = runs.clone();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let name = std::thread::current().name().unwrap_or("a model").to_string();
    println!("{name}: {} interleavings", runs.load(Ordering::Relaxed));
}
