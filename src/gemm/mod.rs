//! Matrix products: packed weights, the microkernel, and the product of unpacked operands.
//!
//! The contract of the bits: K is cut into blocks of [`K_BLOCK`] from `k = 0`; inside a block an element of the result
//! is one chain of fused multiply-adds in ascending `k` from `+0.0`; the blocks are added in ascending order. Vectors run
//! over N and never over K, so tile shapes, cache blocks, threads and tails cannot change a bit.

mod kernel;
mod matmul;
mod pack;

pub use matmul::{Strided, StridedMut, matmul};
pub use pack::PackedMatrix;

pub(crate) use kernel::{Start, product};

/// Columns of a panel: four AVX-512 vectors, or four slices of one cache line for the other instruction sets.
pub(crate) const PANEL: usize = 64;

/// The canonical block of K (`KC`): 512 rows of a panel are 128 KiB, a share of L2 that leaves room for the rows of A.
/// One chain over all of K would carry more rounding error; loading and adding the partial sums costs about 0.6 %.
pub const K_BLOCK: usize = 512;

use core::ops::Range;

use crate::simd::Simd;
use crate::view::{MatMut, MatRef};

/// `sums[i][j] = sum over k of a[i][k] * w[k][panel * 64 + j]`, by canonical blocks of K. Weights are fetched ahead to the end of
/// `panels`, of which this is one, and then those that are read `then`.
pub(crate) fn panel_product<S: Simd>(
    s: S,
    a: MatRef<'_>,
    w: &PackedMatrix,
    panel: usize,
    sums: &mut MatMut<'_>,
    (panels, then): (&Range<usize>, &[f32]),
) {
    let (rows, k) = (a.rows(), a.cols());
    for start in (0..k).step_by(K_BLOCK) {
        let steps = start..k.min(start + K_BLOCK);
        // Two tiles of rows have steps for half of the lines: those that follow at once, so that the hardware finds long runs in the rest.
        let distance = if rows > 2 * S::MR { K_BLOCK } else { steps.len() };
        let next = w.ahead(panel, steps.clone(), distance, panels.end, then);
        block_product(s, a.block(0..rows, steps), w, panel, start, sums, next);
    }
}

/// One canonical block of K, from `start`; the first begins the sums, the others are added to them. `next` is fetched meanwhile.
pub(crate) fn block_product<S: Simd>(
    s: S,
    a: MatRef<'_>,
    w: &PackedMatrix,
    panel: usize,
    start: usize,
    sums: &mut MatMut<'_>,
    next: [&[f32]; 2],
) {
    let mode = if start == 0 { Start::Zero } else { Start::Add };
    product(s, a, (w.block(panel, start), PANEL), mode, sums, next);
}
