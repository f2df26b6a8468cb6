//! Keys and values that grow token by token: a store whose sequences have a fixed capacity, or are rings.

use core::ops::Range;

use crate::attention::keys::KeyStore;
use crate::attention::layout::{BLOCK, CHUNK, CHUNK_BLOCKS};
use crate::attention::plan::{Segment, check_offsets};
use crate::attention::{Graph, Heads};
use crate::error::{Error, check_dim, check_size, checked_product};
use crate::exec::Crew;
use crate::simd::{Scalar, Simd};
use crate::view::MatRef;
use crate::workspace::{AlignedBuffer, Slab};

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
    /// [`Error::ZeroDim`], [`Error::NotDivisible`], [`Error::Overflow`].
    pub fn new(heads: &Heads, sequences: usize, capacity: usize) -> Result<KvCache, Error> {
        Ok(Self::for_layers(1, heads, sequences, capacity)?.remove(0))
    }

    /// The caches of a stack's layers, side by side in memory: short ones are faster so, as huge pages hold several of them. The memory is freed
    /// when all are dropped.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    ///
    /// ```
    /// use laneformer::{Heads, KvCache};
    /// let caches = KvCache::for_layers(12, &Heads::new(12, 64)?, 1, 1024)?;
    /// assert_eq!((caches.len(), caches[11].room(0)), (12, 1024));
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn for_layers(
        layers: usize,
        heads: &Heads,
        sequences: usize,
        capacity: usize,
    ) -> Result<Vec<KvCache>, Error> {
        check_dim("sequences", sequences)?;
        check_dim("capacity", capacity)?;
        let blocks =
            capacity.checked_next_multiple_of(CHUNK).ok_or(Error::Overflow { arg: "capacity" })? / BLOCK;
        let total = checked_product("capacity", &[blocks, sequences])?;
        let len = KeyStore::len_of_blocks(heads, total, sequences)?;
        let mut slab = Slab::new(checked_product("capacity", &[len, layers])?);
        let cache = |data: AlignedBuffer| {
            let mut store = KeyStore::with_blocks(heads, total, sequences, data);
            store.ring = Some(blocks);
            store.plan.segments =
                (0..sequences).map(|i| Segment { first_block: i * blocks, len: 0 }).collect();
            store.plan.chunks = (0..=total).step_by(CHUNK_BLOCKS).collect();
            KvCache { store, capacity, window: false }
        };
        Ok((0..layers).map(|_| cache(slab.take(len).expect("room for each layer"))).collect())
    }

    /// A cache that keeps at least the last `window` tokens of each sequence, the newest among them, and drops older ones in chunks of 256. [`Graph::window`](crate::Graph::window)
    /// with `left` tokens before needs `left + 1`; attention refuses a graph that sees what has been dropped. A call appends at most 256 tokens to
    /// a sequence.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::NotDivisible`], [`Error::Overflow`].
    pub fn ring(heads: &Heads, sequences: usize, window: usize) -> Result<KvCache, Error> {
        // A call may append a chunk, whose first token sees `window` tokens; the oldest chunk goes as a whole when a new one begins.
        let capacity = window.checked_add(2 * (CHUNK - 1)).ok_or(Error::Overflow { arg: "window" })?;
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

    /// Tokens that a call can append to a sequence as it is, 0 for one that is not there.
    pub fn room(&self, sequence: usize) -> usize {
        if sequence >= self.sequences() {
            0
        } else if self.window {
            // A ring takes a chunk at once: more would drop what the same call's first queries see.
            CHUNK
        } else {
            self.capacity - self.len(sequence)
        }
    }

    /// Appends rows to a sequence.
    ///
    /// # Shapes
    /// `k`: `[tokens, n_kv_heads * head_dim]`; `v`: `[tokens, n_kv_heads * value_dim]`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no such sequence or no room, [`Error::Size`]. The cache is unchanged then.
    pub fn append(&mut self, sequence: usize, k: MatRef<'_>, v: MatRef<'_>) -> Result<(), Error> {
        self.store.layout.check_rows(k, v)?;
        self.check_room(sequence, k.rows())?;
        self.push(sequence, k, v, core::iter::once(0..k.rows()));
        Ok(())
    }

    /// Appends rows to every sequence, any number to each.
    ///
    /// # Shapes
    /// As [`append`](Self::append); `offsets`: `[0, end of sequence 0, ..., tokens]`, of all sequences.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no room in one, [`Error::Size`], [`Error::NotAscending`]. The cache is unchanged then.
    pub fn append_batch(&mut self, k: MatRef<'_>, v: MatRef<'_>, offsets: &[usize]) -> Result<(), Error> {
        self.store.layout.check_rows(k, v)?;
        check_offsets("offsets", offsets, k.rows())?;
        check_size("offsets.len() - 1", self.sequences(), offsets.len() - 1)?;
        let mut lens = offsets.windows(2).map(|w| w[1] - w[0]).enumerate();
        lens.try_for_each(|(sequence, len)| self.check_room(sequence, len))?;
        self.push(0, k, v, offsets.windows(2).map(|rows| rows[0]..rows[1]));
        Ok(())
    }

    /// Appends rows to every sequence in a phase, whose tiles are the blocks of the cache if there are enough rows for that, or else heads: with
    /// one sequence a member stores those that it begins attention with, which it then need not fetch from another's cache.
    pub(crate) fn push_phase<S: Simd>(
        &mut self,
        s: S,
        crew: &mut Crew<'_>,
        k: MatRef<'_>,
        v: MatRef<'_>,
        offsets: &[usize],
    ) {
        let KeyStore { layout, plan, data, ring, .. } = &mut self.store;
        let ring = ring.unwrap_or(usize::MAX);
        let mut blocks = layout.blocks(data, &plan.chunks);
        // Scalar for the reason that KeyStore::set has.
        if crew.members() == 1 || k.rows() < plan.segments.len().saturating_mul(ring) {
            let heads = layout.n_heads.div_ceil(crew.members());
            crew.parts_of_blocks(Scalar, &mut blocks, heads, |first, mut blocks| {
                let [k, v] = [(k, layout.head_dim), (v, layout.value_dim)]
                    .map(|(x, dim)| x.block(0..x.rows(), first * dim..(first + blocks.rows()) * dim));
                for (&Segment { first_block, len }, rows) in plan.segments.iter().zip(offsets.windows(2)) {
                    layout.store_rows(s, &mut blocks, (first_block, ring), len, k, v, rows[0]..rows[1]);
                }
            });
        } else {
            crew.each_block(Scalar, &mut blocks, |place, matrices| {
                let (before, start) = (plan.segments[place / ring].len, offsets[place / ring]);
                let after = before + offsets[place / ring + 1] - start;
                // Which of the new tokens' blocks has this place.
                let first = before / BLOCK;
                let block = first + (place % ring + ring - first % ring) % ring;
                let tokens = before.max(block * BLOCK)..after.min((block + 1) * BLOCK);
                if !tokens.is_empty() {
                    let rows = start + tokens.start - before..start + tokens.end - before;
                    layout.store_in_block(s, matrices, tokens.start % BLOCK, k, v, rows);
                }
            });
        }
        for (segment, rows) in plan.segments.iter_mut().zip(offsets.windows(2)) {
            segment.len += rows[1] - rows[0];
        }
    }

    /// Appends rows to each of some sequences, from `first` on.
    fn push(&mut self, first: usize, k: MatRef<'_>, v: MatRef<'_>, rows: impl Iterator<Item = Range<usize>>) {
        let KeyStore { layout, plan, data, ring, .. } = &mut self.store;
        let mut blocks = layout.blocks(data, &plan.chunks);
        for (Segment { first_block, len }, rows) in plan.segments[first..].iter_mut().zip(rows) {
            let (places, added) = ((*first_block, ring.unwrap_or(usize::MAX)), rows.len());
            layout.store_rows(Scalar, &mut blocks, places, *len, k, v, rows);
            *len += added;
        }
    }

    pub(crate) fn check_room(&self, sequence: usize, rows: usize) -> Result<(), Error> {
        if sequence >= self.sequences() {
            let max = self.sequences() - 1;
            return Err(Error::TooLarge { arg: "sequence", max, actual: sequence });
        }
        let max = self.room(sequence);
        if rows > max {
            return Err(Error::TooLarge { arg: "tokens appended to the cache", max, actual: rows });
        }
        Ok(())
    }

    /// Whether the next `rows` tokens of a sequence see only what is still there when they are.
    pub(crate) fn check_kept(&self, sequence: usize, rows: usize, graph: &Graph) -> Result<(), Error> {
        let (before, len) = (self.len(sequence), self.len(sequence) + rows);
        let span = (before as isize, len as isize - 1);
        if rows == 0 { Ok(()) } else { graph.check_kept(span, self.store.first_block(len) * BLOCK, len) }
    }

    /// Forgets all but the first `len` tokens of a sequence, which may be none or all; a ring forgets all or nothing.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no such sequence or it has fewer tokens.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), Error> {
        self.check_room(sequence, 0)?;
        let has = self.len(sequence);
        let max = if self.window && len != has { 0 } else { has };
        if len > max {
            return Err(Error::TooLarge { arg: "len", max, actual: len });
        }
        self.store.plan.segments[sequence].len = len;
        Ok(())
    }

    /// Makes sequence `to` a copy of sequence `from`: beams that go on from the same tokens.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no such sequence.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<(), Error> {
        self.check_room(from, 0)?;
        self.check_room(to, 0)?;
        let KeyStore { layout, plan, data, ring, .. } = &mut self.store;
        let [source, target] =
            [from, to].map(|sequence| plan.segments[sequence].first_block * layout.block_len());
        let len = plan.segments[from].len;
        // Whole chunks, in which a head's blocks follow one another; a ring's may be anywhere in it.
        let blocks = (len.div_ceil(CHUNK) * CHUNK_BLOCKS).min(ring.unwrap_or(usize::MAX));
        data.copy_within(source..source + blocks * layout.block_len(), target);
        plan.segments[to].len = len;
        Ok(())
    }
}
