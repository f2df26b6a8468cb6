//! The specification: every operation once more, naive and in f64, to be read on its own and tested against.
//!
//! All slices are contiguous and row-major; fitting shapes are a precondition (most others panic). Values
//! that come from f32 are exact here, and so is a product of two of them; what remains are roundings of f64,
//! each 2^-29 of one of f32.

#![allow(missing_docs, reason = "fields are the symbols of the formulas beside them")]

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_2_SQRT_PI};
use std::ops::Range;
use std::slice::ChunksExact;

/// Widens f32 values; exact.
pub fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

// ---- Functions of one value -------------------------------------------------------------------------------

/// e^x.
pub fn exp(x: f64) -> f64 {
    x.exp()
}

/// tanh(x).
pub fn tanh(x: f64) -> f64 {
    x.tanh()
}

/// erf(x) = 2/sqrt(pi) * integral of e^(-t^2) from 0 to x; error below 1e-15.
pub fn erf(x: f64) -> f64 {
    if x.abs() < ERF_SPLIT { erf_series(x) } else { (1.0 - erfc_fraction(x.abs())).copysign(x) }
}

/// erfc(x) = 1 - erf(x), without the cancellation for large x; relative error below 1e-13.
pub fn erfc(x: f64) -> f64 {
    if x < ERF_SPLIT { 1.0 - erf(x) } else { erfc_fraction(x) }
}

/// Below it the series is short, from it on the continued fraction is.
const ERF_SPLIT: f64 = 1.5;

/// erf(x) = 2/sqrt(pi) e^(-x^2) (x + 2x^3/3 + 4x^5/(3*5) + ...): all terms have one sign, so nothing cancels.
fn erf_series(x: f64) -> f64 {
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while term.abs() > f64::EPSILON / 8.0 * sum.abs() {
        odd += 2.0;
        term *= 2.0 * x * x / odd;
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// erfc(x) = e^(-x^2)/sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...)))) for x >= [`ERF_SPLIT`].
fn erfc_fraction(x: f64) -> f64 {
    let fraction = (1..=80).rev().fold(x, |tail, n| x + 0.5 * f64::from(n) / tail);
    0.5 * FRAC_2_SQRT_PI * (-x * x).exp() / fraction
}

/// max(0, x); NaN stays NaN and -0 stays -0.
pub fn relu(x: f64) -> f64 {
    if 0.0 > x { 0.0 } else { x }
}

/// x * Phi(x) = x/2 * (1 + erf(x / sqrt(2))); NaN at -inf.
pub fn gelu_erf(x: f64) -> f64 {
    // 1 + erf(t) = erfc(-t), which keeps its digits where erf is near -1.
    0.5 * x * erfc(-x * FRAC_1_SQRT_2)
}

/// x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))); NaN at -inf.
pub fn gelu_tanh(x: f64) -> f64 {
    // (1 + tanh(t)) / 2 = sigmoid(2t), which keeps its digits where tanh is near -1.
    x * sigmoid(2.0 * FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x))
}

/// x * sigmoid(1.702 x); NaN at -inf.
pub fn quick_gelu(x: f64) -> f64 {
    x * sigmoid(1.702 * x)
}

/// x * sigmoid(x); NaN at -inf.
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// 1 / (1 + e^-x).
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

// ---- Rows -------------------------------------------------------------------------------------------------

/// e^(x - max) / sum of them, per row of `x` [rows, cols].
/// A row of -inf (nothing to choose from) gives 0; a row with NaN or +inf gives NaN.
pub fn softmax(x: &[f64], cols: usize) -> Vec<f64> {
    map_rows(x, cols, |row| {
        if row.iter().any(|x| x.is_nan() || *x == f64::INFINITY) {
            return vec![f64::NAN; cols];
        }
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            return vec![0.0; cols];
        }
        let total = sum(row.iter().map(|x| (x - max).exp()));
        row.iter().map(|x| (x - max).exp() / total).collect()
    })
}

