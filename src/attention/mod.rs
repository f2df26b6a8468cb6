//! Attention over a graph of tokens: the projection that stores heads apart, and the sum over what each token sees.

mod bits;
mod cache;
mod graph;
mod kernel;
mod keys;
mod layout;
mod plan;
mod projection;
mod queries;
mod rotary;
mod stream;
mod terms;
mod tiles;

pub use bits::Bits;
pub use cache::KvCache;
pub use graph::Graph;
pub use keys::KeyStore;
pub use projection::QkvProjection;
pub use queries::QueryRows;
pub use rotary::{Rotary, RotaryPairs};
pub use stream::{KeyRows, KeyStream};
pub use terms::{Bias, Relative, RelativeTable, SegmentTerm, Terms};
pub(crate) use tiles::Call;
pub use tiles::{Cover, Tile};

pub(crate) use kernel::scratch_len;
pub(crate) use keys::Stores;
pub(crate) use plan::{Plan, check_offsets, max_blocks};
pub(crate) use projection::Rows;
pub(crate) use queries::check_each;
pub(crate) use rotary::Places;

use core::ops::Range;

use crate::attention::bits::Query;
use crate::attention::kernel::attend;
use crate::attention::keys::Keys;
use crate::attention::layout::{BLOCK, KeyLayout};
use crate::attention::plan::Block;
use crate::attention::tiles::{Queries, ROWS};
use crate::context::Context;
use crate::error::{Error, check_dim, check_size, checked_product};
use crate::exec::{Crew, Team};
use crate::isa::dispatch;
use crate::simd::Simd;
use crate::split::{TILES, per_tile};
use crate::view::{MatMut, MatRef};

/// The heads of an attention and how a score is made of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Heads {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; query head `h` reads head `h * n_kv_heads / n_heads`.
    pub n_kv_heads: usize,
    /// Width of a query and of a key.
    pub head_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Scores are `scale * q . k`.
    pub scale: f32,
    /// If positive, scores are `softcap * tanh(score / softcap)`.
    pub softcap: f32,
}

impl Heads {
    /// `n_heads` heads of `head_dim`, scores scaled by `1 / sqrt(head_dim)`.
    ///
    /// # Errors
    /// [`Error::ZeroDim`].
    pub fn new(n_heads: usize, head_dim: usize) -> Result<Heads, Error> {
        check_dim("n_heads", n_heads)?;
        check_dim("head_dim", head_dim)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        Ok(Heads { n_heads, n_kv_heads: n_heads, head_dim, value_dim: head_dim, scale, softcap: 0.0 })
    }

    /// The same with fewer key and value heads (grouped queries).
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::NotDivisible`] if the query heads are not a multiple.
    pub fn with_kv_heads(self, n_kv_heads: usize) -> Result<Heads, Error> {
        check_dim("n_kv_heads", n_kv_heads)?;
        if !self.n_heads.is_multiple_of(n_kv_heads) {
            return Err(Error::NotDivisible { arg: "n_heads", actual: self.n_heads, by: n_kv_heads });
        }
        Ok(Heads { n_kv_heads, ..self })
    }

    /// The same with values of another width.
    ///
    /// # Errors
    /// [`Error::ZeroDim`].
    pub fn with_value_dim(self, value_dim: usize) -> Result<Heads, Error> {
        check_dim("value_dim", value_dim)?;
        Ok(Heads { value_dim, ..self })
    }

    /// The same with another scale.
    pub fn with_scale(self, scale: f32) -> Heads {
        Heads { scale, ..self }
    }

    /// The same with a soft cap; 0 is none.
    pub fn with_softcap(self, softcap: f32) -> Heads {
        Heads { softcap, ..self }
    }

    /// Query heads of a key head.
    pub(crate) fn sharing(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Columns of a row of queries.
    pub fn query_cols(&self) -> usize {
        self.n_heads.saturating_mul(self.head_dim)
    }

    /// Columns of a row of keys.
    pub fn key_cols(&self) -> usize {
        self.n_kv_heads.saturating_mul(self.head_dim)
    }

    /// Columns of a row of values.
    pub fn value_cols(&self) -> usize {
        self.n_kv_heads.saturating_mul(self.value_dim)
    }

    /// Columns of a row of the output.
    pub fn output_cols(&self) -> usize {
        self.n_heads.saturating_mul(self.value_dim)
    }

    /// Bytes of scratch that each thread of an attention takes, whatever the length of the sequences. Relative positions take more.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::NotDivisible`], [`Error::Overflow`].
    pub fn scratch_bytes(&self) -> Result<usize, Error> {
        self.check()?;
        Ok(scratch_len(self, false) * size_of::<f32>())
    }

    /// Whether every size is at least 1, the heads divide, and rows of heads have a length.
    pub(crate) fn check(&self) -> Result<(), Error> {
        for (arg, n) in
            [("n_heads", self.n_heads), ("head_dim", self.head_dim), ("value_dim", self.value_dim)]
        {
            check_dim(arg, n)?;
        }
        self.with_kv_heads(self.n_kv_heads)?;
        // Units of 64 tokens of every head, with room for the padding of a row.
        let row = self
            .head_dim
            .max(self.value_dim)
            .checked_add(crate::gemm::PANEL)
            .ok_or(Error::Overflow { arg: "heads" })?;
        checked_product("heads", &[self.n_heads, row, 2 * crate::gemm::PANEL]).map(|_| ())
    }

    pub(crate) fn layout(&self) -> KeyLayout {
        KeyLayout { n_heads: self.n_kv_heads, head_dim: self.head_dim, value_dim: self.value_dim }
    }
}

