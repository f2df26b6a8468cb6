//! Softmax of rows: maximum, exponentials and their sum, scale, in three passes over a row that stays in cache.

use crate::context::Context;
use crate::error::Error;
use crate::isa::dispatch;
use crate::math::exp_nonpositive;
use crate::reduce;
use crate::rows::{TOGETHER, check_shape, for_rows};
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
        |rows| softmax_rows(s, rows)
    ));
}

/// [`TOGETHER`] rows at most: each pass on all of them before the next.
#[inline(always)]
fn softmax_rows<S: Simd>(s: S, x: &mut MatMut<'_>) {
    let (mut max, mut sum) = ([0.0; TOGETHER], [0.0; TOGETHER]);
    for (i, max) in max.iter_mut().enumerate().take(x.rows()) {
        *max = reduce::max(s, x.row(i));
    }
    for (i, (&max, sum)) in max.iter().zip(&mut sum).enumerate().take(x.rows()) {
        let row = x.row_mut(i);
        if max > f32::NEG_INFINITY {
            *sum = exp_sum(s, row, max);
        } else {
            // Never evaluate -inf minus -inf. The maximum may have passed over a NaN.
            row.fill(if row.iter().any(|x| x.is_nan()) { f32::NAN } else { 0.0 });
            *sum = 1.0;
        }
    }
    for (i, sum) in sum.into_iter().enumerate().take(x.rows()) {
        let scale = s.splat(1.0 / sum);
        reduce::map(
            s,
            x.row_mut(i),
            #[inline(always)]
            |p| p * scale,
        );
    }
}

/// Replaces `x` by `exp(x - max)` and returns the canonical sum.
#[inline(always)]
fn exp_sum<S: Simd>(s: S, row: &mut [f32], max: f32) -> f32 {
    let m = s.splat(max);
    let mut slots = [s.splat(0.0); 4];
    let (whole, tail) = row.as_chunks_mut::<64>();
    exp_slots(
        s,
        whole,
        m,
        #[inline(always)]
        |x| x,
        &mut slots,
    );
    for (j, part) in tail.chunks_mut(16).enumerate() {
        // Lanes past the end: exp(-inf) is +0.
        let p = exp_nonpositive(s, s.load_partial(part, s.splat(f32::NEG_INFINITY)) - m);
        p.store_partial(part);
        slots[j] = slots[j] + p;
    }
    reduce::fold(slots)
}

/// Replaces `x` by `exp(f(x) - max)` and adds it to the slots of a canonical sum.
#[inline(always)]
pub(crate) fn exp_slots<S: Simd>(
    s: S,
    x: &mut [[f32; 64]],
    max: S::V,
    f: impl Fn(S::V) -> S::V,
    slots: &mut [S::V; 4],
) {
    for x in x {
        // Four independent vectors at a time hide the latency of the polynomial.
        let p = reduce::four(
            #[inline(always)]
            |j| exp_nonpositive(s, f(s.load(&x[j * 16..])) - max),
        );
        for (j, (slot, p)) in slots.iter_mut().zip(p).enumerate() {
            p.store(&mut x[j * 16..]);
            *slot = *slot + p;
        }
    }
}
