//! Verifiable pages for tests and benchmarks of a swap store.
//!
//! `pages` says what each page must hold, `area` owns the memory, `latency` counts times.
//! The binary `ghostswap-hog` joins the three; benches use `pages` alone.

pub mod area;
pub mod latency;
pub mod pages;
