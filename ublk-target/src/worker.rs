//! A worker: the process that serves a device, from standing by to its end.
//!
//! Standing by ([`Ready`]): protected and resident, with the arena mapped, every thread started,
//! every ring made and the device watched. Ordered, it claims the device that a dead worker left,
//! opens the store on the supervisor's arena, or makes the kernel's device, hands its lanes to the
//! queues' threads and goes live. Between a death and that nothing can free memory, so all that can
//! be done beforehand has been, and what is left runs as a real-time thread: those may take what
//! the page allocator refuses to others.
//!
//! Live, the main thread sleeps in `poll` until the agent's bell rings. Stop: the driver drains the
//! device's requests while the queues still serve, then the queues end, then the device is deleted.

use crate::board::Shared;
use crate::claim::Claim;
use crate::cli::{self, Add};
use crate::control::{Answer, Request, TierChange};
use crate::handover::HANDOVER_VERSION;
use crate::heir::Guard;
use crate::protect::Usage;
use crate::slotfree::{self, Feed, Source};
use crate::supervise::tiers_of;
use crate::windows::Held;
use crate::{daemon, device, log, protect, queue, signals};
use anyhow::{anyhow, bail, Context, Result};
use ghostswap::config::{format_size, StoreConfig, TierConfig};
use ghostswap::{Standby, Store, Volume};
use libublk::ctrl::UblkCtrl;
use libublk::io::UblkDev;
use serde_json::json;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often trouble on the queues is reported at most.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// How often to tell what the store holds, if that has changed.
const PUBLISH_EVERY: Duration = Duration::from_millis(200);
/// How often a worker that stands by follows the arena's growth.
const KEEP_UP_EVERY: Duration = Duration::from_millis(250);
/// Exit status of a worker whose device is to be taken over although it was not killed.
pub const EXIT_TAKE_OVER: i32 = 75;

/// What a worker is made of; all of it there before the fork.
pub struct Setup<'a> {
    /// The command line.
    pub add: &'a Add,
    /// The tiers, which may have been changed since.
    pub tiers: &'a [TierConfig],
    /// They are not those that hold: whether they can be had is to be found out, while another serves.
    pub trial: bool,
    /// The arena's file.
    pub arena: OwnedFd,
    /// The board.
    pub shared: Arc<Shared>,
    /// Freed slots, if they can be heard of.
    pub feed: Option<&'a Source>,
    /// Orders down, news up.
    pub pipe: UnixStream,
    /// The device to take over; None: it is to be made.
    pub device: Option<u32>,
}

/// A worker that stands by.
struct Ready<'a> {
    add: &'a Add,
    shared: Arc<Shared>,
    feed: Option<Arc<Feed>>,
    standby: Standby,
    queues: Vec<queue::Idle>,
    watched: Option<(UblkCtrl, Claim)>,
}

/// A live device.
struct Device {
    shared: Arc<Shared>,
    feed: Option<Arc<Feed>>,
    ctrl: UblkCtrl,
    path: PathBuf,
    store: Store,
    volume: Volume,
    queues: Vec<queue::Running>,
    recovered: bool,
}

/// What a worker is told to do.
struct Order<'a> {
    /// To take over, and why. None: to make a new device.
    why: Option<&'a str>,
    /// Since when the device has had no worker, on the clock that all processes share.
    since_us: u64,
}

impl Order<'_> {
    /// `add`, or `recover`, when the worker before died, and how.
    fn read(line: &str) -> Result<Order<'_>> {
        let mut words = line.splitn(3, ' ');
        let since_us = match (words.next(), words.next()) {
            (Some("add"), None) => Some(protect::monotonic_us()),
            (Some("recover"), Some(died_us)) => died_us.parse().ok(),
            _ => None,
        };
        let why = words.next();
        since_us.map(|since_us| Order { why, since_us }).with_context(|| format!("bad order: {line}"))
    }
}

