//! Rotary positions (Su et al. 2021, arXiv:2104.09864): queries and keys are turned by their positions, so that their product depends
//! on the distance only.

use core::f64::consts::{LN_2, TAU};
use std::sync::Arc;

use crate::attention::KvCache;
use crate::attention::layout::BLOCK;
use crate::attention::plan::{Block, Plan};
use crate::context::Context;
use crate::error::{Error, check_dim, check_size, checked_product};
use crate::exec::Team;
use crate::isa::dispatch;
use crate::rows::{GRAIN, SERIAL};
use crate::simd::{LANES, Simd, Vector};
use crate::split::Split;
use crate::view::MatMut;

/// Which two columns of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryPairs {
    /// `i` and `i + rotary_dim / 2`: GPT-NeoX, Llama.
    Halves,
    /// `2 i` and `2 i + 1`: the paper, GPT-J.
    Interleaved,
}

/// Where the rows of a batch stand: each at its own position, or at its place in its sequence, behind what a cache holds of it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Places<'a> {
    pub(crate) each: Option<&'a [usize]>,
    pub(crate) cache: Option<&'a KvCache>,
}

impl Places<'_> {
    /// The position of token `t` of a block.
    #[inline(always)]
    fn of(&self, plan: &Plan, block: usize, t: usize) -> usize {
        if let Some(each) = self.each {
            return each[plan.rows[block] + t];
        }
        let Block { segment, start } = plan.blocks[block];
        self.cache.map_or(0, |cache| cache.len(segment)) + start + t
    }

    /// The largest position.
    pub(crate) fn last(&self, plan: &Plan) -> Option<usize> {
        match self.each {
            Some(each) => each.iter().max().copied(),
            None => (0..plan.rows.len().saturating_sub(1))
                .map(|block| self.of(plan, block, plan.rows[block + 1] - plan.rows[block] - 1))
                .max(),
        }
    }
}

/// A table of turns: pair `i` of the first `rotary_dim` columns of a head at position `p` becomes
/// `(a cos - b sin, b cos + a sin)` of the angle `p * frequency[i]`. Further columns stay.
///
/// Made once, up to a number of positions; clones share the table.
///
/// # Accuracy
/// Angles, sines and cosines are computed in f64 and rounded once; the table is the same on every machine. Each result is the product with the
/// cosine, rounded, and one fused multiply-add: the same bits on every instruction set that [keeps them](crate::Isa::keeps_bits).
///
/// ```
/// use laneformer::{Context, MatMut, Rotary, RotaryPairs};
/// // A quarter turn per position.
/// let rotary = Rotary::with_frequencies(RotaryPairs::Halves, &[std::f64::consts::FRAC_PI_2], 8)?;
/// let mut x = [1.0, 0.0, 5.0, 1.0, 0.0, 5.0];
/// rotary.apply(Context::serial(), 3, &[0, 2], MatMut::contiguous(&mut x, 2, 3)?)?;
/// assert_eq!(x.map(|x| x.round() + 0.0), [1.0, 0.0, 5.0, -1.0, 0.0, 5.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rotary {
    pairs: RotaryPairs,
    /// Pairs of a head.
    half: usize,
    positions: usize,
    /// `[positions][2][half]`: cosines, then sines.
    table: Arc<[f32]>,
}

impl Rotary {
    /// The frequencies `base^(-2 i / rotary_dim)` of the paper, where `base` is 10000 (`rope_theta`), for positions below `positions`.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] or [`Error::NotDivisible`] if `rotary_dim` is not even, [`Error::Mismatch`] if `base` is below 1 or not finite,
    /// [`Error::Overflow`].
    pub fn new(pairs: RotaryPairs, rotary_dim: usize, base: f64, positions: usize) -> Result<Rotary, Error> {
        Rotary::with_frequencies(pairs, &Rotary::frequencies(rotary_dim, base)?, positions)
    }

