//! The store: pages over map, codec, log and arena, for several volumes at once.
//!
//! Who does what: *lanes* (one to an I/O thread) read and write and never wait; the *growth*
//! thread alone asks the host for memory and gives it back; the *cleaner* thread copies what is
//! live out of segments that are mostly dead, returns memory after its grace period, and compresses
//! again what has long lain still; a *mover* thread for each disk tier writes the oldest segments down
//! to it when memory, or the tier above, runs short.
//!
//! What a store holds is in its arena, and everything else can be made anew from that
//! (`recover.rs`); `audit.rs` says the same invariants once more, as a check.
//!
//! Lock order: none on the I/O path. `lanes` and `volumes` are mutexes taken only when a lane or a
//! volume is opened or closed. Each background thread takes its own of `quiet` for a step, and within
//! that the cleaner `lanes`, when it begins to compress again; `audit` takes `quiet` in order, then
//! `lanes`. `changing` is taken alone.

mod append;
mod attach;
mod audit;
mod charge;
mod clean;
mod cold;
mod demote;
mod dictionaries;
mod fetch;
mod grow;
mod kept;
mod kinds;
mod lane;
#[cfg(all(test, loom))]
mod models;
mod recompress;
mod recover;
mod splice;
mod standby;
#[cfg(feature = "crash-points")]
mod steps;
mod survivors;
mod tiers;
mod train;

pub use charge::Held;
pub use fetch::{Fetch, Taken};
pub use kinds::PageKind;
pub use lane::Lane;
pub use standby::Standby;
#[cfg(feature = "crash-points")]
pub use steps::Steps;

use crate::arena::{create_arena, host_seconds, Arena, Tuned, Waiting};
use crate::config::{Checked, StoreConfig};
use crate::error::{Error, Result};
use crate::log::epoch::Epochs;
use crate::log::segment::Segments;
use crate::map::{Kind, Map, Slot};
use crate::page::{Placement, VolumeId, MAX_TIERS_BELOW, MAX_VOLUMES, PAGE_BYTES};
use crate::stats::{DiskStats, Stats};
use crate::tier::Lower;
use crate::volume::Volume;
use attach::{attach, Wanted};
use charge::Charges;
use cold::Unpacking;
use dictionaries::Dictionaries;
use recover::Found;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Instant;

/// What a lane counts, apart from other lanes' cache lines. Sums over all lanes are exact.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    pub stored_pages: AtomicI64,
    pub filled_pages: AtomicI64,
    pub zero_pages: AtomicI64,
    pub lost_pages: AtomicI64,
    /// Not charged to the volume yet.
    pub held_bytes: AtomicI64,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub refused: AtomicU64,
}

/// Everything that lanes and background threads share.
pub(crate) struct Shared {
    pub config: Checked,
    pub arena: Arena,
    pub map: Map,
    pub segments: Segments,
    /// The disk tiers, in the order in which pages go down.
    pub lower: Vec<Lower>,
    pub epochs: Epochs,
    pub unpacking: Unpacking,
    pub dictionaries: Dictionaries,
    /// One for each lane, and the last for what was there when the store was opened.
    pub counters: Box<[Counters]>,
    pub charges: Charges,
    pub stop: AtomicBool,
    /// Frames that growth holds ready when it can.
    pub reserve: AtomicU32,
    /// Frames and metadata pages that are resident.
    pub held_frames: AtomicU32,
    pub held_meta: AtomicU32,
    /// Segments whose table entries are in use.
    pub known: AtomicU32,
    pub frames_taken: AtomicU64,
    pub cleaned: AtomicU64,
    pub recompressed: AtomicU64,
    /// All that is not cold is to be compressed again, whatever its age.
    pub recompress_all: AtomicBool,
    /// Memory that may be held: the configuration's limit, or one set since.
    pub limit: AtomicU64,
    /// What of it is a second tier's own.
    pub own_limit: AtomicU64,
    /// Other numbers of the configuration, or set since, by [`Tuned`].
    tuned: [AtomicU32; 3],
    /// Pages of some volume are to go below whether memory is short or not.
    pub some_below: AtomicBool,
    /// What is older than so many seconds, less one, is to go down, short of memory or not; 0: nothing.
    pub write_back: AtomicU64,
    /// Of what was sealed with a lower number than this.
    pub write_back_before: AtomicU64,
    /// The host's seconds, as growth last saw them.
    pub clock_s: AtomicU32,
    growth: OnceLock<Thread>,
    cleaner: OnceLock<Thread>,
    movers: [OnceLock<Thread>; MAX_TIERS_BELOW],
    lanes: Mutex<Vec<bool>>,
    /// How many there are.
    volumes: Mutex<usize>,
    /// Held while limits and other settings are changed.
    changing: Mutex<()>,
    /// Held by growth, by the cleaner and by each mover while they do anything.
    pub quiet: [Mutex<()>; 2 + MAX_TIERS_BELOW],
}

