//! Elementary functions, generic over the lane type: the same operations in the same order on every instruction set.
//!
//! All are free of branches and tables. Exponentials reduce by `x = n ln 2 + r` with `n` rounded by adding a magic number, whose
//! low bits then are the exponent of `2^n` (Cody and Waite 1980). The coefficients are our own minimax fits (Lawson's weights in
//! f64, rounded one after another, then a search over neighbouring f32 for the least error of the exact sequence below). The bounds
//! are from exhaustive sweeps over f32 and are checked by `tests/math.rs`.

use crate::simd::{Simd, Vector};

/// `1.5 * 2^23 + 127`: after `t = y + MAGIC` the low bits of `t` are `round(y) + 127`.
const MAGIC: f32 = 12_583_039.0;
const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// `c[0] x^(n-1) + ... + c[n-1]` by Horner's rule.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::V, c: [f32; N]) -> S::V {
    let mut p = s.splat(c[0]);
    for &c in &c[1..] {
        p = p.mul_add(x, s.splat(c));
    }
    p
}

/// `max(0, x)`: NaN stays NaN, -0 stays -0.
#[inline(always)]
pub(crate) fn relu<S: Simd>(s: S, x: S::V) -> S::V {
    s.splat(0.0).max(x)
}

/// `e^x` over the whole range, at most 0.91 ULP. Underflows gradually: `2^n` is two exact factors.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // ln 2 in two parts; the first has few enough bits that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let magic = s.splat(MAGIC);
    // The ends of the range: beyond them the result is 0 or infinite anyway, and n stays within two exponents.
    let x = s.splat(89.0).min(s.splat(-104.0).max(x));
    let t = x.mul_add(s.splat(LOG2_E), magic);
    let n = t - magic;
    let r = n.neg_mul_add(s.splat(LN2_HIGH), x);
    let r = n.neg_mul_add(s.splat(LN2_LOW), r);
    let p = polynomial(
        s,
        r,
        [1.379_047_6e-3, 8.368_506e-3, 4.166_877_6e-2, 1.666_652e-1, 4.999_999e-1, 1.0, 1.0],
    );
    let half = n.mul_add(s.splat(0.5), magic);
    let other = t - (half - magic);
    p * half.exp2_magic() * other.exp2_magic()
}

/// `e^x` for `x <= 0`, for softmax and attention: 1 at 0, and 0 below -87.3365, where the result would leave the normal numbers.
///
/// At most 2.1 ULP for `x > -10`, where it matters beside a maximum of 1, and 4.7 ULP overall: one step of reduction
/// and degree 5 save two of the ten multiply-adds of [`exp`].
#[inline(always)]
pub(crate) fn exp_nonpositive<S: Simd>(s: S, x: S::V) -> S::V {
    // The smallest x whose exponential is a normal number.
    const LOWEST: f32 = -87.336_54;
    let magic = s.splat(MAGIC);
    let t = x.mul_add(s.splat(LOG2_E), magic);
    let r = (t - magic).neg_mul_add(s.splat(core::f32::consts::LN_2), x);
    let p = polynomial(s, r, [8.262_925e-3, 4.189_913_7e-2, 1.666_811e-1, 4.999_914e-1, 9.999_995e-1, 1.0]);
    let y = p * t.exp2_magic();
    y.select(x.not_lt(s.splat(LOWEST)), s.splat(0.0))
}

/// `tanh x = e / (e + 2)` with `e = exp(2 |x|) - 1` and the sign restored, at most 2.5 ULP.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let magic = s.splat(MAGIC);
    // 1 to the last bit from 9.02 on.
    let a = s.splat(10.0).min(x.abs());
    let t = a.mul_add(s.splat(2.0 * LOG2_E), magic);
    let r = (t - magic).neg_mul_add(s.splat(0.5 * core::f32::consts::LN_2), a);
    let q = polynomial(s, r, [8.876_826_6e-2, 2.677_241e-1, 6.666_873e-1, 1.333_323_6, 2.0]);
    // exp(2r) - 1, kept small so that a small tanh keeps its digits.
    let w = (r * r).mul_add(q, r + r);
    let power = t.exp2_magic();
    let e = power.mul_add(w, power - s.splat(1.0));
    (e / (e + s.splat(2.0))).copysign(x)
}

/// The error function as `1 - (1 - e)^8` for `|x|`, each squaring in the form `2e - e^2` that keeps a small result's digits; no division.
/// At most 3.5 ULP for `|x| >= 8.4e-38`, and 5 ULP below, where the first product is subnormal.
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    // 1 to the last bit from 3.93 on.
    let a = s.splat(3.953_125).min(x.abs());
    let v = polynomial(
        s,
        a,
        [
            4.785_471_4e-6,
            -8.875_190_5e-5,
            5.124_606_5e-4,
            -1.858_889_3e-4,
            -6.589_699_5e-3,
            2.089_166e-3,
            6.963_035e-2,
            -7.329_333_6e-9,
        ],
    );
    let mut e = a.mul_add(s.splat(1.410_474e-1), a * v);
    for _ in 0..3 {
        e = e.neg_mul_add(e, e + e);
    }
    e.copysign(x)
}

