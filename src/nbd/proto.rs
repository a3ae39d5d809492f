//! The NBD protocol's numbers and the layout of its messages (all big-endian). No I/O here.
//!
//! Newstyle negotiation, simple, structured and extended replies, metadata contexts: sections of those names in
//! the NBD project's doc/proto.md.

use crate::PageKind;

pub const MAGIC: &[u8; 8] = b"NBDMAGIC";
pub const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags of both sides.
pub const FIXED_NEWSTYLE: u16 = 1;
pub const NO_ZEROES: u16 = 2;

pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = 1 << 31 | 10;
}

pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// The form of requests and replies that client and server have agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    #[default]
    Simple,
    /// Replies to READ and BLOCK_STATUS come in chunks.
    Structured,
    /// All replies do, and lengths have 64 bits.
    Extended,
}

/// What a server says of an export, as far as clients here ask.
pub mod flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// What a client may do with an export.
pub fn transmission_flags(read_only: bool, form: Form) -> u16 {
    // HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN, SEND_CACHE.
    let always = 1 | 1 << 2 | 1 << 3 | 1 << 8 | 1 << 10;
    // READ_ONLY; or SEND_TRIM, SEND_WRITE_ZEROES, SEND_FAST_ZERO.
    let writing = if read_only { 1 << 1 } else { 1 << 5 | 1 << 6 | 1 << 11 };
    // SEND_DF.
    always | writing | if form == Form::Simple { 0 } else { 1 << 7 }
}

/// A metadata context: `BLOCK_STATUS` tells extents in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// The protocol's own: bit 0 hole, bit 1 zeros.
    Allocation = 1,
    /// What pages are: [`crate::PageKind`] as a number.
    Kind = 2,
}

impl Context {
    pub const ALL: [Context; 2] = [Context::Allocation, Context::Kind];

    pub fn name(self) -> &'static str {
        match self {
            Context::Allocation => "base:allocation",
            Context::Kind => "ghostswap:kind",
        }
    }

    /// Whether a client's query names it, or (in a LIST) all of its namespace.
    fn is_meant(self, query: &[u8], listing: bool) -> bool {
        let name = self.name().as_bytes();
        query == name || listing && query.last() == Some(&b':') && name.starts_with(query)
    }

    /// What is told of pages of a kind.
    pub fn status(self, kind: PageKind) -> u32 {
        match (self, kind) {
            (Context::Allocation, PageKind::Empty) => 1 | 1 << 1,
            (Context::Allocation, PageKind::Zero) => 1 << 1,
            (Context::Allocation, PageKind::Filled | PageKind::Stored | PageKind::Lost) => 0,
            (Context::Kind, kind) => kind as u32,
        }
    }
}

pub const MIN_BLOCK_BYTES: u32 = 512;
pub const PREFERRED_BLOCK_BYTES: u32 = 4096;
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
pub const MAX_NAME_BYTES: usize = 4096;
/// How the description of an export of ours begins; what follows no other export has.
pub const DESCRIPTION: &str = "ghostswap volume ";

pub const FLAG_FUA: u16 = 1;
pub const FLAG_NO_HOLE: u16 = 2;
pub const FLAG_DF: u16 = 4;
pub const FLAG_REQ_ONE: u16 = 8;
pub const FLAG_FAST_ZERO: u16 = 16;
pub const FLAG_PAYLOAD_LEN: u16 = 32;

/// NBD's errno values, the same on every system.
pub mod errno {
    pub const PERM: u32 = 1;
    pub const IO: u32 = 5;
    pub const NOMEM: u32 = 12;
    pub const INVAL: u32 = 22;
    pub const NOSPC: u32 = 28;
    pub const OVERFLOW: u32 = 75;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    Unknown(u16),
}

#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub flags: u16,
    pub command: Command,
    /// The client's, returned as it came.
    pub cookie: [u8; 8],
    pub offset: u64,
    pub len: u64,
}

pub const REQUEST_BYTES: usize = 28;
pub const EXTENDED_REQUEST_BYTES: usize = 32;

impl Request {
    /// As a client sends it, in no other form than the short one.
    pub fn bytes(&self) -> [u8; REQUEST_BYTES] {
        let command: u16 = match self.command {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Unknown(other) => other,
        };
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie);
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&(self.len as u32).to_be_bytes());
        bytes
    }

    /// `None`: not a request; the stream can no longer be trusted.
    pub fn parse(bytes: &[u8], form: Form) -> Option<Request> {
        let extended = form == Form::Extended;
        let mut at = Cursor(bytes);
        if at.u32()? != if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC } {
            return None;
        }
        let flags = at.u16()?;
        let command = match at.u16()? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        };
        let (cookie, offset) = (at.array()?, at.u64()?);
        let len = if extended { at.u64()? } else { at.u32()?.into() };
        Some(Request { flags, command, cookie, offset, len })
    }
}

pub fn simple_reply(error: u32, cookie: [u8; 8]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie);
    bytes
}

/// Kinds of chunks of a structured reply.
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 1 << 15 | 1;
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
}

/// A chunk's head and what follows it at once; data may come behind.
pub struct Chunk {
    bytes: [u8; 64],
    len: usize,
}

