//! The agent: the process of a device that may wait. It serves the control socket, writes out the
//! log, looks at /proc, keeps the swap windows and calls for help when the store stays full: all that asks
//! the kernel for memory, or for a page that was swapped out.
//! It holds nothing that others wait for; if it dies, the supervisor starts another. If the supervisor
//! dies, it becomes the next one (`heir.rs`).
//!
//! What it does not know itself it asks of the worker over the board.

use crate::board::Shared;
use crate::cli::Add;
use crate::control::{self, Answer, Request, TierChange};
use crate::heir::{self, Heritage};
use crate::shortage::Shortage;
use crate::supervise::{text_of, tiers_of};
use crate::windows::{self, Keeper};
use crate::{daemon, log, protect, signals};
use anyhow::{Context, Result};
use ghostswap::config::{with_tier, without_tier, TierConfig, TierSettings};
use serde_json::{json, Value};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const STACK_BYTES: usize = 128 << 10;
/// How long the worker, or the one that takes over from it, may take to answer.
const PATIENCE: Duration = Duration::from_secs(25);

/// How often to look whether the store stays full.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const SYSRQ: &str = "/proc/sysrq-trigger";

struct Agent {
    path: PathBuf,
    shared: Arc<Shared>,
    /// The command line's tiers.
    tiers: Vec<TierConfig>,
    keeper: Arc<Mutex<Keeper>>,
    shortage: Shortage,
    /// Refusals for this long cost a victim; zero: they do not.
    oom_after: Duration,
    /// Open beforehand: there may be no memory for it later.
    sysrq: Option<File>,
}

/// An agent's life. `tell` hears once status can be asked.
pub fn run(
    add: &Add,
    id: u32,
    path: &Path,
    shared: Arc<Shared>,
    tell: Option<UnixStream>,
    heritage: Heritage,
) -> Result<()> {
    protect::as_any_other();
    protect::process()?;
    let received = signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
    let listener = match control::listen(id) {
        Ok(listener) => listener,
        Err(e) => {
            if let Some(mut tell) = tell {
                daemon::tell_error(&mut tell, &e);
            }
            return Err(e);
        }
    };
    let sink = match add.foreground {
        true => log::Sink::Stderr,
        false => log::Sink::file(&control::run_dir().join(format!("ublk{id}.log")))?,
    };
    let ring = shared.clone();
    let writer = std::thread::Builder::new().name("gs-log".into()).stack_size(STACK_BYTES);
    let own = log::start_own(&shared);
    let drain = move || {
        protect::store_thread("log");
        log::drain(&ring, &own, sink)
    };
    writer.spawn(drain).context("cannot start the log thread")?;
    let keeper = Arc::new(Mutex::new(Keeper::new(path, shared.clone(), add.priority.into())?));
    keep_windows(&keeper)?;
    heritage.wait(id, path, &shared)?;
    if let Some(line) = supervision(&shared).1 {
        tracing::warn!("{}: {line}", path.display());
    }
    if let Some(mut tell) = tell {
        daemon::tell_live(&mut tell, path);
    }
    let mut agent = Agent {
        path: path.into(),
        shared,
        tiers: add.tiers.clone(),
        keeper,
        shortage: Shortage::default(),
        oom_after: Duration::from_secs(add.oom_after.into()),
        sysrq: OpenOptions::new().write(true).open(SYSRQ).ok(),
    };
    agent.serve(&listener, &received)
}

/// The thread that looks after swap windows. It may wait for memory, by swap if need be, so it is no
/// IO_FLUSHER; and real-time, so that what an opening needs may be had when others wait for it.
fn keep_windows(keeper: &Arc<Mutex<Keeper>>) -> Result<()> {
    let keeper = keeper.clone();
    let body = move || {
        protect::may_wait();
        protect::first_in_line(protect::WINDOWS_PRIORITY);
        loop {
            let pause = keeper.lock().unwrap_or_else(PoisonError::into_inner).look();
            std::thread::sleep(pause);
        }
    };
    let thread = std::thread::Builder::new().name("gs-windows".into()).stack_size(STACK_BYTES);
    thread.spawn(body).context("cannot start the windows' thread").map(drop)
}

impl Agent {
    fn serve(&mut self, listener: &UnixListener, received: &OwnedFd) -> Result<()> {
        loop {
            let [signal, asked] = signals::poll([received.as_raw_fd(), listener.as_raw_fd()], LOOK_EVERY);
            self.look_for_shortage();
            if signal && signals::next(received).is_some() {
                // From the supervisor, or from whoever stops all of the device's processes.
                let answer = self.carry_out(Request::Stop { force: false });
                if let Some(why) = answer.error {
                    eprintln!("ghostswap-ublk: signal ignored: {why}");
                }
            }
            if asked {
                // A client that hangs up early has its reasons.
                let _ = control::serve_one(listener, |request| self.carry_out(request));
            }
        }
    }

