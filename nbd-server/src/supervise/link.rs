//! A worker's end: what it is given, what it is told, what it says.
//!
//! Its standard input is a socket. First comes what it needs (`pass.rs`); then, a line each:
//!
//! | down | |
//! |---|---|
//! | `next` | the worker that serves is being ended for this one: should the supervisor vanish now, go on by yourself |
//! | `serve` | nobody else has the arena |
//! | `serve anew` | likewise, and the command line may say other things of exports than the one before |
//! | `status {…}` | what happened so far |
//! | `refused WHY` | there is no upgrade, or there are no such tiers |
//!
//! | up | |
//! |---|---|
//! | `ready VERSION` | all is done that can be done while another serves; VERSION is that of this protocol and the letter's |
//! | `serves` | clients are accepted, signals heard |
//! | `beat` | twice a second |
//! | `stuck WHAT` | a thread stands: this process is to be followed by another |
//! | `upgrade` | somebody asks for it |
//! | `tiers […]` | somebody asks for these |
//! | `error WHY` | it ends |

use super::handover::VERSION;
use super::pass;
use super::tables::Tables;
use crate::listen::Listener;
use crate::pulse::LOOK_EVERY;
use anyhow::{anyhow, bail, ensure, Context, Result};
use ghostswap::config::TierConfig;
use ghostswap::Standby;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{send, SendFlags};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use socket2::Socket;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tracing::{error, warn};

/// Set in the environment of a worker, to the protocol's version.
pub(super) const WORKER: &str = "GHOSTSWAP_NBD_WORKER";
/// How often to follow the arena's growth while waiting.
const KEEP_UP_EVERY: Duration = Duration::from_millis(500);
/// How long the worker that serves may take to end, once that was begun.
const END_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_FOR_END_EVERY: Duration = Duration::from_millis(2);
/// For the supervisor to make up its mind, which waits for a new program to get ready.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(90);
/// The same, for a file's space to be taken.
const TRIAL_PATIENCE: Duration = Duration::from_secs(150);

/// What comes with the descriptors: the arena, two tables, and a socket for each name.
#[derive(Serialize, Deserialize)]
pub(super) struct Header {
    pub sockets: Vec<String>,
    /// Tiers that are to be had in the place of those that hold, if they can be had.
    #[serde(default)]
    pub trial: Option<Vec<String>>,
}

/// What a worker is given.
pub struct Given {
    /// The only descriptor of it here: closing another would give up the arena's lock.
    pub arena: OwnedFd,
    pub tables: Tables,
    pub listeners: Vec<Listener>,
    /// Tiers that are to be tried.
    pub trial: Option<Vec<String>>,
    pub link: Link,
}

/// What a worker is to do.
pub struct Order {
    /// The command line counts.
    pub anew: bool,
}

/// A worker's connection to its supervisor.
pub struct Link {
    orders: BufReader<UnixStream>,
    pub desk: Desk,
}

/// What any thread of a worker may say to the supervisor, and learn from it.
#[derive(Clone)]
pub struct Desk(Arc<Shared>);

type Look = Box<dyn Fn() -> Option<String> + Send + Sync>;

struct Shared {
    link: UnixStream,
    news: Mutex<News>,
    refused: Condvar,
    /// Held by who asks for an upgrade: a refusal is his.
    asking: Mutex<()>,
    /// Finds a thread that stands.
    look: OnceLock<Look>,
    /// Those that this process serves with.
    tiers: OnceLock<Vec<TierConfig>>,
}

#[derive(Default)]
struct News {
    status: Value,
    refusal: Option<String>,
    alone: bool,
}

/// What this process was given, if it is a worker.
pub fn given() -> Result<Option<Given>> {
    let Some(version) = std::env::var_os(WORKER) else { return Ok(None) };
    let link = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().context("no supervisor")?);
    ensure!(
        version == VERSION,
        "the supervisor speaks version {} to its workers, not {VERSION}",
        version.to_string_lossy()
    );
    let (words, mut descriptors) = pass::receive(&link).context("no supervisor")?;
    let header: Header = serde_json::from_str(&words).context("no supervisor")?;
    ensure!(descriptors.len() == header.sockets.len() + 3, "the supervisor sent {} descriptors", descriptors.len());
    let Header { sockets: names, trial } = header;
    let sockets = descriptors.split_off(3);
    let [arena, first, second] = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| anyhow!("no descriptors"))?;
    let named = sockets.into_iter().zip(names);
    let listeners = named.map(|(socket, name)| Listener::of(Socket::from(socket), name)).collect();
    let desk = Desk(Arc::new(Shared {
        link: link.try_clone().context("cannot duplicate a socket")?,
        news: Mutex::default(),
        refused: Condvar::new(),
        asking: Mutex::default(),
        look: OnceLock::new(),
        tiers: OnceLock::new(),
    }));
    let link = Link { orders: BufReader::new(link), desk };
    link.desk.start_beating()?;
    Ok(Some(Given { arena, tables: Tables::of([first, second]), listeners, trial, link }))
}

/// Tells the supervisor, if this process is a worker, why it ends.
pub fn tell_failure(why: &str) {
    if std::env::var_os(WORKER).is_some() {
        // It may be gone, or no supervisor of ours; the exit status tells it too.
        let _ = send(std::io::stdin(), format!("error {}\n", why.replace('\n', " ")).as_bytes(), SendFlags::NOSIGNAL);
    }
}

impl Link {
    /// Says that it is ready, and waits for the order to serve. None: it is not needed.
    pub fn stand_by(&mut self, standby: &mut Standby) -> Result<Option<Order>> {
        let name = |name| rustix::thread::set_name(name).context("cannot name this process");
        self.desk.say(&format!("ready {VERSION}"));
        // Last, so that whoever finds one by its name finds one that is watched over as such.
        name(c"nbd-standby")?;
        let order = self.wait_for_order(standby)?;
        if order.is_some() {
            name(c"nbd-worker")?;
        }
        Ok(order)
    }

