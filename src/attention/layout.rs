//! Keys and values as attention reads them: blocks of 64 tokens, and in each block a unit per head, `[block][head]`.
//!
//! A unit is the head's keys transposed, `[head_dim][64]`, which is a panel of the score product, followed by its values,
//! `[64][value_dim]`, which is a panel of the output product. A block belongs to one segment and begins at a multiple of
//! 64 tokens from the segment's first key, so tokens that are projected together own one contiguous run of units.

use core::ops::Range;

use crate::attention::Heads;
use crate::error::{Error, check_size};
use crate::simd::{LANES, Simd, Vector};
use crate::view::MatRef;

/// Tokens of a block: the columns of a panel.
pub(crate) const BLOCK: usize = crate::gemm::PANEL;

/// The shape of every unit of a store.
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

    #[inline(always)]
    pub(crate) fn unit_len(self) -> usize {
        (self.head_dim + self.value_stride()) * BLOCK
    }

    #[inline(always)]
    pub(crate) fn block_len(self) -> usize {
        self.unit_len() * self.n_heads
    }

    /// Whether it is that of these heads.
    pub(super) fn check_heads(self, heads: &Heads) -> Result<(), Error> {
        check_size("heads.n_kv_heads", self.n_heads, heads.n_kv_heads)?;
        check_size("heads.head_dim", self.head_dim, heads.head_dim)?;
        check_size("heads.value_dim", self.value_dim, heads.value_dim)
    }

    /// Whether rows of keys and of values belong together and to these heads.
    pub(super) fn check_rows(self, k: MatRef<'_>, v: MatRef<'_>) -> Result<(), Error> {
        check_size("k.cols", self.n_heads * self.head_dim, k.cols())?;
        check_size("v.rows", k.rows(), v.rows())?;
        check_size("v.cols", self.n_heads * self.value_dim, v.cols())
    }

    /// Writes some rows as the tokens from `token` on of a sequence whose blocks are a ring.
    pub(super) fn store_rows<S: Simd>(
        self,
        s: S,
        blocks: &mut [f32],
        ring: usize,
        mut token: usize,
        k: MatRef<'_>,
        v: MatRef<'_>,
        rows: Range<usize>,
    ) {
        let mut start = rows.start;
        while start < rows.end {
            let (block, t) = (token / BLOCK % ring, token % BLOCK);
            let units = &mut blocks[block * self.block_len()..][..self.block_len()];
            let end = rows.end.min(start + BLOCK - t);
            self.store_in_block(s, units, t, k, v, start..end);
            (token, start) = (token + end - start, end);
        }
    }

    /// Writes some rows as the tokens from `t` on of the block whose units are `units`.
    ///
    /// Sixteen rows at a time through all heads: they are read from begin to end, and every line of keys is written whole and once.
    pub(super) fn store_in_block<S: Simd>(
        self,
        s: S,
        units: &mut [f32],
        t: usize,
        k: MatRef<'_>,
        v: MatRef<'_>,
        rows: Range<usize>,
    ) {
        for start in rows.clone().step_by(LANES) {
            let t = t + start - rows.start;
            let group = start..rows.end.min(start + LANES);
            if group.len() == LANES {
                let (k, v) = (k.block(group.clone(), 0..k.cols()), v.block(group, 0..v.cols()));
                s.vectorize(
                    #[inline(always)]
                    || self.store_sixteen(s, units, t, k, v),
                );
            } else {
                for (t, row) in (t..).zip(group) {
                    self.store_key(units, t, 0, k.row(row));
                    self.store_value(units, t, 0, v.row(row));
                }
            }
        }
    }

    /// Writes sixteen rows as the tokens from `t` on of the block whose units are `units`.
    #[inline(always)]
    fn store_sixteen<S: Simd>(self, s: S, units: &mut [f32], t: usize, k: MatRef<'_>, v: MatRef<'_>) {
        let zero = s.splat(0.0);
        for (head, unit) in units.chunks_exact_mut(self.unit_len()).enumerate() {
            for (part, steps) in unit[..self.head_dim * BLOCK].chunks_mut(LANES * BLOCK).enumerate() {
                let col = head * self.head_dim + part * LANES;
                let dims = steps.len() / BLOCK;
                let mut keys = [zero; LANES];
                for (i, keys) in keys.iter_mut().enumerate() {
                    let k = &k.row(i)[col..col + dims];
                    *keys = if dims == LANES { s.load(k) } else { s.load_partial(k, zero) };
                }
                for (keys, step) in s.transpose(keys).into_iter().zip(steps.chunks_exact_mut(BLOCK)) {
                    keys.store(&mut step[t..t + LANES]);
                }
            }
        }
        for i in 0..LANES {
            let start = self.head_dim * BLOCK + (t + i) * self.value_stride();
            for (unit, v) in
                units.chunks_exact_mut(self.unit_len()).zip(v.row(i).chunks_exact(self.value_dim))
            {
                let values = &mut unit[start..][..self.value_dim];
                let ((v, v_tail), (values, tail)) = (v.as_chunks::<LANES>(), values.as_chunks_mut::<LANES>());
                for (v, values) in v.iter().zip(values) {
                    s.load(v).store(values);
                }
                s.load_partial(v_tail, zero).store_partial(tail);
            }
        }
    }

    /// Writes columns `first..first + x.len()` of a projected key row as token `t` of the block whose units are `units`; column 0
    /// is the first head of `units`.
    #[inline(always)]
    pub(crate) fn store_key(self, units: &mut [f32], t: usize, first: usize, x: &[f32]) {
        self.by_head(self.head_dim, first, x, |head, dims, x| {
            let keys = &mut units[head * self.unit_len()..][..self.head_dim * BLOCK];
            for (step, &x) in keys[dims.start * BLOCK..].chunks_exact_mut(BLOCK).zip(x) {
                step[t] = x;
            }
        });
    }

    /// The same for a row of values.
    #[inline(always)]
    pub(crate) fn store_value(self, units: &mut [f32], t: usize, first: usize, x: &[f32]) {
        self.by_head(self.value_dim, first, x, |head, dims, x| {
            let start = head * self.unit_len() + self.head_dim * BLOCK + t * self.value_stride();
            units[start..][dims].copy_from_slice(x);
        });
    }

    /// Cuts a run of columns where heads end.
    #[inline(always)]
    fn by_head(
        self,
        dim: usize,
        first: usize,
        mut x: &[f32],
        mut f: impl FnMut(usize, Range<usize>, &[f32]),
    ) {
        let (mut head, mut at) = (first / dim, first % dim);
        while !x.is_empty() {
            let (part, rest) = x.split_at(x.len().min(dim - at));
            f(head, at..at + part.len(), part);
            (head, at, x) = (head + 1, 0, rest);
        }
    }
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
                for (token, rows) in [(0, 1), (0, 15), (0, 16), (3, 17), (0, 64), (40, 70), (63, 34)] {
                    let matrix = |dim: usize| {
                        let (cols, stride) = (n_heads * dim, n_heads * dim + 7);
                        let data: Vec<f32> = (0..rows * stride).map(|i| i as f32 + 1.0).collect();
                        (data, cols, stride)
                    };
                    let ((k, k_cols, k_stride), (v, v_cols, v_stride)) =
                        (matrix(head_dim), matrix(value_dim));
                    let keys = MatRef::new(&k, rows, k_cols, k_stride)?;
                    let values = MatRef::new(&v, rows, v_cols, v_stride)?;
                    let blocks = (token + rows).div_ceil(BLOCK);
                    let mut got = vec![0.0; blocks * layout.block_len()];
                    dispatch!(isa, |s| layout.store_rows(s, &mut got, blocks, token, keys, values, 0..rows));

                    let mut want = vec![0.0; got.len()];
                    for (row, t) in (0..rows).zip(token..) {
                        for head in 0..n_heads {
                            let unit = (t / BLOCK * n_heads + head) * layout.unit_len();
                            for d in 0..head_dim {
                                want[unit + d * BLOCK + t % BLOCK] = keys.row(row)[head * head_dim + d];
                            }
                            for d in 0..value_dim {
                                let place = head_dim * BLOCK + t % BLOCK * layout.value_stride() + d;
                                want[unit + place] = values.row(row)[head * value_dim + d];
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
