//! Requests of one client, through its lane (a large one through those of others beside it, `helpers`): in order, but for writes that wait for room (`parked`) and reads that
//! wait for the disk (`fetching`). What comes after those is answered before them.
//!
//! A request's data passes in slices, so a connection's memory does not depend on what is asked.
//! A simple reply has its error in front of its data: a read that fails after its first slice has
//! gone can only be told by hanging up. A structured one tells it, and where, in a chunk of its own.

use crate::export::Visit;
use crate::fetching::Fetching;
use crate::handshake::Chosen;
use crate::helpers::{self, Helpers, Pool};
use crate::parked::Parked;
use crate::proto::{
    chunk, errno, simple_reply, Chunk, Command, Context, Form, Request, EXTENDED_REQUEST_BYTES, FLAG_DF,
    FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE, MAX_PAYLOAD_BYTES, REQUEST_BYTES,
};
use crate::transport::wait_for;
use crate::wire::{Wire, SLICE_BYTES};
use crate::work::Work;
use ghostswap::{Error, Lane, PAGE_BYTES};
use rustix::event::{PollFd, PollFlags};
use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

mod reads;

/// Most extents told of a context at once: 16 KiB of reply for 28 bytes of request.
const MAX_EXTENTS: usize = 2048;
/// Most data thrown away for a request that is refused: what 32 bits can say, no more.
const MAX_SKIPPED_BYTES: u64 = u32::MAX as u64;
/// Most bytes of requests that wait, if nobody says otherwise: 64 writes of 32 KiB, some 50 reads of a page.
pub const IN_FLIGHT_BYTES: usize = 4 << 20;
/// What the store takes at once: as many pages as it may put in one group.
const RUN_BYTES: usize = 64 << 10;
/// Requests answered between two looks at what waits, while more of them are there; and of those at most with a look.
const TURN: u32 = 16;
/// Discarded in one step, some tenths of a second at most.
const DISCARD_BYTES: u64 = 16 << 30;

/// What a connection's requests are checked and answered by.
#[derive(Clone, Copy)]
struct Terms {
    volume_bytes: u64,
    read_only: bool,
    form: Form,
    contexts: [bool; 2],
}

/// Serves until the client leaves. Half of `in_flight_bytes` is for writes that wait for room, half for reads that
/// wait for the disk, so that neither keeps the other waiting. A client that leaves in order is answered all it asked
/// for; of one that just hangs up, what waits is dropped, since nothing of that was acknowledged.
pub fn serve(wire: &mut Wire, chosen: Chosen, in_flight_bytes: usize, work: &Work, pool: &Pool) -> io::Result<()> {
    wire.widen();
    let terms = Terms {
        volume_bytes: chosen.visit.0.volume.bytes(),
        read_only: chosen.visit.0.read_only,
        form: chosen.form,
        contexts: chosen.contexts,
    };
    let mut session = Session {
        wire,
        fetching: Fetching::new(&chosen.lane, in_flight_bytes / 2).map_err(io::Error::other)?,
        lane: chosen.lane,
        helpers: pool.helpers(),
        visit: chosen.visit,
        terms,
        parked: Parked::new(in_flight_bytes / 2),
        turn: 0,
        work,
    };
    while session.next_is_there()? {
        let bytes = if terms.form == Form::Extended { EXTENDED_REQUEST_BYTES } else { REQUEST_BYTES };
        let Some(request) = Request::parse(session.wire.take(bytes)?, terms.form) else {
            return hang_up(session.wire, "a request without its magic");
        };
        if request.command == Command::Disconnect {
            session.answer_all_that_wait()?;
            break;
        }
        session.answer(&request)?;
    }
    drop(session);
    wire.send()
}

struct Session<'a> {
    wire: &'a mut Wire,
    fetching: Fetching,
    /// Closed before the export is left.
    lane: Lane,
    helpers: Helpers,
    visit: Visit,
    terms: Terms,
    parked: Parked,
    turn: u32,
    work: &'a Work,
}