    fn wait_for_order(&mut self, standby: &mut Standby) -> Result<Option<Order>> {
        let mut is_next = false;
        loop {
            if self.orders.buffer().is_empty() {
                let mut fds = [PollFd::new(self.orders.get_ref(), PollFlags::IN)];
                if !crate::transport::wait_for(&mut fds, KEEP_UP_EVERY)? {
                    standby.keep_up()?;
                    continue;
                }
            }
            let mut line = String::new();
            if !matches!(self.orders.read_line(&mut line), Ok(1..)) {
                return if is_next { alone(standby) } else { Ok(None) };
            }
            match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
                ("serve", "anew") => {
                    // Whoever had it may not be quite gone; if he stays, opening it says so.
                    await_end(standby)?;
                    return Ok(Some(Order { anew: true }));
                }
                ("serve", _) => return Ok(Some(Order { anew: false })),
                ("next", _) => is_next = true,
                (word, rest) => self.desk.hear(word, rest),
            }
        }
    }

    /// From now on hears what the supervisor says, and of its end.
    pub fn watch(self) -> Result<()> {
        let Link { mut orders, desk } = self;
        desk.say("serves");
        let watch = move || {
            let mut line = String::new();
            while matches!(orders.read_line(&mut line), Ok(1..)) {
                let (word, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
                desk.hear(word, rest);
                line.clear();
            }
            desk.news().alone = true;
            desk.0.refused.notify_all();
            error!("the supervisor is gone: should this process die too, all pages are lost");
        };
        std::thread::Builder::new().name("nbd-watch".into()).spawn(watch).context("cannot start a thread")?;
        Ok(())
    }
}

/// The supervisor vanished while the worker that served was being ended: if it does end, somebody must serve.
fn alone(standby: &Standby) -> Result<Option<Order>> {
    warn!("the supervisor is gone in the middle of an upgrade");
    Ok(await_end(standby)?.then_some(Order { anew: false }))
}

/// Waits, within bounds, until nobody else has the arena. Whether that is so.
fn await_end(standby: &Standby) -> Result<bool> {
    let begun = Instant::now();
    while standby.in_use()? {
        if begun.elapsed() >= END_PATIENCE {
            return Ok(false);
        }
        std::thread::sleep(LOOK_FOR_END_EVERY);
    }
    Ok(true)
}

impl Desk {
    fn news(&self) -> MutexGuard<'_, News> {
        // No step under the lock leaves half a change.
        self.0.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, word: &str, rest: &str) {
        match word {
            "status" => self.news().status = serde_json::from_str(rest).unwrap_or_default(),
            "refused" => {
                self.news().refusal = Some(rest.to_owned());
                self.0.refused.notify_all();
            }
            // Of a newer supervisor.
            _ => {}
        }
    }

    fn say(&self, line: &str) {
        // One that is gone is told of elsewhere.
        let _ = send(&self.0.link, format!("{line}\n").as_bytes(), SendFlags::NOSIGNAL);
    }

    /// Which tiers this process serves with.
    pub fn set_tiers(&self, tiers: Vec<TierConfig>) {
        // Once.
        let _ = self.0.tiers.set(tiers);
    }

    pub fn tiers(&self) -> &[TierConfig] {
        self.0.tiers.get().map_or(&[], Vec::as_slice)
    }

    /// What has `look` say what stands, if something does.
    pub fn watch_over(&self, look: impl Fn() -> Option<String> + Send + Sync + 'static) {
        // There is one server to a process.
        let _ = self.0.look.set(Box::new(look));
    }

    fn start_beating(&self) -> Result<()> {
        let desk = self.clone();
        let beat = move || loop {
            if let Some(what) = desk.0.look.get().and_then(|look| look()) {
                desk.say(&format!("stuck {what}"));
            }
            // A supervisor that does not listen now has other reasons than this one's silence.
            let _ = send(&desk.0.link, b"beat\n", SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            std::thread::sleep(LOOK_EVERY);
        };
        let thread = std::thread::Builder::new().name("nbd-beat".into()).stack_size(128 << 10);
        thread.spawn(beat).context("cannot start a thread").map(drop)
    }

    /// What happened so far, as the supervisor says.
    pub fn status(&self) -> Value {
        let news = self.news();
        let mut status = news.status.clone();
        status["alone"] = news.alone.into();
        status
    }

    /// Asks for an upgrade. If there is one, this process ends before it hears of that.
    pub fn upgrade(&self) -> Result<()> {
        self.ask("upgrade", UPGRADE_PATIENCE)
    }

    /// Asks for other tiers, likewise.
    pub fn change_tiers(&self, tiers: &[String]) -> Result<()> {
        // Text always serialises.
        let tiers = serde_json::to_string(tiers)?;
        self.ask(&format!("tiers {tiers}"), TRIAL_PATIENCE)
    }

    fn ask(&self, line: &str, patience: Duration) -> Result<()> {
        let _alone = self.0.asking.lock().unwrap_or_else(PoisonError::into_inner);
        self.news().refusal = None;
        self.say(line);
        let decided = |news: &mut News| news.refusal.is_none() && !news.alone;
        let waited = self.0.refused.wait_timeout_while(self.news(), patience, decided);
        let (mut news, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if news.alone {
            bail!("its supervisor is gone: nothing can be upgraded or changed");
        }
        Err(anyhow!(news.refusal.take().unwrap_or_else(|| "the supervisor does not answer".into())))
    }
}
