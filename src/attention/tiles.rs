//! The tiles that attention makes of a graph: what is skipped, what is computed, what is masked. The kernel asks [`Tiles`];
//! [`Graph::tiles`] shows the same decisions to whoever wants to know what a mask costs.

use core::ops::Range;

use crate::attention::bits::Query;
use crate::attention::graph::Graph;
use crate::attention::layout::{BLOCK, CHUNK, CHUNK_BLOCKS};
use crate::attention::plan::{Plan, check_offsets};
use crate::attention::{Heads, Terms};
use crate::error::{Error, check_size};
use crate::simd::LANES;
use crate::view::MatRef;

/// Queries of a tile at most.
pub(crate) const ROWS: usize = BLOCK;
/// Rows whose keys are told apart: three register tiles. Fewer rows have less in common that not all of them see, and more calls of the
/// product.
const BAND: usize = LANES;
const BANDS: usize = ROWS / BAND;

/// The most tokens that [`Graph::tiles`] is asked about.
const MAX_TOKENS: usize = u32::MAX as usize;

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

    /// The key head of a query head; behind the last comes the first again.
    #[inline(always)]
    pub(super) fn kv_head(&self, head: usize) -> usize {
        head % self.heads.n_heads * self.heads.n_kv_heads / self.heads.n_heads
    }

    /// Whether so many rows each of several heads are taken as those of one tile. Not if heads differ in what is asked once for all rows, global columns
    /// and the table of relative positions, or in the keys that they see, of which a tile takes all that any row sees; nor rows of more than a
    /// band, which would share bands with other rows of the next head.
    pub(super) fn takes_heads_together(&self, rows: usize) -> bool {
        rows <= BAND && self.terms.relative.is_none() && !self.graph.differs_by_head()
    }
}

/// The queries of a tile: some rows of one head after another of a sequence, at most [`ROWS`] in all. Several heads see the same
/// ([`Call::takes_heads_together`]); where they may differ, each row is asked for itself ([`Queries::query`]).
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// `[rows of a head, heads * head_dim]`.
    pub(crate) q: MatRef<'a>,
    /// The first row of the first head.
    pub(crate) first: Query,
    /// Its position. The others of its head stand one after another behind it.
    pub(crate) position: isize,
    pub(crate) heads: usize,
    /// Heads that meet keys together: several if they share them and have one row each.
    pub(crate) sharing: usize,
}

impl<'a> Queries<'a> {
    /// Rows of all heads.
    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        self.heads * self.q.rows()
    }

    /// The positions of the first and the last row of a head.
    #[inline(always)]
    pub(super) fn span(&self) -> (isize, isize) {
        (self.position, self.position + self.q.rows() as isize - 1)
    }

    /// A row and its position.
    #[inline(always)]
    pub(super) fn query(&self, row: usize) -> (Query, isize) {
        let Query { head, place, row: packed, .. } = self.first;
        // Of one head, rows are not divided: this is asked for every row of every block that some see in part.
        let (of_tile, row) =
            if self.heads > 1 { (row / self.q.rows(), row % self.q.rows()) } else { (0, row) };
        let query = Query { head: head + of_tile, place: place + row, row: packed + row, ..self.first };
        (query, self.position + row as isize)
    }

    /// The elements of a row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        let (n, dim) = (self.q.rows(), self.q.cols() / self.heads);
        &self.q.row(row % n)[row / n * dim..][..dim]
    }

    /// Heads that meet keys together, from the first on: their number in the tile, their rows in it, and these as a matrix.
    #[inline(always)]
    pub(super) fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>, MatRef<'a>)> {
        let (q, n, sharing, dim) = (self.q, self.q.rows(), self.sharing, self.q.cols() / self.heads);
        (0..self.heads).step_by(sharing).map(
            #[inline(always)]
            move |head| {
                let q = q.block(0..n, head * dim..(head + sharing) * dim);
                (head, head * n..(head + sharing) * n, if sharing > 1 { q.cut(dim) } else { q })
            },
        )
    }
}

/// What the rows of a tile see of a chunk.
pub(super) struct Tiles {
    pub(super) first_block: usize,
    /// Some of the scores that are computed are masked.
    pub(super) is_masked: bool,
    rows: usize,
    /// The keys of each block that some row of a band sees, begun at a whole vector; empty if none.
    seen: [Seen; BANDS],
    /// The keys that each row sees, or of the first if all see the same.
    words: [Words; ROWS],
    are_alike: bool,
}

/// Keys of each block of a chunk.
pub(super) type Seen = [Range<usize>; CHUNK_BLOCKS];
/// Keys of a chunk, a bit for each.
pub(super) type Words = [u64; CHUNK_BLOCKS];

