//! The policy against demand curves: how much a machine wants swapped out, over time. A model of the
//! kernel fills windows by priority and empties them evenly, as processes end; the policy is asked five
//! times a second. Judged: whether demand ever found all windows full although the store could have
//! kept more (late), and how often windows came and went (flapping). `docs/windows.svg` is drawn here.

use super::policy::{first, Choice, Policy, View, Window};
use std::fmt::Write;
use std::time::Duration;

const GIB: f64 = (1u64 << 18) as f64;
const TICK: Duration = Duration::from_millis(200);

/// GiB wanted swapped out at a second.
type Curve = fn(f64) -> f64;

/// What a run showed.
#[derive(Debug, Default)]
struct Outcome {
    /// Ticks at which demand found no free swap, though the store had room.
    late: u32,
    opened: u32,
    closed: u32,
    /// At the end.
    open: usize,
    /// Most that windows promised beyond what the store could keep.
    overpromised: u64,
    /// For each tick: demand, used, in windows.
    course: Vec<(f64, u64, u64)>,
}

/// A machine: memory, and pages that its store can keep.
#[derive(Clone, Copy)]
struct Machine {
    ram: u64,
    store: u64,
}

fn play(machine: Machine, seconds: u32, demand: impl Fn(f64) -> f64) -> Outcome {
    let (mut policy, mut windows, mut out) = (Policy::default(), Vec::<Window>::new(), Outcome::default());
    let mut closing = None;
    for tick in 0..seconds * 5 {
        let now = TICK * tick;
        let wanted = demand(now.as_secs_f64()).max(0.0);
        let left = fill(&mut windows, wanted as u64, closing);
        let used: u64 = windows.iter().map(|w| w.used).sum();
        let fits = machine.store.saturating_sub(used);
        out.late += u32::from(left > 0 && fits > 0 && !windows.is_empty() && left.min(fits) > first(machine.ram) / 8);
        let view = View {
            now,
            windows: &windows,
            partitions: &windows,
            closing,
            device: 1 << 32,
            ram: machine.ram,
            // What is not wanted swapped out is assumed to be free.
            available: (machine.ram as f64 - (wanted / 2.0)).max(machine.ram as f64 / 20.0) as u64,
            fits,
            may_open: windows.len() < 20,
            pressure: false,
            priority: 100,
        };
        match policy.choose(&view) {
            Choice::Stay => {}
            Choice::Open(window) => {
                assert!(windows
                    .iter()
                    .all(|w| w.start + w.pages <= window.start || window.start + window.pages <= w.start));
                windows.push(window);
                out.opened += 1;
                let free: u64 = windows.iter().map(|w| w.pages - 1 - w.used).sum();
                out.overpromised = out.overpromised.max(free.saturating_sub(fits));
            }
            Choice::Close(number) => closing = Some(number),
            Choice::Cancel => closing = None,
        }
        // 64 MiB a second come back.
        if let Some(at) = closing.and_then(|n| windows.iter().position(|w| w.number == n)) {
            windows[at].used = windows[at].used.saturating_sub((64 << 8) / 5);
            if windows[at].used == 0 {
                windows.remove(at);
                closing = None;
                out.closed += 1;
            }
        }
        out.course.push((wanted, used, windows.iter().map(|w| w.pages).sum()));
    }
    out.open = windows.len();
    out
}

/// Brings what is used to what is wanted. Returns what found no place.
fn fill(windows: &mut [Window], wanted: u64, closing: Option<u32>) -> u64 {
    let used: u64 = windows.iter().map(|w| w.used).sum();
    if wanted < used {
        // Pages die wherever they lie.
        for w in windows.iter_mut() {
            w.used = (w.used as f64 * (wanted as f64 / used as f64)) as u64;
        }
        return 0;
    }
    let mut more = wanted - used;
    windows.sort_by_key(|w| std::cmp::Reverse(w.priority));
    for w in windows.iter_mut().filter(|w| Some(w.number) != closing) {
        let taken = more.min(w.pages - 1 - w.used);
        w.used += taken;
        more -= taken;
    }
    more
}

const SMALL: Machine = Machine { ram: 1 << 18, store: 1 << 20 };
const LARGE: Machine = Machine { ram: 1 << 25, store: 1 << 27 };

/// Curves of 10 minutes in GiB, by what a machine of 1 GiB could do.
fn curves() -> Vec<(&'static str, Curve)> {
    vec![
        ("slow leak", |t| t / 600.0 * 3.0),
        ("burst of 100 MiB/s", |t| ((t - 5.0) * 0.1).clamp(0.0, 3.5)),
        ("three hogs come and go", |t| if t % 200.0 < 60.0 { ((t % 200.0) * 0.05).min(2.0) } else { 0.02 }),
        ("sawtooth every 10 s", |t| (t % 10.0) * 0.05),
        ("waves", |t| 1.0 + (t / 20.0).sin() * 0.9 * (t / 10.0).min(1.0) - 1.0 * (1.0 - (t / 10.0).min(1.0))),
        ("noise around a level", |t| (t / 30.0).min(1.0) + 0.03 * (t * 7.3).sin() + 0.02 * (t * 1.7).sin()),
        ("a night after a day", |t| if t < 200.0 { (t / 60.0).min(1.6) } else { 1.6 * (-(t - 200.0) / 40.0f64).exp() }),
    ]
}

