//! Attention whose queries, keys and values a model brings together itself: from another input than the rows (XLNet's second
//! stream), with a memory before them (Transformer-XL), or from two sets of projections (Longformer).

use std::borrow::Cow;
use std::mem;
use std::ops::Range;

use laneformer::{
    Context, Epilogue, Graph, Heads, Inputs, KeyStore, Layer, Linear, MatMut, Placement, QueryRows,
    RelativeTable, Stack, SubLayer, Terms,
};

use crate::embedding::Sinusoid;
use crate::run::rows;
use crate::weights::normalize;
use crate::{Error, Result, Run};

/// The projections of one attention.
#[derive(Debug)]
pub(crate) struct Projections {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub heads: Heads,
}

impl Projections {
    /// The keys and values of the rows of `x`, in a store of the scratch.
    pub fn keys(&self, run: &mut Run<'_>, x: &[f32], offsets: &[usize]) -> Result<KeyStore> {
        let k = run.project(&self.k, x, &Epilogue::NONE)?;
        let v = run.project(&self.v, x, &Epilogue::NONE)?;
        let keys = self.store(run, &k, &v, offsets)?;
        run.scratch.give(k);
        run.scratch.give(v);
        Ok(keys)
    }

    /// Keys and values that are projected already, in a store of the scratch.
    pub fn store(&self, run: &mut Run<'_>, k: &[f32], v: &[f32], offsets: &[usize]) -> Result<KeyStore> {
        let (k, v) = (rows(k, self.heads.key_cols())?, rows(v, self.heads.value_cols())?);
        let mut keys = run.scratch.take_store(&self.heads, k.rows(), offsets)?;
        keys.set(run.ctx, k, v, offsets)?;
        Ok(keys)
    }

    /// What the queries of the rows of `x` gather, before the output projection, in rows of the scratch.
    pub fn attend(&self, run: &mut Run<'_>, x: &[f32], seen: &Seen<'_>) -> Result<Vec<f32>> {
        let projected = run.project(&self.q, x, &Epilogue::NONE)?;
        let q = rows(&projected, self.heads.query_cols())?;
        let queries = QueryRows::new(q, seen.offsets);
        let queries = seen.positions.map_or(queries, |positions| queries.at(positions));
        let cols = self.heads.output_cols();
        let mut y = run.scratch.take(q.rows() * cols);
        let out = MatMut::contiguous(&mut y, q.rows(), cols)?;
        seen.keys.attend(run.ctx, &self.heads, &queries, seen.graph, &seen.terms, out)?;
        run.scratch.give(projected);
        Ok(y)
    }

    /// The same over the keys and values of a source, its rows and offsets, which are not kept.
    pub fn attend_to(
        &self,
        run: &mut Run<'_>,
        x: &[f32],
        offsets: &[usize],
        (source, source_offsets): (&[f32], &[usize]),
        graph: &Graph,
    ) -> Result<Vec<f32>> {
        let keys = self.keys(run, source, source_offsets)?;
        let y = self.attend(run, x, &Seen::new(&keys, offsets, graph))?;
        run.scratch.give_store(keys);
        Ok(y)
    }
}

/// What queries see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen<'a> {
    /// The keys and values.
    pub keys: &'a KeyStore,
    /// Where each sequence of queries begins, and the end.
    pub offsets: &'a [usize],
    /// Where each query stands among the keys of its sequence; if absent, the last at the last.
    pub positions: Option<&'a [isize]>,
    /// Who sees whom.
    pub graph: &'a Graph,
    /// Terms of the scores.
    pub terms: Terms<'a>,
}

impl<'a> Seen<'a> {
    /// Queries that end with the keys, without terms.
    pub fn new(keys: &'a KeyStore, offsets: &'a [usize], graph: &'a Graph) -> Seen<'a> {
        Seen { keys, offsets, positions: None, graph, terms: Terms::default() }
    }
}

/// A layer around such an attention: `x = norm(x + attention(x))`, or with the norm first `x = x + attention(norm(x))`,
/// then the feed-forward network.
#[derive(Debug)]
pub(crate) struct Block {
    /// Queries, keys and values.
    pub projections: Projections,
    out: Linear,
    placement: Placement,
    ffn: Stack,
}

impl Block {
    /// A layer from its parts; `placement` is that of attention's norm.
    pub fn new(projections: Projections, out: Linear, placement: Placement, ffn: SubLayer) -> Result<Block> {
        if !matches!(placement, Placement::Post { .. } | Placement::Pre { .. }) {
            return Err(Error::NotBuilt("a norm on both sides of such an attention".into()));
        }
        let ffn = Stack::new(vec![Layer::new(vec![ffn])?])?;
        Ok(Block { projections, out, placement, ffn })
    }

    /// What the projections read.
    pub fn input<'a>(&self, ctx: Context<'_>, x: &'a [f32]) -> Result<Cow<'a, [f32]>> {
        let mut x = Cow::Borrowed(x);
        if let Placement::Pre { norm } = &self.placement {
            normalize(ctx, norm, x.to_mut())?;
        }
        Ok(x)
    }

