//! Stacks of layers by the names of their tensors: encoders and decoders with every norm in every placement.

use std::path::Path;

use laneformer::{
    Activation, Context, CrossAttention, Ffn, Graph, Heads, Inputs, KeyStore, KvCache, Layer, Linear, Norm,
    Placement, Stack, SubLayer,
};
use serde::Deserialize;

use crate::attend::rows;
use crate::config::{activation, check_heads};
use crate::ragged::Scratch;
use crate::weights::{Weights, linear, normalize_rows, self_attention};
use crate::{Error, Result};

/// What a stack is made of.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Config {
    pub d_model: usize,
    pub num_heads: usize,
    pub d_ff: usize,
    #[serde(default)]
    pub num_layers: usize,
    #[serde(default)]
    pub norm: NormKind,
    pub norm_placement: String,
    #[serde(alias = "layer_norm_eps")]
    pub eps: f32,
    pub activation: String,
    #[serde(default)]
    pub final_norm: bool,
    #[serde(default)]
    pub alpha: Option<f32>,
}

impl Config {
    /// What its layers have in common; `path` is for messages.
    pub fn layers(&self, path: &Path) -> Result<LayerSpec> {
        check_heads(path, "num_heads", self.d_model, self.num_heads)?;
        let placement = match (self.norm_placement.as_str(), self.alpha) {
            ("post", _) => NormPlacement::Post,
            ("pre", _) => NormPlacement::Pre,
            ("sandwich", _) => NormPlacement::Sandwich,
            ("deepnorm", Some(alpha)) => NormPlacement::DeepNorm(alpha),
            ("deepnorm", None) => return Err(Error::config(path, "alpha", "a number", "none")),
            (other, _) => {
                let known = "post, pre, sandwich or deepnorm";
                return Err(Error::config(path, "norm_placement", known, other));
            }
        };
        Ok(LayerSpec {
            d_model: self.d_model,
            n_heads: self.num_heads,
            d_ff: self.d_ff,
            activation: activation(path, "activation", &self.activation)?,
            norm: self.norm,
            placement,
            eps: self.eps,
        })
    }
}

/// Which norm the layers have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// LayerNorm with gain and bias.
    #[default]
    LayerNorm,
    /// RMSNorm with a gain.
    RmsNorm,
    /// BatchNorm with running statistics.
    BatchNorm,
}

/// Where the norms stand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormPlacement {
    /// x = norm(x + f(x))
    Post,
    /// x = x + f(norm(x))
    Pre,
    /// x = x + norm_out(f(norm(x)))
    Sandwich,
    /// x = norm(alpha x + f(x))
    DeepNorm(f32),
}

/// A sub-layer by the names of its tensors, those of its norm last.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the field's own terms")]
pub enum Part {
    SelfAttention(&'static str, &'static str),
    CrossAttention(&'static str, &'static str),
    Ffn([&'static str; 2], &'static str),
}

/// PyTorch's `nn.TransformerEncoderLayer`.
pub const ENCODER: &[Part] =
    &[Part::SelfAttention("self_attn", "norm1"), Part::Ffn(["linear1", "linear2"], "norm2")];

/// PyTorch's `nn.TransformerDecoderLayer`.
pub const DECODER: &[Part] = &[
    Part::SelfAttention("self_attn", "norm1"),
    Part::CrossAttention("multihead_attn", "norm2"),
    Part::Ffn(["linear1", "linear2"], "norm3"),
];

/// What the layers of a stack have in common.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct LayerSpec {
    pub d_model: usize,
    pub n_heads: usize,
    pub d_ff: usize,
    pub activation: Activation,
    pub norm: NormKind,
    pub placement: NormPlacement,
    pub eps: f32,
}

impl LayerSpec {
    /// Layers `layers.0` to `layers.{n - 1}` of these parts and, if asked for, the closing `norm`.
    pub fn stack(&self, w: &Weights<'_>, parts: &[Part], n: usize, final_norm: bool) -> Result<Layers> {
        let layers = w.at("layers").layers(n, |_, w| self.layer(&w, parts))?;
        let norm = final_norm.then(|| self.norm(&w.at("norm"))).transpose()?;
        Ok(Layers { stack: Stack::new(layers)?, norm, heads: self.heads()? })
    }

    /// One layer alone.
    pub fn single(&self, w: &Weights<'_>, parts: &[Part]) -> Result<Layers> {
        Ok(Layers { stack: Stack::new(vec![self.layer(w, parts)?])?, norm: None, heads: self.heads()? })
    }

    /// The norm here.
    pub fn norm(&self, w: &Weights<'_>) -> Result<Norm> {
        match self.norm {
            NormKind::LayerNorm => w.layer_norm(self.d_model, self.eps),
            NormKind::RmsNorm => w.rms_norm(self.d_model, self.eps),
            NormKind::BatchNorm => w.batch_norm(self.d_model, self.eps),
        }
    }

    fn heads(&self) -> Result<Heads> {
        Ok(Heads::new(self.n_heads, self.d_model.checked_div(self.n_heads).unwrap_or(0))?)
    }

    fn layer(&self, w: &Weights<'_>, parts: &[Part]) -> Result<Layer> {
        Ok(Layer::new(parts.iter().map(|&part| self.part(w, part)).collect::<Result<_>>()?)?)
    }