impl Tiles {
    /// Of no chunk yet.
    pub(super) const NONE: Tiles = Tiles {
        first_block: 0,
        is_masked: false,
        rows: 0,
        seen: [const { [const { 0..0 }; CHUNK_BLOCKS] }; BANDS],
        words: [[0; CHUNK_BLOCKS]; ROWS],
        are_alike: false,
    };

    /// Finds the next of `chunks` of which the rows see something, if there is one.
    #[inline(always)]
    pub(super) fn find_next(
        &mut self,
        call: &Call<'_>,
        queries: &Queries<'_>,
        len: usize,
        chunks: &mut impl Iterator<Item = usize>,
    ) -> bool {
        chunks.any(
            #[inline(always)]
            |chunk| self.find(call, queries, len, chunk),
        )
    }

    /// Finds what the rows see of a chunk of `len` keys; false if that is nothing.
    #[inline(always)]
    pub(super) fn find(&mut self, call: &Call<'_>, queries: &Queries<'_>, len: usize, chunk: usize) -> bool {
        let (graph, first, span) = (call.graph, queries.first, queries.span());
        let start = chunk * CHUNK;
        if graph.sees_none(first, span, start..len.min(start + CHUNK), len) {
            return false;
        }
        (self.first_block, self.rows, self.is_masked) = (chunk * CHUNK_BLOCKS, queries.rows(), false);
        let common: [Option<u64>; CHUNK_BLOCKS] = core::array::from_fn(|i| {
            let word = graph.common_word(first, span, self.first_block + i, len)?;
            (word == 0 || call.terms.bias.is_none()).then_some(word)
        });
        self.are_alike = common.iter().all(Option::is_some);
        for (i, common) in common.into_iter().enumerate() {
            let end = len.saturating_sub(start + i * BLOCK).min(BLOCK);
            match common {
                Some(word) => {
                    let rows = if self.are_alike { 1 } else { self.rows };
                    self.words[..rows].iter_mut().for_each(|words| words[i] = word);
                    let seen = hull(word, end);
                    self.is_masked |= word != bits(&seen);
                    self.seen.iter_mut().for_each(|blocks| blocks[i] = seen.clone());
                }
                None => self.find_words(call, queries, i, end, len),
            }
        }
        self.bands().any(|(_, seen)| seen.iter().any(|seen| !seen.is_empty()))
    }

    /// The keys that each row sees of block `i`, which ends at `end`, and what of it is left for each band.
    #[inline(never)]
    fn find_words(&mut self, call: &Call<'_>, queries: &Queries<'_>, i: usize, end: usize, len: usize) {
        let block = self.first_block + i;
        let word = call.graph.words(queries.first, block, len);
        for (band, words) in self.words[..self.rows].chunks_mut(BAND).enumerate() {
            let (mut any, mut all) = (0, u64::MAX);
            for (row, words) in (band * BAND..).zip(words) {
                let (query, position) = queries.query(row);
                words[i] = word(query, position) & !bias_mask(call, query, block);
                any |= words[i];
                all &= words[i];
            }
            let seen = hull(any, end);
            self.is_masked |= all != bits(&seen);
            self.seen[band][i] = seen;
        }
    }

    /// The first block from place `i` of the chunk on of which some row sees keys.
    #[inline(always)]
    pub(super) fn block_from(&self, i: usize) -> Option<usize> {
        let is_seen = |&i: &usize| self.bands().any(|(_, seen)| !seen[i].is_empty());
        (i..CHUNK_BLOCKS).find(is_seen).map(|i| self.first_block + i)
    }

    /// `(rows, their keys of block i)`: bands that follow one another and see the same are one.
    #[inline(always)]
    pub(super) fn parts(&self, i: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        self.merged(move |band| &self.seen[band][i]).map(|(rows, seen)| (rows, seen.clone()))
    }

    /// `(rows, their keys of each block)`, likewise.
    #[inline(always)]
    pub(super) fn bands(&self) -> impl Iterator<Item = (Range<usize>, &Seen)> {
        self.merged(|band| &self.seen[band])
    }

    #[inline(always)]
    fn merged<'a, T: PartialEq + 'a>(
        &'a self,
        of: impl Fn(usize) -> &'a T,
    ) -> impl Iterator<Item = (Range<usize>, &'a T)> {
        let (mut band, end) = (0, self.rows.div_ceil(BAND));
        core::iter::from_fn(move || {
            let (first, item) = (band, (band < end).then(|| of(band))?);
            while band < end && of(band) == item {
                band += 1;
            }
            Some((first * BAND..self.rows.min(band * BAND), item))
        })
    }

