//! Who sees whom: self-attention as a graph over the tokens of a sequence.

use core::ops::Range;

use crate::attention::bits::{Bits, Query};
use crate::error::Error;

/// What a ring that has dropped keys cannot answer.
pub(crate) const DROPPED: &str = "keys that the graph sees and a ring has dropped";

/// Which keys a query may see.
///
/// A query at position `p` sees key `j` of its sequence if `p - left <= j <= p + right`, or if `j` is one of the global columns, and
/// if moreover every set of bits says so. Positions count from the sequence's first key.
///
/// ```
/// use laneformer::{Bits, Graph};
/// let graph = Graph::window(1, 0).with_columns(Bits::keys(&[&[true, false, false, false]])?);
/// assert!(graph.allows(3, 3) && graph.allows(3, 2) && !graph.allows(3, 1) && graph.allows(3, 0));
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    left: usize,
    right: usize,
    columns: Option<Bits>,
    /// Keys up to the last global column.
    columns_end: usize,
    bits: Vec<Bits>,
}

impl Graph {
    /// Every token sees every token.
    pub const fn full() -> Graph {
        Graph::window(usize::MAX, usize::MAX)
    }

    /// A token sees itself and what comes before it.
    pub const fn causal() -> Graph {
        Graph::window(usize::MAX, 0)
    }

    /// A token sees itself, `left` tokens before it and `right` after it; `usize::MAX` is no limit.
    pub const fn window(left: usize, right: usize) -> Graph {
        Graph { left, right, columns: None, columns_end: 0, bits: Vec::new() }
    }

    /// The same, and all tokens see the keys of `columns` ([`Bits::keys`]) as well: Longformer's global tokens, or the prefix of
    /// a prefix-LM on a causal graph. They may differ by sequence and head, not by query: attention refuses that. They take the place of
    /// columns that were there.
    pub fn with_columns(self, columns: Bits) -> Graph {
        Graph { columns_end: columns.end(), columns: Some(columns), ..self }
    }

    /// The same, but only where `bits` allows it: key padding, groups, or any set of edges. Several are combined by AND.
    pub fn with_bits(mut self, bits: Bits) -> Graph {
        self.bits.push(bits);
        self
    }

    /// Whether query `p` of the first sequence, standing at position `p`, sees key `j`; false if the bits have no such query or key.
    pub fn allows(&self, p: usize, j: usize) -> bool {
        let query = Query { segment: 0, head: 0, place: p, row: p };
        let has_row = self.bits.iter().chain(&self.columns).all(|bits| bits.has(query));
        has_row
            && p <= isize::MAX as usize
            && self.words(query, j / 64, usize::MAX)(query, p as isize) >> (j % 64) & 1 == 1
    }

    pub(crate) fn check(
        &self,
        segments: usize,
        heads: usize,
        longest_query: usize,
        rows: usize,
        longest_key: usize,
    ) -> Result<(), Error> {
        if let Some(columns) = &self.columns {
            let args = [
                "graph columns sequences",
                "graph columns heads",
                "graph columns queries",
                "graph columns keys",
            ];
            columns.check(args, segments, heads, longest_query, rows, longest_key)?;
            if columns.differ_by_query() {
                let expected = "the same keys for all queries of a sequence";
                return Err(Error::Mismatch { arg: "graph columns", expected });
            }
        }
        let args = ["graph bits sequences", "graph bits heads", "graph bits queries", "graph bits keys"];
        self.bits
            .iter()
            .try_for_each(|bits| bits.check(args, segments, heads, longest_query, rows, longest_key))
    }

    /// Whether windows and global columns of queries from position `first` to `last` leave out the keys before `kept`, which a ring has dropped.
    pub(crate) fn check_kept(&self, span: (isize, isize), kept: usize, len: usize) -> Result<(), Error> {
        if kept == 0 {
            return Ok(());
        }
        let seen = self.keys_of(span, len);
        let columns = self.columns.as_ref().and_then(Bits::start);
        match (!seen.is_empty()).then_some(seen.start).into_iter().chain(columns).min() {
            Some(start) if start < kept => {
                Err(Error::TooLarge { arg: DROPPED, max: 0, actual: kept - start })
            }
            _ => Ok(()),
        }
    }

    /// Whether heads may see keys of their own.
    pub(crate) fn differs_by_head(&self) -> bool {
        self.columns.iter().chain(&self.bits).any(Bits::differ_by_head)
    }

    /// Keys up to the last global column.
    pub(crate) fn columns_end(&self) -> usize {
        self.columns_end
    }

    /// The most keys in the intervals of `n` queries that stand one after another.
    pub(crate) fn reach(&self, n: usize) -> usize {
        self.left.saturating_add(self.right).saturating_add(n)
    }

    /// The keys in the intervals of queries from position `first` to `last`.
    pub(crate) fn keys_of(&self, (first, last): (isize, isize), len: usize) -> Range<usize> {
        self.interval(first, len).0..self.interval(last, len).1
    }

