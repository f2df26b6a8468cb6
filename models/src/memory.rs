//! What models with a memory share: relative positions, and the rows that are remembered.

use std::ops::Range;

use laneformer::{Epilogue, Linear, RelativeTable};

use crate::embedding::Sinusoid;
use crate::run::rows;
use crate::{Result, Run};

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