/// gain * (x - mean) / sqrt(var + eps) + bias, per row of `x` [rows, gain.len()], with its biased variance.
pub fn layernorm(x: &[f64], gain: &[f64], bias: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let cols = gain.len();
    map_rows(x, cols, |row| {
        let (mean, var) = mean_and_variance(row);
        let normed = |c: usize| (row[c] - mean) / (var + eps).sqrt();
        (0..cols).map(|c| gain[c] * normed(c) + bias.map_or(0.0, |b| b[c])).collect()
    })
}

/// gain * x / sqrt(mean(x^2) + eps), per row of `x` [rows, gain.len()].
pub fn rmsnorm(x: &[f64], gain: &[f64], eps: f64) -> Vec<f64> {
    let cols = gain.len();
    map_rows(x, cols, |row| {
        let mean_square = dot(row, row) / cols as f64;
        (0..cols).map(|c| gain[c] * row[c] / (mean_square + eps).sqrt()).collect()
    })
}

/// gain * (x - mean) / sqrt(var + eps) + bias, with given statistics per channel; `x` [rows, gain.len()].
pub fn batchnorm(x: &[f64], gain: &[f64], bias: &[f64], mean: &[f64], var: &[f64], eps: f64) -> Vec<f64> {
    let cols = gain.len();
    map_rows(x, cols, |row| {
        (0..cols).map(|c| gain[c] * (row[c] - mean[c]) / (var[c] + eps).sqrt() + bias[c]).collect()
    })
}

/// What [`batchnorm_train`] gives: the output, then per channel the statistics of the batch and the updated
/// running ones.
#[derive(Clone, Debug)]
pub struct BatchNormTrained {
    pub y: Vec<f64>,
    pub batch_mean: Vec<f64>,
    /// Biased.
    pub batch_var: Vec<f64>,
    pub running_mean: Vec<f64>,
    pub running_var: Vec<f64>,
}

/// [`batchnorm`] with the mean and the biased variance of the n valid rows (`None`: all); other rows stay.
///
/// running = (1 - momentum) * running + momentum * batch, where the variance enters unbiased (times
/// n / (n - 1)), or biased for n = 1, where that is undefined. For n = 0 the batch statistics are 0 and the
/// running ones stay.
pub fn batchnorm_train(
    x: &[f64],
    valid: Option<&[bool]>,
    gain: &[f64],
    bias: &[f64],
    eps: f64,
    running_mean: &[f64],
    running_var: &[f64],
    momentum: f64,
) -> BatchNormTrained {
    let channels = gain.len();
    let is_valid = |row: usize| valid.is_none_or(|v| v[row]);
    let valid_rows: Vec<&[f64]> =
        rows(x, channels).enumerate().filter(|(r, _)| is_valid(*r)).map(|(_, row)| row).collect();
    let n = valid_rows.len() as f64;
    let statistics = (0..channels).map(|c| {
        let channel: Vec<f64> = valid_rows.iter().map(|row| row[c]).collect();
        if channel.is_empty() { (0.0, 0.0) } else { mean_and_variance(&channel) }
    });
    let (batch_mean, batch_var): (Vec<f64>, Vec<f64>) = statistics.unzip();

    let normed = batchnorm(x, gain, bias, &batch_mean, &batch_var, eps);
    let y = (0..x.len()).map(|i| if is_valid(i / channels) { normed[i] } else { x[i] }).collect();
    let momentum = if n == 0.0 { 0.0 } else { momentum };
    let unbias = if n > 1.0 { n / (n - 1.0) } else { 1.0 };
    let update = |running: f64, batch: f64| (1.0 - momentum) * running + momentum * batch;
    BatchNormTrained {
        y,
        running_mean: (0..channels).map(|c| update(running_mean[c], batch_mean[c])).collect(),
        running_var: (0..channels).map(|c| update(running_var[c], batch_var[c] * unbias)).collect(),
        batch_mean,
        batch_var,
    }
}

// ---- Products ---------------------------------------------------------------------------------------------