/// `relu(x) - a * P(-a)` with `a = |x|` and `P` the normal distribution's tail, a fourth power of a polynomial; no division.
///
/// `x` for `x > limit` and 0 for `x < -limit`. -inf gives NaN, as the formulas of both gelus do (`-inf * 0`).
#[inline(always)]
fn gelu<S: Simd, const N: usize>(s: S, x: S::V, limit: f32, c: [f32; N]) -> S::V {
    let zero = s.splat(0.0);
    let limit = s.splat(limit);
    let a = limit.min(x).abs();
    let p = polynomial(s, a, c);
    let p = p * p;
    let p = (p * p).select(a.lt(limit), zero);
    a.neg_mul_add(p, zero.max(x))
}

/// `x / 2 * (1 + erf(x / sqrt 2))`, absolute error at most `1.6e-7 max(1, |x|)`, and 4e-7 below -5.25.
#[inline(always)]
pub(crate) fn gelu_erf<S: Simd>(s: S, x: S::V) -> S::V {
    gelu(
        s,
        x,
        5.25,
        [
            -3.303_985_7e-6,
            5.710_371_6e-5,
            -3.002_173e-4,
            -5.574_843e-5,
            3.828_093_9e-3,
            4.621_657e-3,
            -5.018_574_4e-2,
            -1.677_359e-1,
            8.408_964e-1,
        ],
    )
}

/// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, absolute error at most `1.6e-7 max(1, |x|)`, and 3e-7 below -5.
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    gelu(
        s,
        x,
        5.0,
        [
            1.876_006_2e-6,
            -3.500_924e-5,
            2.584_780_2e-4,
            -8.837_434e-4,
            7.196_570_5e-4,
            3.215_701_3e-3,
            5.100_633_5e-3,
            -5.027_255_4e-2,
            -1.677_271_9e-1,
            8.408_963_7e-1,
        ],
    )
}

/// `x / (1 + 2^y)`, absolute error at most `2e-7 max(1, |x|)`.
#[inline(always)]
fn logistic<S: Simd>(s: S, x: S::V, y: S::V) -> S::V {
    let magic = s.splat(MAGIC);
    // 2^-127 becomes 0 and 2^128 infinite: the right limits, and no exponent beyond them.
    let y = s.splat(128.0).min(s.splat(-127.0).max(y));
    let t = y + magic;
    let p = polynomial(
        s,
        y - (t - magic),
        [1.322_441_5e-3, 9.670_418e-3, 5.550_775e-2, 2.402_222_3e-1, 6.931_472e-1, 1.0],
    );
    x / p.mul_add(t.exp2_magic(), s.splat(1.0))
}

/// `x * sigmoid(x)`. -inf gives NaN, as the formula does.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    logistic(s, x, x * s.splat(-LOG2_E))
}

/// `x * sigmoid(1.702 x)`. -inf gives NaN, as the formula does.
#[inline(always)]
pub(crate) fn quick_gelu<S: Simd>(s: S, x: S::V) -> S::V {
    logistic(s, x, x * s.splat(-1.702 * LOG2_E))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, dispatch};
    use crate::simd::LANES;

    /// Every `step`-th argument from -0 to the lowest, the last ones too: `tests/math.rs` only sees what is public.
    fn sweep_exp_nonpositive(isa: Isa, step: usize) {
        let arguments = (0x8000_0000..=f32::NEG_INFINITY.to_bits()).step_by(step);
        let mut arguments = arguments.chain([f32::MIN.to_bits(), f32::NEG_INFINITY.to_bits()]).peekable();
        while arguments.peek().is_some() {
            let mut x = [0.0; LANES];
            x.iter_mut().zip(&mut arguments).for_each(|(x, bits)| *x = f32::from_bits(bits));
            let mut y = [0.0; LANES];
            dispatch!(isa, |s| s.vectorize(
                #[inline(always)]
                || exp_nonpositive(s, s.load(&x)).store(&mut y)
            ));
            for (x, y) in x.into_iter().zip(y) {
                let exact = f64::from(x).exp();
                if exact < f64::from(f32::MIN_POSITIVE) {
                    assert_eq!(y, 0.0, "{isa}: {x:e}");
                    continue;
                }
                let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                let bound = if x > -10.0 { 2.1 } else { 4.7 };
                let error = (f64::from(y) - exact).abs() / unit;
                assert!(error <= bound, "{isa}: exp({x:e}) is {y:e}: {error} units");
            }
        }
    }

    #[test]
    fn exp_of_softmax_meets_its_bounds() {
        // The bounds are those of a fused multiply-add; what the others make of it is seen in tests of softmax.
        for isa in Isa::available().into_iter().filter(|isa| isa.keeps_bits()) {
            sweep_exp_nonpositive(isa, 1009);
        }
    }

    #[test]
    #[ignore = "all 2^31 arguments take half a minute: a step of its own in .ci/run"]
    fn exp_of_softmax_meets_its_bounds_everywhere() {
        sweep_exp_nonpositive(Isa::best(), 1);
    }
}
