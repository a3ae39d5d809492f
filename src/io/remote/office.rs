//! What carriers and requesters share: requests on their way, who is awake, whether the server is there.
//!
//! A request that the table was emptied of waits here, in order, until a carrier with a connection takes it, and comes
//! back here, to the front, when the connection breaks. It fails when the server has been away for longer than the
//! tier's time-out, or at once while the server that answers is not ours.
//!
//! Lock order: `waiting` is taken by carriers alone, and nothing is taken within it.

use super::post::{encode, Post};
use super::table::{Request, Table};
use super::transport::Bell;
use crate::io::TierKey;
use crate::nbd::handshake::{Export, Failure};
use std::collections::VecDeque;
use std::io::Result;
use std::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Requests at a time, of all requesters.
const MAX_REQUESTS: u32 = 1024;
/// Of those, in the table: it is emptied at once.
const PLACES: usize = 256;
/// A request fails that was sent so many times as long as a server is waited for, whatever the server does.
const PATIENCES: u32 = 4;

/// A request that was taken out of the table.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub request: Request,
    pub since: Instant,
    /// It may have been sent to a connection that broke: the server may do it yet, at any time.
    pub late: bool,
}

impl Held {
    pub fn new(request: Request) -> Held {
        Held { request, since: Instant::now(), late: false }
    }
}

/// What a carrier does that does not do anything.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Sleep {
    Awake,
    /// It has a connection with room.
    Ready,
    /// It has none.
    Away,
    /// It has one, and no room.
    Full,
}

/// Whose the export, or prefix, must be, how large at least, and what makes an object of its own.
pub(super) struct Identity {
    pub id: TierKey,
    pub bytes: u64,
    #[cfg_attr(not(feature = "s3"), allow(dead_code, reason = "an export has no objects"))]
    pub extent_bytes: u64,
}

pub(super) struct Office {
    table: Table,
    waiting: Mutex<VecDeque<Held>>,
    /// How many wait: what a carrier looks at before it sleeps.
    wait: AtomicU32,
    /// In the table, waiting or with a connection.
    there: AtomicU32,
    sleeps: Box<[AtomicU32]>,
    pub bells: Box<[Bell]>,
    turn: AtomicU32,
    /// Connections that serve.
    up: AtomicU32,
    /// When there last was one, in milliseconds since `begun`.
    left_ms: AtomicU64,
    /// When there was one again.
    came_ms: AtomicU64,
    begun: Instant,
    /// What answers is not what it was.
    pub stranger: AtomicBool,
    /// It is for a store that serves, not one that stands by.
    pub serving: AtomicBool,
    pub stop: AtomicBool,
    pub identity: OnceLock<Identity>,
    /// As it was when the first connection was made.
    pub export: OnceLock<Export>,
    /// Why there is no connection.
    pub failure: Mutex<Option<Failure>>,
    pub timeout: Duration,
}

impl Office {
    pub fn new(carriers: usize, timeout: Duration) -> Result<Office> {
        Ok(Office {
            table: Table::new(PLACES),
            waiting: Mutex::new(VecDeque::with_capacity(MAX_REQUESTS as usize)),
            wait: AtomicU32::new(0),
            there: AtomicU32::new(0),
            sleeps: (0..carriers).map(|_| AtomicU32::new(Sleep::Awake as u32)).collect(),
            bells: (0..carriers).map(|_| Bell::new()).collect::<Result<_>>()?,
            turn: AtomicU32::new(0),
            up: AtomicU32::new(0),
            left_ms: AtomicU64::new(0),
            came_ms: AtomicU64::new(0),
            begun: Instant::now(),
            stranger: AtomicBool::new(false),
            serving: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            identity: OnceLock::new(),
            export: OnceLock::new(),
            failure: Mutex::new(None),
            timeout,
        })
    }

