//! How a sub-layer ends: the closing projection, the residual, and the norm, on rows that are still in cache.

use crate::activation::Activation;
use crate::exec::Crew;
use crate::gemm::PANEL;
use crate::linear::{Linear, Residual, padded_stride};
use crate::norm::Placement;
use crate::simd::{LANES, Simd, Vector};
use crate::split::{Columns, MAX_ROWS, Split};
use crate::view::{MatMut, MatRef};

/// Scratch per row beside the product's sums.
pub(crate) fn close_scratch(placement: &Placement, d_model: usize) -> usize {
    if matches!(placement, Placement::Sandwich { .. }) { padded_stride(d_model) } else { 0 }
}

/// Scratch of a tile of [`close_phase`].
pub(crate) fn close_phase_scratch(placement: &Placement, d_model: usize) -> usize {
    MAX_ROWS * (PANEL + close_scratch(placement, d_model))
}

/// `x = norm(alpha x + branch)` and its kin for whole rows, where `write(residual, out)` writes `branch + residual`.
#[inline(always)]
pub(crate) fn close_rows<S: Simd>(
    s: S,
    placement: &Placement,
    x: &mut MatMut<'_>,
    branch: &mut [f32],
    write: impl FnOnce(Residual<'_>, &mut MatMut<'_>),
) {
    match placement {
        Placement::Post { norm, alpha } => {
            write(Residual::Out(*alpha), x);
            norm.normalise(s, x);
        }
        Placement::Pre { .. } | Placement::Plain => write(Residual::Out(1.0), x),
        Placement::Sandwich { after, .. } => {
            let mut branch = MatMut::scratch(branch, x.rows(), x.cols(), padded_stride(x.cols()));
            write(Residual::None, &mut branch);
            after.normalise(s, &mut branch);
            let zero = s.splat(0.0);
            for i in 0..x.rows() {
                for (x, y) in x.row_mut(i).chunks_mut(LANES).zip(branch.row(i).chunks(LANES)) {
                    (s.load_partial(x, zero) + s.load_partial(y, zero)).store_partial(x);
                }
            }
        }
    }
}

/// The same for all rows of `x`: one phase of whole rows, or with few rows a phase of columns and one of norms. `next` is the map whose
/// columns are dealt out after it.
pub(crate) fn close_phase<S: Simd>(
    s: S,
    crew: &mut Crew<'_>,
    a: MatRef<'_>,
    linear: &Linear,
    placement: &Placement,
    x: &mut MatMut<'_>,
    next: Option<Columns<'_>>,
) {
    let d_model = x.cols();
    // The branch has a norm of its own before it is added, which needs whole rows.
    let cut = if matches!(placement, Placement::Sandwich { .. }) { Split::even } else { Split::new };
    let split = cut(x.rows(), d_model, MAX_ROWS, crew.members());
    let rows_of = |row: usize, n: usize| a.block(row..row + n, 0..a.cols());
    let (norm, alpha) = match placement {
        Placement::Post { norm, alpha } => (Some(norm), *alpha),
        Placement::Pre { .. } | Placement::Sandwich { .. } | Placement::Plain => (None, 1.0),
    };
    if split.is_by_rows(d_model) {
        crew.blocks(
            s,
            x,
            &split,
            #[inline(always)]
            |row, _, mut x, scratch| {
                let (scratch, branch) = scratch.split_at_mut(MAX_ROWS * PANEL);
                let a = rows_of(row, x.rows());
                close_rows(
                    s,
                    placement,
                    &mut x,
                    branch,
                    #[inline(always)]
                    |residual, out| {
                        linear.tile(s, a, 0, Activation::None, residual, out, scratch, linear.from(0));
                    },
                );
            },
        );
        return;
    }
    let columns = linear.columns(x.rows(), crew.members());
    crew.blocks(
        s,
        x,
        &split,
        #[inline(always)]
        |row, col, mut x, scratch| {
            let a = rows_of(row, x.rows());
            let then = columns.after(col, next);
            linear.tile(s, a, col, Activation::None, Residual::Out(alpha), &mut x, scratch, then);
        },
    );
    if let Some(norm) = norm {
        let split = Split::every(x.rows(), d_model, x.rows().div_ceil(crew.members()));
        crew.blocks(
            s,
            x,
            &split,
            #[inline(always)]
            |_, _, mut x, _| norm.normalise(s, &mut x),
        );
    }
}