    /// The rest of the layer, from what [`Projections::attend`] gathered.
    pub fn close(&self, run: &mut Run<'_>, x: &mut Vec<f32>, attended: Vec<f32>) -> Result<()> {
        let alpha = if let Placement::Post { alpha, .. } = self.placement { alpha } else { 1.0 };
        let residual = Epilogue::NONE.with_residual(alpha, rows(x, self.out.out_features())?);
        let mut y = run.project(&self.out, &attended, &residual)?;
        run.scratch.give(attended);
        if let Placement::Post { norm, .. } = &self.placement {
            normalize(run.ctx, norm, &mut y)?;
        }
        let tokens = y.len() / self.out.out_features().max(1);
        run.stack(&self.ffn, &mut y, &mut Inputs::new(&[0, tokens], &Graph::full()))?;
        run.scratch.give(mem::replace(x, y));
        Ok(())
    }
}

/// Distances of a query after a key as each layer sees them: sinusoids, sines before cosines, times its `r`. They are clamped to
/// `-clamp..=clamp` if `clamp` is positive. A table that cannot be allocated is the library's [`Overflow`](laneformer::Error::Overflow).
pub(crate) fn positions<'a>(
    run: &mut Run<'_>,
    layers: impl Iterator<Item = &'a Linear>,
    n_heads: usize,
    distances: Range<isize>,
    clamp: i64,
) -> Result<Vec<RelativeTable>> {
    let mut layers = layers.peekable();
    let d = layers.peek().map_or(0, |r| r.in_features());
    let overflow = laneformer::Error::Overflow { arg: "distances" };
    let mut sinusoids = vec![];
    sinusoids.try_reserve_exact(distances.len().checked_mul(d).ok_or(overflow)?).map_err(|_| overflow)?;
    for distance in distances.clone().map(|distance| distance as i64) {
        let distance = (if clamp > 0 { distance.clamp(-clamp, clamp) } else { distance }) as i32;
        sinusoids.extend((0..d).map(|c| Sinusoid::Halves.at(distance, c, d)));
    }
    let table = |r: &Linear| {
        let projected = run.project(r, &sinusoids, &Epilogue::NONE)?;
        let table = RelativeTable::new(rows(&projected, r.out_features())?, distances.start, n_heads)?;
        run.scratch.give(projected);
        Ok(table)
    };
    layers.map(table).collect()
}

/// Where each of `n` sequences of the same length begins, and the end.
pub fn offsets(n: usize, len: usize) -> Vec<usize> {
    (0..=n).map(|sequence| sequence.saturating_mul(len)).collect()
}

/// The length of each of `n` sequences of the same length, with `total` tokens.
pub(crate) fn len_of_each(arg: &'static str, total: usize, n: usize) -> Result<usize> {
    if total == 0 || n == 0 {
        return Err(laneformer::Error::ZeroDim { arg }.into());
    }
    if !total.is_multiple_of(n) {
        return Err(laneformer::Error::NotDivisible { arg, actual: total, by: n }.into());
    }
    Ok(total / n)
}

/// Rows of some sequences, to which new ones come and of which the oldest go, while most stay where they are in memory.
#[derive(Clone, Debug)]
pub struct Rows {
    sequences: Vec<Vec<f32>>,
    /// Elements at the beginning of each sequence that have gone.
    gone: usize,
}

impl Rows {
    /// No rows yet of `n` sequences.
    pub fn new(n: usize) -> Rows {
        Rows { sequences: vec![vec![]; n], gone: 0 }
    }

    /// Puts rows [n, T, cols] behind those of their sequences; a remainder that does not divide by n is left out.
    pub fn push(&mut self, x: &[f32]) {
        let len = x.len() / self.sequences.len().max(1);
        // The others move when a quarter has gone: at most thrice in the life of a row, however few come at once.
        let moves = self.sequences.iter().any(|rows| 4 * self.gone >= rows.len());
        let gone = if moves { self.gone } else { 0 };
        self.gone -= gone;
        for (b, rows) in self.sequences.iter_mut().enumerate() {
            rows.drain(..gone);
            // By a quarter, not to double: memories are long.
            if rows.capacity() < rows.len() + len {
                rows.reserve_exact(len.max(rows.len() / 4));
            }
            rows.extend_from_slice(&x[b * len..(b + 1) * len]);
        }
    }

    /// Leaves at most the last `len` rows of `cols` columns.
    pub fn keep_last(&mut self, len: usize, cols: usize) {
        let all = self.sequences.first().map_or(0, Vec::len);
        self.gone = self.gone.max(all.saturating_sub(len.saturating_mul(cols)));
    }

    /// The rows of all sequences, [n, len, cols]: in place for one sequence, else copied into `buffer`.
    pub fn packed<'a>(&'a self, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        if let [rows] = &self.sequences[..] {
            return &rows[self.gone..];
        }
        buffer.clear();
        self.sequences.iter().for_each(|rows| buffer.extend_from_slice(&rows[self.gone..]));
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row `i` of sequence `b` is `1000 b + i` in three columns; expected is the range of rows that are left.
    #[test]
    fn rows_come_and_the_oldest_go() {
        for n in [0, 1, 2, 3] {
            let (mut rows, mut first, mut end) = (Rows::new(n), 0, 0);
            let steps =
                [(0, 9), (4, 9), (8, 9), (0, 9), (1, 9), (0, 8), (1, 8), (30, 8), (1, 8), (2, 0), (0, 0)];
            // What has gone is given back: in the end the capacity is that of few rows, and of the 30 that once came.
            for (come, kept) in steps.into_iter().chain([(1, 9); 100]) {
                let range = |first: usize, end: usize| -> Vec<f32> {
                    let of = |b: usize| (first..end).flat_map(move |i| [(1000 * b + i) as f32; 3]);
                    (0..n).flat_map(of).collect()
                };
                rows.push(&range(end, end + come));
                end += come;
                rows.keep_last(kept, 3);
                first = first.max(end - kept.min(end));
                let expected = range(first, end);
                assert_eq!(rows.packed(&mut vec![7.0; 5]), expected, "{n} sequences, {first} to {end}");
                let capacity = rows.sequences.iter().map(Vec::capacity).max().unwrap_or(0);
                assert!(capacity <= 3 * (2 * 9 + 30), "{capacity}");
            }
        }
    }
}
