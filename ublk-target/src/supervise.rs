//! The supervisor: the small process that outlives its workers and keeps what they stored.
//!
//! It holds the arena's file and forks workers. Each worker starts as a *standby*: fully resident,
//! blocked on its pipe (`worker.rs`). One is ordered to make the device; from then on another stands
//! by. A worker that dies by anything but an orderly stop, or that shows no sign of life for too
//! long and is killed for it, leaves the kernel's device waiting (ublk user recovery with reissue);
//! the standby is ordered to take it over, and a new standby is forked behind it. Nothing has to be
//! started, loaded or paged in between death and take-over: under pressure a new process may need
//! the very swap that is gone. Beside them works the agent (`agent.rs`), which may wait.
//!
//! Over a worker's pipe, a line each way: `add` or `recover WHY` down, `ready`, `live ID RECOVERABLE
//! PATH` or `error WHY` up. A worker whose pipe ends before it was ordered anything ends with it.
//!
//! The supervisor has one thread, allocates next to nothing, and knows nothing of the arena. It
//! never speaks to the driver itself: libublk's ring would go with the fork, and break there.

mod change;
mod children;
mod pulse;
mod succession;

pub use change::{text_of, tiers_of};
pub use children::pidfd;
pub use succession::resume;

use crate::board::{Shared, ASKED_TIERS, ASKED_UPGRADE};
use crate::cli::Add;
use crate::daemon;
use crate::heir::Heritage;
use crate::notify::Manager;
use crate::slotfree::{Mode, Source};
use crate::{agent, control, device, kept, protect, signals};
use anyhow::{anyhow, bail, Result};
use change::Change;
use children::{child, describe, kill, kill_stranger, ready_count, reap, remover, start, Worker};
use ghostswap::config::TierConfig;
use ghostswap::Spare;
use pulse::Pulse;
use std::io::{BufRead, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A worker that served shorter than this died of what it is, not of what was done to it.
const SHORT_LIFE: Duration = Duration::from_millis(100);
/// Short lives in a row that are taken for chance.
const CHANCE: u32 = 3;
/// Pause before the next after several short lives, times their number.
const BACK_OFF: Duration = Duration::from_millis(200);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a take-over may take at least before it is tried again.
const TAKE_OVER_PATIENCE: Duration = Duration::from_secs(15);
/// How long a newer program's first worker may take to get ready, before the upgrade is given up.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a worker of changed tiers may take: a file's space may have to be taken.
const TRIAL_PATIENCE: Duration = Duration::from_secs(120);
/// Workers that stand by: one may be needed while the next is being made, which takes a while on a
/// machine short of memory.
const STANDBYS: usize = 2;
/// What it takes to make one, with room to spare.
const STANDBY_COST: u64 = 3 << 20;
/// How often to look for signs of life.
const LOOK_EVERY: Duration = Duration::from_millis(500);

struct Supervisor<'a> {
    add: &'a Add,
    /// The standby is of a newer program than the worker, which it is to replace.
    upgrading: bool,
    /// The tiers that hold for workers to come.
    tiers: Vec<TierConfig>,
    /// They are being changed.
    change: Option<Change>,
    arena: OwnedFd,
    shared: Arc<Shared>,
    feed: Option<Source>,
    active: Worker,
    /// It is no child of this process: what tells of its end. None in it: it has ended.
    stranger: Option<Option<OwnedFd>>,
    /// The next to take over first.
    standbys: Vec<Worker>,
    agent: Option<libc::pid_t>,
    device: Option<(u32, PathBuf)>,
    recoverable: bool,
    /// When the worker died that is being taken over from.
    died: Option<Instant>,
    short_lives: u32,
    /// When the next agent, the next standby may be started.
    agent_due: Instant,
    standby_due: Instant,
    tell: Option<UnixStream>,
    pulse: Pulse,
    spare: Spare,
    /// The service manager.
    manager: Manager,
    /// Went on where an older program left off.
    resumed: bool,
}

/// Supervises until the device is stopped. The waiter hears over `tell` once it is live.
pub fn run(add: &Add, mut tell: UnixStream) -> Result<()> {
    let (mut supervisor, received) = match begin(add) {
        Ok(begun) => begun,
        Err(e) => {
            daemon::tell_error(&mut tell, &e);
            return Err(e);
        }
    };
    supervisor.tell = Some(tell);
    let done = supervisor.watch(&received);
    if let (Err(e), Some(tell)) = (&done, &mut supervisor.tell) {
        daemon::tell_error(tell, e);
    }
    supervisor.end();
    done
}

