//! Standing by: all of a store's opening that can be done beforehand, in a process that waits to
//! take an arena over from one that dies.
//!
//! A death leaves the machine without the device that frees its memory, so whoever takes over may
//! find none. What opening needs is therefore there already: the mapping and its page tables, the
//! threads with their stacks, heap enough for what is made from the walk.

use super::attach::{matched, New, Wanted};
use super::demote::{Mover, Tools};
use super::fetch::most_bytes;
use super::kept::RING_BYTES;
use super::recover::heap_bytes;
use super::{build, clean, Owner, Store};
use crate::arena::{host_memory, AllBound, Arena, Spare, Waiting};
use crate::codec::{Codec, Dictionary};
use crate::config::{Checked, DiskTier, Place, StoreConfig, TierConfig};
use crate::error::{system, Error, Result};
use crate::io::Medium;
use crate::page::PAGE_BYTES;
use crate::tier::{extents_in, MAX_EXTENTS};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Stack of a background thread: a front end makes all of it resident, so no more than needed.
const STACK_BYTES: usize = 64 << 10;
/// What rehearsing anew may take.
const REHEARSAL_COST: u64 = 4 << 20;
/// How long a tier that is being tried waits for memory, and what it leaves to others.
const MEMORY_PATIENCE: Duration = Duration::from_secs(10);
const SPARE_MARGIN: u64 = 1 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// A store that is ready to be opened on an arena which another process may still be using.
pub struct Standby {
    config: Checked,
    waiting: Waiting,
    spare: Spare,
    growth: Idle,
    cleaner: Idle,
    /// Each tier below; the last: if the arena does not know it and it was made one already.
    below: Vec<(Medium, Tools, Idle, Option<New>)>,
    /// Segments that a take-over was rehearsed with, and bytes that dictionaries took.
    rehearsed: (usize, usize),
}

impl Standby {
    /// Prepares to open a store on the arena. What is wrong with it is said by [`Standby::open`].
    pub fn new(config: StoreConfig, arena: OwnedFd) -> Result<Standby> {
        let (ram_bytes, _) = host_memory()?;
        let mut config = config.validate(ram_bytes)?;
        let waiting = Waiting::new(arena)?;
        let media = open_media(&mut config, &waiting)?;
        (config.group_pages_seen, config.codecs_seen) = with(&config, waiting.seen());
        let rehearsed = rehearse(&config, &waiting, 0);
        let several = media.len() > 1;
        let with_tools = |medium| {
            // Of an arena that is there already the segments may have another size than is asked for.
            let segment_bytes = waiting.segment_bytes().unwrap_or(config.segment_bytes as usize);
            Ok((medium, Tools::new(segment_bytes, several)?, Idle::start(&config, "mover")?, None))
        };
        let standby = Standby {
            below: media.into_iter().map(with_tools).collect::<Result<_>>()?,
            waiting,
            spare: Spare::new(),
            growth: Idle::start(&config, "growth")?,
            cleaner: Idle::start(&config, "cleaner")?,
            rehearsed,
            config,
        };
        end_a_thread()?;
        Ok(standby)
    }

