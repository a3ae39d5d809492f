//! Requests of one client, in order, through one lane.
//!
//! A request's data passes in slices, so a connection's memory does not depend on what is asked.
//! A simple reply has its error in front of its data: a read that fails after its first slice has
//! gone can only be told by hanging up. A structured one tells it, and where, in a chunk of its own.

use crate::handshake::Chosen;
use crate::proto::{
    chunk, chunk_head, errno, error_chunk, simple_reply, Command, Context, Request, CHUNK_BYTES, FLAG_DF,
    FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE, FLAG_REQ_ONE, MAX_PAYLOAD_BYTES,
};
use crate::wire::{Wire, SLICE_BYTES};
use ghostswap::{Error, Lane, PageKind};
use std::io::{self, ErrorKind};

/// Most extents told of a context at once: 16 KiB of reply for 28 bytes of request.
const MAX_EXTENTS: usize = 2048;
/// What precedes a chunk's data or size: where it lies.
const OFFSET_BYTES: usize = 8;

/// What a connection's requests are checked and answered by.
#[derive(Clone, Copy)]
struct Terms {
    volume_bytes: u64,
    read_only: bool,
    structured: bool,
    contexts: [bool; 2],
}

/// Serves until the client leaves.
pub fn serve(wire: &mut Wire, chosen: Chosen<'_>) -> io::Result<()> {
    let terms = Terms {
        volume_bytes: chosen.export.volume.bytes(),
        read_only: chosen.export.read_only,
        structured: chosen.structured,
        contexts: chosen.contexts,
    };
    let mut lane = chosen.lane;
    while !wire.at_end()? {
        let Some(request) = Request::parse(&wire.take_array()?) else {
            wire.send()?;
            return Err(io::Error::new(ErrorKind::InvalidData, "a request without its magic"));
        };
        let checked = check(&request, &terms);
        let result = match (request.command, checked) {
            (Command::Disconnect, _) => break,
            (Command::Read, Ok(())) if terms.structured => {
                read_in_chunks(wire, &mut lane, &request)?;
                continue;
            }
            (Command::Read, Ok(())) => {
                read(wire, &mut lane, &request)?;
                continue;
            }
            (Command::BlockStatus, Ok(())) => {
                block_status(wire, &mut lane, &request, terms.contexts)?;
                continue;
            }
            (Command::Write, Ok(())) => write(wire, &mut lane, &request)?,
            (Command::Write, Err(errno)) => {
                wire.skip(request.len as usize)?;
                Err(errno)
            }
            (_, checked) => checked.and_then(|()| without_data(&mut lane, &request)),
        };
        let structured = terms.structured && matches!(request.command, Command::Read | Command::BlockStatus);
        match result {
            Err(errno) if structured => wire.put(&error_chunk(errno, request.cookie, None))?,
            _ => wire.put(&simple_reply(result.err().unwrap_or(0), request.cookie))?,
        }
    }
    wire.send()
}

/// All that can be wrong with a request before its first byte of data.
fn check(request: &Request, terms: &Terms) -> Result<(), u32> {
    let df = if terms.structured { FLAG_DF } else { 0 };
    let (known_flags, payload, outside, writes) = match request.command {
        Command::Read => (FLAG_FUA | df, true, errno::INVAL, false),
        Command::Write => (FLAG_FUA, true, errno::NOSPC, true),
        Command::WriteZeroes => (FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO, false, errno::NOSPC, true),
        Command::Trim => (FLAG_FUA, false, errno::INVAL, true),
        Command::BlockStatus if terms.contexts != [false; 2] && request.len > 0 => {
            (FLAG_FUA | FLAG_REQ_ONE, false, errno::INVAL, false)
        }
        Command::BlockStatus | Command::Unknown(_) => return Err(errno::INVAL),
        Command::Flush | Command::Cache | Command::Disconnect => (FLAG_FUA, false, errno::INVAL, false),
    };
    if request.flags & !known_flags != 0 || payload && request.len > MAX_PAYLOAD_BYTES {
        return Err(errno::INVAL);
    }
    if writes && terms.read_only {
        return Err(errno::PERM);
    }
    match request.offset.checked_add(request.len.into()) {
        Some(end) if end <= terms.volume_bytes => Ok(()),
        _ => Err(outside),
    }
}

fn read(wire: &mut Wire, lane: &mut Lane, request: &Request) -> io::Result<()> {
    let mut offset = request.offset;
    let mut left = request.len as usize;
    let mut head: &[u8] = &simple_reply(0, request.cookie);
    loop {
        let part = left.min(SLICE_BYTES);
        let filled = wire.put_filled(head, part, |data| if part == 0 { Ok(()) } else { lane.read(offset, data) })?;
        match filled {
            Ok(()) => head = &[],
            Err(error) if !head.is_empty() => {
                return wire.put(&simple_reply(errno_of(&error), request.cookie));
            }
            Err(error) => return Err(io::Error::other(format!("hanging up in the midst of a read: {error}"))),
        }
        offset += part as u64;
        left -= part;
        if left == 0 {
            return Ok(());
        }
    }
}

