//! Stacks of layers by the names of their tensors: encoders and decoders with every norm in every placement.

use std::path::Path;

use laneformer::{
    Activation, Context, CrossAttention, Ffn, Graph, Heads, Inputs, KeyStore, KvCache, Layer, Linear, Norm,
    Placement, QkvProjection, SelfAttention, Stack, SubLayer,
};
use serde::Deserialize;

use crate::config::{activation, epsilon, heads};
use crate::embedding::Embeddings;
use crate::run::rows;
use crate::weights::{NormKind, normalize};
use crate::{Batch, Checkpoint, Error, Result, Run, Scratch, Weights};

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
    pub norm_placement: NormPlacement,
    #[serde(alias = "layer_norm_eps", deserialize_with = "epsilon")]
    pub eps: f32,
    #[serde(deserialize_with = "activation")]
    pub activation: Activation,
    #[serde(default)]
    pub final_norm: bool,
    pub alpha: Option<f32>,
}

impl Config {
    /// What its layers have in common; `path` is for messages.
    pub fn layers(&self, path: &Path) -> Result<LayerSpec> {
        if self.norm_placement == NormPlacement::DeepNorm && self.alpha.is_none() {
            return Err(Error::config(path, "alpha", "a number", "none"));
        }
        let heads = heads(path, "num_heads", self.d_model, self.num_heads)?;
        let spec = LayerSpec::new(heads, self.d_ff, self.activation, self.norm_placement, self.eps);
        Ok(LayerSpec { norm: self.norm, alpha: self.alpha.unwrap_or(1.0), ..spec })
    }

    /// The layers `layers.N` of a checkpoint and, if asked for, the closing `norm`; `path` is for messages.
    pub fn load(&self, path: &Path, checkpoint: &Checkpoint) -> Result<Layers> {
        let (spec, w) = (self.layers(path)?, Weights::new(checkpoint, ""));
        spec.closed_stack(&w, ENCODER, self.num_layers, self.final_norm)
    }
}

/// Where the norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormPlacement {
    /// x = norm(x + f(x))
    Post,
    /// x = x + f(norm(x))
    Pre,
    /// x = x + norm_out(f(norm(x)))
    Sandwich,
    /// x = norm(alpha x + f(x))
    DeepNorm,
}