    /// What the band of a row sees.
    #[inline(always)]
    pub(super) fn seen(&self, row: usize) -> &Seen {
        &self.seen[row / BAND]
    }

    /// `(place in the chunk, block, its keys)` of each block of which the band of a row sees keys.
    #[inline(always)]
    pub(super) fn blocks(&self, row: usize) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
        let seen = self.seen(row).iter().enumerate().filter(|(_, seen)| !seen.is_empty());
        seen.map(|(i, seen)| (i, self.first_block + i, seen.clone()))
    }

    /// The keys that a row sees.
    #[inline(always)]
    pub(super) fn words(&self, row: usize) -> &Words {
        &self.words[if self.are_alike { 0 } else { row }]
    }
}

/// Keys of the chunk without a gap.
#[inline(always)]
pub(super) fn runs(seen: &Seen) -> impl Iterator<Item = Range<usize>> {
    let mut i = 0;
    core::iter::from_fn(move || {
        while i < CHUNK_BLOCKS && seen[i].is_empty() {
            i += 1;
        }
        let Range { start, end } = seen.get(i)?;
        let (start, mut end) = (i * BLOCK + start, i * BLOCK + end);
        i += 1;
        while end == i * BLOCK && i < CHUNK_BLOCKS && seen[i].start == 0 {
            end += seen[i].end;
            i += 1;
        }
        Some(start..end)
    })
}

/// The keys from the first set bit to the last, in whole vectors up to `end`.
#[inline(always)]
fn hull(word: u64, end: usize) -> Range<usize> {
    if word == 0 {
        return 0..0;
    }
    let vector = |bit: u32| bit as usize / LANES;
    vector(word.trailing_zeros()) * LANES..end.min((vector(63 - word.leading_zeros()) + 1) * LANES)
}

/// The keys of a block that the bias takes away.
#[inline(always)]
fn bias_mask(call: &Call<'_>, query: Query, block: usize) -> u64 {
    let Some(bias) = &call.terms.bias else { return 0 };
    let bias = bias.row(query)[block * BLOCK..].iter().take(BLOCK).enumerate();
    bias.fold(0, |word, (j, &b)| word | u64::from(b == f32::NEG_INFINITY) << j)
}

/// A set bit for each of some keys of a block.
#[inline(always)]
fn bits(keys: &Range<usize>) -> u64 {
    if keys.is_empty() { 0 } else { u64::MAX >> (BLOCK - keys.len()) << keys.start }
}

/// How much of a tile of scores the graph keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cover {
    /// Nothing: the tile is skipped.
    Empty,
    /// Some: of what is computed, some scores are masked.
    Partial,
    /// Every query sees every key.
    Full,
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
    fn new(queries: Range<usize>, keys: Range<usize>, seen: Range<usize>, words: Vec<u64>) -> Tile {
        if seen.is_empty() {
            let computed = keys.start..keys.start;
            return Tile { queries, keys, computed, cover: Cover::Empty, words: vec![] };
        }
        let computed = keys.start + seen.start..keys.start + seen.end;
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
    /// [`Error::Size`], [`Error::TooSmall`], [`Error::NotAscending`] if the offsets do not fit one another or the graph's bits, [`Error::TooLarge`]
    /// beyond `u32::MAX` tokens, [`Error::Overflow`] for a head that cannot be, [`Error::Mismatch`] if columns differ by query.
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
        // The list of blocks of queries is made at once, and its tiles are one by one of all blocks of keys.
        for (arg, offsets) in [("offsets", offsets), ("key_offsets", key_offsets)] {
            if last(offsets) > MAX_TOKENS {
                return Err(Error::TooLarge { arg, max: MAX_TOKENS, actual: last(offsets) });
            }
        }
        let mut plan = Plan::default();
        plan.build(offsets);
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
        let queries = Queries { q, first, position, heads: 1, sharing: 1 };
        let (mut tiles, mut out) = (Tiles::NONE, vec![]);
        for chunk in 0..keys.len().div_ceil(CHUNK) {
            let is_seen = tiles.find(&call, &queries, keys.len(), chunk);
            for i in 0..CHUNK_BLOCKS {
                let at = keys.start + (chunk * CHUNK_BLOCKS + i) * BLOCK;
                if at >= keys.end {
                    break;
                }
                let keys = at..keys.end.min(at + BLOCK);
                if !is_seen {
                    out.push(Tile::new(rows.clone(), keys, 0..0, vec![]));
                    continue;
                }
                for (part, seen) in tiles.parts(i) {
                    let words = part.clone().map(|row| tiles.words(row)[i]).collect();
                    let queries = rows.start + part.start..rows.start + part.end;
                    out.push(Tile::new(queries, keys.clone(), seen, words));
                }
            }
        }
        out
    }
}
