//! What a server answers, in transmission: bytes as they come, in any pieces, to what becomes of requests.
//!
//! Simple replies, and structured ones where they were agreed on: any number of chunks for a read, of several
//! requests in between each other. All that is claimed is compared with what was asked; a server that says
//! anything else is not listened to any more.

use super::handshake::Failure;
use super::proto::{chunk, CHUNK_MAGIC, SIMPLE_REPLY_MAGIC};

/// Longest error chunk: its words are read over.
const MAX_ERROR_BYTES: u32 = 64 << 10;
/// Head of a chunk, and the longest that comes before its data.
const CHUNK_BYTES: usize = 20;
const MAX_HEAD_BYTES: usize = CHUNK_BYTES + 12;
const SIMPLE_BYTES: usize = 16;

/// Who knows what was asked.
pub trait Asked {
    /// Bytes that a read wants, 0 of anything else. None: nothing that is not answered yet has this cookie.
    fn wants(&self, cookie: u64) -> Option<(u64, u32)>;
    /// So many bytes, from byte `offset` of the request on, are about to come. False: more than were asked for.
    fn announce(&mut self, cookie: u64, offset: u32, bytes: u32) -> bool;
    /// Some of those bytes.
    fn data(&mut self, cookie: u64, offset: u32, bytes: &[u8]);
    /// Zeros instead.
    fn zeros(&mut self, cookie: u64, offset: u32, bytes: u32);
    fn failed(&mut self, cookie: u64, errno: u32);
    /// Nothing more comes of it. False: something should have.
    fn ended(&mut self, cookie: u64) -> bool;
}

/// Where in the stream it is.
#[derive(Clone, Copy)]
enum At {
    /// In a head, of which so many bytes are there and so many wanted.
    Head {
        have: usize,
        want: usize,
    },
    Data {
        cookie: u64,
        offset: u32,
        left: u32,
        last: bool,
    },
    /// Words that nobody reads.
    Words {
        cookie: u64,
        left: u32,
        last: bool,
    },
}

const START: At = At::Head { have: 0, want: 4 };

/// The state of one connection.
pub struct Replies {
    structured: bool,
    at: At,
    head: [u8; MAX_HEAD_BYTES],
}

impl Replies {
    pub fn new(structured: bool) -> Replies {
        Replies { structured, at: START, head: [0; MAX_HEAD_BYTES] }
    }

    /// Takes all of the bytes in.
    pub fn feed(&mut self, mut input: &[u8], asked: &mut impl Asked) -> Result<(), Failure> {
        while !input.is_empty() {
            match self.at {
                At::Head { have, want } => {
                    let n = input.len().min(want - have);
                    self.head[have..have + n].copy_from_slice(&input[..n]);
                    input = &input[n..];
                    self.at = At::Head { have: have + n, want };
                    if have + n == want {
                        self.on_head(want, asked)?;
                    }
                }
                At::Data { cookie, offset, left, .. } => {
                    let n = input.len().min(left as usize);
                    asked.data(cookie, offset, &input[..n]);
                    input = &input[n..];
                    self.advance(n as u32, asked)?;
                }
                At::Words { cookie, left, last } => {
                    let n = input.len().min(left as usize);
                    input = &input[n..];
                    self.at = At::Words { cookie, left: left - n as u32, last };
                    self.settle(asked)?;
                }
            }
        }
        Ok(())
    }

    /// Data is next: of which request, from which byte of it on, how many. It may be put where it belongs without
    /// [`Replies::feed`]; then [`Replies::advance`] has to be told.
    pub fn data_next(&self) -> Option<(u64, u32, u32)> {
        match self.at {
            At::Data { cookie, offset, left, .. } => Some((cookie, offset, left)),
            _ => None,
        }
    }

    pub fn advance(&mut self, bytes: u32, asked: &mut impl Asked) -> Result<(), Failure> {
        if let At::Data { offset, left, .. } = &mut self.at {
            (*offset, *left) = (*offset + bytes, *left - bytes);
        }
        self.settle(asked)
    }

    /// Looks whether what follows a head is over.
    fn settle(&mut self, asked: &mut impl Asked) -> Result<(), Failure> {
        let (cookie, last) = match self.at {
            At::Data { cookie, left: 0, last, .. } | At::Words { cookie, left: 0, last } => (cookie, last),
            _ => return Ok(()),
        };
        self.at = START;
        match !last || asked.ended(cookie) {
            true => Ok(()),
            false => Err(Failure::Rude("a reply that leaves something out")),
        }
    }