/// A sub-layer by the names of its tensors.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the field's own terms")]
pub enum Part {
    SelfAttention(Attention),
    CrossAttention(Attention),
    Ffn([&'static str; 2], &'static str),
}

/// The names of an attention's tensors: its projections below `at`, its norm beside that.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "see above")]
pub struct Attention {
    pub at: &'static str,
    pub qkv: Qkv,
    pub out: &'static str,
    pub norm: &'static str,
}

/// The projections to queries, keys and values.
#[derive(Clone, Copy, Debug)]
pub enum Qkv {
    /// A linear layer each.
    Each([&'static str; 3]),
    /// One weight and one bias, side by side.
    Joined([&'static str; 2]),
}

impl Attention {
    /// `q_proj`, `k_proj`, `v_proj` and `out_proj`; or instead of the first three PyTorch's `in_proj_weight` and `in_proj_bias`, where
    /// these are there.
    pub const fn proj(at: &'static str, norm: &'static str) -> Attention {
        Attention { at, qkv: Qkv::Each(["q_proj", "k_proj", "v_proj"]), out: "out_proj", norm }
    }
}

/// PyTorch's `nn.TransformerEncoderLayer`.
pub const ENCODER: &[Part] =
    &[Part::SelfAttention(Attention::proj("self_attn", "norm1")), Part::Ffn(["linear1", "linear2"], "norm2")];

/// PyTorch's `nn.TransformerDecoderLayer`.
pub const DECODER: &[Part] = &[
    Part::SelfAttention(Attention::proj("self_attn", "norm1")),
    Part::CrossAttention(Attention::proj("multihead_attn", "norm2")),
    Part::Ffn(["linear1", "linear2"], "norm3"),
];

/// What the layers of a stack have in common.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct LayerSpec {
    pub d_model: usize,
    pub heads: Heads,
    pub d_ff: usize,
    pub activation: Activation,
    pub norm: NormKind,
    pub placement: NormPlacement,
    /// DeepNorm's factor of the residual; with 1, as [`LayerSpec::new`] has it, that is post-norm.
    pub alpha: f32,
    pub eps: f32,
}

impl LayerSpec {
    /// Layers as wide as their heads together, with LayerNorms.
    pub fn new(
        heads: Heads,
        d_ff: usize,
        activation: Activation,
        placement: NormPlacement,
        eps: f32,
    ) -> LayerSpec {
        let (d_model, norm) = (heads.query_cols(), NormKind::LayerNorm);
        LayerSpec { d_model, heads, d_ff, activation, norm, placement, alpha: 1.0, eps }
    }

    /// The layers `0` to `n - 1` here.
    pub fn stack(&self, w: &Weights<'_>, parts: &[Part], n: usize) -> Result<Layers> {
        self.layers(w.layers(n, |_, w| self.layer(&w, parts))?)
    }

    /// The layers `layers.0` to `layers.{n - 1}` and, if it `is_closed`, the `norm` behind them.
    pub fn closed_stack(&self, w: &Weights<'_>, parts: &[Part], n: usize, is_closed: bool) -> Result<Layers> {
        let norm = is_closed.then(|| self.norm(&w.at("norm"))).transpose()?;
        Ok(self.stack(&w.at("layers"), parts, n)?.with_norm(norm))
    }

    /// The layer here, alone.
    pub fn single(&self, w: &Weights<'_>, parts: &[Part]) -> Result<Layers> {
        self.layers(vec![self.layer(w, parts)?])
    }

    /// A layer of a cross-attention and a feed-forward network, alone.
    pub(crate) fn reader(
        &self,
        [q, k, v]: [Linear; 3],
        out: Linear,
        placement: Placement,
        ffn: SubLayer,
    ) -> Result<Layers> {
        let cross = CrossAttention::new(q, k, v, out, self.heads)?;
        self.layers(vec![Layer::new(vec![SubLayer::cross_attention(cross, placement)?, ffn])?])
    }

    /// A stack of such layers.
    pub(crate) fn layers(&self, layers: Vec<Layer>) -> Result<Layers> {
        Ok(Layers { stack: Stack::new(layers)?, norm: None, heads: self.heads })
    }

    /// One layer.
    pub(crate) fn layer(&self, w: &Weights<'_>, parts: &[Part]) -> Result<Layer> {
        Ok(Layer::new(parts.iter().map(|part| self.part(w, part)).collect::<Result<_>>()?)?)
    }

    fn part(&self, w: &Weights<'_>, part: &Part) -> Result<SubLayer> {
        Ok(match part {
            Part::SelfAttention(names) => {
                let ([q, k, v], out, placement) = self.attention(w, names)?;
                let attention = SelfAttention::new(QkvProjection::new(q, k, v, self.heads)?, out)?;
                SubLayer::self_attention(attention, placement)?
            }
            Part::CrossAttention(names) => {
                let ([q, k, v], out, placement) = self.attention(w, names)?;
                SubLayer::cross_attention(CrossAttention::new(q, k, v, out, self.heads)?, placement)?
            }
            Part::Ffn(names, norm) => self.ffn(w, *names, norm)?,
        })
    }

    fn attention(&self, w: &Weights<'_>, names: &Attention) -> Result<([Linear; 3], Linear, Placement)> {
        let (d, at) = (self.d_model, w.at(names.at));
        let each = |name| at.at(name).linear(d, d);
        let qkv = match names.qkv {
            Qkv::Each(_) if at.has("in_proj_weight") => {
                at.qkv("in_proj_weight", Some("in_proj_bias"), d, d)?
            }
            Qkv::Each([q, k, v]) => [each(q)?, each(k)?, each(v)?],
            Qkv::Joined([weight, bias]) => at.qkv(weight, Some(bias), d, d)?,
        };
        Ok((qkv, each(names.out)?, self.placement(w, names.norm)?))
    }

    pub(crate) fn ffn(&self, w: &Weights<'_>, [w1, w2]: [&str; 2], norm: &str) -> Result<SubLayer> {
        let (w1, w2) = (w.at(w1).linear(self.d_model, self.d_ff)?, w.at(w2).linear(self.d_ff, self.d_model)?);
        Ok(SubLayer::ffn(Ffn::new(w1, self.activation, w2)?, self.placement(w, norm)?)?)
    }

    pub(crate) fn placement(&self, w: &Weights<'_>, name: &str) -> Result<Placement> {
        let norm = self.norm(&w.at(name))?;
        Ok(match self.placement {
            NormPlacement::Post => Placement::post(norm),
            NormPlacement::DeepNorm => Placement::Post { norm, alpha: self.alpha },
            NormPlacement::Pre => Placement::pre(norm),
            NormPlacement::Sandwich => {
                Placement::Sandwich { before: norm, after: self.norm(&w.at(format_args!("{name}_out")))? }
            }
        })
    }

    /// The norm here.
    pub fn norm(&self, w: &Weights<'_>) -> Result<Norm> {
        w.norm(self.norm, self.d_model, self.eps)
    }
}

/// A stack of layers and, with pre-norm layers as a rule, a closing norm.
#[derive(Debug)]
pub struct Layers {
    pub(crate) stack: Stack,
    norm: Option<Norm>,
    pub(crate) heads: Heads,
}

impl Layers {
    /// The same layers, closed by a norm.
    pub fn with_norm(self, norm: Option<Norm>) -> Layers {
        Layers { norm, ..self }
    }

    /// Runs over packed features [T, d_model], in place.
    pub fn forward(&self, run: &mut Run<'_>, x: &mut [f32], inputs: &mut Inputs<'_>) -> Result<()> {
        run.stack(&self.stack, x, inputs)?;
        self.norm.as_ref().map_or(Ok(()), |norm| normalize(run.ctx, norm, x))
    }

    /// An encoder's pass: tokens see their whole sequence.
    pub fn encode(&self, run: &mut Run<'_>, x: &mut [f32], offsets: &[usize]) -> Result<()> {
        self.forward(run, x, &mut Inputs::new(offsets, &Graph::full()))
    }

    /// What decoding begins with: a memory [T, d_model] with its offsets, and room for `capacity` tokens of each sequence, or none and no
    /// caches.
    pub fn begin(
        &self,
        ctx: Context<'_>,
        memory: &[f32],
        offsets: &[usize],
        capacity: usize,
    ) -> Result<Decoding> {
        let n = offsets.len().saturating_sub(1);
        let caches = if capacity == 0 { vec![] } else { self.caches(n, capacity)? };
        Ok(Decoding { sources: self.sources(&mut Scratch::default().with(ctx), memory, offsets)?, caches })
    }

    /// The keys and values of a source [T, d_model], for each cross-attention, in stores of the scratch.
    pub fn sources(&self, run: &mut Run<'_>, source: &[f32], offsets: &[usize]) -> Result<Vec<KeyStore>> {
        let source = rows(source, self.stack.d_model())?;
        let keys = |cross: &CrossAttention| {
            let mut keys = run.scratch.take_store(cross.heads(), source.rows(), offsets)?;
            cross.set_keys(run.ctx, source, offsets, &mut keys)?;
            Ok(keys)
        };
        self.cross().map(keys).collect()
    }

    /// The cross-attentions.
    pub(crate) fn cross(&self) -> impl Iterator<Item = &CrossAttention> {
        let sub_layers = self.stack.layers().iter().flat_map(|layer| layer.sub_layers());
        sub_layers.filter_map(|sub_layer| sub_layer.as_cross_attention())
    }

    /// Empty caches of layers with one self-attention each, for sequences of up to `capacity` tokens.
    pub fn caches(&self, sequences: usize, capacity: usize) -> Result<Vec<KvCache>> {
        Ok(KvCache::for_layers(self.stack.layers().len(), &self.heads, sequences, capacity)?)
    }
}

/// What a decoder has of a batch.
#[derive(Debug, Default)]
pub struct Decoding {
    /// The keys and values of the memory that it reads, from [`Layers::sources`].
    pub sources: Vec<KeyStore>,
    /// Those of its own tokens so far, from [`Layers::caches`], which new ones continue. Without caches it sees the tokens of
    /// the same call only.
    pub caches: Vec<KvCache>,
}

/// Layers over tokens.
#[derive(Debug)]
#[allow(missing_docs, reason = "their types")]
pub struct Transformer {
    pub embeddings: Embeddings,
    pub layers: Layers,
}

impl Transformer {
    /// The last hidden state of every token, [T, d_model], of an encoder's pass: tokens see their whole sequence.
    pub fn encode(&self, run: &mut Run<'_>, batch: Batch<'_>) -> Result<Vec<f32>> {
        let mut x = self.embeddings.forward(run.ctx, batch)?;
        let graph = batch.real(Graph::full())?;
        self.layers.forward(run, &mut x, &mut Inputs::new(batch.offsets, &graph))?;
        Ok(x)
    }

    /// The last hidden state of every token, [T, d_model], of a decoder's step or pass: tokens see what is before them, and all of the
    /// memory.
    pub fn decode(&self, run: &mut Run<'_>, batch: Batch<'_>, state: &mut Decoding) -> Result<Vec<f32>> {
        let mut x = self.embeddings.forward(run.ctx, batch)?;
        let (graph, Decoding { sources, caches }) = (batch.real(Graph::causal())?, state);
        let mut inputs = Inputs { sources, caches, ..Inputs::new(batch.offsets, &graph) };
        self.layers.forward(run, &mut x, &mut inputs)?;
        Ok(x)
    }
}
