//! Softmax of rows: maximum, exponentials and their sum, scale, in three passes over a row that stays in cache.

use crate::context::Context;
use crate::error::Error;
use crate::isa::dispatch;
use crate::math::exp_nonpositive;
use crate::reduce::{self, has_many_registers};
use crate::rows::{TOGETHER, check_shape, for_tiles, input, together};
use crate::simd::{Simd, Vector};
use crate::view::{MatMut, MatRef};

/// Softmax of each row, in place: `y[j] = exp(x[j] - max x) / sum over k of exp(x[k] - max x)`.
///
/// # Shapes
/// `x`: `[rows, cols]`, any row stride. Without columns there is nothing to do.
///
/// # Special values
/// A row of only `-inf` becomes zeros. A row with a NaN or `+inf` becomes NaN. `-inf` beside finite values becomes 0, and so
/// does anything more than 87.33655 below the maximum, where `e^x` is no normal number.
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
    dispatch!(ctx.isa(), |s| for_tiles(
        ctx,
        s,
        source,
        x,
        #[inline(always)]
        |source, rows| softmax_rows(s, source, rows)
    ));
}

/// Some rows at a time, each pass on all of them before the next. The maxima of those that follow are found beside the exponentials, which
/// leave loads and comparisons free: the first of three passes takes no time of its own.
#[inline(always)]
fn softmax_rows<S: Simd>(s: S, source: Option<MatRef<'_>>, x: &mut MatMut<'_>) {
    let (rows, step) = (x.rows(), together(x.cols()));
    let group = |begin: usize| begin.min(rows)..rows.min(begin + step);
    let mut max = [f32::NEG_INFINITY; TOGETHER];
    for begin in (0..rows).step_by(step) {
        if begin == 0 || !has_many_registers::<S>() {
            for (i, max) in group(begin).zip(&mut max) {
                *max = reduce::max(s, input(source, x, i));
            }
        }
        let next = if has_many_registers::<S>() { group(begin + step) } else { 0..0 };
        let mut sum = [0.0; TOGETHER];
        for ((i, max), sum) in group(begin).zip(&mut max).zip(&mut sum) {
            let after = (i + step < next.end).then_some(i + step);
            (*sum, *max) = exp_sum(s, source, x, i, *max, after);
        }
        for (i, sum) in group(begin).zip(sum) {
            let scale = s.splat(1.0 / sum);
            reduce::map(
                s,
                None,
                x.row_mut(i),
                #[inline(always)]
                |p| p * scale,
            );
        }
    }
}

/// Makes row `i` `exp(x - max)` and returns the canonical sum, and the maximum of the row `after`, if there is one.
#[inline(always)]
fn exp_sum<S: Simd>(
    s: S,
    source: Option<MatRef<'_>>,
    x: &mut MatMut<'_>,
    i: usize,
    max: f32,
    after: Option<usize>,
) -> (f32, f32) {
    let has_number = max > f32::NEG_INFINITY;
    if !has_number {
        // Never evaluate -inf minus -inf. The maximum may have passed over a NaN.
        let has_nan = input(source, x, i).iter().any(|x| x.is_nan());
        x.row_mut(i).fill(if has_nan { f32::NAN } else { 0.0 });
        let next = after.map_or(&[][..], |after| input(source, x, after));
        return (1.0, reduce::max(s, next));
    }
    let (row, next) = match (source, after) {
        (Some(source), Some(after)) => (x.row_mut(i), source.row(after)),
        (None, Some(after)) => x.row_mut_beside(i, after),
        (_, None) => (x.row_mut(i), &[][..]),
    };
    let source = source.map(|source| source.row(i).as_chunks::<64>());
    let least = s.splat(f32::NEG_INFINITY);
    let (m, mut slots, mut maxima) = (s.splat(max), [s.splat(0.0); 4], [least; 4]);
    let (whole, tail) = row.as_chunks_mut::<64>();
    let (next_whole, next_tail) = next.as_chunks::<64>();
    let mut next_whole = next_whole.iter();
    for (b, block) in whole.iter_mut().enumerate() {
        reduce::store_and_add::<S>(
            block,
            &mut slots,
            #[inline(always)]
            |block, j| {
                let x = source.map_or(block, |(source, _)| &source[b]);
                exp_nonpositive(s, s.load(&x[j * 16..]) - m)
            },
        );
        if let Some(next) = next_whole.next() {
            for (j, slot) in maxima.iter_mut().enumerate() {
                *slot = s.load(&next[j * 16..]).max(*slot);
            }
        }
    }
    for (j, part) in tail.chunks_mut(16).enumerate() {
        let x = source.map_or(&*part, |(_, source)| &source[j * 16..][..part.len()]);
        // Lanes past the end: exp(-inf) is +0.
        let p = exp_nonpositive(s, s.load_partial(x, least) - m);
        p.store_partial(part);
        slots[j] = slots[j] + p;
    }
    for (part, slot) in next_tail.chunks(16).zip(&mut maxima) {
        *slot = s.load_partial(part, least).max(*slot);
    }
    (reduce::fold(slots), reduce::fold_max(maxima))
}
