//! Swap windows: consecutive ranges of the ghost device, given to the kernel as swap areas one after
//! another, so that swap is as large as it is used and not as large as its label.
//!
//! A stock kernel pays for the size of a swap area and takes free swap for swap that works. So windows
//! are opened before free swap runs short, as far as the store can keep what they promise
//! (`capacity.rs`), and closed when they are of no use (`policy.rs`). What is open is read from the
//! kernel (`areas.rs`) at each look, so take-overs, upgrades and agents that come and go change nothing.
//! Whether windows are kept at all is a word on the board.
//!
//! [`Keeper::look`] runs in a thread of the agent that may wait for memory and that nobody waits for:
//! opening asks the kernel for some, while there still is swap to get it by. Swapping off runs in
//! processes of its own (`retreat.rs`). By hand: `hand.rs`.
//!
//! If a window is swapped off by somebody else (`swapoff -a`, a shutdown), no more are opened: two
//! that fight over swap would be worse than either.

mod areas;
mod capacity;
mod hand;
mod policy;
mod retreat;
#[cfg(test)]
mod simulation;

pub use areas::Swaps;
pub use capacity::{Held, Published};
pub use hand::{swap_off, swap_on};

use crate::board::Shared;
use crate::control::SwapOn;
use crate::slotfree::Mode;
use anyhow::{bail, Context, Result};
use areas::{Area, Kept, TooManyAreas};
use ghostswap::config::format_size;
use policy::{Choice, Policy, View, Window};
use retreat::{Progress, Retreat};
use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the board says of windows: none are opened or closed.
const BY_HAND: u64 = 0;
/// They are kept.
const KEPT: u64 = 1;
/// How often to look, while swap is used more and more, and otherwise.
const LOOK_BUSY: Duration = Duration::from_millis(50);
const LOOK_CALM: Duration = Duration::from_millis(200);
/// Partitions are listed anew this often, in case something else has changed them.
const LIST_EVERY: Duration = Duration::from_secs(5);
/// How long the worker may take to tell what it holds.
const FIGURES_PATIENCE: Duration = Duration::from_secs(1);
/// After something failed.
const LOOK_AFTER_FAILURE: Duration = Duration::from_secs(1);
/// Pages a second that a window is swapped off at when nobody waits for it: 64 MiB.
const RATE: u64 = 64 << 8;
/// Tasks waited for memory for this share of the last ten seconds.
const PRESSURE_PERCENT: f64 = 5.0;

/// Keeps a device's windows.
pub struct Keeper {
    disk: PathBuf,
    shared: Arc<Shared>,
    priority: i32,
    began: Instant,
    swaps: Swaps,
    meminfo: Kept,
    /// Not every kernel tells.
    pressure: Option<Kept>,
    size: Kept,
    partitions: Vec<Window>,
    listed: Option<Instant>,
    policy: Policy,
    retreat: Option<(u32, Retreat)>,
    /// Windows that were open at the last look.
    known: Vec<u32>,
    /// The kernel refused another area.
    full: bool,
    /// The last thing that failed, told once.
    told: String,
}

impl Keeper {
    /// Looks at nothing yet.
    pub fn new(disk: &Path, shared: Arc<Shared>, priority: i32) -> Result<Keeper> {
        Ok(Keeper {
            disk: disk.into(),
            shared,
            priority,
            began: Instant::now(),
            swaps: Swaps::new()?,
            meminfo: Kept::open(Path::new(MEMINFO))?,
            pressure: Kept::open(Path::new("/proc/pressure/memory")).ok(),
            size: Kept::open(&areas::size_file(disk)?)?,
            partitions: Vec::new(),
            listed: None,
            policy: Policy::default(),
            retreat: None,
            known: Vec::new(),
            full: false,
            told: String::new(),
        })
    }

    /// Looks, does at most one thing, and says when to look again.
    pub fn look(&mut self) -> Duration {
        if self.shared.board.windows.load(Ordering::Relaxed) != KEPT {
            self.retreat = None;
            self.known.clear();
            return LOOK_CALM;
        }
        match self.act() {
            Ok(busy) if busy => LOOK_BUSY,
            Ok(_) => LOOK_CALM,
            Err(e) => {
                self.tell(format!("{e:#}"));
                LOOK_AFTER_FAILURE
            }
        }
    }