    /// Turns by any frequencies, in radians per position, one for each pair. Scaled positions are scaled frequencies: divided by a
    /// factor (linear scaling), or each by its own (NTK-aware, Llama 3.1).
    ///
    /// ```
    /// use laneformer::{Rotary, RotaryPairs};
    /// let frequencies = Rotary::frequencies(64, 10_000.0)?;
    /// let linear: Vec<f64> = frequencies.iter().map(|f| f / 4.0).collect();
    /// let rotary = Rotary::with_frequencies(RotaryPairs::Halves, &linear, 8192)?;
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::ZeroDim`] if there is none, or no position, [`Error::Mismatch`] if an angle is not finite, [`Error::Overflow`].
    pub fn with_frequencies(
        pairs: RotaryPairs,
        frequencies: &[f64],
        positions: usize,
    ) -> Result<Rotary, Error> {
        check_dim("frequencies.len()", frequencies.len())?;
        check_dim("positions", positions)?;
        if !frequencies.iter().all(|f| (f * positions as f64).is_finite()) {
            return Err(Error::Mismatch { arg: "frequencies", expected: "numbers whose angles are finite" });
        }
        let half = frequencies.len();
        let mut table = Vec::with_capacity(checked_product("positions", &[positions, half, 2])?);
        for p in 0..positions {
            let (cos, sin): (Vec<f32>, Vec<f32>) =
                frequencies.iter().map(|f| cos_sin(p as f64 * (f / TAU))).unzip();
            table.extend(cos.into_iter().chain(sin));
        }
        Ok(Rotary { pairs, half, positions, table: table.into() })
    }

    /// `base^(-2 i / rotary_dim)` for each pair `i`: the same f64 on every machine, as `f64::powf` need not be.
    ///
    /// # Errors
    /// As [`Rotary::new`].
    pub fn frequencies(rotary_dim: usize, base: f64) -> Result<Vec<f64>, Error> {
        check_dim("rotary_dim", rotary_dim)?;
        if !rotary_dim.is_multiple_of(2) {
            return Err(Error::NotDivisible { arg: "rotary_dim", actual: rotary_dim, by: 2 });
        }
        checked_product("rotary_dim", &[rotary_dim])?;
        if !(base >= 1.0 && base.is_finite()) {
            return Err(Error::Mismatch { arg: "base", expected: "a finite number of at least 1" });
        }
        let (half, log2) = (rotary_dim / 2, log2(base));
        Ok((0..half).map(|i| exp2_negative(i as f64 / half as f64 * log2)).collect())
    }

    /// Columns of a head that turn.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// Positions of the table.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Turns rows of queries or keys, in place: what [`QkvProjection::with_rotary`](crate::QkvProjection::with_rotary) does to its own, for
    /// those that are projected otherwise.
    ///
    /// # Shapes
    /// `x`: `[rows, heads * head_dim]`, any row stride; `positions`: `[rows]`, in any order.
    ///
    /// # Special values
    /// NaN and infinities follow IEEE 754; those in one column of a pair reach the other.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if a position is not in the table or heads are narrower than [`rotary_dim`](Self::rotary_dim), [`Error::Size`],
    /// [`Error::ZeroDim`], [`Error::NotDivisible`] if a row is not made of heads. Nothing is written then.
    pub fn apply(
        &self,
        ctx: Context<'_>,
        head_dim: usize,
        positions: &[usize],
        x: MatMut<'_>,
    ) -> Result<(), Error> {
        check_dim("head_dim", head_dim)?;
        self.check_head(head_dim)?;
        if !x.cols().is_multiple_of(head_dim) {
            return Err(Error::NotDivisible { arg: "x.cols", actual: x.cols(), by: head_dim });
        }
        check_size("positions.len()", x.rows(), positions.len())?;
        positions.iter().try_for_each(|&position| self.check_position(position))?;
        dispatch!(ctx.isa(), |s| self.run(ctx, s, head_dim, positions, x));
        Ok(())
    }

    fn run<S: Simd>(&self, ctx: Context<'_>, s: S, head_dim: usize, positions: &[usize], mut x: MatMut<'_>) {
        let (rows, cols) = (x.rows(), x.cols());
        let members = if rows * cols < SERIAL { 1 } else { ctx.members() };
        Team::new(members, 0).region(ctx.executor(), |crew| {
            crew.blocks(
                s,
                &mut x,
                &Split::every(rows, cols, GRAIN / cols.max(1)),
                #[inline(always)]
                |first, _, mut rows, _| {
                    for i in 0..rows.rows() {
                        self.turn_row(s, head_dim, positions[first + i], rows.row_mut(i));
                    }
                },
            );
        });
    }

    pub(crate) fn check_head(&self, head_dim: usize) -> Result<(), Error> {
        if self.rotary_dim() > head_dim {
            return Err(Error::TooLarge { arg: "rotary_dim", max: head_dim, actual: self.rotary_dim() });
        }
        Ok(())
    }

    pub(crate) fn check_position(&self, position: usize) -> Result<(), Error> {
        if position >= self.positions {
            return Err(Error::TooLarge { arg: "position", max: self.positions - 1, actual: position });
        }
        Ok(())
    }

    /// Cosines and sines of a position.
    #[inline(always)]
    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        self.table[position * 2 * self.half..][..2 * self.half].split_at(self.half)
    }

    /// Turns rows of heads, the first of which is the first of `block`.
    pub(crate) fn turn_rows<S: Simd>(
        &self,
        s: S,
        head_dim: usize,
        x: &mut MatMut<'_>,
        (plan, block, places): (&Plan, usize, &Places<'_>),
    ) {
        s.vectorize(
            #[inline(always)]
            || {
                for i in 0..x.rows() {
                    let (block, t) = plan.block_of(block, i);
                    self.turn_row(s, head_dim, places.of(plan, block, t), x.row_mut(i));
                }
            },
        );
    }

    #[inline(always)]
    fn turn_row<S: Simd>(&self, s: S, head_dim: usize, position: usize, row: &mut [f32]) {
        let (cos, sin) = self.at(position);
        for head in row.chunks_exact_mut(head_dim) {
            let head = &mut head[..2 * self.half];
            match self.pairs {
                RotaryPairs::Halves => {
                    let (a, b) = head.split_at_mut(self.half);
                    let pairs = a.chunks_mut(LANES).zip(b.chunks_mut(LANES));
                    for ((a, b), angle) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
                        turn(s, a, b, angle);
                    }
                }
                RotaryPairs::Interleaved => {
                    let pairs = head.chunks_mut(2 * LANES);
                    for (head, angle) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
                        let (mut a, mut b) = ([0.0; LANES], [0.0; LANES]);
                        for ((a, b), pair) in a.iter_mut().zip(&mut b).zip(head.as_chunks::<2>().0) {
                            [*a, *b] = *pair;
                        }
                        turn(s, &mut a, &mut b, angle);
                        for ((a, b), pair) in a.iter().zip(&b).zip(head.as_chunks_mut::<2>().0) {
                            *pair = [*a, *b];
                        }
                    }
                }
            }
        }
    }

    /// Turns the stored keys of a block, a row for each head: the arithmetic of [`turn_rows`](Self::turn_rows) with a vector of tokens in
    /// place of one of pairs.
    pub(crate) fn turn_keys<S: Simd>(
        &self,
        s: S,
        keys: &mut MatMut<'_>,
        (plan, block, places): (&Plan, usize, &Places<'_>),
    ) {
        let tokens = plan.rows[block + 1] - plan.rows[block];
        s.vectorize(
            #[inline(always)]
            || {
                for first in (0..self.half).step_by(LANES) {
                    // Some pairs' angles, transposed once for all heads. Tokens that are not there become zeros.
                    let pairs = LANES.min(self.half - first);
                    let (mut cos, mut sin) = ([[0.0; BLOCK]; LANES], [[0.0; BLOCK]; LANES]);
                    for t in 0..tokens {
                        let (c, s) = self.at(places.of(plan, block, t));
                        for i in 0..pairs {
                            (cos[i][t], sin[i][t]) = (c[first + i], s[first + i]);
                        }
                    }
                    for head in 0..keys.rows() {
                        let keys = keys.row_mut(head);
                        for i in 0..pairs {
                            let (a, b) = match self.pairs {
                                RotaryPairs::Halves => (first + i, first + i + self.half),
                                RotaryPairs::Interleaved => (2 * (first + i), 2 * (first + i) + 1),
                            };
                            let (low, high) = keys.split_at_mut(b * BLOCK);
                            let (a, b) = (&mut low[a * BLOCK..][..BLOCK], &mut high[..BLOCK]);
                            for j in (0..BLOCK).step_by(LANES) {
                                let angle = (&cos[i][j..j + LANES], &sin[i][j..j + LANES]);
                                turn(s, &mut a[j..j + LANES], &mut b[j..j + LANES], angle);
                            }
                        }
                    }
                }
            },
        );
    }
}

/// Turns up to a vector of pairs.
#[inline(always)]
fn turn<S: Simd>(s: S, a: &mut [f32], b: &mut [f32], (cos, sin): (&[f32], &[f32])) {
    let (x, y, cos, sin) = (load(s, a), load(s, b), load(s, cos), load(s, sin));
    let (x, y) = (y.neg_mul_add(sin, x * cos), x.mul_add(sin, y * cos));
    if a.len() == LANES {
        x.store(a);
        y.store(b);
    } else {
        x.store_partial(a);
        y.store_partial(b);
    }
}

#[inline(always)]
fn load<S: Simd>(s: S, x: &[f32]) -> S::V {
    if x.len() == LANES { s.load(x) } else { s.load_partial(x, s.splat(0.0)) }
}

// ---- Functions that are the same on every machine ----------------------------------------------------------
// Those of `std` are the platform's and may differ in the last bit, which some rounding to f32 would show.

/// `1 / k!`.
const INVERSE_FACTORIALS: [f64; 34] = {
    let (mut x, mut k) = ([1.0; 34], 1);
    while k < 34 {
        x[k] = x[k - 1] / k as f64;
        k += 1;
    }
    x
};

/// `c[0] + c[1] x + ...` by Horner's rule.
fn series<'a>(x: f64, c: impl DoubleEndedIterator<Item = &'a f64>) -> f64 {
    c.rev().fold(0.0, |sum, c| sum * x + c)
}

/// Cosine and sine of so many turns, by their Taylor series: the last terms are below 1e-18 at half a turn.
fn cos_sin(turns: f64) -> (f32, f32) {
    let x = (turns - turns.round()) * TAU;
    let cos = series(-x * x, INVERSE_FACTORIALS.iter().step_by(2));
    let sin = x * series(-x * x, INVERSE_FACTORIALS[1..].iter().step_by(2));
    (cos as f32, sin as f32)
}

/// `2^-x` of `x >= 0`.
fn exp2_negative(x: f64) -> f64 {
    let whole = x.floor();
    let power = f64::from_bits(1023_u64.saturating_sub(whole as u64) << 52);
    power * series((whole - x) * LN_2, INVERSE_FACTORIALS.iter())
}

/// The logarithm of `x >= 1`: `log2 m = 2 artanh((m - 1) / (m + 1)) / ln 2` of the mantissa `m`.
fn log2(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    const ONE: u64 = 1023 << 52;
    let odd: [f64; 18] = core::array::from_fn(|k| 1.0 / (2 * k + 1) as f64);
    let m = f64::from_bits(x.to_bits() & MANTISSA | ONE);
    let z = (m - 1.0) / (m + 1.0);
    ((x.to_bits() >> 52) - 1023) as f64 + 2.0 * z * series(z * z, odd.iter()) / LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_meet_those_of_std() {
        for x in [1.0, 1.5, 2.0, 10.0, 9.999e3, 1e4, 5e5, 1e6, 3e300] {
            assert!((log2(x) - f64::log2(x)).abs() < 4e-16 * f64::log2(x).max(1.0), "log2({x})");
        }
        for x in [0.0, 0.1, 0.5, 0.999, 1.0, 13.2877, 19.9, 700.25] {
            assert!((exp2_negative(x) / (-x).exp2() - 1.0).abs() < 1e-15, "2^-{x}");
        }
        for i in 0..100_000 {
            let turns = f64::from(i) * 0.137_035_999;
            let ((cos, sin), angle) = (cos_sin(turns), turns * TAU);
            // Half a unit in the last place of f32, and what 1e5 radians know in f64.
            assert!((f64::from(cos) - angle.cos()).abs() < 3.1e-8, "cos {angle}");
            assert!((f64::from(sin) - angle.sin()).abs() < 3.1e-8, "sin {angle}");
        }
        assert_eq!(cos_sin(0.0), (1.0, 0.0));
        assert_eq!(cos_sin(1e300), (1.0, 0.0));
    }
}
