//! Which window to open or close next: a pure function of what is seen, and of what was seen before.
//!
//! *Free* is what the kernel can still swap to: the windows' pages that are not used. The policy keeps
//! it between two bounds. Below `need` (half the first window, or two seconds at the present rate of
//! swap-out if that is more) it opens a window twice as large as the largest that is open; but never
//! more than the store can keep, so that a full store is a full swap area to the kernel, which has an
//! OOM killer for that, and not writes that fail, for which it has nothing. Above one and a half times
//! that, when nothing has been swapped out for a while, it closes windows, the last first: empty ones
//! soon, nearly empty ones later, others when they have long been of no use. The first stays.
//!
//! It opens nothing itself and knows no clock: `mod.rs` carries out what it says, `simulation.rs`
//! plays demand curves against it. All sizes are pages.

use std::time::Duration;

/// Windows begin and end at multiples of this: a swap cluster of the kernel.
pub const CLUSTER: u64 = 512;
/// Bounds of the first window.
const LEAST_FIRST: u64 = 64 << (20 - 12);
const MOST_FIRST: u64 = 2 << (30 - 12);
/// Most pages of an area: its header counts them in 32 bits.
const MOST: u64 = (1 << 32) - CLUSTER;
/// Seconds of swap-out that free space is to last for.
const HORIZON: f64 = 2.0;
/// In how many seconds a rate seen once is forgotten to a third.
const FORGOTTEN_IN: f64 = 3.0;
/// How long it must have been calm before an empty, a nearly empty, any other window is closed.
const EMPTY_AFTER: Duration = Duration::from_secs(5);
const NEARLY_AFTER: Duration = Duration::from_secs(10);
const IDLE_AFTER: Duration = Duration::from_secs(60);

/// An open window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Window {
    /// The partition's number.
    pub number: u32,
    /// Its place on the device, header included.
    pub start: u64,
    /// Its length, likewise.
    pub pages: u64,
    /// In use by the kernel.
    pub used: u64,
    /// The swap area's priority.
    pub priority: i32,
}

impl Window {
    fn free(&self) -> u64 {
        (self.pages - 1).saturating_sub(self.used)
    }
}

/// What the policy looks at.
#[derive(Clone, Debug, Default)]
pub struct View<'a> {
    /// Any clock that does not go back.
    pub now: Duration,
    /// Ours, in any order.
    pub windows: &'a [Window],
    /// All partitions of the device, which no window may overlap.
    pub partitions: &'a [Window],
    /// The window that is being swapped off.
    pub closing: Option<u32>,
    /// Size of the ghost device.
    pub device: u64,
    /// The machine's memory, and what of it is available.
    pub ram: u64,
    /// See there.
    pub available: u64,
    /// How many pages more than the kernel has swapped out now the store could keep.
    pub fits: u64,
    /// Whether the kernel takes one more swap area.
    pub may_open: bool,
    /// Processes wait for memory.
    pub pressure: bool,
    /// Priority of the first window.
    pub priority: i32,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// Nothing.
    Stay,
    /// Make this a swap area.
    Open(Window),
    /// Swap this one off.
    Close(u32),
    /// Stop swapping off.
    Cancel,
}

/// What was seen before.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    last: Option<(Duration, u64)>,
    /// Swap-out, in pages a second: its latest peak, slowly forgotten.
    rate: f64,
    calm_since: Option<Duration>,
}

/// Pages of the first window on a machine of `ram` pages: a quarter, within bounds.
pub fn first(ram: u64) -> u64 {
    down((ram / 4).clamp(LEAST_FIRST, MOST_FIRST))
}

impl Policy {
    /// Says what to do next. To be asked every 50 to 250 ms.
    pub fn choose(&mut self, v: &View<'_>) -> Choice {
        self.learn(v);
        let free: u64 = v.windows.iter().filter(|w| Some(w.number) != v.closing).map(Window::free).sum();
        let need = (first(v.ram) / 2).max((self.rate * HORIZON) as u64);
        if let Some(number) = v.closing {
            let left = v.windows.iter().find(|w| w.number == number).map_or(0, |w| w.used);
            // What is still to come needs a place, in memory now and in other windows later.
            let lacking = free < need / 2 || v.available < left.saturating_add(v.ram / 16);
            return if left > 0 && lacking { Choice::Cancel } else { Choice::Stay };
        }
        if free < need && v.may_open {
            return size(v, free).and_then(|pages| place(v, pages)).map_or(Choice::Stay, Choice::Open);
        }
        self.close(v, free, need).map_or(Choice::Stay, Choice::Close)
    }

    /// Whether swap is used more and more, so that the next look should come soon.
    pub fn busy(&self) -> bool {
        self.calm_since.is_none()
    }

