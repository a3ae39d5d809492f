//! The NBD protocol's numbers and the layout of its messages (all big-endian). No I/O here.
//!
//! Newstyle negotiation and simple replies; see the protocol text of the NBD project.

pub const MAGIC: &[u8; 8] = b"NBDMAGIC";
pub const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags of both sides.
pub const FIXED_NEWSTYLE: u16 = 1;
pub const NO_ZEROES: u16 = 2;

pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
}

pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

pub mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN.
pub const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;

pub const MIN_BLOCK_BYTES: u32 = 512;
pub const PREFERRED_BLOCK_BYTES: u32 = 4096;
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
pub const MAX_NAME_BYTES: usize = 4096;

pub const FLAG_FUA: u16 = 1;
pub const FLAG_NO_HOLE: u16 = 2;

/// NBD's errno values, the same on every system.
pub mod errno {
    pub const IO: u32 = 5;
    pub const NOMEM: u32 = 12;
    pub const INVAL: u32 = 22;
    pub const NOSPC: u32 = 28;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    Unknown(u16),
}

#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub flags: u16,
    pub command: Command,
    /// The client's, returned as it came.
    pub cookie: [u8; 8],
    pub offset: u64,
    pub len: u32,
}

pub const REQUEST_BYTES: usize = 28;

impl Request {
    /// `None`: not a request; the stream can no longer be trusted.
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let mut at = Cursor(bytes);
        if at.u32()? != REQUEST_MAGIC {
            return None;
        }
        let flags = at.u16()?;
        let command = match at.u16()? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            other => Command::Unknown(other),
        };
        Some(Request { flags, command, cookie: at.array()?, offset: at.u64()?, len: at.u32()? })
    }
}

pub fn simple_reply(error: u32, cookie: [u8; 8]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie);
    bytes
}

pub fn option_reply(option: u32, reply: u32, len: usize) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes[8..12].copy_from_slice(&option.to_be_bytes());
    bytes[12..16].copy_from_slice(&reply.to_be_bytes());
    bytes[16..].copy_from_slice(&(len as u32).to_be_bytes());
    bytes
}

/// The export's name in the data of INFO and GO; `None`: malformed. What information the client
/// asks for is not looked at: it gets all that there is.
pub fn parse_go(data: &[u8]) -> Option<&[u8]> {
    let mut at = Cursor(data);
    let name_bytes = at.u32()? as usize;
    let name = at.bytes(name_bytes)?;
    let requests = usize::from(at.u16()?);
    (at.0.len() == requests * 2 && name.len() <= MAX_NAME_BYTES).then_some(name)
}

/// Reads from the front; every step checks the length.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
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
        assert_eq!(parse_go(b"\0\0\0\x02ab\0\0"), Some(&b"ab"[..]));
        assert_eq!(parse_go(b"\0\0\0\0\0\x01\0\x03"), Some(&b""[..]));
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
    fn a_request_needs_its_magic() {
        let mut bytes = [0; REQUEST_BYTES];
        assert!(Request::parse(&bytes).is_none());
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[7] = 4;
        bytes[27] = 9;
        let request = Request::parse(&bytes).unwrap();
        assert_eq!((request.command, request.len), (Command::Trim, 9));
    }
}
