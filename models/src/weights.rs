//! The parts of a model, read from a checkpoint: linear layers, norms, embedding tables.

use std::borrow::Cow;
use std::fmt::Display;
use std::ops::Range;

use laneformer::{
    Affine, Context, Heads, Linear, MatMut, MatRef, Norm, PackedMatrix, QkvProjection, SelfAttention,
    layernorm, rmsnorm,
};

use crate::checkpoint::Checkpoint;
use crate::embedding::Embedding;
use crate::{Error, Result};

/// The tensors of a checkpoint whose names begin with a prefix.
#[derive(Clone, Debug)]
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
}

impl<'a> Weights<'a> {
    /// The tensors below `prefix` (without a dot at its end; empty for all).
    pub fn new(checkpoint: &'a Checkpoint, prefix: &str) -> Weights<'a> {
        Weights { checkpoint, prefix: prefix.into() }
    }

    /// The tensors below `name`.
    pub fn at(&self, name: impl Display) -> Weights<'a> {
        Weights { checkpoint: self.checkpoint, prefix: self.name(name) }
    }

    /// Whether there is a tensor of this name here.
    pub fn has(&self, name: &str) -> bool {
        self.checkpoint.has(&self.name(name))
    }

    /// The layers `0` to `n - 1` here. There must not be more: then the configuration is that of another checkpoint.
    pub fn layers<T>(&self, n: usize, load: impl Fn(usize, Weights<'a>) -> Result<T>) -> Result<Vec<T>> {
        if let Some(name) = self.checkpoint.first_below(&self.name(n)) {
            return Err(Error::MoreLayers { path: self.checkpoint.path().into(), name, layers: n });
        }
        (0..n).map(|i| load(i, self.at(i))).collect()
    }

    /// The tensor `name`, which must have this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Cow<'a, [f32]>> {
        self.checkpoint.tensor(&self.name(name), shape)
    }

    /// The linear layer here: `weight`, `[out, in]`, and `bias`, `[out]`.
    pub fn linear(&self, in_features: usize, out_features: usize) -> Result<Linear> {
        let weight = self.tensor("weight", &[out_features, in_features])?;
        linear(&weight, in_features, out_features, Some(&self.tensor("bias", &[out_features])?))
    }

    /// The same without a bias.
    pub fn linear_without_bias(&self, in_features: usize, out_features: usize) -> Result<Linear> {
        linear(&self.tensor("weight", &[out_features, in_features])?, in_features, out_features, None)
    }

    /// The columns `part` of GPT's linear layer here, a convolution of width one: `weight`, `[in, out]`, and `bias`, `[out]`.
    pub fn conv1d(&self, in_features: usize, out_features: usize, part: Range<usize>) -> Result<Linear> {
        let weight = self.tensor("weight", &[in_features, out_features])?;
        let bias = self.tensor("bias", &[out_features])?;
        let columns = weight.get(part.start..).unwrap_or(&[]);
        let columns = MatRef::new(columns, in_features, part.len(), out_features)?;
        Ok(Linear::new(PackedMatrix::from_in_out(columns)?, bias.get(part))?)
    }

    /// The LayerNorm here: `weight` and `bias`, which old checkpoints call `gamma` and `beta`.
    pub fn layer_norm(&self, d: usize, eps: f32) -> Result<Norm> {
        let (gain, bias) = if self.has("gamma") { ("gamma", "beta") } else { ("weight", "bias") };
        let gain = self.tensor(gain, &[d])?.into_owned();
        check_eps(eps)?;
        Ok(Norm::LayerNorm { gain, bias: Some(self.tensor(bias, &[d])?.into_owned()), eps })
    }

    /// The RMSNorm here: `weight`.
    pub fn rms_norm(&self, d: usize, eps: f32) -> Result<Norm> {
        check_eps(eps)?;
        Ok(Norm::RmsNorm { gain: self.tensor("weight", &[d])?.into_owned(), eps })
    }

    /// The BatchNorm here with its running statistics, as one scale and shift per channel.
    pub fn batch_norm(&self, d: usize, eps: f32) -> Result<Norm> {
        let of = |name| self.tensor(name, &[d]);
        check_eps(eps)?;
        let (gain, bias) = (of("weight")?, of("bias")?);
        Ok(Norm::BatchNorm(Affine::from_running(
            &gain,
            &bias,
            &of("running_mean")?,
            &of("running_var")?,
            eps,
        )?))
    }

    /// The embedding table here: `weight` [rows, d].
    pub fn embedding(&self, name: &'static str, rows: usize, d: usize) -> Result<Embedding> {
        Ok(Embedding::new(name, self.at(name).tensor("weight", &[rows, d])?.into_owned(), d))
    }

    fn name(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

fn check_eps(eps: f32) -> Result<()> {
    let expected = "a finite number of at least 0";
    if eps.is_finite() && eps >= 0.0 {
        return Ok(());
    }
    Err(laneformer::Error::Mismatch { arg: "epsilon of a norm", expected }.into())
}

/// A linear layer of a weight [out, in].
pub fn linear(
    weight: &[f32],
    in_features: usize,
    out_features: usize,
    bias: Option<&[f32]>,
) -> Result<Linear> {
    let weight = PackedMatrix::from_out_in(MatRef::contiguous(weight, out_features, in_features)?)?;
    Ok(Linear::new(weight, bias)?)
}

/// Self-attention of `n_heads` heads from its projections.
pub fn self_attention([q, k, v]: [Linear; 3], out: Linear, n_heads: usize) -> Result<SelfAttention> {
    let heads = Heads::new(n_heads, q.out_features().checked_div(n_heads).unwrap_or(0))?;
    Ok(SelfAttention::new(QkvProjection::new(q, k, v, heads)?, out)?)
}

/// Applies a norm that stands outside a layer: behind the embeddings, or at the end of a pre-norm stack.
pub fn normalize(ctx: Context<'_>, norm: &Norm, x: MatMut<'_>) -> Result<()> {
    match norm {
        Norm::LayerNorm { gain, bias, eps } => layernorm(ctx, x, gain, bias.as_deref(), *eps)?,
        Norm::RmsNorm { gain, eps } => rmsnorm(ctx, x, gain, *eps)?,
        Norm::BatchNorm(affine) => affine.apply(ctx, x)?,
        _ => return Err(Error::NotBuilt("a norm of this kind outside a layer".into())),
    }
    Ok(())
}

/// [`normalize`] of rows that follow one another.
pub fn normalize_rows(ctx: Context<'_>, norm: &Norm, x: &mut [f32]) -> Result<()> {
    let d = norm.channels();
    let rows = x.len().checked_div(d).unwrap_or(0);
    normalize(ctx, norm, MatMut::contiguous(x, rows, d)?)
}