/// c = a b; `a` [m, k], `b` [k, n], c [m, n].
pub fn matmul(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    assert_eq!((a.len(), b.len()), (m * k, k * n));
    let element = |i: usize, j: usize| sum((0..k).map(|p| a[i * k + p] * b[p * n + j]));
    (0..m * n).map(|ij| element(ij / n, ij % n)).collect()
}

/// A linear map: `weight` [out_features, in_features] and `bias`, out_features values.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    pub weight: &'a [f64],
    pub bias: Option<&'a [f64]>,
    pub in_features: usize,
}

/// activation(x W^T + b) + scale * residual; `x` [rows, in_features], residual (scale, [rows, out_features]).
/// No activation: `|x| x`.
pub fn linear(
    x: &[f64],
    linear: &Linear<'_>,
    activation: fn(f64) -> f64,
    residual: Option<(f64, &[f64])>,
) -> Vec<f64> {
    let &Linear { weight, bias, in_features } = linear;
    let out = map_rows(x, in_features, |row| {
        let products = rows(weight, in_features).map(|w| dot(row, w)).enumerate();
        products.map(|(n, product)| activation(product + bias.map_or(0.0, |b| b[n]))).collect()
    });
    match residual {
        Some((scale, residual)) => add_scaled(&out, scale, residual),
        None => out,
    }
}

// ---- Attention --------------------------------------------------------------------------------------------

/// Rotary positions: with the angle of a row's position times the frequency of pair i, its columns a and b become a cos - b sin and
/// b cos + a sin in every head. Pair i is columns 2i and 2i + 1 if `interleaved`, else i and i + frequencies.len().
/// `x` [rows, heads * head_dim].
pub fn rotary(
    x: &[f64],
    head_dim: usize,
    frequencies: &[f64],
    interleaved: bool,
    positions: &[usize],
) -> Vec<f64> {
    let (half, mut out) = (frequencies.len(), x.to_vec());
    if positions.is_empty() {
        return out;
    }
    let cols = x.len() / positions.len();
    for (row, &position) in out.chunks_exact_mut(cols).zip(positions) {
        for head in row.chunks_exact_mut(head_dim) {
            for (i, frequency) in frequencies.iter().enumerate() {
                let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
    }
    out
}

/// base^(-2i / rotary_dim), the frequencies of [`rotary`].
pub fn rotary_frequencies(rotary_dim: usize, base: f64) -> Vec<f64> {
    (0..rotary_dim / 2).map(|i| base.powf(-2.0 * i as f64 / rotary_dim as f64)).collect()
}

/// The shape of an attention and how its scores are finished.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads, Hq.
    pub n_heads: usize,
    /// Key and value heads, Hkv, which divide Hq: query head h reads head floor(h * Hkv / Hq).
    pub n_kv_heads: usize,
    /// Width of a query and a key head, D.
    pub head_dim: usize,
    /// Width of a value head, Dv.
    pub value_dim: usize,
    /// Factor of q.k, usually 1 / sqrt(D).
    pub scale: f64,
    /// c of s = c * tanh(s / c).
    pub softcap: Option<f64>,
}

/// Attention inside one segment: out_i = sum over the allowed j of softmax(s_i)_j * v_j, per head, with
/// s_ij = softcap(scale * q_i.k_j) + bias(head, i, j).
/// `q` [tq, Hq*D], `k` [tk, Hkv*D], `v` [tk, Hkv*Dv], out [tq, Hq*Dv].
///
/// Key j is allowed if `allowed(head, i, j)` and its bias is not -inf. What is not allowed is not read,
/// whatever it holds; a row without an allowed key is 0. Relative-position and segment terms are a bias,
/// unless there is a soft cap.
pub fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    shape: &Attention,
    allowed: impl Fn(usize, usize, usize) -> bool,
    bias: impl Fn(usize, usize, usize) -> f64,
) -> Vec<f64> {
    let &Attention { n_heads, n_kv_heads, head_dim, value_dim, scale, softcap } = shape;
    let queries: Vec<_> = rows(q, n_heads * head_dim).collect();
    let keys: Vec<_> = rows(k, n_kv_heads * head_dim).collect();
    let values: Vec<_> = rows(v, n_kv_heads * value_dim).collect();
    assert_eq!(keys.len(), values.len());

    let mut out = Vec::new();
    for (i, query) in queries.iter().enumerate() {
        for h in 0..n_heads {
            let kv_head = h * n_kv_heads / n_heads;
            let query = part(query, h..h + 1, head_dim);
            let key = |j: usize| part(keys[j], kv_head..kv_head + 1, head_dim);
            let value = |j: usize| part(values[j], kv_head..kv_head + 1, value_dim);
            let capped = |s: f64| softcap.map_or(s, |c| c * (s / c).tanh());
            let sees = |j: &usize| allowed(h, i, *j) && bias(h, i, *j) != f64::NEG_INFINITY;

            let seen: Vec<usize> = (0..keys.len()).filter(sees).collect();
            let scores: Vec<f64> =
                seen.iter().map(|&j| capped(scale * dot(query, key(j))) + bias(h, i, j)).collect();
            let weights = softmax(&scores, scores.len());
            let mixed = |c: usize| sum(seen.iter().zip(&weights).map(|(&j, weight)| weight * value(j)[c]));
            out.extend((0..value_dim).map(mixed));
        }
    }
    out
}

