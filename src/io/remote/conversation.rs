//! One connection's requests: sent in parts, several under way, answered in any order.
//!
//! A *job* is a request of somebody's; a *part* of it is what goes over the wire as one request, as large as the
//! server takes and no larger than lets a read pass soon. Reads are sent before writes, part by part. Data goes from
//! and to the requester's own buffer. Nothing is allocated after the first connection; cookies name a part and how
//! many were sent before it on any connection, so that an answer to one that is no more is not taken for another's.
#![allow(unsafe_code, reason = "data goes from and to buffers of requesters, by address")]

use super::office::Held;
use super::table::{Kind, Reply, Request};
use super::transport::Transport;
use crate::nbd::handshake::{Export, Failure};
use crate::nbd::proto::{self, Command, REQUEST_BYTES};
use crate::nbd::replies::{Asked, Replies};
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::time::{Duration, Instant};

/// Requests that a connection has at a time, and parts of them that are sent and not answered.
const JOBS: usize = 64;
const PARTS: usize = 64;
/// No part is longer: it keeps reads waiting that are to be sent behind it.
const PART_BYTES: u32 = 256 << 10;
/// What a server may say that it takes at most.
pub(super) const LEAST_PAYLOAD: u32 = 64 << 10;
/// What is read at once of replies; data that is longer goes straight to its place.
const INPUT_BYTES: usize = 32 << 10;
const STRAIGHT_BYTES: u32 = 8 << 10;
/// Where a tier says whose it is.
pub(super) const HEAD_BYTES: usize = 4096;

struct Job {
    held: Held,
    /// Bytes given to parts so far.
    next: u32,
    /// Parts under way.
    open: u32,
    /// Something of it was sent.
    begun: bool,
    errno: u32,
}

struct Part {
    job: u8,
    /// Within its job.
    offset: u32,
    bytes: u32,
    /// Of a read: how many have come, or are coming.
    filled: u32,
    number: u32,
    since: Instant,
}

struct Sending {
    head: [u8; REQUEST_BYTES],
    done: usize,
    buffer: usize,
    bytes: usize,
}

/// A job that has ended, and its result or errno.
pub(super) type Ended = (Held, Result<u32, i32>);

/// What a carrier keeps for its connections, one after another.
pub(super) struct Conversation {
    book: Book,
    reads: VecDeque<u8>,
    writes: VecDeque<u8>,
    sending: Option<Sending>,
    replies: Replies,
    input: Box<[u8]>,
    part_bytes: u32,
    can_trim: bool,
    /// When a byte last went over the wire.
    moved: Instant,
    head: Box<[u8; HEAD_BYTES]>,
}

struct Book {
    jobs: Box<[Option<Job>]>,
    parts: Box<[Option<Part>]>,
    sent: u32,
    taken: usize,
    ended: Vec<Ended>,
    head_read: Option<bool>,
}

impl Conversation {
    pub fn new() -> Conversation {
        let book = Book {
            jobs: (0..JOBS).map(|_| None).collect(),
            parts: (0..PARTS).map(|_| None).collect(),
            sent: 0,
            taken: 0,
            ended: Vec::with_capacity(JOBS),
            head_read: None,
        };
        Conversation {
            book,
            reads: VecDeque::with_capacity(JOBS),
            writes: VecDeque::with_capacity(JOBS),
            sending: None,
            replies: Replies::new(false),
            input: vec![0; INPUT_BYTES].into(),
            part_bytes: LEAST_PAYLOAD,
            can_trim: false,
            moved: Instant::now(),
            head: Box::new([0; HEAD_BYTES]),
        }
    }

    /// A new connection; all jobs were taken back before.
    pub fn begin(&mut self, export: &Export, structured: bool) {
        assert!(self.is_empty(), "jobs of another connection are left");
        let most = if export.max_payload_bytes == 0 { PART_BYTES } else { export.max_payload_bytes };
        self.part_bytes = most.min(PART_BYTES) & !(HEAD_BYTES as u32 - 1);
        self.can_trim = export.flags & proto::flag::SEND_TRIM != 0;
        self.replies = Replies::new(structured);
        self.moved = Instant::now();
        self.book.head_read = None;
    }

    pub fn is_empty(&self) -> bool {
        self.book.taken == 0
    }

    pub fn has_room(&self) -> bool {
        self.book.taken + self.book.ended.len() < JOBS
    }

    pub fn take(&mut self, held: Held) {
        if held.request.kind == Kind::Trim && !self.can_trim {
            return self.book.ended.push((held, Ok(held.request.bytes)));
        }
        if self.is_empty() {
            self.moved = Instant::now();
        }
        let free = self.book.jobs.iter().position(Option::is_none).expect("callers ask for room first");
        self.book.jobs[free] = Some(Job { held, next: 0, open: 0, begun: false, errno: 0 });
        self.book.taken += 1;
        let queue = if held.request.kind == Kind::Read { &mut self.reads } else { &mut self.writes };
        queue.push_back(free as u8);
    }

