//! AVX-512 (F, BW, DQ, VL): sixteen lanes are one register, so a GEMM tile of 6 rows by 4 vectors uses 24 accumulators,
//! 4 registers for the row of the packed panel and one for the broadcast, of 32.
//!
//! Safety invariant of the whole file: an [`Avx512`] is only made by [`Avx512::detect`], and an [`F32`] only by a
//! method of an `Avx512`, so wherever an intrinsic below runs the CPU has its features.

use core::arch::x86_64::*;
use core::ops::{Add, Div, Mul, Sub};

use super::{Avx2, LANES, Simd, Vector};

/// The proof that the CPU has AVX-512.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Avx512(());

/// Sixteen lanes in one register.
#[derive(Clone, Copy, Debug)]
pub struct F32(__m512);

/// An intrinsic call under the invariant of this file.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: the invariant of this file: the CPU has the features; register operands only.
        unsafe { $e }
    };
}

/// The low `n` lanes.
#[inline(always)]
fn low(n: usize) -> __mmask16 {
    ((1_u32 << n.min(LANES)) - 1) as __mmask16
}

impl Avx512 {
    pub(crate) fn detect() -> Option<Avx512> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        has.then_some(Avx512(()))
    }
}

impl Simd for Avx512 {
    type V = F32;
    const MR: usize = 6;
    const NV: usize = 4;
    type Narrow = Avx2;

    #[inline(always)]
    fn narrow(self) -> Avx2 {
        self.into()
    }

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn frame<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        simd!(frame(f))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F32 {
        F32(simd!(_mm512_set1_ps(x)))
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> F32 {
        let x = &x[..LANES];
        // SAFETY: `x` holds sixteen elements.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_partial(self, x: &[f32], fill: F32) -> F32 {
        // SAFETY: the invariant of this file; only lanes below `x.len()` are read.
        F32(unsafe { _mm512_mask_loadu_ps(fill.0, low(x.len()), x.as_ptr()) })
    }

    #[inline(always)]
    unsafe fn load_ptr(self, ptr: *const f32) -> F32 {
        // SAFETY: the invariant of this file; the caller vouches for the pointer.
        F32(unsafe { _mm512_loadu_ps(ptr) })
    }

    /// In four rounds of interleaving: single lanes, pairs, quarters of a register, and halves.
    #[inline(always)]
    fn transpose(self, mut a: [F32; LANES]) -> [F32; LANES] {
        let mut b = a;
        for i in (0..LANES).step_by(2) {
            let (x, y) = (a[i].0, a[i + 1].0);
            (b[i].0, b[i + 1].0) = simd!((_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
        }
        for i in [0, 1, 4, 5, 8, 9, 12, 13] {
            let (x, y) = simd!((_mm512_castps_pd(b[i].0), _mm512_castps_pd(b[i + 2].0)));
            let first = i / 4 * 4 + i % 4 * 2;
            a[first].0 = simd!(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)));
            a[first + 1].0 = simd!(_mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        }
        for i in [0, 1, 2, 3, 8, 9, 10, 11] {
            let (x, y) = (a[i].0, a[i + 4].0);
            b[i].0 = simd!(_mm512_shuffle_f32x4::<0x88>(x, y));
            b[i + 4].0 = simd!(_mm512_shuffle_f32x4::<0xDD>(x, y));
        }
        for i in 0..8 {
            let (x, y) = (b[i].0, b[i + 8].0);
            a[i].0 = simd!(_mm512_shuffle_f32x4::<0x88>(x, y));
            a[i + 8].0 = simd!(_mm512_shuffle_f32x4::<0xDD>(x, y));
        }
        a
    }
}

impl Add for F32 {
    type Output = F32;
    #[inline(always)]
    fn add(self, other: F32) -> F32 {
        F32(simd!(_mm512_add_ps(self.0, other.0)))
    }
}

impl Sub for F32 {
    type Output = F32;
    #[inline(always)]
    fn sub(self, other: F32) -> F32 {
        F32(simd!(_mm512_sub_ps(self.0, other.0)))
    }
}

impl Mul for F32 {
    type Output = F32;
    #[inline(always)]
    fn mul(self, other: F32) -> F32 {
        F32(simd!(_mm512_mul_ps(self.0, other.0)))
    }
}

impl Div for F32 {
    type Output = F32;
    #[inline(always)]
    fn div(self, other: F32) -> F32 {
        F32(simd!(_mm512_div_ps(self.0, other.0)))
    }
}

impl Vector for F32 {
    type Mask = __mmask16;

    #[inline(always)]
    fn mul_add(self, a: F32, b: F32) -> F32 {
        F32(simd!(_mm512_fmadd_ps(self.0, a.0, b.0)))
    }

    #[inline(always)]
    fn neg_mul_add(self, a: F32, b: F32) -> F32 {
        F32(simd!(_mm512_fnmadd_ps(self.0, a.0, b.0)))
    }

    #[inline(always)]
    fn max(self, other: F32) -> F32 {
        F32(simd!(_mm512_max_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn min(self, other: F32) -> F32 {
        F32(simd!(_mm512_min_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn abs(self) -> F32 {
        F32(simd!(_mm512_andnot_ps(_mm512_set1_ps(-0.0), self.0)))
    }

    #[inline(always)]
    fn copysign(self, sign: F32) -> F32 {
        // Bitwise `sign_bit ? sign : self`: truth table 0xCA of (sign_bit, sign, self).
        F32(simd!({
            let bit = _mm512_castps_si512(_mm512_set1_ps(-0.0));
            let (sign, mag) = (_mm512_castps_si512(sign.0), _mm512_castps_si512(self.0));
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xCA>(bit, sign, mag))
        }))
    }

    #[inline(always)]
    fn sqrt(self) -> F32 {
        F32(simd!(_mm512_sqrt_ps(self.0)))
    }

    #[inline(always)]
    fn lt(self, other: F32) -> __mmask16 {
        simd!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0))
    }

    #[inline(always)]
    fn not_lt(self, other: F32) -> __mmask16 {
        simd!(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, other.0))
    }

    #[inline(always)]
    fn mask(self, bits: u16) -> __mmask16 {
        bits
    }

    #[inline(always)]
    fn select(self, mask: __mmask16, other: F32) -> F32 {
        F32(simd!(_mm512_mask_blend_ps(mask, other.0, self.0)))
    }

    #[inline(always)]
    fn exp2_magic(self) -> F32 {
        F32(simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0)))))
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        let out = &mut out[..LANES];
        // SAFETY: `out` holds sixteen elements.
        unsafe { self.store_ptr(out.as_mut_ptr()) }
    }

    #[inline(always)]
    fn store_partial(self, out: &mut [f32]) {
        // SAFETY: the invariant of this file; only lanes below `out.len()` are written.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), low(out.len()), self.0) }
    }

    #[inline(always)]
    unsafe fn store_ptr(self, ptr: *mut f32) {
        // SAFETY: the invariant of this file; the caller vouches for the pointer.
        unsafe { _mm512_storeu_ps(ptr, self.0) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        simd!({
            let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        simd!({
            let eight = _mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
}