/// Attention: `out = softmax(scale * q k^T over the keys that the graph allows) v`, for each head of each segment.
///
/// # Shapes
/// `q`: `[tokens, n_heads * head_dim]`; `k`: `[tokens, n_kv_heads * head_dim]`; `v`: `[tokens, n_kv_heads * value_dim]`; `out`: `[tokens, n_heads *
/// value_dim]`; any row strides. `offsets`: `[0, end of segment 0, ..., tokens]`; a token sees tokens of its own segment only.
///
/// # Special values
/// A row without an allowed key, or whose allowed scores are all `-inf`, is 0. A NaN or `+inf` among the allowed scores makes the row NaN, a NaN in an allowed value
/// reaches the output, unless its own score is `-inf` and those of its chunk of 256 keys all are. Whatever stands behind the mask does not. A zero is positive.
///
/// # Accuracy
/// Weights within `1e-6` relative of those of the same scores in exact arithmetic. A row depends only on its allowed keys and their places in the segment: the same bits
/// for any other rows, threads and on every instruction set that [keeps them](crate::Isa::keeps_bits).
///
/// # Errors
/// [`Error::Size`], [`Error::TooSmall`], [`Error::NotAscending`] if shapes disagree; [`Error::ZeroDim`], [`Error::NotDivisible`], [`Error::Overflow`] for heads that
/// cannot be. Nothing is written then.
///
/// # Source
/// Vaswani et al. 2017, arXiv:1706.03762; computed by chunks of keys after Dao et al. 2022, arXiv:2205.14135.
///
/// ```
/// use laneformer::{Context, Graph, Heads, MatMut, MatRef, attention};
/// let (q, v, mut out) = ([1.0, 1.0], [2.0, 4.0], [0.0; 2]);
/// let col = |x| MatRef::contiguous(x, 2, 1);
/// let heads = Heads::new(1, 1)?;
/// let out_mat = MatMut::contiguous(&mut out, 2, 1)?;
/// attention(Context::serial(), &heads, col(&q)?, col(&q)?, col(&v)?, &[0, 2], &Graph::causal(), out_mat)?;
/// assert_eq!(out, [2.0, 3.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
pub fn attention(
    ctx: Context<'_>,
    heads: &Heads,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
    offsets: &[usize],
    graph: &Graph,
    out: MatMut<'_>,
) -> Result<(), Error> {
    check_size("k.rows", q.rows(), k.rows())?;
    let (queries, terms) = (QueryRows::new(q, offsets), Terms::default());
    let (segments, members) = (offsets.len().saturating_sub(1), ctx.members());
    // Before there is memory for them: rows without columns may be more than there can be keys.
    heads.check()?;
    heads.layout().check_rows(k, v)?;
    queries.check(heads, segments, &out)?;
    // What needs less memory also waits less for it.
    if stream::blocks(graph).saturating_mul(members) < max_blocks(k.rows(), segments) {
        let rows = KeyRows::new(k, v, offsets);
        return KeyStream::new(heads, graph, members)?
            .attend(ctx, heads, &queries, &rows, graph, &terms, out);
    }
    let mut keys = KeyStore::new(heads, k.rows(), segments)?;
    keys.set(ctx, k, v, offsets)?;
    keys.attend(ctx, heads, &queries, graph, &terms, out)
}

