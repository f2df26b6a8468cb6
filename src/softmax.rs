//! Softmax of rows: maximum, exponentials and their sum, scale, in three passes over a row that stays in cache.

use crate::context::Context;
use crate::error::Error;
use crate::isa::dispatch;
use crate::math::exp_nonpositive;
use crate::reduce::{self, has_many_registers};
use crate::rows::{check_shape, for_tiles, input, together};
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

/// Rows from one that is made exponentials to the one whose maximum is found and to the one that is scaled, if they are short: time for a sum or a
/// maximum to be ready.
const APART: usize = 2;

/// Three passes: maxima, exponentials, scaling. The second keeps the multipliers busy and little else; so where registers are many, the first and the
/// last go beside it, each on another row.
#[inline(always)]
fn softmax_rows<S: Simd>(s: S, source: Option<MatRef<'_>>, x: &mut MatMut<'_>) {
    let (rows, apart) = (x.rows(), together(x.cols()).min(APART));
    let (mut max, mut scale) = ([f32::NEG_INFINITY; APART], [1.0; APART]);
    for (i, max) in (0..rows.min(apart)).zip(&mut max) {
        *max = reduce::max(s, input(source, x, i));
    }
    for i in 0..rows {
        let (before, after) = (i.checked_sub(apart), (i + apart < rows).then_some(i + apart));
        let [row, before_row, next] = x.rows_mut([Some(i), before, after]);
        let before = Scaled { row: before_row, by: before.map_or(1.0, |before| scale[before % APART]) };
        let next = match (source, after) {
            (Some(source), Some(after)) => source.row(after),
            _ => next,
        };
        let (source, own) = (source.map(|source| source.row(i)), max[i % APART]);
        let (sum, next_max) = if has_many_registers::<S>() {
            exp_sum(s, source, row, own, before, next)
        } else {
            let (sum, _) = exp_sum(s, source, row, own, Scaled { row: &mut [], by: 1.0 }, &[]);
            before.run(s);
            (sum, reduce::max(s, next))
        };
        scale[i % APART] = 1.0 / sum;
        max[(i + apart) % APART] = next_max;
    }
    for i in rows.saturating_sub(apart)..rows {
        Scaled { row: x.row_mut(i), by: scale[i % APART] }.run(s);
    }
}

/// A row to be multiplied.
struct Scaled<'a> {
    row: &'a mut [f32],
    by: f32,
}

impl Scaled<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let by = s.splat(self.by);
        reduce::map(
            s,
            None,
            self.row,
            #[inline(always)]
            |p| p * by,
        );
    }
}

/// Makes a row `exp(x - max)`, of its source if it has one. Returns the canonical sum, and the maximum of `next`, a row as long or none, as `before`.
#[inline(always)]
fn exp_sum<S: Simd>(
    s: S,
    source: Option<&[f32]>,
    row: &mut [f32],
    max: f32,
    before: Scaled<'_>,
    next: &[f32],
) -> (f32, f32) {
    let has_number = max > f32::NEG_INFINITY;
    if !has_number {
        // Never evaluate -inf minus -inf. The maximum may have passed over a NaN.
        let has_nan = source.unwrap_or(row).iter().any(|x| x.is_nan());
        row.fill(if has_nan { f32::NAN } else { 0.0 });
        before.run(s);
        return (1.0, reduce::max(s, next));
    }
    let least = s.splat(f32::NEG_INFINITY);
    let (m, by, mut slots, mut maxima) = (s.splat(max), s.splat(before.by), [s.splat(0.0); 4], [least; 4]);
    let source = source.map(|source| source.as_chunks::<64>());
    let (whole, tail) = row.as_chunks_mut::<64>();
    let (before_whole, before_tail) = before.row.as_chunks_mut::<64>();
    let (next_whole, next_tail) = next.as_chunks::<64>();
    let (mut before_whole, mut next_whole) = (before_whole.iter_mut(), next_whole.iter());
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
        if let Some(before) = before_whole.next() {
            for part in before.as_chunks_mut::<16>().0 {
                (s.load(part) * by).store(part);
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
    Scaled { row: before_tail, by: before.by }.run(s);
    (reduce::fold(slots), reduce::fold_max(maxima))
}
