//! The tiles that attention makes of a graph: what is skipped, what is computed, what is masked. The kernel asks [`Tiles`];
//! [`Graph::tiles`] shows the same decisions to whoever wants to know what a mask costs.

use core::ops::Range;

use crate::attention::bits::Query;
use crate::attention::graph::{Cover, Graph};
use crate::attention::keys::{BLOCK, CHUNK, CHUNK_BLOCKS};
use crate::attention::plan::{Plan, check_offsets};
use crate::attention::{Heads, Terms};
use crate::error::{Error, check_size};
use crate::simd::LANES;
use crate::view::MatRef;

/// Queries of a tile at most.
pub(crate) const ROWS: usize = BLOCK;
/// Rows that are taken together where not all see all: six register tiles. Fewer would compute less that is masked, and go through the
/// chunk more often.
const GROUP: usize = 32;

/// What all tiles of a call share.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) heads: &'a Heads,
    pub(crate) graph: &'a Graph,
    pub(crate) terms: &'a Terms<'a>,
}

impl Call<'_> {
    /// Whether a score is finished by a positive scale alone.
    #[inline(always)]
    pub(super) fn is_plain(&self) -> bool {
        self.heads.scale > 0.0 && self.heads.softcap <= 0.0 && self.terms.bias.is_none()
    }
}

/// The queries of a tile: one head of at most [`ROWS`] rows of one sequence.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// `[rows, head_dim]`.
    pub(crate) q: MatRef<'a>,
    /// The first row.
    pub(crate) first: Query,
    /// Its position. Rows stand one after another.
    pub(crate) position: isize,
}

impl<'a> Queries<'a> {
    /// Some of the rows.
    #[inline(always)]
    pub(super) fn rows(&self, rows: Range<usize>) -> Queries<'a> {
        let (first, position) = self.query(rows.start);
        Queries { q: self.q.block(rows, 0..self.q.cols()), first, position }
    }

    /// A row and its position.
    #[inline(always)]
    pub(super) fn query(&self, row: usize) -> (Query, isize) {
        let Query { place, row: packed, .. } = self.first;
        (Query { place: place + row, row: packed + row, ..self.first }, self.position + row as isize)
    }
}

/// What some rows see of a chunk.
pub(super) struct Tiles {
    pub(super) first_block: usize,
    /// The keys of each block that some row sees, begun at a whole vector; empty if none.
    pub(super) seen: [Range<usize>; CHUNK_BLOCKS],
    /// Every row sees all of those keys.
    pub(super) full: bool,
    /// The keys that every row sees, if `full`.
    common: Words,
    /// The keys that each row sees, unless `full`.
    words: [Words; ROWS],
}

/// Keys of a chunk, a bit for each.
pub(super) type Words = [u64; CHUNK_BLOCKS];

impl Tiles {
    /// What of some keys the rows see, as far as that can be told without looking at each row.
    #[inline(always)]
    fn cover(call: &Call<'_>, queries: &Queries<'_>, keys: Range<usize>, len: usize) -> Cover {
        let span = (queries.position, queries.position + queries.q.rows() as isize - 1);
        match call.graph.cover(queries.first, span, (keys.start, keys.end), len) {
            Cover::Full if call.terms.bias.is_some() => Cover::Partial,
            cover => cover,
        }
    }

    /// Whether all rows see the same of some keys: columns away from their intervals.
    #[inline(always)]
    fn are_alike(call: &Call<'_>, queries: &Queries<'_>, keys: Range<usize>, len: usize) -> bool {
        let span = (queries.position, queries.position + queries.q.rows() as isize - 1);
        call.terms.bias.is_none() && call.graph.sees_columns_only(span, (keys.start, keys.end), len)
    }

    /// The keys of a block that a row sees.
    #[inline(always)]
    fn word_of(call: &Call<'_>, queries: &Queries<'_>, row: usize, block: usize, len: usize) -> u64 {
        let (query, position) = queries.query(row);
        let word = call.graph.word(query, position, block, len);
        let Some(bias) = &call.terms.bias else { return word };
        let bias = bias.row(query)[block * BLOCK..].iter().take(BLOCK).enumerate();
        word & !bias.fold(0, |word, (j, &b)| word | u64::from(b == f32::NEG_INFINITY) << j)
    }

    /// The keys of a chunk.
    #[inline(always)]
    fn keys(chunk: usize, len: usize) -> Range<usize> {
        chunk * CHUNK..len.min((chunk + 1) * CHUNK)
    }

    /// Rows that are taken together; none if no row sees a key. Where not all see all, a few at a time: the fewer, the closer their
    /// common keys are to each one's own.
    #[inline(always)]
    pub(super) fn step(call: &Call<'_>, queries: &Queries<'_>, len: usize, chunk: usize) -> Option<usize> {
        let rows = queries.q.rows();
        match Self::cover(call, queries, Self::keys(chunk, len), len) {
            Cover::Empty => None,
            Cover::Partial if Self::are_alike(call, queries, Self::keys(chunk, len), len) => Some(rows),
            Cover::Partial => Some(GROUP),
            Cover::Full => Some(rows),
        }
    }

