//! Aligned memory: packed weights, scratch, and the buffers of a call, sized once.

#![allow(unsafe_code, reason = "memory with an alignment that `Vec` cannot ask for without touching it")]

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use crate::error::Error;

/// Kernels read packed panels with 64-byte loads, and on AMD an unaligned one costs twice.
const LINE: usize = 64;

/// A huge page of the usual systems. A layer's weights in pages of 4 KiB are more than the translation buffers of a core
/// hold, and a miss inside a virtual machine walks two tables: with huge pages a BERT-base layer is 2 to 4 % faster on Zen 4, with few
/// tokens 8 %.
const HUGE_PAGE: usize = 2 << 20;

/// Elements on a cache line's begin, zeroed at first: for the operands of any call. Large ones ask the system for huge pages, as packed
/// weights do; memory that is never touched stays with the system.
///
/// ```
/// use laneformer::{AlignedBuffer, MatMut};
/// let mut x = AlignedBuffer::zeroed(3 * 5)?;
/// MatMut::contiguous(&mut x, 3, 5)?.row_mut(1)[0] = 1.0;
/// assert_eq!((x.len(), x[5], x.as_ptr() as usize % 64), (15, 1.0, 0));
/// # Ok::<(), laneformer::Error>(())
/// ```
pub struct AlignedBuffer {
    start: NonNull<f32>,
    len: usize,
    /// What was allocated; nothing if `layout` is empty.
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its elements, like `Vec<f32>`, which is `Send`.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; `Vec<f32>` is `Sync`.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` zeros.
    ///
    /// # Errors
    /// [`Error::Overflow`] if they do not fit the address space.
    pub fn zeroed(len: usize) -> Result<AlignedBuffer, Error> {
        let overflow = Error::Overflow { arg: "buffer" };
        let bytes = len.checked_mul(size_of::<f32>()).ok_or(overflow)?;
        if len == 0 {
            let (start, base) = (NonNull::dangling(), NonNull::dangling());
            return Ok(AlignedBuffer { start, len, base, layout: Layout::new::<()>() });
        }
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        // Room to move the begin instead of a stricter layout: for that, the allocator would write every zero.
        let room = bytes.checked_add(align).ok_or(overflow)?;
        let layout = Layout::from_size_align(room, align_of::<f32>()).map_err(|_| overflow)?;
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
        let skip = base.align_offset(align).min(align);
        // SAFETY: `skip` is at most `align`, which the allocation has beside the elements.
        let start = unsafe { base.add(skip) };
        if align == HUGE_PAGE {
            advise_huge_pages(start, bytes);
        }
        Ok(AlignedBuffer { start: start.cast(), len, base, layout })
    }

    /// The same for a size that the caller has checked.
    pub(crate) fn scratch(len: usize) -> AlignedBuffer {
        Self::zeroed(len).expect("a buffer beyond the address space")
    }
}

/// A hint that the system may ignore.
fn advise_huge_pages(start: NonNull<u8>, bytes: usize) {
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        use core::ffi::{c_int, c_void};
        const MADV_HUGEPAGE: c_int = 14;
        // SAFETY: the signature of the C library that the standard library links.
        unsafe extern "C" {
            fn madvise(start: *mut c_void, len: usize, advice: c_int) -> c_int;
        }
        // SAFETY: the advice changes no memory, and the range was just allocated.
        unsafe { madvise(start.as_ptr().cast(), bytes, MADV_HUGEPAGE) };
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    let _ = (start, bytes);
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.base.as_ptr(), self.layout) };
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: `len` elements from `start` are inside the allocation, and zeroed at first; `f32` has no invalid bits.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`; `self` is borrowed exclusively.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_of_their_length() {
        for len in [0, 1, 15, 16, 17, 1000, HUGE_PAGE / 4 - 1, HUGE_PAGE / 4, HUGE_PAGE + 3] {
            let mut buffer = AlignedBuffer::zeroed(len).unwrap();
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|x| *x == 0.0));
            buffer.fill(1.0);
            let align = if len * 4 >= HUGE_PAGE { HUGE_PAGE } else { LINE };
            assert!(len == 0 || (buffer.as_ptr() as usize).is_multiple_of(align), "{len}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4] {
            assert_eq!(AlignedBuffer::zeroed(len).unwrap_err(), Error::Overflow { arg: "buffer" });
        }
    }
}
