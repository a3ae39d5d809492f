//! The client's side of the negotiation, from the server's first byte to the export: fixed newstyle, no zeroes, TLS
//! and structured replies if they are wanted, one GO.
//!
//! It is done anew each time that a connection died, while pages may be waiting for it: so nothing is allocated,
//! and whatever a server sends is bounded.

use super::proto::{self, flag, info, option, reply};
use std::fmt;
use std::io::{Error as OsError, ErrorKind, Read, Write};

/// Longest name of an export that can be gone to.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest reply to an option, and most of them. Ours are far below.
const MAX_REPLY_BYTES: usize = 4096;
const MAX_REPLIES: usize = 64;
/// So much of what a server says of a refusal is passed on.
const MAX_WORDS: usize = 96;

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    pub bytes: u64,
    pub flags: u16,
    /// Of the blocks that it takes; 0 where it does not say.
    pub min_block_bytes: u32,
    pub max_payload_bytes: u32,
    /// What no other export of a ghostswap server has.
    pub identity: Option<[u8; 16]>,
}

impl Export {
    pub fn is_read_only(&self) -> bool {
        self.flags & flag::READ_ONLY != 0
    }

    pub fn can_multi_conn(&self) -> bool {
        self.flags & flag::CAN_MULTI_CONN != 0
    }
}

/// Why there is no way to an export.
#[derive(Debug)]
pub enum Failure {
    Io(OsError),
    /// What came is not NBD as it should be.
    Rude(&'static str),
    Refused {
        reply: u32,
        words: Words,
    },
    /// The name is there, but not what it stood for.
    Replaced,
}

impl From<OsError> for Failure {
    fn from(error: OsError) -> Failure {
        Failure::Io(error)
    }
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Io(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                write!(f, "no answer from the server")
            }
            Failure::Io(error) if error.kind() == ErrorKind::UnexpectedEof => write!(f, "the server hung up"),
            Failure::Io(error) => write!(f, "{error}"),
            Failure::Rude(what) => write!(f, "not a server that can be used: {what}"),
            Failure::Refused { reply: reply::ERR_TLS_REQD, .. } => {
                write!(f, "the server demands TLS")
            }
            Failure::Refused { reply: reply::ERR_UNKNOWN, .. } => write!(f, "the server has no such export"),
            Failure::Refused { reply, words } => {
                write!(f, "the server refuses (reply {:#x})", reply)?;
                match words.text() {
                    "" => Ok(()),
                    text => write!(f, ": {}", text.escape_debug()),
                }
            }
            Failure::Replaced => write!(f, "another export has this name by now: the pages are gone"),
        }
    }
}

/// The first of a server's words.
#[derive(Debug)]
pub struct Words {
    bytes: [u8; MAX_WORDS],
    len: u8,
}

impl Words {
    fn of(all: &[u8]) -> Words {
        let len = all.len().min(MAX_WORDS);
        let mut bytes = [0; MAX_WORDS];
        bytes[..len].copy_from_slice(&all[..len]);
        Words { bytes, len: len as u8 }
    }

    fn text(&self) -> &str {
        let bytes = &self.bytes[..self.len.into()];
        // A character may have been cut.
        std::str::from_utf8(bytes)
            .unwrap_or_else(|e| std::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or_default())
    }
}

/// Goes to an export. `name` has at most [`MAX_NAME_BYTES`]. Replies will be simple ones, as the kernel's driver knows
/// no others.
pub fn negotiate(stream: &mut (impl Read + Write), name: &[u8]) -> Result<Export, Failure> {
    greet(stream)?;
    go(stream, name)
}

/// The first words.
pub fn greet(stream: &mut (impl Read + Write)) -> Result<(), Failure> {
    if take::<8>(stream)? != *proto::MAGIC {
        return Err(Failure::Rude("it does not speak NBD"));
    }
    if take::<8>(stream)? != *proto::OPTION_MAGIC {
        return Err(Failure::Rude("it speaks only oldstyle NBD"));
    }
    let flags = u16::from_be_bytes(take(stream)?) & (proto::FIXED_NEWSTYLE | proto::NO_ZEROES);
    if flags & proto::FIXED_NEWSTYLE == 0 {
        return Err(Failure::Rude("it does not speak fixed newstyle NBD"));
    }
    Ok(stream.write_all(&u32::from(flags).to_be_bytes())?)
}