    #[inline(always)]
    pub(super) fn new(call: &Call<'_>, queries: &Queries<'_>, len: usize, chunk: usize) -> Tiles {
        let first_block = chunk * CHUNK_BLOCKS;
        let valid = |i: usize| len.saturating_sub((first_block + i) * BLOCK).min(BLOCK);
        let mut tiles = Tiles {
            first_block,
            seen: core::array::from_fn(|i| 0..valid(i)),
            full: true,
            common: [0; CHUNK_BLOCKS],
            words: [[0; CHUNK_BLOCKS]; ROWS],
        };
        match Self::cover(call, queries, Self::keys(chunk, len), len) {
            Cover::Empty => tiles.seen = core::array::from_fn(|_| 0..0),
            Cover::Partial => tiles.find_words(call, queries, len),
            Cover::Full => {}
        }
        for (word, seen) in tiles.common.iter_mut().zip(&tiles.seen) {
            *word = bits(seen);
        }
        tiles
    }

    /// The keys that each row sees, and what of the blocks is left.
    #[inline(never)]
    fn find_words(&mut self, call: &Call<'_>, queries: &Queries<'_>, len: usize) {
        for (i, seen) in self.seen.iter_mut().enumerate().filter(|(_, seen)| seen.start < seen.end) {
            let block = self.first_block + i;
            let valid = bits(seen);
            let cover = Self::cover(call, queries, block * BLOCK..block * BLOCK + seen.end, len);
            let (mut any, mut all) = (0, valid);
            for row in 0..queries.q.rows() {
                let word = match cover {
                    Cover::Full => valid,
                    Cover::Empty => 0,
                    Cover::Partial => valid & Self::word_of(call, queries, row, block, len),
                };
                self.words[row][i] = word;
                any |= word;
                all &= word;
            }
            let vectors = |bits: u32| bits as usize / LANES;
            let from = if any == 0 { seen.end } else { vectors(any.trailing_zeros()) * LANES };
            let to = (vectors(63 - (any | 1).leading_zeros()) + 1) * LANES;
            *seen = from..seen.end.min(to).max(from);
            self.full &= any == 0 || all == bits(seen);
        }
    }

    /// `(place in the chunk, block, its keys that some row sees)` of each block with such keys.
    #[inline(always)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
        (0..CHUNK_BLOCKS)
            .filter(|&i| !self.seen[i].is_empty())
            .map(|i| (i, self.first_block + i, self.seen[i].clone()))
    }

    /// Keys of the chunk without a gap that some row sees.
    #[inline(always)]
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut i = 0;
        core::iter::from_fn(move || {
            while i < CHUNK_BLOCKS && self.seen[i].is_empty() {
                i += 1;
            }
            let Range { start, end } = self.seen.get(i)?;
            let (start, mut end) = (i * BLOCK + start, i * BLOCK + end);
            i += 1;
            while end == i * BLOCK && i < CHUNK_BLOCKS && self.seen[i].start == 0 {
                end += self.seen[i].end;
                i += 1;
            }
            Some(start..end)
        })
    }

    /// The block that is taken after block `i` of the chunk.
    #[inline(always)]
    pub(super) fn after(&self, i: usize) -> Option<usize> {
        (i + 1..CHUNK_BLOCKS).find(|&i| !self.seen[i].is_empty()).map(|i| self.first_block + i)
    }

    /// The keys that a row sees.
    #[inline(always)]
    pub(super) fn words(&self, row: usize) -> &Words {
        if self.full { &self.common } else { &self.words[row] }
    }
}

/// A set bit for each of some keys of a block.
#[inline(always)]
fn bits(keys: &Range<usize>) -> u64 {
    if keys.is_empty() { 0 } else { u64::MAX >> (BLOCK - keys.len()) << keys.start }
}

/// A tile of scores as attention takes it: queries that are taken together, and a block of up to 64 keys of their sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows of the packed queries: up to 64, fewer where not all see all.
    pub queries: Range<usize>,
    /// Rows of the packed keys.
    pub keys: Range<usize>,
    /// The keys whose scores are computed: from the first that some query sees to the last, in whole vectors of 16.
    pub computed: Range<usize>,
    /// What becomes of the tile.
    pub cover: Cover,
    /// The keys that each query sees, unless nobody sees any.
    words: Vec<u64>,
}

