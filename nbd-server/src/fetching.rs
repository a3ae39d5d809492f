//! Reads that wait for the disk: they wait here, while the connection goes on with what came after them.
//!
//! Several are at the disk at once, through a ring of the connection's own, and each is answered when it is whole.
//! What was read of memory before a page on disk was met is kept. A page that is written while a read of it
//! waits is read as it was before or after that, as the protocol has it of requests that are under way together;
//! the lane sees to it that it is one of the two. Bounded in number and bytes; beyond that a read that needs the
//! disk waits for one of these to end. A part for which a read that is under way brings all that it needs waits for
//! that one, and finds it with the lane then.

use crate::proto::Request;
use ghostswap::{EndedRead, Fetch, Lane, Reads, Result, Taken};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Most reads at the disk for a connection.
const MAX_READS: usize = 64;
/// How often a read that the disk refuses is tried, and how long after.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(250);
/// How long to wait at most: for a ring that the kernel had no memory to take a read from.
const BEAT: Duration = Duration::from_millis(500);

/// A part of a request, as much of it as is answered at once.
pub struct Part {
    pub request: Request,
    /// Where it begins.
    pub offset: u64,
    pub data: Vec<u8>,
    done: usize,
    refused: u32,
    /// It waited for another's read, which is not to happen twice in a row.
    joined: bool,
}

impl Part {
    /// `data` is as long as the part, and its first `done` bytes are there.
    pub fn new(request: Request, offset: u64, data: Vec<u8>, done: usize) -> Part {
        Part { request, offset, data, done, refused: 0, joined: false }
    }
}

/// Of a part: what it waits for.
enum Waits {
    Disk(Fetch),
    Until(Instant),
}

pub struct Fetching {
    /// None: there is no disk.
    reads: Option<Reads>,
    fetch_bytes: usize,
    /// By the number of the read that they wait for.
    at_disk: Vec<Option<(Part, Fetch)>>,
    /// Those for which that read brings what they need.
    joined: Vec<(usize, Part)>,
    /// Those that go on: what they joined has ended, well or not.
    free: Vec<Part>,
    refused: Vec<(Part, Instant)>,
    bytes: usize,
    max_bytes: usize,
}

impl Fetching {
    pub fn new(lane: &Lane, max_bytes: usize) -> Result<Fetching> {
        let fetch_bytes = lane.fetch_bytes();
        let reads = if fetch_bytes > 0 && max_bytes > 0 { Reads::new(lane, MAX_READS)? } else { None };
        let at_disk = (0..if reads.is_some() { MAX_READS } else { 0 }).map(|_| None).collect();
        let (joined, free, refused) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Fetching { reads, fetch_bytes, at_disk, joined, free, refused, bytes: 0, max_bytes })
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether a part of so many bytes may wait beside those that do.
    pub fn has_room(&self, bytes: usize) -> bool {
        let waiting =
            || self.at_disk.iter().flatten().count() + self.joined.len() + self.free.len() + self.refused.len();
        self.reads.is_some() && self.bytes + self.cost(bytes) <= self.max_bytes && waiting() < MAX_READS
    }

    pub fn push(&mut self, part: Part, fetch: Fetch) {
        assert!(self.has_room(part.data.len()), "callers ask first");
        self.bytes += self.cost(part.data.len());
        self.wait(part, Waits::Disk(fetch));
    }

    /// What can be read once a part may be whole.
    pub fn news(&self) -> Option<BorrowedFd<'_>> {
        self.reads.as_ref().map(Reads::as_fd)
    }

    /// How long to wait for that before the next look.
    pub fn patience(&self) -> Duration {
        let now = Instant::now();
        self.refused.iter().map(|(_, until)| until.saturating_duration_since(now)).min().unwrap_or(BEAT).min(BEAT)
    }

    /// A part that waits no more, and whether its data is there. None: look again when there is news.
    pub fn ended(&mut self, lane: &mut Lane) -> Option<(Part, Result<()>)> {
        loop {
            let (mut part, waits) = self.due().or_else(|| self.fetched(lane))?;
            let waits = match waits {
                Ok(None) => advance(lane, &mut part),
                known => known,
            };
            match waits {
                Ok(Some(waits)) => self.wait(part, waits),
                ended => {
                    self.bytes -= self.cost(part.data.len());
                    return Some((part, ended.map(drop)));
                }
            }
        }
    }

    /// What is held for a part: its data, and room for what is read for it.
    fn cost(&self, bytes: usize) -> usize {
        bytes + self.fetch_bytes
    }

    fn wait(&mut self, mut part: Part, waits: Waits) {
        let reads = self.reads.as_mut().expect("what waits for the disk was read from one");
        match waits {
            Waits::Until(until) => self.refused.push((part, until)),
            Waits::Disk(fetch) => {
                if !std::mem::take(&mut part.joined) {
                    let brings = |read: &Option<(Part, Fetch)>| read.as_ref().is_some_and(|(_, it)| it.brings(&fetch));
                    if let Some(number) = self.at_disk.iter().position(brings) {
                        part.joined = true;
                        return self.joined.push((number, part));
                    }
                }
                let number = reads.start(fetch.at(), fetch.bytes());
                let number = number.expect("there are no more parts than reads may be under way");
                self.at_disk[number] = Some((part, fetch));
            }
        }
    }

    /// One that may go on, or was refused and may be tried again.
    fn due(&mut self) -> Option<(Part, Result<Option<Waits>>)> {
        if let Some(part) = self.free.pop() {
            return Some((part, Ok(None)));
        }
        let now = Instant::now();
        let which = self.refused.iter().position(|(_, until)| *until <= now)?;
        Some((self.refused.swap_remove(which).0, Ok(None)))
    }

    /// One for which the disk has answered, and what it waits for now. None within: nothing yet.
    fn fetched(&mut self, lane: &mut Lane) -> Option<(Part, Result<Option<Waits>>)> {
        let EndedRead { number, mut buffer, result } = self.reads.as_mut()?.ended()?;
        let (mut part, fetch) = self.at_disk[number].take().expect("a part waits for each read");
        while let Some(which) = self.joined.iter().position(|(at, _)| *at == number) {
            self.free.push(self.joined.swap_remove(which).1);
        }
        if let Err(source) = result {
            let error = lane.fetch_failed(&fetch, source);
            part.refused += 1;
            let again = if part.refused < TRIES { Ok(Some(Waits::Until(Instant::now() + PAUSE))) } else { Err(error) };
            return Some((part, again));
        }
        let at = part.offset + part.done as u64;
        let taken = lane.take_fetched(&fetch, &mut buffer, at, &mut part.data[part.done..]);
        let waits = taken.map(|taken| match taken {
            Taken::More(more) => Some(Waits::Disk(more)),
            Taken::Bytes(bytes) => {
                part.done += bytes;
                None
            }
        });
        Some((part, waits))
    }
}

/// As far as memory goes.
fn advance(lane: &mut Lane, part: &mut Part) -> Result<Option<Waits>> {
    let (bytes, fetch) = lane.read_or_fetch(part.offset + part.done as u64, &mut part.data[part.done..])?;
    part.done += bytes;
    Ok(fetch.map(Waits::Disk))
}