impl Session<'_> {
    /// Waits for the next request, and meanwhile for room and for the disk. False: the client has left.
    fn next_is_there(&mut self) -> io::Result<bool> {
        if self.turn < TURN && self.wire.there() > 0 {
            self.turn += 1;
            return Ok(true);
        }
        self.turn = 0;
        self.answer_what_can_be()?;
        self.helpers.rest();
        while !self.nothing_waits() && !self.wire.wait(self.fetching.news(), self.patience())? {
            self.answer_what_can_be()?;
        }
        let since = Instant::now();
        while self.helpers.has_lanes() && !self.wire.wait(None, helpers::IDLE_TIME)? {
            // What came may have been part of a record of TLS.
            if since.elapsed() >= helpers::IDLE_TIME {
                self.helpers.dismiss();
            }
        }
        Ok(!self.wire.at_end()?)
    }

    fn nothing_waits(&self) -> bool {
        self.parked.is_empty() && self.fetching.is_empty()
    }

    fn patience(&self) -> Duration {
        let patience = self.fetching.patience();
        if self.parked.is_empty() {
            patience
        } else {
            patience.min(Parked::NAP)
        }
    }

    /// Of those that wait, answers what can be answered now: not so many that new requests would wait long.
    fn answer_what_can_be(&mut self) -> io::Result<()> {
        for _ in 0..TURN {
            let Some((part, ended)) = self.fetching.ended(&mut self.lane) else { break };
            self.answer_part(&part, ended)?;
        }
        self.answer_parked()
    }

    /// Waits until one of those that wait may be answered, and takes nothing from the client meanwhile.
    fn let_one_end(&mut self) -> io::Result<()> {
        self.wire.send()?;
        if self.wire.is_cut()? {
            return Err(ErrorKind::ConnectionReset.into());
        }
        match self.fetching.news() {
            Some(news) => wait_for(&mut [PollFd::from_borrowed_fd(news, PollFlags::IN)], self.patience()).map(drop)?,
            None => std::thread::sleep(self.patience()),
        }
        self.answer_what_can_be()
    }

    /// Whoever leaves in order is answered first.
    fn answer_all_that_wait(&mut self) -> io::Result<()> {
        self.answer_what_can_be()?;
        while !self.nothing_waits() {
            self.let_one_end()?;
        }
        Ok(())
    }

    fn answer(&mut self, request: &Request) -> io::Result<()> {
        let terms = self.terms;
        let result = match (request.command, check(request, &terms)) {
            (Command::Read, Ok(())) if terms.form != Form::Simple => return self.read_in_chunks(request, 0),
            (Command::Read, Ok(())) => return self.read(request),
            (Command::BlockStatus, Ok(())) => return block_status(self.wire, &mut self.lane, request, &terms),
            (Command::Write, Ok(())) => match self.write(request)? {
                Some(result) => result,
                None => return Ok(()),
            },
            (_, Err(errno)) if has_payload(request, terms.form) => {
                if request.len > MAX_SKIPPED_BYTES {
                    return hang_up(self.wire, "more data than can be");
                }
                self.wire.skip(request.len as usize)?;
                Err(errno)
            }
            (_, checked) => checked.and_then(|()| without_data(&mut self.lane, request, self.work)),
        };
        self.reply(request, result)
    }

    /// All but READ and BLOCK_STATUS have no more to tell than whether it went well.
    fn reply(&mut self, request: &Request, result: Result<(), u32>) -> io::Result<()> {
        let form = self.terms.form;
        let in_chunks = match form {
            Form::Simple => false,
            Form::Structured => matches!(request.command, Command::Read | Command::BlockStatus),
            Form::Extended => true,
        };
        match result {
            Err(errno) if in_chunks => self.wire.put(&Chunk::error(request, form, errno, None)),
            Ok(()) if in_chunks => self.wire.put(&Chunk::new(request, form, true, chunk::NONE, &[], 0)),
            _ => self.wire.put(&simple_reply(result.err().unwrap_or(0), request.cookie)),
        }
    }

    /// The outer result is the connection's, the inner one the request's; `None`: it waits for room.
    fn write(&mut self, request: &Request) -> io::Result<Option<Result<(), u32>>> {
        let mut offset = request.offset;
        let mut left = request.len as usize;
        while !self.parked.is_empty() && !self.parked.has_room(left) {
            self.let_one_end()?;
        }
        while left > 0 {
            let part = match self.helpers.want_all(offset, left.min(SLICE_BYTES)) {
                true => left.min(SLICE_BYTES),
                false => portion(offset, left, self.wire.there()),
            };
            let data = self.wire.take(part)?;
            // What came first has the first claim to room.
            let tried = match (self.parked.is_empty(), is_whole_pages(offset, part as u64)) {
                (true, true) => {
                    let (helpers, lane, volume) = (&mut self.helpers, &mut self.lane, &self.visit.0.volume);
                    self.work.step(|| helpers.try_write(lane, volume, offset, data))
                }
                // The rest of a page may lie on the disk.
                (true, false) => self.lane.try_write(offset, data),
                (false, _) => Ok(0),
            };
            if tried.as_ref().is_ok_and(|done| *done < part) {
                self.helpers.no_room();
            }
            let written = match tried {
                Ok(done) if done < part && self.parked.has_room(left - done) => {
                    let mut rest = Vec::with_capacity(left - done);
                    rest.extend_from_slice(&data[done..]);
                    while rest.len() < left - done {
                        rest.extend_from_slice(self.wire.take((left - done - rest.len()).min(SLICE_BYTES))?);
                    }
                    self.parked.push(*request, offset + done as u64, rest);
                    return Ok(None);
                }
                // Too large to be put aside: the connection waits with it.
                Ok(done) => self.lane.write(offset + done as u64, &data[done..]),
                Err(error) => Err(error),
            };
            offset += part as u64;
            left -= part;
            if let Err(error) = written {
                self.wire.skip(left)?;
                return Ok(Some(Err(errno_of(&error))));
            }
        }
        Ok(Some(flush_if_asked(&mut self.lane, request)))
    }

    /// Of those that are parked, answers what can be answered now.
    fn answer_parked(&mut self) -> io::Result<()> {
        while let Some((request, ended)) = self.parked.retry(&mut self.lane) {
            if matches!(ended, Err(Error::NoSpace)) {
                self.visit.0.refused_writes.fetch_add(1, Ordering::Relaxed);
            }
            let result = ended.map_err(|error| errno_of(&error));
            let result = result.and_then(|()| flush_if_asked(&mut self.lane, &request));
            self.reply(&request, result)?;
        }
        Ok(())
    }
}