/// [`attention`] of packed segments: segment s has queries `q_offsets[s]..q_offsets[s + 1]` and keys
/// `k_offsets[s]..k_offsets[s + 1]`. The closures get (segment, head, i, j); i, j count inside the segment.
pub fn attention_packed(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    shape: &Attention,
    q_offsets: &[usize],
    k_offsets: &[usize],
    allowed: impl Fn(usize, usize, usize, usize) -> bool,
    bias: impl Fn(usize, usize, usize, usize) -> f64,
) -> Vec<f64> {
    let &Attention { n_heads, n_kv_heads, head_dim, value_dim, .. } = shape;
    assert_eq!(q_offsets.len(), k_offsets.len());
    let segments = q_offsets.windows(2).zip(k_offsets.windows(2)).enumerate();
    segments
        .flat_map(|(s, (queries, keys))| {
            let q = part(q, queries[0]..queries[1], n_heads * head_dim);
            let k = part(k, keys[0]..keys[1], n_kv_heads * head_dim);
            let v = part(v, keys[0]..keys[1], n_kv_heads * value_dim);
            attention(q, k, v, shape, |h, i, j| allowed(s, h, i, j), |h, i, j| bias(s, h, i, j))
        })
        .collect()
}

// ---- The layer --------------------------------------------------------------------------------------------

/// Self-attention with its projections: q gives [T, Hq*D], k [T, Hkv*D], v [T, Hkv*Dv]; out takes [T, Hq*Dv].
#[derive(Clone, Copy, Debug)]
pub struct SelfAttention<'a> {
    pub q: Linear<'a>,
    pub k: Linear<'a>,
    pub v: Linear<'a>,
    pub out: Linear<'a>,
    pub shape: Attention,
}

/// out(attention(q(x), k(x), v(x))) over the segments `offsets` of `x`; closures as in [`attention_packed`].
pub fn self_attention(
    x: &[f64],
    weights: &SelfAttention<'_>,
    offsets: &[usize],
    allowed: impl Fn(usize, usize, usize, usize) -> bool,
    bias: impl Fn(usize, usize, usize, usize) -> f64,
) -> Vec<f64> {
    let project = |x: &[f64], w: &Linear<'_>| linear(x, w, |x| x, None);
    let (q, k, v) = (project(x, &weights.q), project(x, &weights.k), project(x, &weights.v));
    project(&attention_packed(&q, &k, &v, &weights.shape, offsets, offsets, allowed, bias), &weights.out)
}

/// The position-wise feed-forward network: `w1` [d_ff, d_model], `w2` [d_model, d_ff].
#[derive(Clone, Copy, Debug)]
pub struct Ffn<'a> {
    pub w1: Linear<'a>,
    pub activation: fn(f64) -> f64,
    pub w2: Linear<'a>,
}