    /// A closing came to nothing: the calm begins anew.
    pub fn disturbed(&mut self) {
        self.calm_since = None;
    }

    fn learn(&mut self, v: &View<'_>) {
        let used = v.windows.iter().map(|w| w.used).sum();
        let (then, before) = self.last.replace((v.now, used)).unwrap_or((v.now, used));
        let seconds = (v.now - then).as_secs_f64();
        let more: u64 = used.saturating_sub(before);
        if seconds > 0.0 {
            // Nearly exponential for short times, without a mathematical library: all workers have it in memory.
            self.rate = (more as f64 / seconds).max(self.rate / (1.0 + seconds / FORGOTTEN_IN));
        }
        let calm = self.rate < (first(v.ram) / 256) as f64;
        self.calm_since = if calm { self.calm_since.or(Some(v.now)) } else { None };
    }

    fn close(&self, v: &View<'_>, free: u64, need: u64) -> Option<u32> {
        let calm = v.now - self.calm_since?;
        let first_window = v.windows.iter().max_by_key(|w| w.priority)?;
        let mut others: Vec<&Window> = v.windows.iter().filter(|w| w.number != first_window.number).collect();
        others.sort_by_key(|w| w.priority);
        let of_no_use = |w: &&&Window| {
            let after = if w.used == 0 {
                EMPTY_AFTER
            } else if w.used <= first(v.ram) / 16 {
                NEARLY_AFTER
            } else {
                IDLE_AFTER
            };
            let fits = w.used == 0 || (!v.pressure && v.available >= w.used.saturating_add(v.ram / 8));
            // Its pages come to the others if they are swapped out again.
            calm >= after
                && fits
                && free - w.free() >= (need + need / 2 - 1 + w.used).saturating_sub(v.windows.len() as u64)
        };
        others.iter().find(of_no_use).map(|w| w.number)
    }
}

/// How large the next window is to be. None: the store could not keep enough to be worth one.
fn size(v: &View<'_>, free: u64) -> Option<u64> {
    let largest = v.windows.iter().map(|w| w.pages).max();
    let total: u64 = v.windows.iter().map(|w| w.pages).sum();
    let wanted = largest.map_or(first(v.ram), |pages| pages.saturating_mul(2).min(MOST));
    let pages = down(wanted.min(v.fits.saturating_sub(free)));
    // Areas are few, so none may be a waste of one; but one there must be.
    let least = if v.windows.is_empty() { CLUSTER } else { (first(v.ram) / 8).max(total / 16) };
    (pages >= least).then_some(pages)
}

/// Where it is to lie: in the first gap that is large enough, or the largest one.
fn place(v: &View<'_>, pages: u64) -> Option<Window> {
    let mut taken: Vec<(u64, u64)> = v.partitions.iter().map(|w| (w.start, w.start + w.pages)).collect();
    taken.sort_unstable();
    taken.push((down(v.device), u64::MAX));
    let (mut from, mut largest) = (0, (0, 0));
    for (start, end) in taken {
        let gap = down(start.saturating_sub(from));
        if gap > largest.1 {
            largest = (from, gap);
        }
        if gap >= pages {
            largest = (from, pages);
            break;
        }
        from = from.max(end.saturating_add(CLUSTER - 1) & !(CLUSTER - 1));
    }
    let (start, pages) = (largest.0, largest.1.min(pages));
    let number = (1..).find(|n| v.partitions.iter().all(|w| w.number != *n))?;
    let priority = v.windows.iter().map(|w| w.priority).min().map_or(v.priority, |least| (least - 1).max(0));
    // A header and something to swap to.
    (pages > CLUSTER).then_some(Window { number, start, pages, used: 0, priority })
}

/// A window of just that size, wanted by hand.
pub fn place_exactly(v: &View<'_>, pages: u64) -> Option<Window> {
    place(v, down(pages).min(MOST)).filter(|w| w.pages == down(pages))
}

