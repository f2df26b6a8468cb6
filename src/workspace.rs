//! Aligned memory: packed weights, scratch, and the buffers of a call, sized once.

#![allow(unsafe_code, reason = "memory with an alignment that `Vec` cannot ask for without touching it")]

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::{Arc, Mutex, Weak};

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
    /// Its own, or shared with other parts of a slab.
    _memory: Arc<Memory>,
}

// SAFETY: the buffer owns its elements, like `Vec<f32>`, which is `Send`: parts of a slab do not overlap.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; `Vec<f32>` is `Sync`.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` zeros.
    ///
    /// # Errors
    /// [`Error::Overflow`] if they do not fit the address space.
    pub fn zeroed(len: usize) -> Result<AlignedBuffer, Error> {
        let memory = Memory::zeroed(len)?;
        Ok(AlignedBuffer { start: memory.start, len, _memory: Arc::new(memory) })
    }

    /// The same for a size that the caller has checked.
    pub(crate) fn scratch(len: usize) -> AlignedBuffer {
        Self::zeroed(len).expect("a buffer beyond the address space")
    }

    /// The same for weights, beside the last ones.
    pub(crate) fn in_slab(len: usize) -> AlignedBuffer {
        let bytes = len * size_of::<f32>();
        if !(LEAST_OF_SLAB..=SLAB / 2).contains(&bytes) {
            return Self::scratch(len);
        }
        let mut current = CURRENT.lock().unwrap_or_else(|e| e.into_inner());
        let slab = current.0.upgrade().map(|memory| Slab { memory, used: current.1 });
        let mut slab = slab.unwrap_or_else(|| Slab::new(SLAB / size_of::<f32>()));
        let buffer = slab.take(len).unwrap_or_else(|| {
            slab = Slab::new(SLAB / size_of::<f32>());
            slab.take(len).expect("a part of an empty slab")
        });
        *current = (Arc::downgrade(&slab.memory), slab.used);
        buffer
    }
}

/// Memory whose parts are handed out one after another; none comes back, and it is freed when all are dropped.
///
/// By itself a matrix ends inside of a huge page, and what is behind the last whole one has small pages: a ninth of a BERT-base layer's weights,
/// two fifths of MiniLM's. An allocator also hands out memory again with the small pages that it has, and whoever loads a model frees a copy of
/// each weight before the next is packed. Slabs are large enough to come from the system, and their huge pages are full.
pub(crate) struct Slab {
    memory: Arc<Memory>,
    used: usize,
}

/// Bytes of a slab of weights; what is not used of it is not touched. glibc takes whatever is larger than 32 MiB from the system, with pages that
/// nobody has had.
const SLAB: usize = 64 << 20;

/// Smaller matrices have memory of their own: a slab's first huge page is cleared at once. So have those of which a slab would hold one or none.
const LEAST_OF_SLAB: usize = HUGE_PAGE / 8;

/// The slab that the next matrix is taken from, and how much of it is in use.
static CURRENT: Mutex<(Weak<Memory>, usize)> = Mutex::new((Weak::new(), 0));

impl Slab {
    /// Room for `len` elements, of a size that the caller has checked.
    pub(crate) fn new(len: usize) -> Slab {
        let memory = Memory::zeroed(len).expect("a slab beyond the address space");
        Slab { memory: Arc::new(memory), used: 0 }
    }

    /// The next `len` zeros, if there is room; what is behind them begins on a cache line.
    pub(crate) fn take(&mut self, len: usize) -> Option<AlignedBuffer> {
        let room = self.memory.len - self.used;
        if room < len {
            return None;
        }
        // SAFETY: `len` elements from `used` are inside the memory.
        let start = unsafe { self.memory.start.add(self.used) };
        self.used += len.next_multiple_of(LINE / size_of::<f32>()).min(room);
        Some(AlignedBuffer { start, len, _memory: Arc::clone(&self.memory) })
    }
}

/// What was allocated; nothing if `layout` is empty. Its elements are reached through buffers alone.
struct Memory {
    start: NonNull<f32>,
    len: usize,
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: whoever has it frees it at most; the elements are the buffers'.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn zeroed(len: usize) -> Result<Memory, Error> {
        let overflow = Error::Overflow { arg: "buffer" };
        let bytes = len.checked_mul(size_of::<f32>()).ok_or(overflow)?;
        if len == 0 {
            let (start, base) = (NonNull::dangling(), NonNull::dangling());
            return Ok(Memory { start, len, base, layout: Layout::new::<()>() });
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
        Ok(Memory { start: start.cast(), len, base, layout })
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

impl Drop for Memory {
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
        // SAFETY: `len` elements from `start` are inside the memory, no other buffer's, and zeroed at first; `f32` has no invalid bits.
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
    fn parts_of_slabs_are_aligned_zeroed_and_apart() {
        // A small one, several that share slabs, more than one slab has room for, and a large one; some of them on other threads.
        let small = LEAST_OF_SLAB / size_of::<f32>() - 1;
        let lens = [small, small + 1, 3 * small + 5, SLAB / 12, SLAB / 8, SLAB / 8 - 7, SLAB / 8 + 1];
        let make = |tag: usize| -> Vec<AlignedBuffer> {
            let fill = |(i, &len): (usize, &usize)| {
                let mut buffer = AlignedBuffer::in_slab(len);
                assert_eq!((buffer.len(), buffer.as_ptr() as usize % LINE), (len, 0));
                assert!(buffer.iter().all(|&x| x == 0.0));
                buffer.fill((tag * lens.len() + i) as f32 + 1.0);
                buffer
            };
            lens.iter().enumerate().map(fill).collect()
        };
        let make = &make;
        let mut all: Vec<Vec<AlignedBuffer>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|tag| scope.spawn(move || make(tag))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let check = |tag: usize, buffers: &[AlignedBuffer]| {
            for (i, buffer) in buffers.iter().enumerate() {
                let value = (tag * lens.len() + i) as f32 + 1.0;
                assert!(buffer.iter().all(|&x| x == value), "{tag} {i}");
            }
        };
        all.iter().enumerate().for_each(|(tag, buffers)| check(tag, buffers));
        // What is dropped takes nothing from its neighbours, nor does what comes in its place.
        all.remove(1);
        let new = make(7);
        check(0, &all[0]);
        check(2, &all[1]);
        check(7, &new);
    }

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
