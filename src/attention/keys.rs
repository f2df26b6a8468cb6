//! Keys and values as attention reads them: the blocks of a sequence, in one store or two, and the store of a ragged batch.

use crate::attention::Heads;
use crate::attention::graph::DROPPED;
use crate::attention::layout::{BLOCK, CHUNK, CHUNK_BLOCKS, KeyLayout};
use crate::attention::plan::{Plan, Segment, check_offsets, max_blocks};
use crate::context::Context;
use crate::error::{Error, check_size, checked_product};
use crate::exec::Team;
use crate::isa::dispatch;
use crate::rows::SERIAL;
use crate::simd::Scalar;
use crate::view::MatRef;
use crate::workspace::AlignedBuffer;

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

/// The places of a sequence's blocks, in chunks from the first; block `i` is in place `i % places`.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    data: &'a [f32],
    places: usize,
}

impl<'a> Keys<'a> {
    /// Of a sequence of `len`: its first `prefix` blocks are the first of `data`, of the others a ring follows; both are whole chunks.
    #[inline(always)]
    pub(super) fn rolling(
        layout: KeyLayout,
        data: &'a [f32],
        (prefix, ring): (usize, usize),
        len: usize,
    ) -> Keys<'a> {
        let (past, rest) = data.split_at(prefix * layout.block_len());
        let past = (Blocks { data: past, places: prefix }, prefix);
        Keys { layout, blocks: Blocks { data: rest, places: ring }, past, first_block: 0, len }
    }

    /// The first block that is still there; the first of a chunk.
    #[inline(always)]
    pub(crate) fn first_block(&self) -> usize {
        self.first_block
    }

    /// The keys `[head_dim][64]` of a block.
    #[inline(always)]
    pub(crate) fn keys(&self, block: usize, head: usize) -> &'a [f32] {
        let (keys, _, i) = self.chunk(block, head);
        &keys[i * self.layout.key_len()..][..self.layout.key_len()]
    }

    /// The values `[64][value_stride]` of a block.
    #[inline(always)]
    pub(crate) fn values(&self, block: usize, head: usize) -> &'a [f32] {
        &self.values_from(block, head)[..self.layout.value_len()]
    }

    /// The same, and the values of the blocks that follow it in its chunk.
    #[inline(always)]
    pub(crate) fn values_from(&self, block: usize, head: usize) -> &'a [f32] {
        let (_, values, i) = self.chunk(block, head);
        &values[i * self.layout.value_len()..]
    }

    /// Keys and values of a block.
    #[inline(always)]
    pub(crate) fn both(&self, block: usize, head: usize) -> [&'a [f32]; 2] {
        [self.keys(block, head), self.values(block, head)]
    }

    /// A head's keys and values of a block's chunk, and which of its blocks it is.
    #[inline(always)]
    fn chunk(&self, block: usize, head: usize) -> (&'a [f32], &'a [f32], usize) {
        let (Blocks { data, places }, block) = match self.past {
            (past, blocks) if block < blocks => (past, block),
            (_, blocks) => (self.blocks, block - blocks),
        };
        let (layout, place) = (self.layout, block % places);
        let first = place - place % CHUNK_BLOCKS;
        let blocks = CHUNK_BLOCKS.min(places - first);
        let [key_len, value_len] = [layout.key_len(), layout.value_len()].map(|len| blocks * len);
        let (keys, values) = data[first * layout.block_len()..].split_at(layout.n_heads * key_len);
        (&keys[head * key_len..][..key_len], &values[head * value_len..][..value_len], place - first)
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
    /// [`Error::ZeroDim`], [`Error::NotDivisible`] for heads that cannot be; [`Error::Overflow`].
    pub fn new(heads: &Heads, max_tokens: usize, max_segments: usize) -> Result<KeyStore, Error> {
        let blocks = max_blocks(max_tokens, max_segments);
        let len = Self::len_of_blocks(heads, blocks, max_segments)?;
        Ok(Self::with_blocks(heads, blocks, max_segments, AlignedBuffer::scratch(len)))
    }

    /// Whether there can be a store of this size.
    pub(crate) fn check_len(heads: &Heads, max_tokens: usize, max_segments: usize) -> Result<(), Error> {
        Self::len_of_blocks(heads, max_blocks(max_tokens, max_segments), max_segments).map(|_| ())
    }

    /// Elements of so many blocks of so many sequences.
    pub(super) fn len_of_blocks(heads: &Heads, blocks: usize, segments: usize) -> Result<usize, Error> {
        heads.check()?;
        // Each block and each sequence has an entry in a few lists.
        checked_product("keys and values", &[blocks.max(segments), 8])?;
        let layout = heads.layout();
        let dims = layout.head_dim + layout.value_stride();
        checked_product("keys and values", &[blocks, layout.n_heads, dims, BLOCK])
    }

    /// So many blocks in `data`, which is as long as they are.
    pub(super) fn with_blocks(
        heads: &Heads,
        blocks: usize,
        segments: usize,
        data: AlignedBuffer,
    ) -> KeyStore {
        KeyStore {
            layout: heads.layout(),
            plan: Plan::with_capacity(blocks, segments),
            data,
            ring: None,
            behind: Vec::with_capacity(segments),
        }
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
        self.build_plan(offsets);
        let Self { layout, plan, data, .. } = self;
        let mut blocks = layout.blocks(data, &plan.chunks);
        let members = if k.rows() * layout.block_len() / BLOCK < SERIAL { 1 } else { ctx.members() };
        // What is not whole groups of rows stays scalar outside of an instruction set's frame: scattered stores are faster so.
        dispatch!(ctx.isa(), |s| Team::new(members, 0).region(ctx.executor(), |crew| {
            crew.each_block(Scalar, &mut blocks, |block, matrices| {
                layout.store_in_block(s, matrices, 0, k, v, plan.rows[block]..plan.rows[block + 1]);
            });
        }));
        Ok(())
    }

    /// Stores the keys and values of tokens that stand behind those of `past`, for [`attend_after`](Self::attend_after). The keys of
    /// `past` stay where they are; only what they leave of a chunk of 256 is copied before the new ones, and needs room here: up to
    /// 255 tokens for each sequence.
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
        for (before, len) in lens {
            plan.push_segment(before % CHUNK + len);
            behind.push(before);
        }
        plan.end_chunks();
        let mut blocks = layout.blocks(data, &plan.chunks);
        let segments = plan.segments.iter().zip(&*behind).zip(offsets.windows(2)).enumerate();
        for (segment, ((&Segment { first_block, .. }, before), rows)) in segments {
            let (whole, lead) = (before / CHUNK * CHUNK_BLOCKS, before % CHUNK);
            let past = past.segment(past.past_of(segment));
            for i in 0..lead.div_ceil(BLOCK) {
                let [mut keys, mut values] = blocks.block(first_block + i);
                for head in 0..layout.n_heads {
                    keys.row_mut(head).copy_from_slice(past.keys(whole + i, head));
                    values.row_mut(head).copy_from_slice(past.values(whole + i, head));
                }
            }
            layout.store_rows(Scalar, &mut blocks, (first_block, usize::MAX), lead, k, v, rows[0]..rows[1]);
        }
        Ok(())
    }

    /// Cuts the batch that is to be stored.
    pub(crate) fn build_plan(&mut self, offsets: &[usize]) {
        self.behind.clear();
        self.plan.build(offsets);
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
        self.layout.check_heads(heads)
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
        let blocks = Blocks { data, places: self.ring.unwrap_or(len.div_ceil(BLOCK)) };
        let first_block = self.first_block(len);
        Keys { layout: self.layout, blocks, past: (blocks, 0), first_block, len }
    }

    /// Whether all keys of all sequences are there: none has been dropped by a ring.
    pub(crate) fn check_whole(&self) -> Result<(), Error> {
        let dropped = self.plan.segments.iter().map(|segment| self.first_block(segment.len) * BLOCK).max();
        match dropped {
            None | Some(0) => Ok(()),
            Some(actual) => Err(Error::TooLarge { arg: DROPPED, max: 0, actual }),
        }
    }

    /// The first block that is there of a sequence of `len`; the first of a chunk.
    pub(super) fn first_block(&self, len: usize) -> usize {
        let blocks = len.div_ceil(CHUNK) * CHUNK_BLOCKS;
        blocks.saturating_sub(self.ring.unwrap_or(usize::MAX))
    }

    pub(crate) fn parts(&mut self) -> (&Plan, &mut [f32]) {
        (&self.plan, &mut self.data)
    }
}
