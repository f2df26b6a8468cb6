//! The vectors: one file per instruction set, all with the same sixteen logical lanes.
//!
//! A kernel is written once, against [`Simd`] and [`Vector`]. Sixteen lanes are one register of AVX-512, two of AVX2,
//! four of NEON or SSE, and sixteen `f32` in [`Scalar`]. Because the lanes are the same everywhere, so is the order of
//! every sum, and with it every bit. This module imports nothing from the rest of the crate.

#![allow(unsafe_code, reason = "intrinsics; each instruction set's file states why its own are sound")]

use core::array::from_fn;
use core::ops::{Add, Div, Mul, Sub};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use portable::Portable;
pub use scalar::Scalar;

/// Lanes of every [`Vector`].
pub const LANES: usize = 16;

/// An instruction set: a zero-sized proof that the CPU has it, and the constructors of its vectors.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen `f32`.
    type V: Vector;

    /// Rows of the widest GEMM tile whose accumulators stay in registers.
    const MR: usize;
    /// Vectors of a row of that tile.
    const NV: usize;

    /// The next narrower instruction set, which the CPU has as well and which keeps the same bits; itself if there is none.
    type Narrow: Simd;
    /// The proof of it.
    fn narrow(self) -> Self::Narrow;

    /// Runs `f` where the instruction set is enabled, so that everything inlined into it is compiled for it.
    /// A closure that crosses a function or thread boundary loses that frame: enter again.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;

    /// The first sixteen elements of `x`.
    fn load(self, x: &[f32]) -> Self::V;

    /// As many of `x` as there are, at most sixteen; `fill` in the lanes that are left.
    fn load_partial(self, x: &[f32], fill: Self::V) -> Self::V;

    /// Sixteen elements from `ptr`.
    ///
    /// # Safety
    /// `ptr` is valid for reading sixteen elements.
    unsafe fn load_ptr(self, ptr: *const f32) -> Self::V;

    /// Sixteen rows as sixteen columns.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut lanes = [[0.0; LANES]; LANES];
        for (row, lanes) in rows.into_iter().zip(&mut lanes) {
            row.store(lanes);
        }
        from_fn(
            #[inline(always)]
            |j| {
                self.load(&from_fn::<f32, LANES, _>(
                    #[inline(always)]
                    |i| lanes[i][j],
                ))
            },
        )
    }

    /// Asks for the cache line of `ptr` in L1; any address is allowed.
    #[inline(always)]
    fn prefetch(self, ptr: *const f32) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 has SSE, and a prefetch of any address is no access.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = ptr;
    }

    /// The same, but in L2.
    #[inline(always)]
    fn prefetch_to_l2(self, ptr: *const f32) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T1 }>(ptr.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = ptr;
    }
}

/// Sixteen lanes of `f32`. Every operation rounds once, as IEEE 754 says, except [`Vector::mul_add`] on
/// the portable backend.
pub trait Vector:
    Copy + Send + Sync + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// One bit per lane.
    type Mask: Copy;

    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `b - self * a`, rounded once.
    fn neg_mul_add(self, a: Self, b: Self) -> Self;
    /// `if self > other { self } else { other }`: `other` if either is NaN.
    fn max(self, other: Self) -> Self;
    /// `if self < other { self } else { other }`: `other` if either is NaN.
    fn min(self, other: Self) -> Self;
    /// Clears the sign bit.
    fn abs(self) -> Self;
    /// The magnitude of `self` with the sign bit of `sign`.
    fn copysign(self, sign: Self) -> Self;
    /// The IEEE square root.
    fn sqrt(self) -> Self;
    /// `self < other`.
    fn lt(self, other: Self) -> Self::Mask;
    /// Not `self < other`: set where either is NaN.
    fn not_lt(self, other: Self) -> Self::Mask;
    /// Lane `i` from bit `i`.
    fn mask(self, bits: u16) -> Self::Mask;
    /// `self` where the mask is set, `other` elsewhere.
    fn select(self, mask: Self::Mask, other: Self) -> Self;
    /// `2^n` where a lane holds `1.5 * 2^23 + 127 + n` with a whole `n` in `-127..=128`: the low bits, moved to the exponent.
    /// 0 for -127, infinity for 128.
    fn exp2_magic(self) -> Self;
    /// Writes the lanes to the first sixteen elements of `out`.
    fn store(self, out: &mut [f32]);
    /// Writes as many lanes as `out` has elements, at most sixteen.
    fn store_partial(self, out: &mut [f32]);
    /// Writes the lanes to `ptr`.
    ///
    /// # Safety
    /// `ptr` is valid for writing sixteen elements.
    unsafe fn store_ptr(self, ptr: *mut f32);
    /// The sum of the lanes by halves: `i + (i + 8)`, then 4, 2, 1.
    fn sum(self) -> f32;
    /// The largest lane, by the same halves with [`Vector::max`]. A NaN may or may not be returned.
    fn max_lane(self) -> f32;
}

/// The order of [`Vector::sum`], for the instruction sets that have no better way.
#[inline(always)]
pub(crate) fn fold_halves(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}
