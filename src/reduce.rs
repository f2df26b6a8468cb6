//! The canonical order of sums, which no instruction set, tail or row length changes.
//!
//! A row is added in 64 slots: slot `i` takes `x[i], x[i + 64], ...` in that order. The slots are four vectors, folded as
//! `(0 + 1) + (2 + 3)`; the sixteen lanes that remain are folded by halves. Lanes past the end of the row add `+0`.

use crate::simd::{LANES, Simd, Vector};

/// Slots of a sum: 4 registers of AVX-512, 8 of AVX2, 16 of NEON. Enough independent chains for each of them.
const SLOTS: usize = 4 * LANES;

/// Whether vectors are whole registers, of which there are 32, and not halves of 16.
pub(crate) const fn has_many_registers<S: Simd>() -> bool {
    S::MR * S::NV >= 12
}

/// `[f(0), f(1), f(2), f(3)]`, inlined for certain, which `core::array::from_fn` is not.
#[inline(always)]
pub(crate) fn four<T>(mut f: impl FnMut(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

/// Calls `f(j, v)` for every vector `v` of `row`, `j` being its slot group. Lanes past the end hold `fill`.
#[inline(always)]
pub(crate) fn for_each<S: Simd>(s: S, row: &[f32], fill: S::V, mut f: impl FnMut(usize, S::V)) {
    let (whole, tail) = row.as_chunks::<SLOTS>();
    for slots in whole {
        for j in 0..4 {
            f(j, s.load(&slots[j * LANES..]));
        }
    }
    for (j, part) in tail.chunks(LANES).enumerate() {
        f(j, s.load_partial(part, fill));
    }
}

/// [`for_each`] of `row`, and beside it of `next`, which is as long or empty and whose lanes past the end hold 0. Where registers are few, `next` is
/// empty, and `row` comes in two passes: sums of two kinds, eight vectors, would take all of them and be kept in memory.
#[inline(always)]
pub(crate) fn for_each_beside<S: Simd>(
    s: S,
    row: &[f32],
    fill: S::V,
    next: &[f32],
    mut f: impl FnMut(usize, S::V),
    mut of_next: impl FnMut(usize, S::V),
) {
    let ((whole, tail), (next, next_tail)) = (row.as_chunks::<SLOTS>(), next.as_chunks::<SLOTS>());
    if has_many_registers::<S>() {
        let mut next = next.iter();
        for slots in whole {
            let next = next.next();
            for j in 0..4 {
                f(j, s.load(&slots[j * LANES..]));
                if let Some(next) = next {
                    of_next(j, s.load(&next[j * LANES..]));
                }
            }
        }
    } else {
        debug_assert!(next.is_empty());
        for slots in whole {
            f(0, s.load(slots));
            f(1, s.load(&slots[LANES..]));
        }
        for slots in whole {
            f(2, s.load(&slots[2 * LANES..]));
            f(3, s.load(&slots[3 * LANES..]));
        }
    }
    for (j, part) in tail.chunks(LANES).enumerate() {
        f(j, s.load_partial(part, fill));
    }
    for (j, part) in next_tail.chunks(LANES).enumerate() {
        of_next(j, s.load_partial(part, s.splat(0.0)));
    }
}

/// Folds four slot groups: `(0 + 1) + (2 + 3)`, then the lanes by halves.
#[inline(always)]
pub(crate) fn fold<V: Vector>(slots: [V; 4]) -> f32 {
    ((slots[0] + slots[1]) + (slots[2] + slots[3])).sum()
}

/// Calls `then(on, j, f(on, j))` for the four vectors of 64 slots. All of `f` comes first where there are registers for it: what is independent
/// hides the latency of a polynomial. Elsewhere the constants would lose theirs.
#[inline(always)]
pub(crate) fn each_of_four<S: Simd, T: ?Sized>(
    on: &mut T,
    f: impl Fn(&T, usize) -> S::V,
    mut then: impl FnMut(&mut T, usize, S::V),
) {
    if has_many_registers::<S>() {
        let v = four(
            #[inline(always)]
            |j| f(on, j),
        );
        for (j, v) in v.into_iter().enumerate() {
            then(on, j, v);
        }
    } else {
        for j in 0..4 {
            let v = f(on, j);
            then(on, j, v);
        }
    }
}

/// Makes 64 slots of a row `f(j)`, which is given what is in them, and adds that to the slots of its sum.
#[inline(always)]
pub(crate) fn store_and_add<S: Simd>(
    row: &mut [f32; SLOTS],
    slots: &mut [S::V; 4],
    f: impl Fn(&[f32; SLOTS], usize) -> S::V,
) {
    each_of_four::<S, _>(
        row,
        f,
        #[inline(always)]
        |row, j, v| {
            v.store(&mut row[j * LANES..]);
            slots[j] = slots[j] + v;
        },
    );
}

/// The sum of `f(x)` over a row. `f(fill)` is `+0`.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, row: &[f32], fill: S::V, f: impl Fn(S::V) -> S::V) -> f32 {
    let mut slots = [s.splat(0.0); 4];
    for_each(
        s,
        row,
        fill,
        #[inline(always)]
        |j, v| slots[j] = slots[j] + f(v),
    );
    fold(slots)
}

/// The largest element by `if a > b { a } else { b }`, `-inf` for an empty row. It may pass over a NaN.
#[inline(always)]
pub(crate) fn max<S: Simd>(s: S, row: &[f32]) -> f32 {
    let least = s.splat(f32::NEG_INFINITY);
    let mut slots = [least; 4];
    for_each(
        s,
        row,
        least,
        #[inline(always)]
        |j, v| slots[j] = v.max(slots[j]),
    );
    fold_max(slots)
}

/// The largest of four slot groups.
#[inline(always)]
pub(crate) fn fold_max<V: Vector>(slots: [V; 4]) -> f32 {
    (slots[0].max(slots[1])).max(slots[2].max(slots[3])).max_lane()
}

/// Writes `f` of every element of `source`, or else of the row itself, to the row; tails as partial vectors of the same arithmetic.
#[inline(always)]
pub(crate) fn map<S: Simd>(s: S, source: Option<&[f32]>, row: &mut [f32], f: impl Fn(S::V) -> S::V) {
    let source = source.map(|source| source.as_chunks::<SLOTS>());
    let (whole, tail) = row.as_chunks_mut::<SLOTS>();
    for (i, slots) in whole.iter_mut().enumerate() {
        each_of_four::<S, _>(
            slots,
            #[inline(always)]
            |slots, j| f(s.load(&source.map_or(slots, |(source, _)| &source[i])[j * LANES..])),
            #[inline(always)]
            |slots, j, v| v.store(&mut slots[j * LANES..]),
        );
    }
    for (i, part) in tail.chunks_mut(LANES).enumerate() {
        let x = source.map_or(&*part, |(_, source)| &source[i * LANES..][..part.len()]);
        f(s.load_partial(x, s.splat(0.0))).store_partial(part);
    }
}
