//! Writes that found no room: they wait here, while the connection goes on with what came after them.
//!
//! The protocol lets replies come in any order, and a client that waits for a page of its own must not wait
//! for the room that somebody else's write needs. Bounded in number and bytes; beyond that the connection
//! takes no more writes until one of these is done or refused. In the order they came, so none starves.

use crate::proto::Request;
use ghostswap::{Error, Lane};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Refusals are then at most 32 a second: clients that swap try again at once, and so do less harm.
const MAX_WRITES: usize = 64;

struct Write {
    request: Request,
    /// What is still to be written, and where.
    offset: u64,
    data: Vec<u8>,
    done: usize,
    since: Instant,
}

pub struct Parked {
    writes: VecDeque<Write>,
    bytes: usize,
    max_bytes: usize,
    progress: Option<Instant>,
}

impl Parked {
    /// Before another try: room comes when the cleaner has freed a segment or the host has given memory.
    pub const NAP: Duration = Duration::from_millis(4);

    pub fn new(max_bytes: usize) -> Parked {
        Parked { writes: VecDeque::new(), bytes: 0, max_bytes, progress: None }
    }

    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    pub fn has_room(&self, bytes: usize) -> bool {
        self.writes.len() < MAX_WRITES && self.bytes + bytes <= self.max_bytes
    }

    /// `data` is what is left of a write, from `offset` on.
    pub fn push(&mut self, request: Request, offset: u64, data: Vec<u8>) {
        assert!(self.has_room(data.len()), "callers ask first");
        self.bytes += data.len();
        self.writes.push_back(Write { request, offset, data, done: 0, since: Instant::now() });
    }

    /// Tries the oldest again; the request if that ended it, and how.
    pub fn retry(&mut self, lane: &mut Lane) -> Option<(Request, Result<(), Error>)> {
        let write = self.writes.front_mut()?;
        let ended = match lane.try_write(write.offset + write.done as u64, &write.data[write.done..]) {
            Err(error) => Err(error),
            Ok(done) => {
                write.done += done;
                let now = Instant::now();
                if done > 0 {
                    self.progress = Some(now);
                }
                let since = self.progress.map_or(write.since, |progress| progress.max(write.since));
                if write.done == write.data.len() {
                    Ok(())
                } else if now - since >= lane.patience() {
                    Err(Error::NoSpace)
                } else {
                    return None;
                }
            }
        };
        let write = self.writes.pop_front()?;
        self.bytes -= write.data.len();
        Some((write.request, ended))
    }
}