    fn look_for_shortage(&mut self) {
        let refused = self.shared.board.counters.refused.load(Ordering::Relaxed);
        if self.shortage.look(Instant::now(), refused, self.oom_after) && !self.oom_after.is_zero() {
            // Only for a swap device: whoever else writes to it can be told that it is full.
            if !control::in_use_as_swap(&self.path) {
                return;
            }
            if self.sysrq.as_mut().is_some_and(|f| f.write_all(b"f").is_ok()) {
                self.shared.board.victims.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The keeper, unless it is at work for long.
    fn with_keeper(&self, work: impl FnOnce(&mut Keeper) -> Result<()>) -> Answer {
        let began = Instant::now();
        loop {
            match self.keeper.try_lock() {
                Ok(mut keeper) => {
                    return match work(&mut keeper) {
                        Ok(()) => Answer::done(),
                        Err(e) => Answer::refusal(format!("{e:#}")),
                    }
                }
                Err(_) if began.elapsed() >= PATIENCE => return Answer::refusal("a window is just being opened"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// What the worker says, and what the kernel says of swap.
    fn status(&self) -> Answer {
        let mut answer = self.ask_worker(r#"{"cmd":"status"}"#);
        let swap = windows::describe(&self.path, &self.shared);
        if let (Some(device), Some(report), Ok((value, lines))) = (&mut answer.device, &mut answer.report, swap) {
            device["swap"] = value;
            *report = format!("{lines}\n{report}");
        }
        if let (Some(device), Some(report)) = (&mut answer.device, &mut answer.report) {
            let (value, line) = supervision(&self.shared);
            device["supervisor"] = value;
            let (order, error) = self.shared.tiers_done();
            device["tier_change"] = json!({"order": order, "error": error});
            line.into_iter().for_each(|line| *report = format!("{line}\n{report}"));
        }
        answer
    }

    /// Passes it on to the supervisor, which does it by a take-over.
    fn change_tiers(
        &self,
        order: u64,
        changed: impl FnOnce(&[TierConfig]) -> ghostswap::Result<Vec<TierConfig>>,
    ) -> Answer {
        if self.shared.tiers_wanted().0 == order {
            return Answer::done();
        }
        match changed(&tiers_of(&self.shared, &self.tiers)) {
            Ok(tiers) if self.shared.ask_tiers(&text_of(&tiers), order) => Answer::done(),
            Ok(_) => Answer::refusal("the tiers' description is too long"),
            Err(e) => Answer::refusal(e.to_string()),
        }
    }

    /// What the worker can do itself is done first, when it is known that the tiers may be as they are to be.
    fn set_tier(&self, spec: &str, order: u64) -> Answer {
        let settings = match spec.parse::<TierSettings>() {
            Ok(settings) => settings,
            Err(why) => return Answer::refusal(why),
        };
        let (now, later) = settings.split();
        if let Err(e) = later.iter().try_for_each(|later| later.apply(&tiers_of(&self.shared, &self.tiers)).map(drop)) {
            return Answer::refusal(e.to_string());
        }
        if let Some(now) = now.filter(|_| later.is_none() || self.shared.tiers_wanted().0 != order) {
            let what = TierChange::Set { spec: now.to_string(), order };
            let answer = self.pass_on(&Request::Tier { what });
            if !answer.ok {
                return answer;
            }
        }
        later.map_or_else(Answer::done, |later| self.change_tiers(order, |tiers| later.apply(tiers)))
    }

    fn pass_on(&self, request: &Request) -> Answer {
        serde_json::to_string(request).map_or_else(|e| Answer::refusal(e.to_string()), |text| self.ask_worker(&text))
    }

    fn ask_worker(&self, text: &str) -> Answer {
        match self.shared.ask(text, PATIENCE) {
            Some(answer) => serde_json::from_str(&answer).unwrap_or_else(|e| Answer::refusal(e.to_string())),
            None => Answer::refusal("the worker does not answer"),
        }
    }

    fn carry_out(&self, request: Request) -> Answer {
        match request {
            Request::Status => self.status(),
            Request::SwapOn { what } => self.with_keeper(|k| k.swap_on(what)),
            Request::SwapOff {} => self.with_keeper(|k| {
                k.let_go();
                Ok(())
            }),
            Request::Stop { force } if !force && control::in_use_as_swap(&self.path) => {
                let path = self.path.display();
                Answer::refusal(format!("{path} is in use as swap: swap it off first, with ghostswap-ublk swapoff"))
            }
            Request::Stop { .. } => self.ask_worker(r#"{"cmd":"stop"}"#),
            Request::Upgrade { program, order } => {
                match program.to_str().is_some_and(|path| self.shared.ask_upgrade(path, order)) {
                    true => Answer::done(),
                    false => Answer::refusal("the program's path is too long or not UTF-8"),
                }
            }
            Request::Tier { what: TierChange::Add { spec, order, before } } => {
                let tier = spec.parse::<TierConfig>();
                self.change_tiers(order, |tiers| match tier {
                    Ok(tier) => with_tier(tiers, tier, before.as_deref()),
                    Err(why) => Err(ghostswap::Error::InvalidConfig(why)),
                })
            }
            Request::Tier { what: TierChange::Remove { order, name } } => {
                self.change_tiers(order, |tiers| without_tier(tiers, name.as_deref()))
            }
            Request::Tier { what: TierChange::Set { spec, order } } => self.set_tier(&spec, order),
            for_the_worker @ (Request::Resize { .. }
            | Request::Recompress
            | Request::WriteBack { .. }
            | Request::Tier { .. }) => self.pass_on(&for_the_worker),
        }
    }
}

/// Who supervises, for programs; and for people, if there is anything to tell of it.
fn supervision(shared: &Shared) -> (Value, Option<String>) {
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let (pid, lost) = (count(&shared.board.supervisor), count(&shared.board.supervisors_lost));
    let alive = heir::alive(pid as libc::pid_t);
    let line = match (alive, lost) {
        (false, _) => {
            Some(format!("supervisor {pid} died; the worker serves on, and a new supervisor is being started"))
        }
        (true, 0) => None,
        (true, _) => Some(format!("supervisor {pid} took the place of one that died, {lost} so far; no page was lost")),
    };
    (json!({"process": pid, "alive": alive, "died": lost}), line)
}