    /// True: there may soon be more to do.
    fn act(&mut self) -> Result<bool> {
        let all = self.swaps.areas()?;
        let windows = self.windows(&all)?;
        let closing = self.retreat.as_ref().map(|(number, _)| *number);
        let gone = |n: &&u32| windows.iter().all(|w| w.number != **n) && closing != Some(**n);
        if let Some(number) = self.known.iter().find(gone) {
            tracing::warn!("window {number} was swapped off by somebody else: no more are opened or closed");
            self.shared.board.windows.store(BY_HAND, Ordering::Relaxed);
            return Ok(false);
        }
        self.known = windows.iter().map(|w| w.number).collect();
        self.drop_strays(&windows, closing)?;
        let choice = self.choose(&windows, closing)?;
        match choice {
            Choice::Stay => {}
            Choice::Open(window) => self.open(&window)?,
            Choice::Close(number) => self.begin_retreat(number)?,
            Choice::Cancel => {
                tracing::info!("window {} stays: it is needed", closing.unwrap_or(0));
                self.retreat = None;
                self.policy.disturbed();
            }
        }
        self.go_on_retreating(&windows)?;
        Ok(self.retreat.is_some() || self.policy.busy())
    }

    fn windows(&mut self, all: &[Area]) -> Result<Vec<Window>> {
        let unknown = |a: &Area| {
            let number =
                a.path.strip_prefix(&*self.disk.to_string_lossy()).and_then(|p| p.strip_prefix('p')?.parse().ok());
            number.is_some_and(|n: u32| self.partitions.iter().all(|p| p.number != n))
        };
        if self.listed.is_none_or(|at| at.elapsed() >= LIST_EVERY) || all.iter().any(unknown) {
            self.partitions = areas::partitions(&self.disk)?;
            self.listed = Some(Instant::now());
        }
        Ok(areas::windows(&self.disk, &self.partitions, all))
    }

    /// A partition that is no swap area is what an opening or a closing left that was broken off.
    fn drop_strays(&mut self, windows: &[Window], closing: Option<u32>) -> Result<()> {
        let known = |number| windows.iter().any(|w| w.number == number) || closing == Some(number);
        let stray = |number: &u32| !known(*number) && areas::is_ours(&self.disk, *number);
        if let Some(number) = self.partitions.iter().map(|p| p.number).find(stray) {
            self.listed = None;
            areas::drop_window(&self.disk, number)?;
        }
        Ok(())
    }

    fn choose(&mut self, windows: &[Window], closing: Option<u32>) -> Result<Choice> {
        let figures = self.figures(windows)?;
        let view = View { windows, partitions: &self.partitions, closing, ..figures };
        Ok(self.policy.choose(&view))
    }

