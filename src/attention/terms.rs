//! What a score is beside the product of query and key.
//!
//! `score = cap(scale * ((q + u) . k_j + (q + w) . R[p - j] + (q + s) . E[same segment or not])) + bias`: one formula for Transformer-XL, XLNet
//! and the plain attention, where the terms are absent. No shifted tensor is formed: for one query, consecutive keys walk `R` backwards
//! by one row, so `R` is stored in descending distance and a tile reads a slice of one small product.

use crate::attention::bits::{Bits, Query};
use crate::attention::layout::BLOCK;
use crate::error::{Error, check_dim, check_size, checked_product};
use crate::view::MatRef;
use crate::workspace::AlignedBuffer;

/// Terms of the scores; all are absent by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms<'a> {
    /// Added to the finished score; `-inf` forbids the key.
    pub bias: Option<Bias<'a>>,
    /// Relative positions.
    pub relative: Option<Relative<'a>>,
    /// Whether query and key are of the same segment.
    pub segment: Option<SegmentTerm<'a>>,
}

/// An additive bias `[sequences, heads, queries, keys]`; one sequence, head or query serves all.
#[derive(Clone, Copy, Debug)]
pub struct Bias<'a> {
    data: &'a [f32],
    strides: [usize; 3],
    keys: usize,
    dims: [usize; 3],
}

impl<'a> Bias<'a> {
    /// A bias over contiguous data.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::Size`] if `data` has another length.
    pub fn new(data: &'a [f32], [sequences, heads, queries, keys]: [usize; 4]) -> Result<Bias<'a>, Error> {
        for (arg, n) in [("bias sequences", sequences), ("bias heads", heads), ("bias queries", queries)] {
            check_dim(arg, n)?;
        }
        check_size("bias.len()", checked_product("bias", &[sequences, heads, queries, keys])?, data.len())?;
        let stride = |n: usize, step: usize| if n == 1 { 0 } else { step };
        let strides =
            [stride(sequences, heads * queries * keys), stride(heads, queries * keys), stride(queries, keys)];
        Ok(Bias { data, strides, keys, dims: [sequences, heads, queries] })
    }

    pub(crate) fn check(&self, batch: [usize; 3], longest_key: usize) -> Result<(), Error> {
        for ((arg, &n), needed) in
            ["bias sequences", "bias heads", "bias queries"].into_iter().zip(&self.dims).zip(batch)
        {
            if n != 1 && n < needed {
                return Err(Error::TooSmall { arg, min: needed, actual: n });
            }
        }
        if self.keys < longest_key {
            return Err(Error::TooSmall { arg: "bias keys", min: longest_key, actual: self.keys });
        }
        Ok(())
    }

    /// The bias of a query for the keys of its sequence.
    #[inline(always)]
    pub(crate) fn row(&self, query: Query) -> &'a [f32] {
        let [s, h, q] = self.strides;
        &self.data[query.segment * s + query.head * h + query.place * q..][..self.keys]
    }
}

/// How far from 0 positions and distances may be: sums and differences of a few of them do not overflow.
const MAX_POSITION: usize = isize::MAX as usize / 8;

/// Whether positions or distances are not too far from 0.
pub(crate) fn check_positions(
    arg: &'static str,
    positions: impl IntoIterator<Item = isize>,
) -> Result<(), Error> {
    match positions.into_iter().map(isize::unsigned_abs).find(|&p| p > MAX_POSITION) {
        None => Ok(()),
        Some(actual) => Err(Error::TooLarge { arg, max: MAX_POSITION, actual }),
    }
}

/// Relative positions: `(q + w) . R[p - j]` is added to `(q + u) . k_j`.
#[derive(Clone, Copy, Debug)]
pub struct Relative<'a> {
    /// Added to queries before they meet keys, `[n_heads * head_dim]`.
    pub u: &'a [f32],
    /// Added to queries before they meet positions, `[n_heads * head_dim]`.
    pub w: &'a [f32],
    /// The projected positions.
    pub table: &'a RelativeTable,
}

/// Projected relative positions, packed once. Distances outside of the table add nothing.
#[derive(Debug)]
pub struct RelativeTable {
    /// `[head][panel][head_dim][64]`, in descending distance.
    data: AlignedBuffer,
    n_heads: usize,
    head_dim: usize,
    rows: usize,
    last: isize,
}

impl RelativeTable {
    /// Packs `r`, `[distances, n_heads * head_dim]`, whose row `i` is distance `first + i` of a query after a key.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::NotDivisible`] if the columns are not those of `n_heads` heads, [`Error::Overflow`], [`Error::TooLarge`] if
    /// a distance, of either sign, is far beyond the length of any sequence.
    pub fn new(r: MatRef<'_>, first: isize, n_heads: usize) -> Result<RelativeTable, Error> {
        check_dim("n_heads", n_heads)?;
        check_dim("r.cols", r.cols())?;
        check_dim("r.rows", r.rows())?;
        if !r.cols().is_multiple_of(n_heads) {
            return Err(Error::NotDivisible { arg: "r.cols", actual: r.cols(), by: n_heads });
        }
        let (rows, head_dim) = (r.rows(), r.cols() / n_heads);
        check_positions("first", [first, first.saturating_add_unsigned(rows)])?;
        let panels = rows.div_ceil(BLOCK);
        let len = checked_product("r", &[panels * BLOCK, r.cols()])?;
        let mut data = AlignedBuffer::scratch(len);
        // Panel by panel of each head, which is 16 KiB at 64 dimensions: what is written stays in L1.
        for panel in 0..panels {
            let places = panel * BLOCK..rows.min((panel + 1) * BLOCK);
            for head in 0..n_heads {
                let out = &mut data[(head * panels + panel) * head_dim * BLOCK..][..head_dim * BLOCK];
                for (i, x) in places.clone().enumerate() {
                    let row = &r.row(rows - 1 - x)[head * head_dim..][..head_dim];
                    for (lane, &value) in out[i..].iter_mut().step_by(BLOCK).zip(row) {
                        *lane = value;
                    }
                }
            }
        }
        Ok(RelativeTable { data, n_heads, head_dim, rows, last: first + rows as isize - 1 })
    }

    pub(crate) fn check(&self, n_heads: usize, head_dim: usize) -> Result<(), Error> {
        check_size("relative table heads", n_heads, self.n_heads)?;
        check_size("relative table head_dim", head_dim, self.head_dim)
    }

    /// Where key 0 of a query at `p` is in the table; key `j` follows `j` places later.
    #[inline(always)]
    pub(crate) fn place(&self, p: isize) -> isize {
        self.last - p
    }

    /// Panel `[head_dim][64]` of places `64 * panel..`, if the table has it.
    #[inline(always)]
    pub(crate) fn panel(&self, head: usize, panel: isize) -> Option<&[f32]> {
        let panels = self.rows.div_ceil(BLOCK);
        let panel = usize::try_from(panel).ok().filter(|&panel| panel < panels)?;
        let len = self.head_dim * BLOCK;
        Some(&self.data[(head * panels + panel) * len..][..len])
    }
}

/// `(q + s) . E[0]` is added where `same` says that query and key are of the same segment, `(q + s) . E[1]` elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct SegmentTerm<'a> {
    /// Added to queries before they meet `e`, `[n_heads * head_dim]`.
    pub s: &'a [f32],
    /// `[2, n_heads * head_dim]`.
    pub e: &'a [f32],
    /// Which keys are of the query's segment: [`Bits::groups`] with a table that is true on its diagonal.
    pub same: &'a Bits,
}
