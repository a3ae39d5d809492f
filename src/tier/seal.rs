//! How a segment looks on a disk tier: cut into blocks, each encrypted and authenticated by itself, so
//! that a record can be had by reading the one or two blocks it lies in.
//!
//! ```text
//! block n of a segment: 4080 bytes, from the segment's byte 4080 n on · 16 bytes tag
//! ```
//! AES-256-GCM under the arena's key, with the segment's sequence number (8 bytes) and the block's number
//! (4) as nonce. Every sealing of a segment has a number of its own, for as long as the arena lives, and
//! a sealed segment does not change: so no nonce ever stands for two contents. A block from elsewhere,
//! or of an earlier segment in the same place, does not open. Without encryption the tag is a 128-bit
//! checksum (XXH3) seeded with the same two numbers, which finds the same accidents and no malice.

use crate::io::BLOCK_BYTES;
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM, NONCE_LEN};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Bytes of a segment in each block.
pub(crate) const PAYLOAD: usize = BLOCK_BYTES - TAG;
const TAG: usize = 16;

/// Seals and opens blocks.
pub(crate) struct Seal {
    /// None: only checked.
    key: Option<LessSafeKey>,
}

impl Seal {
    /// `key`: 32 random bytes; None to check only.
    pub fn new(key: Option<&[u8; 32]>) -> Seal {
        let key = key.map(|k| UnboundKey::new(&AES_256_GCM, k).expect("the key has 32 bytes"));
        Seal { key: key.map(LessSafeKey::new) }
    }

    /// Makes the blocks of a segment of `out`, from its first bytes. The last is filled up with zeros.
    /// Returns the bytes of `out` that are in use.
    pub fn close(&self, plain: &[u8], sequence: u64, out: &mut [u8]) -> usize {
        let blocks = plain.len().div_ceil(PAYLOAD);
        for (n, (from, block)) in plain.chunks(PAYLOAD).zip(out.chunks_exact_mut(BLOCK_BYTES)).enumerate() {
            let (body, tag) = block.split_at_mut(PAYLOAD);
            body[..from.len()].copy_from_slice(from);
            body[from.len()..].fill(0);
            match &self.key {
                Some(key) => {
                    let made = key.seal_in_place_separate_tag(nonce(sequence, n as u32), Aad::empty(), body);
                    tag.copy_from_slice(made.expect("a block is shorter than the cipher's limit").as_ref());
                }
                None => tag.copy_from_slice(&checksum(body, sequence, n as u32)),
            }
        }
        blocks * BLOCK_BYTES
    }

    /// Opens blocks of a segment, of which the first is number `first`, and moves what was in them
    /// together at the beginning. None: one of them is not what was written there.
    pub fn open<'a>(&self, blocks: &'a mut [u8], first: u32, sequence: u64) -> Option<&'a [u8]> {
        let count = blocks.len() / BLOCK_BYTES;
        for n in 0..count {
            let block = &mut blocks[n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES];
            let number = first + n as u32;
            match &self.key {
                Some(key) => {
                    key.open_in_place(nonce(sequence, number), Aad::empty(), block).ok()?;
                }
                None if block[PAYLOAD..] != checksum(&block[..PAYLOAD], sequence, number) => return None,
                None => {}
            }
            blocks.copy_within(n * BLOCK_BYTES..n * BLOCK_BYTES + PAYLOAD, n * PAYLOAD);
        }
        Some(&blocks[..count * PAYLOAD])
    }
}

fn nonce(sequence: u64, block: u32) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&sequence.to_le_bytes());
    bytes[8..].copy_from_slice(&block.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn checksum(body: &[u8], sequence: u64, block: u32) -> [u8; TAG] {
    xxh3_128_with_seed(body, sequence.rotate_left(20) ^ u64::from(block)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(test: impl Fn(Seal)) {
        test(Seal::new(Some(&[7; 32])));
        test(Seal::new(None));
    }

    #[test]
    fn what_was_closed_opens_from_any_block_on() {
        each(|seal| {
            let plain: Vec<u8> = (0..PAYLOAD * 3 + 100).map(|i| (i * 7 % 251) as u8).collect();
            let mut out = vec![0; 5 * BLOCK_BYTES];
            assert_eq!(seal.close(&plain, 9, &mut out), 4 * BLOCK_BYTES);
            let mut blocks = out[BLOCK_BYTES..4 * BLOCK_BYTES].to_vec();
            let opened = seal.open(&mut blocks, 1, 9).unwrap();
            assert_eq!(opened[..plain.len() - PAYLOAD], plain[PAYLOAD..]);
        });
    }

    #[test]
    fn any_other_byte_place_or_time_is_found() {
        each(|seal| {
            let mut out = vec![0; 2 * BLOCK_BYTES];
            seal.close(&[5; 5000], 9, &mut out);
            for at in (0..2 * BLOCK_BYTES).step_by(97) {
                let mut blocks = out.clone();
                blocks[at] ^= 0x10;
                assert!(seal.open(&mut blocks, 0, 9).is_none(), "byte {at}");
            }
            assert!(seal.open(&mut out.clone(), 0, 10).is_none(), "of another sealing");
            let mut swapped = [&out[BLOCK_BYTES..], &out[..BLOCK_BYTES]].concat();
            assert!(seal.open(&mut swapped, 0, 9).is_none(), "blocks exchanged");
        });
        let mut out = vec![0; BLOCK_BYTES];
        Seal::new(Some(&[7; 32])).close(&[b's'; 4000], 1, &mut out);
        assert!(!out.windows(8).any(|w| w == [b's'; 8]), "it can be read");
    }
}
