//! Root-mean-square normalisation of rows (Zhang and Sennrich 2019, arXiv:1910.07467).

use crate::context::Context;
use crate::error::{Error, check_size};
use crate::isa::dispatch;
use crate::layernorm::scale_row;
use crate::reduce;
use crate::rows::{TOGETHER, check_shape, for_tiles, input, together};
use crate::simd::Simd;
use crate::view::{MatMut, MatRef};

/// RMS normalisation of each row, in place: `y = gain * x / sqrt(mean(x^2) + eps)`.
///
/// # Shapes
/// `x`: `[rows, cols]`, any row stride; `gain`: `[cols]`. Without columns there is nothing to do.
///
/// # Special values
/// A row with a NaN becomes NaN; beside an infinity finite values become 0 and the infinity NaN. Squares beyond the
/// range of f32 count as infinite.
///
/// # Accuracy
/// Relative error of an element at most `4e-7 + 1e-7 * log2(cols)`, unless squares fall below the smallest number and `eps` does not outweigh them; the same bits on every instruction set that [keeps
/// them](crate::Isa::keeps_bits).
///
/// # Errors
/// [`Error::Size`] if `gain` has another length than a row.
///
/// ```
/// let mut x = [3.0, -3.0];
/// let ctx = laneformer::Context::serial();
/// laneformer::rmsnorm(ctx, laneformer::MatMut::contiguous(&mut x, 1, 2)?, &[1.0, 2.0], 0.0)?;
/// assert_eq!(x, [1.0, -2.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
pub fn rmsnorm(ctx: Context<'_>, x: MatMut<'_>, gain: &[f32], eps: f32) -> Result<(), Error> {
    rows(ctx, None, x, gain, eps)
}

/// [`rmsnorm`] from `x` into `out`.
///
/// # Errors
/// [`Error::Size`] if the shapes differ, or as [`rmsnorm`].
pub fn rmsnorm_into(
    ctx: Context<'_>,
    x: MatRef<'_>,
    gain: &[f32],
    eps: f32,
    out: MatMut<'_>,
) -> Result<(), Error> {
    check_shape(x, &out)?;
    rows(ctx, Some(x), out, gain, eps)
}

fn rows(
    ctx: Context<'_>,
    source: Option<MatRef<'_>>,
    x: MatMut<'_>,
    gain: &[f32],
    eps: f32,
) -> Result<(), Error> {
    check_size("gain.len()", x.cols(), gain.len())?;
    dispatch!(ctx.isa(), |s| for_tiles(
        ctx,
        s,
        source,
        x,
        #[inline(always)]
        |source, rows| rmsnorm_rows(s, source, rows, gain, eps)
    ));
    Ok(())
}

/// Some rows at a time: each pass on all of them before the next.
#[inline(always)]
pub(crate) fn rmsnorm_rows<S: Simd>(
    s: S,
    source: Option<MatRef<'_>>,
    x: &mut MatMut<'_>,
    gain: &[f32],
    eps: f32,
) {
    let (rows, n, step) = (x.rows(), x.cols() as f32, together(x.cols()));
    let mut inverses = [0.0; TOGETHER];
    for begin in (0..rows).step_by(step) {
        let group = begin..rows.min(begin + step);
        for (i, inv) in group.clone().zip(&mut inverses) {
            let squares = reduce::sum(
                s,
                input(source, x, i),
                s.splat(0.0),
                #[inline(always)]
                |x| x * x,
            );
            *inv = 1.0 / (squares / n + eps).sqrt();
        }
        for (i, inv) in group.zip(inverses) {
            let inv = s.splat(inv);
            scale_row(
                s,
                source.map(|source| source.row(i)),
                x.row_mut(i),
                gain,
                None,
                #[inline(always)]
                |x| x * inv,
            );
        }
    }
}