    /// Asks for the block that says whose the export is; see [`Conversation::head`].
    pub fn ask_for_head(&mut self) {
        let buffer = self.head.as_mut_ptr() as usize;
        let request = Request { kind: Kind::Read, at: 0, bytes: HEAD_BYTES as u32, buffer, reply: Reply::Connection };
        self.take(Held::new(request));
    }

    /// None: it has not come yet. None within: it cannot be read.
    pub fn head(&self) -> Option<Option<&[u8; HEAD_BYTES]>> {
        self.book.head_read.map(|read| read.then_some(&*self.head))
    }

    /// One that has ended.
    pub fn ended(&mut self) -> Option<Ended> {
        let ended = self.book.ended.pop()?;
        if ended.0.request.reply != Reply::Connection {
            return Some(ended);
        }
        self.book.head_read = Some(ended.1.is_ok());
        self.ended()
    }

    /// Takes back a job that has not ended, when the connection is given up. What of it was sent may be done yet.
    pub fn take_back(&mut self) -> Option<Held> {
        self.sending = None;
        self.book.parts.iter_mut().for_each(|part| *part = None);
        self.reads.clear();
        self.writes.clear();
        loop {
            let job = self.book.jobs.iter_mut().find_map(Option::take)?;
            self.book.taken -= 1;
            let mut held = job.held;
            held.late |= job.begun && held.request.kind != Kind::Read;
            if held.request.reply != Reply::Connection {
                return Some(held);
            }
        }
    }

    /// How long the oldest part has not been answered, and for how long nothing has moved.
    pub fn waited(&self) -> Option<(Duration, Duration)> {
        let now = Instant::now();
        let oldest = self.book.parts.iter().flatten().map(|part| part.since).min();
        let oldest = oldest.or(self.sending.as_ref().map(|_| self.moved))?;
        Some((now - oldest, now - self.moved))
    }

    /// Whether there is something to send.
    pub fn wants_to_send(&self) -> bool {
        self.sending.is_some() || (!self.reads.is_empty() || !self.writes.is_empty()) && self.book.has_free_part()
    }