impl Shared {
    fn new(config: Checked, arena: Arena, map: Map, segments: Segments, lower: Vec<Lower>, found: &Found) -> Shared {
        let counters: Box<[Counters]> = (0..=config.max_lanes).map(|_| Counters::default()).collect();
        let before = &counters[config.max_lanes];
        bump(&before.stored_pages, found.pages.stored);
        bump(&before.filled_pages, found.pages.filled);
        bump(&before.zero_pages, found.pages.zero);
        bump(&before.lost_pages, found.pages.lost);
        let own = config.limit_bytes.saturating_sub(config.hot_bytes);
        let tuned = [Tuned::Idle, Tuned::Cpu, Tuned::Marks].map(|what| {
            let configured = tiers::configured(&config, what);
            AtomicU32::new(arena.tuned(what, configured).unwrap_or(configured))
        });
        Shared {
            map,
            segments,
            lower,
            // The lanes', the cleaner's, the movers'.
            epochs: Epochs::new(config.max_lanes + 1 + config.below.len()),
            unpacking: Unpacking::new(&config),
            dictionaries: Dictionaries::new(&config, &found.dictionaries),
            counters,
            charges: Charges::new(&found.held_bytes),
            stop: AtomicBool::new(false),
            reserve: AtomicU32::new(4),
            held_frames: AtomicU32::new(found.frames.count()),
            held_meta: AtomicU32::new(found.meta.count()),
            known: AtomicU32::new(found.known),
            frames_taken: AtomicU64::new(0),
            cleaned: AtomicU64::new(0),
            recompressed: AtomicU64::new(0),
            recompress_all: AtomicBool::new(false),
            limit: AtomicU64::new(arena.limit(config.limit_bytes).unwrap_or(config.limit_bytes)),
            own_limit: AtomicU64::new(arena.own_limit(own).unwrap_or(own)),
            tuned,
            some_below: AtomicBool::new(false),
            write_back: AtomicU64::new(0),
            write_back_before: AtomicU64::new(0),
            clock_s: AtomicU32::new(0),
            growth: OnceLock::new(),
            cleaner: OnceLock::new(),
            movers: Default::default(),
            lanes: Mutex::new(vec![false; config.max_lanes]),
            volumes: Mutex::new(found.volumes),
            changing: Mutex::new(()),
            quiet: Default::default(),
            arena,
            config,
        }
    }

    /// Memory held now, in bytes: frames, metadata pages, segment table.
    pub fn held_bytes(&self) -> u64 {
        u64::from(self.held_frames.load(Ordering::Relaxed)) * self.arena.segment_bytes() as u64
            + u64::from(self.held_meta.load(Ordering::Relaxed)) * PAGE_BYTES as u64
    }

