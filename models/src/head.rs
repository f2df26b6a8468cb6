//! What stands behind the layers: poolers over the first token, the heads of the models, and the likeliest token.

use laneformer::{Activation, Context, Epilogue, Linear, Norm};

use crate::run::project;
use crate::weights::normalize;
use crate::{Result, Scratch};

/// `tanh(pooler(first token))` of every sequence, [sequences, d]. A sequence without tokens is the library's
/// [`ZeroDim`](laneformer::Error::ZeroDim).
pub fn pool(ctx: Context<'_>, pooler: &Linear, hidden: &[f32], offsets: &[usize]) -> Result<Vec<f32>> {
    let mut first = vec![];
    for ends in offsets.windows(2) {
        let is_empty = ends[0] >= ends[1];
        let row = hidden.chunks_exact(pooler.in_features().max(1)).nth(ends[0]).filter(|_| !is_empty);
        first.extend(row.ok_or(laneformer::Error::ZeroDim { arg: "tokens of a sequence" })?);
    }
    Scratch::default().with(ctx).project(pooler, &first, &Epilogue::activation(Activation::Tanh))
}

/// `out(norm(gelu(dense(x))))`
#[derive(Debug)]
pub(crate) struct Head {
    pub dense: Linear,
    pub norm: Norm,
    pub out: Linear,
}

impl Head {
    /// The logits of rows.
    pub fn forward(&self, ctx: Context<'_>, x: &[f32]) -> Result<Vec<f32>> {
        let gelu = Epilogue::activation(Activation::GeluErf);
        let mut x = Scratch::default().with(ctx).project(&self.dense, x, &gelu)?;
        normalize(ctx, &self.norm, &mut x)?;
        project(ctx, &self.out, &x)
    }
}

/// The place of the largest number, the first of equal ones.
pub fn argmax(x: &[f32]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}
