//! Layer normalisation of rows (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

use core::ops::Range;

use crate::context::Context;
use crate::error::{Error, check_size};
use crate::isa::dispatch;
use crate::reduce::{self, four, has_many_registers};
use crate::rows::{TOGETHER, check_shape, for_tiles, input, together};
use crate::simd::{LANES, Simd, Vector};
use crate::view::{MatMut, MatRef};

/// Layer normalisation of each row, in place: `y = gain * (x - mean) / sqrt(var + eps) + bias` with the biased variance.
///
/// # Shapes
/// `x`: `[rows, cols]`, any row stride; `gain` and `bias`: `[cols]`. Without columns there is nothing to do.
///
/// # Special values
/// A row with a NaN or an infinity becomes NaN. Squares beyond the range of f32, of values beyond some 1e18, count as infinite: the row becomes
/// the bias, or NaN where its sum overflows as well.
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
    dispatch!(ctx.isa(), |s| for_tiles(
        ctx,
        s,
        source,
        x,
        #[inline(always)]
        |source, rows| layernorm_rows(s, source, rows, gain, bias, eps)
    ));
    Ok(())
}

/// Some rows at a time, each pass on all of them before the next. The sums of those that follow are found beside the squares: they come from
/// further away.
#[inline(always)]
pub(crate) fn layernorm_rows<S: Simd>(
    s: S,
    source: Option<MatRef<'_>>,
    x: &mut MatMut<'_>,
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) {
    let (rows, cols, step) = (x.rows(), x.cols(), together(x.cols()));
    let (zero, n) = (s.splat(0.0), cols as f32);
    let group = |begin: usize| begin.min(rows)..rows.min(begin + step);
    let mut sums = [0.0; TOGETHER];
    for begin in (0..rows).step_by(step) {
        if begin == 0 || !has_many_registers::<S>() {
            for (i, sum) in group(begin).zip(&mut sums) {
                *sum = reduce::sum(
                    s,
                    input(source, x, i),
                    zero,
                    #[inline(always)]
                    |x| x,
                );
            }
        }
        let next = if has_many_registers::<S>() { group(begin + step) } else { 0..0 };
        let mut moments = [[0.0; 3]; TOGETHER];
        for ((i, sum), moments) in group(begin).zip(&mut sums).zip(&mut moments) {
            let mean = *sum / n;
            let next = if i + step < next.end { input(source, x, i + step) } else { &[] };
            let (m, mut rest, mut squares, mut slots) = (s.splat(mean), [zero; 4], [zero; 4], [zero; 4]);
            reduce::for_each_beside(
                s,
                input(source, x, i),
                m,
                next,
                #[inline(always)]
                |j, x| {
                    let d = x - m;
                    rest[j] = rest[j] + d;
                    squares[j] = d.mul_add(d, squares[j]);
                },
                #[inline(always)]
                |j, x| slots[j] = slots[j] + x,
            );
            *sum = reduce::fold(slots);
            // What the rounding of the mean left over is the mean of the centred row: taking it off costs one add.
            let centre = reduce::fold(rest) / n;
            let var = reduce::fold(squares) / n - centre * centre;
            *moments = [mean, centre, var];
        }
        // Variances become factors, of all rows at once and not before, so that no sum waits for them. Rounding may leave less than nothing of a
        // constant row; unlike `max`, this keeps a NaN.
        for [.., var] in &mut moments {
            *var = 1.0 / (if *var < 0.0 { 0.0 } else { *var } + eps).sqrt();
        }
        scale_rows(
            s,
            source,
            x,
            group(begin),
            gain,
            bias,
            #[inline(always)]
            |i| {
                let [mean, centre, inv] = moments[i];
                let (mean, centre, inv) = (s.splat(mean), s.splat(centre), s.splat(inv));
                #[inline(always)]
                move |x| ((x - mean) - centre) * inv
            },
        );
    }
}

/// `f(x) * gain + bias` of the rows of a group, of a source or else of the rows themselves, to the rows; `function(i)` is the `f` of the group's row `i`.
///
/// Loads are the bound. Four rows share those of the gain and the bias where there are registers for that. Not with a tail: of four rows at a time it
/// costs more than they save.
#[inline(always)]
pub(crate) fn scale_rows<S: Simd, F: Fn(S::V) -> S::V>(
    s: S,
    source: Option<MatRef<'_>>,
    x: &mut MatMut<'_>,
    group: Range<usize>,
    gain: &[f32],
    bias: Option<&[f32]>,
    function: impl Fn(usize) -> F,
) {
    if !has_many_registers::<S>() || group.len() < TOGETHER || !x.cols().is_multiple_of(LANES) {
        for (i, row) in group.enumerate() {
            scale_row(s, source.map(|source| source.row(row)), x.row_mut(row), gain, bias, function(i));
        }
        return;
    }
    let functions = four(function);
    for at in (0..x.cols()).step_by(LANES) {
        let g = s.load(&gain[at..]);
        let b = match bias {
            Some(bias) => s.load(&bias[at..]),
            None => g,
        };
        for (i, f) in functions.iter().enumerate() {
            let row = group.start + i;
            let v = f(s.load(&input(source, x, row)[at..]));
            let v = if bias.is_some() { v.mul_add(g, b) } else { v * g };
            v.store(&mut x.row_mut(row)[at..]);
        }
    }
}

/// `f(x) * gain + bias` of a row of a source, or else of the row itself, to the row.
#[inline(always)]
pub(crate) fn scale_row<S: Simd>(
    s: S,
    source: Option<&[f32]>,
    row: &mut [f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    f: impl Fn(S::V) -> S::V,
) {
    let zero = s.splat(0.0);
    let source = source.map(|source| source.as_chunks::<LANES>());
    let (whole, tail) = row.as_chunks_mut::<LANES>();
    let (gains, gain_tail) = gain.as_chunks::<LANES>();
    let x_tail = source.map(|(_, tail)| tail);
    match bias {
        Some(bias) => {
            let (biases, bias_tail) = bias.as_chunks::<LANES>();
            for (i, ((row, g), b)) in whole.iter_mut().zip(gains).zip(biases).enumerate() {
                let x = source.map_or(&*row, |(source, _)| &source[i]);
                f(s.load(x)).mul_add(s.load(g), s.load(b)).store(row);
            }
            if !tail.is_empty() {
                let x = s.load_partial(x_tail.unwrap_or(tail), zero);
                let (g, b) = (s.load_partial(gain_tail, zero), s.load_partial(bias_tail, zero));
                f(x).mul_add(g, b).store_partial(tail);
            }
        }
        None => {
            for (i, (row, g)) in whole.iter_mut().zip(gains).enumerate() {
                let x = source.map_or(&*row, |(source, _)| &source[i]);
                (f(s.load(x)) * s.load(g)).store(row);
            }
            if !tail.is_empty() {
                let x = s.load_partial(x_tail.unwrap_or(tail), zero);
                (f(x) * s.load_partial(gain_tail, zero)).store_partial(tail);
            }
        }
    }
}
