//! Keys and values as attention reads them: chunks of 256 tokens, and in each chunk its keys and its values by head.
//!
//! A block of 64 tokens has a head's keys transposed, `[head_dim][64]`, which is a panel of the score product, and its values,
//! `[64][value_dim]`, which are rows of the output product. Both begin at a multiple of 64 tokens from their sequence's first key. In a chunk the
//! keys of all heads stand before the values, `[keys or values][head][block]`: what decode reads of the heads of a tile is a run of keys and a
//! run of values, of 64 KiB a head at 64 dimensions. From memory that is 1.4 times as fast as pieces of 16 KiB, each of which the core's prefetchers have
//! to find.
//!
//! The last chunk of a sequence has the blocks that the sequence has, so a short one takes no more room; a cache has whole chunks.

use core::ops::Range;

use crate::attention::Heads;
use crate::error::{Error, check_size};
use crate::simd::{LANES, Simd, Vector};
use crate::view::{BlocksMut, MatMut, MatRef};

/// Tokens of a block: the columns of a panel.
pub(crate) const BLOCK: usize = crate::gemm::PANEL;

/// Blocks of a chunk of keys, the unit in which softmax is folded.
pub(crate) const CHUNK_BLOCKS: usize = 4;

/// Keys of a chunk: 64 rows of scores (64 KiB) and a head's keys and values of the chunk (128 KiB at 64 dimensions) stay in L2.
pub(crate) const CHUNK: usize = CHUNK_BLOCKS * BLOCK;

/// The shape of every block of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyLayout {
    pub(crate) n_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
}

impl KeyLayout {
    /// A row of values, rounded up to whole vectors.
    #[inline(always)]
    pub(crate) fn value_stride(self) -> usize {
        self.value_dim.next_multiple_of(16)
    }

    /// A head's keys of a block.
    #[inline(always)]
    pub(crate) fn key_len(self) -> usize {
        self.head_dim * BLOCK
    }

    /// A head's values of a block.
    #[inline(always)]
    pub(crate) fn value_len(self) -> usize {
        self.value_stride() * BLOCK
    }

    #[inline(always)]
    pub(crate) fn block_len(self) -> usize {
        (self.key_len() + self.value_len()) * self.n_heads
    }

    /// The blocks of `data`, to be written: `[keys, values]` of each, in a row for each head. `chunks` are the first blocks of each chunk, and
    /// the end.
    pub(super) fn blocks<'a>(self, data: &'a mut [f32], chunks: &'a [usize]) -> BlocksMut<'a> {
        BlocksMut::new(data, chunks, self.n_heads, [self.key_len(), self.value_len()])
    }

