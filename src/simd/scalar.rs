//! Sixteen `f32` and `f32::mul_add`: the oracle that the other instruction sets are compared with, bit for bit.

use core::array::from_fn;
use core::ops::{Add, Div, Mul, Sub};

use super::{LANES, Simd, Vector, fold_halves};

/// The token of the scalar code, which every CPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scalar;

/// Sixteen lanes.
#[derive(Clone, Copy, Debug)]
pub struct F32([f32; LANES]);

impl F32 {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        F32(self.0.map(f))
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        F32(from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Simd for Scalar {
    type V = F32;
    const MR: usize = 4;
    const NV: usize = 1;
    type Narrow = Scalar;

    #[inline(always)]
    fn narrow(self) -> Scalar {
        self
    }

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F32 {
        F32([x; LANES])
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> F32 {
        F32(from_fn(|i| x[i]))
    }

    #[inline(always)]
    fn load_partial(self, x: &[f32], fill: F32) -> F32 {
        F32(from_fn(|i| if i < x.len() { x[i] } else { fill.0[i] }))
    }

    #[inline(always)]
    unsafe fn load_ptr(self, ptr: *const f32) -> F32 {
        // SAFETY: the caller's promise; `[f32; 16]` is aligned like `f32`.
        F32(unsafe { *ptr.cast::<[f32; LANES]>() })
    }
}

impl Add for F32 {
    type Output = F32;
    #[inline(always)]
    fn add(self, other: F32) -> F32 {
        self.zip(other, |a, b| a + b)
    }
}

impl Sub for F32 {
    type Output = F32;
    #[inline(always)]
    fn sub(self, other: F32) -> F32 {
        self.zip(other, |a, b| a - b)
    }
}

impl Mul for F32 {
    type Output = F32;
    #[inline(always)]
    fn mul(self, other: F32) -> F32 {
        self.zip(other, |a, b| a * b)
    }
}

impl Div for F32 {
    type Output = F32;
    #[inline(always)]
    fn div(self, other: F32) -> F32 {
        self.zip(other, |a, b| a / b)
    }
}

impl Vector for F32 {
    type Mask = u16;

    #[inline(always)]
    fn mul_add(self, a: F32, b: F32) -> F32 {
        F32(from_fn(|i| self.0[i].mul_add(a.0[i], b.0[i])))
    }

    #[inline(always)]
    fn neg_mul_add(self, a: F32, b: F32) -> F32 {
        F32(from_fn(|i| (-self.0[i]).mul_add(a.0[i], b.0[i])))
    }

    #[inline(always)]
    fn max(self, other: F32) -> F32 {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: F32) -> F32 {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn abs(self) -> F32 {
        self.map(f32::abs)
    }

    #[inline(always)]
    fn copysign(self, sign: F32) -> F32 {
        self.zip(sign, f32::copysign)
    }

    #[inline(always)]
    fn sqrt(self) -> F32 {
        self.map(f32::sqrt)
    }

    #[inline(always)]
    fn lt(self, other: F32) -> u16 {
        (0..LANES).fold(0, |bits, i| bits | (u16::from(self.0[i] < other.0[i]) << i))
    }

    #[inline(always)]
    fn not_lt(self, other: F32) -> u16 {
        !self.lt(other)
    }

    #[inline(always)]
    fn mask(self, bits: u16) -> u16 {
        bits
    }

    #[inline(always)]
    fn select(self, mask: u16, other: F32) -> F32 {
        F32(from_fn(|i| if mask >> i & 1 == 1 { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    fn exp2_magic(self) -> F32 {
        self.map(|x| f32::from_bits(x.to_bits() << 23))
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        out[..LANES].copy_from_slice(&self.0);
    }

    #[inline(always)]
    fn store_partial(self, out: &mut [f32]) {
        let n = out.len().min(LANES);
        out[..n].copy_from_slice(&self.0[..n]);
    }

    #[inline(always)]
    unsafe fn store_ptr(self, ptr: *mut f32) {
        // SAFETY: the caller's promise; `[f32; 16]` is aligned like `f32`.
        unsafe { *ptr.cast::<[f32; LANES]>() = self.0 }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        fold_halves(self.0, |a, b| a + b)
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        fold_halves(self.0, |a, b| if a > b { a } else { b })
    }
}
