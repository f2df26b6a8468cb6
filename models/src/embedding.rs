//! Embedding tables, and the sinusoids that stand for positions where there is no table.

use std::sync::Arc;

use laneformer::{Context, Linear, Norm};

use crate::error::{check_indices, check_size};
use crate::weights::{linear, normalize};
use crate::{Batch, Result};

/// A table of vectors, one per index; clones share it.
#[derive(Clone, Debug)]
pub struct Embedding {
    name: &'static str,
    table: Arc<Vec<f32>>,
    pub(crate) d: usize,
}

impl Embedding {
    /// A table of rows of `d` elements; `name` is for messages.
    pub(crate) fn new(name: &'static str, table: Vec<f32>, d: usize) -> Embedding {
        Embedding { name, table: Arc::new(table), d }
    }

    /// The table as a linear layer: the product of a vector with every row, which makes logits of tied weights.
    pub fn as_linear(&self, bias: Option<&[f32]>) -> Result<Linear> {
        linear(&self.table, self.d, self.rows(), bias)
    }

    /// Appends rows.
    pub(crate) fn extend(&mut self, rows: &[f32]) {
        Arc::make_mut(&mut self.table).extend_from_slice(rows);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.table.len().checked_div(self.d).unwrap_or(0)
    }

    /// Every index is a row of the table.
    pub fn check(&self, indices: &[u32]) -> Result<()> {
        check_indices(self.name, self.rows(), indices)
    }

    /// The vector of an index, which is [checked](Embedding::check).
    pub(crate) fn row(&self, index: u32) -> &[f32] {
        &self.table[index as usize * self.d..][..self.d]
    }

    /// The vectors of indices, one behind the other and scaled.
    pub fn gather(&self, indices: &[u32], scale: f32) -> Result<Vec<f32>> {
        self.check(indices)?;
        let mut rows = Vec::with_capacity(indices.len() * self.d);
        for &index in indices {
            rows.extend(self.row(index).iter().map(|e| e * scale));
        }
        Ok(rows)
    }

    /// Adds the vectors of indices to `rows` rows; `arg` is what the indices are.
    fn add(&self, x: &mut [f32], rows: usize, arg: &'static str, indices: &[u32]) -> Result<()> {
        check_size(arg, rows, indices.len())?;
        self.check(indices)?;
        for (row, &index) in x.chunks_exact_mut(self.d.max(1)).zip(indices) {
            row.iter_mut().zip(self.row(index)).for_each(|(x, e)| *x += e);
        }
        Ok(())
    }
}

/// What stands before the layers: `norm(scale * word + type + position)`, without what a model does not have.
#[derive(Debug)]
#[allow(missing_docs, reason = "see above")]
pub struct Embeddings {
    pub words: Embedding,
    pub scale: f32,
    pub types: Option<Embedding>,
    pub positions: Positions,
    /// What is added to positions.
    pub first_position: u32,
    pub norm: Option<Norm>,
}

/// What stands for a position.
#[derive(Debug)]
#[allow(missing_docs, reason = "their types")]
pub enum Positions {
    Table(Embedding),
    Sinusoid(Sinusoid),
}

impl Embeddings {
    /// Words and positions of a table.
    pub fn new(words: Embedding, positions: Embedding) -> Embeddings {
        let positions = Positions::Table(positions);
        Embeddings { words, scale: 1.0, types: None, positions, first_position: 0, norm: None }
    }

    /// Every token and type is in its table.
    pub fn check(&self, ids: &[u32], type_ids: &[u32]) -> Result<()> {
        self.words.check(ids)?;
        self.types.as_ref().map_or(Ok(()), |types| types.check(type_ids))
    }

    /// The embedding of every token, [T, d].
    pub fn forward(&self, ctx: Context<'_>, batch: Batch<'_>) -> Result<Vec<f32>> {
        let (tokens, first) = (batch.ids.len(), self.first_position);
        let positions: Vec<u32> = batch.positions.iter().map(|p| p.saturating_add(first)).collect();
        let mut x = self.words.gather(batch.ids, self.scale)?;
        if let Some(types) = &self.types {
            types.add(&mut x, tokens, "type_ids", batch.type_ids)?;
        }
        match &self.positions {
            Positions::Table(table) => table.add(&mut x, tokens, "positions", &positions)?,
            Positions::Sinusoid(sinusoid) => {
                check_size("positions", tokens, positions.len())?;
                let d = self.words.d;
                for (i, x) in x.iter_mut().enumerate() {
                    *x += sinusoid.at(positions[i / d], i % d, d);
                }
            }
        }
        self.norm.as_ref().map_or(Ok(()), |norm| normalize(ctx, norm, &mut x))?;
        Ok(x)
    }
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