/// A chunk for each slice: its data, or that it is zeros where nothing is stored.
fn read_in_chunks(wire: &mut Wire, lane: &mut Lane, request: &Request) -> io::Result<()> {
    let cookie = request.cookie;
    if request.len == 0 {
        return wire.put(&chunk_head(true, chunk::NONE, cookie, 0));
    }
    // A slice is what one chunk can hold: more than the 64 KiB that DF is good for at least.
    if request.flags & FLAG_DF != 0 && request.len as usize > SLICE_BYTES {
        return wire.put(&error_chunk(errno::OVERFLOW, cookie, None));
    }
    let mut offset = request.offset;
    let mut left = request.len as usize;
    while left > 0 {
        let part = left.min(SLICE_BYTES);
        let done = part == left;
        let is_zeros = match reads_as_zeros(lane, offset, part as u64) {
            Ok(is_zeros) => is_zeros,
            Err(error) => return wire.put(&error_chunk(errno_of(&error), cookie, Some(offset))),
        };
        if is_zeros {
            wire.put(&chunk_head(done, chunk::OFFSET_HOLE, cookie, OFFSET_BYTES + 4))?;
            wire.put(&offset.to_be_bytes())?;
            wire.put(&(part as u32).to_be_bytes())?;
        } else {
            let mut head = [0; CHUNK_BYTES + OFFSET_BYTES];
            head[..CHUNK_BYTES].copy_from_slice(&chunk_head(done, chunk::OFFSET_DATA, cookie, OFFSET_BYTES + part));
            head[CHUNK_BYTES..].copy_from_slice(&offset.to_be_bytes());
            if let Err(error) = wire.put_filled(&head, part, |data| lane.read(offset, data))? {
                return wire.put(&error_chunk(errno_of(&error), cookie, Some(offset)));
            }
        }
        offset += part as u64;
        left -= part;
    }
    Ok(())
}

fn reads_as_zeros(lane: &mut Lane, offset: u64, len: u64) -> Result<bool, Error> {
    let mut zeros = true;
    lane.kinds(offset, len, |kind, _| {
        zeros &= matches!(kind, PageKind::Empty | PageKind::Zero);
        zeros
    })?;
    Ok(zeros)
}

/// One chunk for each context that was agreed on.
fn block_status(wire: &mut Wire, lane: &mut Lane, request: &Request, contexts: [bool; 2]) -> io::Result<()> {
    let most = if request.flags & FLAG_REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
    let mut chunks = Vec::new();
    for context in Context::ALL.into_iter().zip(contexts).filter_map(|(context, agreed)| agreed.then_some(context)) {
        match extents(lane, request, context, most) {
            Ok(extents) => chunks.push((context, extents)),
            Err(error) => return wire.put(&error_chunk(errno_of(&error), request.cookie, None)),
        }
    }
    let last = chunks.len();
    for (number, (context, extents)) in (1..).zip(chunks) {
        let len = 4 + extents.len() * 8;
        wire.put(&chunk_head(number == last, chunk::BLOCK_STATUS, request.cookie, len))?;
        wire.put(&(context as u32).to_be_bytes())?;
        for (bytes, status) in extents {
            wire.put(&bytes.to_be_bytes())?;
            wire.put(&status.to_be_bytes())?;
        }
    }
    Ok(())
}

/// Lengths and what is told of them, each unlike the one before.
fn extents(lane: &mut Lane, request: &Request, context: Context, most: usize) -> Result<Vec<(u32, u32)>, Error> {
    let mut extents: Vec<(u32, u32)> = Vec::new();
    lane.kinds(request.offset, request.len.into(), |kind, bytes| {
        let (bytes, status) = (bytes as u32, context.status(kind));
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

/// The outer result is the connection's, the inner one the request's.
fn write(wire: &mut Wire, lane: &mut Lane, request: &Request) -> io::Result<Result<(), u32>> {
    let mut offset = request.offset;
    let mut left = request.len as usize;
    while left > 0 {
        let part = left.min(SLICE_BYTES);
        let written = lane.write(offset, wire.take(part)?);
        offset += part as u64;
        left -= part;
        if let Err(error) = written {
            wire.skip(left)?;
            return Ok(Err(errno_of(&error)));
        }
    }
    Ok(flush_if_asked(lane, request))
}

fn without_data(lane: &mut Lane, request: &Request) -> Result<(), u32> {
    let len = u64::from(request.len);
    match request.command {
        Command::Flush => return lane.flush().map_err(|error| errno_of(&error)),
        // All is in memory already.
        Command::Cache => return Ok(()),
        _ if len == 0 => Ok(()),
        Command::Trim => lane.discard(request.offset, len),
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

/// The one place where the store's errors become the protocol's.
fn errno_of(error: &Error) -> u32 {
    match error {
        Error::NoSpace => errno::NOSPC,
        Error::OutOfRange { .. } | Error::Unaligned { .. } => errno::INVAL,
        Error::TooMany { .. } => errno::NOMEM,
        // Pages that are lost or damaged, the system's refusals, and what later versions add.
        _ => errno::IO,
    }
}
