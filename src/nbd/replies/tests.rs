//! Replies whole, in pieces, damaged and at random.

use super::*;
use crate::nbd::proto::{simple_reply, Chunk, Command, Form, Request};
use std::collections::BTreeMap;

/// A read of `bytes` at `at`, or something else of none.
#[derive(Clone, Default)]
struct Wish {
    at: u64,
    bytes: u32,
    announced: u32,
    data: Vec<u8>,
    errno: u32,
    ended: bool,
}

#[derive(Clone, Default)]
struct Wishes(BTreeMap<u64, Wish>);

impl Wishes {
    fn new(wishes: &[(u64, u64, u32)]) -> Wishes {
        let wish = |at, bytes| Wish { at, bytes, data: vec![0xee; bytes as usize], ..Wish::default() };
        Wishes(wishes.iter().map(|(cookie, at, bytes)| (*cookie, wish(*at, *bytes))).collect())
    }
}

impl Asked for Wishes {
    fn wants(&self, cookie: u64) -> Option<(u64, u32)> {
        self.0.get(&cookie).filter(|wish| !wish.ended).map(|wish| (wish.at, wish.bytes))
    }

    fn announce(&mut self, cookie: u64, offset: u32, bytes: u32) -> bool {
        let wish = self.0.get_mut(&cookie).unwrap();
        wish.announced = wish.announced.saturating_add(bytes);
        wish.announced <= wish.bytes && u64::from(offset) + u64::from(bytes) <= u64::from(wish.bytes)
    }