    /// Hands a request over. Neither waits, nor locks, nor allocates. False: there are too many at this moment.
    pub fn push(&self, request: &Request) -> bool {
        if self.there.fetch_add(1, Ordering::Relaxed) >= MAX_REQUESTS || !self.table.push(request) {
            self.there.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        self.wake();
        true
    }

    /// Wakes a carrier: one with a connection if there is one that sleeps.
    pub fn wake(&self) {
        // Either a carrier that goes to sleep sees what was pushed, or this sees that it sleeps.
        fence(Ordering::SeqCst);
        let first = self.turn.fetch_add(1, Ordering::Relaxed) as usize;
        for kind in [Sleep::Ready, Sleep::Away] {
            for i in 0..self.sleeps.len() {
                let n = (first + i) % self.sleeps.len();
                let (from, to) = (kind as u32, Sleep::Awake as u32);
                if self.sleeps[n].load(Ordering::Relaxed) == from
                    && self.sleeps[n].compare_exchange(from, to, Ordering::SeqCst, Ordering::Relaxed).is_ok()
                {
                    return self.bells[n].ring();
                }
            }
        }
    }

    pub fn wake_all(&self) {
        self.bells.iter().for_each(Bell::ring);
    }

    /// Says how a carrier sleeps. False: there is something to do, and it does not.
    pub fn go_to_sleep(&self, carrier: usize, how: Sleep) -> bool {
        self.sleeps[carrier].store(how as u32, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let wanted = how != Sleep::Full && self.table.has_any()
            || how == Sleep::Ready && self.wait.load(Ordering::SeqCst) > 0
            || self.stop.load(Ordering::Relaxed);
        if wanted {
            self.wake_up(carrier);
        }
        !wanted
    }

    pub fn wake_up(&self, carrier: usize) {
        self.sleeps[carrier].store(Sleep::Awake as u32, Ordering::SeqCst);
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Held>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `take` have what waits, in order, while it wants more. Whether some is left.
    pub fn hand_out(&self, mut wants: impl FnMut(Option<Held>) -> bool) -> bool {
        let mut waiting = self.waiting();
        self.collect(&mut waiting);
        while !waiting.is_empty() && wants(None) {
            wants(waiting.pop_front());
        }
        self.wait.store(waiting.len() as u32, Ordering::SeqCst);
        !waiting.is_empty()
    }

    fn collect(&self, waiting: &mut VecDeque<Held>) {
        while let Some(request) = self.table.pop() {
            waiting.push_back(Held::new(request));
        }
    }

    /// A connection broke, and this was not done.
    pub fn give_back(&self, held: Held) {
        let mut waiting = self.waiting();
        waiting.push_front(held);
        self.wait.store(waiting.len() as u32, Ordering::SeqCst);
    }

    /// What has ended, well or not.
    pub fn tell(&self, post: &mut Post, held: &Held, result: std::result::Result<u32, i32>) {
        self.there.fetch_sub(1, Ordering::Relaxed);
        post.add(held.request.reply, encode(result, held.late));
    }

    /// No request lasts longer, whatever the server does.
    pub fn patience(&self) -> Duration {
        self.timeout * PATIENCES
    }

    /// Lets those fail that have waited for long enough.
    pub fn expire(&self, post: &mut Post) {
        let hopeless = self.stop.load(Ordering::Relaxed) || self.is_lost();
        let mut waiting = self.waiting();
        self.collect(&mut waiting);
        for _ in 0..waiting.len() {
            let Some(held) = waiting.pop_front() else { break };
            if hopeless || held.since.elapsed() >= self.patience() {
                self.tell(post, &held, Err(libc::EIO));
            } else {
                waiting.push_back(held);
            }
        }
        self.wait.store(waiting.len() as u32, Ordering::SeqCst);
    }

    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// A connection begins to serve.
    pub fn come(&self) {
        self.stranger.store(false, Ordering::Relaxed);
        if !self.is_up() {
            self.came_ms.store(self.now_ms(), Ordering::Relaxed);
        }
        self.up.fetch_add(1, Ordering::SeqCst);
    }

    /// A connection that served is no more.
    pub fn leave(&self) {
        self.left_ms.store(self.now_ms(), Ordering::Relaxed);
        self.up.fetch_sub(1, Ordering::SeqCst);
    }

    /// From now on a store counts on it.
    pub fn serve(&self) {
        self.left_ms.store(self.now_ms(), Ordering::Relaxed);
        self.serving.store(true, Ordering::SeqCst);
        self.wake_all();
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst) > 0
    }

    /// How long there has been no connection.
    pub fn away(&self) -> Option<Duration> {
        let away = self.now_ms().saturating_sub(self.left_ms.load(Ordering::Relaxed));
        (!self.is_up()).then_some(Duration::from_millis(away))
    }

    /// There is one, for no longer than that.
    pub fn is_back_for_less(&self, than: Duration) -> bool {
        self.is_up() && self.now_ms().saturating_sub(self.came_ms.load(Ordering::Relaxed)) < than.as_millis() as u64
    }

    /// Whoever asks now is refused.
    pub fn is_lost(&self) -> bool {
        self.away().is_some_and(|away| away >= self.timeout || self.stranger.load(Ordering::Relaxed))
    }
}