    /// What the policy goes by, but for windows and partitions.
    fn figures(&mut self, windows: &[Window]) -> Result<View<'static>> {
        let memory = Memory::of(self.meminfo.read()?);
        let used = windows.iter().map(|w| w.used).sum();
        Ok(View {
            now: self.began.elapsed(),
            device: self.device_pages()?,
            ram: memory.total,
            available: memory.available,
            fits: capacity::fits(self.shared.board.held.get(), used, memory.swappable() * PAGE_BYTES),
            may_open: !self.full,
            pressure: self.pressure.as_mut().and_then(|p| p.read().ok().map(some_avg10)) >= Some(PRESSURE_PERCENT),
            priority: self.priority,
            ..View::default()
        })
    }

    fn device_pages(&mut self) -> Result<u64> {
        Ok(self.size.read()?.trim().parse::<u64>()? / SECTORS_PER_PAGE)
    }

    fn open(&mut self, window: &Window) -> Result<()> {
        self.listed = None;
        match areas::open(&self.disk, window, self.discards()) {
            Ok(()) => {
                self.known.push(window.number);
                let (number, size) = (window.number, format_size(window.pages * PAGE_BYTES));
                tracing::info!("window {number} is open: {size}, priority {}", window.priority);
                Ok(())
            }
            Err(e) if e.is::<TooManyAreas>() => {
                self.full = true;
                Err(e)
            }
            Err(e) => Err(e).with_context(|| format!("window {} cannot be opened", window.number)),
        }
    }

    /// Whether the kernel is to tell by discards what is free: it then takes fresh clusters before
    /// half-empty ones.
    fn discards(&self) -> bool {
        self.shared.slot_free().0 == Mode::Discard
    }

    fn begin_retreat(&mut self, number: u32) -> Result<()> {
        self.retreat = Some((number, Retreat::new(&areas::node(&self.disk, number), Some(RATE))?));
        Ok(())
    }

    fn go_on_retreating(&mut self, windows: &[Window]) -> Result<()> {
        let Some((number, retreat)) = &mut self.retreat else { return Ok(()) };
        let number = *number;
        let used = windows.iter().find(|w| w.number == number).map_or(0, |w| w.used);
        match retreat.step(used) {
            Ok(Progress::Going) => Ok(()),
            Ok(Progress::Over) => {
                self.retreat = None;
                self.full = false;
                self.listed = None;
                self.known.retain(|n| *n != number);
                areas::drop_window(&self.disk, number)?;
                tracing::info!("window {number} is closed");
                Ok(())
            }
            Err(e) => {
                self.retreat = None;
                self.policy.disturbed();
                Err(e).with_context(|| format!("window {number} stays"))
            }
        }
    }

    /// Carries out `swapon`: has windows kept, opens one more, or gives the kernel the whole device.
    pub fn swap_on(&mut self, what: SwapOn) -> Result<()> {
        let all = self.swaps.areas()?;
        let disk = self.disk.display().to_string();
        if all.iter().any(|a| a.path == disk) {
            bail!("{disk} is in use as one swap area");
        }
        self.listed = None;
        let windows = self.windows(&all)?;
        if windows.is_empty() {
            self.wait_for_figures();
            areas::check_free(&self.disk, self.shared.board.held.get().pages)?;
        }
        match what {
            SwapOn::Windows => {
                self.full = false;
                self.shared.board.windows.store(KEPT, Ordering::Relaxed);
                let done = self.act();
                if windows.is_empty() && self.known.is_empty() {
                    self.let_go();
                    done?;
                    bail!("{disk} or its store is too small for a window");
                }
                Ok(())
            }
            SwapOn::Window(bytes) => {
                let figures = self.figures(&windows)?;
                let view = View { windows: &windows, partitions: &self.partitions, ..figures };
                match policy::place_exactly(&view, bytes / PAGE_BYTES) {
                    Some(window) => self.open(&window),
                    None => bail!("{disk} has no room for a window of {}", format_size(bytes)),
                }
            }
            SwapOn::Whole => {
                if !windows.is_empty() {
                    bail!("{disk} has windows: swap them off first, with ghostswap-ublk swapoff");
                }
                self.shared.board.windows.store(BY_HAND, Ordering::Relaxed);
                let pages = self.device_pages()?.min(u32::MAX.into());
                areas::swap_on(&self.disk, pages, self.priority, self.discards())
            }
        }
    }

    /// The worker publishes what it holds within a fifth of a second of its going live, and of a change.
    fn wait_for_figures(&self) {
        let began = Instant::now();
        let known = || {
            let held = self.shared.board.held.get();
            held.limit_bytes > 0 && held.pages <= 1
        };
        while began.elapsed() < FIGURES_PATIENCE && !known() {
            std::thread::sleep(LOOK_BUSY);
        }
    }

    /// No more windows are opened or closed; one that is being closed stays.
    pub fn let_go(&mut self) {
        self.shared.board.windows.store(BY_HAND, Ordering::Relaxed);
        self.retreat = None;
        self.known.clear();
    }

    fn tell(&mut self, what: String) {
        if what != self.told {
            tracing::warn!("{what}");
            self.told = what;
        }
    }
}

const PAGE_BYTES: u64 = 4096;
const SECTORS_PER_PAGE: u64 = 8;
const MEMINFO: &str = "/proc/meminfo";

/// Of /proc/meminfo, in pages.
struct Memory {
    total: u64,
    available: u64,
    anonymous: u64,
}

