//! Memory as O_DIRECT wants it: whole blocks, aligned to one.
#![allow(unsafe_code, reason = "memory by its layout")]

use super::BLOCK_BYTES;
use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A buffer of whole blocks. All of it is touched when it is made.
pub struct Buffer {
    at: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory, as a Box<[u8]> does.
unsafe impl Send for Buffer {}

impl Buffer {
    /// At least `bytes`, which are not zero; rounded up to whole blocks.
    pub fn new(bytes: usize) -> Buffer {
        assert!(bytes > 0, "a buffer has bytes");
        let layout = Layout::from_size_align(bytes.next_multiple_of(BLOCK_BYTES), BLOCK_BYTES);
        let layout = layout.expect("buffers are far from the end of the address space");
        // SAFETY: the layout has a size.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        let mut buffer = Buffer { at, layout };
        // Zeroed memory may be promised only.
        buffer.fill(0xa5);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: ours, initialised, as long as the layout says.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout.
        unsafe { dealloc(self.at.as_ptr(), self.layout) }
    }
}