    /// Runs of `run` keys, of `len` in all, outside of which queries from position `first` to `last` see nothing, in ascending order: up to the last
    /// global column, and where the intervals are.
    #[inline(always)]
    pub(crate) fn runs(&self, span: (isize, isize), len: usize, run: usize) -> impl Iterator<Item = usize> {
        let keys = self.keys_of(span, len);
        let columns = self.columns_end.min(len).div_ceil(run);
        (0..columns).chain((keys.start / run).max(columns)..keys.end.div_ceil(run))
    }

    /// The keys of the interval of a query at `p`, of `len`.
    #[inline(always)]
    fn interval(&self, p: isize, len: usize) -> (usize, usize) {
        let end = |n: isize| usize::try_from(n).unwrap_or(0);
        let reach = |n: usize| isize::try_from(n).unwrap_or(isize::MAX);
        let low = end(p.saturating_sub(reach(self.left)));
        let high = end(p.saturating_add(reach(self.right)).saturating_add(1));
        (low, high.min(len))
    }

    /// Whether queries of one sequence, from position `first` to `last`, see none of its keys `keys`, as far as that can be told without
    /// looking at each.
    #[inline(always)]
    pub(crate) fn sees_none(
        &self,
        query: Query,
        span: (isize, isize),
        keys: Range<usize>,
        len: usize,
    ) -> bool {
        let mut blocks = keys.start / 64..keys.end.div_ceil(64);
        self.is_outside(span, keys, len)
            && self.columns.as_ref().is_none_or(|columns| blocks.all(|block| columns.word(query, block) == 0))
    }

    /// What queries of one sequence, from position `first` to `last`, see of a block, if it can be told without looking at each that it is
    /// the same.
    #[inline(always)]
    pub(crate) fn common_word(
        &self,
        query: Query,
        (first, last): (isize, isize),
        block: usize,
        len: usize,
    ) -> Option<u64> {
        let start = 64 * block;
        let keys = start.min(len)..len.min(start + 64);
        let all = below(keys.len());
        let word = if self.is_outside((first, last), keys.clone(), len) {
            self.columns.as_ref().map_or(0, |columns| columns.word(query, block) & all)
        } else if self.interval(last, len).0 <= keys.start && keys.end <= self.interval(first, len).1 {
            // Both ends of the interval ascend with the position.
            all
        } else {
            return None;
        };
        (word == 0 || self.bits.is_empty()).then_some(word)
    }

    /// Whether the keys are in the interval of none of the queries.
    #[inline(always)]
    fn is_outside(&self, (first, last): (isize, isize), keys: Range<usize>, len: usize) -> bool {
        let (low, high) = (self.interval(first, len).0, self.interval(last, len).1);
        keys.end <= low || keys.start >= high
    }

    /// What queries of the sequence and head of `first` see of a block of a sequence of `len`: bit `i` of the word of a query and its
    /// position is key `64 * block + i`.
    #[inline(always)]
    pub(crate) fn words(&self, first: Query, block: usize, len: usize) -> impl Fn(Query, isize) -> u64 {
        let start = 64 * block;
        // The columns are those of any query.
        let columns =
            self.columns.as_ref().map_or(0, |columns| columns.word(first, block) & below(len - start));
        move |query, position| {
            let (low, high) = self.interval(position, len);
            let word = below(high.saturating_sub(start)) & !below(low.saturating_sub(start)) | columns;
            self.bits.iter().fold(word, |word, bits| word & bits.word(query, block))
        }
    }
}

/// The low `n` bits.
#[inline(always)]
fn below(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_of_the_runs_nothing_is_seen() -> Result<(), Error> {
        const RUN: usize = 256;
        let first = Query { segment: 0, head: 0, place: 0, row: 0 };
        for len in [0, 1, 256, 257, 3000] {
            let columns = |end: usize| {
                let keys: Vec<bool> = (0..len).map(|key| key < end && key % 70 == 3).collect();
                Bits::keys(&[&keys])
            };
            for (left, right) in [(0, 0), (5, 300), (700, 0), (usize::MAX, 0), (usize::MAX, usize::MAX)] {
                let window = Graph::window(left, right);
                let graphs = [
                    window.clone(),
                    window.clone().with_columns(columns(20)?),
                    window.with_columns(columns(1100)?),
                ];
                for (graph, position) in
                    graphs.iter().flat_map(|graph| [-400, -1, 0, 200, 2000, 4000].map(|p| (graph, p)))
                {
                    let span = (position, position + 63);
                    let runs: Vec<usize> = graph.runs(span, len, RUN).collect();
                    assert!(runs.is_sorted_by(|a, b| a < b), "{graph:?} {span:?} {runs:?}");
                    for run in (0..len.div_ceil(RUN)).filter(|run| !runs.contains(run)) {
                        let keys = run * RUN..len.min((run + 1) * RUN);
                        assert!(
                            graph.sees_none(first, span, keys.clone(), len),
                            "{graph:?} {span:?} {keys:?}"
                        );
                    }
                    // No more of them than windows and columns reach into.
                    let most =
                        graph.reach(64).div_ceil(RUN).saturating_add(1 + graph.columns_end().div_ceil(RUN));
                    assert!(runs.len() <= most, "{graph:?} {span:?} {runs:?}");
                }
            }
        }
        Ok(())
    }
}
