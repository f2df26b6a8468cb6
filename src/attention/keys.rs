//! Keys and values as attention reads them: blocks of 64 tokens, and in each block a unit per head, `[block][head]`.
//!
//! A unit is the head's keys transposed, `[head_dim][64]`, which is a panel of the score product, followed by its values,
//! `[64][value_dim]`, which is a panel of the output product. A block belongs to one segment and begins at a multiple of
//! 64 tokens from the segment's first key, so tokens that are projected together own one contiguous run of units.

use core::ops::Range;

use crate::attention::Heads;
use crate::attention::plan::{Plan, Segment, check_offsets, max_blocks};
use crate::error::{Error, check_dim, check_size, checked_product};
use crate::view::MatRef;
use crate::workspace::Aligned;

/// Tokens of a block: the columns of a panel.
pub(crate) const BLOCK: usize = crate::gemm::PANEL;

/// Blocks of a chunk of 256 keys, the unit in which softmax is folded.
pub(crate) const CHUNK_BLOCKS: usize = 4;

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
    /// The sequence's blocks; block `i` is in place `i % ring`.
    blocks: &'a [f32],
    ring: usize,
    /// Its tokens, those that the ring has dropped included.
    pub(crate) len: usize,
}

impl<'a> Keys<'a> {
    /// The first block that is still there; the first of a chunk.
    #[inline(always)]
    pub(crate) fn first_block(&self) -> usize {
        self.len.div_ceil(BLOCK).next_multiple_of(CHUNK_BLOCKS).saturating_sub(self.ring)
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
        &self.blocks[self.start(block, head) + self.layout.head_dim * BLOCK..]
    }

    /// What is mostly read after a chunk: the unit of the next chunk's first block, or after the last chunk the next head's.
    #[inline(always)]
    pub(crate) fn after(&self, chunk: usize, head: usize) -> &'a [f32] {
        let block = (chunk + 1) * CHUNK_BLOCKS;
        let start = if block * BLOCK < self.len {
            self.start(block, head)
        } else {
            self.start(self.first_block(), head + 1)
        };
        let end = self.blocks.len().min(start + self.layout.unit_len());
        &self.blocks[start.min(end)..end]
    }

    /// Keys and values of a block.
    #[inline(always)]
    pub(crate) fn unit(&self, block: usize, head: usize) -> &'a [f32] {
        &self.blocks[self.start(block, head)..][..self.layout.unit_len()]
    }

    #[inline(always)]
    fn start(&self, block: usize, head: usize) -> usize {
        (block % self.ring * self.layout.n_heads + head) * self.layout.unit_len()
    }
}

/// The keys and values of a ragged batch, stored by head as attention reads them.
#[derive(Debug)]
pub struct KeyStore {
    pub(crate) layout: KeyLayout,
    pub(crate) plan: Plan,
    data: Aligned,
    /// Blocks per sequence, if they are a cache's.
    ring: Option<usize>,
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

