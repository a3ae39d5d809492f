//! Generic netlink, as far as the nbd driver needs it: one request, its answer, from and into memory of fixed size.
//!
//! ```text
//! nlmsghdr   length u32, type u16, flags u16, sequence u32, port u32        all in the machine's byte order
//! genlmsghdr command u8, version u8, reserved u16
//! attributes each length u16, type u16, value, padded to 4; a nested one's value is attributes
//! ```

use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{
    bind, netlink, recv, sendto, socket_with, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::OwnedFd;
use std::time::Duration;

const HEADER_BYTES: usize = 20;
const MOST_BYTES: usize = 4096;
const ERROR: u16 = 2;
const REQUEST_AND_ACK: u16 = 1 | 4;
/// Type of the family that knows the others, its request, and attributes of that.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const NESTED: u16 = 1 << 15;
/// The kernel answers at once, or when another request is done.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to one family.
pub struct Family {
    socket: OwnedFd,
    number: u16,
    sequence: u32,
    answer: Box<[u8; MOST_BYTES]>,
}

/// Attributes of a request, put together.
pub struct Attributes {
    bytes: [u8; MOST_BYTES],
    len: usize,
}

impl Attributes {
    pub fn new() -> Attributes {
        Attributes { bytes: [0; MOST_BYTES], len: HEADER_BYTES }
    }

    pub fn put(&mut self, kind: u16, value: &[u8]) {
        let start = self.len;
        self.bytes[start + 4..][..value.len()].copy_from_slice(value);
        self.end(start, kind, start + 4 + value.len());
    }

    /// An attribute of which `inside` puts the value.
    pub fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Attributes)) {
        let start = self.len;
        self.len += 4;
        inside(self);
        self.end(start, kind | NESTED, self.len);
    }

    fn end(&mut self, start: usize, kind: u16, end: usize) {
        self.bytes[start..][..2].copy_from_slice(&((end - start) as u16).to_ne_bytes());
        self.bytes[start + 2..][..2].copy_from_slice(&kind.to_ne_bytes());
        self.len = end.next_multiple_of(4);
    }
}

impl Family {
    /// NotFound: the kernel has no such family.
    pub fn open(name: &str) -> Result<Family> {
        let kind = SocketType::RAW;
        let socket = socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, Some(netlink::GENERIC))?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        let mut family = Family { socket, number: CONTROL, sequence: 0, answer: Box::new([0; MOST_BYTES]) };
        let mut attributes = Attributes::new();
        attributes.put(FAMILY_NAME, &[name.as_bytes(), &[0]].concat());
        let answer = family.ask(GET_FAMILY, &mut attributes)?;
        let number = find(answer, FAMILY_ID).and_then(|id| id.try_into().ok()).ok_or(ErrorKind::InvalidData)?;
        Ok(Family { number: u16::from_ne_bytes(number), ..family })
    }

    /// Has a request carried out; the attributes of the answer, if there are any.
    pub fn ask(&mut self, command: u8, attributes: &mut Attributes) -> Result<&[u8]> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = &mut attributes.bytes[..attributes.len];
        let len = message.len() as u32;
        message[..4].copy_from_slice(&len.to_ne_bytes());
        message[4..6].copy_from_slice(&self.number.to_ne_bytes());
        message[6..8].copy_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
        message[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        message[16..18].copy_from_slice(&[command, 1]);
        let kernel = netlink::SocketAddrNetlink::new(0, 0);
        sendto(&self.socket, message, SendFlags::empty(), &kernel)?;
        let mut told = 0..0;
        loop {
            // What answers come before the acknowledgement is kept; each datagram is read behind it.
            let (_, len) = recv(&self.socket, &mut self.answer[told.end..], RecvFlags::empty())?;
            let mut at = told.end;
            let end = (at + len).min(MOST_BYTES);
            while let Some(message) = Header::of(&self.answer[at..end]) {
                let data = at + 16..at + message.len;
                at = (at + message.len.next_multiple_of(4)).min(end);
                if message.sequence != self.sequence {
                    continue;
                }
                if message.kind != ERROR {
                    told = data.start + 4..at;
                    continue;
                }
                let code = self.answer.get(data.start..data.start + 4).and_then(|code| code.try_into().ok());
                return match code.map(i32::from_ne_bytes) {
                    Some(0) => Ok(self.answer.get(told).unwrap_or_default()),
                    Some(code) => Err(Error::from_raw_os_error(-code)),
                    None => Err(ErrorKind::InvalidData.into()),
                };
            }
        }
    }
}

struct Header {
    len: usize,
    kind: u16,
    sequence: u32,
}

impl Header {
    fn of(bytes: &[u8]) -> Option<Header> {
        let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        (16..=bytes.len()).contains(&len).then_some(Header { len, kind, sequence })
    }
}

/// The value of the first attribute of a kind.
pub fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let this = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?) & !NESTED;
        let value = attributes.get(4..len)?;
        if this == kind {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_again_and_damage_is_not() {
        let mut attributes = Attributes::new();
        attributes.put(1, b"abcde");
        attributes.nest(2, |inside| {
            inside.put(3, &7u32.to_ne_bytes());
            inside.put(4, b"x");
        });
        let bytes = &attributes.bytes[HEADER_BYTES..attributes.len];
        assert_eq!(find(bytes, 1), Some(&b"abcde"[..]));
        assert_eq!(find(find(bytes, 2).unwrap(), 3), Some(&7u32.to_ne_bytes()[..]));
        assert_eq!(find(find(bytes, 2).unwrap(), 4), Some(&b"x"[..]));
        assert_eq!(find(bytes, 5), None);
        for cut in 0..bytes.len() {
            let _ = find(&bytes[..cut], 9);
        }
        // Lengths that lead nowhere.
        for len in [0u16, 1, 3, 400, u16::MAX] {
            assert_eq!(find(&[&len.to_ne_bytes()[..], &[1, 0, 0, 0]].concat(), 1), None);
        }
    }

    #[test]
    fn the_kernel_knows_its_families() {
        // Every kernel with generic netlink has this one.
        let mut family = Family::open("nlctrl").unwrap();
        assert_eq!(family.number, CONTROL);
        let mut attributes = Attributes::new();
        attributes.put(FAMILY_NAME, b"nlctrl\0");
        let answer = family.ask(GET_FAMILY, &mut attributes).unwrap();
        assert_eq!(find(answer, FAMILY_NAME), Some(&b"nlctrl\0"[..]));
        let missing = Family::open("no-such-family").err().map(|e| e.kind());
        assert_eq!(missing, Some(ErrorKind::NotFound));
    }
}