/// How much of what is `left` of a write to take at once: what is there, in whole runs, and at least one. So the buffer
/// need not hold a request's data together, and the first runs are stored while the client sends the others.
fn portion(offset: u64, left: usize, there: usize) -> usize {
    let first = RUN_BYTES - (offset % PAGE_BYTES as u64) as usize;
    let there = there.min(left).min(SLICE_BYTES);
    if left <= first || there == left {
        return left;
    }
    first + there.saturating_sub(first) / RUN_BYTES * RUN_BYTES
}

/// Tells what was answered so far, and nothing more.
fn hang_up(wire: &mut Wire, why: &str) -> io::Result<()> {
    wire.send()?;
    Err(io::Error::new(ErrorKind::InvalidData, why))
}

/// Whether data follows a request: always after a write, whose flag for that some clients leave out
/// (QEMU 10), and with extended headers after any command with the flag.
fn has_payload(request: &Request, form: Form) -> bool {
    request.command == Command::Write || form == Form::Extended && request.flags & FLAG_PAYLOAD_LEN != 0
}

/// All that can be wrong with a request before its first byte of data.
fn check(request: &Request, terms: &Terms) -> Result<(), u32> {
    let df = if terms.form == Form::Simple { 0 } else { FLAG_DF };
    let payload_len = if terms.form == Form::Extended { FLAG_PAYLOAD_LEN } else { 0 };
    let (known_flags, payload, outside, writes) = match request.command {
        Command::Read => (FLAG_FUA | df, true, errno::INVAL, false),
        Command::Write => (FLAG_FUA | payload_len, true, errno::NOSPC, true),
        Command::WriteZeroes => (FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO, false, errno::NOSPC, true),
        Command::Trim => (FLAG_FUA, false, errno::INVAL, true),
        Command::BlockStatus if terms.contexts != [false; 2] && request.len > 0 => {
            (FLAG_FUA | FLAG_REQ_ONE, false, errno::INVAL, false)
        }
        Command::BlockStatus | Command::Unknown(_) => return Err(errno::INVAL),
        Command::Flush | Command::Cache | Command::Disconnect => (FLAG_FUA, false, errno::INVAL, false),
    };
    if request.flags & !known_flags != 0 || payload && request.len > MAX_PAYLOAD_BYTES.into() {
        return Err(errno::INVAL);
    }
    if writes && terms.read_only {
        return Err(errno::PERM);
    }
    match request.offset.checked_add(request.len) {
        Some(end) if end <= terms.volume_bytes => Ok(()),
        _ => Err(outside),
    }
}

