//! Requests of one client, in order, through one lane.
//!
//! A request's data passes in slices, so a connection's memory does not depend on what is asked.
//! A simple reply has its error in front of its data: a read that fails after its first slice has
//! gone can only be told by hanging up.

use crate::proto::{errno, simple_reply, Command, Request, FLAG_FUA, FLAG_NO_HOLE, MAX_PAYLOAD_BYTES};
use crate::wire::{Wire, SLICE_BYTES};
use ghostswap::{Error, Lane};
use std::io::{self, ErrorKind};

/// Serves until the client leaves.
pub fn serve(wire: &mut Wire, lane: &mut Lane, volume_bytes: u64) -> io::Result<()> {
    while !wire.at_end()? {
        let Some(request) = Request::parse(&wire.take_array()?) else {
            wire.send()?;
            return Err(io::Error::new(ErrorKind::InvalidData, "a request without its magic"));
        };
        let result = match request.command {
            Command::Disconnect => break,
            Command::Read => match check(&request, volume_bytes) {
                Ok(()) => {
                    read(wire, lane, &request)?;
                    continue;
                }
                Err(errno) => Err(errno),
            },
            Command::Write => match check(&request, volume_bytes) {
                Ok(()) => write(wire, lane, &request)?,
                Err(errno) => {
                    wire.skip(request.len as usize)?;
                    Err(errno)
                }
            },
            Command::Flush | Command::Trim | Command::WriteZeroes => {
                check(&request, volume_bytes).and_then(|()| without_data(lane, &request))
            }
            Command::Unknown(_) => Err(errno::INVAL),
        };
        wire.put(&simple_reply(result.err().unwrap_or(0), request.cookie))?;
    }
    wire.send()
}

/// All that can be wrong with a request before its first byte of data.
fn check(request: &Request, volume_bytes: u64) -> Result<(), u32> {
    let (known_flags, payload, outside) = match request.command {
        Command::Read => (FLAG_FUA, true, errno::INVAL),
        Command::Write => (FLAG_FUA, true, errno::NOSPC),
        Command::WriteZeroes => (FLAG_FUA | FLAG_NO_HOLE, false, errno::NOSPC),
        _ => (FLAG_FUA, false, errno::INVAL),
    };
    if request.flags & !known_flags != 0 || payload && request.len > MAX_PAYLOAD_BYTES {
        return Err(errno::INVAL);
    }
    match request.offset.checked_add(request.len.into()) {
        Some(end) if end <= volume_bytes => Ok(()),
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
