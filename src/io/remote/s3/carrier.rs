//! The carrier of a tier of objects: a thread that has many requests under way.
//!
//! It looks whose the prefix is, takes requests while the server answers, reads before writes, tries again what the
//! server has no time for, and gives back what it could not reach it with. Then the server counts as away, and is asked
//! for the header until it answers; what waits meanwhile fails after the tier's time-out, as with NBD (`office.rs`).
//!
//! Requests run as tasks of this thread's runtime. None touches a requester's buffer: what is put was copied, and what
//! was got is copied here, when its task has ended. So a task that is dropped does no harm.
//!
//! A request that was sent and not answered is late when it ends (see the parent), also if it is done by a second try.
#![allow(unsafe_code, reason = "data goes from and to buffers of requesters, by address; a bell for a runtime")]

use super::bucket::{Bucket, Trouble};
use super::spare::Spare;
use crate::io::backing;
use crate::io::remote::office::{Held, Office, Sleep};
use crate::io::remote::post::Post;
use crate::io::remote::table::Kind;
use crate::io::remote::transport::Bell;
use crate::io::BLOCK_BYTES;
use crate::nbd::handshake::Failure;
use bytes::Bytes;
use object_store::path::Path;
use std::collections::VecDeque;
use std::io::{Error as OsError, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;
use tokio::task::JoinSet;

/// Requests that are held here at a time, under way or not.
const HELD: usize = 256;
/// Between attempts to reach the server, at first and at most.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Between attempts at one request that the server had no time for.
const BUSY_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_BUSY_PAUSE: Duration = Duration::from_secs(2);
/// How often to look around, with something to wait for and without.
const LOOK: Duration = Duration::from_millis(250);
const IDLE_LOOK: Duration = Duration::from_secs(5);

/// What a task has to tell.
enum News {
    /// Of the request in this place.
    Of(usize, Outcome),
    /// Whether the server answers, and with what.
    Looked(Result<Option<Bytes>, Trouble>),
    /// What former stores left is gone, or not.
    Swept(Result<(), Trouble>),
}

struct Outcome {
    /// What was read, nothing of others. Err(None): the server was not reached; it may be tried again when it is.
    result: Result<Bytes, Option<i32>>,
    late: bool,
    why: Option<Trouble>,
}

/// What one request comes to on the wire.
enum Work {
    Get(Path, u64, u64),
    Put(Path, Bytes),
    Delete(Path),
}

pub(super) struct Carrier {
    office: Arc<Office>,
    bucket: Arc<Bucket>,
    post: Post,
    /// Most at a time.
    connections: usize,
    reads: VecDeque<Held>,
    writes: VecDeque<Held>,
    /// Under way, by place.
    running: Vec<Option<Held>>,
    tasks: JoinSet<News>,
    spare: Spare,
    up: bool,
    /// It answered as ours, since it was last away.
    known: bool,
    looking: bool,
    sweeping: bool,
    look_at: Instant,
    pause: Duration,
}

/// The bell of an office, for a runtime. It stays open as long as the office.
struct Ears(RawFd);

impl AsRawFd for Ears {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Carrier {
    pub fn new(office: Arc<Office>, bucket: Arc<Bucket>, post: Post, connections: usize) -> Carrier {
        Carrier {
            office,
            bucket,
            post,
            connections,
            reads: VecDeque::with_capacity(HELD),
            writes: VecDeque::with_capacity(HELD),
            running: (0..connections).map(|_| None).collect(),
            tasks: JoinSet::new(),
            spare: Spare::default(),
            up: false,
            known: false,
            looking: false,
            sweeping: false,
            look_at: Instant::now(),
            pause: PAUSE,
        }
    }

    pub async fn run(mut self) {
        let office = self.office.clone();
        let ears = Ears(office.bells[0].as_raw_fd());
        // SAFETY: the descriptor is the office's, which is held until after this, and closes it when it goes.
        let bell = unsafe { AsyncFd::register_with_interest(ears, Interest::READABLE) };
        let bell = bell.expect("an eventfd can be waited for, once");
        while !office.stop.load(Ordering::Relaxed) {
            while let Some(news) = self.tasks.try_join_next() {
                self.hear(news.ok());
            }
            let takes = self.up && self.is_known();
            if takes {
                self.take_some();
                self.start_some();
            } else {
                self.look();
                office.expire(&mut self.post);
            }
            let told = self.post.flush();
            self.sleep(&bell, &office.bells[0], takes, told).await;
        }
        self.tasks.shutdown().await;
        self.give_all_back();
        if self.up {
            office.leave();
        }
        office.expire(&mut self.post);
        self.post.flush();
    }

    /// It answered as the one that it must be, if that is said already.
    fn is_known(&self) -> bool {
        self.known || self.office.identity.get().is_none()
    }

    async fn sleep(&mut self, bell: &AsyncFd<Ears>, own: &Bell, takes: bool, told: bool) {
        let how = match (takes, self.held() < HELD) {
            (false, _) => Sleep::Away,
            (true, true) => Sleep::Ready,
            (true, false) => Sleep::Full,
        };
        if !self.office.go_to_sleep(0, how) {
            // Others are heard meanwhile: bells and tasks are looked at in turn.
            tokio::task::yield_now().await;
            return;
        }
        let most = match (told, self.office.serving.load(Ordering::Relaxed) && !takes) {
            (false, _) => Duration::from_millis(1),
            (true, true) if self.looking => LOOK,
            (true, true) => self.look_at.saturating_duration_since(Instant::now()).min(LOOK),
            (true, false) => IDLE_LOOK,
        };
        let news = tokio::select! {
            rung = bell.readable() => {
                if let Ok(mut rung) = rung {
                    own.silence();
                    rung.clear_ready();
                }
                None
            }
            Some(news) = self.tasks.join_next() => Some(news),
            () = tokio::time::sleep(most) => None,
        };
        self.office.wake_up(0);
        if let Some(news) = news {
            self.hear(news.ok());
        }
    }

    fn held(&self) -> usize {
        self.reads.len() + self.writes.len() + self.running.iter().flatten().count()
    }

    /// Takes what waits, as much as there is room for.
    fn take_some(&mut self) {
        let mut room = HELD.saturating_sub(self.held());
        let (reads, writes) = (&mut self.reads, &mut self.writes);
        self.office.hand_out(|held| {
            if let Some(held) = held {
                room -= 1;
                let queue = if held.request.kind == Kind::Read { &mut *reads } else { &mut *writes };
                queue.push_back(held);
            }
            room > 0
        });
    }

    /// Begins what is to be done: reads first, and writes on half of the connections at most, so that a page never
    /// waits for all of them to have sent a segment. But on a quarter of them writes come first: where there are always
    /// more reads than connections, memory would never have room again.
    fn start_some(&mut self) {
        while let Some(place) = self.running.iter().position(Option::is_none) {
            let writes = self.running.iter().flatten().filter(|held| held.request.kind != Kind::Read).count();
            let due = if writes < self.connections / 4 { self.writes.pop_front() } else { None };
            let next = match due.or_else(|| self.reads.pop_front()) {
                Some(held) => Some(held),
                None if writes < self.connections.div_ceil(2) => self.writes.pop_front(),
                None => None,
            };
            let Some(held) = next else { return };
            if held.since.elapsed() >= self.office.patience() {
                self.office.tell(&mut self.post, &held, Err(libc::EIO));
                continue;
            }
            match self.work_of(&held) {
                Some(work) => {
                    self.running[place] = Some(held);
                    let (bucket, timeout) = (self.bucket.clone(), self.office.timeout);
                    self.tasks.spawn(async move { News::Of(place, carry(&bucket, &work, timeout).await) });
                }
                None => self.office.tell(&mut self.post, &held, Err(libc::EIO)),
            }
        }
    }

    /// What it comes to: the first block is the header, then come extents. None: nothing that could be.
    fn work_of(&self, held: &Held) -> Option<Work> {
        let request = &held.request;
        let bytes = u64::from(request.bytes);
        let Some(at) = request.at.checked_sub(BLOCK_BYTES as u64) else {
            let head = request.kind == Kind::Read && request.at + bytes <= BLOCK_BYTES as u64;
            return head.then(|| Work::Get(self.bucket.header(), request.at, bytes));
        };
        let identity = self.office.identity.get()?;
        let (extent, inner) = (at / identity.extent_bytes, at % identity.extent_bytes);
        let path = self.bucket.object(&identity.id, u32::try_from(extent).ok()?);
        match request.kind {
            _ if inner + bytes > identity.extent_bytes => None,
            Kind::Read => Some(Work::Get(path, inner, bytes)),
            Kind::Trim => Some(Work::Delete(path)),
            // An object is what was put last, all of it.
            Kind::Write if inner != 0 => None,
            Kind::Write => {
                // SAFETY: a write's buffer stays what it is until it has ended, and has as many bytes as it says.
                let from = unsafe { std::slice::from_raw_parts(request.buffer as *const u8, bytes as usize) };
                Some(Work::Put(path, self.spare.copy(from)))
            }
        }
    }

    /// None: a task that panicked, and said so; or was ended.
    fn hear(&mut self, news: Option<News>) {
        match news {
            Some(News::Of(place, outcome)) => self.settle(place, outcome),
            Some(News::Looked(looked)) => {
                self.looking = false;
                self.judge(looked);
            }
            Some(News::Swept(Ok(()))) | None => {}
            Some(News::Swept(Err(why))) => {
                tracing::warn!("{}: what an earlier store left is not deleted: {why}", self.bucket.header());
            }
        }
    }

    fn settle(&mut self, place: usize, outcome: Outcome) {
        let mut held = self.running[place].take().expect("a request ends once");
        held.late |= outcome.late && held.request.kind != Kind::Read;
        let request = held.request;
        let result = match outcome.result {
            Ok(bytes) if request.kind == Kind::Read => {
                assert_eq!(bytes.len(), request.bytes as usize, "a read is as long as it was asked for");
                let to = request.buffer as *mut u8;
                // SAFETY: a read's buffer stays until it has ended, is as long as it says, and nobody looks into it.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
                Ok(request.bytes)
            }
            Ok(_) => Ok(request.bytes),
            Err(Some(errno)) => {
                if let Some(why @ Trouble::Refused(_)) = &outcome.why {
                    self.go_down(Some(why));
                }
                Err(errno)
            }
            Err(None) => {
                self.office.give_back(held);
                self.go_down(outcome.why.as_ref());
                return;
            }
        };
        self.office.tell(&mut self.post, &held, result);
    }

    /// The server counts as away, until it answers again.
    fn go_down(&mut self, why: Option<&Trouble>) {
        if let Some(why) = why {
            self.note(why);
        }
        if std::mem::take(&mut self.up) {
            self.known = false;
            self.look_at = Instant::now() + self.pause;
            self.office.leave();
        }
        // What has not begun has others that wait for it.
        let waiting = self.writes.drain(..).rev().chain(self.reads.drain(..).rev());
        waiting.for_each(|held| self.office.give_back(held));
    }

    fn give_all_back(&mut self) {
        for mut held in self.running.iter_mut().filter_map(Option::take) {
            held.late |= held.request.kind != Kind::Read;
            self.office.give_back(held);
        }
        self.go_down(None);
    }

    /// Asks for the header, if it is time to.
    fn look(&mut self) {
        if self.looking || !self.office.serving.load(Ordering::Relaxed) || Instant::now() < self.look_at && !self.up {
            return;
        }
        self.looking = true;
        let (bucket, timeout) = (self.bucket.clone(), self.office.timeout);
        self.tasks.spawn(async move {
            let looked = tokio::time::timeout(timeout, bucket.look()).await;
            News::Looked(looked.unwrap_or_else(|_| Err(Trouble::Broken("no answer from the server".into()))))
        });
    }

    fn judge(&mut self, looked: Result<Option<Bytes>, Trouble>) {
        let identity = self.office.identity.get();
        let stranger = match (&looked, identity) {
            (Ok(Some(head)), Some(identity)) => !backing::is_head_of(head, &identity.id),
            (Ok(None), Some(_)) => true,
            _ => false,
        };
        self.office.stranger.store(stranger, Ordering::Relaxed);
        let why = match looked {
            Ok(_) if stranger => {
                Some(Trouble::Odd("another store's header is there, or none: the pages are gone".into()))
            }
            Ok(_) => None,
            Err(why) => Some(why),
        };
        let Some(why) = why else {
            self.pause = PAUSE;
            self.known = identity.is_some();
            if !std::mem::replace(&mut self.up, true) {
                self.office.come();
            }
            if let (Some(identity), false) = (identity, std::mem::replace(&mut self.sweeping, identity.is_some())) {
                self.begin(identity.id, identity.extent_bytes as usize);
            }
            return;
        };
        self.go_down(Some(&why));
        self.look_at = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Once, when the server is known to be ours.
    fn begin(&mut self, id: crate::io::TierKey, extent_bytes: usize) {
        self.spare.fill(extent_bytes);
        let bucket = self.bucket.clone();
        self.tasks.spawn(async move { News::Swept(bucket.sweep(&id).await) });
    }

    /// Why it is not there, for whoever asks.
    fn note(&self, why: &Trouble) {
        let kind = match why {
            // The same the second time.
            Trouble::Refused(_) | Trouble::Odd(_) => ErrorKind::InvalidData,
            Trouble::Unreached(kind, _) => *kind,
            _ => ErrorKind::Other,
        };
        let failure = Failure::Io(OsError::new(kind, why.to_string()));
        *self.office.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }
}

/// Does one request: again as long as the server has no time for it, and once more on another connection if one broke.
async fn carry(bucket: &Bucket, work: &Work, timeout: Duration) -> Outcome {
    let begun = Instant::now();
    let (mut late, mut broken, mut pause) = (false, false, BUSY_PAUSE);
    loop {
        let tried = tokio::time::timeout(timeout, once(bucket, work)).await;
        let silent = tried.is_err();
        let why = match tried.unwrap_or_else(|_| Err(Trouble::Broken("no answer from the server".into()))) {
            Ok(bytes) => return Outcome { result: Ok(bytes), late, why: None },
            Err(why) => why,
        };
        late |= why.is_late();
        let end = |result, why| Outcome { result: Err(result), late, why: Some(why) };
        match &why {
            Trouble::NotThere | Trouble::Taken | Trouble::Odd(_) => return end(Some(libc::EIO), why),
            Trouble::Busy { .. } if begun.elapsed() + pause >= timeout => return end(Some(libc::EIO), why),
            Trouble::Busy { .. } => {}
            // A connection that was kept may be one that the server had closed.
            Trouble::Broken(_) | Trouble::Unreached(ErrorKind::ConnectionReset, _) if !silent && !broken => {
                broken = true;
                continue;
            }
            // Keys that are no good any more are waited for, but what was to go down has its place in memory.
            Trouble::Refused(_) if !matches!(work, Work::Get(..)) => return end(Some(libc::EIO), why),
            Trouble::Broken(_) | Trouble::Unreached(..) | Trouble::Refused(_) => return end(None, why),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_BUSY_PAUSE);
    }
}

async fn once(bucket: &Bucket, work: &Work) -> Result<Bytes, Trouble> {
    match work {
        Work::Get(path, at, bytes) => bucket.get(path, *at, *bytes).await,
        Work::Put(path, bytes) => bucket.put(path, bytes.clone()).await.map(|()| Bytes::new()),
        Work::Delete(path) => bucket.delete(path).await.map(|()| Bytes::new()),
    }
}
