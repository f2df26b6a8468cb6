//! Keys and values as attention reads them: blocks of 64 tokens, and in each block a unit per head, `[block][head]`.
//!
//! A unit is the head's keys transposed, `[head_dim][64]`, which is a panel of the score product, followed by its values,
//! `[64][value_dim]`, which is a panel of the output product. A block belongs to one segment and begins at a multiple of
//! 64 tokens from the segment's first key, so tokens that are projected together own one contiguous run of units.

use core::ops::Range;

use crate::attention::Heads;
use crate::attention::plan::{Plan, Segment, check_offsets, max_blocks};
use crate::context::Context;
use crate::error::{Error, check_size, checked_product};
use crate::exec::Team;
use crate::isa::dispatch;
use crate::rows::SERIAL;
use crate::simd::{LANES, Scalar, Simd, Vector};
use crate::view::{MatMut, MatRef};
use crate::workspace::AlignedBuffer;

/// Tokens of a block: the columns of a panel.
pub(crate) const BLOCK: usize = crate::gemm::PANEL;

/// Blocks of a chunk of keys, the unit in which softmax is folded. They follow one another in memory.
pub(crate) const CHUNK_BLOCKS: usize = 4;

/// Keys of a chunk: 64 rows of scores (64 KiB) and the chunk's keys and values (128 KiB at 64 dimensions) stay in L2.
pub(crate) const CHUNK: usize = CHUNK_BLOCKS * BLOCK;

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
    fn store_in_block<S: Simd>(
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

/// One sequence's keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    pub(crate) layout: KeyLayout,
    blocks: Blocks<'a>,
    /// The blocks before them, of another store, and how many of these: whole chunks.
    past: (Blocks<'a>, usize),
    first_block: usize,
    /// Its tokens, those that a ring has dropped included.
    pub(crate) len: usize,
}

/// Blocks of a sequence; block `i` is in place `i % ring`.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    data: &'a [f32],
    ring: usize,
}

impl<'a> Keys<'a> {
    /// The first block that is still there; the first of a chunk.
    #[inline(always)]
    pub(crate) fn first_block(&self) -> usize {
        self.first_block
    }

    /// The keys `[head_dim][64]` of a block.
    #[inline(always)]
    pub(crate) fn keys(&self, block: usize, head: usize) -> &'a [f32] {
        &self.unit(block, head)[..self.layout.head_dim * BLOCK]
    }

    /// The values `[64][value_stride]` of a block.
    #[inline(always)]
    pub(crate) fn values(&self, block: usize, head: usize) -> &'a [f32] {
        &self.unit(block, head)[self.layout.head_dim * BLOCK..]
    }

    /// The same and what follows it in memory: the values of the next block of the chunk are [`KeyLayout::block_len`] further.
    #[inline(always)]
    pub(crate) fn values_from(&self, block: usize, head: usize) -> &'a [f32] {
        let (data, start) = self.place(block, head);
        &data[start + self.layout.head_dim * BLOCK..]
    }

    /// What is mostly read after a block: the next one's unit, or after the last block the next head's first.
    #[inline(always)]
    pub(crate) fn after(&self, block: usize, head: usize) -> &'a [f32] {
        let block = block + 1;
        let next = if block * BLOCK < self.len { (block, head) } else { (self.first_block(), head + 1) };
        let (data, start) = self.place(next.0, next.1);
        let end = data.len().min(start + self.layout.unit_len());
        &data[start.min(end)..end]
    }

    /// Keys and values of a block.
    #[inline(always)]
    fn unit(&self, block: usize, head: usize) -> &'a [f32] {
        let (data, start) = self.place(block, head);
        &data[start..][..self.layout.unit_len()]
    }

    /// Whose blocks a block is among, and where its unit begins there.
    #[inline(always)]
    fn place(&self, block: usize, head: usize) -> (&'a [f32], usize) {
        let (Blocks { data, ring }, block) = match self.past {
            (past, blocks) if block < blocks => (past, block),
            (_, blocks) => (self.blocks, block - blocks),
        };
        (data, (block % ring * self.layout.n_heads + head) * self.layout.unit_len())
    }
}

/// The keys that queries see: those of a store, behind those of another if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Stores<'a> {
    pub(crate) keys: &'a KeyStore,
    pub(crate) past: Option<&'a KeyStore>,
}

impl<'a> Stores<'a> {
    pub(crate) fn alone(keys: &'a KeyStore) -> Stores<'a> {
        Stores { keys, past: None }
    }

    /// The keys of a sequence.
    #[inline(always)]
    pub(crate) fn segment(&self, segment: usize) -> Keys<'a> {
        let keys = self.keys.segment(segment);
        let Some(past) = self.past else { return keys };
        let past = past.segment(past.past_of(segment));
        let whole = past.len / CHUNK * CHUNK_BLOCKS;
        // What it has dropped is before the first of these, if there is one.
        let first_block = past.first_block.min(whole);
        Keys { past: (past.blocks, whole), first_block, len: whole * BLOCK + keys.len, ..keys }
    }