impl KeyStore {
    /// [`attention`] of queries over the keys and values of this store, with [`Terms`] in the scores.
    ///
    /// Costs follow the edges: blocks of 64 keys that no query of a tile of 64 sees are skipped.
    ///
    /// # Shapes
    /// As [`attention`]; the queries have as many sequences as the store, of any lengths.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::TooSmall`], [`Error::NotAscending`] if shapes disagree, [`Error::Mismatch`] if the store stands behind
    /// another, [`Error::TooLarge`] if a position is far beyond the length of any sequence, or if the windows or global columns of `graph` reach
    /// keys that a ring has dropped. Nothing is written then.
    pub fn attend(
        &self,
        ctx: Context<'_>,
        heads: &Heads,
        queries: &QueryRows<'_>,
        graph: &Graph,
        terms: &Terms<'_>,
        out: MatMut<'_>,
    ) -> Result<(), Error> {
        self.check_alone("keys")?;
        Stores::alone(self).attend(ctx, heads, queries, graph, terms, out)
    }

    /// [`attend`](KeyStore::attend) over the keys of `past` and behind them those of this store, which [`set_after`](KeyStore::set_after) has
    /// filled: a memory, or a prefix that many sequences share, that is not copied. Keys count from the first of `past`. The same bits as over
    /// one store with all of them.
    ///
    /// # Errors
    /// As [`attend`](KeyStore::attend), and [`Error::Size`] if `past` is not as long as it was when this store was filled. That its keys are the
    /// same is not checked.
    ///
    /// ```
    /// use laneformer::{Context, Graph, Heads, KeyStore, MatMut, MatRef, QueryRows, Terms};
    /// let heads = Heads::new(1, 1)?;
    /// let col = |x| MatRef::contiguous(x, 2, 1);
    /// let (mut past, mut new) = (KeyStore::new(&heads, 2, 1)?, KeyStore::new(&heads, 3, 1)?);
    /// past.set(Context::serial(), col(&[0.0, 0.0])?, col(&[1.0, 2.0])?, &[0, 2])?;
    /// new.set_after(&past, col(&[0.0, 0.0])?, col(&[3.0, 6.0])?, &[0, 2])?;
    /// let mut out = [0.0; 2];
    /// let (queries, out_mat) = (QueryRows::new(col(&[1.0, 1.0])?, &[0, 2]), MatMut::contiguous(&mut out, 2, 1)?);
    /// new.attend_after(&past, Context::serial(), &heads, &queries, &Graph::causal(), &Terms::default(), out_mat)?;
    /// assert_eq!(out, [2.0, 3.0]);
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn attend_after(
        &self,
        past: &KeyStore,
        ctx: Context<'_>,
        heads: &Heads,
        queries: &QueryRows<'_>,
        graph: &Graph,
        terms: &Terms<'_>,
        out: MatMut<'_>,
    ) -> Result<(), Error> {
        self.check_behind(past)?;
        Stores { keys: self, past: Some(past) }.attend(ctx, heads, queries, graph, terms, out)
    }
}

impl Stores<'_> {
    fn attend(
        self,
        ctx: Context<'_>,
        heads: &Heads,
        queries: &QueryRows<'_>,
        graph: &Graph,
        terms: &Terms<'_>,
        mut out: MatMut<'_>,
    ) -> Result<(), Error> {
        heads.check()?;
        self.keys.check_heads(heads)?;
        queries.check(heads, self.keys.plan.segments.len(), &out)?;
        let plan = queries.plan();
        check_terms(heads, graph, terms, &plan, self.longest())?;
        for (block, &Block { segment, .. }) in plan.blocks.iter().enumerate() {
            let keys = self.segment(segment);
            graph.check_kept(queries.span(&plan, block, keys.len), keys.first_block() * BLOCK, keys.len)?;
        }
        let call = Call { heads, graph, terms };
        // As in a product, few rows take as long as some four: they wait for the keys.
        let rows = plan.tokens.max(4 * plan.segments.len());
        let flops = rows.saturating_mul(self.longest()).saturating_mul(4 * heads.query_cols());
        let members = ctx.members_for(flops, plan.blocks.len() * heads.n_heads);
        let mut team = Team::new(members, scratch_len(heads, terms.relative.is_some()));
        dispatch!(ctx.isa(), |s| team.region(ctx.executor(), |crew| {
            attend_phase(s, crew, &call, queries, &plan, self, &mut out);
        }));
        Ok(())
    }
}

/// Whether the graph and the terms fit a batch.
pub(crate) fn check_terms(
    heads: &Heads,
    graph: &Graph,
    terms: &Terms<'_>,
    queries: &Plan,
    longest_key: usize,
) -> Result<(), Error> {
    let (segments, longest, rows) = (queries.segments.len(), queries.longest(), queries.tokens);
    graph.check(segments, heads.n_heads, longest, rows, longest_key)?;
    if let Some(bias) = &terms.bias {
        bias.check([segments, heads.n_heads, longest], longest_key)?;
    }
    let cols = heads.query_cols();
    if let Some(relative) = &terms.relative {
        check_size("relative u.len()", cols, relative.u.len())?;
        check_size("relative w.len()", cols, relative.w.len())?;
        relative.table.check(heads.n_heads, heads.head_dim)?;
    }
    if let Some(term) = &terms.segment {
        check_size("segment s.len()", cols, term.s.len())?;
        check_size("segment e.len()", 2 * cols, term.e.len())?;
        let args =
            ["segment bits sequences", "segment bits heads", "segment bits queries", "segment bits keys"];
        term.same.check(args, segments, heads.n_heads, longest, rows, longest_key)?;
    }
    Ok(())
}