impl Memory {
    fn of(meminfo: &str) -> Memory {
        let pages = |key: &str| {
            let line = meminfo.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
            line.and_then(|l| l.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 4
        };
        let anonymous = pages("Active(anon)") + pages("Inactive(anon)");
        Memory { total: pages("MemTotal"), available: pages("MemAvailable"), anonymous }
    }

    /// What could be turned into store: available or swapped out, less a 32nd to live on.
    fn swappable(&self) -> u64 {
        (self.available + self.anonymous).saturating_sub(self.total / 32)
    }
}

/// Percent of the last ten seconds in which some task waited for memory, of /proc/pressure/memory.
fn some_avg10(text: &str) -> f64 {
    let some = text.lines().find_map(|l| l.strip_prefix("some "));
    some.and_then(|l| l.split(' ').find_map(|w| w.strip_prefix("avg10="))?.parse().ok()).unwrap_or(0.0)
}

/// What status tells of a device's swap: its JSON form and lines for people. Pages by the kernel's count.
pub fn describe(disk: &Path, shared: &Shared) -> Result<(Value, String)> {
    let all = Swaps::new()?.areas()?;
    let mut areas = areas::windows(disk, &areas::partitions(disk)?, &all);
    let path = disk.display().to_string();
    let whole = all.iter().find(|a| a.path == path);
    areas.extend(whole.map(|a| Window { number: 0, start: 0, pages: a.pages + 1, used: a.used, priority: a.priority }));
    let sum = |f: fn(&Window) -> u64| areas.iter().map(f).sum::<u64>();
    let (pages, used) = (sum(|w| w.pages), sum(|w| w.used));
    let held = shared.board.held.get();
    let kept = shared.board.windows.load(Ordering::Relaxed) == KEPT;
    let mode = match (kept, whole.is_some(), areas.is_empty()) {
        (true, ..) => "windows",
        (_, true, _) => "whole",
        (_, _, true) => "off",
        _ => "by hand",
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cost = capacity::kernel_cost(&release, pages, used);
    let memory = Memory::of(&std::fs::read_to_string(MEMINFO)?);
    let more = capacity::fits(held, used, memory.swappable() * PAGE_BYTES);
    // Outside any swap area a stored page is somebody's data.
    let dead = if areas.is_empty() { 0 } else { held.pages.saturating_sub(used) };
    let area = |w: &Window| {
        let path = if w.number == 0 { disk.to_owned() } else { areas::node(disk, w.number) };
        json!({"path": path, "size_bytes": w.pages * PAGE_BYTES, "used_bytes": w.used * PAGE_BYTES, "priority": w.priority})
    };
    let value = json!({
        "mode": mode,
        "areas": areas.iter().map(area).collect::<Vec<_>>(),
        "area_bytes": pages * PAGE_BYTES,
        "used_bytes": used * PAGE_BYTES,
        "live_pages": held.pages - dead,
        "dead_pages": dead,
        "kernel_bytes_estimated": cost,
        "room_bytes_estimated": more * PAGE_BYTES,
    });
    let size = |pages: u64| format_size(pages * PAGE_BYTES);
    let mut text =
        format!("swap      {mode}: {} areas of {}, {} used by the kernel\n", areas.len(), size(pages), size(used));
    for w in &areas {
        let node = if w.number == 0 { path.clone() } else { areas::node(disk, w.number).display().to_string() };
        text += &format!("          {node} {}, {} used, priority {}\n", size(w.pages), size(w.used), w.priority);
    }
    text += &format!(
        "room      for about {} more at the present ratio; {dead} dead pages; the areas cost the kernel about {}",
        size(more),
        format_size(cost)
    );
    Ok((value, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_pressure_are_read_as_the_kernel_writes_them() {
        let m = Memory::of("MemTotal: 1280 kB\nMemAvailable: 400 kB\nActive(anon): 80 kB\nInactive(anon): 40 kB\n");
        assert_eq!((m.total, m.available, m.anonymous, m.swappable()), (320, 100, 30, 120));
        let psi = "some avg10=12.34 avg60=0.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!((some_avg10(psi), some_avg10("")), (12.34, 0.0));
    }
}
