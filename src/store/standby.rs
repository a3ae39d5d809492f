//! Standing by: all of a store's opening that can be done beforehand, in a process that waits to
//! take an arena over from one that dies.
//!
//! A death leaves the machine without the device that frees its memory, so whoever takes over may
//! find none. What opening needs is therefore there already: the mapping and its page tables, the
//! threads with their stacks, heap enough for what is made from the walk.

use super::demote::{Mover, Tools};
use super::fetch::most_bytes;
use super::recover::heap_bytes;
use super::{build, clean, Owner, Store};
use crate::arena::{host_memory, Arena, Spare, Waiting};
use crate::codec::Codec;
use crate::config::{Checked, StoreConfig};
use crate::error::{system, Result};
use crate::io::Medium;
use crate::page::PAGE_BYTES;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Stack of a background thread: a front end makes all of it resident, so no more than needed.
const STACK_BYTES: usize = 96 << 10;
/// What rehearsing anew may take.
const REHEARSAL_COST: u64 = 4 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// A store that is ready to be opened on an arena which another process may still be using.
pub struct Standby {
    config: Checked,
    waiting: Waiting,
    spare: Spare,
    growth: Idle,
    cleaner: Idle,
    below: Option<(Medium, Tools, Idle)>,
}

impl Standby {
    /// Prepares to open a store on the arena. What is wrong with it is said by [`Standby::open`].
    pub fn new(config: StoreConfig, arena: OwnedFd) -> Result<Standby> {
        let (ram_bytes, _) = host_memory()?;
        let mut config = config.validate(ram_bytes)?;
        let waiting = Waiting::new(arena)?;
        let medium = config.below.as_ref().map(|tier| Medium::open(tier, &config.callers())).transpose()?;
        if let Some(medium) = &medium {
            // Of a server's export only a new arena has to know them: who takes one over must not wait for a server.
            config.below_bytes = medium.bytes(waiting.segment_bytes().is_none())?.unwrap_or(0);
        }
        (config.group_pages_seen, config.codecs_seen) = with(&config, waiting.seen());
        rehearse(&config, &waiting);
        let with_tools = |medium| {
            // Of an arena that is there already the segments may have another size than is asked for.
            let segment_bytes = waiting.segment_bytes().unwrap_or(config.segment_bytes as usize);
            Ok((medium, Tools::new(segment_bytes)?, Idle::start(&config, "mover")?))
        };
        Ok(Standby {
            below: medium.map(with_tools).transpose()?,
            waiting,
            spare: Spare::new(),
            growth: Idle::start(&config, "growth")?,
            cleaner: Idle::start(&config, "cleaner")?,
            config,
        })
    }

    /// Follows the growth of the arena. To be called a few times a second; waits for nothing.
    pub fn keep_up(&mut self) -> Result<()> {
        // Pages are compressed again by now: reading them takes more.
        let seen = with(&self.config, self.waiting.seen());
        if seen != (self.config.group_pages_seen, self.config.codecs_seen) && self.spare.bytes() > REHEARSAL_COST {
            (self.config.group_pages_seen, self.config.codecs_seen) = seen;
            rehearse(&self.config, &self.waiting);
        }
        self.waiting.keep_up(&mut self.spare)
    }

    /// Whether the arena is one that [`Standby::open`] would take, as far as that can be told while another process has
    /// a store open on it: its format, its geometry.
    pub fn check(&self) -> Result<()> {
        self.waiting.check(&self.config)
    }

    /// Whether another process has a store open on the arena.
    pub fn in_use(&self) -> Result<bool> {
        self.waiting.in_use()
    }

    /// What [`crate::Lane::fetch_bytes`] will say, unless the arena holds larger groups than this
    /// configuration makes. 0: there is no disk tier.
    pub fn fetch_bytes(&self) -> usize {
        self.below.as_ref().map_or(0, |_| most_bytes(self.config.most_group_pages()))
    }

