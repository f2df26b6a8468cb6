//! AVX2 with FMA: sixteen lanes are two registers, so a GEMM tile of 6 rows by one vector uses 12 accumulators, 2
//! registers for the row of the packed panel and one for the broadcast, of 16.
//!
//! Safety invariant of the whole file: an [`Avx2`] is only made by [`Avx2::detect`] or of an [`Avx512`], and an [`F32`] only by a
//! method of an `Avx2`, so wherever an intrinsic below runs the CPU has its features.

use core::arch::x86_64::*;
use core::ops::{Add, Div, Mul, Sub};

use super::{Avx512, LANES, Simd, Vector};

/// The proof that the CPU has AVX2 and FMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Avx2(());

/// Sixteen lanes: the low eight, the high eight.
#[derive(Clone, Copy, Debug)]
pub struct F32(__m256, __m256);

/// The lanes that a comparison or a bit set names: all bits set, or none.
#[derive(Clone, Copy, Debug)]
pub struct Mask(__m256, __m256);

/// An intrinsic call under the invariant of this file.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: the invariant of this file: the CPU has the features; register operands only.
        unsafe { $e }
    };
}

const HALF: usize = LANES / 2;

/// All bits in the low `n` lanes of eight.
#[inline(always)]
fn low(n: usize) -> __m256i {
    simd!(_mm256_cmpgt_epi32(
        _mm256_set1_epi32(n.min(HALF) as i32),
        _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)
    ))
}

/// As many of `x` as there are, at most eight, over `fill`.
#[inline(always)]
fn load_half(x: &[f32], fill: __m256) -> __m256 {
    let mask = low(x.len());
    // SAFETY: the invariant of this file; only lanes below `x.len()` are read.
    let read = unsafe { _mm256_maskload_ps(x.as_ptr(), mask) };
    simd!(_mm256_blendv_ps(fill, read, _mm256_castsi256_ps(mask)))
}

/// All bits in lane `i` where bit `i` of the low eight is set.
#[inline(always)]
fn spread(bits: u16) -> __m256 {
    simd!({
        let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let of_lane = _mm256_and_si256(_mm256_set1_epi32(i32::from(bits)), lane);
        _mm256_castsi256_ps(_mm256_cmpeq_epi32(of_lane, lane))
    })
}

/// Eight rows as eight columns, in three rounds of interleaving: single lanes, pairs, halves of a register.
#[inline(always)]
fn transpose_eight(mut a: [__m256; HALF]) -> [__m256; HALF] {
    let mut b = a;
    for i in [0, 2, 4, 6] {
        (b[i], b[i + 1]) = simd!((_mm256_unpacklo_ps(a[i], a[i + 1]), _mm256_unpackhi_ps(a[i], a[i + 1])));
    }
    for i in [0, 1, 4, 5] {
        let (x, y) = (b[i], b[i + 2]);
        let first = i / 4 * 4 + i % 4 * 2;
        a[first] = simd!(_mm256_shuffle_ps::<0x44>(x, y));
        a[first + 1] = simd!(_mm256_shuffle_ps::<0xEE>(x, y));
    }
    for i in 0..4 {
        let (x, y) = (a[i], a[i + 4]);
        b[i] = simd!(_mm256_permute2f128_ps::<0x20>(x, y));
        b[i + 4] = simd!(_mm256_permute2f128_ps::<0x31>(x, y));
    }
    b
}

impl Avx2 {
    pub(crate) fn detect() -> Option<Avx2> {
        let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        has.then_some(Avx2(()))
    }
}

impl From<Avx512> for Avx2 {
    /// AVX2 and FMA are among what AVX-512 is detected by.
    #[inline(always)]
    fn from(_: Avx512) -> Avx2 {
        Avx2(())
    }
}

impl F32 {
    #[inline(always)]
    fn zip(self, other: F32, f: impl Fn(__m256, __m256) -> __m256) -> F32 {
        F32(f(self.0, other.0), f(self.1, other.1))
    }

    #[inline(always)]
    fn map(self, f: impl Fn(__m256) -> __m256) -> F32 {
        F32(f(self.0), f(self.1))
    }
}

impl Simd for Avx2 {
    type V = F32;
    const MR: usize = 6;
    const NV: usize = 1;
    type Narrow = Avx2;

    #[inline(always)]
    fn narrow(self) -> Avx2 {
        self
    }

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        fn frame<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        simd!(frame(f))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F32 {
        let x = simd!(_mm256_set1_ps(x));
        F32(x, x)
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> F32 {
        let x = &x[..LANES];
        // SAFETY: `x` holds sixteen elements.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_partial(self, x: &[f32], fill: F32) -> F32 {
        let (first, second) = x.split_at(x.len().min(HALF));
        F32(load_half(first, fill.0), load_half(second, fill.1))
    }

    #[inline(always)]
    unsafe fn load_ptr(self, ptr: *const f32) -> F32 {
        // SAFETY: the invariant of this file; the caller vouches for the pointer.
        unsafe { F32(_mm256_loadu_ps(ptr), _mm256_loadu_ps(ptr.add(HALF))) }
    }

    #[inline(always)]
    fn transpose(self, rows: [F32; LANES]) -> [F32; LANES] {
        let mut columns = rows;
        let [mut upper, mut lower] = [[rows[0].0; HALF]; 2];
        for side in 0..2 {
            for i in 0..HALF {
                let (a, b) = (rows[i], rows[i + HALF]);
                (upper[i], lower[i]) = if side == 0 { (a.0, b.0) } else { (a.1, b.1) };
            }
            let (first, second) = (transpose_eight(upper), transpose_eight(lower));
            for i in 0..HALF {
                columns[side * HALF + i] = F32(first[i], second[i]);
            }
        }
        columns
    }
}

impl Add for F32 {
    type Output = F32;
    #[inline(always)]
    fn add(self, other: F32) -> F32 {
        self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_add_ps(a, b)),
        )
    }
}

