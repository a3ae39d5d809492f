//! One ublk hardware queue: its thread, its lane into the store, its requests.
//!
//! Every request is read and written with `pread`/`pwrite` on the device's control node (user
//! copy), through one 64 KiB buffer of the thread. Reads from memory, discards and zeroes are served the
//! moment they arrive; what a read finds on disk is fetched while others are served (`queue/fetch.rs`).
//! Writes queue up and are done a slice of 64 KiB at a time; between slices newly
//! arrived requests come first, so a 512 KiB swap-out does not hold a page fault back.
//!
//! A write for which the store has no room is parked: it keeps its place while the thread serves
//! reads and sleeps on a timer, and fails with ENOSPC after two seconds without progress (longer while a
//! disk has not answered, `Lane::patience`). Refusals are at least [`REFUSAL_PAUSE`] apart: the kernel
//! resubmits a refused page at once, and a queue that answered at full speed would do nothing else.
//!
//! With the slot-free feed a write remembers its gate when it is accepted, and none of it is stored
//! before all that the kernel told earlier was applied (`slotfree/ring.rs`): what is in the way of a
//! write its own queue drains. When nothing is written, queue 0 waits on the ring beside its
//! requests and drains a moment after the first word, so that many come at once.
//!
//! Nothing here allocates, locks, logs or opens a file once the loop runs. Idle, a queue sleeps in
//! `io_uring_enter`; one call submits a batch of completions and waits for the next requests.

#![allow(unsafe_code)] // pread/pwrite on a borrowed descriptor; pushing a timer on the ring.

use crate::board::{Board, Shared};
use crate::slotfree::Feed;
use anyhow::{anyhow, Context, Result};
use ghostswap::{Error, Lane};
use io_uring::{cqueue, opcode, squeue, types, IoUring};
use libublk::io::{BufDesc, BufDescList, UblkDev, UblkIOCtx, UblkQueue};
use libublk::{sys, ublk_init_task_ring, with_task_io_ring_mut, UblkError, UblkIORes, UblkUringData};
use std::cell::RefCell;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

mod feed;
mod fetch;

use feed::{Owed, Watch, GATHERED, TOLD};
use fetch::{Fetches, Read, FETCH, FETCHES};

/// Bytes moved between the kernel and the store at a time.
pub const SLICE_BYTES: usize = 64 << 10;
/// How soon a parked write is tried again.
const RETRY: Duration = Duration::from_millis(4);
/// A refusal so long ago belongs to another shortage.
const ANOTHER_SHORTAGE: Duration = Duration::from_secs(2);
/// Least time between two refusals of one queue.
const REFUSAL_PAUSE: Duration = Duration::from_millis(20);
/// How often a queue shows that it goes on.
const BEAT_EVERY: Duration = Duration::from_millis(500);
/// Stack of a queue's thread: all of it is made resident, so no more than needed.
const STACK_BYTES: usize = 64 << 10;
/// Marks the retry timer's completion.
const TIMER: u64 = UblkUringData::Target as u64;
/// Marks the beat's completion.
const BEAT: u64 = TIMER | 1;
/// How soon a write is tried again that waits for another thread, or the kernel, at the feed.
const SOON: Duration = Duration::from_micros(200);
const DONE: i32 = 0;

/// What the I/O threads have to tell; others read and report it.
#[repr(C)]
pub struct Counters {
    /// Writes refused for want of room.
    pub refused: AtomicU64,
    /// Requests failed for any other reason.
    pub failed: AtomicU64,
    /// Times a write had to wait for room.
    pub parked: AtomicU64,
}

/// A write under way.
#[derive(Clone, Copy)]
struct Write {
    tag: u16,
    offset: u64,
    len: usize,
    done: usize,
    /// What must have been heard of freed slots before any of it is stored.
    gate: u64,
}

/// A fixed FIFO of writes, one place for every tag.
struct Writes {
    places: Box<[Option<Write>]>,
    head: usize,
    len: usize,
}

impl Writes {
    fn new(depth: usize) -> Self {
        Writes { places: vec![None; depth].into_boxed_slice(), head: 0, len: 0 }
    }