    pub fn limit_bytes(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub fn wake_growth(&self) {
        if let Some(t) = self.growth.get() {
            t.unpark();
        }
    }

    pub fn wake_cleaner(&self) {
        if let Some(t) = self.cleaner.get() {
            t.unpark();
        }
    }

    /// Who announces epochs beside the lanes.
    pub fn cleaner_epoch(&self) -> usize {
        self.config.max_lanes
    }
    /// The mover's of the disk tier that stands there in their order.
    pub fn mover_epoch(&self, at: usize) -> usize {
        self.config.max_lanes + 1 + at
    }

    pub fn wake_movers(&self) {
        self.movers.iter().filter_map(OnceLock::get).for_each(Thread::unpark);
    }

    /// Accounts for a slot word that was replaced.
    pub fn died(&self, counters: &Counters, word: Slot) {
        match word.kind() {
            Kind::Stored(at) => {
                bump(&counters.stored_pages, -1);
                bump(&counters.held_bytes, -i64::from(at.share));
                if self.segments.take_live(&self.arena, at.segment, at.share) {
                    self.wake_cleaner();
                }
            }
            Kind::Fill(0) => bump(&counters.zero_pages, -1),
            Kind::Fill(_) => bump(&counters.filled_pages, -1),
            Kind::Lost => bump(&counters.lost_pages, -1),
            Kind::Empty | Kind::Frozen => {}
        }
    }

    /// Accounts for a slot word that was committed.
    pub fn born(&self, counters: &Counters, word: Slot) {
        match word.kind() {
            Kind::Stored(at) => {
                bump(&counters.stored_pages, 1);
                bump(&counters.held_bytes, i64::from(at.share));
            }
            Kind::Fill(0) => bump(&counters.zero_pages, 1),
            Kind::Fill(_) => bump(&counters.filled_pages, 1),
            Kind::Empty | Kind::Frozen | Kind::Lost => {}
        }
    }
}

/// Adds to a counter that one thread alone writes: no locked instruction needed.
fn bump(counter: &AtomicI64, by: i64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}

/// Ends the background threads when the last handle to the store is gone.
struct Owner {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for t in self.threads.drain(..) {
            t.thread().unpark();
            // A background thread that panicked has said so on standard error already.
            let _ = t.join();
        }
    }
}

/// An open store. Cheap to clone; closed when the last clone, volume and lane of it are gone.
#[derive(Clone)]
pub struct Store {
    owner: Arc<Owner>,
}

impl Store {
    /// Opens an empty store on an arena of its own, which goes with the last handle to it.
    pub fn open(config: StoreConfig) -> Result<Store> {
        let arena = create_arena(config.hugetlb)?;
        Store::open_arena(config, arena)
    }

    /// Opens a store on an arena that somebody holds: an empty one from [`create_arena`], or one
    /// that an earlier store left, closed in order or killed at any instruction. All that was
    /// acknowledged is there again; of what was in flight each page has its old content or the new.
    ///
    /// Whoever is to keep the pages beyond this process holds a duplicate of the descriptor, in
    /// another process: this one must close no other descriptor of the arena while the store is
    /// open (it would give up the lock that keeps a second process out; see `arena/file.rs`).
    ///
    /// The arena keeps the geometry it was made with. The configuration may differ in all but a
    /// `segment_bytes` that is given; a limit above that of the arena's first store is cut to it. Tiers
    /// below memory may be added, and stand in another order; one may be left out, or another be in its place, once
    /// nothing of the arena lies there (see [`Store::drain_tier`]).
    /// An arena that cannot be opened is refused with [`Error::BadArena`] and keeps what it holds.
    ///
    /// No more memory is asked for here than the walk over an arena found needs. Growth, and the
    /// locking of what the arena holds, go on behind it in the growth thread.
    pub fn open_arena(config: StoreConfig, arena: OwnedFd) -> Result<Store> {
        Standby::new(config, arena)?.open()
    }

