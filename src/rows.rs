//! Operations that treat each row alone: how they meet threads.

use crate::context::Context;
use crate::error::{Error, check_size};
use crate::exec::Team;
use crate::simd::Simd;
use crate::view::{MatMut, MatRef};

/// Elements below which inviting helpers (tens of microseconds) costs more than it brings.
pub(crate) const SERIAL: usize = 1 << 16;

/// Elements of a tile: some microseconds of work, 64 KiB of data.
pub(crate) const GRAIN: usize = 1 << 14;

/// Rows that are worked on together: what one row's pass must wait for, a sum or a maximum, is ready when its turn comes again.
pub(crate) const TOGETHER: usize = 4;

/// Columns up to which so many rows stay in L1 between their passes.
const SHORT: usize = 1024;

/// Runs `f` on every row, [`TOGETHER`] at a time at most, in tiles of several rows on the context's threads. With a `source` of the same
/// shape rows are first copied from there: just before they are worked on, so that they are in L1.
#[inline(always)]
pub(crate) fn for_rows<S: Simd>(
    ctx: Context<'_>,
    s: S,
    source: Option<MatRef<'_>>,
    x: MatMut<'_>,
    f: impl Fn(&mut MatMut<'_>) + Copy + Sync,
) {
    for_tiles(
        ctx,
        s,
        x,
        #[inline(always)]
        |first, tile| each_group(source, first, tile, f),
    );
}

/// Runs `f(first row, rows)` on tiles of several rows on the context's threads.
#[inline(always)]
pub(crate) fn for_tiles<S: Simd>(
    ctx: Context<'_>,
    s: S,
    mut x: MatMut<'_>,
    f: impl Fn(usize, &mut MatMut<'_>) + Sync,
) {
    let (rows, cols) = (x.rows(), x.cols());
    if cols == 0 {
        return;
    }
    if ctx.members() == 1 || rows * cols < SERIAL {
        s.vectorize(
            #[inline(always)]
            || f(0, &mut x),
        );
        return;
    }
    Team::new(ctx.members(), 0).region(ctx.executor(), |crew| {
        crew.blocks(
            s,
            &mut x,
            ((GRAIN / cols).max(1), cols),
            #[inline(always)]
            |first, _, mut tile, _| f(first, &mut tile),
        );
    });
}

/// Runs `f` on the rows of `x`, [`TOGETHER`] at a time at most; `x` is rows from `first` on of what has the `source`.
#[inline(always)]
pub(crate) fn each_group(
    source: Option<MatRef<'_>>,
    first: usize,
    x: &mut MatMut<'_>,
    f: impl Fn(&mut MatMut<'_>),
) {
    let (rows, cols) = (x.rows(), x.cols());
    let step = together(cols);
    for begin in (0..rows).step_by(step) {
        let mut group = x.block(begin..rows.min(begin + step), 0..cols);
        copy_rows(source, first + begin, &mut group);
        f(&mut group);
    }
}

/// Rows that are worked on together.
#[inline(always)]
pub(crate) fn together(cols: usize) -> usize {
    if cols <= SHORT { TOGETHER } else { 1 }
}

/// Whether there are registers for the sums of two rows: then the first pass over the rows that follow is made beside another.
pub(crate) const fn looks_ahead<S: Simd>() -> bool {
    S::MR * S::NV >= 12
}

/// The rows of `source`, if there is one, from `first` on.
#[inline(always)]
pub(crate) fn copy_rows(source: Option<MatRef<'_>>, first: usize, x: &mut MatMut<'_>) {
    if let Some(source) = source {
        for i in 0..x.rows() {
            x.row_mut(i).copy_from_slice(source.row(first + i));
        }
    }
}

/// Whether `x` can be the source of `out`.
pub(crate) fn check_shape(x: MatRef<'_>, out: &MatMut<'_>) -> Result<(), Error> {
    check_size("out.rows", x.rows(), out.rows())?;
    check_size("out.cols", x.cols(), out.cols())
}
