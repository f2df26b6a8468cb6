//! Aligned memory: packed weights, scratch, and the buffers of a call, sized once.

#![allow(unsafe_code, reason = "aligned chunks are lent as plain slices")]

use core::ops::{Deref, DerefMut};
use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};

/// One cache line of elements. Kernels read packed panels with 64-byte loads, and on AMD an unaligned one costs twice.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Chunk([f32; 16]);

/// Zeroed chunks for at least `len` elements. Fresh pages come zeroed from the system and cost nothing until touched.
pub(crate) fn chunks(len: usize) -> Box<[Chunk]> {
    let n = len.div_ceil(16);
    if n == 0 {
        return Box::new([]);
    }
    let layout = Layout::array::<Chunk>(n).expect("a buffer beyond the address space");
    // SAFETY: the layout is not empty.
    let ptr = unsafe { alloc_zeroed(layout) }.cast::<Chunk>();
    if ptr.is_null() {
        handle_alloc_error(layout);
    }
    // SAFETY: freshly allocated with the layout of `[Chunk; n]`; zero bytes are sixteen `f32` zeros.
    unsafe { Box::from_raw(core::ptr::slice_from_raw_parts_mut(ptr, n)) }
}

/// The elements of the chunks.
pub(crate) fn as_f32(chunks: &mut [Chunk]) -> &mut [f32] {
    // SAFETY: a `Chunk` is sixteen `f32` without padding; the borrow is handed on.
    unsafe { core::slice::from_raw_parts_mut(chunks.as_mut_ptr().cast(), chunks.len() * 16) }
}

/// A buffer of `f32` that starts on a cache line, zeroed at first. Its length is rounded up to whole lines.
#[derive(Debug)]
pub(crate) struct Aligned(Box<[Chunk]>);

impl Aligned {
    pub(crate) fn zeroed(len: usize) -> Aligned {
        Aligned(chunks(len))
    }
}

impl Deref for Aligned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: as in `as_f32`.
        unsafe { core::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 16) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        as_f32(&mut self.0)
    }
}