/// Scores below which a tile takes several heads: some 20 us of work, well above the cost of a claim.
const TILE_SCORES: usize = 1 << 14;

/// One phase: every block of queries of every head.
pub(crate) fn attend_phase<S: Simd>(
    s: S,
    crew: &mut Crew<'_>,
    call: &Call<'_>,
    queries: &QueryRows<'_>,
    plan: &Plan,
    keys: Stores<'_>,
    out: &mut MatMut<'_>,
) {
    let heads = call.heads;
    let value_dim = heads.value_dim;
    if plan.blocks.is_empty() {
        return;
    }
    let rows = plan.tokens.div_ceil(plan.blocks.len());
    let scores = rows * keys.longest().min(TILE_SCORES);
    // In decode, heads that share keys are taken together, as many as leave work for everybody.
    let blocks = plan.blocks.len();
    let has_one_row = plan.rows.windows(2).any(|rows| rows[1] - rows[0] == 1);
    let sharing = if has_one_row && call.takes_heads_together(1) { heads.sharing() } else { 1 };
    let leaves_work = |n: &usize| blocks * heads.n_heads >= n * crew.members();
    let step = divisors(sharing, sharing).find(leaves_work).unwrap_or(1);
    // Few blocks, as in decode, are dealt out evenly: twelve heads in tiles of four are three for two members. A row alone waits for memory, where
    // one run of all heads of a member is worth more than an even end.
    let (tiles, most) = if plan.tokens == 1 && call.takes_heads_together(1) {
        (1, heads.n_heads)
    } else {
        (TILES, (TILE_SCORES / (scores * step).max(1)).max(1))
    };
    let even = per_tile(heads.n_heads / step, blocks, |block| plan.rows[block], crew.members(), tiles);
    let heads_per_tile = step * even.min(most);
    crew.ragged_blocks(
        s,
        out,
        &plan.rows,
        heads_per_tile * value_dim,
        #[inline(always)]
        |block, col, mut out, scratch| {
            let first = col / value_dim;
            let of_tile = first..first + out.cols() / value_dim;
            let segment = keys.segment(plan.blocks[block].segment);
            attend_heads(s, call, queries, (plan, block), of_tile, &segment, &mut out, scratch);
        },
    );
}

/// Up to `most`, the largest first.
fn divisors(n: usize, most: usize) -> impl Iterator<Item = usize> {
    (1..=n.min(most)).rev().filter(move |i| n.is_multiple_of(*i))
}

/// Some heads of a block of queries.
#[inline(always)]
fn attend_heads<S: Simd>(
    s: S,
    call: &Call<'_>,
    queries: &QueryRows<'_>,
    (plan, block): (&Plan, usize),
    heads: Range<usize>,
    keys: &Keys<'_>,
    out: &mut MatMut<'_>,
    scratch: &mut [f32],
) {
    let (dim, value_dim) = (call.heads.head_dim, call.heads.value_dim);
    let rows = plan.rows[block]..plan.rows[block + 1];
    let Block { segment, start } = plan.blocks[block];
    let takes_together = call.takes_heads_together(rows.len());
    // One row each of heads that share keys, as in decode, read the keys once.
    let sharing = if takes_together && rows.len() == 1 { call.heads.sharing() } else { 1 };
    let fits = |n: &usize| heads.start.is_multiple_of(*n) && heads.len().is_multiple_of(*n);
    let sharing = divisors(sharing, ROWS).find(fits).unwrap_or(1);
    let together = if takes_together { ROWS / rows.len().max(1) / sharing * sharing } else { 1 };
    for head in heads.clone().step_by(together) {
        let of_tile = together.min(heads.end - head);
        let out_cols = (head - heads.start) * value_dim..(head - heads.start + of_tile) * value_dim;
        let mut done = 0;
        while done < rows.len() {
            let (position, n) = queries.run(plan, block, done, keys.len);
            let (place, row) = (start + done, rows.start + done);
            let q = queries.q.block(row..row + n, head * dim..(head + of_tile) * dim);
            let first = Query { segment, head, place, row };
            let tile = Queries { q, first, position, heads: of_tile, sharing };
            attend(s, call, &tile, keys, &mut out.block(done..done + n, out_cols.clone()), scratch);
            done += n;
        }
    }
}