    /// Makes sure that the tiers below which the arena, in use by another process, knows can be had by this configuration:
    /// their servers answer to it, unless one is reached as by a tier of `now`, those in use: that it may be away is no
    /// reason against another tier, rather one for it. And that those which it does not know yet can be added to it, and
    /// gets ready for that: they are taken and made tiers, and the arena's table has the memory for their extents. So
    /// [`Standby::open`] finds as little to wait for as with tiers that were there before. May wait for servers, for a
    /// file's space, and up to ten seconds for memory.
    pub fn try_tiers(&mut self, now: &[TierConfig]) -> Result<()> {
        let is_as_now = |tier: &DiskTier| {
            now.iter().any(|other| matches!(other, TierConfig::Disk(other) if other.place == tier.place))
        };
        let bound = self.waiting.tiers();
        let known =
            matched(&self.config.below, self.below.iter().map(|(medium, ..)| medium), &bound, Default::default());
        let segment_bytes = self.waiting.segment_bytes().unwrap_or(self.config.segment_bytes as usize);
        let (mut added, mut last) = (0, String::new());
        for (((medium, .., new), tier), known) in self.below.iter_mut().zip(&self.config.below).zip(known) {
            if let Some(bound) = known.and_then(|no| bound[no.index()]) {
                // A server that would be reached no more, by a key that is wrong say, is one whose pages would be lost.
                if medium.remote().is_none() || !is_as_now(tier) {
                    medium.bytes(true).and_then(|_| medium.check(&bound.id))?;
                }
                continue;
            }
            let made = New::make(medium, segment_bytes)?;
            (added, last) = (added + made.extents, medium.to_string());
            *new = Some(made);
        }
        if added == 0 {
            return Ok(());
        }
        let frames = self.waiting.sizes().map_or(0, |[frames, _]| frames);
        let extents = (extents_of(&bound) + added) as usize;
        let (spare, begun) = (&mut self.spare, Instant::now());
        let may = |bytes: usize| loop {
            if spare.bytes() > bytes as u64 + SPARE_MARGIN {
                return true;
            }
            if begun.elapsed() > MEMORY_PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        if !self.waiting.populate_entries(frames + extents, may)? {
            let why = "there is no memory for the table of its extents at this time".into();
            return Err(Error::BadTier { tier: last, why });
        }
        self.rehearsed = rehearse(&self.config, &self.waiting, added);
        Ok(())
    }

    /// Follows the growth of the arena. To be called a few times a second; waits for nothing.
    pub fn keep_up(&mut self) -> Result<()> {
        // Pages are compressed again by now: reading them takes more. Or the arena was bound to a tier.
        let new = self.below.iter().filter_map(|(.., new)| new.as_ref()).map(|new| new.extents).sum();
        let needs = (segments(&self.config, &self.waiting, new), dictionary_bytes(&self.config, &self.waiting));
        let seen = with(&self.config, self.waiting.seen());
        let more = needs.0 > self.rehearsed.0 || needs.1 > self.rehearsed.1;
        if (seen != (self.config.group_pages_seen, self.config.codecs_seen) || more)
            && self.spare.bytes() > REHEARSAL_COST
        {
            (self.config.group_pages_seen, self.config.codecs_seen) = seen;
            self.rehearsed = rehearse(&self.config, &self.waiting, new);
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
        self.below.first().map_or(0, |_| most_bytes(self.config.most_group_pages()))
    }

    /// Whether reads will be begun that are for a thread of the kernel's to do ([`crate::Begun::ByYou`]).
    pub fn reads_apart(&self) -> bool {
        self.config.below.iter().any(|tier| matches!(tier.place, Place::File(_)))
    }

    /// Opens the store; see [`Store::open_arena`].
    pub fn open(self) -> Result<Store> {
        let split = |(medium, tools, idle, new)| (Wanted { medium, new }, (tools, idle));
        let (wanted, movers): (Vec<_>, Vec<_>) = self.below.into_iter().map(split).unzip();
        let (shared, mut growth, fresh) = build(self.config, self.waiting, wanted)?;
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
        for (at, (_, idle)) in movers.iter().enumerate() {
            let _ = shared.movers[at].set(idle.thread());
        }
        for (at, (tools, idle)) in movers.into_iter().enumerate() {
            let mut mover = Mover::new(shared.clone(), at, tools);
            threads.push(idle.run(move || mover.run()));
        }
        Ok(Store { owner: Arc::new(Owner { shared, threads }) })
    }
}

/// Opens what the tiers below lie on.
pub(super) fn open_media(config: &mut Checked, waiting: &Waiting) -> Result<Vec<Medium>> {
    let media: Vec<_> = config.below.iter().map(|tier| Medium::open(tier, &config.callers())).collect::<Result<_>>()?;
    // Of a server's export only a new arena has to know them: who takes one over must not wait for a server.
    let is_new = waiting.segment_bytes().is_none();
    let bytes = media.iter().map(|medium| Ok(medium.bytes(is_new)?.unwrap_or(0)));
    config.below_bytes = bytes.collect::<Result<_>>()?;
    Ok(media)
}

fn extents_of(bound: &AllBound) -> u32 {
    bound.iter().flatten().map(|tier| tier.extents).sum()
}

/// What the configuration allows, and the arena holds.
fn with(config: &Checked, seen: Option<(usize, u64)>) -> (usize, u64) {
    let (group_pages, codecs) = seen.unwrap_or_default();
    (config.group_pages_seen.max(group_pages), config.codecs_seen | codecs)
}

/// Ids of the store that would be opened now. `extents`: of tiers that the arena does not know yet.
fn segments(config: &Checked, waiting: &Waiting, extents: u32) -> usize {
    let frames = waiting.frames().unwrap_or_else(|| Arena::wanted(config)[0]);
    // With the tiers that there are, or will be. Entries may be more: of a tier that there was.
    let bound = waiting.tiers();
    let extents = match bound.iter().flatten().count() {
        _ if config.below.is_empty() => 0,
        known if known >= config.below.len() => extents_of(&bound),
        _ => {
            let fit = config.below_bytes.iter().map(|bytes| extents_in(*bytes, config.segment_bytes as usize));
            extents_of(&bound) + extents.max(fit.sum::<u32>().min(MAX_EXTENTS))
        }
    };
    (frames + extents.min(MAX_EXTENTS) as usize).max(waiting.entries())
}

/// What the arena's dictionaries take when they are made ready, each with what compresses.
fn dictionary_bytes(config: &Checked, waiting: &Waiting) -> usize {
    let levels = config.dict_levels();
    let there = waiting.dictionary_bytes().into_iter().filter(|bytes| *bytes > 0);
    // They are read from the arena first.
    there.map(|bytes| bytes.next_multiple_of(PAGE_BYTES) + Dictionary::memory_bytes(bytes, &levels)).sum()
}

/// Takes from the allocator what opening will take, and gives it back: it stays in the heap. Returns what grows of it.
fn rehearse(config: &Checked, waiting: &Waiting, extents: u32) -> (usize, usize) {
    // Of each lane and of those who clean, compress again and move: what a record is made in, and what a group is
    // decoded to.
    // Lanes that help are opened where there is memory to spare.
    let lanes = config.max_lanes - config.helper_lanes;
    let others = 5 + 2 * config.below.len().max(1);
    let room = vec![0xa5u8; (2 * lanes + others) * config.group_pages_seen * PAGE_BYTES];
    // And what each lane keeps of what it fetched.
    let kept = vec![0xa5u8; if config.below.is_empty() { 0 } else { lanes * RING_BYTES }];
    // There are such pages: the one who makes them is made at once.
    let again = config.cold.filter(|cold| config.codecs_seen & cold.codec.bit() != 0);
    let again = again.map(|cold| Codec::new(cold.codec, config.codecs_seen));
    let [frames, meta] = waiting.sizes().unwrap_or_else(|| Arena::wanted(config));
    let segments = segments(config, waiting, extents);
    let lists = vec![0xa5u8; heap_bytes([frames, segments, meta])];
    let of_dictionaries = dictionary_bytes(config, waiting);
    let dictionaries = vec![0xa5u8; of_dictionaries];
    let codecs: Vec<Codec> = (0..=lanes).map(|_| Codec::new(config.codec, config.codecs_seen)).collect();
    drop(std::hint::black_box((lists, room, kept, again, codecs, dictionaries)));
    (segments, of_dictionaries)
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

/// The first thread that ends of a process with several has the kernel allocate statistics for all of them, and look for
/// memory in vain if there is none (`taskstats_tgid_alloc` in kernel/taskstats.c). If that is a thread of a process that was
/// killed, whoever is to take over waits for it: for seconds, as was seen. So the first one ends beforehand.
fn end_a_thread() -> Result<()> {
    let thread = std::thread::Builder::new().name("ghost-first".into()).stack_size(STACK_BYTES).spawn(|| ());
    // It has nothing to fail at.
    thread.map(|thread| thread.join().unwrap_or(())).map_err(|_| system("starting a background thread"))
}

fn lock(desk: &Mutex<Desk>) -> std::sync::MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}