fn down(pages: u64) -> u64 {
    pages & !(CLUSTER - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 18;
    const MIB: u64 = 1 << 8;

    fn view(windows: &[Window]) -> View<'_> {
        View {
            windows,
            partitions: windows,
            device: 16384 * GIB,
            ram: GIB,
            available: GIB,
            fits: 4 * GIB,
            may_open: true,
            priority: 100,
            ..View::default()
        }
    }

    fn window(number: u32, start: u64, pages: u64, used: u64) -> Window {
        Window { number, start, pages, used, priority: 101 - number as i32 }
    }

    #[test]
    fn the_first_is_a_quarter_of_memory_and_each_next_one_twice_the_largest() {
        let mut open = Vec::new();
        for (n, mib) in [(1, 256), (2, 512), (3, 1024)] {
            let Choice::Open(next) = Policy::default().choose(&view(&open)) else { panic!("{open:?}") };
            assert_eq!((next.number, next.pages, next.priority), (n, mib * MIB, 101 - n as i32));
            open.push(Window { used: next.pages - 1, ..next });
        }
        assert_eq!(open[2].start, 768 * MIB, "one behind the other");
        assert_eq!((first(0), first(u64::MAX)), (LEAST_FIRST, MOST_FIRST));
    }

    #[test]
    fn no_more_is_opened_than_the_store_can_keep() {
        let full = [window(1, 0, 256 * MIB, 256 * MIB - 1)];
        let with = |fits| Policy::default().choose(&View { fits, ..view(&full) });
        let pages = |choice| match choice {
            Choice::Open(w) => w.pages,
            _ => 0,
        };
        assert_eq!(pages(with(300 * MIB)), 300 * MIB);
        assert_eq!(pages(with(100 * MIB + 7)), 100 * MIB);
        assert_eq!(pages(with(30 * MIB)), 0, "not worth an area");
        assert_eq!(Policy::default().choose(&View { may_open: false, ..view(&full) }), Choice::Stay);
        let half = [window(1, 0, 256 * MIB, 200 * MIB)];
        assert_eq!(
            pages(Policy::default().choose(&View { fits: 100 * MIB, ..view(&half) })),
            44 * MIB + MIB - CLUSTER / 2
        );
    }

    #[test]
    fn a_gap_is_used_before_what_is_behind() {
        let open = [window(1, 0, 64 * MIB, 0), window(3, 128 * MIB, 64 * MIB, 0)];
        let at = |pages| place(&view(&open), pages).map(|w| (w.number, w.start, w.pages));
        assert_eq!(at(64 * MIB), Some((2, 64 * MIB, 64 * MIB)));
        assert_eq!(at(65 * MIB), Some((2, 192 * MIB, 65 * MIB)));
        let small = View { device: 200 * MIB, ..view(&open) };
        assert_eq!(place(&small, 65 * MIB).map(|w| (w.start, w.pages)), Some((64 * MIB, 64 * MIB)), "the largest gap");
        let taken = [window(1, 0, 192 * MIB, 0)];
        assert_eq!(place(&View { device: 192 * MIB, partitions: &taken, ..small }, 8 * MIB), None);
    }

    #[test]
    fn what_is_of_no_use_is_closed_the_emptier_the_sooner() {
        let seconds_until_closed = |used: [u64; 3], available| {
            let open = [
                window(1, 0, 256 * MIB, used[0]),
                window(2, 256 * MIB, 512 * MIB, used[1]),
                window(3, 768 * MIB, 1024 * MIB, used[2]),
            ];
            let mut policy = Policy::default();
            (0..1000).find_map(|tick| {
                let now = Duration::from_millis(100) * tick;
                match policy.choose(&View { now, available, ..view(&open) }) {
                    Choice::Close(number) => Some((tick / 10, number)),
                    _ => None,
                }
            })
        };
        assert_eq!(seconds_until_closed([0, 0, 0], GIB), Some((5, 3)));
        assert_eq!(seconds_until_closed([0, 0, MIB], GIB), Some((5, 2)), "an empty one first");
        assert_eq!(seconds_until_closed([0, MIB, MIB], GIB), Some((10, 3)));
        assert_eq!(seconds_until_closed([0, 100 * MIB, 100 * MIB], GIB), Some((60, 3)));
        assert_eq!(seconds_until_closed([0, 100 * MIB, 100 * MIB], 200 * MIB), None, "memory would not hold it");
        assert_eq!(seconds_until_closed([255 * MIB, 0, 0], GIB), Some((5, 3)));
        assert_eq!(seconds_until_closed([255 * MIB, 400 * MIB, 0], 500 * MIB), None, "it will be needed");
    }

    #[test]
    fn a_closing_is_broken_off_when_its_pages_have_no_place() {
        let open = [window(1, 0, 256 * MIB, 0), window(2, 256 * MIB, 512 * MIB, 300 * MIB)];
        let closing = View { closing: Some(2), ..view(&open) };
        assert_eq!(Policy::default().choose(&closing), Choice::Stay);
        let short = View { available: 310 * MIB, ..closing.clone() };
        assert_eq!(Policy::default().choose(&short), Choice::Cancel);
        let open = [window(1, 0, 256 * MIB, 240 * MIB), window(2, 256 * MIB, 512 * MIB, 300 * MIB)];
        assert_eq!(Policy::default().choose(&View { windows: &open, ..closing }), Choice::Cancel);
    }
}
