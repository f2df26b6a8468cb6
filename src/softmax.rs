//! Softmax of rows: maximum, exponentials and their sum, scale, in three passes over a row that stays in cache.

use crate::context::Context;
use crate::error::Error;
use crate::isa::dispatch;
use crate::math::exp_nonpositive;
use crate::reduce;
use crate::rows::{check_shape, for_rows};
use crate::simd::{Simd, Vector};
use crate::view::{MatMut, MatRef};

/// Softmax of each row, in place: `y[j] = exp(x[j] - max x) / sum over k of exp(x[k] - max x)`.
///
/// # Shapes
/// `x`: `[rows, cols]`, any row stride. Without columns there is nothing to do.
///
/// # Special values
/// A row of only `-inf` becomes zeros. A row with a NaN or `+inf` becomes NaN. `-inf` beside finite values becomes 0, and so
/// does anything more than 87.3 below the maximum.
///
/// # Accuracy
/// Relative error of an element at most `4e-7 + 1e-7 * log2(cols)` where the result is a normal number, and beside it
/// half an ULP of `x - max`, which rounding the difference costs (4e-6 at 87 below the maximum); the same bits on every instruction set
/// that [keeps them](crate::Isa::keeps_bits).
///
/// # Errors
/// None today; the signature leaves room.
///
/// ```
/// let mut x = [0.0, 0.0, f32::NEG_INFINITY, 1.0, 1.0, 1.0];
/// let ctx = laneformer::Context::serial();
/// laneformer::softmax(ctx, laneformer::MatMut::contiguous(&mut x, 2, 3)?)?;
/// assert_eq!(x[..3], [0.5, 0.5, 0.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
pub fn softmax(ctx: Context<'_>, x: MatMut<'_>) -> Result<(), Error> {
    rows(ctx, None, x);
    Ok(())
}

/// [`softmax`] from `x` into `out`.
///
/// # Errors
/// [`Error::Size`] if the shapes differ.
pub fn softmax_into(ctx: Context<'_>, x: MatRef<'_>, out: MatMut<'_>) -> Result<(), Error> {
    check_shape(x, &out)?;
    rows(ctx, Some(x), out);
    Ok(())
}

fn rows(ctx: Context<'_>, source: Option<MatRef<'_>>, x: MatMut<'_>) {
    dispatch!(ctx.isa(), |s| for_rows(
        ctx,
        s,
        source,
        x,
        #[inline(always)]
        |row| softmax_row(s, row)
    ));
}

#[inline(always)]
fn softmax_row<S: Simd>(s: S, row: &mut [f32]) {
    let max = reduce::max(s, row);
    if max == f32::NEG_INFINITY {
        // Never evaluate -inf minus -inf. The maximum may have passed over a NaN.
        let fill = if row.iter().any(|x| x.is_nan()) { f32::NAN } else { 0.0 };
        row.fill(fill);
        return;
    }
    let sum = exp_sum(s, row, 1.0, max);
    let scale = s.splat(1.0 / sum);
    reduce::map(
        s,
        row,
        #[inline(always)]
        |p| p * scale,
    );
}

/// Replaces `x` by `exp(scale * x - max)` and returns the canonical sum.
#[inline(always)]
pub(crate) fn exp_sum<S: Simd>(s: S, row: &mut [f32], scale: f32, max: f32) -> f32 {
    let (scale, m) = (s.splat(scale), s.splat(max));
    let mut slots = [s.splat(0.0); 4];
    let (whole, tail) = row.as_chunks_mut::<64>();
    for x in whole {
        for (j, slot) in slots.iter_mut().enumerate() {
            let p = exp_nonpositive(s, s.load(&x[j * 16..]) * scale - m);
            p.store(&mut x[j * 16..]);
            *slot = *slot + p;
        }
    }
    for (j, part) in tail.chunks_mut(16).enumerate() {
        // Lanes past the end: exp(-inf) is +0.
        let p = exp_nonpositive(s, s.load_partial(part, s.splat(f32::NEG_INFINITY)) * scale - m);
        p.store_partial(part);
        slots[j] = slots[j] + p;
    }
    reduce::fold(slots)
}