impl Tile {
    /// Block `i` of a chunk.
    fn new(tiles: &Tiles, i: usize, queries: Range<usize>, keys: Range<usize>) -> Tile {
        let seen = tiles.seen[i].clone();
        if seen.is_empty() {
            let computed = keys.start..keys.start;
            return Tile { queries, keys, computed, cover: Cover::Empty, words: vec![] };
        }
        let computed = keys.start + seen.start..keys.start + seen.end;
        let words: Vec<u64> = (0..queries.len()).map(|row| tiles.words(row)[i]).collect();
        let all = u64::MAX >> (BLOCK - keys.len());
        let cover = if words.iter().all(|word| *word == all) { Cover::Full } else { Cover::Partial };
        Tile { queries, keys, computed, cover, words }
    }

    /// The keys that row `query` of the packed queries sees: bit `i` is key `keys.start + i`. None if the row is not of this tile.
    pub fn seen(&self, query: usize) -> u64 {
        query.checked_sub(self.queries.start).and_then(|row| self.words.get(row)).copied().unwrap_or(0)
    }

    /// Pairs of a query and a key that it sees.
    pub fn edges(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Scores that are computed; what is more than [`edges`](Tile::edges) is computed and then masked.
    pub fn scores(&self) -> usize {
        self.queries.len() * self.computed.len()
    }
}

impl Graph {
    /// What attention does with the scores of a batch, tile by tile: the decisions are those of its kernel, which computes a tile or
    /// skips it. A pair of a query and a key of its sequence is in exactly one tile, one of different sequences in none.
    ///
    /// # Shapes
    /// `offsets` and `key_offsets`: `[0, end of sequence 0, ...]` of the queries and of the keys, the same with self-attention. The last query
    /// of a sequence stands at its last key, as in [`QueryRows::new`](crate::QueryRows::new). Bits may differ by `head`.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::TooSmall`], [`Error::NotAscending`] if the offsets do not fit one another or the graph's bits.
    ///
    /// ```
    /// use laneformer::{Cover, Graph};
    /// let tiles: Vec<_> = Graph::causal().tiles(0, &[0, 512], &[0, 512])?.collect();
    /// let edges: usize = tiles.iter().map(|tile| tile.edges()).sum();
    /// let scores: usize = tiles.iter().map(|tile| tile.scores()).sum();
    /// assert_eq!(edges, 512 * 513 / 2);
    /// assert!(edges < scores && scores < 512 * 512 * 6 / 10);
    /// assert!(tiles.iter().any(|tile| tile.cover == Cover::Empty));
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn tiles<'a>(
        &'a self,
        head: usize,
        offsets: &[usize],
        key_offsets: &[usize],
    ) -> Result<impl Iterator<Item = Tile> + use<'a>, Error> {
        let last = |offsets: &[usize]| offsets.last().copied().unwrap_or(0);
        check_offsets("offsets", offsets, last(offsets))?;
        check_offsets("key_offsets", key_offsets, last(key_offsets))?;
        check_size("key_offsets.len()", offsets.len(), key_offsets.len())?;
        let mut plan = Plan::default();
        plan.build(offsets, 1);
        let keys: Vec<Range<usize>> = key_offsets.windows(2).map(|w| w[0]..w[1]).collect();
        let longest_key = keys.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let n_heads = head.checked_add(1).ok_or(Error::Overflow { arg: "head" })?;
        self.check(keys.len(), n_heads, plan.longest(), plan.tokens, longest_key)?;
        let heads = Heads::new(1, 1)?;
        Ok((0..plan.blocks.len()).flat_map(move |i| {
            let (block, rows) = (plan.blocks[i], plan.rows[i]..plan.rows[i + 1]);
            let keys = keys[block.segment].clone();
            let ends = keys.len() as isize - plan.segments[block.segment].len as isize;
            let first = Query { segment: block.segment, head, place: block.start, row: rows.start };
            self.block_tiles(&heads, rows, first, ends + block.start as isize, keys)
        }))
    }

    /// The tiles of a block of queries, the first of them at `position` of `keys`.
    fn block_tiles(
        &self,
        heads: &Heads,
        rows: Range<usize>,
        first: Query,
        position: isize,
        keys: Range<usize>,
    ) -> Vec<Tile> {
        let terms = Terms::default();
        let call = Call { heads, graph: self, terms: &terms };
        let Ok(q) = MatRef::contiguous(&[], rows.len(), 0) else { return vec![] };
        let queries = Queries { q, first, position };
        let mut out = vec![];
        for chunk in 0..keys.len().div_ceil(CHUNK) {
            let step = Tiles::step(&call, &queries, keys.len(), chunk).unwrap_or(rows.len());
            for start in (0..rows.len()).step_by(step) {
                let group = start..rows.len().min(start + step);
                let tiles = Tiles::new(&call, &queries.rows(group.clone()), keys.len(), chunk);
                let group = rows.start + group.start..rows.start + group.end;
                for i in 0..CHUNK_BLOCKS {
                    let at = keys.start + (chunk * CHUNK_BLOCKS + i) * BLOCK;
                    if at < keys.end {
                        out.push(Tile::new(&tiles, i, group.clone(), at..keys.end.min(at + BLOCK)));
                    }
                }
            }
        }
        out
    }
}