/// What took how long on the way to live, which begins with the death of the worker before.
struct Steps {
    last_us: u64,
    taken: [(&'static str, Duration); 6],
    count: usize,
    /// At the beginning.
    usage: Usage,
}

impl Steps {
    /// Since then, on the clock that all processes share: a worker's death, of which another told.
    fn since(last_us: u64) -> Steps {
        Steps { last_us, taken: [("", Duration::ZERO); 6], count: 0, usage: Usage::now() }
    }

    fn done(&mut self, what: &'static str) {
        let now_us = protect::monotonic_us();
        self.taken[self.count] = (what, Duration::from_micros(now_us.saturating_sub(self.last_us)));
        (self.last_us, self.count) = (now_us, self.count + 1);
    }

    fn all(&self) -> Duration {
        self.taken.iter().map(|(_, time)| time).sum()
    }
}

/// A worker's life. Ends well when the device was stopped, or when no order came.
pub fn run(setup: Setup<'_>) -> Result<()> {
    protect::process()?;
    signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD])?;
    protect::first_in_line(protect::TAKE_OVER_PRIORITY);
    let voice = log::start(&setup.shared);
    if setup.device.is_none() {
        voice.rise();
    }
    let mut tell = setup.pipe.try_clone().context("cannot duplicate the pipe")?;
    let mut orders = BufReader::with_capacity(512, setup.pipe);
    let feed = setup.feed.map(|source| Feed::map(source, &setup.shared)).transpose()?.map(Arc::new);
    let mut standby = stand_by(setup.add, setup.tiers, setup.arena)?;
    if setup.trial {
        standby.try_tiers(&tiers_of(&setup.shared, &setup.add.tiers))?;
    }
    let mut ready = Ready::new(setup.add, standby, setup.shared, feed, setup.device)?;
    daemon::say(&mut tell, "ready");
    let Some(order) = ready.wait_for_order(&mut orders)? else { return Ok(()) };
    voice.rise();
    let order = Order::read(&order)?;
    let mut steps = Steps::since(order.since_us);
    steps.done("order");
    let (device, dev) = ready.go_live(&order, &mut steps)?;
    let live_us = steps.last_us;
    let mut guard = device.guard(setup.feed);
    let (id, recoverable) = (device.ctrl.dev_info().dev_id, device::can_recover(&device.ctrl));
    daemon::say(&mut tell, &format!("live {live_us} {id} {recoverable} {}", device.path.display()));
    protect::as_any_other();
    device.settle(&order, &steps, Usage::since(steps.usage));
    device.wait_for_stop(&mut guard);
    device.stop(dev);
    Ok(())
}

fn stand_by(add: &Add, tiers: &[TierConfig], arena: OwnedFd) -> Result<Standby> {
    let config = StoreConfig {
        tiers: tiers.to_vec(),
        max_lanes: usize::from(add.queues),
        thread_start: Some(protect::store_thread),
        #[cfg(feature = "tls")]
        tls: Some(ghostswap::Tls::new()),
        #[cfg(feature = "s3")]
        s3: Some(ghostswap::S3::new()),
        ..StoreConfig::default()
    };
    Ok(Standby::new(config, arena)?)
}

impl<'a> Ready<'a> {
    fn new(
        add: &'a Add,
        standby: Standby,
        shared: Arc<Shared>,
        feed: Option<Arc<Feed>>,
        id: Option<u32>,
    ) -> Result<Ready<'a>> {
        let fetches = (standby.fetch_bytes(), standby.reads_apart());
        let start = |qid| queue::Idle::start(qid, add.depth, fetches, shared.clone(), feed.clone());
        let queues = (0..add.queues).map(start).collect::<Result<_>>()?;
        let watched = id.map(|id| device::watch(add, id)).transpose()?;
        let mut ready = Ready { add, shared, feed, standby, queues, watched };
        ready.standby.keep_up()?;
        protect::make_resident()?;
        Ok(ready)
    }

    /// None: there will be none, the supervisor is gone or needs this one no more.
    fn wait_for_order(&mut self, orders: &mut BufReader<UnixStream>) -> Result<Option<String>> {
        loop {
            let [ordered] = signals::poll([orders.get_ref().as_raw_fd()], KEEP_UP_EVERY);
            if ordered {
                let mut line = String::new();
                let n = orders.read_line(&mut line).context("no orders")?;
                return Ok((n > 0).then(|| line.trim_end().to_owned()));
            }
            self.standby.keep_up()?;
        }
    }

    /// Returns once the kernel's device answers.
    fn go_live(self, order: &Order<'_>, steps: &mut Steps) -> Result<(Device, Arc<UblkDev>)> {
        let recovered = order.why.is_some();
        if recovered != self.watched.is_some() {
            bail!("an order to {} for who was not made for it", if recovered { "recover" } else { "add" });
        }
        // The claim first: it waits for what the kernel does as an ordinary task, and with the store
        // begins growth, which is real-time and maps all of the arena.
        let claimed = self.watched.map(|(ctrl, mut claim)| claim.wait().map(|()| ctrl)).transpose()?;
        steps.done("claim");
        #[cfg(feature = "crash-points")]
        crate::crash::arm(&self.shared);
        let store = self.standby.open()?;
        #[cfg(feature = "crash-points")]
        crate::crash::recovered();
        let volume = match store.volumes().into_iter().next() {
            Some(volume) => volume,
            None => store.create_volume(self.add.size)?,
        };
        steps.done("store");
        let ctrl = claimed.map_or_else(|| device::make(self.add), Ok)?;
        let path = PathBuf::from(ctrl.get_bdev_path());
        let dev = open_dev(&ctrl, &volume)?;
        steps.done("open");
        // The driver makes no more queues than there are CPUs; threads left over end.
        let count = usize::from(dev.dev_info.nr_hw_queues);
        self.shared.board.queues.store(count as u64, Ordering::Relaxed);
        let idle = self.queues.into_iter().take(count).collect();
        let queues = queue::run(idle, &dev, || volume.lane())?;
        steps.done("queues");
        ctrl.start_dev(&dev)
            .map_err(|e| anyhow!("the ublk driver cannot start the device: {}", device::describe(&e)))?;
        steps.done("start");
        let (shared, feed) = (self.shared, self.feed);
        Ok((Device { shared, feed, ctrl, path, store, volume, queues, recovered }, dev))
    }
}

