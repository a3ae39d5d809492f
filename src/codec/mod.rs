//! What a page looks like when stored: same-filled, compressed, or raw. Knows nothing of segments.

mod dictionary;
mod lz4;
mod zstd;

use crate::config::CodecChoice;
use crate::page::PAGE_BYTES;

pub(crate) use dictionary::{train, Dictionary, LEAST_BYTES, MOST_BYTES, TRAINING_BYTES};
pub(crate) use zstd::Decoder;

/// Payload is the bytes themselves.
pub const RAW: u8 = 0;
/// Payload is an lz4 block.
pub const LZ4: u8 = 1;
/// Payload is a zstd frame.
pub const ZSTD: u8 = 2;
/// Payload is an 8-byte pattern that fills the page.
pub const FILL: u8 = 3;

/// Bytes by which compressing a page must shorten it to be worth the decompression.
const LEAST_GAIN: usize = 256;

/// Most pages compressed together.
const MOST_PAGES: usize = 16;

/// Longest payload that counts as compressed.
pub(crate) fn most_payload(plain: usize) -> usize {
    plain - LEAST_GAIN
}

/// The 8-byte pattern that fills the page, if one does.
pub(crate) fn same_filled(page: &[u8]) -> Option<u64> {
    let word = |i: usize| u64::from_le_bytes(page[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
    let first = word(0);
    if word(PAGE_BYTES / 8 - 1) != first || word(PAGE_BYTES / 16) != first {
        return None;
    }
    // A page equals itself shifted by 8 bytes exactly if one pattern fills it: one memcmp.
    (page[8..] == page[..PAGE_BYTES - 8]).then_some(first)
}

/// Fills a page with a pattern.
pub(crate) fn fill(pattern: u64, page: &mut [u8]) {
    page.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&pattern.to_le_bytes()));
}

enum Compressor {
    Lz4(lz4::Lz4),
    Zstd(zstd::Zstd),
}

/// Compression and decompression with all the memory they need, owned by one thread.
pub(crate) struct Codec {
    compressor: Compressor,
    /// Only where zstd is in use: it is a hundred KiB.
    decoder: Option<Decoder>,
}

impl Codec {
    /// `seen` has a bit for each codec whose payloads may come to be decompressed.
    pub fn new(choice: CodecChoice, seen: u64) -> Codec {
        let compressor = match choice {
            CodecChoice::Lz4 => Compressor::Lz4(lz4::Lz4::new()),
            CodecChoice::Zstd(level) => Compressor::Zstd(zstd::Zstd::new(level)),
        };
        let decoder = ((seen | choice.bit()) >> ZSTD & 1 == 1).then(Decoder::new);
        let mut codec = Codec { compressor, decoder };
        // A model makes thousands of these, and waits for no page fault.
        if cfg!(not(loom)) {
            codec.warm_up();
        }
        codec
    }

    /// Goes through everything once, so that no request is the first to touch any of its memory.
    fn warm_up(&mut self) {
        let src: Vec<u8> = (0..MOST_PAGES * PAGE_BYTES).map(|i| (i * i / 64) as u8).collect();
        let mut packed = vec![0; src.len()];
        let mut plain = vec![0; src.len()];
        for len in [PAGE_BYTES, MOST_PAGES * PAGE_BYTES] {
            if let Some((codec, n)) = self.compress(&src[..len], &mut packed, None) {
                let same = self.decompress(codec, &packed[..n], &mut plain[..len], None);
                assert!(same, "what was compressed decompresses");
            }
        }
    }

    /// Decodes with another decoder from here on.
    pub fn exchange(&mut self, decoder: &mut Option<Decoder>) {
        std::mem::swap(&mut self.decoder, decoder);
    }

    /// Whether it can decode payloads of that codec.
    pub fn knows(&self, codec: u8) -> bool {
        codec != ZSTD || self.decoder.is_some()
    }

    /// Whether it can compress with that dictionary.
    pub fn takes(&self, dictionary: &Dictionary) -> bool {
        matches!(&self.compressor, Compressor::Zstd(c) if dictionary.has(c.level()))
    }

    /// Codec and length of the payload, or None if it does not fit `dst`. With a dictionary: one that it takes.
    pub fn compress(&mut self, src: &[u8], dst: &mut [u8], with: Option<&Dictionary>) -> Option<(u8, usize)> {
        match &mut self.compressor {
            Compressor::Lz4(c) => c.compress(src, dst).map(|n| (LZ4, n)),
            Compressor::Zstd(c) => c.compress(src, dst, with).map(|n| (ZSTD, n)),
        }
    }

