//! Standing by: all of a store's opening that can be done beforehand, in a process that waits to
//! take an arena over from one that dies.
//!
//! A death leaves the machine without the device that frees its memory, so whoever takes over may
//! find none. What opening needs is therefore there already: the mapping and its page tables, the
//! threads with their stacks, heap enough for what is made from the walk.

use super::demote::{Mover, Tools};
use super::fetch::most_bytes;
use super::{build, clean, Owner, Store};
use crate::arena::{host_memory, Spare, Waiting};
use crate::codec::Codec;
use crate::config::{Checked, StoreConfig};
use crate::error::{system, Result};
use crate::io::Backing;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Stack of a background thread: a front end makes all of it resident, so no more than needed.
const STACK_BYTES: usize = 128 << 10;

type Job = Box<dyn FnOnce() + Send>;

/// A store that is ready to be opened on an arena which another process may still be using.
pub struct Standby {
    config: Checked,
    waiting: Waiting,
    spare: Spare,
    growth: Idle,
    cleaner: Idle,
    below: Option<(Backing, Tools, Idle)>,
}

impl Standby {
    /// Prepares to open a store on the arena. What is wrong with it is said by [`Standby::open`].
    pub fn new(config: StoreConfig, arena: OwnedFd) -> Result<Standby> {
        let (ram_bytes, _) = host_memory()?;
        let mut config = config.validate(ram_bytes)?;
        let waiting = Waiting::new(arena)?;
        let backing = config.below.as_ref().map(Backing::open).transpose()?;
        config.below_bytes = backing.as_ref().map_or(0, Backing::bytes);
        rehearse(&config);
        let with_tools = |backing| {
            // Of an arena that is there already the segments may have another size than is asked for.
            let segment_bytes = waiting.segment_bytes().unwrap_or(config.segment_bytes as usize);
            Ok((backing, Tools::new(segment_bytes)?, Idle::start(&config, "mover")?))
        };
        Ok(Standby {
            below: backing.map(with_tools).transpose()?,
            waiting,
            spare: Spare::new(),
            growth: Idle::start(&config, "growth")?,
            cleaner: Idle::start(&config, "cleaner")?,
            config,
        })
    }

    /// Follows the growth of the arena. To be called a few times a second; waits for nothing.
    pub fn keep_up(&mut self) -> Result<()> {
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
        self.below.as_ref().map_or(0, |_| most_bytes(self.config.group_pages_seen))
    }

    /// Opens the store; see [`Store::open_arena`].
    pub fn open(self) -> Result<Store> {
        let (backing, below) = self.below.map(|(backing, tools, idle)| (backing, (tools, idle))).unzip();
        let (shared, mut growth, fresh) = build(self.config, self.waiting, backing)?;
        if fresh {
            // The first reserve is there before the first request. An arena that was found has what
            // is left of its own, and its pages may be waited for: growth must not delay them.
            growth.step()?;
        }
        let mut cleaner = clean::Cleaner::new(shared.clone());
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

/// Takes from the allocator what opening will take, and gives it back: it stays in the heap.
fn rehearse(config: &Checked) {
    let frames = config.limit_bytes as usize / config.segment_bytes as usize;
    // Free lists of frames and ids, and a few bits for each frame and metadata page.
    let lists = vec![0xa5u8; frames * 16 + config.limit_bytes as usize / crate::PAGE_BYTES];
    let codecs: Vec<Codec> = (0..=config.max_lanes).map(|_| Codec::new(config.codec, config.codecs_seen)).collect();
    drop(std::hint::black_box((lists, codecs)));
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
