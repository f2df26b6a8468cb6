//! Layer normalisation of rows (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

use crate::context::Context;
use crate::error::{Error, check_size};
use crate::isa::dispatch;
use crate::reduce;
use crate::rows::{TOGETHER, check_shape, for_rows};
use crate::simd::{LANES, Simd, Vector};
use crate::view::{MatMut, MatRef};

/// Layer normalisation of each row, in place: `y = gain * (x - mean) / sqrt(var + eps) + bias` with the biased variance.
///
/// # Shapes
/// `x`: `[rows, cols]`, any row stride; `gain` and `bias`: `[cols]`. Without columns there is nothing to do.
///
/// # Special values
/// A row with a NaN or an infinity becomes NaN, and so may one of values beyond 1e30, whose sums and squares overflow.
///
/// # Accuracy
/// The variance is the mean square of the centred row, and the centring is corrected once (never `E[x^2] - E[x]^2`):
/// at mean 1e4 and deviation 0.01 the error is 2e-7 of the deviation beside what the rounding of `x` itself allows. The same bits on every instruction
/// set that [keeps them](crate::Isa::keeps_bits).
///
/// # Errors
/// [`Error::Size`] if `gain` or `bias` has another length than a row.
///
/// ```
/// let mut x = [1.0, 3.0];
/// let ctx = laneformer::Context::serial();
/// laneformer::layernorm(ctx, laneformer::MatMut::contiguous(&mut x, 1, 2)?, &[1.0, 1.0], None, 0.0)?;
/// assert_eq!(x, [-1.0, 1.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
pub fn layernorm(
    ctx: Context<'_>,
    x: MatMut<'_>,
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) -> Result<(), Error> {
    rows(ctx, None, x, gain, bias, eps)
}

/// [`layernorm`] from `x` into `out`.
///
/// # Errors
/// [`Error::Size`] if the shapes differ, or as [`layernorm`].
pub fn layernorm_into(
    ctx: Context<'_>,
    x: MatRef<'_>,
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: MatMut<'_>,
) -> Result<(), Error> {
    check_shape(x, &out)?;
    rows(ctx, Some(x), out, gain, bias, eps)
}

fn rows(
    ctx: Context<'_>,
    source: Option<MatRef<'_>>,
    x: MatMut<'_>,
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) -> Result<(), Error> {
    check_size("gain.len()", x.cols(), gain.len())?;
    if let Some(bias) = bias {
        check_size("bias.len()", x.cols(), bias.len())?;
    }
    dispatch!(ctx.isa(), |s| for_rows(
        ctx,
        s,
        source,
        x,
        #[inline(always)]
        |rows| layernorm_rows(s, rows, gain, bias, eps)
    ));
    Ok(())
}

/// [`TOGETHER`] rows at most: each pass on all of them before the next.
#[inline(always)]
pub(crate) fn layernorm_rows<S: Simd>(
    s: S,
    x: &mut MatMut<'_>,
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) {
    let (zero, n, rows) = (s.splat(0.0), x.cols() as f32, x.rows());
    let mut means = [0.0; TOGETHER];
    for (i, mean) in means.iter_mut().enumerate().take(rows) {
        let sum = reduce::sum(
            s,
            x.row(i),
            zero,
            #[inline(always)]
            |x| x,
        );
        *mean = sum / n;
    }
    // What the rounding of the mean left over is the mean of the centred row: taking it off costs one add.
    let (mut centres, mut inverses) = ([0.0; TOGETHER], [0.0; TOGETHER]);
    for i in 0..rows.min(TOGETHER) {
        let mean = s.splat(means[i]);
        let (mut rest, mut squares) = ([zero; 4], [zero; 4]);
        reduce::for_each(
            s,
            x.row(i),
            mean,
            #[inline(always)]
            |j, x| {
                let d = x - mean;
                rest[j] = rest[j] + d;
                squares[j] = d.mul_add(d, squares[j]);
            },
        );
        let centre = reduce::fold(rest) / n;
        let var = reduce::fold(squares) / n - centre * centre;
        (centres[i], inverses[i]) = (centre, 1.0 / (var + eps).sqrt());
    }
    for i in 0..rows.min(TOGETHER) {
        let (mean, centre, inv) = (s.splat(means[i]), s.splat(centres[i]), s.splat(inverses[i]));
        scale_row(
            s,
            x.row_mut(i),
            gain,
            bias,
            #[inline(always)]
            |x| ((x - mean) - centre) * inv,
        );
    }
}

/// `x = f(x) * gain + bias`.
#[inline(always)]
pub(crate) fn scale_row<S: Simd>(
    s: S,
    row: &mut [f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    f: impl Fn(S::V) -> S::V,
) {
    let zero = s.splat(0.0);
    let (whole, tail) = row.as_chunks_mut::<LANES>();
    let (gains, gain_tail) = gain.as_chunks::<LANES>();
    match bias {
        Some(bias) => {
            let (biases, bias_tail) = bias.as_chunks::<LANES>();
            for ((x, g), b) in whole.iter_mut().zip(gains).zip(biases) {
                f(s.load(x)).mul_add(s.load(g), s.load(b)).store(x);
            }
            let (g, b) = (s.load_partial(gain_tail, zero), s.load_partial(bias_tail, zero));
            f(s.load_partial(tail, zero)).mul_add(g, b).store_partial(tail);
        }
        None => {
            for (x, g) in whole.iter_mut().zip(gains) {
                (f(s.load(x)) * s.load(g)).store(x);
            }
            (f(s.load_partial(tail, zero)) * s.load_partial(gain_tail, zero)).store_partial(tail);
        }
    }
}