/// All before the first worker is told to make the device.
fn begin(add: &Add) -> Result<(Supervisor<'_>, OwnedFd)> {
    device::check_driver(add.id)?;
    let received = signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD])?;
    // Before memory is locked and the allocator keeps what it has: this takes 6 MB for a moment.
    let (feed, mode, reason) = Source::make(add.slot_free)?;
    protect::process()?;
    protect::first_in_line(protect::SUPERVISOR_PRIORITY);
    let arena = ghostswap::create_arena(false)?;
    let shared = Arc::new(Shared::new()?);
    shared.set_slot_free(mode, &reason);
    let active = start(add, &add.tiers, false, &arena, &shared, feed.as_ref(), None)?;
    let mut supervisor = Supervisor::new(add, arena, shared, feed, active);
    if let Err(why) = kept::keep(&supervisor.manager, &supervisor.arena, &supervisor.shared, supervisor.feed.as_ref()) {
        // In the background nobody may see it; it matters only should all processes be killed at once.
        let _ = writeln!(std::io::stderr(), "ghostswap-ublk: the service manager keeps nothing: {why:#}");
    }
    supervisor.active.order("add")?;
    Ok((supervisor, received))
}

impl<'a> Supervisor<'a> {
    fn new(add: &'a Add, arena: OwnedFd, shared: Arc<Shared>, feed: Option<Source>, active: Worker) -> Supervisor<'a> {
        shared.board.supervisor.store(u64::from(std::process::id()), Ordering::Relaxed);
        shared.board.worker.store(active.pid as u64, Ordering::Relaxed);
        Supervisor {
            add,
            upgrading: false,
            tiers: tiers_of(&shared, &add.tiers),
            change: None,
            arena,
            shared,
            feed,
            active,
            stranger: None,
            standbys: Vec::with_capacity(STANDBYS),
            agent: None,
            device: None,
            recoverable: false,
            died: None,
            short_lives: 0,
            agent_due: Instant::now(),
            standby_due: Instant::now(),
            tell: None,
            pulse: Pulse::new(),
            spare: Spare::new(),
            manager: Manager::from_env(),
            resumed: false,
        }
    }

    fn watch(&mut self, received: &OwnedFd) -> Result<()> {
        loop {
            let fd = |w: &Worker| w.pipe.get_ref().as_raw_fd();
            let standby = |i: usize| self.standbys.get(i).map_or(-1, fd);
            // A stranger's pipe has ended long ago; its process has not.
            let active = self.stranger.as_ref().map_or(fd(&self.active), |s| s.as_ref().map_or(-1, OwnedFd::as_raw_fd));
            let (first, second, bell) = (standby(0), standby(1), self.shared.supervisor_bell());
            let [signal, said, first_said, second_said, ordered] =
                signals::poll([received.as_raw_fd(), active, first, second, bell], LOOK_EVERY);
            let stranger_ended = said && self.stranger.is_some();
            if stranger_ended {
                self.stranger = Some(None);
            } else if said {
                self.hear()?;
            }
            for (i, said) in [first_said, second_said].into_iter().enumerate() {
                if said {
                    self.hear_standby(i);
                }
            }
            // After what standbys said: which they are changes with it.
            if stranger_ended && self.worker_ended(None)? {
                return Ok(());
            }
            if ordered {
                let asked = self.shared.asked();
                if asked & ASKED_TIERS != 0 {
                    self.change_tiers();
                }
                if asked & ASKED_UPGRADE != 0 {
                    self.upgrade();
                }
            }
            if signal {
                match (signals::next(received), self.agent) {
                    (Some(libc::SIGCHLD) | None, _) => {}
                    // The agent finds out whether the device may go.
                    (Some(_), Some(agent)) => kill(agent, libc::SIGTERM),
                    // The last one died just now.
                    (Some(_), None) if self.device.is_some() => {
                        self.start_agent();
                        self.agent.into_iter().for_each(|agent| kill(agent, libc::SIGTERM));
                    }
                    (Some(_), None) => {
                        self.kill_active();
                        return Ok(());
                    }
                }
            }
            while let Some((pid, status)) = reap() {
                if pid == self.active.pid {
                    if self.worker_ended(Some(status))? {
                        return Ok(());
                    }
                } else if self.agent == Some(pid) {
                    self.agent = None;
                } else if let Some(i) = self.standbys.iter().position(|s| s.pid == pid) {
                    self.standby_died(i, &describe(status));
                } else if status == 0 && !self.resumed {
                    // The waiting process of a daemon in the foreground: what it was to do is done.
                    self.manager.say("READY=1");
                }
            }
            self.check_pulse();
            if self.died.is_none() {
                self.manager.sign_of_life();
            }
            self.make_up_numbers();
        }
    }

    /// Starts what is missing. What dies again and again is not started again at once.
    fn make_up_numbers(&mut self) {
        let now = Instant::now();
        if self.device.is_some() && self.agent.is_none() && now >= self.agent_due {
            self.agent_due = now + LOOK_EVERY;
            self.start_agent();
        }
        // A take-over under way is not to share the CPUs with the making of the next standby.
        if now >= self.standby_due && (self.died.is_none() || self.standbys.is_empty()) {
            self.stand_by();
        }
    }

    /// What the active worker says. All that was read at once, since nobody waits for what is in the
    /// reader already; a line without an end is of one that was killed in the middle of it.
    fn hear(&mut self) -> Result<()> {
        loop {
            let mut line = String::new();
            let n = self.active.pipe.read_line(&mut line).unwrap_or(0);
            if n == 0 || !line.ends_with('\n') {
                // It is ending: its death comes as a signal. Do not spin until then.
                std::thread::sleep(Duration::from_millis(1));
                return Ok(());
            }
            match line.trim_end().split_once(' ') {
                Some(("live", rest)) => self.is_live(rest),
                Some(("error", why)) if self.device.is_none() => return Err(anyhow!("{why}")),
                Some(("error", why)) => {
                    // In the foreground somebody may see it; in the background the next worker tries.
                    let _ = writeln!(std::io::stderr(), "ghostswap-ublk: a worker failed: {why}");
                    self.note_trouble(why);
                }
                _ => {}
            }
            if !self.active.pipe.buffer().contains(&b'\n') {
                return Ok(());
            }
        }
    }

    /// One line of a standby: that it is ready, or why it never will be.
    fn hear_standby(&mut self, i: usize) {
        let Some(standby) = self.standbys.get_mut(i) else { return };
        let mut line = String::new();
        match standby.pipe.read_line(&mut line) {
            // It is ending: its death comes as a signal. Do not spin until then.
            Ok(0) | Err(_) => std::thread::sleep(Duration::from_millis(1)),
            Ok(_) => match line.trim_end().split_once(' ') {
                None => {
                    standby.ready = true;
                    if standby.trial {
                        self.trial_ready();
                    } else if self.upgrading {
                        self.kill_active();
                    }
                }
                Some(("error", why)) if standby.trial => self.note_trouble(why),
                Some(("error", why)) => self.shared.set_upgrade_error(&format!("a new worker failed: {why}")),
                _ => {}
            },
        }
    }

    fn standby_died(&mut self, i: usize, how: &str) {
        let mut dead = self.standbys.remove(i);
        if dead.trial {
            dead.last_words().into_iter().for_each(|why| self.note_trouble(&why));
            self.trial_failed(how);
        } else if std::mem::take(&mut self.upgrading) && self.shared.upgrade_error().is_empty() {
            self.shared.set_upgrade_error(&format!("a new worker {how}; the old one serves on"));
        }
        self.standby_due = Instant::now() + LOOK_EVERY;
    }

    fn is_live(&mut self, said: &str) {
        let (live_us, said) = said.split_once(' ').unwrap_or_default();
        if let Some(died) = self.died.take() {
            // This process may hear of it late, when it is making the next to stand by.
            let late_us = protect::monotonic_us().saturating_sub(live_us.parse().unwrap_or(u64::MAX));
            let (board, us) = (self.shared.board, (died.elapsed().as_micros() as u64).saturating_sub(late_us));
            board.last_take_over_us.store(us, Ordering::Relaxed);
            board.longest_take_over_us.fetch_max(us, Ordering::Relaxed);
        }
        self.pulse.restart();
        (self.active.since, self.active.live) = (Instant::now(), true);
        self.tiers_hold();
        let mut words = said.splitn(3, ' ');
        let (id, recoverable, path) = (words.next(), words.next(), words.next().unwrap_or(""));
        // Once a device could be handed over, it can.
        self.recoverable |= recoverable == Some("true");
        if let Some(id) = id.and_then(|id| id.parse().ok()) {
            if self.device.replace((id, path.into())).is_none() {
                self.aim_feed();
            }
        }
        self.tell_manager(path);
    }

    /// Has freed slots on the new device reported.
    fn aim_feed(&mut self) {
        let (Some(feed), Some((_, path))) = (&self.feed, &self.device) else { return };
        if let Err(e) = feed.aim(path) {
            self.shared.set_slot_free(Mode::Discard, &format!("{e:#}"));
        }
    }

    /// A new device is ready only when the waiting process has swapped it on.
    fn tell_manager(&mut self, path: &str) {
        let mut lines = format!("STATUS={path} is served by process {}", self.active.pid);
        if self.resumed {
            lines += &format!("\n{}MAINPID={}\nREADY=1", self.manager.watchdog_line(), std::process::id());
        }
        self.manager.say(&lines);
    }

    /// What a dead worker said and nobody had read.
    fn hear_last_words(&mut self) -> Result<()> {
        self.active.pipe.get_ref().set_nonblocking(true)?;
        self.hear()
    }

    /// The active worker ended; of a stranger nobody tells how. True: as it was to.
    fn worker_ended(&mut self, status: Option<i32>) -> Result<bool> {
        self.stranger = None;
        self.hear_last_words()?;
        if status == Some(0) {
            return Ok(true);
        }
        if self.stopping() {
            let Some((id, _)) = self.device.as_ref().filter(|(id, _)| device::kernel_has(*id)) else { return Ok(true) };
            self.active = self.remover_of(*id);
            return Ok(false);
        }
        self.take_over(&status.map_or("died beside its supervisor".to_owned(), describe))?;
        Ok(false)
    }

    /// Whether the device was told to go, by a worker that may be dead by now.
    fn stopping(&self) -> bool {
        self.shared.board.stopping.load(Ordering::Relaxed) != 0
    }

    /// One that ends what a worker had begun when it died: the device would be there for good, and dead.
    fn remover_of(&mut self, id: u32) -> Worker {
        self.pause_after(self.active.since.elapsed());
        self.pulse.restart();
        until_done(|| remover(id).ok())
    }

    fn kill_active(&self) {
        match &self.stranger {
            Some(process) => process.iter().for_each(kill_stranger),
            None => kill(self.active.pid, libc::SIGKILL),
        }
    }

    fn take_over(&mut self, why: &str) -> Result<()> {
        // Of one that was killed for hanging the death was noted before it ended.
        let taking_over = self.died.filter(|_| !self.active.live).map(|died| died.elapsed());
        let lived = self.active.lived();
        let died = *self.died.get_or_insert_with(Instant::now);
        let Some((id, _)) = self.device else { bail!("the worker {why} before the device was live") };
        if !device::kernel_has(id) {
            bail!("the worker {why} and ublkb{id} is gone");
        }
        if !self.recoverable {
            bail!("the worker {why}: this kernel cannot hand ublkb{id} to another");
        }
        self.pause_after(lived);
        let changed = self.settle_tiers(taking_over.is_some());
        let board = self.shared.board;
        let upgraded = std::mem::take(&mut self.upgrading);
        match (upgraded, changed) {
            (true, _) => drop(board.upgrades.fetch_add(1, Ordering::Relaxed)),
            (_, true) => {}
            _ => drop(board.taken_over.fetch_add(1, Ordering::Relaxed)),
        }
        board.generation.fetch_add(1, Ordering::Relaxed);
        let why = match (upgraded, changed) {
            (true, _) => "was of an older program".to_owned(),
            (_, true) => "had other tiers".to_owned(),
            _ => {
                let (ready, all) = (ready_count(&self.standbys), self.standbys.len());
                let since = taking_over.map_or(String::new(), |t| format!(" {t:?} after the last that served"));
                format!("{why}{since}, {ready} of {all} standbys ready")
            }
        };
        let died_us = protect::monotonic_us().saturating_sub(died.elapsed().as_micros() as u64);
        let order = format!("recover {died_us} {why}");
        // One that is not ready yet will be soonest; one that cannot be told is dead.
        self.standbys.sort_by_key(|s| !s.ready);
        let mut ready = None;
        while ready.is_none() && !self.standbys.is_empty() {
            let mut first = self.standbys.remove(0);
            ready = self.ordered(&mut first, &order).then_some(first);
        }
        let ready = match ready {
            Some(standby) => standby,
            None => self.forked_now(id, &order),
        };
        self.active = Worker { since: died, ..ready };
        self.pulse.restart();
        Ok(())
    }

    /// Orders a worker to take over, known on the board as who serves: whoever else had to, should this
    /// process end just now, finds it there.
    fn ordered(&self, worker: &mut Worker, order: &str) -> bool {
        self.shared.board.worker.store(worker.pid as u64, Ordering::Relaxed);
        worker.order(order).is_ok()
    }

    /// A worker made only now that it is needed.
    fn forked_now(&self, id: u32, order: &str) -> Worker {
        until_done(|| {
            let fresh = self.another(Some(id)).ok();
            fresh.and_then(|mut fresh| self.ordered(&mut fresh, order).then_some(fresh))
        })
    }

    /// Kills a worker of which a queue shows no sign of life. One that is taking over waits for the
    /// driver, which waits for the kernel to clear away the dead one: it has more time.
    fn check_pulse(&mut self) {
        let watchdog = Duration::from_secs(self.add.watchdog.into());
        if self.upgrading {
            let late = |s: &&Worker| !s.ready && s.since.elapsed() >= UPGRADE_PATIENCE;
            self.standbys.first().filter(late).into_iter().for_each(|s| kill(s.pid, libc::SIGKILL));
        }
        let late = |s: &&Worker| s.trial && !s.ready && s.since.elapsed() >= TRIAL_PATIENCE;
        self.standbys.iter().filter(late).for_each(|s| kill(s.pid, libc::SIGKILL));
        if watchdog.is_zero() || self.device.is_none() {
            return;
        }
        // A stranger may be taking over, too.
        let longer = self.died.is_some() || self.stopping() || self.stranger.is_some();
        let patience = if longer { watchdog.max(TAKE_OVER_PATIENCE) } else { watchdog };
        if self.pulse.quiet_for(&self.shared) >= patience {
            // SIGKILL works on a stopped process too; its death is the take-over's beginning.
            self.died.get_or_insert_with(Instant::now);
            self.kill_active();
            self.pulse.restart();
        }
    }

    /// Has one more worker stand by, if one is missing and none is on its way. What it takes of a
    /// machine short of memory would be missing in a take-over, so the last but one can wait.
    fn stand_by(&mut self) {
        let missing = self.standbys.len() < STANDBYS
            && self.change.as_ref().is_none_or(Change::is_switched)
            && self.standbys.iter().all(|s| s.ready);
        if !self.recoverable
            || self.stopping()
            || !missing
            || (!self.standbys.is_empty() && self.spare.bytes() < STANDBY_COST)
        {
            return;
        }
        // Without one a worker is forked when it is needed.
        let id = self.device.as_ref().map(|(id, _)| *id);
        self.standbys.extend(self.another(id).ok());
    }

    /// A worker of the tiers that hold.
    fn another(&self, id: Option<u32>) -> Result<Worker> {
        start(self.add, &self.tiers, false, &self.arena, &self.shared, self.feed.as_ref(), id)
    }

    fn start_agent(&mut self) {
        let Some((id, path)) = &self.device else { return };
        let tell = self.tell.take();
        let mut keep = self.shared.descriptors().to_vec();
        keep.extend(tell.as_ref().map(|t| t.as_raw_fd()));
        let heritage = Heritage::of(self.arena.as_raw_fd(), self.feed.as_ref(), self.recoverable);
        keep.extend(heritage.descriptors());
        // Without one the device goes on, and nobody can ask how it is.
        self.agent =
            child(c"gs-agent", keep, || agent::run(self.add, *id, path, self.shared.clone(), tell, heritage)).ok();
    }

    fn pause_after(&mut self, lived: Duration) {
        self.short_lives = if lived < SHORT_LIFE { self.short_lives + 1 } else { 0 };
        if self.short_lives > CHANCE {
            std::thread::sleep((BACK_OFF * self.short_lives).min(LONGEST_PAUSE));
        }
    }

    /// The device is gone, or was never there.
    fn end(&mut self) {
        self.manager.say("STOPPING=1");
        if let Some((id, _)) = self.device {
            let _ = std::fs::remove_file(control::socket_path(id));
        }
        self.agent.into_iter().chain(self.standbys.iter().map(|s| s.pid)).for_each(|pid| kill(pid, libc::SIGKILL));
    }
}

/// What cannot be done now can be later: to give up would be to throw all pages away.
fn until_done<T>(mut work: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(done) = work() {
            return done;
        }
        std::thread::sleep(BACK_OFF);
    }
}

#[cfg(test)]
mod tests;
