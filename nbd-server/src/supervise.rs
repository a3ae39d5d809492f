//! Supervisor and workers: the one holds what must not go, the arena with all pages, the table of exports and the
//! sockets that listen; of the others one serves. A worker that crashes, is killed or hangs is followed by one that
//! stands by, on the same arena, and clients that connect again find their data; meanwhile they wait in the listening
//! sockets' backlog.
//!
//! A worker is this program once more, with the same arguments; `link.rs` has the words between the two, `tables.rs`
//! the table. It learns of the supervisor's end: then it serves on, but nobody follows it. An upgrade is a newer
//! program's worker that gets ready, an `exec` (`handover.rs`), and then a take-over like any other; so is a change of
//! tiers, by a worker that has them (`tiers.rs`). The service
//! manager keeps arena and tables as well (`notify.rs`), and gives them to whom it starts next.
//!
//! The supervisor has one thread and waits for nobody.

mod handover;
mod link;
mod pass;
mod signals;
mod tables;
mod worker;

pub use handover::is_called;
pub use link::{given, tell_failure, Desk, Given, Link};
pub use signals::Signals;
pub use tables::Tables;
pub use worker::Estate;

use crate::notify;
use crate::pulse::LOOK_EVERY;
use anyhow::{bail, ensure, Context, Result};
use handover::{History, Left};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{kill_process, Pid, Signal, WaitStatus};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tracing::{error, info, warn};
use worker::{describe, ensure_program, reap, Worker};

/// The running program, even if another lies at its path by now.
const SELF: &str = "/proc/self/exe";
/// Before another worker follows one that lived for less than `SHORT`: at first, and at most.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_secs(1);
/// Before one is made to stand by: clients that connect again come first.
const STANDBY_PAUSE: Duration = Duration::from_secs(1);
/// How long a newer program's worker may take to get ready before the upgrade is given up.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(30);
/// The same for a worker of other tiers: a file's space may have to be taken.
const TRIAL_PATIENCE: Duration = Duration::from_secs(120);
/// For a worker that is replaced to answer what it was asked.
const FAREWELL: Duration = Duration::from_secs(1);
/// What the service manager keeps, by name.
pub const KEPT: [&str; 3] = ["ghostswap-arena", "ghostswap-table-0", "ghostswap-table-1"];

struct Supervisor {
    signals: Signals,
    watchdog: Duration,
    /// Where newer programs are looked for.
    path: PathBuf,
    estate: Estate,
    worker: Option<Worker>,
    worker_due: Instant,
    standby: Option<Worker>,
    standby_due: Instant,
    /// A program that is to replace this one, and its worker, which is getting ready.
    newer: Option<(File, Worker)>,
    /// A worker of other tiers, which is getting ready.
    trial: Option<Worker>,
    /// It was ordered, and nobody has served since: what went wrong then, if anything.
    changing: Option<Option<String>>,
    /// The program before this one, until a worker of this one has served.
    older: Option<File>,
    /// Since when the worker is being ended for its successor.
    leaving: Option<Instant>,
    /// When the last worker ended that no other has followed yet.
    died: Option<Instant>,
    pause: Duration,
    /// A worker has served once.
    served: bool,
    /// Exports are as the command line has them, as far as it says.
    anew: bool,
    /// The service manager has what it is to keep.
    kept: bool,
    ending: bool,
    history: History,
}

/// Supervises until the worker has ended in order, or the first one cannot begin. `found`: what the service manager
/// had kept is served again.
pub fn run(signals: Signals, watchdog: Duration, estate: Estate, found: bool) -> Result<ExitCode> {
    let arguments = std::env::args_os().next().map(PathBuf::from);
    // Not what it leads to, if it is a link: an upgrade may be another link.
    let path = match arguments.filter(|name| name.is_absolute()) {
        Some(path) => path,
        None => std::env::current_exe().context("cannot find this program's path")?,
    };
    let mut supervisor = Supervisor::new(signals, watchdog, path, estate);
    (supervisor.anew, supervisor.kept) = (found, found);
    supervisor.watch()
}