    pub(crate) fn part(&self, w: &Weights<'_>, part: Part) -> Result<SubLayer> {
        let (d, d_ff) = (self.d_model, self.d_ff);
        Ok(match part {
            Part::SelfAttention(name, norm) => {
                let (w, placement) = (w.at(name), self.placement(w, norm)?);
                let out = w.at("out_proj").linear(d, d)?;
                SubLayer::self_attention(self_attention(self.qkv(&w)?, out, self.n_heads)?, placement)?
            }
            Part::CrossAttention(name, norm) => {
                let (w, placement) = (w.at(name), self.placement(w, norm)?);
                let ([q, k, v], out) = (self.qkv(&w)?, w.at("out_proj").linear(d, d)?);
                SubLayer::cross_attention(CrossAttention::new(q, k, v, out, self.heads()?)?, placement)?
            }
            Part::Ffn([w1, w2], norm) => {
                let (w1, w2) = (w.at(w1).linear(d, d_ff)?, w.at(w2).linear(d_ff, d)?);
                SubLayer::ffn(Ffn::new(w1, self.activation, w2)?, self.placement(w, norm)?)?
            }
        })
    }

    /// One projection each, or `in_proj` with the rows of queries, keys and values one behind the other.
    fn qkv(&self, w: &Weights<'_>) -> Result<[Linear; 3]> {
        let d = self.d_model;
        if !w.has("in_proj_weight") {
            return Ok([
                w.at("q_proj").linear(d, d)?,
                w.at("k_proj").linear(d, d)?,
                w.at("v_proj").linear(d, d)?,
            ]);
        }
        let rows = d.saturating_mul(3);
        let (weight, bias) = (w.tensor("in_proj_weight", &[rows, d])?, w.tensor("in_proj_bias", &[rows])?);
        let part = |i| linear(&weight[i * d * d..][..d * d], d, d, Some(&bias[i * d..][..d]));
        Ok([part(0)?, part(1)?, part(2)?])
    }

    pub(crate) fn placement(&self, w: &Weights<'_>, name: &str) -> Result<Placement> {
        let norm = self.norm(&w.at(name))?;
        Ok(match self.placement {
            NormPlacement::Post => Placement::post(norm),
            NormPlacement::DeepNorm(alpha) => Placement::Post { norm, alpha },
            NormPlacement::Pre => Placement::pre(norm),
            NormPlacement::Sandwich => {
                Placement::Sandwich { before: norm, after: self.norm(&w.at(format_args!("{name}_out")))? }
            }
        })
    }
}

/// A stack of layers and, with pre-norm layers as a rule, a closing norm.
#[derive(Debug)]
pub struct Layers {
    stack: Stack,
    norm: Option<Norm>,
    heads: Heads,
}

impl Layers {
    /// Runs over packed features [T, d_model], in place; every token sees its whole sequence.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: &mut [f32],
        offsets: &[usize],
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.forward_with(ctx, x, &mut Inputs::new(offsets, &Graph::full()), scratch)
    }

    /// Runs over packed features with any graph, terms, caches and sources.
    pub fn forward_with(
        &self,
        ctx: Context<'_>,
        x: &mut [f32],
        inputs: &mut Inputs<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        scratch.run_with(ctx, &self.stack, x, inputs)?;
        self.norm.as_ref().map_or(Ok(()), |norm| normalize_rows(ctx, norm, x))
    }

    /// A decoder's step or pass: tokens see what is before them, and all of the sources. With caches, the tokens continue
    /// those of earlier calls.
    pub fn decode(
        &self,
        ctx: Context<'_>,
        x: &mut [f32],
        offsets: &[usize],
        (sources, caches): (&[KeyStore], &mut [KvCache]),
        scratch: &mut Scratch,
    ) -> Result<()> {
        let graph = Graph::causal();
        self.forward_with(ctx, x, &mut Inputs { sources, caches, ..Inputs::new(offsets, &graph) }, scratch)
    }

    /// The keys and values of a source [T, d_model], for each cross-attention.
    pub fn sources(&self, ctx: Context<'_>, source: &[f32], offsets: &[usize]) -> Result<Vec<KeyStore>> {
        sources(ctx, &self.stack, source, offsets)
    }

    /// Empty caches of layers with one self-attention each, for sequences of up to `capacity` tokens.
    pub fn caches(&self, sequences: usize, capacity: usize) -> Result<Vec<KvCache>> {
        self.stack.layers().iter().map(|_| Ok(KvCache::new(&self.heads, sequences, capacity)?)).collect()
    }
}

/// The keys and values of a source [T, d_model], for each cross-attention of the layers.
pub(crate) fn sources(
    ctx: Context<'_>,
    stack: &Stack,
    source: &[f32],
    offsets: &[usize],
) -> Result<Vec<KeyStore>> {
    let source = rows(source, stack.d_model())?;
    let sub_layers = stack.layers().iter().flat_map(|layer| layer.sub_layers());
    let cross = sub_layers.filter_map(|sub_layer| sub_layer.as_cross_attention());
    cross.map(|cross| Ok(cross.keys(ctx, source, offsets)?)).collect()
}
