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

pub(crate) use kernel::{Rhs, Start, product};

/// Columns of a panel: four AVX-512 vectors, or four slices of one cache line for the other instruction sets.
pub(crate) const PANEL: usize = 64;

/// The canonical block of K (`KC`): 512 rows of a panel are 128 KiB, a share of L2 that leaves room for the rows of A.
/// One chain over all of K would carry more rounding error; loading and adding the partial sums costs about 0.6 %.
pub const K_BLOCK: usize = 512;

use crate::simd::Simd;
use crate::view::{MatMut, MatRef};

/// `sums[i][j] = sum over k of a[i][k] * w[k][panel * 64 + j]`, by canonical blocks of K.
pub(crate) fn panel_product<S: Simd>(
    s: S,
    a: MatRef<'_>,
    w: &PackedMatrix,
    panel: usize,
    sums: &mut MatMut<'_>,
) {
    let (rows, k) = (a.rows(), a.cols());
    for start in (0..k).step_by(K_BLOCK) {
        let end = k.min(start + K_BLOCK);
        block_product(s, a.block(0..rows, start..end), w, panel, start, sums, w.ahead(panel, start..end));
    }
}

/// One canonical block of K, from `start`; the first begins the sums, the others are added to them. `next` is the block that is
/// taken after it.
pub(crate) fn block_product<S: Simd>(
    s: S,
    a: MatRef<'_>,
    w: &PackedMatrix,
    panel: usize,
    start: usize,
    sums: &mut MatMut<'_>,
    next: &[f32],
) {
    let mode = if start == 0 { Start::Zero } else { Start::Add };
    product(s, a, Rhs::rows(w.block(panel, start), PANEL), mode, sums, next);
}
