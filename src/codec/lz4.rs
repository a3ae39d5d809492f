//! lz4 by the C library, with a state of our own: nothing is allocated per page. The library clears
//! its 16 KiB hash table before an input of 4 KiB or more (`LZ4_prepareTable` in lz4.c).
#![allow(unsafe_code, reason = "the C library's interface")]

use std::ffi::{c_char, c_int, c_void};

extern "C" {
    // lz4.h, "static linking only" section; lz4-sys builds it but does not declare it.
    fn LZ4_initStream(buffer: *mut c_void, size: usize) -> *mut c_void;
    fn LZ4_sizeofState() -> c_int;
    fn LZ4_compress_fast_extState_fastReset(
        state: *mut c_void,
        src: *const c_char,
        dst: *mut c_char,
        src_len: c_int,
        dst_cap: c_int,
        acceleration: c_int,
    ) -> c_int;
}

/// The compressor's working memory.
pub(crate) struct Lz4 {
    state: Box<[u64]>,
}

impl Lz4 {
    pub fn new() -> Lz4 {
        // SAFETY: a pure function of the library.
        let size = unsafe { LZ4_sizeofState() } as usize;
        let mut state = vec![0u64; size.div_ceil(8)].into_boxed_slice();
        // SAFETY: the buffer is at least LZ4_sizeofState() bytes, aligned to 8.
        let ready = unsafe { LZ4_initStream(state.as_mut_ptr().cast(), state.len() * 8) };
        assert!(!ready.is_null(), "an lz4 state of the size the library asks for is accepted");
        Lz4 { state }
    }

    /// Compressed length, or None if it does not fit `dst`.
    pub fn compress(&mut self, src: &[u8], dst: &mut [u8]) -> Option<usize> {
        // SAFETY: the state was initialised by LZ4_initStream and used by this function alone;
        // lengths are those of the slices.
        let n = unsafe {
            LZ4_compress_fast_extState_fastReset(
                self.state.as_mut_ptr().cast(),
                src.as_ptr().cast(),
                dst.as_mut_ptr().cast(),
                src.len() as c_int,
                dst.len() as c_int,
                1,
            )
        };
        (n > 0).then_some(n as usize)
    }
}

/// True if `src` decompresses to exactly `dst.len()` bytes.
pub(crate) fn decompress(src: &[u8], dst: &mut [u8]) -> bool {
    // SAFETY: lengths are those of the slices; the function checks every write against them.
    let n = unsafe {
        lz4_sys::LZ4_decompress_safe(
            src.as_ptr().cast(),
            dst.as_mut_ptr().cast(),
            src.len() as c_int,
            dst.len() as c_int,
        )
    };
    n == dst.len() as c_int
}
