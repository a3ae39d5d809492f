//! The board: one page-locked piece of memory that all processes of a device share.
//!
//! Made by the supervisor before it forks anything. Through it worker and agent speak without
//! asking the kernel for memory, as a socket or a pipe would: a worker that waits for memory when
//! it is killed does not end, and its device waits with it.
//!
//! It is a file without a name, so that a newer supervisor, which takes the place of an older one by
//! `exec`, finds it again; its layout belongs to what `handover.rs` counts as one version.
//!
//! * beats: counted up by the worker's I/O threads; the supervisor looks whether they go on;
//! * mail: one request of the agent to the worker at a time, and its answer;
//! * orders of the agent to the supervisor: the program to upgrade to, other tiers;
//! * the tiers, as the arena was opened last (`supervise/change.rs`);
//! * log: a ring that the worker's threads put records into and the agent writes out.
//!
//! All of it is atomics, and each part has one writer at a time: the log's and the answer's is the
//! worker (a dead one's half-written record is skipped by the next), the request's is the agent.
//! Bells are eventfds; ringing and hearing one asks for no memory either.

#![allow(unsafe_code)] // memfd, mmap, eventfd.

use crate::queue::Counters;
use crate::slotfree::Mode;
use crate::windows::Published;
use anyhow::{Context, Result};
use std::io::Error as OsError;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::time::Duration;

/// Most queues of a device.
pub const MAX_QUEUES: usize = 64;
const REQUEST_BYTES: usize = 512;
const TIERS_BYTES: usize = 1024;
const ANSWER_BYTES: usize = 16 << 10;
const PATH_BYTES: usize = 4096;
const LOG_BYTES: usize = 32 << 10;

/// What is shared.
#[repr(C)]
pub struct Board {
    /// One for each queue.
    pub beats: [AtomicU64; MAX_QUEUES],
    /// How many of these there are.
    pub queues: AtomicU64,
    /// Workers taken over from so far.
    pub taken_over: AtomicU64,
    /// From a worker's death to the next one's being live, in microseconds: the last and the longest.
    pub last_take_over_us: AtomicU64,
    /// The longest.
    pub longest_take_over_us: AtomicU64,
    /// Workers that served so far, whatever became of them, less one.
    pub generation: AtomicU64,
    /// Times that worker and supervisor were replaced by newer ones.
    pub upgrades: AtomicU64,
    /// What the queues have to tell, of all workers so far.
    pub counters: Counters,
    /// What the store holds, so far as the worker has told.
    pub held: Published,
    /// Whether swap windows are kept (`windows/mod.rs`).
    pub windows: AtomicU64,
    /// Times that the OOM killer was called because the store stayed full.
    pub victims: AtomicU64,
    /// The slot-free feed.
    pub slot_free: SlotFree,
    /// Log records that found no room.
    pub log_dropped: AtomicU64,
    log_written: AtomicU64,
    log_read: AtomicU64,
    request: Letter<REQUEST_BYTES>,
    answer: Letter<ANSWER_BYTES>,
    upgrade_to: Letter<PATH_BYTES>,
    upgrade_error: Letter<REQUEST_BYTES>,
    log: [AtomicU8; LOG_BYTES],
    /// The process that supervises.
    pub supervisor: AtomicU64,
    /// The process that serves, or was ordered to.
    pub worker: AtomicU64,
    /// Supervisors that died and were replaced (`heir.rs`).
    pub supervisors_lost: AtomicU64,
    /// A newer program was called and has not yet said that it goes on.
    pub upgrading: AtomicU64,
    /// The worker was told to stop the device: from here on it is to go, whoever dies.
    pub stopping: AtomicU64,
    /// What the supervisor was asked: [`ASKED_UPGRADE`], [`ASKED_TIERS`].
    asked: AtomicU64,
    /// The tiers, one a line; numbered 0: those of the command line. The others are those before the last change.
    tiers: [Letter<TIERS_BYTES>; 2],
    /// Which of the two holds.
    tiers_now: AtomicU64,
    /// [`CHANGE_MADE`] or [`CHANGE_ORDERED`]: nobody is known to be live with changed tiers, and the arena opens with
    /// either.
    pub tiers_changing: AtomicU64,
    tiers_wanted: Letter<TIERS_BYTES>,
    /// What became of the order with that number; empty: it was carried out.
    tiers_done: Letter<REQUEST_BYTES>,
}

