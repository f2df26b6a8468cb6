//! The QKV projection: three packed products in one phase, stored by head.

use core::ops::Range;

use crate::activation::Activation;
use crate::attention::layout::KeyLayout;
use crate::attention::plan::{MAX_TILE_ROWS, Plan, TILE_ROWS};
use crate::attention::rotary::{Places, Rotary};
use crate::attention::{Heads, KeyStore, check_offsets};
use crate::batchnorm::Affine;
use crate::context::Context;
use crate::error::{Error, check_size};
use crate::exec::{Crew, Team};
use crate::gemm::PANEL;
use crate::isa::dispatch;
use crate::linear::{Linear, Residual, padded_stride};
use crate::norm::{Norm, normalised};
use crate::simd::{LANES, Simd, Vector};
use crate::split::{Columns, Split, TILES, per_tile};
use crate::view::{MatMut, MatRef};

/// Queries, keys and values of the same rows, projected together.
#[derive(Debug)]
pub struct QkvProjection {
    q: Linear,
    k: Linear,
    v: Linear,
    heads: Heads,
    rotary: Option<Rotary>,
    /// A batch norm is in the weights.
    is_behind: bool,
}

/// The rows that are projected, and what happens to them before and after.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) x: MatRef<'a>,
    /// Normalises the rows first.
    pub(crate) norm: Option<&'a Norm>,
    /// Added to what queries and keys, but not values, are projected from: rows of the same shape.
    pub(crate) added: Option<MatRef<'a>>,
    /// Where they stand, for the rotary.
    pub(crate) places: Places<'a>,
}

impl<'a> Rows<'a> {
    /// The rows as they are, at their places.
    fn plain(x: MatRef<'a>) -> Rows<'a> {
        Rows { x, norm: None, added: None, places: Places::default() }
    }

    /// What queries, keys and values of at most [`MAX_TILE_ROWS`] of the rows are projected from.
    fn sources<'b, S: Simd>(&'b self, s: S, rows: Range<usize>, scratch: &'b mut [f32]) -> [MatRef<'b>; 3] {
        let (cols, stride) = (self.x.cols(), padded_stride(self.x.cols()));
        let normed = if self.norm.is_some() { MAX_TILE_ROWS * stride } else { 0 };
        let (scratch, rest) = scratch.split_at_mut(normed);
        let x = normalised(s, self.x.block(rows.clone(), 0..cols), self.norm, scratch);
        let Some(added) = self.added else { return [x; 3] };
        let mut sum = MatMut::scratch(rest, x.rows(), cols, stride);
        s.vectorize(
            #[inline(always)]
            || {
                let zero = s.splat(0.0);
                for (i, row) in rows.enumerate() {
                    let terms = x.row(i).chunks(LANES).zip(added.row(row).chunks(LANES));
                    for (sum, (x, y)) in sum.row_mut(i).chunks_mut(LANES).zip(terms) {
                        (s.load_partial(x, zero) + s.load_partial(y, zero)).store_partial(sum);
                    }
                }
            },
        );
        let sum = sum.into_ref();
        [sum, sum, x]
    }
}

impl QkvProjection {
    /// A projection from its three linear maps, `[heads * head_dim, d_model]` each.
    ///
    /// # Errors
    /// [`Error::Size`] if a map's inputs or outputs do not fit the heads or the others.
    pub fn new(q: Linear, k: Linear, v: Linear, heads: Heads) -> Result<QkvProjection, Error> {
        heads.check()?;
        check_size("q.out_features", heads.query_cols(), q.out_features())?;
        check_size("k.out_features", heads.key_cols(), k.out_features())?;
        check_size("v.out_features", heads.value_cols(), v.out_features())?;
        check_size("k.in_features", q.in_features(), k.in_features())?;
        check_size("v.in_features", q.in_features(), v.in_features())?;
        Ok(QkvProjection { q, k, v, heads, rotary: None, is_behind: false })
    }

    /// The same, with queries and keys turned by their positions. A row stands at its place in its sequence, behind what a cache holds of it.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if more columns turn than a head has.
    ///
    /// ```
    /// use laneformer::{Heads, Linear, MatRef, PackedMatrix, QkvProjection, Rotary, RotaryPairs};
    /// let linear = || {
    ///     let weight = [0.5; 64];
    ///     Linear::new(PackedMatrix::from_out_in(MatRef::contiguous(&weight, 8, 8)?)?, None)
    /// };
    /// let rotary = Rotary::new(RotaryPairs::Halves, 4, 10_000.0, 2048)?;
    /// let qkv = QkvProjection::new(linear()?, linear()?, linear()?, Heads::new(2, 4)?)?.with_rotary(rotary)?;
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn with_rotary(self, rotary: Rotary) -> Result<QkvProjection, Error> {
        rotary.check_head(self.heads.head_dim)?;
        Ok(QkvProjection { rotary: Some(rotary), ..self })
    }

