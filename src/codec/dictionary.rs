//! A dictionary: pieces of pages, and statistics of them, that zstd may refer to besides the page at hand. So a page
//! alone compresses in two thirds of the time, and a little better. Nothing in a frame says which one it was made with:
//! whoever decodes it knows, or it decodes to something else.
//!
//! What each side needs of it is made once, in memory of our own that is all there afterwards, and only read from then
//! on, by all threads (`ZSTD_CDict`, `ZSTD_DDict` in zstd.h). Training takes some MiB and some tens of milliseconds.
#![allow(unsafe_code, reason = "the C library's interface")]

use super::zstd::{failed, touched};
use crate::page::PAGE_BYTES;
use zstd_safe::zstd_sys::{
    ZDICT_fastCover_params_t, ZDICT_isError, ZDICT_params_t, ZDICT_trainFromBuffer_fastCover, ZSTD_CDict, ZSTD_DDict,
    ZSTD_compressionParameters, ZSTD_dictContentType_e, ZSTD_dictLoadMethod_e, ZSTD_estimateCDictSize_advanced,
    ZSTD_estimateDDictSize, ZSTD_getCParams, ZSTD_initStaticCDict, ZSTD_initStaticDDict,
};

/// Most bytes of one.
pub(crate) const MOST_BYTES: usize = 64 << 10;
/// Fewer than these are none.
pub(crate) const LEAST_BYTES: usize = 256;

/// By reference: all three parts of a [`Dictionary`] live as long as it.
const LOAD: ZSTD_dictLoadMethod_e = ZSTD_dictLoadMethod_e::ZSTD_dlm_byRef;
/// With its statistics: anything else is refused.
const CONTENT: ZSTD_dictContentType_e = ZSTD_dictContentType_e::ZSTD_dct_fullDict;

/// A dictionary that is ready for use.
pub(crate) struct Dictionary {
    /// What the others refer to: neither moved nor changed.
    words: Box<[u64]>,
    bytes: usize,
    /// For each level in use.
    compress: Box<[(i32, Box<[u64]>)]>,
    decompress: Box<[u64]>,
}

impl Dictionary {
    /// Makes it ready to compress at some levels. None: these bytes are none.
    pub fn new(bytes: &[u8], levels: &[i32]) -> Option<Dictionary> {
        let mut words = touched(bytes.len());
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(whole);
        }
        let at = words.as_ptr().cast();
        let mut compress = Vec::with_capacity(levels.len());
        for level in levels {
            let parameters = parameters(*level, bytes.len());
            let mut memory = touched(compressor_bytes(*level, bytes.len()));
            let (to, size) = (memory.as_mut_ptr().cast(), memory.len() * 8);
            // SAFETY: the memory is as long as said and aligned to 8; it and what `at` points to, as many bytes, are
            // heap memory that neither moves nor is written to from here on, and go together.
            let made = unsafe { ZSTD_initStaticCDict(to, size, at, bytes.len(), LOAD, CONTENT, parameters) };
            if made.is_null() {
                return None;
            }
            compress.push((*level, memory));
        }
        let mut decompress = touched(decompressor_bytes(bytes.len()));
        let (to, size) = (decompress.as_mut_ptr().cast(), decompress.len() * 8);
        // SAFETY: as above.
        let made = unsafe { ZSTD_initStaticDDict(to, size, at, bytes.len(), LOAD, CONTENT) };
        (!made.is_null()).then(|| Dictionary { words, bytes: bytes.len(), compress: compress.into(), decompress })
    }

    /// Memory that one of so many bytes takes.
    pub fn memory_bytes(bytes: usize, levels: &[i32]) -> usize {
        bytes + decompressor_bytes(bytes) + levels.iter().map(|level| compressor_bytes(*level, bytes)).sum::<usize>()
    }

    /// Bytes of the dictionary itself.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// And memory that it takes all in all.
    pub fn held_bytes(&self) -> usize {
        let compress: usize = self.compress.iter().map(|(_, memory)| memory.len()).sum();
        (self.words.len() + compress + self.decompress.len()) * 8
    }

    /// Whether it is ready to compress at that level.
    pub fn has(&self, level: i32) -> bool {
        self.compress.iter().any(|(of, _)| *of == level)
    }

    /// What compresses at that level. To be used while the dictionary is there.
    pub(super) fn compressor(&self, level: i32) -> *const ZSTD_CDict {
        let made = self.compress.iter().find(|(of, _)| *of == level);
        made.expect("a page is compressed with what was made ready for its level").1.as_ptr().cast()
    }

    /// What decompresses, likewise.
    pub(super) fn decompressor(&self) -> *const ZSTD_DDict {
        self.decompress.as_ptr().cast()
    }
}

/// The level whose tables for page and dictionary are so large that less is gained than by those for a page.
const LARGE_TABLES: i32 = 3;

/// How pages are compressed with a dictionary of so many bytes.
pub(super) fn parameters(level: i32, bytes: usize) -> ZSTD_compressionParameters {
    // SAFETY: pure functions of the library.
    let [with, alone] = [bytes, 0].map(|bytes| unsafe { ZSTD_getCParams(level, PAGE_BYTES as u64, bytes) });
    match level {
        LARGE_TABLES => ZSTD_compressionParameters { windowLog: with.windowLog, ..alone },
        _ => with,
    }
}

fn compressor_bytes(level: i32, bytes: usize) -> usize {
    // SAFETY: a pure function of the library.
    unsafe { ZSTD_estimateCDictSize_advanced(bytes, parameters(level, bytes), LOAD) }
}

fn decompressor_bytes(bytes: usize) -> usize {
    // SAFETY: a pure function of the library.
    unsafe { ZSTD_estimateDDictSize(bytes, LOAD) }
}

/// The hash table that training counts in has two to the power of this many entries, of 6 bytes.
const TABLE_LOG: u32 = 18;

/// Memory that training takes beside the samples, in bytes: its table, a context of its own and one of ours, which of
/// the highest level have two MiB each.
pub(crate) const TRAINING_BYTES: u64 = (6 << TABLE_LOG) + (5 << 20);

/// Makes a dictionary of at most so many bytes from pages, one after another, for compression at some level. None:
/// nothing of use comes of them.
pub(crate) fn train(pages: &[u8], bytes: usize, level: i32) -> Option<Vec<u8>> {
    let sizes = vec![PAGE_BYTES; pages.len() / PAGE_BYTES];
    let mut made = vec![0; bytes.min(MOST_BYTES)];
    let parameters = ZDICT_fastCover_params_t {
        // Pieces of 256 bytes, by what they have in common of 8 bytes. What is best for one machine's pages is not for
        // another's, and a search takes forty times as long.
        k: 256,
        d: 8,
        f: TABLE_LOG,
        steps: 0,
        nbThreads: 0,
        splitPoint: 1.0,
        accel: 1,
        shrinkDict: 0,
        shrinkDictMaxRegression: 0,
        zParams: ZDICT_params_t { compressionLevel: level, notificationLevel: 0, dictID: 0 },
    };
    let count = sizes.len() as u32;
    // SAFETY: lengths are those of the vectors, and the samples' sizes add up to no more than there are bytes.
    let n = unsafe {
        ZDICT_trainFromBuffer_fastCover(
            made.as_mut_ptr().cast(),
            made.len(),
            pages.as_ptr().cast(),
            sizes.as_ptr(),
            count,
            parameters,
        )
    };
    // SAFETY: a pure function of the library.
    let failed = failed(n) || unsafe { ZDICT_isError(n) != 0 };
    if failed || n < LEAST_BYTES {
        return None;
    }
    made.truncate(n);
    Some(made)
}