/// Goes on where an older program left off, or this one, if a newer one gave up.
pub fn resume(signals: Signals, watchdog: Duration) -> Result<ExitCode> {
    // Called by a descriptor, it goes by that one's number.
    rustix::thread::set_name(c"ghostswap-nbd").context("cannot name this process")?;
    let left = handover::take_letter().context("cannot read what the supervisor before left")?;
    let Left { path, estate, worker, standby, others, history, returned, program } = left;
    let mut supervisor = Supervisor::new(signals, watchdog, path, estate);
    (supervisor.worker, supervisor.standby, supervisor.history) = (worker, standby, history);
    (supervisor.served, supervisor.kept) = (true, true);
    for pid in others {
        // One that is gone needs it no more.
        let _ = kill_process(pid, Signal::KILL);
    }
    match returned {
        None => {
            supervisor.older = Some(program);
            // First of all: from then on somebody serves, whatever becomes of this process.
            supervisor.standby.iter().for_each(|standby| standby.tell("next"));
            supervisor.worker.iter().for_each(|worker| worker.signal(Signal::TERM));
            supervisor.leaving = Some(Instant::now());
        }
        Some(why) => supervisor.refuse(&format!("the new program gave up: {why}")),
    }
    supervisor.watch()
}

impl Supervisor {
    fn new(signals: Signals, watchdog: Duration, path: PathBuf, estate: Estate) -> Supervisor {
        let now = Instant::now();
        Supervisor {
            signals,
            watchdog,
            path,
            estate,
            worker: None,
            worker_due: now,
            standby: None,
            standby_due: now,
            newer: None,
            trial: None,
            changing: None,
            older: None,
            leaving: None,
            died: None,
            pause: PAUSE,
            served: false,
            anew: false,
            kept: false,
            ending: false,
            history: History::default(),
        }
    }

    fn watch(&mut self) -> Result<ExitCode> {
        loop {
            while let Some((pid, status)) = reap() {
                if let Some(code) = self.child_ended(pid, status) {
                    return Ok(code);
                }
            }
            self.make_up_numbers()?;
            self.wait()?;
            self.hear_signals();
            self.hear_worker();
            self.hear_others();
            self.look();
        }
    }

