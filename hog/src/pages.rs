//! What each page must hold: a pure function of (seed, page index, generation).
//!
//! Most pages are pages of real programs (the corpus) with a 16-byte stamp xor-ed in, so that no
//! two (index, generation) pairs look alike and yet compress as real memory does. The rest are
//! zero, one repeated word, or random bytes. A page changes its kind from one generation to the
//! next, as the pages of programs do.
//!
//! The functions here allocate nothing after the corpus is unpacked.

use std::fmt;

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];

/// The hog must hog with its area, not with its corpus.
pub const MAX_CORPUS_BYTES: usize = 8 << 20;

const ZERO_PERCENT: u64 = 5;
const SAME_PERCENT: u64 = 2;
const RANDOM_PERCENT: u64 = 2;

const WORD_BYTES: usize = 8;
const STAMP_BYTES: usize = 2 * WORD_BYTES;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

static EMBEDDED: &[u8] = include_bytes!("../../tests/data/pages.bin.zst");

/// Pages captured from real programs (by `scripts/capture-pages`).
pub struct Corpus {
    bytes: Vec<u8>,
}

impl Corpus {
    /// The corpus inside the binary.
    pub fn embedded() -> Corpus {
        Corpus::from_bytes(EMBEDDED).expect("the embedded corpus was checked by a test")
    }

    /// From raw pages or a zstd frame of them.
    pub fn from_bytes(file: &[u8]) -> Result<Corpus, String> {
        let bytes = if file.starts_with(&ZSTD_MAGIC) { unpack(file)? } else { file.to_vec() };
        if bytes.is_empty() || bytes.len() % PAGE_BYTES != 0 {
            return Err(format!("a corpus is whole pages of {PAGE_BYTES} bytes; this one has {} bytes", bytes.len()));
        }
        if bytes.len() > MAX_CORPUS_BYTES {
            return Err(format!("a corpus has at most {MAX_CORPUS_BYTES} bytes; this one has {}", bytes.len()));
        }
        Ok(Corpus { bytes })
    }

    /// How many pages it holds; at least one.
    pub fn pages(&self) -> usize {
        self.bytes.len() / PAGE_BYTES
    }

    /// All pages, one after the other.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// One page as captured.
    pub fn page(&self, number: usize) -> &[u8] {
        &self.bytes[number * PAGE_BYTES..][..PAGE_BYTES]
    }
}

fn unpack(file: &[u8]) -> Result<Vec<u8>, String> {
    // One page more than allowed, so that a corpus too large says so rather than failing in zstd.
    let mut bytes = vec![0; MAX_CORPUS_BYTES + PAGE_BYTES];
    let len = zstd_safe::decompress(&mut bytes[..], file)
        .map_err(|code| format!("cannot unpack the corpus: {}", zstd_safe::get_error_name(code)))?;
    bytes.truncate(len);
    bytes.shrink_to_fit();
    Ok(bytes)
}

/// What a page is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Zeros.
    Zero,
    /// One word, repeated.
    Same(u64),
    /// Bytes that no codec shrinks, drawn from this seed.
    Random(u64),
    /// A corpus page with `stamp` xor-ed in at byte `at`.
    Real {
        /// The page of the corpus.
        number: usize,
        /// Where the stamp stands; a multiple of 8.
        at: usize,
        /// Index and generation, so that a misplaced or stale page shows.
        stamp: u128,
    },
}

/// A page that does not hold what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The first wrong byte.
    pub at: usize,
    /// What it holds.
    pub holds: u8,
    /// What it should hold.
    pub expected: u8,
    /// How many bytes of the page are wrong.
    pub wrong_bytes: usize,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { at, holds, expected, wrong_bytes } = self;
        write!(f, "{wrong_bytes} wrong bytes, the first at byte {at}: {holds:#04x}, expected {expected:#04x}")
    }
}

/// Makes and checks the pages of one seed.
pub struct Pages {
    corpus: Corpus,
    seed: u64,
}

impl Pages {
    /// Pages of this seed over this corpus.
    pub fn new(corpus: Corpus, seed: u64) -> Pages {
        Pages { corpus, seed }
    }

    /// The corpus behind them.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// What page `index` is made of in its `generation`.
    pub fn kind(&self, index: u64, generation: u32) -> Kind {
        let draw = mix(mix(self.seed ^ mix(index)) ^ u64::from(generation));
        let detail = mix(draw);
        let percent = draw % 100;
        if percent < ZERO_PERCENT {
            Kind::Zero
        } else if percent < ZERO_PERCENT + SAME_PERCENT {
            Kind::Same(repeated_word(detail))
        } else if percent < ZERO_PERCENT + SAME_PERCENT + RANDOM_PERCENT {
            Kind::Random(detail)
        } else {
            let places = (PAGE_BYTES - STAMP_BYTES) / WORD_BYTES + 1;
            Kind::Real {
                number: (detail % self.corpus.pages() as u64) as usize,
                at: (detail >> 32) as usize % places * WORD_BYTES,
                // Never all zero, or the captured page itself would pass for a stamped one.
                stamp: u128::from(index + 1) << 64 | u128::from(generation),
            }
        }
    }

