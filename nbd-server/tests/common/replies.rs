//! Reads what a server said the way a strict client would: every reply whole, bounded and of a known kind.
//! Panics where it is not. Shared with the fuzz targets.

/// Most that one reply may carry: the largest READ, in a chunk of its own.
const MAX_PAYLOAD_BYTES: u64 = (32 << 20) + 8;

struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take(&mut self, len: usize) -> &[u8] {
        assert!(len <= self.0.len(), "a reply is cut off: {len} bytes of {}", self.0.len());
        let (front, rest) = self.0.split_at(len);
        self.0 = rest;
        front
    }

    fn number(&mut self, len: usize) -> u64 {
        self.take(len).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

/// Greeting and replies to options, up to where transmission begins; what comes then is not looked at.
pub fn check_handshake(said: &[u8]) {
    let mut at = Cursor(said);
    assert_eq!(at.take(16), b"NBDMAGICIHAVEOPT");
    assert_eq!(at.number(2), 3);
    while at.0.len() >= 8 && at.0.starts_with(&0x0003_e889_0455_65a9u64.to_be_bytes()) {
        at.take(8);
        let option = at.number(4);
        let reply = at.number(4) as u32;
        let len = at.number(4) as usize;
        assert!(reply <= 4 || matches!(reply ^ 1 << 31, 1..=10), "reply {reply:#x} to option {option}");
        assert!(len <= 4200, "{len} bytes of reply to option {option}");
        at.take(len);
    }
}

/// Replies to requests, all of which were made with `chunks` (structured: 20 bytes of head, extended: 32) or
/// without. A simple reply to a READ is followed by data, which only `reads` can tell.
pub fn check_chunks(said: &[u8], extended: bool) {
    let mut at = Cursor(said);
    let mut open = None;
    while !at.0.is_empty() {
        let magic = at.number(4) as u32;
        if magic == 0x6744_6698 && !extended {
            assert!(open.is_none(), "a simple reply amid chunks");
            let errno = at.number(4);
            assert!(matches!(errno, 0 | 1 | 5 | 12 | 22 | 28 | 75 | 95), "error {errno}");
            at.take(8);
            continue;
        }
        assert_eq!(magic, if extended { 0x6e8a_278c } else { 0x668e_33ef });
        let (flags, kind, cookie) = (at.number(2), at.number(2), at.number(8));
        assert!(flags <= 1 && open.is_none_or(|open| open == cookie), "flags {flags}");
        open = (flags == 0).then_some(cookie);
        let offset = if extended { at.number(8) } else { 0 };
        let len = at.number(if extended { 8 } else { 4 });
        assert!(len <= MAX_PAYLOAD_BYTES, "{len} bytes of payload for {offset}");
        match kind {
            0 => assert_eq!((len, flags), (0, 1)),
            1 => assert!(len > 8),
            2 => assert_eq!(len, 12),
            5 => assert!(!extended && len >= 12 && len % 8 == 4),
            6 => assert!(extended && len >= 24 && len % 16 == 8),
            0x8001 => assert_eq!((len, flags), (6, 1)),
            0x8002 => assert_eq!((len, flags), (14, 1)),
            _ => panic!("a chunk of kind {kind:#x}"),
        }
        at.take(len as usize);
    }
    assert!(open.is_none(), "a reply without its last chunk");
}
