//! Keeps a process going while the machine has no memory but what it would free: nothing of it is paged out, it is not
//! the OOM killer's choice, and no memory that it asks for waits for swap.

use anyhow::{Context, Result};
use rustix::mm::{mlockall, MlockAllFlags};
use rustix::process::{configure_io_flusher_behavior, setrlimit, Resource, Rlimit};

/// So much of the stack is touched beforehand.
const STACK_BYTES: usize = 128 << 10;

/// For a process of one thread, which then asks for no more memory.
pub fn client() -> Result<()> {
    exempt()?;
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).context("cannot lock this process's memory")?;
    touch_stack();
    Ok(())
}

/// For one that starts threads, which inherit it, and maps an arena far larger than memory. What it asks for later is
/// locked as it is touched.
pub fn server() -> Result<()> {
    let why = "--lock-memory takes root's rights (CAP_IPC_LOCK, CAP_SYS_RESOURCE)";
    exempt().context(why)?;
    mlockall(MlockAllFlags::CURRENT)
        .and_then(|()| mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT))
        .context(why)?;
    touch_stack();
    Ok(())
}

fn exempt() -> Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "-1000").context("cannot exempt this process from the OOM killer")?;
    configure_io_flusher_behavior(true).context("cannot make this process an IO_FLUSHER")?;
    setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }).context("cannot raise RLIMIT_MEMLOCK")
}

#[inline(never)]
fn touch_stack() {
    let mut space = [0u8; STACK_BYTES];
    for at in (0..STACK_BYTES).step_by(4096) {
        space[at] = 1;
    }
    std::hint::black_box(&mut space);
}
