//! Comparisons with the f64 reference, and of bits.

use laneformer::Isa;

/// How far `actual` is from `exact`, in units in the last place of an f32 near `exact`. 0 for NaN and NaN or equal infinities;
/// infinite if one is NaN, or infinite, and the other is not.
pub fn ulps(actual: f32, exact: f64) -> f64 {
    if actual.is_nan() || exact.is_nan() {
        return if actual.is_nan() && exact.is_nan() { 0.0 } else { f64::INFINITY };
    }
    // Beyond the largest finite f32 by half a unit, infinity is the right answer.
    let largest = f64::from(f32::MAX);
    let unit = if exact.abs() >= largest { 2_f64.powi(104) } else { ulp(exact) };
    if actual.is_infinite() {
        let beyond = largest + unit / 2.0;
        let short = beyond - exact.abs();
        return if f64::from(actual.signum()) != exact.signum() {
            f64::INFINITY
        } else {
            (short / unit).max(0.0)
        };
    }
    (f64::from(actual) - exact).abs() / unit
}

/// The distance of two f32 at `x`, that of subnormal numbers near 0.
pub fn ulp(x: f64) -> f64 {
    let exponent = ((x.to_bits() >> 52) & 0x7FF) as i32 - 1023;
    2_f64.powi(exponent.max(-126) - 23)
}

/// How much farther than the others an instruction set may be from the reference: without a fused multiply-add every step rounds twice.
pub fn slack(isa: Isa) -> f64 {
    if isa.keeps_bits() { 1.0 } else { 4.0 }
}

/// Each value within its `limit(index, expected)`; NaN meets NaN and an infinity itself.
#[track_caller]
pub fn assert_within(actual: &[f32], expected: &[f64], limit: impl Fn(usize, f64) -> f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let a = f64::from(a);
        let same = (a.is_nan() && e.is_nan()) || a == e;
        let limit = limit(i, e);
        let error = (a - e).abs();
        assert!(same || error <= limit, "{what}: element {i} is {a:e}, not {e:e}: {error:.2e} > {limit:.2e}");
    }
}

/// Every value within `limit`, absolute.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f64], limit: f64, what: &str) {
    assert_within(actual, expected, |_, _| limit, what);
}

/// The same bits; NaN meets any NaN, whose payload is not part of the promise.
#[track_caller]
pub fn assert_bits(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let same = a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan());
        assert!(same, "{what}: element {i} is {a:e} ({:#x}), not {e:e} ({:#x})", a.to_bits(), e.to_bits());
    }
}