/// Has TLS begin: what comes next on the stream is its handshake.
pub fn start_tls(stream: &mut (impl Read + Write)) -> Result<(), Failure> {
    stream.write_all(&option_without_data(option::STARTTLS))?;
    hear(stream, option::STARTTLS).map(drop)
}

/// Asks for structured replies. False: the server does not know them.
pub fn ask_structured(stream: &mut (impl Read + Write)) -> Result<bool, Failure> {
    stream.write_all(&option_without_data(option::STRUCTURED_REPLY))?;
    match hear(stream, option::STRUCTURED_REPLY) {
        Ok(_) => Ok(true),
        Err(Failure::Refused { reply, .. }) if reply != reply::ERR_TLS_REQD => Ok(false),
        Err(failure) => Err(failure),
    }
}

/// The end of the negotiation. `name` has at most [`MAX_NAME_BYTES`].
pub fn go(stream: &mut (impl Read + Write), name: &[u8]) -> Result<Export, Failure> {
    let mut bytes = [0; 64 + MAX_NAME_BYTES];
    let asked = [info::DESCRIPTION, info::BLOCK_SIZE];
    let mut out = Out { bytes: &mut bytes, len: 0 };
    out.put(proto::OPTION_MAGIC);
    out.put(&option::GO.to_be_bytes());
    out.put(&((4 + name.len() + 2 + 2 * asked.len()) as u32).to_be_bytes());
    out.put(&(name.len() as u32).to_be_bytes());
    out.put(name);
    out.put(&(asked.len() as u16).to_be_bytes());
    asked.iter().for_each(|what| out.put(&what.to_be_bytes()));
    stream.write_all(&out.bytes[..out.len])?;
    let export = hear(stream, option::GO)?;
    if export.flags & flag::HAS_FLAGS == 0 {
        return Err(Failure::Rude("it does not say what the export is"));
    }
    Ok(export)
}

fn option_without_data(option: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(proto::OPTION_MAGIC);
    bytes[8..12].copy_from_slice(&option.to_be_bytes());
    bytes
}

/// All replies to an option, up to the last.
fn hear(stream: &mut impl Read, asked: u32) -> Result<Export, Failure> {
    let mut export = Export { bytes: 0, flags: 0, min_block_bytes: 0, max_payload_bytes: 0, identity: None };
    let mut space = [0; MAX_REPLY_BYTES];
    for _ in 0..MAX_REPLIES {
        if u64::from_be_bytes(take(stream)?) != proto::OPTION_REPLY_MAGIC {
            return Err(Failure::Rude("a reply without its magic"));
        }
        if u32::from_be_bytes(take(stream)?) != asked {
            return Err(Failure::Rude("a reply to what was not asked"));
        }
        let reply = u32::from_be_bytes(take(stream)?);
        let len = u32::from_be_bytes(take(stream)?) as usize;
        let data = space.get_mut(..len).ok_or(Failure::Rude("a reply too long"))?;
        stream.read_exact(data)?;
        match reply {
            reply::ACK => return Ok(export),
            reply::INFO if asked == option::GO => export.learn(data).ok_or(Failure::Rude("a malformed reply"))?,
            _ if reply & 1 << 31 != 0 => return Err(Failure::Refused { reply, words: Words::of(data) }),
            _ => return Err(Failure::Rude("an unknown reply")),
        }
    }
    Err(Failure::Rude("too many replies"))
}

impl Export {
    fn learn(&mut self, data: &[u8]) -> Option<()> {
        let (kind, rest) = data.split_first_chunk()?;
        match u16::from_be_bytes(*kind) {
            info::EXPORT => {
                let (bytes, flags) = rest.split_first_chunk()?;
                (self.bytes, self.flags) = (u64::from_be_bytes(*bytes), u16::from_be_bytes(flags.try_into().ok()?));
            }
            info::BLOCK_SIZE => {
                let (min, rest) = rest.split_first_chunk()?;
                let max = rest.split_first_chunk::<4>()?.1.try_into().ok()?;
                (self.min_block_bytes, self.max_payload_bytes) = (u32::from_be_bytes(*min), u32::from_be_bytes(max));
            }
            info::DESCRIPTION => {
                let identity = rest.strip_prefix(proto::DESCRIPTION.as_bytes());
                self.identity = identity
                    .and_then(|identity| identity.try_into().ok())
                    .filter(|identity: &[u8; 16]| identity.iter().all(u8::is_ascii_hexdigit));
            }
            _ => {}
        }
        Some(())
    }
}

