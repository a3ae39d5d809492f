//! Crash points: places between two steps at which a test stops the process for good. With the
//! feature `crash-points` off, as in every build but those of `tests/crash_points.rs` and
//! `scripts/build-crash`, the macro leaves nothing behind.

#[cfg(feature = "crash-points")]
static HOOK: std::sync::OnceLock<fn(&'static str)> = std::sync::OnceLock::new();

/// Has `hook` called at every crash point from now on. The first call of this counts.
#[cfg(feature = "crash-points")]
pub fn set_hook(hook: fn(&'static str)) {
    // A later call changes nothing, as said.
    let _ = HOOK.set(hook);
}

#[cfg(feature = "crash-points")]
pub(crate) fn point(name: &'static str) {
    if let Some(hook) = HOOK.get() {
        hook(name);
    }
}

/// Here the process may be killed.
macro_rules! crash_point {
    ($name:literal) => {
        #[cfg(feature = "crash-points")]
        $crate::crash::point($name);
    };
}