/// Opens the device's own node, to be served: a moment after the last one who served it closed it.
fn open_dev(ctrl: &UblkCtrl, volume: &Volume) -> Result<Arc<UblkDev>> {
    let set = |dev: &mut UblkDev| {
        device::set_params(dev, volume.bytes());
        Ok(())
    };
    let dev = UblkDev::new("ghostswap".into(), set, ctrl)
        .map_err(|e| anyhow!("cannot open the new device: {}", device::describe(&e)))?;
    Ok(Arc::new(dev))
}

impl Device {
    /// What can wait until the device is live.
    fn settle(&self, order: &Order<'_>, steps: &Steps, usage: Usage) {
        for queue in &self.queues {
            self.ctrl.set_thread_affinity(queue.qid, queue.tid);
        }
        let path = self.path.display();
        match order.why {
            Some(why) => {
                let (all, each) = (steps.all(), steps.taken);
                tracing::warn!("{path}: taken over within {all:?}; the worker before {why}; {each:?}; {usage:?}")
            }
            None => tracing::info!("{path} is live"),
        }
    }

    /// What to do when nobody supervises any more.
    fn guard(&self, feed: Option<&Source>) -> Guard {
        let device = (self.ctrl.dev_info().dev_id, self.path.as_path());
        Guard::of(self.store.arena_fd().as_raw_fd(), feed, device, &self.shared)
    }

    fn wait_for_stop(&self, guard: &mut Guard) {
        let mut reported = self.counted();
        let mut lost_told = self.feed.as_ref().is_some_and(|feed| feed.lost() > 0);
        let mut report_due = Instant::now() + REPORT_EVERY;
        loop {
            self.publish();
            let [asked] = signals::poll([self.shared.worker_bell()], PUBLISH_EVERY);
            guard.look();
            if Instant::now() >= report_due {
                self.report(&mut reported);
                self.report_lost(&mut lost_told);
                report_due = Instant::now() + REPORT_EVERY;
            }
            if self.queues.iter().any(|q| q.thread.is_finished()) {
                // The device is not to go with them: the next worker takes it over, if it is there.
                tracing::error!("{}: a queue ended by itself", self.path.display());
                std::process::exit(EXIT_TAKE_OVER);
            }
            if asked {
                let (number, text) = self.shared.request();
                let (answer, stop) = match serde_json::from_str(&text) {
                    Ok(Request::Status) => (self.status(), false),
                    Ok(Request::Stop { .. }) => (Answer::done(), true),
                    Ok(Request::Recompress) if self.store.recompress() => (Answer::done(), false),
                    Ok(Request::Recompress) => {
                        (Answer::refusal("the device has no second tier: give --tier twice"), false)
                    }
                    Ok(Request::WriteBack { idle_s }) => (told(self.store.write_back(idle_s)), false),
                    Ok(Request::Tier { what: TierChange::Limit(limit) }) => (self.set_limit(&limit), false),
                    Ok(Request::Tier { what: TierChange::Set { spec, .. } }) => (self.set_tier(&spec), false),
                    Ok(Request::Tier { what: TierChange::Drain(drain) }) => (told(self.store.drain_disk(drain)), false),
                    Ok(Request::Tier { what: TierChange::Empty }) => (told(self.store.empty_disk()), false),
                    Ok(Request::Tier { what: TierChange::DrainOne { name, drain } }) => {
                        (told(self.store.drain_tier(Some(&name), drain)), false)
                    }
                    Ok(Request::Tier { what: TierChange::EmptyOne { name } }) => {
                        (told(self.store.empty_tier(Some(&name))), false)
                    }
                    Ok(Request::Resize { bytes }) => (self.resize(bytes), false),
                    Ok(_) => (Answer::refusal("that is not the worker's to do"), false),
                    Err(e) => (Answer::refusal(format!("bad request: {e}")), false),
                };
                self.shared.answer(number, &answer.to_line());
                if stop {
                    return;
                }
            }
        }
    }

    /// What the windows' keeper goes by.
    fn publish(&self) {
        let stats = self.store.stats();
        self.shared.board.held.set(Held {
            pages: stats.stored_pages + stats.filled_pages + stats.zero_pages,
            live_bytes: stats.live_bytes,
            held_bytes: stats.held_bytes,
            limit_bytes: stats.limit_bytes,
            disk_bytes: stats.usable_disk_bytes(),
        });
    }