    fn on_head(&mut self, have: usize, asked: &mut impl Asked) -> Result<(), Failure> {
        let magic = self.u32_at(0);
        let more = |want: usize| At::Head { have, want };
        match (magic, have) {
            (SIMPLE_REPLY_MAGIC, 4) => self.at = more(SIMPLE_BYTES),
            (CHUNK_MAGIC, 4) if self.structured => self.at = more(CHUNK_BYTES),
            (SIMPLE_REPLY_MAGIC, _) => return self.on_simple(asked),
            (CHUNK_MAGIC, CHUNK_BYTES) => match (self.u16_at(6), self.u32_at(16)) {
                (chunk::NONE, 0) => return self.on_chunk(asked),
                (chunk::OFFSET_DATA, len) if len > 8 => self.at = more(CHUNK_BYTES + 8),
                (chunk::OFFSET_HOLE, 12) => self.at = more(CHUNK_BYTES + 12),
                (kind, 6..=MAX_ERROR_BYTES) if kind & 1 << 15 != 0 => self.at = more(CHUNK_BYTES + 6),
                _ => return Err(Failure::Rude("an unknown chunk, or one of another length")),
            },
            (CHUNK_MAGIC, _) => return self.on_chunk(asked),
            _ => return Err(Failure::Rude("a reply without its magic")),
        }
        Ok(())
    }

    fn on_simple(&mut self, asked: &mut impl Asked) -> Result<(), Failure> {
        let (errno, cookie) = (self.u32_at(4), self.u64_at(8));
        let (_, bytes) = asked.wants(cookie).ok_or(NOT_ASKED)?;
        self.at = START;
        if errno != 0 {
            asked.failed(cookie, errno);
        } else if bytes > 0 && self.structured {
            return Err(Failure::Rude("a simple reply to a read where structured ones were agreed on"));
        } else if bytes > 0 {
            announce(asked, cookie, 0, bytes)?;
            self.at = At::Data { cookie, offset: 0, left: bytes, last: true };
            return Ok(());
        }
        self.at = At::Words { cookie, left: 0, last: true };
        self.settle(asked)
    }

    fn on_chunk(&mut self, asked: &mut impl Asked) -> Result<(), Failure> {
        let (flags, kind, cookie, len) = (self.u16_at(4), self.u16_at(6), self.u64_at(8), self.u32_at(16));
        let (at, bytes) = asked.wants(cookie).ok_or(NOT_ASKED)?;
        let last = flags & 1 != 0;
        // The offset within the request.
        let offset = |from: u64| from.checked_sub(at).filter(|o| *o < u64::from(bytes)).map(|o| o as u32);
        self.at = At::Words { cookie, left: 0, last };
        match kind {
            chunk::NONE if last => {}
            chunk::NONE => return Err(Failure::Rude("a chunk of nothing that is not the last")),
            chunk::OFFSET_DATA => {
                let offset = offset(self.u64_at(CHUNK_BYTES)).ok_or(ELSEWHERE)?;
                announce(asked, cookie, offset, len - 8)?;
                self.at = At::Data { cookie, offset, left: len - 8, last };
            }
            chunk::OFFSET_HOLE => {
                let offset = offset(self.u64_at(CHUNK_BYTES)).ok_or(ELSEWHERE)?;
                let zeros = self.u32_at(CHUNK_BYTES + 8);
                announce(asked, cookie, offset, zeros)?;
                asked.zeros(cookie, offset, zeros);
            }
            _ => {
                let (errno, words) = (self.u32_at(CHUNK_BYTES), u32::from(self.u16_at(CHUNK_BYTES + 4)));
                if errno == 0 || words > len - 6 {
                    return Err(Failure::Rude("an error that is none, or whose words do not end"));
                }
                asked.failed(cookie, errno);
                self.at = At::Words { cookie, left: len - 6, last };
            }
        }
        self.settle(asked)
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.head[at..at + 2].try_into().expect("2 bytes"))
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.head[at..at + 4].try_into().expect("4 bytes"))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.head[at..at + 8].try_into().expect("8 bytes"))
    }
}

const NOT_ASKED: Failure = Failure::Rude("a reply to what was not asked");
const ELSEWHERE: Failure = Failure::Rude("data from elsewhere");

fn announce(asked: &mut impl Asked, cookie: u64, offset: u32, bytes: u32) -> Result<(), Failure> {
    match bytes > 0 && asked.announce(cookie, offset, bytes) {
        true => Ok(()),
        false => Err(Failure::Rude("more data than was asked for")),
    }
}

#[cfg(test)]
mod tests;