#[test]
fn never_late_and_no_flapping() {
    for (name, curve) in curves() {
        let out = play(SMALL, 600, |t| curve(t) * GIB);
        assert_eq!(out.late, 0, "{name}");
        assert_eq!(out.overpromised, 0, "{name}");
        // Twice a minute at most, on top of what growth needs.
        assert!(out.opened <= 5 + 15 && out.closed <= 15, "{name}: opened {}, closed {}", out.opened, out.closed);
    }
}

#[test]
fn steady_use_has_steady_windows() {
    for (name, curve) in curves() {
        if name.starts_with("sawtooth") || name.starts_with("noise") {
            let out = play(SMALL, 600, |t| curve(t) * GIB);
            assert!(out.closed <= 2, "{name}: closed {}", out.closed);
        }
    }
}

#[test]
fn a_large_machine_with_fast_swap_is_not_too_late_either() {
    // 2 GiB/s until 400 GiB are out.
    let out = play(LARGE, 300, |t| ((t - 2.0) * 2.0).clamp(0.0, 400.0) * GIB);
    assert_eq!(out.late, 0);
    assert!(out.opened <= 10, "{}", out.opened);
}

#[test]
fn a_full_store_is_full_swap() {
    let out = play(Machine { store: 1 << 18, ..SMALL }, 300, |t| (t * 0.05).min(3.0) * GIB);
    assert_eq!(out.overpromised, 0);
    let most = out.course.iter().map(|c| c.2).max().unwrap();
    assert!((240_000..=1 << 18).contains(&most), "{most}");
}

#[test]
fn after_the_demand_one_window_is_left() {
    let out = play(SMALL, 400, |t| if t < 100.0 { (t * 0.04).min(3.0) * GIB } else { 0.0 });
    assert_eq!((out.open, out.late), (1, 0));
}

/// Draws the curves; `GHOSTSWAP_DRAW=1` writes what is compared otherwise.
#[test]
fn the_plot_in_docs_is_what_the_policy_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/windows.svg");
    let drawn = draw();
    if std::env::var_os("GHOSTSWAP_DRAW").is_some() {
        std::fs::write(path, &drawn).unwrap();
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    assert!(there == drawn, "GHOSTSWAP_DRAW=1 cargo test -p ghostswap-ublk the_plot draws it anew");
}

fn draw() -> String {
    const WIDTH: f64 = 360.0;
    const HEIGHT: f64 = 110.0;
    let curves = curves();
    let rows = curves.len().div_ceil(2);
    let (across, down) = (2.0 * (WIDTH + 60.0), rows as f64 * (HEIGHT + 50.0) + 30.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {across} {down}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"40\" y=\"18\">Swap windows, simulated: used by the kernel (filled) and open (line), GiB over 10 minutes, on 1 GiB of memory</text>\n"
    );
    for (i, (name, curve)) in curves.iter().enumerate() {
        let out = play(SMALL, 600, |t| curve(t) * GIB);
        let (left, top) = (40.0 + (i % 2) as f64 * (WIDTH + 60.0), 50.0 + (i / 2) as f64 * (HEIGHT + 50.0));
        let highest = out.course.iter().map(|c| c.2 as f64 / GIB).fold(1.0, f64::max).ceil();
        let point = |tick: usize, pages: f64| {
            let x = left + WIDTH * tick as f64 / out.course.len() as f64;
            format!("{x:.1},{:.1} ", top + HEIGHT * (1.0 - pages / GIB / highest))
        };
        let mut used = point(0, 0.0);
        let mut open = String::new();
        let mut before = 0.0;
        for (tick, c) in out.course.iter().enumerate() {
            if tick % 10 == 0 {
                used += &point(tick, c.1 as f64);
            }
            let now = c.2 as f64;
            if now != before || tick + 1 == out.course.len() {
                open += &point(tick, before);
                open += &point(tick, now);
                before = now;
            }
        }
        used += &point(out.course.len(), 0.0);
        let _ = write!(
            svg,
            "<polygon points=\"{used}\" fill=\"#9ecae1\"/>\n<polyline points=\"{open}\" fill=\"none\" stroke=\"#b30000\"/>\n\
             <text x=\"{left}\" y=\"{}\">{name}: {} opened, {} closed</text>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{highest}</text><text x=\"{}\" y=\"{}\" text-anchor=\"end\">0</text>\n",
            top - 8.0, out.opened, out.closed, left - 5.0, top + 8.0, left - 5.0, top + HEIGHT
        );
    }
    svg + "</svg>\n"
}
