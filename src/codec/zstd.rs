//! zstd by the C library, with a context in memory of our own. zstd resizes a context that it made
//! itself: upwards when a longer input needs more, and downwards after 128 inputs in a row that
//! needed less than a third (`ZSTD_cwksp_check_wasteful`). One that it was given the memory for
//! stays as it is (`ZSTD_initStaticCCtx` in zstd.h), so nothing is allocated or freed per page. The same goes for
//! what decompresses, for another reason: which of its memory an input needs depends on the input, and all of it
//! is to have been touched before the first.
#![allow(unsafe_code, reason = "the C library's interface")]

use super::dictionary::{parameters, Dictionary, MOST_BYTES};
use super::MOST_PAGES;
use crate::page::PAGE_BYTES;
use zstd_safe::zstd_sys::{
    ZSTD_CCtx, ZSTD_CCtx_refCDict, ZSTD_CCtx_reset, ZSTD_CCtx_setParameter, ZSTD_DCtx, ZSTD_ResetDirective,
    ZSTD_cParameter, ZSTD_compress2, ZSTD_decompressDCtx, ZSTD_decompress_usingDDict,
    ZSTD_estimateCCtxSize_usingCParams, ZSTD_estimateDCtxSize, ZSTD_getCParams, ZSTD_initStaticCCtx,
    ZSTD_initStaticDCtx, ZSTD_isError,
};

/// The compressor's working memory, with the context at its start.
pub(crate) struct Zstd {
    memory: Box<[u64]>,
    level: i32,
    /// Address of what it refers to of a dictionary, 0: of none. Compared, not followed: a frame begins with all of the
    /// context set anew from what is referred to then.
    refers_to: usize,
}

impl Zstd {
    pub fn new(level: i32) -> Zstd {
        // Parameters, and so the memory, do not simply grow with the input.
        // SAFETY: pure functions of the library.
        let need = |pages: usize| unsafe {
            ZSTD_estimateCCtxSize_usingCParams(ZSTD_getCParams(level, (pages * PAGE_BYTES) as u64, 0))
        };
        // SAFETY: likewise. A page with a dictionary needs no more than the dictionary's own parameters ask for.
        let with = unsafe { ZSTD_estimateCCtxSize_usingCParams(parameters(level, MOST_BYTES)) };
        let size = (1..=MOST_PAGES).map(need).max().unwrap_or(0).max(with);
        let mut memory = touched(size);
        // SAFETY: the memory is as long as said, aligned to 8, and lives as long as the context:
        // nobody has the context's address but through `memory`, and its heap memory never moves.
        let context = unsafe { ZSTD_initStaticCCtx(memory.as_mut_ptr().cast(), memory.len() * 8) };
        assert!(!context.is_null(), "a zstd context of the size the library asks for is accepted");
        let mut zstd = Zstd { memory, level, refers_to: 0 };
        for (parameter, value) in [
            (ZSTD_cParameter::ZSTD_c_compressionLevel, level),
            (ZSTD_cParameter::ZSTD_c_contentSizeFlag, 0),
            (ZSTD_cParameter::ZSTD_c_checksumFlag, 0),
            (ZSTD_cParameter::ZSTD_c_dictIDFlag, 0),
        ] {
            // SAFETY: the context stands at the start of the memory, and nobody else uses it.
            let set = unsafe { ZSTD_CCtx_setParameter(zstd.context(), parameter, value) };
            assert!(!failed(set), "zstd accepts a level that the configuration accepts");
        }
        zstd.prove_room();
        zstd
    }

    /// Any run of pages fits: a context without room for one would leave it uncompressed, silently.
    fn prove_room(&mut self) {
        let zeros = vec![0; MOST_PAGES * PAGE_BYTES];
        let mut packed = [0; 256];
        for pages in 1..=MOST_PAGES {
            let done = self.compress(&zeros[..pages * PAGE_BYTES], &mut packed, None);
            assert!(done.is_some(), "a zstd context has room for {pages} pages");
        }
    }

    /// Its address is that of the memory, says zstd.h.
    fn context(&mut self) -> *mut ZSTD_CCtx {
        self.memory.as_mut_ptr().cast()
    }

    pub fn level(&self) -> i32 {
        self.level
    }

    /// Has what comes next refer to a dictionary, or to none.
    fn refer_to(&mut self, dictionary: Option<&Dictionary>) {
        let wanted = dictionary.map_or(std::ptr::null(), |d| d.compressor(self.level));
        if wanted as usize == self.refers_to {
            return;
        }
        // A frame that did not fit is not ended, and within a frame no dictionary is taken.
        // SAFETY: the context is used by this one thread; what it is given is null or ready, and there while the caller's
        // reference is: `compress` follows it no later.
        let set = unsafe {
            ZSTD_CCtx_reset(self.context(), ZSTD_ResetDirective::ZSTD_reset_session_only);
            ZSTD_CCtx_refCDict(self.context(), wanted)
        };
        assert!(!failed(set), "between two frames zstd takes a dictionary");
        self.refers_to = wanted as usize;
    }

    /// Compressed length, or None if it does not fit `dst`.
    pub fn compress(&mut self, src: &[u8], dst: &mut [u8], with: Option<&Dictionary>) -> Option<usize> {
        self.refer_to(with);
        // SAFETY: the context was made in `new` and is used by this one thread; lengths are those of
        // the slices.
        let n = unsafe {
            ZSTD_compress2(self.context(), dst.as_mut_ptr().cast(), dst.len(), src.as_ptr().cast(), src.len())
        };
        (!failed(n)).then_some(n)
    }
}

/// What decompresses, with the context at the start of its memory.
pub(crate) struct Decoder {
    memory: Box<[u64]>,
}

impl Decoder {
    pub fn new() -> Decoder {
        // SAFETY: a pure function of the library.
        let mut memory = touched(unsafe { ZSTD_estimateDCtxSize() });
        // SAFETY: as for the compressor's.
        let context = unsafe { ZSTD_initStaticDCtx(memory.as_mut_ptr().cast(), memory.len() * 8) };
        assert!(!context.is_null(), "a zstd context of the size the library asks for is accepted");
        Decoder { memory }
    }

    /// True if `src` is a frame of exactly `dst.len()` bytes, made with that dictionary or with none.
    pub fn decompress(&mut self, src: &[u8], dst: &mut [u8], with: Option<&Dictionary>) -> bool {
        let context: *mut ZSTD_DCtx = self.memory.as_mut_ptr().cast();
        if let Some(dictionary) = with {
            let (to, room, from, size) = (dst.as_mut_ptr().cast(), dst.len(), src.as_ptr().cast(), src.len());
            // SAFETY: as below; the dictionary is there throughout, and nothing refers to it in the next frame.
            let n = unsafe { ZSTD_decompress_usingDDict(context, to, room, from, size, dictionary.decompressor()) };
            return !failed(n) && n == dst.len();
        }
        // SAFETY: the context was made in `new` and is used by this one thread; lengths are those of
        // the slices.
        let n =
            unsafe { ZSTD_decompressDCtx(context, dst.as_mut_ptr().cast(), dst.len(), src.as_ptr().cast(), src.len()) };
        !failed(n) && n == dst.len()
    }
}

/// Memory written with a value other than zero, so that every page of it is there now.
pub(super) fn touched(bytes: usize) -> Box<[u64]> {
    vec![0xa5a5_a5a5_a5a5_a5a5u64; bytes.div_ceil(8)].into_boxed_slice()
}

pub(super) fn failed(answer: usize) -> bool {
    // SAFETY: a pure function of the library.
    unsafe { ZSTD_isError(answer) != 0 }
}