    /// Until there is something to hear, or to do.
    fn wait(&self) -> Result<()> {
        let newer = self.newer.as_ref().map(|(_, worker)| worker);
        let children = [self.worker.as_ref(), self.standby.as_ref(), newer, self.trial.as_ref()];
        let links = children.into_iter().flatten().filter(|worker| !worker.silent).map(|worker| &worker.link);
        let signals = self.signals.descriptors();
        let signals = signals.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN));
        let mut fds: Vec<PollFd<'_>> = signals.chain(links.map(|link| PollFd::new(link, PollFlags::IN))).collect();
        let due = self.worker_due.saturating_duration_since(Instant::now());
        let time = if self.worker.is_none() { due.min(LOOK_EVERY) } else { LOOK_EVERY };
        match poll(&mut fds, Some(&Timespec::try_from(time)?)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for the worker"),
        }
    }

    fn hear_signals(&mut self) {
        let (end, tell) = self.signals.received();
        if end {
            self.ending = true;
            notify::say("STOPPING=1");
            self.worker.iter().for_each(|worker| worker.signal(Signal::TERM));
        }
        // Before it serves it does not know that signal, and would end by it.
        if let (true, Some(worker)) = (tell, self.worker.as_ref().filter(|worker| worker.serves)) {
            worker.signal(Signal::USR1);
        }
    }

    fn hear_worker(&mut self) {
        let Some(worker) = &mut self.worker else { return };
        let served = worker.serves;
        let lines = worker.hear();
        if worker.serves && !served {
            self.is_live();
        }
        for line in lines {
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("upgrade", _) => {
                    self.history.upgrade_error = None;
                    self.begin_upgrade().unwrap_or_else(|error| self.refuse(&format!("{error:#}")));
                }
                ("tiers", list) => {
                    self.history.tier_error = None;
                    self.begin_trial(list).unwrap_or_else(|error| self.refuse_tiers(&format!("{error:#}")));
                }
                ("stuck", what) => self.kill_worker(what),
                _ => {}
            }
        }
    }

    fn hear_others(&mut self) {
        self.standby.iter_mut().for_each(|standby| drop(standby.hear()));
        self.hear_trial();
        let Some((_, newer)) = &mut self.newer else { return };
        newer.hear();
        match newer.ready.as_deref() {
            None => {}
            Some(handover::VERSION) => self.hand_over(),
            Some(other) => {
                let why = format!("the new program hands over by version {other}, not {}", handover::VERSION);
                self.drop_newer(&why);
            }
        }
    }

    /// Finds those who show no sign of life.
    fn look(&mut self) {
        let watchdog = self.watchdog;
        if self.worker.as_mut().is_some_and(|worker| worker.hangs(watchdog)) {
            self.kill_worker("it shows no sign of life");
        }
        if self.standby.as_mut().is_some_and(|standby| standby.hangs(watchdog)) {
            self.standby.iter().for_each(|standby| standby.signal(Signal::KILL));
        }
        if self.newer.as_ref().is_some_and(|(_, newer)| newer.since.elapsed() >= UPGRADE_PATIENCE) {
            self.drop_newer(&format!("the new program did not get ready in {UPGRADE_PATIENCE:?}"));
        }
        if self.trial.as_ref().is_some_and(|trial| trial.since.elapsed() >= TRIAL_PATIENCE) {
            self.drop_trial(&format!("the new worker did not get ready in {TRIAL_PATIENCE:?}"));
        }
        if self.leaving.is_some_and(|since| since.elapsed() >= FAREWELL) {
            self.worker.iter().for_each(|worker| worker.signal(Signal::KILL));
        }
    }

    /// One that hangs. SIGKILL works on a stopped process too; its death is the take-over's beginning.
    fn kill_worker(&mut self, why: &str) {
        let Some(worker) = &self.worker else { return };
        error!("the worker hangs and is killed: {why}");
        self.died.get_or_insert_with(Instant::now);
        worker.signal(Signal::KILL);
    }

    fn is_live(&mut self) {
        let now = Instant::now();
        (self.served, self.anew) = (true, false);
        self.standby_due = now + STANDBY_PAUSE;
        if let Some(died) = self.died.take() {
            let us = (now - died).as_micros() as u64;
            self.history.last_take_over_us = Some(us);
            self.history.longest_take_over_us = self.history.longest_take_over_us.max(us);
        }
        if self.older.take().is_some() {
            self.history.upgrades += 1;
            self.history.upgrade_error = None;
            info!("upgraded to the program at {}", self.path.display());
        }
        if let Some(trouble) = self.changing.take() {
            let done = self.worker.as_ref().is_some_and(|worker| worker.trial);
            self.history.tier_changes += u64::from(done);
            self.history.tier_error = (!done).then(|| trouble.unwrap_or_else(|| "the new worker died".into()));
        }
        if !self.kept {
            let [first, second] = self.estate.tables.descriptors();
            let kept = std::os::fd::AsFd::as_fd(&self.estate.arena);
            let named: Vec<_> = KEPT.into_iter().zip([kept, first, second]).collect();
            notify::keep(&named).unwrap_or_else(|error| warn!("nobody keeps the pages over a restart: {error:#}"));
            self.kept = true;
        }
        notify::say("READY=1");
        self.tell_status();
    }

    fn tell_status(&self) {
        // Numbers and text always serialise.
        let status = serde_json::to_string(&self.history).unwrap_or_default();
        self.worker.iter().for_each(|worker| worker.tell(&format!("status {status}")));
    }

    /// Some child ended. The server's status, if it ends with it.
    fn child_ended(&mut self, pid: Pid, status: WaitStatus) -> Option<ExitCode> {
        if self.worker.as_ref().is_some_and(|worker| worker.pid == pid) {
            return self.worker_ended(status);
        }
        if self.standby.as_ref().is_some_and(|standby| standby.pid == pid) {
            let mut standby = self.standby.take()?;
            standby.hear();
            let why = standby.failure.unwrap_or_else(|| describe(status));
            warn!("the worker that stood by is gone: {why}");
            self.standby_due = Instant::now() + LONGEST_PAUSE;
        }
        if let Some(mut trial) = self.trial.take_if(|trial| trial.pid == pid) {
            trial.hear();
            self.refuse_tiers(&trial.failure.unwrap_or_else(|| format!("a new worker {}", describe(status))));
        }
        if let Some((_, newer)) = self.newer.as_mut().filter(|(_, newer)| newer.pid == pid) {
            newer.hear();
            let why = newer.failure.take().unwrap_or_else(|| describe(status));
            self.newer = None;
            self.refuse(&format!("the new program: {why}"));
        }
        None
    }

    fn worker_ended(&mut self, status: WaitStatus) -> Option<ExitCode> {
        // What it said last may be that it serves.
        self.hear_worker();
        let worker = self.worker.take()?;
        let now = Instant::now();
        self.drop_newer("the worker died meanwhile");
        self.drop_trial("the worker died meanwhile: try again");
        let leaving = self.leaving.take();
        if self.ending || !self.served || leaving.is_none() && status.exit_status() == Some(0) {
            return Some(code_of(status, self.ending));
        }
        self.died = Some(self.died.or(leaving).unwrap_or(now));
        self.history.last_take_over_us = None;
        self.worker_due = now;
        if leaving.is_some() {
            return None;
        }
        let why = worker.failure.unwrap_or_else(|| describe(status));
        if let Some(trouble) = &mut self.changing {
            *trouble = Some(why.clone());
        }
        if let Some(older) = self.older.take().filter(|_| !worker.serves) {
            let others: Vec<Pid> = self.standby.iter().map(|standby| standby.pid).collect();
            let (path, estate, history) = (&self.path, &self.estate, &self.history);
            let error = handover::call(&older, path, estate, [None, None], &others, history, Some(why));
            error!("the program before does not come back: {error:#}");
            return None;
        }
        warn!("the worker is gone ({why}); another takes over, and clients may connect again");
        self.history.take_overs += 1;
        self.pause = if worker.since.elapsed() < SHORT { (self.pause * 2).min(LONGEST_PAUSE) } else { PAUSE };
        self.worker_due = now + (self.pause - PAUSE);
        None
    }

    /// Starts who is missing.
    fn make_up_numbers(&mut self) -> Result<()> {
        let now = Instant::now();
        if self.worker.is_none() && (now >= self.worker_due || self.ending) {
            if self.ending {
                bail!("told to end while no worker could be started");
            }
            self.employ()?;
        }
        let serves = self.worker.as_ref().is_some_and(|worker| worker.serves);
        let quiet = self.newer.is_none() && self.trial.is_none() && self.leaving.is_none() && !self.ending;
        if serves && quiet && self.standby.is_none() && now >= self.standby_due {
            self.standby_due = now + LONGEST_PAUSE;
            match Worker::start(Path::new(SELF), &self.estate) {
                Ok(standby) => self.standby = Some(standby),
                Err(error) => warn!("no worker stands by: {error:#}"),
            }
        }
        Ok(())
    }

    /// Has a worker serve: who stands by, or a new one.
    fn employ(&mut self) -> Result<()> {
        let next = match self.standby.take() {
            Some(standby) => Ok(standby),
            None => Worker::start(Path::new(SELF), &self.estate),
        };
        let mut next = match next {
            Ok(next) => next,
            Err(error) if !self.served => return Err(error),
            Err(error) => {
                error!("no worker takes over: {error:#}; trying again");
                self.worker_due = Instant::now() + LONGEST_PAUSE;
                return Ok(());
            }
        };
        next.since = Instant::now();
        next.tell(if self.anew { "serve anew" } else { "serve" });
        self.worker = Some(next);
        Ok(())
    }

    /// Has a worker of the program that lies at the path now get ready.
    fn begin_upgrade(&mut self) -> Result<()> {
        self.ensure_quiet()?;
        let program = ensure_program(&self.path)?;
        let newer = Worker::start(&handover::path_of(&program), &self.estate);
        let newer = newer.with_context(|| format!("{} cannot be called", self.path.display()))?;
        self.newer = Some((program, newer));
        Ok(())
    }

    fn ensure_quiet(&self) -> Result<()> {
        let busy = self.newer.is_some() || self.older.is_some() || self.leaving.is_some() || self.ending;
        let changing = self.trial.is_some() || self.changing.is_some();
        ensure!(!busy && !changing, "not now: an upgrade or a change of tiers is under way, or the server's end");
        Ok(())
    }

    /// Has a worker of other tiers get ready.
    fn begin_trial(&mut self, list: &str) -> Result<()> {
        self.ensure_quiet()?;
        let tiers = serde_json::from_str(list).context("bad tiers")?;
        self.trial = Some(Worker::start_with(Path::new(SELF), &self.estate, Some(tiers))?);
        Ok(())
    }

    /// One that is ready takes over.
    fn hear_trial(&mut self) {
        let Some(trial) = &mut self.trial else { return };
        trial.hear();
        if trial.ready.is_none() {
            return;
        }
        let before = std::mem::replace(&mut self.standby, self.trial.take());
        before.iter().for_each(|standby| standby.signal(Signal::KILL));
        self.changing = Some(None);
        self.standby.iter().for_each(|standby| standby.tell("next"));
        self.worker.iter().for_each(|worker| worker.signal(Signal::TERM));
        self.leaving = Some(Instant::now());
    }

    fn drop_trial(&mut self, why: &str) {
        if let Some(trial) = self.trial.take() {
            trial.signal(Signal::KILL);
            self.refuse_tiers(why);
        }
    }

    fn refuse_tiers(&mut self, why: &str) {
        warn!("the tiers are as before: {why}");
        self.history.tier_error = Some(why.to_owned());
        self.tell_refusal(why);
    }

    /// Becomes the newer program. If that fails, all is as before.
    fn hand_over(&mut self) {
        let Some((program, newer)) = self.newer.take() else { return };
        let others: Vec<Pid> = self.standby.iter().map(|standby| standby.pid).collect();
        let children = [self.worker.as_ref(), Some(&newer)];
        let why = handover::call(&program, &self.path, &self.estate, children, &others, &self.history, None);
        newer.signal(Signal::KILL);
        self.refuse(&format!("{why:#}"));
    }

    fn drop_newer(&mut self, why: &str) {
        if let Some((_, newer)) = self.newer.take() {
            newer.signal(Signal::KILL);
            self.refuse(why);
        }
    }

    fn refuse(&mut self, why: &str) {
        warn!("not upgraded: {why}");
        self.history.upgrade_error = Some(why.to_owned());
        self.tell_refusal(why);
    }

    fn tell_refusal(&self, why: &str) {
        self.tell_status();
        let line = format!("refused {}", why.replace('\n', " "));
        self.worker.iter().for_each(|worker| worker.tell(&line));
    }
}

fn code_of(status: WaitStatus, ending: bool) -> ExitCode {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitCode::from(code as u8),
        // Told to end before it could listen to that.
        (None, Some(signal)) if ending && signal == Signal::TERM.as_raw() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