    /// The arena's file: what a supervisor holds so that the pages outlive this process.
    pub fn arena_fd(&self) -> BorrowedFd<'_> {
        self.shared().arena.fd()
    }

    /// Makes a new, empty volume of `bytes`, which must be a multiple of 4096 up to 16 TiB.
    pub fn create_volume(&self, bytes: u64) -> Result<Volume> {
        check_volume_bytes(bytes)?;
        let mut volumes = self.shared().volumes.lock().unwrap_or_else(PoisonError::into_inner);
        if *volumes == MAX_VOLUMES {
            return Err(Error::TooMany { what: "volumes", max: MAX_VOLUMES });
        }
        let id = VolumeId(*volumes as u16);
        self.shared().arena.create_volume(id, bytes)?;
        *volumes += 1;
        Ok(Volume::new(self.clone(), id))
    }

    pub(crate) fn volume_bytes(&self, id: VolumeId) -> u64 {
        self.shared().arena.volume_bytes(id).load(Ordering::Relaxed)
    }

    pub(crate) fn grow_volume(&self, id: VolumeId, bytes: u64) -> Result<()> {
        check_volume_bytes(bytes)?;
        let _one_at_a_time = self.shared().volumes.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.volume_bytes(id);
        if bytes < now {
            return Err(Error::InvalidConfig(format!("a volume cannot shrink: it has {now} bytes, not {bytes}")));
        }
        self.shared().arena.volume_bytes(id).store(bytes, Ordering::Release);
        Ok(())
    }

    pub(crate) fn reset_volume(&self, id: VolumeId, bytes: u64) -> Result<()> {
        check_volume_bytes(bytes)?;
        let _one_at_a_time = self.shared().volumes.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared().arena.volume_bytes(id).store(bytes, Ordering::Release);
        Ok(())
    }

    pub(crate) fn volume_held_bytes(&self, id: VolumeId) -> u64 {
        self.shared().charges.held_bytes(id).max(0) as u64
    }

    /// Nothing leads anywhere from its root.
    pub(crate) fn is_untouched(&self, id: VolumeId) -> bool {
        self.shared().arena.root(id).iter().all(|link| link.load(Ordering::Relaxed) == 0)
    }

    pub(crate) fn set_quota(&self, id: VolumeId, bytes: Option<u64>) {
        self.shared().charges.set_quota(id, bytes.unwrap_or(u64::MAX));
    }

    pub(crate) fn set_placement(&self, id: VolumeId, placement: Placement) -> Result<()> {
        let s = self.shared();
        if placement == Placement::Below {
            if s.lower.is_empty() {
                return Err(Error::InvalidConfig("there is no tier below memory".into()));
            }
            s.some_below.store(true, Ordering::Relaxed);
        }
        s.charges.set_placement(id, placement);
        Ok(())
    }

    fn volume_count(&self) -> usize {
        *self.shared().volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All volumes, by number.
    pub fn volumes(&self) -> Vec<Volume> {
        (0..self.volume_count()).map(|i| Volume::new(self.clone(), VolumeId(i as u16))).collect()
    }

    /// The volume with this number, made now or by an earlier store on the same arena.
    pub fn open_volume(&self, volume: u16) -> Result<Volume> {
        if usize::from(volume) >= self.volume_count() {
            return Err(Error::NoVolume { volume });
        }
        Ok(Volume::new(self.clone(), VolumeId(volume)))
    }

    /// What is stored, what it costs.
    pub fn stats(&self) -> Stats {
        let s = self.shared();
        let sum = |f: fn(&Counters) -> &AtomicI64| {
            s.counters.iter().map(|c| f(c).load(Ordering::Relaxed)).sum::<i64>().max(0) as u64
        };
        let sum_u = |f: fn(&Counters) -> &AtomicU64| s.counters.iter().map(|c| f(c).load(Ordering::Relaxed)).sum();
        let known = grow::known_segments(s);
        let live = |id| u64::from(s.segments.live(&s.arena, id));
        let live_bytes = (0..known).map(crate::page::SegmentId).map(live).sum();
        let volumes = self.volume_count();
        let disks = demote::stats(s);
        Stats {
            volumes: volumes as u64,
            virtual_bytes: (0..volumes).map(|v| self.volume_bytes(VolumeId(v as u16))).sum(),
            stored_pages: sum(|c| &c.stored_pages),
            filled_pages: sum(|c| &c.filled_pages),
            zero_pages: sum(|c| &c.zero_pages),
            lost_pages: sum(|c| &c.lost_pages),
            live_bytes,
            segments_used: u64::from(s.held_frames.load(Ordering::Relaxed).saturating_sub(s.arena.frames_ready())),
            segment_bytes: s.arena.segment_bytes() as u64,
            reserve_bytes: u64::from(s.arena.frames_ready()) * s.arena.segment_bytes() as u64,
            held_bytes: s.held_bytes(),
            limit_bytes: s.limit_bytes(),
            map_bytes: s.map.nodes.load(Ordering::Relaxed) * PAGE_BYTES as u64,
            table_bytes: u64::from(known) * crate::arena::SEGMENT_ENTRY_BYTES as u64,
            read_pages: sum_u(|c| &c.reads),
            written_pages: sum_u(|c| &c.writes),
            refused_writes: sum_u(|c| &c.refused),
            cleaned_segments: s.cleaned.load(Ordering::Relaxed),
            cold_bytes: (0..known)
                .map(crate::page::SegmentId)
                .filter(|id| s.segments.past(&s.arena, *id).1)
                .map(live)
                .sum(),
            recompressed_segments: s.recompressed.load(Ordering::Relaxed),
            dictionaries: s.dictionaries.stats(),
            disk: DiskStats::of_all(&disks),
            disks,
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.owner.shared
    }

    fn take_lane(&self, helps: bool) -> Result<usize> {
        let config = &self.shared().config;
        let for_all = config.max_lanes - config.helper_lanes;
        let mut lanes = self.shared().lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let (from, until) = if helps { (for_all, config.max_lanes) } else { (0, for_all) };
        let free = (from..until).find(|index| !lanes[*index]);
        let index = free.ok_or(Error::TooMany { what: "lanes", max: until - from })?;
        lanes[index] = true;
        Ok(index)
    }

    fn put_lane(&self, index: usize) {
        self.shared().lanes.lock().unwrap_or_else(PoisonError::into_inner)[index] = false;
    }
}

fn check_volume_bytes(bytes: u64) -> Result<()> {
    if bytes == 0 || bytes % PAGE_BYTES as u64 != 0 || bytes > crate::MAX_VOLUME_BYTES {
        return Err(Error::InvalidConfig(format!(
            "a volume of {bytes} bytes: the size must be a multiple of 4096, above 0 and up to 16T"
        )));
    }
    Ok(())
}

/// Everything but the threads. True: the arena was empty.
fn build(mut config: Checked, waiting: Waiting, below: Vec<Wanted>) -> Result<(Arc<Shared>, grow::Growth, bool)> {
    let begun = Instant::now();
    let (arena, found) = Arena::open(&mut config, waiting)?;
    let (map, mut segments) = (Map::new(), Segments::new(0));
    let (what, lower) = if found {
        recover::recover(&arena, &mut segments, &map, |there| attach(&config, &arena, below, there))?
    } else {
        let lower = attach(&config, &arena, below, Default::default())?;
        segments.make_room(recover::most_ids(&arena, &lower));
        (Found::nothing(&arena), lower)
    };
    if found {
        let (count, volumes) = (what.pages.stored + what.pages.filled + what.pages.zero, what.volumes);
        tracing::info!("took up an arena: {volumes} volumes, {count} pages, in {:?}", begun.elapsed());
    }
    let shared = Arc::new(Shared::new(config, arena, map, segments, lower, &what));
    shared.clock_s.store(host_seconds()?, Ordering::Relaxed);
    let growth = grow::Growth::new(shared.clone(), what.frames, what.meta, found);
    Ok((shared, growth, !found))
}