    /// Sends as much as the connection takes at this moment.
    pub fn send(&mut self, to: &mut Transport) -> Result<(), Failure> {
        loop {
            if self.sending.is_none() {
                self.sending = self.next_part();
            }
            let Some(sending) = &mut self.sending else { return Ok(to.flush()?) };
            // SAFETY: a write's bytes stay until it has ended, and it has not. Nobody writes to them meanwhile.
            let body = unsafe { std::slice::from_raw_parts(sending.buffer as *const u8, sending.bytes) };
            let head_left = &sending.head[sending.done.min(REQUEST_BYTES)..];
            let body_left = &body[sending.done.saturating_sub(REQUEST_BYTES)..];
            match to.write_vectored(&[IoSlice::new(head_left), IoSlice::new(body_left)]) {
                Ok(n) => {
                    sending.done += n;
                    self.moved = Instant::now();
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
            if sending.done == REQUEST_BYTES + sending.bytes {
                self.sending = None;
            }
        }
    }

    fn next_part(&mut self) -> Option<Sending> {
        let number = self.book.parts.iter().position(Option::is_none)?;
        let queue = if self.reads.is_empty() { &mut self.writes } else { &mut self.reads };
        let job_number = *queue.front()?;
        let job = self.book.jobs[usize::from(job_number)].as_mut().expect("what is to be sent has a job");
        let request = job.held.request;
        let most = if request.kind == Kind::Trim { u32::MAX } else { self.part_bytes };
        let (offset, bytes) = (job.next, (request.bytes - job.next).min(most));
        job.next += bytes;
        job.open += 1;
        job.begun = true;
        if job.next == request.bytes {
            queue.pop_front();
        }
        self.book.sent = self.book.sent.wrapping_add(1);
        let part = Part { job: job_number, offset, bytes, filled: 0, number: self.book.sent, since: Instant::now() };
        let cookie = u64::from(part.number) << 8 | number as u64;
        self.book.parts[number] = Some(part);
        let command = match request.kind {
            Kind::Read => Command::Read,
            Kind::Write => Command::Write,
            Kind::Trim => Command::Trim,
        };
        let (flags, at) = (0, request.at + u64::from(offset));
        let head = proto::Request { flags, command, cookie: cookie.to_be_bytes(), offset: at, len: bytes.into() };
        let body = if request.kind == Kind::Write { bytes as usize } else { 0 };
        // What is not sent has an address nevertheless: slices want one.
        let buffer = if body > 0 { request.buffer + offset as usize } else { self.input.as_ptr() as usize };
        Some(Sending { head: head.bytes(), done: 0, buffer, bytes: body })
    }

    /// Takes in what has come. An error: nothing more is to be expected of this connection.
    pub fn receive(&mut self, from: &mut Transport) -> Result<(), Failure> {
        loop {
            let straight = self.replies.data_next().filter(|(_, _, left)| *left >= STRAIGHT_BYTES);
            let read = match straight {
                Some((cookie, offset, left)) => {
                    let place = self.book.place(cookie, offset, left as usize);
                    from.read(place)
                }
                None => from.read(&mut self.input),
            };
            let n = match read {
                Ok(0) => return Err(Failure::Io(ErrorKind::UnexpectedEof.into())),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            self.moved = Instant::now();
            match straight {
                Some(_) => self.replies.advance(n as u32, &mut self.book)?,
                None => self.replies.feed(&self.input[..n], &mut self.book)?,
            }
        }
    }
}

impl Book {
    fn has_free_part(&self) -> bool {
        self.parts.iter().any(Option::is_none)
    }

    fn part(&self, cookie: u64) -> Option<&Part> {
        let part = self.parts.get(usize::from(cookie as u8))?.as_ref()?;
        (u64::from(part.number) == cookie >> 8).then_some(part)
    }

    fn job_of(&self, part: &Part) -> &Job {
        self.jobs[usize::from(part.job)].as_ref().expect("a part has a job")
    }

    /// Where a read's bytes belong. They were announced.
    fn place(&mut self, cookie: u64, offset: u32, bytes: usize) -> &mut [u8] {
        let part = self.part(cookie).expect("data is of a part that was looked up");
        assert!(offset as usize + bytes <= part.bytes as usize, "data within the part");
        let request = self.job_of(part).held.request;
        assert!(request.kind == Kind::Read && (part.offset + part.bytes) <= request.bytes, "a part within its read");
        let at = request.buffer + part.offset as usize + offset as usize;
        // SAFETY: a read's buffer stays until it has ended, and is as long as it says; nobody looks into it before.
        unsafe { std::slice::from_raw_parts_mut(at as *mut u8, bytes) }
    }
}

impl Asked for Book {
    fn wants(&self, cookie: u64) -> Option<(u64, u32)> {
        let part = self.part(cookie)?;
        let request = self.job_of(part).held.request;
        let bytes = if request.kind == Kind::Read { part.bytes } else { 0 };
        Some((request.at + u64::from(part.offset), bytes))
    }

    fn announce(&mut self, cookie: u64, offset: u32, bytes: u32) -> bool {
        let part = self.parts[usize::from(cookie as u8)].as_mut().expect("data is of a part that was looked up");
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= part.bytes)
            && part.filled.checked_add(bytes).is_some_and(|filled| filled <= part.bytes);
        part.filled += if fits { bytes } else { 0 };
        fits
    }

    fn data(&mut self, cookie: u64, offset: u32, bytes: &[u8]) {
        self.place(cookie, offset, bytes.len()).copy_from_slice(bytes);
    }

    fn zeros(&mut self, cookie: u64, offset: u32, bytes: u32) {
        self.place(cookie, offset, bytes as usize).fill(0);
    }

    fn failed(&mut self, cookie: u64, errno: u32) {
        let part = self.part(cookie).expect("an error is of a part that was looked up");
        let job = part.job;
        self.jobs[usize::from(job)].as_mut().expect("a part has a job").errno = errno;
    }

    fn ended(&mut self, cookie: u64) -> bool {
        let number = usize::from(cookie as u8);
        let part = self.parts[number].take().expect("an end is of a part that was looked up");
        let job = self.jobs[usize::from(part.job)].as_mut().expect("a part has a job");
        let request = job.held.request;
        let whole = job.errno != 0 || request.kind != Kind::Read || part.filled == part.bytes;
        job.open -= 1;
        if whole && job.open == 0 && job.next == request.bytes {
            let result = if job.errno == 0 { Ok(request.bytes) } else { Err(errno_of(job.errno)) };
            self.ended.push((job.held, result));
            self.jobs[usize::from(part.job)] = None;
            self.taken -= 1;
        }
        whole
    }
}

/// NBD's numbers as the system has them; those that say nothing to a requester are EIO.
fn errno_of(nbd: u32) -> i32 {
    match nbd {
        proto::errno::NOSPC => libc::ENOSPC,
        proto::errno::PERM => libc::EPERM,
        proto::errno::INVAL => libc::EINVAL,
        _ => libc::EIO,
    }
}