    /// The same for cross-attention: keys and values are of another source, whose width may differ.
    pub(crate) fn cross(q: Linear, k: Linear, v: Linear, heads: Heads) -> Result<QkvProjection, Error> {
        heads.check()?;
        check_size("q.out_features", heads.query_cols(), q.out_features())?;
        check_size("k.out_features", heads.key_cols(), k.out_features())?;
        check_size("v.out_features", heads.value_cols(), v.out_features())?;
        check_size("v.in_features", k.in_features(), v.in_features())?;
        Ok(QkvProjection { q, k, v, heads, rotary: None, is_behind: false })
    }

    /// The same behind a batch norm of the rows, which goes into the weights. In cross-attention keys and values are of other rows.
    pub(crate) fn behind(self, norm: Option<&Affine>, is_cross: bool) -> Result<QkvProjection, Error> {
        let q = self.q.between(norm, None)?;
        let norm = norm.filter(|_| !is_cross);
        let (k, v) = (self.k.between(norm, None)?, self.v.between(norm, None)?);
        Ok(QkvProjection { q, k, v, is_behind: self.is_behind || norm.is_some(), ..self })
    }

    /// Columns of the rows that it projects.
    pub fn d_model(&self) -> usize {
        self.q.in_features()
    }

    /// The heads that it projects to.
    pub fn heads(&self) -> &Heads {
        &self.heads
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.q.bytes() + self.k.bytes() + self.v.bytes()
    }

