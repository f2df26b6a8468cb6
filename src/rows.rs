//! Operations that treat each row alone: how they meet threads.

use crate::context::Context;
use crate::error::{Error, check_size};
use crate::exec::Team;
use crate::simd::Simd;
use crate::split::Split;
use crate::view::{MatMut, MatRef};

/// Elements below which inviting helpers (tens of microseconds) costs more than it brings.
pub(crate) const SERIAL: usize = 1 << 16;

/// Elements of a tile: some microseconds of work, 64 KiB of data.
pub(crate) const GRAIN: usize = 1 << 14;

/// Rows that are worked on together: what one row's pass must wait for, a sum or a maximum, is ready when its turn comes again.
pub(crate) const TOGETHER: usize = 4;

/// Columns up to which so many rows stay in L1 between their passes.
const SHORT: usize = 1024;

/// Runs `f(source, x)` on tiles of several rows on the context's threads. `f` reads the source, if there is one, instead of `x`; it has the tile's
/// rows. `f` is compiled once with a source and once without: a loop that may read from either place is slower.
#[inline(always)]
pub(crate) fn for_tiles<S: Simd>(
    ctx: Context<'_>,
    s: S,
    source: Option<MatRef<'_>>,
    x: MatMut<'_>,
    f: impl Fn(Option<MatRef<'_>>, &mut MatMut<'_>) + Sync,
) {
    let cols = x.cols();
    match source {
        None => tiles(
            ctx,
            s,
            x,
            #[inline(always)]
            |_, x| f(None, x),
        ),
        Some(source) => tiles(
            ctx,
            s,
            x,
            #[inline(always)]
            |first, x| f(Some(source.block(first..first + x.rows(), 0..cols)), x),
        ),
    }
}

/// Runs `f(first row, x)`.
#[inline(always)]
fn tiles<S: Simd>(ctx: Context<'_>, s: S, mut x: MatMut<'_>, f: impl Fn(usize, &mut MatMut<'_>) + Sync) {
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
            &Split::every(rows, cols, GRAIN / cols),
            #[inline(always)]
            |first, _, mut tile, _| f(first, &mut tile),
        );
    });
}

/// Row `i` of what is read: of the source if there is one, or else of `x`.
#[inline(always)]
pub(crate) fn input<'a>(source: Option<MatRef<'a>>, x: &'a MatMut<'_>, i: usize) -> &'a [f32] {
    source.map_or_else(|| x.row(i), |source| source.row(i))
}

/// Rows that are worked on together.
#[inline(always)]
pub(crate) fn together(cols: usize) -> usize {
    if cols <= SHORT { TOGETHER } else { 1 }
}

/// Whether `x` can be the source of `out`.
pub(crate) fn check_shape(x: MatRef<'_>, out: &MatMut<'_>) -> Result<(), Error> {
    check_size("out.rows", x.rows(), out.rows())?;
    check_size("out.cols", x.cols(), out.cols())
}