    /// Whether it is the same as `expected`; `args` are the names of its sizes.
    pub(crate) fn check(self, args: [&'static str; 3], expected: KeyLayout) -> Result<(), Error> {
        check_size(args[0], expected.n_heads, self.n_heads)?;
        check_size(args[1], expected.head_dim, self.head_dim)?;
        check_size(args[2], expected.value_dim, self.value_dim)
    }

    /// Whether it is that of these heads.
    pub(super) fn check_heads(self, heads: &Heads) -> Result<(), Error> {
        heads.layout().check(["heads.n_kv_heads", "heads.head_dim", "heads.value_dim"], self)
    }

    /// Whether rows of keys and of values belong together and to these heads.
    pub(super) fn check_rows(self, k: MatRef<'_>, v: MatRef<'_>) -> Result<(), Error> {
        check_size("k.cols", self.n_heads * self.head_dim, k.cols())?;
        check_size("v.rows", k.rows(), v.rows())?;
        check_size("v.cols", self.n_heads * self.value_dim, v.cols())
    }

    /// Writes some rows as the tokens from `token` on of a sequence whose blocks are the `ring` from `first_block` on, round and round.
    pub(super) fn store_rows<S: Simd>(
        self,
        s: S,
        blocks: &mut BlocksMut<'_>,
        (first_block, ring): (usize, usize),
        mut token: usize,
        k: MatRef<'_>,
        v: MatRef<'_>,
        rows: Range<usize>,
    ) {
        let mut start = rows.start;
        while start < rows.end {
            let (block, t) = (first_block + token / BLOCK % ring, token % BLOCK);
            let end = rows.end.min(start + BLOCK - t);
            self.store_in_block(s, blocks.block(block), t, k, v, start..end);
            (token, start) = (token + end - start, end);
        }
    }

    /// Writes some rows as the tokens from `t` on of a block.
    ///
    /// Sixteen rows at a time through all heads: they are read from begin to end, and every line of keys is written whole and once.
    pub(super) fn store_in_block<S: Simd>(
        self,
        s: S,
        [mut keys, mut values]: [MatMut<'_>; 2],
        t: usize,
        k: MatRef<'_>,
        v: MatRef<'_>,
        rows: Range<usize>,
    ) {
        for start in rows.clone().step_by(LANES) {
            let (t, group) = (t + start - rows.start, start..rows.end.min(start + LANES));
            let (k, v) = (k.block(group.clone(), 0..k.cols()), v.block(group, 0..v.cols()));
            if k.rows() == LANES {
                s.vectorize(
                    #[inline(always)]
                    || {
                        self.store_sixteen_keys(s, &mut keys, t, 0, k);
                        self.store_value_rows(s, &mut values, t, 0, v);
                    },
                );
            } else {
                self.store_keys(s, &mut keys, t, 0, k);
                self.store_values(s, &mut values, t, 0, v);
            }
        }
    }

    /// Writes columns of projected keys, `first` and those after it, as the tokens from `t` on of a block's `keys`; column 0 is the first head
    /// of these.
    #[inline(always)]
    pub(crate) fn store_keys<S: Simd>(
        self,
        s: S,
        keys: &mut MatMut<'_>,
        t: usize,
        first: usize,
        k: MatRef<'_>,
    ) {
        let whole = k.rows() / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            let k = k.block(start..start + LANES, 0..k.cols());
            s.vectorize(
                #[inline(always)]
                || self.store_sixteen_keys(s, keys, t + start, first, k),
            );
        }
        if whole < k.rows() {
            // A place in each of many lines is nothing that the hardware foresees.
            self.by_head(self.head_dim, first, k.cols(), |head, dims, _| {
                for step in key_steps(keys, head, dims).chunks_exact(BLOCK) {
                    s.prefetch_to_l2(&raw const step[t + whole]);
                }
            });
        }
        for row in whole..k.rows() {
            let x = k.row(row);
            self.by_head(self.head_dim, first, x.len(), |head, dims, cols| {
                let steps = key_steps(keys, head, dims).chunks_exact_mut(BLOCK);
                for (step, &x) in steps.zip(&x[cols]) {
                    step[t + row] = x;
                }
            });
        }
    }

    /// The same for sixteen rows, transposed in registers.
    #[inline(always)]
    fn store_sixteen_keys<S: Simd>(self, s: S, keys: &mut MatMut<'_>, t: usize, first: usize, k: MatRef<'_>) {
        let zero = s.splat(0.0);
        self.by_head(
            self.head_dim,
            first,
            k.cols(),
            #[inline(always)]
            |head, dims, cols| {
                let steps = key_steps(keys, head, dims).chunks_mut(LANES * BLOCK);
                for (part, steps) in steps.enumerate() {
                    let (col, dims) = (cols.start + part * LANES, steps.len() / BLOCK);
                    let mut sixteen = [zero; LANES];
                    for (i, key) in sixteen.iter_mut().enumerate() {
                        let k = &k.row(i)[col..col + dims];
                        *key = if dims == LANES { s.load(k) } else { s.load_partial(k, zero) };
                    }
                    for (x, step) in s.transpose(sixteen).into_iter().zip(steps.chunks_exact_mut(BLOCK)) {
                        x.store(&mut step[t..t + LANES]);
                    }
                }
            },
        );
    }

    /// As [`store_keys`](Self::store_keys), of values.
    #[inline(always)]
    pub(crate) fn store_values<S: Simd>(
        self,
        s: S,
        values: &mut MatMut<'_>,
        t: usize,
        first: usize,
        v: MatRef<'_>,
    ) {
        s.vectorize(
            #[inline(always)]
            || self.store_value_rows(s, values, t, first, v),
        );
    }

    #[inline(always)]
    fn store_value_rows<S: Simd>(self, s: S, values: &mut MatMut<'_>, t: usize, first: usize, v: MatRef<'_>) {
        for row in 0..v.rows() {
            let x = v.row(row);
            self.by_head(
                self.value_dim,
                first,
                x.len(),
                #[inline(always)]
                |head, dims, cols| {
                    let values = &mut values.row_mut(head)[(t + row) * self.value_stride()..][dims];
                    let (values, tail) = values.as_chunks_mut::<LANES>();
                    let (x, x_tail) = x[cols].as_chunks::<LANES>();
                    for (values, x) in values.iter_mut().zip(x) {
                        s.load(x).store(values);
                    }
                    s.load_partial(x_tail, s.splat(0.0)).store_partial(tail);
                },
            );
        }
    }

    /// Cuts a run of columns where heads end: `f(head, dimensions of it, columns of the run)`.
    #[inline(always)]
    fn by_head(
        self,
        dim: usize,
        first: usize,
        cols: usize,
        mut f: impl FnMut(usize, Range<usize>, Range<usize>),
    ) {
        let (mut head, mut at, mut col) = (first / dim, first % dim, 0);
        while col < cols {
            let n = (dim - at).min(cols - col);
            f(head, at..at + n, col..col + n);
            (head, at, col) = (head + 1, 0, col + n);
        }
    }
}

/// Some dimensions of a head's keys, [`BLOCK`] elements each.
#[inline(always)]
fn key_steps<'a>(keys: &'a mut MatMut<'_>, head: usize, dims: Range<usize>) -> &'a mut [f32] {
    &mut keys.row_mut(head)[dims.start * BLOCK..dims.end * BLOCK]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, dispatch};

