//! The tiles that attention makes of a graph, to look at: what is skipped, what is masked, and what a mask costs.

use core::ops::Range;

use crate::attention::bits::Query;
use crate::attention::graph::{Cover, Graph};
use crate::attention::kernel::{Call, Queries, Tiles};
use crate::attention::keys::{BLOCK, CHUNK_BLOCKS};
use crate::attention::plan::{Plan, check_offsets};
use crate::attention::{Heads, Terms};
use crate::error::{Error, check_size};
use crate::view::MatRef;

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
        let words: Vec<u64> = (0..queries.len()).map(|row| tiles.word(row, i)).collect();
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
        for chunk in 0..keys.len().div_ceil(CHUNK_BLOCKS * BLOCK) {
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