    /// Projects `x`: queries to `q`, keys and values, by head, to `keys`.
    ///
    /// # Shapes
    /// `x`: `[tokens, d_model]`; `q`: `[tokens, n_heads * head_dim]`; `offsets`: `[0, end of segment 0, ..., tokens]`.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::NotAscending`], [`Error::TooLarge`] if the batch is larger than the store or a sequence longer than the
    /// rotary's table. Nothing is written then.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: MatRef<'_>,
        offsets: &[usize],
        mut q: MatMut<'_>,
        keys: &mut KeyStore,
    ) -> Result<(), Error> {
        check_size("x.cols", self.d_model(), x.cols())?;
        check_size("q.rows", x.rows(), q.rows())?;
        check_size("q.cols", self.heads.query_cols(), q.cols())?;
        keys.check_heads(&self.heads)?;
        check_offsets("offsets", offsets, x.rows())?;
        keys.check_batch(offsets)?;
        let longest = offsets.windows(2).map(|w| w[1] - w[0]).max();
        self.check_position(longest.and_then(|len| len.checked_sub(1)))?;
        keys.build_plan(offsets);
        let members = [&self.q, &self.k, &self.v].map(|map| map.members(ctx, x.rows()));
        let mut team = Team::new(members.into_iter().max().unwrap_or(1), self.scratch_len(0));
        dispatch!(ctx.isa(), |s| team.region(ctx.executor(), |crew| {
            self.phase(s, crew, &Rows::plain(x), &mut q, keys, None);
        }));
        Ok(())
    }

    /// Whether the rotary, if there is one, has the largest position of a batch.
    pub(crate) fn check_position(&self, last: Option<usize>) -> Result<(), Error> {
        self.rotary.as_ref().zip(last).map_or(Ok(()), |(rotary, last)| rotary.check_position(last))
    }

    /// Whether rows of this shape can be added to what queries and keys are projected from.
    pub(crate) fn check_added(&self, added: MatRef<'_>, rows: usize) -> Result<(), Error> {
        check_size("position_embedding.rows", rows, added.rows())?;
        check_size("position_embedding.cols", self.d_model(), added.cols())?;
        if self.is_behind {
            let expected = "none, as the batch norm in the weights would normalise it too";
            return Err(Error::Mismatch { arg: "position_embedding", expected });
        }
        Ok(())
    }

    /// Whether keys and values can be projected from a source.
    pub(crate) fn check_source(&self, source: MatRef<'_>, offsets: &[usize]) -> Result<(), Error> {
        check_size("source.cols", self.k.in_features(), source.cols())?;
        check_offsets("offsets", offsets, source.rows())
    }

    /// The keys and values of a source, in place of what the store has.
    pub(crate) fn set_keys(
        &self,
        ctx: Context<'_>,
        source: MatRef<'_>,
        offsets: &[usize],
        keys: &mut KeyStore,
    ) -> Result<(), Error> {
        self.check_source(source, offsets)?;
        keys.check_heads(&self.heads)?;
        keys.check_batch(offsets)?;
        keys.build_plan(offsets);
        let members = self.k.members(ctx, source.rows()).max(self.v.members(ctx, source.rows()));
        let mut none = MatMut::scratch(&mut [], source.rows(), 0, 0);
        let mut team = Team::new(members, self.scratch_len(0));
        dispatch!(ctx.isa(), |s| team.region(ctx.executor(), |crew| {
            self.phase(s, crew, &Rows::plain(source), &mut none, keys, None);
        }));
        Ok(())
    }

    /// Where queries, keys and values begin in a row of [`project_rows`](Self::project_rows), and where it ends: whole panels.
    fn starts(&self) -> [usize; 4] {
        let q = self.heads.query_cols().next_multiple_of(PANEL);
        let k = q + self.heads.key_cols().next_multiple_of(PANEL);
        [0, q, k, k + self.heads.value_cols().next_multiple_of(PANEL)]
    }

    /// Columns of a row of [`project_rows`](Self::project_rows).
    fn projected_cols(&self, n: usize) -> usize {
        if n == 1 { self.heads.query_cols() } else { self.starts()[n] }
    }

    /// The row stride of [`project_rows`](Self::project_rows).
    pub(crate) fn projected_stride(&self, n: usize) -> usize {
        padded_stride(self.projected_cols(n))
    }

    /// One phase: the first `n` of queries, keys and values as rows, where they do not go to a store at once. With a rotary another
    /// turns them.
    pub(crate) fn project_rows<'a, S: Simd>(
        &self,
        s: S,
        crew: &mut Crew<'_>,
        rows: &Rows<'_>,
        plan: &Plan,
        out: &'a mut [f32],
        n: usize,
    ) -> MatRef<'a> {
        let Rows { x, ref places, .. } = *rows;
        let (starts, cols) = (self.starts(), self.projected_cols(n));
        let mut out = MatMut::scratch(out, x.rows(), cols, self.projected_stride(n));
        let split = Split::new(x.rows(), cols, MAX_TILE_ROWS, crew.members());
        crew.blocks(
            s,
            &mut out,
            &split,
            #[inline(always)]
            |row, col, mut out, scratch| {
                let (scratch, rest) = scratch.split_at_mut(MAX_TILE_ROWS * PANEL);
                let sources = rows.sources(s, row..row + out.rows(), rest);
                let end = col + out.cols();
                let maps = [&self.q, &self.k, &self.v].into_iter().zip(sources);
                for ((linear, x), &start) in maps.zip(&starts).take(n) {
                    let (from, to) = (col.max(start), end.min(start + linear.out_features()));
                    if from < to {
                        let mut out = out.block(0..x.rows(), from - col..to - col);
                        linear.tile(
                            s,
                            x,
                            from - start,
                            Activation::None,
                            Residual::None,
                            &mut out,
                            scratch,
                            linear.from(to - start),
                        );
                    }
                }
            },
        );
        if let Some(rotary) = &self.rotary {
            // A head's columns may be several tiles', so they turn when all are there.
            let (dim, k) = (self.heads.head_dim, starts[1]);
            crew.ragged_blocks(
                s,
                &mut out,
                &plan.rows,
                cols,
                #[inline(always)]
                |block, _, mut rows, _| {
                    for cols in [0..self.heads.query_cols(), k..k + self.heads.key_cols()] {
                        let mut rows = rows.block(0..rows.rows(), cols);
                        rotary.turn_rows(s, dim, &mut rows, (plan, block, places));
                    }
                },
            );
        }
        out.into_ref()
    }

    /// Queries, keys and values of the rows of [`project_rows`](Self::project_rows).
    pub(crate) fn split<'a>(&self, rows: MatRef<'a>) -> [MatRef<'a>; 3] {
        let [q, k, v, _] = self.starts();
        let part = |start: usize, cols: usize| rows.block(0..rows.rows(), start..start + cols);
        [part(q, self.heads.query_cols()), part(k, self.heads.key_cols()), part(v, self.heads.value_cols())]
    }

    /// What the sub-layer begins with.
    pub(crate) fn first_columns(&self, rows: usize, members: usize) -> Columns<'_> {
        let start = |tile: usize| rows.min(tile * TILE_ROWS);
        let kv_heads = self.tile_heads(rows.div_ceil(TILE_ROWS), start, members);
        let q_heads = kv_heads * self.heads.sharing();
        Columns { linear: &self.q, per_tile: q_heads * self.heads.head_dim, members }
    }

    /// Key heads of a tile, where tile `i` of the rows begins at row `start(i)`: all, or some of whole panels if that keeps more members busy.
    fn tile_heads(&self, tiles: usize, start: impl Fn(usize) -> usize, members: usize) -> usize {
        let all = self.heads.n_kv_heads;
        if members == 1 || tiles == 0 {
            return all;
        }
        let step = head_step(&self.heads);
        all.min(step * per_tile(all.div_ceil(step), tiles, start, members, TILES))
    }

    /// Scratch of a tile, with room for so many copies of its rows.
    pub(crate) fn scratch_len(&self, copies: usize) -> usize {
        MAX_TILE_ROWS * (2 * PANEL + copies * padded_stride(self.d_model()))
    }

    /// The three maps.
    pub(crate) fn maps(&self) -> [&Linear; 3] {
        [&self.q, &self.k, &self.v]
    }

    /// One phase: every tile of rows, or of few rows some heads. A `q` without columns leaves the queries out.
    pub(crate) fn phase<S: Simd>(
        &self,
        s: S,
        crew: &mut Crew<'_>,
        rows: &Rows<'_>,
        q: &mut MatMut<'_>,
        keys: &mut KeyStore,
        next: Option<Columns<'_>>,
    ) {
        let (layout, places) = (keys.layout, &rows.places);
        let tiles = keys.plan.tile_rows.len().saturating_sub(1);
        let kv_heads = self.tile_heads(tiles, |tile| keys.plan.tile_rows[tile], crew.members());
        let has_q = q.cols() > 0;
        let q_heads = kv_heads * self.heads.sharing();
        let (linear, first_heads) = if has_q { (&self.q, q_heads) } else { (&self.k, kv_heads) };
        let columns = Columns { linear, per_tile: first_heads * layout.head_dim, members: crew.members() };
        // Behind other tiles of rows come the same columns again.
        let next = next.filter(|_| tiles == 1);
        let (plan, data) = keys.parts();
        let mut blocks = layout.blocks(data, &plan.chunks);
        crew.paired_blocks(
            s,
            (q, &plan.tile_rows, q_heads * layout.head_dim),
            (&mut blocks, &plan.tile_blocks, kv_heads),
            #[inline(always)]
            |tile, part, mut q, mut stored, scratch| {
                let (scratch, rest) = scratch.split_at_mut(2 * MAX_TILE_ROWS * PANEL);
                let [of_q, of_k, of_v] =
                    rows.sources(s, plan.tile_rows[tile]..plan.tile_rows[tile + 1], rest);
                let heads = part * kv_heads..self.heads.n_kv_heads.min((part + 1) * kv_heads);
                let (k_col, v_col) = (heads.start * layout.head_dim, heads.start * layout.value_dim);
                // The next tile's: more rows, or the next heads.
                let after = columns.after(part * columns.per_tile, next);
                if has_q {
                    let (q_col, then) = (part * columns.per_tile, self.k.from(k_col));
                    self.q.tile(s, of_q, q_col, Activation::None, Residual::None, &mut q, scratch, then);
                }
                let blocks = plan.tile_blocks[tile]..plan.tile_blocks[tile + 1];
                let row_of = |block: usize| plan.rows[block] - plan.tile_rows[tile];
                let (lines, scratch) = scratch.split_at_mut(MAX_TILE_ROWS * PANEL);
                let parts = [
                    (&self.k, of_k, layout.head_dim, KeyLayout::store_keys as Store<S>, self.v.from(v_col)),
                    (&self.v, of_v, layout.value_dim, KeyLayout::store_values, after),
                ];
                for (matrix, (linear, x, dim, store, then)) in parts.into_iter().enumerate() {
                    let cols = heads.start * dim..heads.end * dim;
                    for col in cols.clone().step_by(PANEL) {
                        let end = cols.end.min(col + PANEL);
                        let mut lines = MatMut::scratch(lines, x.rows(), end - col, PANEL);
                        let then = if end < cols.end { linear.from(end) } else { then };
                        linear.tile(s, x, col, Activation::None, Residual::None, &mut lines, scratch, then);
                        for (i, block) in blocks.clone().enumerate() {
                            let rows = row_of(block)..row_of(block + 1);
                            let lines = lines.as_ref().block(rows, 0..end - col);
                            store(layout, s, &mut stored.block(i)[matrix], 0, col - cols.start, lines);
                        }
                    }
                }
                if let Some(rotary) = &self.rotary {
                    rotary.turn_rows(s, layout.head_dim, &mut q, (plan, blocks.start, places));
                    for (i, block) in blocks.enumerate() {
                        let [mut keys, _] = stored.block(i);
                        rotary.turn_keys(s, &mut keys, (plan, block, places));
                    }
                }
            },
        );
    }
}

/// Stores a panel of keys or values.
type Store<S> = fn(KeyLayout, S, &mut MatMut<'_>, usize, usize, MatRef<'_>);

/// Key heads whose columns, and whose query heads' columns, are whole panels.
fn head_step(heads: &Heads) -> usize {
    let step = |dim: usize| PANEL >> dim.trailing_zeros().min(PANEL.trailing_zeros());
    step(heads.head_dim).max(step(heads.value_dim))
}