    #[test]
    fn every_element_finds_its_place_on_every_instruction_set() -> Result<(), Error> {
        for isa in Isa::available() {
            for (n_heads, head_dim, value_dim) in [(1, 16, 16), (2, 5, 3), (3, 20, 33), (2, 64, 64)] {
                let layout = KeyLayout { n_heads, head_dim, value_dim };
                // A row stride of its own, and tokens that begin inside of a block and end in another.
                for (token, rows) in
                    [(0, 1), (0, 15), (0, 16), (3, 17), (0, 64), (40, 70), (63, 34), (250, 140)]
                {
                    let matrix = |dim: usize| {
                        let (cols, stride) = (n_heads * dim, n_heads * dim + 7);
                        let data: Vec<f32> = (0..rows * stride).map(|i| i as f32 + 1.0).collect();
                        (data, cols, stride)
                    };
                    let ((k, k_cols, k_stride), (v, v_cols, v_stride)) =
                        (matrix(head_dim), matrix(value_dim));
                    let keys = MatRef::new(&k, rows, k_cols, k_stride)?;
                    let values = MatRef::new(&v, rows, v_cols, v_stride)?;
                    // Another sequence's blocks before it.
                    let (before, blocks) = (3, (token + rows).div_ceil(BLOCK));
                    let ends = (0..blocks).step_by(CHUNK_BLOCKS).chain([blocks]).map(|end| before + end);
                    let chunks: Vec<usize> = [0].into_iter().chain(ends).collect();
                    let mut got = vec![0.0; (before + blocks) * layout.block_len()];
                    dispatch!(isa, |s| {
                        let mut all = layout.blocks(&mut got, &chunks);
                        layout.store_rows(s, &mut all, (before, blocks), token, keys, values, 0..rows);
                    });

                    let mut want = vec![0.0; got.len()];
                    for (row, t) in (0..rows).zip(token..) {
                        for head in 0..n_heads {
                            let first = t / CHUNK * CHUNK_BLOCKS;
                            let of_chunk = (blocks - first).min(CHUNK_BLOCKS);
                            let start = (before + first) * layout.block_len();
                            let block = head * of_chunk + t % CHUNK / BLOCK;
                            let keys_start = start + block * layout.key_len();
                            for d in 0..head_dim {
                                want[keys_start + d * BLOCK + t % BLOCK] = keys.row(row)[head * head_dim + d];
                            }
                            let values_start = start
                                + n_heads * of_chunk * layout.key_len()
                                + head * of_chunk * layout.value_len();
                            for d in 0..value_dim {
                                want[values_start + t % CHUNK * layout.value_stride() + d] =
                                    values.row(row)[head * value_dim + d];
                            }
                        }
                    }
                    assert_eq!(got, want, "{isa}, {layout:?}, {rows} rows from {token}");
                }
            }
        }
        Ok(())
    }
}