/// Reads the first page, of an export that was just gone to.
pub fn read_page(stream: &mut (impl Read + Write), page: &mut [u8; 4096]) -> Result<(), Failure> {
    let mut request = [0; proto::REQUEST_BYTES];
    let mut out = Out { bytes: &mut request, len: 0 };
    out.put(&proto::REQUEST_MAGIC.to_be_bytes());
    // No flags, READ, cookie 0, offset 0.
    out.put(&[0; 20]);
    out.put(&(page.len() as u32).to_be_bytes());
    stream.write_all(&request)?;
    if take::<16>(stream)? != proto::simple_reply(0, [0; 8]) {
        return Err(Failure::Rude("the first page cannot be read"));
    }
    Ok(stream.read_exact(page)?)
}

fn take<const N: usize>(stream: &mut impl Read) -> Result<[u8; N], OsError> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A message that is put together.
struct Out<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl Out<'_> {
    fn put(&mut self, part: &[u8]) {
        self.bytes[self.len..][..part.len()].copy_from_slice(part);
        self.len += part.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// Says what it was told to, and keeps what it hears.
    struct Scripted(Cursor<Vec<u8>>, Vec<u8>);

    impl Read for Scripted {
        fn read(&mut self, into: &mut [u8]) -> Result<usize, OsError> {
            self.0.read(into)
        }
    }

    impl Write for Scripted {
        fn write(&mut self, from: &[u8]) -> Result<usize, OsError> {
            self.1.write(from)
        }

        fn flush(&mut self) -> Result<(), OsError> {
            Ok(())
        }
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        [&proto::option_reply(option::GO, kind, data.len())[..], data].concat()
    }

    fn hello() -> Vec<u8> {
        [&proto::MAGIC[..], proto::OPTION_MAGIC, &3u16.to_be_bytes()].concat()
    }

    fn export_info() -> Vec<u8> {
        reply(reply::INFO, &[&[0, 0][..], &(8u64 << 20).to_be_bytes(), &0x16du16.to_be_bytes()].concat())
    }

    fn whole() -> Vec<u8> {
        let sizes = [512u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
        let description = format!("{}0123456789abcdef", proto::DESCRIPTION);
        [
            hello(),
            export_info(),
            reply(reply::INFO, &[&[0, 3][..], &sizes].concat()),
            reply(reply::INFO, &[&[0, 2][..], description.as_bytes()].concat()),
            reply(reply::ACK, &[]),
        ]
        .concat()
    }

    fn talk(said: Vec<u8>) -> (Result<Export, Failure>, Vec<u8>) {
        let mut stream = Scripted(Cursor::new(said), Vec::new());
        (negotiate(&mut stream, b"swap"), stream.1)
    }

    #[test]
    fn goes_to_an_export() {
        let (export, said) = talk(whole());
        let export = export.unwrap();
        assert_eq!((export.bytes, export.flags), (8 << 20, 0x16d));
        assert_eq!((export.min_block_bytes, export.max_payload_bytes), (512, 32 << 20));
        assert_eq!(export.identity.as_ref(), Some(b"0123456789abcdef"));
        assert!(export.can_multi_conn() && !export.is_read_only());
        assert_eq!(said, b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0e\0\0\0\x04swap\0\x02\0\x02\0\x03");
    }

    #[test]
    fn what_is_wanted_beside_an_export_is_agreed_on_or_not() {
        let ask = |kind, option| {
            let mut stream = Scripted(Cursor::new(proto::option_reply(option, kind, 0).to_vec()), Vec::new());
            (ask_structured(&mut stream), stream.1)
        };
        let (agreed, said) = ask(reply::ACK, option::STRUCTURED_REPLY);
        assert!(agreed.unwrap());
        assert_eq!(said, b"IHAVEOPT\0\0\0\x08\0\0\0\0");
        assert!(!ask(reply::ERR_UNSUP, option::STRUCTURED_REPLY).0.unwrap());
        assert!(ask(reply::ERR_TLS_REQD, option::STRUCTURED_REPLY).0.is_err());
        assert!(ask(reply::INFO, option::STRUCTURED_REPLY).0.is_err());
        assert!(ask(reply::ACK, option::GO).0.is_err());
        let refused = proto::option_reply(option::STARTTLS, reply::ERR_UNSUP, 0).to_vec();
        let mut stream = Scripted(Cursor::new(refused), Vec::new());
        assert!(matches!(start_tls(&mut stream), Err(Failure::Refused { .. })));
    }

    #[test]
    fn a_server_that_stops_anywhere_has_hung_up() {
        let whole = whole();
        for cut in 0..whole.len() {
            let (result, _) = talk(whole[..cut].to_vec());
            assert!(
                matches!(&result, Err(Failure::Io(e)) if e.kind() == ErrorKind::UnexpectedEof),
                "{cut}: {result:?}"
            );
        }
    }

    #[test]
    fn what_is_damaged_is_told_apart_and_bounded() {
        let said = |parts: &[Vec<u8>]| talk(parts.concat()).0.map_err(|e| e.to_string());
        let refused = |kind, words: &[u8]| said(&[hello(), reply(kind, words)]).unwrap_err();
        assert!(refused(reply::ERR_TLS_REQD, b"").contains("TLS"));
        assert!(refused(reply::ERR_UNKNOWN, b"").contains("no such export"));
        assert!(refused(reply::ERR_POLICY, b"full\n").ends_with(": full\\n"));
        assert!(refused(reply::ERR_POLICY, &[b'a'; 4000]).len() < 300);
        assert!(refused(reply::ERR_POLICY, "é".repeat(100).as_bytes()).ends_with('é'));
        assert!(refused(reply::ERR_POLICY, b"\xff").ends_with(')'));
        assert!(refused(reply::SERVER, b"").contains("unknown reply"));
        for (parts, why) in [
            (vec![b"HTTP/1.1 400 Bad Request".to_vec()], "does not speak NBD"),
            (vec![b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec()], "oldstyle"),
            (vec![b"NBDMAGICIHAVEOPT\0\0".to_vec()], "fixed newstyle"),
            (vec![hello(), vec![0; 20]], "magic"),
            (vec![hello(), proto::option_reply(option::LIST, reply::ACK, 0).to_vec()], "not asked"),
            (vec![hello(), proto::option_reply(option::GO, reply::INFO, usize::MAX).to_vec()], "too long"),
            (vec![hello(), reply(reply::ACK, &[])], "what the export is"),
            (vec![hello(), reply(reply::INFO, &[0])], "malformed"),
            (vec![hello(), reply(reply::INFO, &[0, 0, 1])], "malformed"),
            (vec![hello(), reply(reply::INFO, &[0, 3, 1, 2, 3, 4, 5])], "malformed"),
            (vec![hello(), reply(reply::INFO, &[0, 9]).repeat(100)], "too many"),
        ] {
            let error = said(&parts).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        // Another server's words are no identity.
        for words in ["a disk", "ghostswap volume ", "ghostswap volume 0123456789abcde\n"] {
            let description = reply(reply::INFO, &[&[0, 2], words.as_bytes()].concat());
            assert_eq!(said(&[hello(), export_info(), description, reply(reply::ACK, &[])]).unwrap().identity, None);
        }
    }

    #[test]
    fn reads_the_first_page() {
        let mut page = [0; 4096];
        let good = [&proto::simple_reply(0, [0; 8])[..], &[7; 4096]].concat();
        let mut stream = Scripted(Cursor::new(good), Vec::new());
        read_page(&mut stream, &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
        let request = proto::Request::parse(&stream.1, proto::Form::Simple).unwrap();
        assert_eq!((request.command, request.offset, request.len), (proto::Command::Read, 0, 4096));
        let mut stream = Scripted(Cursor::new(proto::simple_reply(5, [0; 8]).to_vec()), Vec::new());
        assert!(matches!(read_page(&mut stream, &mut page), Err(Failure::Rude(_))));
    }
}
