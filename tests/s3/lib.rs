//! Nothing: what there is are the tests, `tests/tier.rs`.