    fn with_blocks(heads: &Heads, blocks: usize, segments: usize) -> Result<KeyStore, Error> {
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
            data: Aligned::zeroed(len),
            ring: None,
        })
    }

    /// Stores the keys and values of a batch in place of what was there.
    ///
    /// # Shapes
    /// `k`: `[tokens, n_kv_heads * head_dim]`; `v`: `[tokens, n_kv_heads * value_dim]`; `offsets`: `[0, end of segment 0, ..., tokens]`.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::NotAscending`], [`Error::TooLarge`] if the batch is larger than the store. The store is unchanged then.
    pub fn set(&mut self, k: MatRef<'_>, v: MatRef<'_>, offsets: &[usize]) -> Result<(), Error> {
        let layout = self.layout;
        check_size("k.cols", layout.n_heads * layout.head_dim, k.cols())?;
        check_size("v.rows", k.rows(), v.rows())?;
        check_size("v.cols", layout.n_heads * layout.value_dim, v.cols())?;
        check_offsets("offsets", offsets, k.rows())?;
        self.check_batch(offsets)?;
        self.plan.build(offsets, 1);
        let Self { plan, data, .. } = self;
        let blocks = data.chunks_exact_mut(layout.block_len());
        for ((units, rows), _) in blocks.zip(plan.rows.windows(2)).zip(&plan.blocks) {
            // Head by head: the unit that a row's keys scatter over stays in L1.
            for head in 0..layout.n_heads {
                let (k_cols, v_cols) = (head * layout.head_dim, head * layout.value_dim);
                for (t, row) in (rows[0]..rows[1]).enumerate() {
                    layout.store_key(units, t, k_cols, &k.row(row)[k_cols..][..layout.head_dim]);
                    layout.store_value(units, t, v_cols, &v.row(row)[v_cols..][..layout.value_dim]);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn check_batch(&self, offsets: &[usize]) -> Result<(), Error> {
        let (max_blocks, max_segments) = self.plan.capacity();
        let segments = offsets.len().saturating_sub(1);
        if segments > max_segments {
            return Err(Error::TooLarge {
                arg: "sequences in the batch",
                max: max_segments,
                actual: segments,
            });
        }
        let blocks = offsets.windows(2).map(|w| (w[1] - w[0]).div_ceil(BLOCK)).sum();
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

    /// Bytes of the store.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    /// The keys of a sequence.
    #[inline(always)]
    pub(crate) fn segment(&self, segment: usize) -> Keys<'_> {
        let Segment { first_block, len } = self.plan.segments[segment];
        let blocks = &self.data[first_block * self.layout.block_len()..];
        let ring = self.ring.unwrap_or(len.div_ceil(BLOCK).next_multiple_of(CHUNK_BLOCKS));
        Keys { layout: self.layout, blocks, ring: ring.max(1), len }
    }

    pub(crate) fn parts(&mut self) -> (&Plan, &mut [f32]) {
        (&self.plan, &mut self.data)
    }
}

/// Keys and values of sequences that grow: preallocated, appended to, and with a window a ring that drops the oldest.
///
/// Queries over a cache give the same bits as over all keys at once: chunks keep their absolute numbers.
///
/// ```
/// use laneformer::{Context, Graph, Heads, KvCache, MatMut, MatRef, QueryRows, Terms};
/// let heads = Heads::new(1, 2)?;
/// let mut cache = KvCache::new(&heads, 1, 8)?;
/// let row = |x| MatRef::contiguous(x, 1, 2);
/// cache.append(0, row(&[1.0, 0.0])?, row(&[3.0, 4.0])?)?;
/// let mut out = [0.0; 2];
/// let out_mat = MatMut::contiguous(&mut out, 1, 2)?;
/// let queries = QueryRows::new(row(&[1.0, 0.0])?, &[0, 1]);
/// cache.keys().attend(Context::serial(), &heads, &queries, &Graph::full(), &Terms::default(), out_mat)?;
/// assert_eq!((cache.len(0), out), (1, [3.0, 4.0]));
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    store: KeyStore,
    capacity: usize,
    window: bool,
}

impl KvCache {
    /// Room for `capacity` tokens in each of `sequences` sequences.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::Overflow`].
    pub fn new(heads: &Heads, sequences: usize, capacity: usize) -> Result<KvCache, Error> {
        check_dim("sequences", sequences)?;
        check_dim("capacity", capacity)?;
        let blocks = capacity
            .checked_next_multiple_of(CHUNK_BLOCKS * BLOCK)
            .ok_or(Error::Overflow { arg: "capacity" })?
            / BLOCK;
        let total = checked_product("capacity", &[blocks, sequences])?;
        let mut store = KeyStore::with_blocks(heads, total, sequences)?;
        store.ring = Some(blocks);
        store.plan.segments = (0..sequences).map(|i| Segment { first_block: i * blocks, len: 0 }).collect();
        Ok(KvCache { store, capacity, window: false })
    }

    /// A cache that keeps at least the last `window` tokens of each sequence and drops older ones in chunks of 256.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::Overflow`].
    pub fn ring(heads: &Heads, sequences: usize, window: usize) -> Result<KvCache, Error> {
        // The chunk that is being filled takes the place of the oldest.
        let capacity = window.checked_add(CHUNK_BLOCKS * BLOCK).ok_or(Error::Overflow { arg: "window" })?;
        Ok(KvCache { window: true, ..KvCache::new(heads, sequences, capacity)? })
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.store.plan.segments.len()
    }

    /// Tokens appended to a sequence so far, 0 for one that is not there.
    pub fn len(&self, sequence: usize) -> usize {
        self.store.plan.segments.get(sequence).map_or(0, |segment| segment.len)
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.store.plan.segments.iter().all(|segment| segment.len == 0)
    }

    /// The keys and values, to attend to.
    pub fn keys(&self) -> &KeyStore {
        &self.store
    }

    /// Bytes of the cache.
    pub fn bytes(&self) -> usize {
        self.store.bytes()
    }

    /// Appends rows to a sequence.
    ///
    /// # Shapes
    /// `k`: `[tokens, n_kv_heads * head_dim]`; `v`: `[tokens, n_kv_heads * value_dim]`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no such sequence or no room, [`Error::Size`]. The cache is unchanged then.
    pub fn append(&mut self, sequence: usize, k: MatRef<'_>, v: MatRef<'_>) -> Result<(), Error> {
        let layout = self.store.layout;
        check_size("k.cols", layout.n_heads * layout.head_dim, k.cols())?;
        check_size("v.cols", layout.n_heads * layout.value_dim, v.cols())?;
        check_size("v.rows", k.rows(), v.rows())?;
        self.check_room(sequence, k.rows())?;
        self.push(sequence, k, v);
        Ok(())
    }

    /// [`append`](Self::append) after its checks.
    pub(crate) fn push(&mut self, sequence: usize, k: MatRef<'_>, v: MatRef<'_>) {
        let layout = self.store.layout;
        let Segment { first_block, len } = self.store.plan.segments[sequence];
        let ring = self.store.ring.unwrap_or(1);
        for row in 0..k.rows() {
            let (block, t) = ((len + row) / BLOCK % ring, (len + row) % BLOCK);
            let units =
                &mut self.store.data[(first_block + block) * layout.block_len()..][..layout.block_len()];
            layout.store_key(units, t, 0, k.row(row));
            layout.store_value(units, t, 0, v.row(row));
        }
        self.store.plan.segments[sequence].len += k.rows();
    }

    pub(crate) fn check_room(&self, sequence: usize, rows: usize) -> Result<(), Error> {
        if sequence >= self.sequences() {
            let max = self.sequences() - 1;
            return Err(Error::TooLarge { arg: "sequence", max, actual: sequence });
        }
        // A ring takes at most what it keeps at once; more would drop what the same call's first queries see.
        let max = if self.window { CHUNK_BLOCKS * BLOCK } else { self.capacity - self.len(sequence) };
        if rows > max {
            return Err(Error::TooLarge { arg: "tokens appended to the cache", max, actual: rows });
        }
        Ok(())
    }

    /// Forgets all but the first `len` tokens of a sequence, which may be 0; of a ring only 0.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no such sequence or it has fewer tokens.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), Error> {
        self.check_room(sequence, 0)?;
        let max = if self.window { 0 } else { self.len(sequence) };
        if len > max {
            return Err(Error::TooLarge { arg: "len", max, actual: len });
        }
        self.store.plan.segments[sequence].len = len;
        Ok(())
    }
}