    /// True if the payload decodes to exactly `dst.len()` bytes. `with`: what a zstd frame was made with.
    pub fn decompress(&mut self, codec: u8, payload: &[u8], dst: &mut [u8], with: Option<&Dictionary>) -> bool {
        match codec {
            RAW if payload.len() == dst.len() => dst.copy_from_slice(payload),
            LZ4 => return lz4::decompress(payload, dst),
            ZSTD => return self.decoder.as_mut().is_some_and(|d| d.decompress(payload, dst, with)),
            FILL => match payload.try_into() {
                Ok(pattern) => fill(u64::from_le_bytes(pattern), dst),
                Err(_) => return false,
            },
            _ => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_filled_pages_are_found_and_others_are_not() {
        let mut page = vec![0u8; PAGE_BYTES];
        for pattern in [0, 1, u64::MAX, 0x0102_0304_0506_0708] {
            fill(pattern, &mut page);
            assert_eq!(same_filled(&page), Some(pattern));
            for at in [0, 7, 8, 2047, 2048, 4087, 4095] {
                page[at] ^= 0x80;
                assert_eq!(same_filled(&page), None, "{at}");
                page[at] ^= 0x80;
            }
        }
    }

    #[test]
    fn every_codec_round_trips_and_refuses_damage() {
        for choice in [CodecChoice::Lz4, CodecChoice::Zstd(1), CodecChoice::Zstd(-1), CodecChoice::Zstd(9)] {
            let mut c = Codec::new(choice, 0);
            let src: Vec<u8> = (0..4 * PAGE_BYTES).map(|i| (i / 7 * 13) as u8).collect();
            for len in [PAGE_BYTES, 4 * PAGE_BYTES] {
                let (mut packed, mut plain) = (vec![0; len], vec![0; len]);
                let (codec, n) = c.compress(&src[..len], &mut packed, None).unwrap();
                assert!(c.decompress(codec, &packed[..n], &mut plain, None));
                assert_eq!(plain, &src[..len]);
                assert!(!c.decompress(codec, &packed[..n / 2], &mut plain, None));
                assert!(!c.decompress(RAW, &packed[..n], &mut plain, None));
            }
        }
    }

    /// Pages that have much in common with each other, and little in themselves: words of 40 letters, in any order.
    pub(crate) fn alike(count: usize) -> Vec<u8> {
        let mut x = 88_172_645_463_325_252u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        let words: Vec<[u8; 40]> = (0..256).map(|_| std::array::from_fn(|_| b'a' + (next() % 26) as u8)).collect();
        let mut pages = Vec::with_capacity(count * PAGE_BYTES + 40);
        while pages.len() < count * PAGE_BYTES {
            pages.extend_from_slice(&words[(next() % 256) as usize]);
        }
        pages.truncate(count * PAGE_BYTES);
        pages
    }

    #[test]
    fn with_a_dictionary_pages_are_smaller_and_come_back() {
        let pages = alike(400);
        let (known, fresh) = pages.split_at(300 * PAGE_BYTES);
        for (level, bytes) in [(1, 16 << 10), (-1, 4 << 10), (3, 64 << 10), (9, 8 << 10), (19, 64 << 10)] {
            let made = train(known, bytes, level).unwrap();
            assert!((LEAST_BYTES..=bytes).contains(&made.len()), "{}", made.len());
            let [dictionary, other] = [(); 2].map(|()| Dictionary::new(&made, &[level]).unwrap());
            assert!(dictionary.held_bytes() <= Dictionary::memory_bytes(made.len(), &[level]) + 3 * 8);
            let mut c = Codec::new(CodecChoice::Zstd(level), 0);
            assert!(c.takes(&dictionary) && !Codec::new(CodecChoice::Zstd(2), 0).takes(&dictionary));
            let (mut packed, mut plain) = (vec![0; PAGE_BYTES], vec![0; PAGE_BYTES]);
            let (mut with, mut without) = (0, 0);
            for page in fresh.chunks_exact(PAGE_BYTES) {
                // In turn, so that nothing is left of either in the other.
                for dictionary in [Some(&dictionary), None] {
                    // Nor of a page that did not fit, and broke off.
                    assert!(c.compress(page, &mut packed[..64], dictionary.xor(Some(&other))).is_none());
                    let (codec, n) = c.compress(page, &mut packed, dictionary).unwrap();
                    assert!(c.decompress(codec, &packed[..n], &mut plain, dictionary));
                    assert_eq!(plain, page);
                    *if dictionary.is_some() { &mut with } else { &mut without } += n;
                }
            }
            assert!(with < without, "level {level}: {with} with, {without} without");
        }
    }

    /// The cleaner's thread, which trains, has a stack of 64 KiB.
    #[test]
    fn training_takes_half_a_background_threads_stack() {
        let train_all = || {
            let pages = alike(60);
            for level in [-7, 1, 3, 5, 7, 12, 16, 19] {
                let made = train(&pages, 8 << 10, level).unwrap();
                let dictionary = Dictionary::new(&made, &[level]).unwrap();
                let mut packed = [0; PAGE_BYTES];
                let mut codec = Codec::new(CodecChoice::Zstd(level), 0);
                codec.compress(&pages[..PAGE_BYTES], &mut packed, Some(&dictionary)).unwrap();
            }
        };
        std::thread::Builder::new().stack_size(32 << 10).spawn(train_all).unwrap().join().unwrap();
    }

    #[test]
    fn what_is_no_dictionary_is_none() {
        assert!(Dictionary::new(&[7; 4096], &[1]).is_none());
        assert!(Dictionary::new(&[], &[1]).is_none());
        assert!(train(&alike(2), 16 << 10, 1).is_none_or(|made| made.len() <= 16 << 10));
        assert!(train(&[], 16 << 10, 1).is_none());
    }
}
