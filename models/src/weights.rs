//! The parts of a model, read from a checkpoint: linear layers, norms, embedding tables.

use std::array;
use std::borrow::Cow;
use std::fmt::Display;

use laneformer::{Affine, Context, Linear, MatMut, MatRef, Norm, PackedMatrix};
use serde::Deserialize;

use crate::embedding::Embedding;
use crate::{Checkpoint, Error, Result};

/// The tensors of a checkpoint whose names begin with a prefix.
#[derive(Clone, Debug)]
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
    /// Whether weights are `[in, out]`, and not `[out, in]`.
    in_out: bool,
}

impl<'a> Weights<'a> {
    /// The tensors below `prefix` (without a dot at its end; empty for all).
    pub fn new(checkpoint: &'a Checkpoint, prefix: &str) -> Weights<'a> {
        Weights { checkpoint, prefix: prefix.into(), in_out: false }
    }

    /// The tensors below `name`.
    pub fn at(&self, name: impl Display) -> Weights<'a> {
        Weights { prefix: self.name(name), ..*self }
    }

    /// The same tensors with weights `[in, out]`, as GPT has them: convolutions of width one.
    pub fn in_out(self) -> Weights<'a> {
        Weights { in_out: true, ..self }
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

    /// The linear layer here: `weight` and `bias`.
    pub fn linear(&self, in_features: usize, out_features: usize) -> Result<Linear> {
        let [linear] = self.side_by_side("weight", Some("bias"), in_features, out_features)?;
        linear
    }

    /// The linear layer here, which has no bias.
    pub fn linear_without_bias(&self, in_features: usize, out_features: usize) -> Result<Linear> {
        let [linear] = self.side_by_side("weight", None, in_features, out_features)?;
        linear
    }

    /// The projections to queries, keys and values, of `out_features` each, of one weight and one bias.
    pub fn qkv(
        &self,
        weight: &str,
        bias: Option<&str>,
        in_features: usize,
        out_features: usize,
    ) -> Result<[Linear; 3]> {
        let [q, k, v] = self.side_by_side(weight, bias, in_features, out_features)?;
        Ok([q?, k?, v?])
    }

    fn side_by_side<const N: usize>(
        &self,
        weight: &str,
        bias: Option<&str>,
        k: usize,
        n: usize,
    ) -> Result<[Result<Linear>; N]> {
        let all = n.saturating_mul(N);
        let weight = self.tensor(weight, &if self.in_out { [k, all] } else { [all, k] })?;
        let bias = bias.map(|bias| self.tensor(bias, &[all])).transpose()?;
        Ok(array::from_fn(|i| {
            let bias = bias.as_deref().map(|bias| &bias[i * n..][..n]);
            if !self.in_out {
                return linear(&weight[i * n * k..][..n * k], k, n, bias);
            }
            let columns = MatRef::new(weight.get(i * n..).unwrap_or(&[]), k, n, all)?;
            Ok(Linear::new(PackedMatrix::from_in_out(columns)?, bias)?)
        }))
    }

    /// The norm here, `eps` finite and at least 0; old checkpoints call a LayerNorm's `weight` and `bias` `gamma` and `beta`.
    pub fn norm(&self, kind: NormKind, d: usize, eps: f32) -> Result<Norm> {
        let of = |name| self.tensor(name, &[d]).map(Cow::into_owned);
        Ok(match kind {
            NormKind::LayerNorm => {
                let [gain, bias] = if self.has("gamma") { ["gamma", "beta"] } else { ["weight", "bias"] };
                Norm::LayerNorm { gain: of(gain)?, bias: Some(of(bias)?), eps }
            }
            NormKind::RmsNorm => Norm::RmsNorm { gain: of("weight")?, eps },
            NormKind::BatchNorm => Norm::BatchNorm(self.batch_norm(d, eps)?),
        })
    }

    /// The batch norm here with its running statistics, as one scale and shift per channel.
    pub fn batch_norm(&self, d: usize, eps: f32) -> Result<Affine> {
        let of = |name| self.tensor(name, &[d]);
        let (gain, bias) = (of("weight")?, of("bias")?);
        Ok(Affine::from_running(&gain, &bias, &of("running_mean")?, &of("running_var")?, eps)?)
    }

    /// The LayerNorm here.
    pub fn layer_norm(&self, d: usize, eps: f32) -> Result<Norm> {
        self.norm(NormKind::LayerNorm, d, eps)
    }

    /// The embedding table here: `weight` [rows, d].
    pub fn embedding(&self, name: &'static str, rows: usize, d: usize) -> Result<Embedding> {
        Ok(Embedding::new(name, self.at(name).tensor("weight", &[rows, d])?.into_owned(), d))
    }

    fn name(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

/// The kinds of norms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// With gain and bias.
    #[default]
    LayerNorm,
    /// With a gain.
    RmsNorm,
    /// With running statistics.
    BatchNorm,
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

/// Applies a norm that stands outside a layer, behind the embeddings or at the end of a pre-norm stack, to rows one behind the other.
pub fn normalize(ctx: Context<'_>, norm: &Norm, x: &mut [f32]) -> Result<()> {
    let d = norm.channels();
    Ok(norm.apply(ctx, MatMut::contiguous(x, x.len().checked_div(d).unwrap_or(0), d)?)?)
}
