//! Operations that treat each row alone: how they meet threads.

use crate::context::Context;
use crate::error::{Error, check_size};
use crate::exec::Team;
use crate::simd::Simd;
use crate::view::{MatMut, MatRef};

/// Elements below which inviting helpers (tens of microseconds) costs more than it brings.
const SERIAL: usize = 1 << 16;

/// Elements of a tile: some microseconds of work, 64 KiB of data.
const GRAIN: usize = 1 << 14;

/// Runs `f` on every row, in tiles of several rows on the context's threads. With a `source` of the same shape a row is first copied
/// from there: just before it is worked on, so that it is in L1.
#[inline(always)]
pub(crate) fn for_rows<S: Simd>(
    ctx: Context<'_>,
    s: S,
    source: Option<MatRef<'_>>,
    x: MatMut<'_>,
    f: impl Fn(&mut [f32]) + Sync,
) {
    for_numbered_rows(
        ctx,
        s,
        source,
        x,
        #[inline(always)]
        |_, row| f(row),
    );
}

/// The same, with the number of the row.
#[inline(always)]
pub(crate) fn for_numbered_rows<S: Simd>(
    ctx: Context<'_>,
    s: S,
    source: Option<MatRef<'_>>,
    mut x: MatMut<'_>,
    f: impl Fn(usize, &mut [f32]) + Sync,
) {
    let (rows, cols) = (x.rows(), x.cols());
    if cols == 0 {
        return;
    }
    if ctx.members() == 1 || rows * cols < SERIAL {
        s.vectorize(
            #[inline(always)]
            || each_row(source, 0, &mut x, &f),
        );
        return;
    }
    Team::new(ctx.members(), 0).region(ctx.executor(), |crew| {
        crew.blocks(
            s,
            &mut x,
            ((GRAIN / cols).max(1), cols),
            #[inline(always)]
            |first, _, mut block, _| each_row(source, first, &mut block, &f),
        );
    });
}

#[inline(always)]
fn each_row(source: Option<MatRef<'_>>, first: usize, x: &mut MatMut<'_>, f: &impl Fn(usize, &mut [f32])) {
    for i in 0..x.rows() {
        if let Some(source) = source {
            x.row_mut(i).copy_from_slice(source.row(first + i));
        }
        f(first + i, x.row_mut(i));
    }
}

/// Whether `x` can be the source of `out`.
pub(crate) fn check_shape(x: MatRef<'_>, out: &MatMut<'_>) -> Result<(), Error> {
    check_size("out.rows", x.rows(), out.rows())?;
    check_size("out.cols", x.cols(), out.cols())
}