    /// Opens the store; see [`Store::open_arena`].
    pub fn open(self) -> Result<Store> {
        let (medium, below) = self.below.map(|(medium, tools, idle)| (medium, (tools, idle))).unzip();
        let (shared, mut growth, fresh) = build(self.config, self.waiting, medium)?;
        if fresh {
            // The first reserve is there before the first request. An arena that was found has what
            // is left of its own, and its pages may be waited for: growth must not delay them.
            growth.step()?;
        }
        let mut cleaner = clean::Cleaner::new(shared.clone(), self.spare);
        // Set once, here.
        let _ = shared.growth.set(self.growth.thread());
        let _ = shared.cleaner.set(self.cleaner.thread());
        let mut threads = vec![self.growth.run(move || growth.run()), self.cleaner.run(move || cleaner.run())];
        if let Some((tools, idle)) = below {
            let _ = shared.mover.set(idle.thread());
            let mut mover = Mover::new(shared.clone(), tools);
            threads.push(idle.run(move || mover.run()));
        }
        Ok(Store { owner: Arc::new(Owner { shared, threads }) })
    }
}

/// What the configuration allows, and the arena holds.
fn with(config: &Checked, seen: Option<(usize, u64)>) -> (usize, u64) {
    let (group_pages, codecs) = seen.unwrap_or_default();
    (config.group_pages_seen.max(group_pages), config.codecs_seen | codecs)
}

/// Takes from the allocator what opening will take, and gives it back: it stays in the heap.
fn rehearse(config: &Checked, waiting: &Waiting) {
    // Of each lane and of those who clean, compress again and move: what a record is made in, and what a group is
    // decoded to.
    let room = vec![0xa5u8; (2 * config.max_lanes + 7) * config.group_pages_seen * PAGE_BYTES];
    // There are such pages: the one who makes them is made at once.
    let again = config.cold.filter(|cold| config.codecs_seen & cold.codec.bit() != 0);
    let again = again.map(|cold| Codec::new(cold.codec, config.codecs_seen));
    let lists = vec![0xa5u8; heap_bytes(waiting.sizes().unwrap_or_else(|| Arena::wanted(config)))];
    let codecs: Vec<Codec> = (0..=config.max_lanes).map(|_| Codec::new(config.codec, config.codecs_seen)).collect();
    drop(std::hint::black_box((lists, room, again, codecs)));
}

/// A background thread that was started and has nothing to do yet. It waits for its job at a
/// mutex, not at a channel, which allocates when a thread first waits at it.
struct Idle {
    desk: Arc<Mutex<Desk>>,
    handle: Option<JoinHandle<()>>,
}

/// What a thread that waits finds.
enum Desk {
    Nothing,
    Job(Job),
    /// The standby was not needed.
    Closed,
}

impl Idle {
    fn start(config: &Checked, name: &'static str) -> Result<Idle> {
        let hook = config.thread_start;
        let desk = Arc::new(Mutex::new(Desk::Nothing));
        let its = desk.clone();
        let thread =
            std::thread::Builder::new().name(format!("ghost-{name}")).stack_size(STACK_BYTES).spawn(move || {
                if let Some(hook) = hook {
                    hook(name);
                }
                loop {
                    let found = std::mem::replace(&mut *lock(&its), Desk::Nothing);
                    match found {
                        Desk::Nothing => std::thread::park(),
                        Desk::Job(job) => return job(),
                        Desk::Closed => return,
                    }
                }
            });
        Ok(Idle { desk, handle: Some(thread.map_err(|_| system("starting a background thread"))?) })
    }

    fn thread(&self) -> Thread {
        self.handle.as_ref().expect("an idle thread has a handle until it runs").thread().clone()
    }

    fn run(mut self, body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        let handle = self.handle.take().expect("an idle thread has a handle until it runs");
        *lock(&self.desk) = Desk::Job(Box::new(body));
        handle.thread().unpark();
        handle
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        if let Some(handle) = &self.handle {
            *lock(&self.desk) = Desk::Closed;
            handle.thread().unpark();
        }
    }
}

fn lock(desk: &Mutex<Desk>) -> std::sync::MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}
