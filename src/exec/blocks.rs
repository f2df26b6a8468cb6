//! Outputs cut into blocks that the members of a crew write at the same time.

#![allow(
    unsafe_code,
    reason = "a block is a part of an output that is borrowed as a whole; those of different tiles are disjoint"
)]

use crate::exec::Crew;
use crate::simd::Simd;
use crate::split::Split;
use crate::view::{BlocksMut, MatMut};

impl Crew<'_> {
    /// Cuts `out` into blocks as `split` says and runs `f(rows.start, cols.start, block, scratch)`
    /// on each: the safe way to let several members write one matrix.
    pub(crate) fn blocks<S: Simd>(
        &mut self,
        s: S,
        out: &mut MatMut<'_>,
        split: &Split,
        f: impl Fn(usize, usize, MatMut<'_>, &mut [f32]) + Sync,
    ) {
        let cols = out.cols();
        if out.rows() == 0 || cols == 0 {
            return;
        }
        assert_eq!(split.rows(), out.rows());
        let (down, width) = (split.down(), split.tile_cols());
        let out = &*out;
        // Tiles of one column block follow one another: a member's own range shares the weights of few columns.
        self.phase(
            s,
            down * cols.div_ceil(width),
            #[inline(always)]
            |tile, scratch| {
                let (rows, c) = (split.tile_rows(tile % down), tile / down * width);
                if rows.is_empty() {
                    return;
                }
                // SAFETY: tiles are claimed once; `tile_rows` ascends, so different tiles are different blocks of the grid; `out` is
                // borrowed exclusively for the whole phase.
                let block = unsafe { out.block_unchecked(rows.clone(), c..cols.min(c + width)) };
                f(rows.start, c, block, scratch);
            },
        );
    }

    /// Cuts `out` at the rows of `cuts` (ascending, first and last included) and into blocks of `col_block` columns, and runs
    /// `f(cut, cols.start, block, scratch)` on each, those of a cut one after another: together they are whole rows.
    pub(crate) fn ragged_blocks<S: Simd>(
        &mut self,
        s: S,
        out: &mut MatMut<'_>,
        cuts: &[usize],
        col_block: usize,
        f: impl Fn(usize, usize, MatMut<'_>, &mut [f32]) + Sync,
    ) {
        assert!(cuts.is_sorted());
        let (cols, down) = (out.cols(), cuts.len().saturating_sub(1));
        let across = cols.div_ceil(col_block);
        let out = &*out;
        self.phase(
            s,
            down * across,
            #[inline(always)]
            |tile, scratch| {
                let (cut, c) = (tile / across, tile % across * col_block);
                // SAFETY: tiles are claimed once; the cuts ascend, so different tiles are different blocks; `out` is
                // borrowed exclusively for the whole phase.
                let block =
                    unsafe { out.block_unchecked(cuts[cut]..cuts[cut + 1], c..cols.min(c + col_block)) };
                f(cut, c, block, scratch);
            },
        );
    }

    /// Cuts a matrix and blocks side by side, as a projection writes queries and head-split keys: tile `(cut, part)` gets the rows of its cut
    /// and the columns of its part of the matrix, and of the blocks likewise, where heads take the place of columns. Either is where it is cut,
    /// and how wide a part is; both have as many cuts and parts, but for a matrix without columns, of which every tile gets none.
    pub(crate) fn paired_blocks<S: Simd>(
        &mut self,
        s: S,
        (matrix, matrix_cuts, width): (&mut MatMut<'_>, &[usize], usize),
        (blocks, block_cuts, heads): (&mut BlocksMut<'_>, &[usize], usize),
        f: impl Fn(usize, usize, MatMut<'_>, BlocksMut<'_>, &mut [f32]) + Sync,
    ) {
        let (matrix, blocks) = (&*matrix, &*blocks);
        assert!(matrix_cuts.is_sorted() && block_cuts.is_sorted() && matrix_cuts.len() == block_cuts.len());
        let (down, parts) = (matrix_cuts.len().saturating_sub(1), blocks.rows().div_ceil(heads));
        assert!(matrix.cols() == 0 || matrix.cols().div_ceil(width) == parts);
        self.phase(
            s,
            down * parts,
            #[inline(always)]
            |tile, scratch| {
                let (cut, part) = (tile % down, tile / down);
                let of = |n: usize, all: usize| all.min(part * n)..all.min((part + 1) * n);
                // SAFETY: tiles are claimed once; the cuts ascend, so different tiles are different blocks of either, or empty ones of a
                // matrix without columns; both are borrowed exclusively for the whole phase.
                let (matrix, blocks) = unsafe {
                    (
                        matrix.block_unchecked(
                            matrix_cuts[cut]..matrix_cuts[cut + 1],
                            of(width, matrix.cols()),
                        ),
                        blocks.part_unchecked(block_cuts[cut]..block_cuts[cut + 1], of(heads, blocks.rows())),
                    )
                };
                f(cut, part, matrix, blocks, scratch);
            },
        );
    }

    /// Runs `f(block, its matrices)` on each of `blocks`.
    pub(crate) fn each_block<S: Simd>(
        &mut self,
        s: S,
        blocks: &mut BlocksMut<'_>,
        f: impl Fn(usize, [MatMut<'_>; 2]) + Sync,
    ) {
        let blocks = &*blocks;
        self.phase(
            s,
            blocks.len(),
            #[inline(always)]
            |block, _| {
                // SAFETY: tiles are claimed once, and `blocks` is borrowed exclusively for the whole phase.
                let mut part = unsafe { blocks.part_unchecked(block..block + 1, 0..blocks.rows()) };
                f(block, part.block(0));
            },
        );
    }

    /// Cuts blocks into parts of all blocks and `n` of their rows and runs `f(row.start, part)` on each.
    pub(crate) fn parts_of_blocks<S: Simd>(
        &mut self,
        s: S,
        blocks: &mut BlocksMut<'_>,
        n: usize,
        f: impl Fn(usize, BlocksMut<'_>) + Sync,
    ) {
        let blocks = &*blocks;
        self.phase(
            s,
            blocks.rows().div_ceil(n),
            #[inline(always)]
            |part, _| {
                let rows = part * n..blocks.rows().min((part + 1) * n);
                // SAFETY: tiles are claimed once, different parts have different rows, and `blocks` is borrowed exclusively for the whole
                // phase.
                let part = unsafe { blocks.part_unchecked(0..blocks.len(), rows.clone()) };
                f(rows.start, part);
            },
        );
    }
}
