//! Reads: from memory at once, into the buffer of replies; what needs the disk waits for it (`fetching`), if it may.

use super::{errno_of, place_of, Session};
use crate::fetching::Part;
use crate::proto::{chunk, errno, simple_reply, Chunk, Form, Request, FLAG_DF};
use crate::wire::SLICE_BYTES;
use ghostswap::{Error, Fetch, Lane, PageKind};
use std::io;

/// Why a part of a read is not among the replies.
enum Unread {
    /// What is there of it, and what it needs of the disk.
    Waits(Box<(Part, Fetch)>),
    /// It needs the disk, and as many wait for that as may.
    Crowded,
    Failed(Error),
}

/// What became of a part of a read.
enum Put {
    Done,
    /// It will be answered when the disk has.
    Waits,
    Failed(Error),
}

impl Session<'_> {
    /// A simple reply's head and data must follow one another, so only what is one part can wait for the disk while
    /// others are answered; of a larger read each part is waited for.
    pub(super) fn read(&mut self, request: &Request) -> io::Result<()> {
        let len = request.len as usize;
        let mut head: &[u8] = &simple_reply(0, request.cookie);
        let mut done = 0;
        loop {
            let bytes = (len - done).min(SLICE_BYTES);
            match self.put_part(head, request, request.offset + done as u64, bytes, bytes == len)? {
                Put::Done => head = &[],
                Put::Waits => return Ok(()),
                Put::Failed(error) if !head.is_empty() => {
                    return self.wire.put(&simple_reply(errno_of(&error), request.cookie));
                }
                Put::Failed(error) => {
                    return Err(io::Error::other(format!("hanging up in the midst of a read: {error}")));
                }
            }
            done += bytes;
            if done == len {
                return Ok(());
            }
        }
    }

    /// A chunk for each part from byte `done` of the request on: its data, or that it is zeros where nothing is
    /// stored.
    pub(super) fn read_in_chunks(&mut self, request: &Request, mut done: usize) -> io::Result<()> {
        let form = self.terms.form;
        let len = request.len as usize;
        if len == 0 {
            return self.wire.put(&Chunk::new(request, form, true, chunk::NONE, &[], 0));
        }
        // A slice is what one chunk can hold: more than the 64 KiB that DF is good for at least.
        if request.flags & FLAG_DF != 0 && len > SLICE_BYTES {
            return self.wire.put(&Chunk::error(request, form, errno::OVERFLOW, None));
        }
        while done < len {
            let bytes = (len - done).min(SLICE_BYTES);
            let offset = request.offset + done as u64;
            done += bytes;
            match reads_as_zeros(&mut self.lane, offset, bytes as u64) {
                Ok(false) => {}
                Ok(true) => {
                    let (place, size) = (offset.to_be_bytes(), (bytes as u32).to_be_bytes());
                    let hole = Chunk::new(request, form, done == len, chunk::OFFSET_HOLE, &[&place, &size], 0);
                    self.wire.put(&hole)?;
                    continue;
                }
                Err(error) => return self.wire.put(&failed_chunk(request, form, offset, &error)),
            }
            match self.put_part(&data_chunk(request, form, offset, bytes), request, offset, bytes, true)? {
                Put::Done => {}
                Put::Waits => return Ok(()),
                Put::Failed(error) => return self.wire.put(&failed_chunk(request, form, offset, &error)),
            }
        }
        Ok(())
    }

    /// Puts `head` and after it a part of a read, if that need not wait for the disk; or waits for it right here,
    /// if it may not wait beside others.
    fn put_part(
        &mut self,
        head: &[u8],
        request: &Request,
        offset: u64,
        bytes: usize,
        may_wait: bool,
    ) -> io::Result<Put> {
        loop {
            let Session { wire, lane, helpers, visit, fetching, work, .. } = self;
            let put = wire.put_filled(head, bytes, |data| {
                if data.is_empty() {
                    return Ok(());
                }
                match work.step(|| helpers.read(lane, &visit.0.volume, offset, data)).map_err(Unread::Failed)? {
                    (_, None) => Ok(()),
                    (done, Some(fetch)) if may_wait && fetching.has_room(bytes) => {
                        Err(Unread::Waits(Box::new((Part::new(*request, offset, data.to_vec(), done), fetch))))
                    }
                    (_, Some(_)) if may_wait && !fetching.is_empty() => Err(Unread::Crowded),
                    (done, Some(_)) => lane.read(offset + done as u64, &mut data[done..]).map_err(Unread::Failed),
                }
            })?;
            match put {
                Ok(()) => return Ok(Put::Done),
                Err(Unread::Failed(error)) => return Ok(Put::Failed(error)),
                Err(Unread::Crowded) => self.let_one_end()?,
                Err(Unread::Waits(waits)) => {
                    let (part, fetch) = *waits;
                    self.fetching.push(part, fetch);
                    return Ok(Put::Waits);
                }
            }
        }
    }

    /// A part that waited for the disk; and what is left of its request, unless its reply is simple: then it was all.
    pub(super) fn answer_part(&mut self, part: &Part, ended: Result<(), Error>) -> io::Result<()> {
        let (request, form, offset) = (&part.request, self.terms.form, part.offset);
        match (form, ended) {
            (Form::Simple, Ok(())) => self.wire.put(&simple_reply(0, request.cookie))?,
            (Form::Simple, Err(error)) => return self.wire.put(&simple_reply(errno_of(&error), request.cookie)),
            (_, Ok(())) => self.wire.put(&data_chunk(request, form, offset, part.data.len()))?,
            (_, Err(error)) => return self.wire.put(&failed_chunk(request, form, offset, &error)),
        }
        self.wire.put(&part.data)?;
        match form {
            Form::Simple => Ok(()),
            _ => self.read_in_chunks(request, (offset - request.offset) as usize + part.data.len()),
        }
    }
}

/// The head of a part's data; the last one of its request says so.
fn data_chunk(request: &Request, form: Form, offset: u64, bytes: usize) -> Chunk {
    let last = offset + bytes as u64 == request.offset + request.len;
    Chunk::new(request, form, last, chunk::OFFSET_DATA, &[&offset.to_be_bytes()], bytes)
}

/// The end of a reply whose chunks so far hold: what lies from `offset` on could not be read.
fn failed_chunk(request: &Request, form: Form, offset: u64, error: &Error) -> Chunk {
    Chunk::error(request, form, errno_of(error), Some(place_of(error, offset)))
}

fn reads_as_zeros(lane: &mut Lane, offset: u64, len: u64) -> Result<bool, Error> {
    let mut zeros = true;
    lane.kinds(offset, len, |kind, _| {
        zeros &= matches!(kind, PageKind::Empty | PageKind::Zero);
        zeros
    })?;
    Ok(zeros)
}