    fn push(&mut self, write: Write) {
        assert!(self.len < self.places.len(), "a tag has one request at a time");
        let at = (self.head + self.len) % self.places.len();
        self.places[at] = Some(write);
        self.len += 1;
    }

    fn first(&mut self) -> Option<&mut Write> {
        self.places[self.head].as_mut()
    }

    fn pop(&mut self) {
        self.places[self.head] = None;
        self.head = (self.head + 1) % self.places.len();
        self.len -= 1;
    }
}

/// Why the queue stopped working on writes.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    /// No write is left: sleep until a request comes.
    Sleep,
    /// More slices to do: look for new requests without waiting.
    Poll,
    /// The store has no room: sleep until a request or the timer comes.
    Retry,
    /// The same, for less long: the feed is in other hands.
    Soon,
}

struct Server<'a> {
    lane: Lane,
    buf: Box<[u8]>,
    cdev: RawFd,
    writes: Writes,
    counters: &'a Counters,
    beat: &'a AtomicU64,
    feed: Option<Arc<Feed>>,
    fetches: Fetches,
    watch: Watch,
    owed: Owed,
    /// Since when the first write has made no progress.
    stuck_since: Option<Instant>,
    last_refusal: Option<Instant>,
    timer_armed: bool,
    beat_armed: bool,
    /// A request has come: the device is live, and no take-over's privilege is needed any more.
    live: bool,
    /// Answers other than to writes wait in the ring.
    answered: bool,
}

/// What a queue's thread waits for: what to set up, then that it may fetch.
type Job = Option<(Arc<UblkDev>, Lane)>;

/// A queue's thread, started and with its ring, that waits for its device.
pub struct Idle {
    qid: u16,
    tid: libc::pid_t,
    jobs: SyncSender<Job>,
    news: Receiver<Result<libc::pid_t>>,
    thread: JoinHandle<()>,
}

/// A queue's thread that serves.
pub struct Running {
    /// The queue.
    pub qid: u16,
    /// The kernel's number of the thread.
    pub tid: libc::pid_t,
    /// Ends with the device.
    pub thread: JoinHandle<()>,
}

impl Idle {
    /// Returns once the thread has its ring.
    /// `fetch_bytes`: room that a fetch from disk takes, 0 if there is no disk. `apart`: there are files to read from.
    pub fn start(
        qid: u16,
        depth: u16,
        (fetch_bytes, apart): (usize, bool),
        shared: Arc<Shared>,
        feed: Option<Arc<Feed>>,
    ) -> Result<Idle> {
        let (jobs, given) = sync_channel::<Job>(1);
        let (tell, news) = sync_channel(1);
        let body = move || {
            let prepared = prepare(qid, depth, apart);
            let failed = prepared.is_err();
            let fetches = Fetches::new(depth, fetch_bytes);
            let _ = tell.send(prepared);
            // No job comes if the standby was not needed.
            let (false, Ok(Some((dev, lane)))) = (failed, given.recv()) else { return };
            let done = || tell.send(Ok(0)).is_ok();
            let go_on = || done() && matches!(given.recv(), Ok(None));
            if let Err(e) = serve(qid, &dev, lane, shared.board, (feed, fetches), go_on, done) {
                let _ = tell.send(Err(e));
            }
        };
        let thread = std::thread::Builder::new().name(format!("gs-queue{qid}")).stack_size(STACK_BYTES);
        let thread = thread.spawn(body).context("cannot start a queue's thread")?;
        let mut idle = Idle { qid, tid: 0, jobs, news, thread };
        idle.tid = idle.wait()?;
        Ok(idle)
    }

    fn order(&self, job: Job) -> Result<()> {
        self.jobs.send(job).ok().context("a queue's thread died")
    }

    fn wait(&self) -> Result<libc::pid_t> {
        self.news.recv().context("a queue's thread died")?
    }
}

