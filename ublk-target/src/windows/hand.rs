//! `swapon` and `swapoff`: windows by hand. Opening is asked of the agent; swapping off is done by the
//! command itself, so that it shows how far it is and is broken off by ending the command.

use super::retreat::{Progress as Step, Retreat};
use super::{areas, Swaps, PAGE_BYTES};
use crate::control::{self, Request, SwapOn};
use crate::progress::Progress;
use crate::unit::check_room;
use anyhow::{anyhow, bail, Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

const STEP: Duration = Duration::from_millis(20);
/// Has the device used as swap.
pub fn swap_on(id: u32, what: SwapOn) -> Result<()> {
    if what == SwapOn::Whole {
        eprintln!(
            "ghostswap-ublk: warning: as one area, swap looks free to the kernel even when the store is full; \
             windows (the default) do not promise what cannot be kept"
        );
    }
    match control::ask(id, &Request::SwapOn { what })? {
        Some(answer) if answer.ok => Ok(()),
        Some(answer) => bail!("{}", answer.error.unwrap_or_else(|| "the daemon refused".into())),
        None => bail!("no such device: ublkb{id}"),
    }
}

/// Swaps off one window, or all of a device, the last opened first. `rate`: bytes a second at most.
pub fn swap_off(id: u32, number: Option<u32>, rate: Option<u64>) -> Result<()> {
    let disk = PathBuf::from(format!("/dev/ublkb{id}"));
    let mut swaps = Swaps::new()?;
    let all = swaps.areas()?;
    let mine = |path: &str| control::lists_swap(path, &disk);
    let mut out: Vec<_> = all.iter().filter(|a| mine(&a.path)).cloned().collect();
    if let Some(number) = number {
        let wanted = areas::node(&disk, number);
        out.retain(|a| Path::new(&a.path) == wanted);
        if out.is_empty() {
            bail!("{} is no swap area", wanted.display());
        }
    }
    let paths: Vec<String> = out.iter().map(|a| a.path.clone()).collect();
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    check_room(&read("/proc/swaps")?, &read("/proc/meminfo")?, &paths)
        .map_err(|why| anyhow!("{} stays in use: {why}", disk.display()))?;
    // From now on nobody else opens or closes any. Without a daemon nobody does.
    match control::ask(id, &Request::SwapOff {})? {
        Some(answer) if !answer.ok => bail!("{}", answer.error.unwrap_or_else(|| "the daemon refused".into())),
        _ => {}
    }
    out.sort_by_key(|a| a.priority);
    for area in &out {
        let done = retreat(&mut swaps, &area.path, rate.map(|r| (r / PAGE_BYTES).max(1)));
        done.with_context(|| format!("{} stays in use", area.path))?;
        let window = area.path.strip_prefix(&*disk.to_string_lossy()).and_then(|p| p.strip_prefix('p'));
        if let Some(number) = window.and_then(|n| n.parse().ok()) {
            areas::drop_window(&disk, number)?;
        }
    }
    Ok(())
}

fn retreat(swaps: &mut Swaps, path: &str, rate: Option<u64>) -> Result<()> {
    let mut retreat = Retreat::new(Path::new(path), rate)?;
    let what = format!("swapoff {path}");
    let mut shown = Progress::new(&what);
    loop {
        let used = swaps.areas()?.iter().find(|a| a.path == path).map_or(0, |a| a.used);
        let over = retreat.step(used)? == Step::Over;
        shown.tell(if over { 0 } else { used * PAGE_BYTES }, over);
        if over {
            return Ok(());
        }
        std::thread::sleep(STEP);
    }
}