/// w2(activation(w1(x))).
pub fn ffn(x: &[f64], weights: &Ffn<'_>) -> Vec<f64> {
    linear(&linear(x, &weights.w1, weights.activation, None), &weights.w2, |x| x, None)
}

/// w2(activation(w1(x)) * up(x)): the gated form.
pub fn gated_ffn(x: &[f64], weights: &Ffn<'_>, up: &Linear<'_>) -> Vec<f64> {
    let gate = linear(x, &weights.w1, weights.activation, None);
    let hidden: Vec<f64> = gate.iter().zip(linear(x, up, |x| x, None)).map(|(g, u)| g * u).collect();
    linear(&hidden, &weights.w2, |x| x, None)
}

/// A norm with its weights, one value per channel.
#[derive(Clone, Copy, Debug)]
pub enum Norm<'a> {
    /// [`layernorm`].
    LayerNorm { gain: &'a [f64], bias: Option<&'a [f64]>, eps: f64 },
    /// [`rmsnorm`].
    RmsNorm { gain: &'a [f64], eps: f64 },
    /// [`batchnorm`] with running statistics.
    BatchNorm { gain: &'a [f64], bias: &'a [f64], mean: &'a [f64], var: &'a [f64], eps: f64 },
}

/// The norm of every row of `x`.
pub fn norm(x: &[f64], norm: &Norm<'_>) -> Vec<f64> {
    match *norm {
        Norm::LayerNorm { gain, bias, eps } => layernorm(x, gain, bias, eps),
        Norm::RmsNorm { gain, eps } => rmsnorm(x, gain, eps),
        Norm::BatchNorm { gain, bias, mean, var, eps } => batchnorm(x, gain, bias, mean, var, eps),
    }
}

/// Where the norms of a sub-layer f stand.
#[derive(Clone, Copy, Debug)]
pub enum Placement<'a> {
    /// norm(alpha * x + f(x)); alpha is 1, or larger for DeepNorm.
    Post { norm: Norm<'a>, alpha: f64 },
    /// x + f(norm(x)).
    Pre { norm: Norm<'a> },
    /// x + after(f(before(x))).
    Sandwich { before: Norm<'a>, after: Norm<'a> },
}

/// The sub-layer `f` (attention, ffn) with its residual and its norms.
pub fn sub_layer(x: &[f64], placement: &Placement<'_>, f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    match placement {
        Placement::Post { norm: n, alpha } => norm(&add_scaled(&f(x), *alpha, x), n),
        Placement::Pre { norm: n } => add_scaled(&f(&norm(x, n)), 1.0, x),
        Placement::Sandwich { before, after } => add_scaled(&norm(&f(&norm(x, before)), after), 1.0, x),
    }
}

/// The weights of an encoder layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<'a> {
    pub attention: SelfAttention<'a>,
    pub attention_placement: Placement<'a>,
    pub ffn: Ffn<'a>,
    pub ffn_placement: Placement<'a>,
}

/// Self-attention, then the ffn; `x` [T, d_model], segments and closures as in [`attention_packed`].
pub fn encoder_layer(
    x: &[f64],
    weights: &LayerWeights<'_>,
    offsets: &[usize],
    allowed: impl Fn(usize, usize, usize, usize) -> bool,
    bias: impl Fn(usize, usize, usize, usize) -> f64,
) -> Vec<f64> {
    let attend = |x: &[f64]| self_attention(x, &weights.attention, offsets, &allowed, &bias);
    let x = sub_layer(x, &weights.attention_placement, attend);
    sub_layer(&x, &weights.ffn_placement, |x| ffn(x, &weights.ffn))
}

// ---- Helpers ----------------------------------------------------------------------------------------------

/// The rows of `x` [rows, cols]; none if there are no columns.
fn rows(x: &[f64], cols: usize) -> ChunksExact<'_, f64> {
    let rows = x.chunks_exact(cols.max(1));
    assert!(rows.remainder().is_empty(), "{} values are no rows of {cols}", x.len());
    rows
}