impl Sub for F32 {
    type Output = F32;
    #[inline(always)]
    fn sub(self, other: F32) -> F32 {
        self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_sub_ps(a, b)),
        )
    }
}

impl Mul for F32 {
    type Output = F32;
    #[inline(always)]
    fn mul(self, other: F32) -> F32 {
        self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_mul_ps(a, b)),
        )
    }
}

impl Div for F32 {
    type Output = F32;
    #[inline(always)]
    fn div(self, other: F32) -> F32 {
        self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_div_ps(a, b)),
        )
    }
}

impl Vector for F32 {
    type Mask = Mask;

    #[inline(always)]
    fn mul_add(self, a: F32, b: F32) -> F32 {
        simd!(F32(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)))
    }

    #[inline(always)]
    fn neg_mul_add(self, a: F32, b: F32) -> F32 {
        simd!(F32(_mm256_fnmadd_ps(self.0, a.0, b.0), _mm256_fnmadd_ps(self.1, a.1, b.1)))
    }

    #[inline(always)]
    fn max(self, other: F32) -> F32 {
        self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_max_ps(a, b)),
        )
    }

    #[inline(always)]
    fn min(self, other: F32) -> F32 {
        self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_min_ps(a, b)),
        )
    }

    #[inline(always)]
    fn abs(self) -> F32 {
        self.map(
            #[inline(always)]
            |a| simd!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a)),
        )
    }

    #[inline(always)]
    fn copysign(self, sign: F32) -> F32 {
        let bit = simd!(_mm256_set1_ps(-0.0));
        self.zip(
            sign,
            #[inline(always)]
            |mag, sign| simd!(_mm256_or_ps(_mm256_and_ps(bit, sign), _mm256_andnot_ps(bit, mag))),
        )
    }

    #[inline(always)]
    fn sqrt(self) -> F32 {
        self.map(
            #[inline(always)]
            |a| simd!(_mm256_sqrt_ps(a)),
        )
    }

    #[inline(always)]
    fn lt(self, other: F32) -> Mask {
        let F32(low, high) = self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b)),
        );
        Mask(low, high)
    }

    #[inline(always)]
    fn not_lt(self, other: F32) -> Mask {
        let F32(low, high) = self.zip(
            other,
            #[inline(always)]
            |a, b| simd!(_mm256_cmp_ps::<_CMP_NLT_UQ>(a, b)),
        );
        Mask(low, high)
    }

    #[inline(always)]
    fn mask(self, bits: u16) -> Mask {
        Mask(spread(bits), spread(bits >> HALF))
    }

    #[inline(always)]
    fn select(self, mask: Mask, other: F32) -> F32 {
        // What is known of the operands, such as a zero, is seen in these, and not in a blend.
        let mask = F32(mask.0, mask.1);
        let kept = self.zip(
            mask,
            #[inline(always)]
            |a, mask| simd!(_mm256_and_ps(mask, a)),
        );
        let others = other.zip(
            mask,
            #[inline(always)]
            |b, mask| simd!(_mm256_andnot_ps(mask, b)),
        );
        kept.zip(
            others,
            #[inline(always)]
            |a, b| simd!(_mm256_or_ps(a, b)),
        )
    }

    #[inline(always)]
    fn exp2_magic(self) -> F32 {
        self.map(
            #[inline(always)]
            |a| simd!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(a)))),
        )
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        let out = &mut out[..LANES];
        // SAFETY: `out` holds sixteen elements.
        unsafe { self.store_ptr(out.as_mut_ptr()) }
    }

    #[inline(always)]
    fn store_partial(self, out: &mut [f32]) {
        let n = out.len().min(HALF);
        let (first, second) = out.split_at_mut(n);
        // SAFETY: the invariant of this file; only lanes below the slices' lengths are written.
        unsafe {
            _mm256_maskstore_ps(first.as_mut_ptr(), low(first.len()), self.0);
            _mm256_maskstore_ps(second.as_mut_ptr(), low(second.len()), self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_ptr(self, ptr: *mut f32) {
        // SAFETY: the invariant of this file; the caller vouches for the pointer.
        unsafe {
            _mm256_storeu_ps(ptr, self.0);
            _mm256_storeu_ps(ptr.add(HALF), self.1);
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        simd!({
            let eight = _mm256_add_ps(self.0, self.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        simd!({
            let eight = _mm256_max_ps(self.0, self.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
}
