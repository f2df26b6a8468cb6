//! Embedding tables, and the sinusoids that stand for positions where there is no table.

use laneformer::Linear;

use crate::weights::linear;
use crate::{Error, Result};

/// A table of vectors, one per index.
#[derive(Clone, Debug)]
pub struct Embedding {
    name: &'static str,
    table: Vec<f32>,
    d: usize,
}

impl Embedding {
    /// A table of rows of `d` elements; `name` is for messages.
    pub(crate) fn new(name: &'static str, table: Vec<f32>, d: usize) -> Embedding {
        Embedding { name, table, d }
    }

    /// The table as a linear layer: the product of a vector with every row, which makes logits of tied weights.
    pub fn as_linear(&self, bias: Option<&[f32]>) -> Result<Linear> {
        linear(&self.table, self.d, self.rows(), bias)
    }

    /// Appends rows.
    pub(crate) fn extend(&mut self, rows: &[f32]) {
        self.table.extend_from_slice(rows);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.table.len().checked_div(self.d).unwrap_or(0)
    }

    /// Every index is a row of the table.
    pub fn check(&self, indices: &[u32]) -> Result<()> {
        let rows = self.rows();
        match indices.iter().position(|&index| index as usize >= rows) {
            None => Ok(()),
            Some(at) => Err(Error::Index { table: self.name, index: indices[at], at, rows }),
        }
    }

    /// The vector of an index.
    ///
    /// # Panics
    /// If there is none, see [`Embedding::check`].
    pub fn row(&self, index: u32) -> &[f32] {
        &self.table[index as usize * self.d..][..self.d]
    }
}

/// The sum of a row of each table for every token; tables of the same width, with an index per token each.
pub fn sum<const N: usize>(tables: [(&Embedding, &[u32]); N]) -> Result<Vec<f32>> {
    let mut x: Vec<f32> = vec![];
    for (i, &(table, indices)) in tables.iter().enumerate() {
        table.check(indices)?;
        let elements = indices.iter().flat_map(|&index| table.row(index));
        if i == 0 {
            x.extend(elements);
            continue;
        }
        let (expected, actual) = (tables[0].1.len(), indices.len());
        if actual != expected {
            return Err(laneformer::Error::Size { arg: table.name, expected, actual }.into());
        }
        x.iter_mut().zip(elements).for_each(|(x, e)| *x += e);
    }
    Ok(x)
}

/// How sines and cosines are laid out along a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sinusoid {
    /// sin, cos, sin, cos, ...
    Interleaved,
    /// All sines, then all cosines.
    Halves,
}

impl Sinusoid {
    /// Element `column` of `d` at a position, which may be negative: angles `position * 10000^(-2 i / d)`.
    pub fn at(self, position: impl Into<f64>, column: usize, d: usize) -> f32 {
        let half = d / 2;
        let (i, is_sin) = match self {
            Sinusoid::Interleaved => (column / 2, column.is_multiple_of(2)),
            Sinusoid::Halves if column < half => (column, true),
            Sinusoid::Halves => (column - half, false),
        };
        let angle = position.into() * 10000f64.powf(-2.0 * i as f64 / d as f64);
        if is_sin { angle.sin() as f32 } else { angle.cos() as f32 }
    }
}