/// Has the queues serve. Returns once all of them fetch: the driver's start command waits for that, however
/// long.
///
/// First all are set up, then all fetch, at once: Linux 6.12 crashes at the next claim when a worker
/// dies after one of its queues fetched and before another did.
pub fn run(idle: Vec<Idle>, dev: &Arc<UblkDev>, lane: impl Fn() -> ghostswap::Result<Lane>) -> Result<Vec<Running>> {
    for queue in &idle {
        queue.order(Some((dev.clone(), lane()?)))?;
    }
    idle.iter().try_for_each(|queue| queue.wait().map(drop))?;
    idle.iter().try_for_each(|queue| queue.order(None))?;
    idle.iter().try_for_each(|queue| queue.wait().map(drop))?;
    Ok(idle.into_iter().map(|queue| Running { qid: queue.qid, tid: queue.tid, thread: queue.thread }).collect())
}

/// All that needs no device.
fn prepare(qid: u16, depth: u16, apart: bool) -> Result<libc::pid_t> {
    crate::protect::first_in_line(crate::protect::TAKE_OVER_PRIORITY);
    init_ring(u32::from(depth) + 4 + FETCHES as u32)
        .map_err(|e| anyhow!("cannot set up io_uring for queue {qid}: {e:?}"))?;
    if apart {
        fetch::prepare_reads_apart().with_context(|| format!("no thread that reads files for queue {qid}"))?;
    }
    // SAFETY: no preconditions.
    Ok(unsafe { libc::gettid() })
}

/// Sets the queue up; if `go_on` says so, fetches, calls `fetched`, and serves it until the device stops.
fn serve(
    qid: u16,
    dev: &UblkDev,
    lane: Lane,
    board: &Board,
    (feed, mut fetches): (Option<Arc<Feed>>, Fetches),
    go_on: impl FnOnce() -> bool,
    fetched: impl FnOnce() -> bool,
) -> Result<()> {
    let depth = dev.dev_info.queue_depth;
    let queue = UblkQueue::new(qid, dev)
        .and_then(|q| q.submit_fetch_commands_unified(BufDescList::Slices(None)))
        .map_err(|e| anyhow!("cannot set up queue {qid}: {e:?}"))?;
    // libublk versions differ in what they do to this attribute.
    crate::protect::thread().context("after the set-up of the queue")?;
    fetches.attach(&lane).context("cannot read from the tier below")?;
    let mut server = Server {
        lane,
        buf: vec![0; SLICE_BYTES].into_boxed_slice(),
        cdev: dev.tgt.fds[0],
        writes: Writes::new(usize::from(depth)),
        counters: &board.counters,
        beat: &board.beats[usize::from(qid)],
        watch: if qid == 0 && feed.is_some() { Watch::Idle } else { Watch::Never },
        owed: Owed::Nothing,
        feed,
        fetches,
        stuck_since: None,
        last_refusal: None,
        timer_armed: false,
        beat_armed: false,
        live: false,
        answered: false,
    };
    if !go_on() {
        return Ok(());
    }
    // Submitting asks the kernel for memory, a request's worth for each tag: in a take-over that is
    // for a real-time thread to do, and `start` waits for it.
    with_task_io_ring_mut(|ring| ring.submit()).context("cannot submit the fetch commands")?;
    fetched();
    server.run(&queue);
    Ok(())
}

/// One thread submits, and completions may wait for its next system call: no interrupts for them.
fn init_ring(entries: u32) -> std::result::Result<(), UblkError> {
    ublk_init_task_ring(|cell| {
        let build = |single: bool| {
            let mut builder = IoUring::<squeue::Entry, cqueue::Entry>::builder();
            builder.setup_cqsize(entries * 2).setup_coop_taskrun();
            if single {
                builder.setup_single_issuer();
            }
            builder.build(entries)
        };
        let ring = build(true).or_else(|_| build(false)).map_err(UblkError::IOError)?;
        cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))
    })
}