/// The tiers that hold were changed, and no worker was ordered since.
pub const CHANGE_MADE: u64 = 1;
/// One was.
pub const CHANGE_ORDERED: u64 = 2;
/// An upgrade.
pub const ASKED_UPGRADE: u64 = 1;
/// Other tiers.
pub const ASKED_TIERS: u64 = 2;

/// How the device hears of freed slots.
#[repr(C)]
pub struct SlotFree {
    /// A [`Mode`], in the number of `reason`.
    reason: Letter<REQUEST_BYTES>,
    /// Ranges that were heard of, by all workers so far.
    pub events: AtomicU64,
    /// Pages in them.
    pub pages: AtomicU64,
}

/// A message with the number of the question it belongs to.
#[repr(C)]
struct Letter<const N: usize> {
    number: AtomicU64,
    len: AtomicU32,
    text: [AtomicU8; N],
}

impl<const N: usize> Letter<N> {
    /// False: it is too long.
    fn put(&self, number: u64, text: &[u8]) -> bool {
        if text.len() > N {
            return false;
        }
        self.text.iter().zip(text).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
        self.len.store(text.len() as u32, Ordering::Relaxed);
        self.number.store(number, Ordering::Release);
        true
    }

    fn get(&self) -> (u64, String) {
        let number = self.number.load(Ordering::Acquire);
        let len = (self.len.load(Ordering::Relaxed) as usize).min(N);
        let bytes = self.text[..len].iter().map(|b| b.load(Ordering::Relaxed)).collect::<Vec<u8>>();
        (number, String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The board and the bells of its users, in a process that was made with them or forked since.
pub struct Shared {
    /// The board.
    pub board: &'static Board,
    file: OwnedFd,
    to_worker: OwnedFd,
    to_agent: OwnedFd,
    to_supervisor: OwnedFd,
    log_bell: OwnedFd,
}

impl Shared {
    /// Makes a board. Before any fork, after the process's memory is set to be locked.
    pub fn new() -> Result<Shared> {
        // SAFETY: a constant NUL-terminated name and a valid flag.
        let file = owned(unsafe { libc::memfd_create(c"ghostswap-board".as_ptr(), libc::MFD_CLOEXEC) })?;
        // SAFETY: acts on our own new file.
        if unsafe { libc::ftruncate(file.as_raw_fd(), std::mem::size_of::<Board>() as libc::off_t) } != 0 {
            return Err(OsError::last_os_error()).context("cannot make the board");
        }
        Shared::of([file, bell()?, bell()?, bell()?, bell()?])
    }

    /// The board that an older supervisor left, by its [`Shared::descriptors`].
    pub fn of(descriptors: [OwnedFd; 5]) -> Result<Shared> {
        let [file, to_worker, to_agent, to_supervisor, log_bell] = descriptors;
        let len = std::mem::size_of::<Board>();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a fresh mapping of our own file at an address the kernel picks.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(OsError::last_os_error()).context("cannot map the board");
        }
        // SAFETY: mapped for good, aligned to a page, and zeros are a valid board.
        let board = unsafe { &*at.cast::<Board>() };
        Ok(Shared { board, file, to_worker, to_agent, to_supervisor, log_bell })
    }

    /// What a child must keep.
    pub fn descriptors(&self) -> [i32; 5] {
        [&self.file, &self.to_worker, &self.to_agent, &self.to_supervisor, &self.log_bell].map(|fd| fd.as_raw_fd())
    }

    // --- the supervisor's side ----------------------------------------------------------------

    /// What the supervisor waits on.
    pub fn supervisor_bell(&self) -> i32 {
        self.to_supervisor.as_raw_fd()
    }

    /// What the bell rang for.
    pub fn asked(&self) -> u64 {
        hear(&self.to_supervisor);
        self.board.asked.swap(0, Ordering::Acquire)
    }

    /// The program to upgrade to.
    pub fn upgrade_wanted(&self) -> String {
        self.board.upgrade_to.get().1
    }

    /// The tiers that were ordered, and the order's number.
    pub fn tiers_wanted(&self) -> (u64, String) {
        self.board.tiers_wanted.get()
    }

    /// Says what became of an order of tiers.
    pub fn set_tiers_done(&self, order: u64, why: &str) {
        self.board.tiers_done.put(order, cut(why).as_bytes());
    }

    /// Has other tiers hold, which may be those before: whoever else had to go on here finds them. `new`: they are not
    /// on the board yet. False: they are too long.
    pub fn switch_tiers(&self, new: Option<&str>) -> bool {
        let other = self.board.tiers_now.load(Ordering::Relaxed) ^ 1;
        if let Some(text) = new {
            if !self.board.tiers[other as usize & 1].put(1, text.as_bytes()) {
                return false;
            }
        }
        self.board.tiers_changing.store(CHANGE_MADE, Ordering::Release);
        self.board.tiers_now.store(other, Ordering::Release);
        true
    }

    /// Why the last upgrade came to nothing; empty: it did not.
    pub fn set_upgrade_error(&self, why: &str) {
        self.board.upgrade_error.put(0, cut(why).as_bytes());
    }

    /// How the device hears of freed slots, and by what, or why not.
    pub fn set_slot_free(&self, mode: Mode, reason: &str) {
        self.board.slot_free.reason.put(mode as u64, cut(reason).as_bytes());
    }

    /// The same, to tell it.
    pub fn slot_free(&self) -> (Mode, String) {
        let (mode, reason) = self.board.slot_free.reason.get();
        (Mode::from_number(mode), reason)
    }

    /// The same, to tell it.
    pub fn upgrade_error(&self) -> String {
        self.board.upgrade_error.get().1
    }

    /// The tiers, one a line. None: those of the command line.
    pub fn tiers(&self) -> Option<String> {
        let now = self.board.tiers_now.load(Ordering::Acquire);
        let (number, text) = self.board.tiers[now as usize & 1].get();
        (number != 0).then_some(text)
    }

    /// The last order of tiers that came to an end, and why it came to nothing, if it did.
    pub fn tiers_done(&self) -> (u64, String) {
        self.board.tiers_done.get()
    }

    // --- the worker's side --------------------------------------------------------------------

    /// What the worker's main thread waits on.
    pub fn worker_bell(&self) -> i32 {
        self.to_worker.as_raw_fd()
    }

    /// The request that came, with its number.
    pub fn request(&self) -> (u64, String) {
        hear(&self.to_worker);
        self.board.request.get()
    }

    /// Answers a request.
    pub fn answer(&self, number: u64, text: &str) {
        if !self.board.answer.put(number, text.as_bytes()) {
            self.board.answer.put(number, br#"{"ok":false,"error":"the answer is too long"}"#);
        }
        ring(&self.to_agent);
    }

    /// Puts a record into the log, or counts it as dropped. One caller at a time.
    pub fn log(&self, record: &[u8]) {
        let b = self.board;
        let (written, read) = (b.log_written.load(Ordering::Relaxed), b.log_read.load(Ordering::Acquire));
        if written - read + record.len() as u64 > LOG_BYTES as u64 {
            b.log_dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        for (i, byte) in record.iter().enumerate() {
            b.log[(written as usize + i) % LOG_BYTES].store(*byte, Ordering::Relaxed);
        }
        b.log_written.store(written + record.len() as u64, Ordering::Release);
        ring(&self.log_bell);
    }

    // --- the agent's side ---------------------------------------------------------------------

    /// Asks the worker, and the one that takes over from it should it die meanwhile.
    pub fn ask(&self, text: &str, patience: Duration) -> Option<String> {
        let number = self.board.request.number.load(Ordering::Relaxed) + 1;
        let slice = Duration::from_millis(100);
        let mut waited = Duration::ZERO;
        let mut worker = u64::MAX;
        hear(&self.to_agent);
        while waited < patience {
            let now = self.board.generation.load(Ordering::Relaxed);
            if now != worker {
                worker = now;
                if !self.board.request.put(number, text.as_bytes()) {
                    return None;
                }
                ring(&self.to_worker);
            }
            let [rung] = crate::signals::poll([self.to_agent.as_raw_fd()], slice);
            waited += slice;
            if rung {
                hear(&self.to_agent);
                let (answered, text) = self.board.answer.get();
                if answered == number {
                    return Some(text);
                }
            }
        }
        None
    }

    /// Asks the supervisor to upgrade, unless this very order was passed on already. False: the path is
    /// too long.
    pub fn ask_upgrade(&self, program: &str, order: u64) -> bool {
        if order != 0 && self.board.upgrade_to.get().0 == order {
            return true;
        }
        self.set_upgrade_error("");
        let put = self.board.upgrade_to.put(order, program.as_bytes());
        self.ask_supervisor(ASKED_UPGRADE);
        put
    }

    /// Asks the supervisor for these tiers, one a line, likewise. False: they are too long.
    pub fn ask_tiers(&self, tiers: &str, order: u64) -> bool {
        if self.board.tiers_wanted.get().0 == order {
            return true;
        }
        let put = self.board.tiers_wanted.put(order, tiers.as_bytes());
        if put {
            self.ask_supervisor(ASKED_TIERS);
        }
        put
    }

    fn ask_supervisor(&self, what: u64) {
        self.board.asked.fetch_or(what, Ordering::Release);
        ring(&self.to_supervisor);
    }

    /// Has the agent's log thread look.
    pub fn ring_log(&self) {
        ring(&self.log_bell);
    }

    /// Waits for log records and takes all that there are.
    pub fn take_log(&self, into: &mut Vec<u8>) {
        crate::signals::poll([self.log_bell.as_raw_fd()], Duration::from_secs(3600));
        hear(&self.log_bell);
        let b = self.board;
        let (written, read) = (b.log_written.load(Ordering::Acquire), b.log_read.load(Ordering::Relaxed));
        into.extend((read..written).map(|at| b.log[at as usize % LOG_BYTES].load(Ordering::Relaxed)));
        b.log_read.store(written, Ordering::Release);
    }
}

/// As much of a text as a short letter takes.
fn cut(text: &str) -> &str {
    let end = text.char_indices().map(|(at, _)| at).take_while(|at| *at < REQUEST_BYTES - 4).last().unwrap_or(0);
    if text.len() < REQUEST_BYTES {
        text
    } else {
        &text[..end]
    }
}

fn bell() -> Result<OwnedFd> {
    // SAFETY: takes no pointers.
    owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

fn owned(fd: libc::c_int) -> Result<OwnedFd> {
    match fd {
        -1 => Err(OsError::last_os_error()).context("cannot make the board"),
        // SAFETY: a fresh descriptor that nobody else owns.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

fn ring(bell: &OwnedFd) {
    let one = 1u64;
    // SAFETY: writes the 8 bytes of a live integer; a bell that rings already may refuse.
    unsafe { libc::write(bell.as_raw_fd(), (&raw const one).cast(), 8) };
}

fn hear(bell: &OwnedFd) {
    let mut count = 0u64;
    // SAFETY: reads 8 bytes into a live integer; a silent bell refuses.
    unsafe { libc::read(bell.as_raw_fd(), (&raw mut count).cast(), 8) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_answered_and_an_old_answer_is_not_taken() {
        let s = Shared::new().unwrap();
        s.answer(0, "old");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                crate::signals::poll([s.worker_bell()], Duration::from_secs(5));
                let (number, text) = s.request();
                s.answer(number, &format!("{text}, indeed"));
            });
            assert_eq!(s.ask("so", Duration::from_secs(5)).as_deref(), Some("so, indeed"));
        });
        assert_eq!(s.ask("nobody hears", Duration::from_millis(200)), None);
    }

    #[test]
    fn an_order_given_twice_is_heard_once() {
        let s = Shared::new().unwrap();
        let heard = || crate::signals::poll([s.supervisor_bell()], Duration::ZERO)[0].then(|| s.asked());
        for (order, hears) in [(7, true), (7, false), (8, true), (0, true), (0, true)] {
            assert!(s.ask_upgrade("/new", order));
            assert_eq!(heard(), hears.then_some(ASKED_UPGRADE), "{order}");
        }
        assert!(s.ask_tiers("ram", 9) && s.ask_tiers("ram", 9));
        assert_eq!((heard(), heard(), s.tiers_wanted()), (Some(ASKED_TIERS), None, (9, "ram".into())));
        assert!(!s.ask_tiers(&"x".repeat(TIERS_BYTES + 1), 10));
    }

    #[test]
    fn tiers_are_those_of_the_command_line_until_they_are_changed() {
        let s = Shared::new().unwrap();
        assert_eq!(s.tiers(), None);
        assert!(s.switch_tiers(Some("ram\nblock:/dev/x")));
        assert_eq!(s.tiers().as_deref(), Some("ram\nblock:/dev/x"));
        assert!(s.switch_tiers(None), "back");
        assert_eq!(s.tiers(), None);
        assert!(s.switch_tiers(Some("ram")) && s.switch_tiers(Some("ram\nfile:/x,size=1")));
        assert!(s.switch_tiers(None));
        assert_eq!(s.tiers().as_deref(), Some("ram"));
    }

    #[test]
    fn the_log_keeps_order_and_counts_what_does_not_fit() {
        let s = Shared::new().unwrap();
        let record = [b'x'; 1000];
        for _ in 0..40 {
            s.log(&record);
        }
        let mut out = Vec::new();
        s.take_log(&mut out);
        assert_eq!((out.len(), s.board.log_dropped.load(Ordering::Relaxed)), (32000, 8));
        s.log(b"after");
        out.clear();
        s.take_log(&mut out);
        assert_eq!(out, b"after");
    }
}