impl Chunk {
    /// `done` on the last of a reply; `body` is what comes after the head, `more` how many bytes of data
    /// come after that.
    pub fn new(request: &Request, form: Form, done: bool, kind: u16, body: &[&[u8]], more: usize) -> Chunk {
        let mut chunk = Chunk { bytes: [0; 64], len: 0 };
        let payload = body.iter().map(|part| part.len()).sum::<usize>() + more;
        let extended = form == Form::Extended;
        chunk.put(&if extended { EXTENDED_REPLY_MAGIC } else { CHUNK_MAGIC }.to_be_bytes());
        chunk.put(&u16::from(done).to_be_bytes());
        chunk.put(&kind.to_be_bytes());
        chunk.put(&request.cookie);
        if extended {
            chunk.put(&request.offset.to_be_bytes());
            chunk.put(&(payload as u64).to_be_bytes());
        } else {
            chunk.put(&(payload as u32).to_be_bytes());
        }
        body.iter().for_each(|part| chunk.put(part));
        chunk
    }

    /// A whole last chunk that tells an error, of a place if there is one. No words beside it.
    pub fn error(request: &Request, form: Form, error: u32, place: Option<u64>) -> Chunk {
        let (error, place) = (error.to_be_bytes(), place.map(u64::to_be_bytes));
        match &place {
            Some(place) => Chunk::new(request, form, true, chunk::ERROR_OFFSET, &[&error, &[0; 2], place], 0),
            None => Chunk::new(request, form, true, chunk::ERROR, &[&error, &[0; 2]], 0),
        }
    }

    fn put(&mut self, part: &[u8]) {
        self.bytes[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
    }
}

impl std::ops::Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

pub fn option_reply(option: u32, reply: u32, len: usize) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes[8..12].copy_from_slice(&option.to_be_bytes());
    bytes[12..16].copy_from_slice(&reply.to_be_bytes());
    bytes[16..].copy_from_slice(&(len as u32).to_be_bytes());
    bytes
}

/// The information that an INFO or GO asks for: a list of numbers of 2 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked<'a>(&'a [u8]);

impl Asked<'_> {
    pub fn has(self, info: u16) -> bool {
        self.0.chunks_exact(2).any(|number| number == info.to_be_bytes())
    }
}

/// The export's name and what is asked of it, in the data of INFO and GO; `None`: malformed.
pub fn parse_go(data: &[u8]) -> Option<(&[u8], Asked<'_>)> {
    let mut at = Cursor(data);
    let name = at.string()?;
    let requests = usize::from(at.u16()?);
    (at.0.len() == requests * 2).then_some((name, Asked(at.0)))
}

/// The export's name and the contexts that are meant, in the data of LIST_META_CONTEXT and
/// SET_META_CONTEXT; `None`: malformed. A LIST without queries means all.
pub fn parse_contexts(data: &[u8], listing: bool) -> Option<(&[u8], [bool; 2])> {
    let mut at = Cursor(data);
    let name = at.string()?;
    let queries = at.u32()?;
    let mut meant = [listing && queries == 0; 2];
    for _ in 0..queries {
        let query = at.string()?;
        for (meant, context) in meant.iter_mut().zip(Context::ALL) {
            *meant |= context.is_meant(query, listing);
        }
    }
    at.0.is_empty().then_some((name, meant))
}

/// Reads from the front; every step checks the length.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
    }

    /// A length and so many bytes, as names are sent.
    fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()? as usize;
        self.bytes(len).filter(|text| text.len() <= MAX_NAME_BYTES)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_data_is_checked_to_the_last_byte() {
        assert_eq!(parse_go(b"\0\0\0\x02ab\0\0"), Some((&b"ab"[..], Asked(b""))));
        let (name, asked) = parse_go(b"\0\0\0\0\0\x01\0\x03").unwrap();
        assert!(name.is_empty() && asked.has(info::BLOCK_SIZE) && !asked.has(info::NAME));
        for bad in [
            &b""[..],
            b"\0\0\0",
            b"\xff\xff\xff\xffab\0\0",
            b"\0\0\0\x02ab\0",
            b"\0\0\0\x02ab\0\x01",
            b"\0\0\0\x02ab\0\0x",
        ] {
            assert_eq!(parse_go(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn contexts_are_meant_by_name_and_listed_by_namespace() {
        let query = |names: &[&str]| {
            let mut data = b"\0\0\0\x01a".to_vec();
            data.extend_from_slice(&(names.len() as u32).to_be_bytes());
            for name in names {
                data.extend_from_slice(&(name.len() as u32).to_be_bytes());
                data.extend_from_slice(name.as_bytes());
            }
            data
        };
        let meant = |names: &[&str], listing| parse_contexts(&query(names), listing).map(|(_, meant)| meant);
        assert_eq!(meant(&[], true), Some([true, true]));
        assert_eq!(meant(&[], false), Some([false, false]));
        assert_eq!(meant(&["base:"], true), Some([true, false]));
        assert_eq!(meant(&["base:"], false), Some([false, false]));
        assert_eq!(meant(&["ghostswap:kind", "x:y", ""], false), Some([false, true]));
        assert_eq!(meant(&["base:allocation", "base:allocation"], false), Some([true, false]));
        let whole = query(&["base:allocation"]);
        for cut in 0..whole.len() {
            assert_eq!(parse_contexts(&whole[..cut], false), None, "cut at {cut}");
        }
        assert_eq!(parse_contexts(&[&whole[..], b"x"].concat(), false), None);
        // More queries than could be there end with the data.
        assert_eq!(parse_contexts(b"\0\0\0\0\xff\xff\xff\xff", true), None);
    }

    #[test]
    fn a_request_needs_its_magic() {
        let mut bytes = [0; REQUEST_BYTES];
        assert!(Request::parse(&bytes, Form::Simple).is_none());
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[7] = 4;
        bytes[27] = 9;
        assert!(Request::parse(&bytes, Form::Extended).is_none());
        let request = Request::parse(&bytes, Form::Structured).unwrap();
        assert_eq!((request.command, request.len), (Command::Trim, 9));
        assert_eq!(request.bytes(), bytes);
    }
}
