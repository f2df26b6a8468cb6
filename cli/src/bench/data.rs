//! Operands: deterministic values in buffers that begin on a cache line, as an engine's tensors do.

use std::ops::{Deref, DerefMut};

use laneformer::AlignedBuffer;

/// `f32` from a cache line's first byte on.
pub struct Buffer(AlignedBuffer);

impl Buffer {
    /// Every page is written, so that none is the system's shared page of zeros.
    pub fn filled(len: usize, value: f32) -> Buffer {
        let mut buffer = Buffer(AlignedBuffer::zeroed(len).expect("operands that fit into memory"));
        buffer.fill(value);
        buffer
    }

    /// The same values from a cache line's first byte on.
    pub fn copy_of(data: &[f32]) -> Buffer {
        let mut buffer = Buffer::filled(data.len(), 0.0);
        buffer.copy_from_slice(data);
        buffer
    }

    /// Values in `-scale..scale`, the same in every run.
    pub fn uniform(len: usize, scale: f32, seed: u64) -> Buffer {
        let mut buffer = Buffer::filled(len, 0.0);
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for x in buffer.iter_mut() {
            // xorshift64; the high bits are the good ones.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *x = ((state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0) * scale;
        }
        buffer
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_in_range() {
        for len in [1, 15, 16, 17, 1000] {
            let x = Buffer::uniform(len, 0.5, 7);
            assert_eq!((x.len(), x.as_ptr().align_offset(64)), (len, 0));
            assert!(x.iter().all(|x| (-0.5..0.5).contains(x)));
            assert_eq!(*x, *Buffer::uniform(len, 0.5, 7));
        }
        let mean = Buffer::uniform(10_000, 1.0, 1).iter().sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.05, "{mean}");
    }
}