fn map_rows(x: &[f64], cols: usize, f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    rows(x, cols).flat_map(f).collect()
}

/// The items `range` of `x`, which are `width` values each: the rows of a segment, the columns of a head.
fn part(x: &[f64], range: Range<usize>, width: usize) -> &[f64] {
    &x[range.start * width..range.end * width]
}

/// x + scale * residual.
fn add_scaled(x: &[f64], scale: f64, residual: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), residual.len());
    x.iter().zip(residual).map(|(x, r)| x + scale * r).collect()
}

/// Mean and biased variance, in two passes: E[x^2] - E[x]^2 would cancel.
fn mean_and_variance(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = sum(x.iter().copied()) / n;
    (mean, sum(x.iter().map(|x| (x - mean) * (x - mean))) / n)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    sum(a.iter().zip(b).map(|(a, b)| a * b))
}

/// From +0, where `Iterator::sum` starts at -0: a sum of nothing is +0.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |total, value| total + value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_close(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() <= 1e-14 || (a.is_nan() && e.is_nan()), "{actual:?} is not {expected:?}");
        }
    }

    #[test]
    fn erf_and_erfc_meet_known_values() {
        // From the series, in 60-digit decimal arithmetic.
        let known = [
            (0.1, 0.112_462_916_018_284_9, 8.875_370_839_817_15e-1),
            (1.0, 0.842_700_792_949_714_9, 1.572_992_070_502_851_3e-1),
            (1.5, 0.966_105_146_475_310_7, 3.389_485_352_468_927_4e-2),
            (2.0, 0.995_322_265_018_952_7, 4.677_734_981_047_266e-3),
            (5.0, 0.999_999_999_998_462_6, 1.537_459_794_428_035e-12),
        ];
        for (x, erf_x, erfc_x) in known {
            assert!((erf(x) - erf_x).abs() < 1e-15 && erf(-x) == -erf(x), "erf({x}) = {}", erf(x));
            assert!((erfc(x) / erfc_x - 1.0).abs() < 1e-13, "erfc({x}) = {}", erfc(x));
        }
        assert_eq!((erf(f64::INFINITY), erf(f64::NEG_INFINITY), erfc(f64::NEG_INFINITY)), (1.0, -1.0, 2.0));
        assert!(erf(f64::NAN).is_nan() && erfc(f64::NAN).is_nan());
        assert_eq!(erf(-0.0).to_bits(), (-0.0f64).to_bits());
    }

    #[test]
    fn activations_of_special_values() {
        assert!(relu(f64::NAN).is_nan());
        assert_eq!(relu(-0.0).to_bits(), (-0.0f64).to_bits());
        for f in [gelu_erf, gelu_tanh, quick_gelu, silu] {
            assert_eq!((f(0.0), f(f64::INFINITY), f(-1e30)), (0.0, f64::INFINITY, 0.0));
            assert!(f(f64::NAN).is_nan() && f(f64::NEG_INFINITY).is_nan());
        }
        let inner = (2.0 / std::f64::consts::PI).sqrt() * 1.044715;
        let sigmoid_of = |x: f64| 1.0 / (1.0 + (-x).exp());
        assert_close(&[gelu_erf(1.0), gelu_tanh(1.0)], &[0.841_344_746_068_542_9, 0.5 + 0.5 * inner.tanh()]);
        assert_close(&[quick_gelu(2.0), silu(-1.0)], &[2.0 * sigmoid_of(3.404), -sigmoid_of(-1.0)]);
    }

    #[test]
    fn softmax_by_hand() {
        let (ln2, inf, nan) = (2f64.ln(), f64::INFINITY, f64::NAN);
        let x = [0.0, ln2, 0.0, 1e300, -inf, 1e300, -inf, -inf, -inf, 0.0, inf, 1.0, 0.0, nan, 1.0];
        let half = [0.5, 0.0, 0.5];
        let expected = [[0.25, 0.5, 0.25], half, [0.0; 3], [nan; 3], [nan; 3]];
        assert_close(&softmax(&x, 3), expected.as_flattened());
        assert!(softmax(&[], 3).is_empty() && softmax(&[], 0).is_empty());
    }

    #[test]
    fn norms_by_hand() {
        // Mean 2, variance 4; then mean square 4.
        assert_close(&layernorm(&[0.0, 4.0], &[1.0, 3.0], Some(&[0.5, 0.0]), 0.0), &[-0.5, 3.0]);
        assert_close(&layernorm(&[0.0, 4.0], &[1.0, 3.0], None, 12.0), &[-0.5, 1.5]);
        assert_close(&rmsnorm(&[2.0, -2.0], &[1.0, 3.0], 12.0), &[0.5, -1.5]);
        assert_close(
            &batchnorm(&[5.0, 5.0], &[2.0, 1.0], &[1.0, 0.0], &[1.0, 5.0], &[3.0, 0.0], 1.0),
            &[5.0, 0.0],
        );
    }

    #[test]
    fn batchnorm_training_by_hand() {
        let train = |x: &[f64], valid: &[bool]| {
            batchnorm_train(x, Some(valid), &[1.0], &[10.0], 0.0, &[0.0], &[1.0], 0.5)
        };
        let two = train(&[0.0, f64::NAN, 4.0], &[true, false, true]);
        assert_close(&two.y, &[9.0, f64::NAN, 11.0]);
        assert_eq!((two.batch_mean[0], two.batch_var[0]), (2.0, 4.0));
        assert_eq!((two.running_mean[0], two.running_var[0]), (1.0, 4.5));
        let one = train(&[3.0, 7.0], &[true, false]);
        assert_eq!((one.running_mean[0], one.running_var[0]), (1.5, 0.5));
        let none = train(&[3.0], &[false]);
        assert_eq!((none.y[0], none.running_mean[0], none.running_var[0]), (3.0, 0.0, 1.0));
    }

    #[test]
    fn products_by_hand() {
        assert_close(&matmul(&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0], 2, 2, 1), &[17.0, 39.0]);
        let weights = Linear { weight: &[1.0, 1.0, -1.0, -1.0], bias: Some(&[1.0, 0.0]), in_features: 2 };
        assert_close(&linear(&[1.0, 2.0], &weights, relu, Some((2.0, &[10.0, 20.0]))), &[24.0, 40.0]);
    }

    #[test]
    fn rotary_by_hand() {
        // Two heads of three columns, a quarter turn per position; the third column stays.
        let (x, quarter) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], std::f64::consts::FRAC_PI_2);
        for interleaved in [false, true] {
            let turned = rotary(&x, 3, &[quarter], interleaved, &[1]);
            assert_close(&turned, &[-2.0, 1.0, 3.0, -5.0, 4.0, 6.0]);
        }
        // Two pairs, of which the second stands still.
        let x = [1.0, 2.0, 3.0, 4.0];
        assert_close(&rotary(&x, 4, &[quarter, 0.0], false, &[1]), &[-3.0, 2.0, 1.0, 4.0]);
        assert_close(&rotary(&x, 4, &[quarter, 0.0], true, &[2]), &[-1.0, -2.0, 3.0, 4.0]);
        assert_close(&rotary_frequencies(4, 100.0), &[1.0, 0.1]);
    }

    #[test]
    fn gated_ffn_by_hand() {
        let map = |weight| Linear { weight, bias: None, in_features: 1 };
        let weights = Ffn {
            w1: map(&[1.0, -1.0]),
            activation: relu,
            w2: Linear { in_features: 2, ..map(&[1.0, 1.0]) },
        };
        assert_close(&gated_ffn(&[3.0], &weights, &map(&[2.0, 7.0])), &[18.0]);
    }

    const SHAPE: Attention =
        Attention { n_heads: 2, n_kv_heads: 1, head_dim: 1, value_dim: 1, scale: 1.0, softcap: None };

    #[test]
    fn attention_by_hand() {
        // Head 0 asks 0 (all keys alike), head 1 asks ln 2 (weights 2^key). Key 2 is poison behind the mask.
        let q = [0.0, 2f64.ln()];
        let (k, v) = ([0.0, 1.0, f64::NAN], [3.0, 6.0, f64::INFINITY]);
        let (all, no_bias) = (|_, _, _| true, |_, _, _| 0.0);
        assert_close(&attention(&q, &k, &v, &SHAPE, |_, _, j| j < 2, no_bias), &[4.5, 5.0]);
        let forbid = |_, _, j| if j < 2 { 0.0 } else { f64::NEG_INFINITY };
        assert_close(&attention(&q, &k, &v, &SHAPE, all, forbid), &[4.5, 5.0]);
        assert_close(&attention(&q, &k, &v, &SHAPE, |h, _, j| h == 0 && j == 0, no_bias), &[3.0, 0.0]);
        assert_close(&attention(&q, &k, &v, &SHAPE, |h, _, _| h == 0, no_bias), &[f64::NAN, 0.0]);
        assert_close(&attention(&q, &[], &[], &SHAPE, all, no_bias), &[0.0, 0.0]);
        // Head 1 scores 0 and ln 2, which the cap changes to 2 tanh(ln 2 / 2).
        let capped = Attention { softcap: Some(2.0), ..SHAPE };
        let p = 1.0 / (1.0 + (-2.0 * (2f64.ln() / 2.0).tanh()).exp());
        assert_close(&attention(&q, &k[..2], &v[..2], &capped, all, no_bias), &[4.5, 3.0 + 3.0 * p]);
    }

    #[test]
    fn segments_do_not_meet() {
        let (q, k, v) = ([0.0; 6], [0.0; 4], [1.0, 3.0, 5.0, 9.0]);
        let (q_offsets, k_offsets) = ([0, 1, 1, 3], [0, 2, 3, 4]);
        let (all, no_bias) = (|_, _, _, _| true, |_, _, _, _| 0.0);
        let out = attention_packed(&q, &k, &v, &SHAPE, &q_offsets, &k_offsets, all, no_bias);
        assert_close(&out, &[2.0, 2.0, 9.0, 9.0, 9.0, 9.0]);
    }

    #[test]
    fn layer_by_hand() {
        // d_model 1, two segments of 2 and 1 tokens, uniform attention of twice the value; the ffn adds 1.
        let map = |weight| Linear { weight, bias: None, in_features: 1 };
        let shape = Attention { n_heads: 1, ..SHAPE };
        let attention =
            SelfAttention { q: map(&[0.0]), k: map(&[1.0]), v: map(&[2.0]), out: map(&[1.0]), shape };
        let plus_one = Linear { bias: Some(&[1.0]), ..map(&[1.0]) };
        let ffn = Ffn { w1: plus_one, activation: relu, w2: map(&[1.0]) };
        let halve = Norm::BatchNorm { gain: &[1.0], bias: &[0.0], mean: &[0.0], var: &[4.0], eps: 0.0 };
        let run = |placement| {
            let weights =
                LayerWeights { attention, attention_placement: placement, ffn, ffn_placement: placement };
            encoder_layer(&[2.0, 4.0, 8.0], &weights, &[0, 2, 3], |_, _, _, _| true, |_, _, _, _| 0.0)
        };
        // Attention: 6, 6, 16. Post: (4, 5, 12) from x + a over 2, then y = (2 x + 1) / 2.
        assert_close(&run(Placement::Post { norm: halve, alpha: 1.0 }), &[4.5, 5.5, 12.5]);
        assert_close(&run(Placement::Post { norm: halve, alpha: 2.0 }), &[8.0, 11.0, 24.5]);
        // Pre: x + a / 2 = (5, 7, 16), then x + x / 2 + 1.
        assert_close(&run(Placement::Pre { norm: halve }), &[8.5, 11.5, 25.0]);
        // Sandwich: x + a / 4 = (3.5, 5.5, 12), then x + (x / 2 + 1) / 2.
        assert_close(&run(Placement::Sandwich { before: halve, after: halve }), &[4.875, 7.375, 15.5]);
    }
}