impl Server<'_> {
    fn run(&mut self, queue: &UblkQueue<'_>) {
        let mut next = Next::Sleep;
        loop {
            if matches!(next, Next::Retry | Next::Soon) && !self.timer_armed {
                self.timer_armed = self.arm(TIMER, if next == Next::Soon { SOON } else { RETRY });
            }
            if self.watch == Watch::Idle {
                self.wait_at_feed();
            }
            if !self.beat_armed {
                self.beat_armed = self.arm(BEAT, BEAT_EVERY);
            }
            let to_wait = usize::from(next != Next::Poll);
            let batch = queue.flush_and_wake_io_tasks(|data, cqe, _| self.accept(queue, data, cqe.result()), to_wait);
            if batch.is_err() {
                // The device is stopping and all commands are back, or the ring is gone.
                return;
            }
            let answered = self.answered;
            next = self.work_on_writes(queue);
            if self.owed == Owed::Now && next != Next::Poll {
                // Answers to reads go out first.
                next = if answered { Next::Poll } else { self.work_on_feed(next) };
            }
        }
    }

    /// Takes one completion from the ring: a request of the kernel, or the timer.
    fn accept(&mut self, queue: &UblkQueue<'_>, data: u64, result: i32) {
        match data {
            TIMER => {
                self.timer_armed = false;
                return;
            }
            BEAT => {
                self.beat.fetch_add(1, Ordering::Relaxed);
                self.beat_armed = false;
                // Should a word of the feed ever be missed, this is how long it waits.
                self.drop_some();
                self.fetch_again(queue);
                return;
            }
            TOLD => {
                // Where the ring cannot be waited on, writes and beats drain it.
                self.watch = if result > 0 { Watch::Told } else { Watch::Never };
                if self.owed == Owed::Nothing && result > 0 {
                    self.owed = self.gather();
                }
                return;
            }
            GATHERED => {
                self.owed = Owed::Now;
                return;
            }
            data if data & FETCH == FETCH => return self.fetched(queue, (data & !FETCH) as usize, result),
            _ => {}
        }
        if result != sys::UBLK_IO_RES_OK as i32 {
            return;
        }
        if !std::mem::replace(&mut self.live, true) {
            crate::protect::as_any_other();
        }
        let tag = UblkIOCtx::user_data_to_tag(data) as u16;
        let iod = queue.get_iod(tag);
        let offset = iod.start_sector << 9;
        let len = u64::from(iod.nr_sectors) << 9;
        let answer = match iod.op_flags & 0xff {
            sys::UBLK_IO_OP_READ => return self.go_on(queue, Read::new(tag, offset, len as usize)),
            sys::UBLK_IO_OP_WRITE => {
                let gate = self.feed.as_ref().map_or(0, |feed| feed.ring().gate());
                self.writes.push(Write { tag, offset, len: len as usize, done: 0, gate });
                return;
            }
            sys::UBLK_IO_OP_DISCARD => self.lane.discard(offset, len).map_or_else(|e| errno(&e), |()| DONE),
            sys::UBLK_IO_OP_WRITE_ZEROES => self.lane.write_zeroes(offset, len).map_or_else(|e| errno(&e), |()| DONE),
            sys::UBLK_IO_OP_FLUSH => self.lane.flush().map_or_else(|e| errno(&e), |()| DONE),
            _ => -libc::EOPNOTSUPP,
        };
        self.answer(queue, tag, answer);
    }

    /// Answers anything but a write.
    fn answer(&mut self, queue: &UblkQueue<'_>, tag: u16, answer: i32) {
        self.answered = true;
        self.complete(queue, tag, answer);
    }

    fn complete(&self, queue: &UblkQueue<'_>, tag: u16, answer: i32) {
        if answer < 0 {
            let counter = if answer == -libc::ENOSPC { &self.counters.refused } else { &self.counters.failed };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let sent = queue.complete_io_cmd_unified(tag, BufDesc::Slice(&[]), Ok(UblkIORes::Result(answer)));
        debug_assert!(sent.is_ok(), "user copy accepts empty buffers");
    }

    /// Does slices of writes until none is left, room runs out, or others want to be served.
    fn work_on_writes(&mut self, queue: &UblkQueue<'_>) -> Next {
        let answered = std::mem::take(&mut self.answered);
        let mut budget = SLICE_BYTES;
        loop {
            let Some(&mut write) = self.writes.first() else { return Next::Sleep };
            if self.parked_awaits_timer() {
                return Next::Retry;
            }
            // Answers to reads go out before a slice holds them back; new requests come first.
            if answered || budget == 0 || with_task_io_ring_mut(|r| !r.completion().is_empty()) {
                return Next::Poll;
            }
            if let Some(wait) = self.held_at_gate(write.gate) {
                return wait;
            }
            let wanted = SLICE_BYTES.min(write.len - write.done);
            budget = budget.saturating_sub(wanted);
            match self.slice(queue.get_qid(), write) {
                Ok(done) if done == write.len => {
                    self.stuck_since = None;
                    self.finish(queue, write.tag, write.len as i32);
                }
                Ok(done) => {
                    if let Some(first) = self.writes.first() {
                        first.done = done;
                    }
                    if done - write.done == wanted {
                        self.stuck_since = None;
                    } else {
                        self.park(queue, write.tag, done > write.done);
                        return Next::Retry;
                    }
                }
                Err(errno) => self.finish(queue, write.tag, errno),
            }
        }
    }

    /// Whether the first write has been tried since the timer last fired.
    fn parked_awaits_timer(&self) -> bool {
        self.stuck_since.is_some() && self.timer_armed
    }

    /// One slice of a write into the store. Returns the bytes of the write done so far.
    fn slice(&mut self, qid: u16, write: Write) -> std::result::Result<usize, i32> {
        let slice = &mut self.buf[..SLICE_BYTES.min(write.len - write.done)];
        let at = UblkIOCtx::ublk_user_copy_pos(qid, write.tag, write.done as u32);
        // SAFETY: the buffer is live and as long as said; the descriptor is open while the queue is.
        let n = unsafe { libc::pread(self.cdev, slice.as_mut_ptr().cast(), slice.len(), at as libc::off_t) };
        if n != slice.len() as isize {
            return Err(-libc::EIO);
        }
        match self.lane.try_write(write.offset + write.done as u64, slice) {
            Ok(n) => Ok(write.done + n),
            Err(Error::NoSpace) => Ok(write.done),
            Err(e) => Err(errno(&e)),
        }
    }

    fn finish(&mut self, queue: &UblkQueue<'_>, tag: u16, answer: i32) {
        self.writes.pop();
        self.complete(queue, tag, answer);
    }

    /// Keeps the first write waiting, or refuses it when it has waited long enough.
    fn park(&mut self, queue: &UblkQueue<'_>, tag: u16, progress: bool) {
        let now = Instant::now();
        let since_refusal = self.last_refusal.map(|at| now - at);
        let waited = match self.stuck_since {
            Some(since) if !progress => now - since,
            _ => Duration::ZERO,
        };
        // The patience of another shortage must not be charged to this one.
        let patience = self.lane.patience();
        let old = self.last_refusal > self.stuck_since && since_refusal >= Some(ANOTHER_SHORTAGE);
        if waited.is_zero() || old {
            self.counters.parked.fetch_add(1, Ordering::Relaxed);
            self.stuck_since = Some(now);
        } else if waited >= patience && since_refusal.is_none_or(|d| d >= REFUSAL_PAUSE) {
            // `stuck_since` stays: the next write is refused after the pause, not after another
            // spell of patience, until one makes progress.
            self.last_refusal = Some(now);
            self.finish(queue, tag, -libc::ENOSPC);
        }
    }

    /// Starts a timer. False: the ring is full, which is not for long.
    fn arm(&self, what: u64, after: Duration) -> bool {
        let ts = types::Timespec::from(after);
        let timer = opcode::Timeout::new(&ts).build().user_data(what);
        with_task_io_ring_mut(|ring| {
            // SAFETY: the kernel copies the time when the entry is submitted, below, while `ts`
            // lives.
            let pushed = unsafe { ring.submission().push(&timer) }.is_ok();
            pushed && ring.submit().is_ok()
        })
    }
}

/// The one place where the store's errors become the block layer's.
fn errno(error: &Error) -> i32 {
    match error {
        Error::NoSpace => -libc::ENOSPC,
        Error::OutOfRange { .. } | Error::Unaligned { .. } => -libc::EINVAL,
        _ => -libc::EIO,
    }
}