    fn data(&mut self, cookie: u64, offset: u32, bytes: &[u8]) {
        self.0.get_mut(&cookie).unwrap().data[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn zeros(&mut self, cookie: u64, offset: u32, bytes: u32) {
        self.0.get_mut(&cookie).unwrap().data[offset as usize..][..bytes as usize].fill(0);
    }

    fn failed(&mut self, cookie: u64, errno: u32) {
        self.0.get_mut(&cookie).unwrap().errno = errno;
    }

    fn ended(&mut self, cookie: u64) -> bool {
        let wish = self.0.get_mut(&cookie).unwrap();
        wish.ended = true;
        wish.errno != 0 || wish.announced == wish.bytes
    }
}

fn request(cookie: u64) -> Request {
    Request { flags: 0, command: Command::Read, cookie: cookie.to_be_bytes(), offset: 0, len: 0 }
}

fn chunk_of(cookie: u64, done: bool, kind: u16, parts: &[&[u8]]) -> Vec<u8> {
    Chunk::new(&request(cookie), Form::Structured, done, kind, parts, 0).to_vec()
}

fn data_of(cookie: u64, done: bool, at: u64, data: &[u8]) -> Vec<u8> {
    let head =
        Chunk::new(&request(cookie), Form::Structured, done, chunk::OFFSET_DATA, &[&at.to_be_bytes()], data.len());
    [&head[..], data].concat()
}

/// Two reads in chunks that go in between each other, one that fails at a place, a write.
fn conversation() -> (Wishes, Vec<u8>) {
    let hole = [&(8192u64 + 100).to_be_bytes()[..], &50u32.to_be_bytes()].concat();
    let bytes = [
        data_of(1, false, 8192, &[1; 100]),
        data_of(2, false, 0, &[2; 10]),
        chunk_of(1, false, chunk::OFFSET_HOLE, &[&hole]),
        simple_reply(0, 3u64.to_be_bytes()).to_vec(),
        data_of(1, true, 8192 + 150, &[3; 50]),
        chunk_of(2, true, chunk::ERROR, &[&5u32.to_be_bytes(), &[0, 4], b"oops"]),
        chunk_of(4, true, chunk::NONE, &[]),
        simple_reply(28, 5u64.to_be_bytes()).to_vec(),
    ];
    (Wishes::new(&[(1, 8192, 200), (2, 0, 4096), (3, 0, 0), (4, 0, 0), (5, 0, 0)]), bytes.concat())
}

#[test]
fn structured_replies_come_in_any_pieces() {
    let (wishes, bytes) = conversation();
    for piece in [1, 3, 7, 64, bytes.len()] {
        let (mut wishes, mut replies) = (wishes.clone(), Replies::new(true));
        for part in bytes.chunks(piece) {
            replies.feed(part, &mut wishes).unwrap();
        }
        let all = &wishes.0;
        assert!(all.values().all(|wish| wish.ended));
        assert!(all[&1].data == [&[1; 100][..], &[0; 50], &[3; 50]].concat());
        assert_eq!([1, 2, 3, 4, 5].map(|cookie| all[&cookie].errno), [0, 5, 0, 0, 28]);
    }
}

#[test]
fn data_may_go_straight_to_its_place() {
    let mut wishes = Wishes::new(&[(9, 0, 4096)]);
    let mut replies = Replies::new(false);
    replies.feed(&simple_reply(0, 9u64.to_be_bytes()), &mut wishes).unwrap();
    assert_eq!(replies.data_next(), Some((9, 0, 4096)));
    replies.advance(4000, &mut wishes).unwrap();
    assert_eq!(replies.data_next(), Some((9, 4000, 96)));
    replies.feed(&[7; 96], &mut wishes).unwrap();
    assert!(wishes.0[&9].ended && wishes.0[&9].data[4000..] == [7; 96]);
}

#[test]
fn what_was_not_asked_for_ends_it() {
    let rude = |structured, bytes: Vec<u8>| {
        let mut wishes = Wishes::new(&[(1, 4096, 100), (2, 0, 0)]);
        assert!(matches!(Replies::new(structured).feed(&bytes, &mut wishes), Err(Failure::Rude(_))), "{bytes:?}");
    };
    let hole = |at: u64, bytes: u32| {
        chunk_of(1, true, chunk::OFFSET_HOLE, &[&[&at.to_be_bytes()[..], &bytes.to_be_bytes()].concat()])
    };
    let head = |kind: u16, len: u32| {
        [&CHUNK_MAGIC.to_be_bytes()[..], &[0, 1], &kind.to_be_bytes(), &1u64.to_be_bytes(), &len.to_be_bytes()].concat()
    };
    for bytes in [
        b"HTTP".to_vec(),
        simple_reply(0, 7u64.to_be_bytes()).to_vec(),
        simple_reply(0, 1u64.to_be_bytes()).to_vec(),
        data_of(7, true, 4096, &[0; 100]),
        data_of(2, true, 0, &[0; 1]),
        data_of(1, true, 4095, &[0; 100]),
        data_of(1, true, 4097, &[0; 100]),
        data_of(1, true, u64::MAX, &[0; 100]),
        data_of(1, true, 4096, &[0; 99]),
        [data_of(1, false, 4096, &[0; 60]), data_of(1, true, 4096, &[0; 60])].concat(),
        hole(4096, 0),
        hole(4096, u32::MAX),
        hole(0, 100),
        chunk_of(1, false, chunk::NONE, &[]),
        chunk_of(1, true, chunk::NONE, &[]),
        chunk_of(1, true, chunk::ERROR, &[&0u32.to_be_bytes(), &[0, 0]]),
        chunk_of(1, true, chunk::ERROR, &[&5u32.to_be_bytes(), &[0, 1]]),
        head(chunk::ERROR, 1 << 30),
        head(chunk::ERROR, 5),
        head(chunk::OFFSET_DATA, 8),
        head(chunk::OFFSET_HOLE, 13),
        head(chunk::BLOCK_STATUS, 12),
        head(chunk::NONE, 1),
    ] {
        rude(true, bytes);
    }
    rude(false, data_of(1, true, 4096, &[0; 100]));
}

/// Whatever comes, it is taken or refused, and nobody is told of bytes beyond what was asked (that would panic here).
#[test]
fn random_bytes_and_damaged_replies_do_no_harm() {
    let (wishes, good) = conversation();
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..200_000 {
        let structured = next() % 4 != 0;
        let mut bytes = good.clone();
        if round % 3 == 0 {
            bytes.truncate(64);
            bytes.iter_mut().for_each(|b| *b = next() as u8);
            bytes[..4].copy_from_slice(&if structured { CHUNK_MAGIC } else { SIMPLE_REPLY_MAGIC }.to_be_bytes());
            bytes[8..16].copy_from_slice(&(next() % 6).to_be_bytes());
        } else {
            for _ in 0..1 + next() % 4 {
                let at = next() as usize % bytes.len();
                bytes[at] = if next() % 2 == 0 { next() as u8 } else { bytes[at] ^ 1 << (next() % 8) };
            }
        }
        let (mut wishes, mut replies) = (wishes.clone(), Replies::new(structured));
        let piece = 1 + next() as usize % 100;
        let _ = bytes.chunks(piece).try_for_each(|part| replies.feed(part, &mut wishes));
    }
}
