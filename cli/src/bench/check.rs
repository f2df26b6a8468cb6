//! Answers against the f64 reference, on a sample of rows.

use laneformer::reference;

use crate::bench::measure::Deviation;

/// Rows that are compared: at least as many, or all.
pub const SAMPLE: usize = 64;

/// Up to `count` of `rows` rows, spread evenly, the first and the last among them.
pub fn sample(rows: usize, count: usize) -> Vec<usize> {
    if rows <= count {
        return (0..rows).collect();
    }
    (0..count).map(|i| i * (rows - 1) / (count - 1).max(1)).collect()
}

/// The rows of `x` [_, cols] that `rows` names, in f64.
pub fn gather(x: &[f32], cols: usize, rows: &[usize]) -> Vec<f64> {
    rows.iter().flat_map(|row| reference::to_f64(&x[row * cols..(row + 1) * cols])).collect()
}

/// Compares `got` with `want`; an error of `tolerance` of the largest wanted value is right.
pub fn compare(got: &[f64], want: &[f64], tolerance: f64) -> Deviation {
    assert_eq!(got.len(), want.len());
    let error = |(g, w): (&f64, &f64)| {
        let error = (g - w).abs();
        if error.is_nan() { f64::INFINITY } else { error }
    };
    let max_err = got.iter().zip(want).map(error).fold(0.0, f64::max);
    let largest = want.iter().fold(0.0, |max: f64, w| max.max(w.abs()));
    Deviation { max_err, limit: tolerance * largest }
}

/// An error of 0 where all bits agree. Where they need not, the usual tolerance.
pub fn same_bits(keeps_bits: bool, got: &[f32], want: &[f32]) -> Deviation {
    let deviation = compare(&reference::to_f64(got), &reference::to_f64(want), 1e-5);
    if !keeps_bits {
        return deviation;
    }
    let differs = got.iter().zip(want).any(|(got, want)| got.to_bits() != want.to_bits());
    Deviation { max_err: if differs { deviation.max_err.max(f64::MIN_POSITIVE) } else { 0.0 }, limit: 0.0 }
}

/// `x W^T + b`: [`reference::linear`] with each product summed in [`SUMS`] parts, which the compiler turns into vectors.
/// One chain of f64 additions would take seconds for a layer.
pub fn linear(x: &[f64], weight: &[f32], bias: Option<&[f32]>, in_features: usize) -> Vec<f64> {
    let out_features = weight.len() / in_features;
    let mut out = vec![0.0; x.len() / in_features * out_features];
    for (n, w) in weight.chunks_exact(in_features).enumerate() {
        let w = reference::to_f64(w);
        let bias = bias.map_or(0.0, |b| f64::from(b[n]));
        for (x, out) in x.chunks_exact(in_features).zip(out.chunks_exact_mut(out_features)) {
            out[n] = dot(x, &w) + bias;
        }
    }
    out
}

/// Parts of a sum, enough to hide the latency of an addition.
const SUMS: usize = 16;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<SUMS>();
    let (b, b_rest) = b.as_chunks::<SUMS>();
    let mut sums = [0.0; SUMS];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::data::Buffer;

    #[test]
    fn samples_are_spread_and_unique() {
        assert_eq!(sample(3, 64), [0, 1, 2]);
        assert_eq!(sample(10, 4), [0, 3, 6, 9]);
        for rows in [64, 65, 100, 1024] {
            let rows_sampled = sample(rows, SAMPLE);
            assert_eq!((rows_sampled.len(), rows_sampled[0], rows_sampled[SAMPLE - 1]), (64, 0, rows - 1));
            assert!(rows_sampled.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        assert_eq!(compare(&[1.0, -2.0], &[1.5, -2.0], 1e-3).max_err, 0.5);
        assert_eq!(compare(&[1.0, -2.0], &[1.5, -2.0], 1e-3).limit, 2e-3);
        assert_eq!(compare(&[f64::NAN, 0.0], &[1.0, 0.0], 1.0).max_err, f64::INFINITY);
    }

    #[test]
    fn linear_is_that_of_the_reference() {
        let (k, n) = (37, 5);
        let (w, b) = (Buffer::uniform(n * k, 1.0, 1), Buffer::uniform(n, 1.0, 2));
        let x = reference::to_f64(&Buffer::uniform(3 * k, 1.0, 3));
        let (weight, bias) = (reference::to_f64(&w), reference::to_f64(&b));
        let map = reference::Linear { weight: &weight, bias: Some(&bias), in_features: k };
        let want = reference::linear(&x, &map, |x| x, None);
        assert!(compare(&linear(&x, &w, Some(&b), k), &want, 1e-14).max_err < 1e-14);
    }
}
