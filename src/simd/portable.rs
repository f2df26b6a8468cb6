//! Sixteen lanes of the `wide` crate, for CPUs that have no file of their own here.
//!
//! `wide` chooses its instructions when the library is built, so a default x86-64 build runs SSE2 without a fused
//! multiply-add: `mul_add` rounds twice and results differ from the other backends within the tolerance.

use core::ops::{Add, Div, Mul, Sub};

use wide::{f32x16, u32x16};

use super::{LANES, Simd, Vector, fold_halves};

/// The token of the portable code, which every CPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Portable;

/// Sixteen lanes.
#[derive(Clone, Copy, Debug)]
pub struct F32(f32x16);

impl Simd for Portable {
    type V = F32;
    // Twelve of the sixteen registers of SSE2 hold accumulators.
    const MR: usize = 3;
    const NV: usize = 1;
    type Narrow = Portable;

    #[inline(always)]
    fn narrow(self) -> Portable {
        self
    }

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F32 {
        F32(f32x16::splat(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> F32 {
        let x = &x[..LANES];
        // SAFETY: `x` holds sixteen elements.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_partial(self, x: &[f32], fill: F32) -> F32 {
        let mut lanes = fill.0.to_array();
        let n = x.len().min(LANES);
        lanes[..n].copy_from_slice(&x[..n]);
        F32(f32x16::new(lanes))
    }

    #[inline(always)]
    unsafe fn load_ptr(self, ptr: *const f32) -> F32 {
        // SAFETY: the caller's promise; `[f32; 16]` is aligned like `f32`.
        F32(f32x16::new(unsafe { *ptr.cast::<[f32; LANES]>() }))
    }
}

impl Add for F32 {
    type Output = F32;
    #[inline(always)]
    fn add(self, other: F32) -> F32 {
        F32(self.0 + other.0)
    }
}

impl Sub for F32 {
    type Output = F32;
    #[inline(always)]
    fn sub(self, other: F32) -> F32 {
        F32(self.0 - other.0)
    }
}

impl Mul for F32 {
    type Output = F32;
    #[inline(always)]
    fn mul(self, other: F32) -> F32 {
        F32(self.0 * other.0)
    }
}

impl Div for F32 {
    type Output = F32;
    #[inline(always)]
    fn div(self, other: F32) -> F32 {
        F32(self.0 / other.0)
    }
}

impl Vector for F32 {
    type Mask = f32x16;

    #[inline(always)]
    fn mul_add(self, a: F32, b: F32) -> F32 {
        F32(self.0.mul_add(a.0, b.0))
    }

    #[inline(always)]
    fn neg_mul_add(self, a: F32, b: F32) -> F32 {
        F32(self.0.mul_neg_add(a.0, b.0))
    }

    #[inline(always)]
    fn max(self, other: F32) -> F32 {
        F32(other.0.simd_lt(self.0).select(self.0, other.0))
    }

    #[inline(always)]
    fn min(self, other: F32) -> F32 {
        F32(self.0.simd_lt(other.0).select(self.0, other.0))
    }

    #[inline(always)]
    fn abs(self) -> F32 {
        F32(self.0.abs())
    }

    #[inline(always)]
    fn copysign(self, sign: F32) -> F32 {
        F32(self.0.copysign(sign.0))
    }

    #[inline(always)]
    fn sqrt(self) -> F32 {
        F32(self.0.sqrt())
    }

    #[inline(always)]
    fn lt(self, other: F32) -> f32x16 {
        self.0.simd_lt(other.0)
    }

    #[inline(always)]
    fn not_lt(self, other: F32) -> f32x16 {
        !self.0.simd_lt(other.0)
    }

    #[inline(always)]
    fn mask(self, bits: u16) -> f32x16 {
        let lanes = core::array::from_fn(|i| if bits >> i & 1 == 1 { u32::MAX } else { 0 });
        f32x16::from_bits(u32x16::new(lanes))
    }

    #[inline(always)]
    fn select(self, mask: f32x16, other: F32) -> F32 {
        F32(mask.select(self.0, other.0))
    }

    #[inline(always)]
    fn exp2_magic(self) -> F32 {
        F32(f32x16::from_bits(self.0.to_bits() << 23_u32))
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        out[..LANES].copy_from_slice(&self.0.to_array());
    }

    #[inline(always)]
    fn store_partial(self, out: &mut [f32]) {
        let n = out.len().min(LANES);
        out[..n].copy_from_slice(&self.0.to_array()[..n]);
    }

    #[inline(always)]
    unsafe fn store_ptr(self, ptr: *mut f32) {
        // SAFETY: the caller's promise; `[f32; 16]` is aligned like `f32`.
        unsafe { *ptr.cast::<[f32; LANES]>() = self.0.to_array() }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        fold_halves(self.0.to_array(), |a, b| a + b)
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        fold_halves(self.0.to_array(), |a, b| if a > b { a } else { b })
    }
}