    /// Keys of the longest sequence.
    pub(crate) fn longest(&self) -> usize {
        (0..self.keys.plan.segments.len()).map(|segment| self.segment(segment).len).max().unwrap_or(0)
    }
}

/// The keys and values of a ragged batch, stored by head as attention reads them.
#[derive(Debug)]
pub struct KeyStore {
    pub(crate) layout: KeyLayout,
    pub(crate) plan: Plan,
    pub(super) data: AlignedBuffer,
    /// Blocks per sequence, if they are a cache's.
    pub(super) ring: Option<usize>,
    /// Keys before each sequence's own, if they are another store's: what these leave of a chunk stands here first.
    behind: Vec<usize>,
}

impl KeyStore {
    /// Room for `max_tokens` tokens in at most `max_segments` segments.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn new(heads: &Heads, max_tokens: usize, max_segments: usize) -> Result<KeyStore, Error> {
        let blocks = max_blocks(max_tokens, max_segments);
        Self::with_blocks(heads, blocks, max_segments)
    }

    pub(super) fn with_blocks(heads: &Heads, blocks: usize, segments: usize) -> Result<KeyStore, Error> {
        heads.check()?;
        // Each block and each sequence has an entry in a few lists.
        checked_product("keys and values", &[blocks.max(segments), 8])?;
        let layout = heads.layout();
        let len = checked_product(
            "keys and values",
            &[blocks, layout.n_heads, layout.head_dim + layout.value_stride(), BLOCK],
        )?;
        Ok(KeyStore {
            layout,
            plan: Plan::with_capacity(blocks, segments),
            data: AlignedBuffer::scratch(len),
            ring: None,
            behind: Vec::with_capacity(segments),
        })
    }

    /// Stores the keys and values of a batch in place of what was there, on the context's threads.
    ///
    /// # Shapes
    /// `k`: `[tokens, n_kv_heads * head_dim]`; `v`: `[tokens, n_kv_heads * value_dim]`; `offsets`: `[0, end of segment 0, ..., tokens]`.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::NotAscending`], [`Error::TooLarge`] if the batch is larger than the store. The store is unchanged then.
    pub fn set(
        &mut self,
        ctx: Context<'_>,
        k: MatRef<'_>,
        v: MatRef<'_>,
        offsets: &[usize],
    ) -> Result<(), Error> {
        self.layout.check_rows(k, v)?;
        check_offsets("offsets", offsets, k.rows())?;
        self.check_batch(offsets)?;
        self.build_plan(offsets, 1);
        let Self { layout, plan, data, .. } = self;
        let len = layout.block_len();
        let mut blocks = MatMut::scratch(data, plan.blocks.len(), len, len);
        let members = if k.rows() * len / BLOCK < SERIAL { 1 } else { ctx.members() };
        // What is not whole groups of rows stays scalar outside of an instruction set's frame: scattered stores are faster so.
        dispatch!(ctx.isa(), |s| Team::new(members, 0).region(ctx.executor(), |crew| {
            crew.blocks(Scalar, &mut blocks, (1, len), |block, _, mut units, _| {
                let rows = plan.rows[block]..plan.rows[block + 1];
                layout.store_in_block(s, units.row_mut(0), 0, k, v, rows);
            });
        }));
        Ok(())
    }

    /// Stores the keys and values of tokens that stand behind those of `past`, for [`attend_after`](Self::attend_after). The keys of
    /// `past` stay where they are; only what they leave of a chunk of 256 is copied before the new ones, and needs room here.
    ///
    /// # Shapes
    /// As [`set`](Self::set). `past` has as many sequences, or one that stands before all: a common prefix.
    ///
    /// # Errors
    /// As [`set`](Self::set), [`Error::Size`] also if `past` is of other heads or sequences, [`Error::Mismatch`] if it stands behind another
    /// store itself.
    pub fn set_after(
        &mut self,
        past: &KeyStore,
        k: MatRef<'_>,
        v: MatRef<'_>,
        offsets: &[usize],
    ) -> Result<(), Error> {
        self.layout.check_rows(k, v)?;
        check_offsets("offsets", offsets, k.rows())?;
        let segments = offsets.len() - 1;
        self.check_past(past, segments)?;
        let lens = offsets.windows(2).enumerate().map(|(i, w)| (past.len_of(i), w[1] - w[0]));
        self.check_blocks(
            segments,
            lens.clone().map(|(past, len)| (past % CHUNK + len).div_ceil(BLOCK)).sum(),
        )?;

        self.plan.clear();
        self.behind.clear();
        let Self { layout, plan, data, behind, .. } = self;
        let mut first_block = 0;
        for (segment, ((before, len), rows)) in lens.zip(offsets.windows(2)).enumerate() {
            let (whole, lead) = (before / CHUNK * CHUNK_BLOCKS, before % CHUNK);
            let blocks = &mut data[first_block * layout.block_len()..];
            for (i, block) in
                blocks.chunks_exact_mut(layout.block_len()).take(lead.div_ceil(BLOCK)).enumerate()
            {
                let (data, start) = past.segment(past.past_of(segment)).place(whole + i, 0);
                block.copy_from_slice(&data[start..][..layout.block_len()]);
            }
            layout.store_rows(Scalar, blocks, usize::MAX, lead, k, v, rows[0]..rows[1]);
            plan.segments.push(Segment { first_block, len: lead + len });
            behind.push(before);
            first_block += (lead + len).div_ceil(BLOCK);
        }
        Ok(())
    }

    /// Cuts the batch that is to be stored.
    pub(crate) fn build_plan(&mut self, offsets: &[usize], members: usize) {
        self.behind.clear();
        self.plan.build(offsets, members);
    }

    /// Which sequence stands before sequence `segment` of a store behind this one.
    fn past_of(&self, segment: usize) -> usize {
        if self.plan.segments.len() == 1 { 0 } else { segment }
    }

    /// Its tokens.
    fn len_of(&self, segment: usize) -> usize {
        self.plan.segments[self.past_of(segment)].len
    }

    /// Whether `past` can stand before this store of so many sequences.
    fn check_past(&self, past: &KeyStore, segments: usize) -> Result<(), Error> {
        check_size("past n_kv_heads", self.layout.n_heads, past.layout.n_heads)?;
        check_size("past head_dim", self.layout.head_dim, past.layout.head_dim)?;
        check_size("past value_dim", self.layout.value_dim, past.layout.value_dim)?;
        past.check_alone("past")?;
        if past.plan.segments.len() == 1 {
            Ok(())
        } else {
            check_size("past sequences", segments, past.plan.segments.len())
        }
    }

    /// Whether all keys before a sequence's own are here.
    pub(crate) fn check_alone(&self, arg: &'static str) -> Result<(), Error> {
        if self.behind.is_empty() {
            return Ok(());
        }
        Err(Error::Mismatch { arg, expected: "a store that does not stand behind another" })
    }

    /// Whether this store was filled to stand behind `past` as it is.
    pub(crate) fn check_behind(&self, past: &KeyStore) -> Result<(), Error> {
        self.check_past(past, self.plan.segments.len())?;
        if self.behind.len() != self.plan.segments.len() {
            return Err(Error::Mismatch { arg: "keys", expected: "a store that set_after has filled" });
        }
        let mut behind = self.behind.iter().enumerate();
        behind.try_for_each(|(segment, &len)| check_size("past tokens", len, past.len_of(segment)))
    }

    pub(crate) fn check_batch(&self, offsets: &[usize]) -> Result<(), Error> {
        let blocks = offsets.windows(2).map(|w| (w[1] - w[0]).div_ceil(BLOCK)).sum();
        self.check_blocks(offsets.len().saturating_sub(1), blocks)
    }

    fn check_blocks(&self, segments: usize, blocks: usize) -> Result<(), Error> {
        let (max_blocks, max_segments) = self.plan.capacity();
        if segments > max_segments {
            return Err(Error::TooLarge {
                arg: "sequences in the batch",
                max: max_segments,
                actual: segments,
            });
        }
        let max = max_blocks.min(self.data.len() / self.layout.block_len());
        if blocks > max {
            return Err(Error::TooLarge { arg: "blocks of 64 tokens in the batch", max, actual: blocks });
        }
        Ok(())
    }

    pub(crate) fn check_heads(&self, heads: &Heads) -> Result<(), Error> {
        check_size("heads.n_kv_heads", self.layout.n_heads, heads.n_kv_heads)?;
        check_size("heads.head_dim", self.layout.head_dim, heads.head_dim)?;
        check_size("heads.value_dim", self.layout.value_dim, heads.value_dim)
    }

    /// Whether the store is of these heads and has room for a batch of `offsets`.
    pub fn fits(&self, heads: &Heads, offsets: &[usize]) -> bool {
        let tokens = offsets.last().copied().unwrap_or(0);
        self.check_heads(heads).is_ok()
            && check_offsets("offsets", offsets, tokens).is_ok()
            && self.check_batch(offsets).is_ok()
    }

    /// Bytes of the store.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    /// The keys of a sequence.
    #[inline(always)]
    pub(crate) fn segment(&self, segment: usize) -> Keys<'_> {
        let Segment { first_block, len } = self.plan.segments[segment];
        let data = &self.data[first_block * self.layout.block_len()..];
        let chunks = len.div_ceil(BLOCK).next_multiple_of(CHUNK_BLOCKS);
        let ring = self.ring.unwrap_or(chunks).max(1);
        let blocks = Blocks { data, ring };
        let first_block = chunks.saturating_sub(ring);
        Keys { layout: self.layout, blocks, past: (blocks, 0), first_block, len }
    }

    pub(crate) fn parts(&mut self) -> (&Plan, &mut [f32]) {
        (&self.plan, &mut self.data)
    }
}