    /// Writes page `index` of `generation`.
    pub fn fill(&self, index: u64, generation: u32, page: &mut Page) {
        match self.kind(index, generation) {
            Kind::Zero => page.fill(0),
            Kind::Same(word) => {
                for chunk in page.chunks_exact_mut(WORD_BYTES) {
                    chunk.copy_from_slice(&word.to_le_bytes());
                }
            }
            Kind::Random(seed) => {
                let mut random = Random(seed);
                for chunk in page.chunks_exact_mut(WORD_BYTES) {
                    chunk.copy_from_slice(&random.draw().to_le_bytes());
                }
            }
            Kind::Real { number, at, stamp } => {
                let captured = self.corpus.page(number);
                page.copy_from_slice(captured);
                page[at..at + STAMP_BYTES].copy_from_slice(&stamped(captured, at, stamp));
            }
        }
    }

    /// Compares every byte of a page with what `index` must hold in `generation`.
    pub fn check(&self, index: u64, generation: u32, page: &Page) -> Result<(), Mismatch> {
        let good = match self.kind(index, generation) {
            Kind::Zero => words(page).all(|word| word == 0),
            Kind::Same(same) => words(page).all(|word| word == same),
            Kind::Random(seed) => {
                let mut random = Random(seed);
                words(page).all(|word| word == random.draw())
            }
            Kind::Real { number, at, stamp } => {
                let captured = self.corpus.page(number);
                let end = at + STAMP_BYTES;
                page[..at] == captured[..at]
                    && page[at..end] == stamped(captured, at, stamp)
                    && page[end..] == captured[end..]
            }
        };
        if good {
            Ok(())
        } else {
            Err(self.mismatch(index, generation, page))
        }
    }

    #[cold]
    fn mismatch(&self, index: u64, generation: u32, page: &Page) -> Mismatch {
        let mut expected = [0; PAGE_BYTES];
        self.fill(index, generation, &mut expected);
        let wrong = |at: &usize| page[*at] != expected[*at];
        // A page that was wrong and now is right changed under our eyes: report it at byte 0.
        let at = (0..PAGE_BYTES).find(wrong).unwrap_or(0);
        let wrong_bytes = (0..PAGE_BYTES).filter(wrong).count();
        Mismatch { at, holds: page[at], expected: expected[at], wrong_bytes }
    }
}

fn words(page: &Page) -> impl Iterator<Item = u64> + '_ {
    page.chunks_exact(WORD_BYTES).map(|chunk| {
        let mut word = [0; WORD_BYTES];
        word.copy_from_slice(chunk);
        u64::from_le_bytes(word)
    })
}

fn stamped(captured: &[u8], at: usize, stamp: u128) -> [u8; STAMP_BYTES] {
    let mut bytes = stamp.to_le_bytes();
    for (byte, was) in bytes.iter_mut().zip(&captured[at..at + STAMP_BYTES]) {
        *byte ^= was;
    }
    bytes
}

/// The words that fill whole pages in real programs: all ones, one byte, a small number, anything.
fn repeated_word(draw: u64) -> u64 {
    let byte = draw >> 8 & 0xff;
    match draw % 4 {
        0 => u64::MAX,
        1 => byte * 0x0101_0101_0101_0101,
        2 => byte + 1,
        _ => draw,
    }
}

/// SplitMix64: small, fast, and the same on every machine.
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        finish(self.0)
    }
}

fn mix(value: u64) -> u64 {
    finish(value.wrapping_add(0x9e37_79b9_7f4a_7c15))
}

fn finish(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_corpus_unpacks() {
        assert_eq!(Corpus::embedded().pages(), 2048);
    }

    #[test]
    fn bad_corpora_are_refused() {
        assert!(Corpus::from_bytes(&[]).is_err());
        assert!(Corpus::from_bytes(&[1; 100]).is_err());
        assert!(Corpus::from_bytes(&vec![1; MAX_CORPUS_BYTES + PAGE_BYTES]).is_err());
        assert!(Corpus::from_bytes(&[0x28, 0xb5, 0x2f, 0xfd, 9, 9, 9]).is_err());
    }

    #[test]
    fn every_page_passes_its_own_check_and_no_changed_byte_does() {
        let pages = Pages::new(Corpus::embedded(), 7);
        let mut page = [0; PAGE_BYTES];
        for index in 0..3000 {
            let generation = (index % 5) as u32;
            pages.fill(index, generation, &mut page);
            assert_eq!(pages.check(index, generation, &page), Ok(()));
            let at = (index * 37) as usize % PAGE_BYTES;
            page[at] ^= 0x10;
            let found = pages.check(index, generation, &page).unwrap_err();
            assert_eq!((found.at, found.wrong_bytes), (at, 1));
        }
    }

    #[test]
    fn stale_and_misplaced_real_pages_show() {
        let pages = Pages::new(Corpus::embedded(), 1);
        let mut page = [0; PAGE_BYTES];
        let real = |index, generation| matches!(pages.kind(index, generation), Kind::Real { .. });
        for index in (0..2000).filter(|&index| real(index, 3)) {
            pages.fill(index, 3, &mut page);
            assert!(pages.check(index, 2, &page).is_err());
            assert!(pages.check(index + 1, 3, &page).is_err());
        }
    }

    #[test]
    fn the_mix_is_as_documented() {
        let pages = Pages::new(Corpus::embedded(), 3);
        let mut counts = [0; 4];
        for index in 0..100_000 {
            counts[match pages.kind(index, 0) {
                Kind::Zero => 0,
                Kind::Same(_) => 1,
                Kind::Random(_) => 2,
                Kind::Real { .. } => 3,
            }] += 1;
        }
        assert!((4500..5500).contains(&counts[0]), "{counts:?}");
        assert!((1700..2300).contains(&counts[1]), "{counts:?}");
        assert!((1700..2300).contains(&counts[2]), "{counts:?}");
    }
}
