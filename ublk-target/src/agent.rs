//! The agent: the process of a device that may wait. It serves the control socket, writes out the
//! log, looks at /proc and calls for help when the store stays full: all that asks the kernel for memory, or for a page that was swapped out.
//! It holds nothing that others wait for; if it dies, the supervisor starts another.
//!
//! What it does not know itself it asks of the worker over the board.

use crate::board::Shared;
use crate::cli::Add;
use crate::control::{self, Answer, Request};
use crate::shortage::Shortage;
use crate::{daemon, log, protect, signals};
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::Arc;
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
    shortage: Shortage,
    /// Refusals for this long cost a victim; zero: they do not.
    oom_after: Duration,
    /// Open beforehand: there may be no memory for it later.
    sysrq: Option<File>,
}

/// An agent's life. `tell` hears once status can be asked.
pub fn run(add: &Add, id: u32, path: &Path, shared: Arc<Shared>, tell: Option<UnixStream>) -> Result<()> {
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
    let drain = move || {
        protect::store_thread("log");
        log::drain(&ring, sink)
    };
    writer.spawn(drain).context("cannot start the log thread")?;
    if let Some(mut tell) = tell {
        daemon::tell_live(&mut tell, path);
    }
    let mut agent = Agent {
        path: path.into(),
        shared,
        shortage: Shortage::default(),
        oom_after: Duration::from_secs(add.oom_after.into()),
        sysrq: OpenOptions::new().write(true).open(SYSRQ).ok(),
    };
    agent.serve(&listener, &received)
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

    fn carry_out(&self, request: Request) -> Answer {
        let text = match request {
            Request::Status => r#"{"cmd":"status"}"#,
            Request::Stop { force } if !force && control::in_use_as_swap(&self.path) => {
                let path = self.path.display();
                return Answer::refusal(format!("{path} is in use as swap: swapoff {path} first"));
            }
            Request::Stop { .. } => r#"{"cmd":"stop"}"#,
            Request::Resize { bytes } => &format!(r#"{{"cmd":"resize","bytes":{bytes}}}"#),
            Request::Upgrade { program } => {
                return match program.to_str().is_some_and(|path| self.shared.ask_upgrade(path)) {
                    true => Answer::done(),
                    false => Answer::refusal("the program's path is too long or not UTF-8"),
                }
            }
        };
        match self.shared.ask(text, PATIENCE) {
            Some(answer) => serde_json::from_str(&answer).unwrap_or_else(|e| Answer::refusal(e.to_string())),
            None => Answer::refusal("the worker does not answer"),
        }
    }
}