/// One chunk for each context that was agreed on.
fn block_status(wire: &mut Wire, lane: &mut Lane, request: &Request, terms: &Terms) -> io::Result<()> {
    let most = if request.flags & FLAG_REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
    let agreed = Context::ALL.into_iter().zip(terms.contexts).filter_map(|(context, agreed)| agreed.then_some(context));
    let mut told = Vec::with_capacity(Context::ALL.len());
    for context in agreed {
        match extents(lane, request, context, most) {
            Ok(extents) => told.push((context, extents)),
            Err(error) => return wire.put(&Chunk::error(request, terms.form, errno_of(&error), None)),
        }
    }
    let last = told.len();
    for (number, (context, extents)) in (1..).zip(told) {
        let context = (context as u32).to_be_bytes();
        let count = (extents.len() as u32).to_be_bytes();
        let (kind, body, each): (_, &[&[u8]], _) = match terms.form {
            Form::Extended => (chunk::BLOCK_STATUS_EXT, &[&context, &count], 16),
            _ => (chunk::BLOCK_STATUS, &[&context], 8),
        };
        wire.put(&Chunk::new(request, terms.form, number == last, kind, body, extents.len() * each))?;
        for (bytes, status) in extents {
            if terms.form == Form::Extended {
                wire.put(&bytes.to_be_bytes())?;
                wire.put(&u64::from(status).to_be_bytes())?;
            } else {
                wire.put(&(bytes as u32).to_be_bytes())?;
                wire.put(&status.to_be_bytes())?;
            }
        }
    }
    Ok(())
}

/// Lengths and what is told of them, each unlike the one before.
fn extents(lane: &mut Lane, request: &Request, context: Context, most: usize) -> Result<Vec<(u64, u32)>, Error> {
    let mut extents: Vec<(u64, u32)> = Vec::new();
    lane.kinds(request.offset, request.len, |kind, bytes| {
        let status = context.status(kind);
        let count = extents.len();
        match extents.last_mut() {
            Some(last) if last.1 == status => last.0 += bytes,
            _ if count == most => return false,
            _ => extents.push((bytes, status)),
        }
        true
    })?;
    Ok(extents)
}

fn is_whole_pages(offset: u64, len: u64) -> bool {
    (offset | len) % PAGE_BYTES as u64 == 0
}

/// A piece at a time, so that it is seen to go on.
fn discard(lane: &mut Lane, mut offset: u64, mut len: u64, work: &Work) -> Result<(), Error> {
    if !is_whole_pages(offset, len) {
        return lane.discard(offset, len);
    }
    while len > 0 {
        let piece = len.min(DISCARD_BYTES);
        work.step(|| lane.discard(offset, piece))?;
        (offset, len) = (offset + piece, len - piece);
    }
    Ok(())
}

fn without_data(lane: &mut Lane, request: &Request, work: &Work) -> Result<(), u32> {
    let len = request.len;
    match request.command {
        Command::Flush => return lane.flush().map_err(|error| errno_of(&error)),
        // All is in memory already.
        Command::Cache => return Ok(()),
        _ if len == 0 => Ok(()),
        Command::Trim => discard(lane, request.offset, len, work),
        _ => lane.write_zeroes(request.offset, len),
    }
    .map_err(|error| errno_of(&error))?;
    flush_if_asked(lane, request)
}

fn flush_if_asked(lane: &mut Lane, request: &Request) -> Result<(), u32> {
    if request.flags & FLAG_FUA == 0 {
        return Ok(());
    }
    lane.flush().map_err(|error| errno_of(&error))
}

/// Where in what was read from `from` on an error lies.
fn place_of(error: &Error, from: u64) -> u64 {
    match error {
        // The page may begin before what was asked for.
        Error::Lost { page } | Error::Corrupt { page, .. } => from.max(u64::from(*page) * PAGE_BYTES as u64),
        _ => from,
    }
}

/// The one place where the store's errors become the protocol's.
fn errno_of(error: &Error) -> u32 {
    match error {
        Error::NoSpace | Error::OverQuota { .. } => errno::NOSPC,
        Error::OutOfRange { .. } | Error::Unaligned { .. } => errno::INVAL,
        Error::TooMany { .. } => errno::NOMEM,
        // Pages that are lost or damaged, the system's refusals, and what later versions add.
        _ => errno::IO,
    }
}