    fn stop(self, dev: Arc<UblkDev>) {
        tracing::info!("{} stops", self.path.display());
        // Should this process die on the way, the supervisor has the rest done.
        self.shared.board.stopping.store(1, Ordering::Relaxed);
        #[cfg(feature = "crash-points")]
        crate::crash::passed("stop-ordered");
        if let Err(e) = self.ctrl.kill_dev() {
            tracing::warn!("stop: {}", device::describe(&e));
        }
        for queue in self.queues {
            let _ = queue.thread.join();
        }
        #[cfg(feature = "crash-points")]
        crate::crash::passed("stop-drained");
        // The driver deletes a device once nobody has it open.
        drop(dev);
        if self.recovered {
            // libublk deletes at the end only what this very process added.
            if let Err(e) = self.ctrl.del_dev() {
                tracing::warn!("delete: {}", device::describe(&e));
            }
        }
    }

    fn set_limit(&self, limit: &str) -> Answer {
        limit.parse().map_or_else(|e: String| Answer::refusal(e), |limit| told(self.store.set_limit(limit)))
    }

    fn set_tier(&self, spec: &str) -> Answer {
        spec.parse().map_or_else(|e: String| Answer::refusal(e), |settings| told(self.store.set_tier(&settings)))
    }

    /// The volume first: the kernel must not ask for what is not there.
    fn resize(&self, bytes: u64) -> Answer {
        let path = self.path.display();
        let now = self.volume.bytes();
        if !device::can_resize(&self.ctrl) {
            return Answer::refusal(format!(
                "this kernel's ublk driver cannot resize a live device ({path} keeps its size)"
            ));
        }
        if bytes < now {
            // The driver would do it, under a swap area too.
            return Answer::refusal(format!("{path} has {}: a device can only grow", format_size(now)));
        }
        if let Err(e) = self.volume.grow(bytes) {
            return Answer::refusal(format!("{path}: {e}"));
        }
        match self.ctrl.update_size(bytes) {
            Ok(_) => Answer::done(),
            Err(e) => Answer::refusal(format!("the ublk driver cannot resize {path}: {}", device::describe(&e))),
        }
    }

    fn status(&self) -> Answer {
        let stats = self.store.stats();
        let info = self.ctrl.dev_info();
        let count = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let board = self.shared.board;
        let (slot_free, slot_free_line) = slotfree::describe(&self.shared, self.feed.as_deref());
        let device = json!({
            "id": info.dev_id,
            "path": self.path,
            "size_bytes": self.volume.bytes(),
            "pid": std::process::id(),
            "queues": info.nr_hw_queues,
            "depth": info.queue_depth,
            "version": cli::VERSION,
            "handover_version": HANDOVER_VERSION,
            "arena_version": ghostswap::ARENA_VERSION,
            "upgrades": count(&board.upgrades),
            "upgrade_error": self.shared.upgrade_error(),
            "taken_over": count(&board.taken_over),
            "last_take_over_us": count(&board.last_take_over_us),
            "longest_take_over_us": count(&board.longest_take_over_us),
            "writes_parked": count(&board.counters.parked),
            "writes_refused": count(&board.counters.refused),
            "requests_failed": count(&board.counters.failed),
            "oom_victims": count(&board.victims),
            "slot_free": slot_free,
            "stats": stats,
            "tiers": self.store.tiers(),
        });
        Answer { ok: true, device: Some(device), report: Some(format!("{stats}\n{slot_free_line}\n")), error: None }
    }

    fn counted(&self) -> [u64; 3] {
        let c = &self.shared.board.counters;
        [&c.parked, &c.refused, &c.failed].map(|n| n.load(Ordering::Relaxed))
    }

    /// Logs once that freed slots went unheard; `status` has the count.
    fn report_lost(&self, told: &mut bool) {
        let lost = self.feed.as_ref().map_or(0, |feed| feed.lost());
        if lost > 0 && !std::mem::replace(told, true) {
            tracing::warn!(
                "{lost} ranges of freed slots found the ring full: their pages stay until the slots are used again"
            );
        }
    }

    /// Logs what the queues counted since the last time.
    fn report(&self, reported: &mut [u64; 3]) {
        let now = self.counted();
        if now[1] != reported[1] || now[2] != reported[2] {
            tracing::warn!(
                "since the last report {} writes waited for room, {} were refused, {} requests failed",
                now[0] - reported[0],
                now[1] - reported[1],
                now[2] - reported[2]
            );
        }
        *reported = now;
    }
}

fn told(done: ghostswap::Result<()>) -> Answer {
    done.map_or_else(|e| Answer::refusal(e.to_string()), |()| Answer::done())
}
