//! BERT (Devlin et al. 2018, <https://arxiv.org/abs/1810.04805>): the sum of three embeddings, normalised, then
//! post-norm encoder layers with GELU, and a pooler over the first token.

use std::path::Path;

use laneformer::{Activation, Context, Graph, Linear, MatMut};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{self, activation, epsilon, heads, only};
use crate::embedding::Embeddings;
use crate::encoder::{Attention, LayerSpec, NormPlacement, Part, Qkv, Transformer};
use crate::head;
use crate::{Batch, Checkpoint, Result, Run, Weights};

/// `config.json` of a BERT directory.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    #[serde(alias = "l_layers")]
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    #[serde(deserialize_with = "activation")]
    pub hidden_act: Activation,
    pub type_vocab_size: usize,
    #[serde(deserialize_with = "epsilon")]
    pub layer_norm_eps: f32,
}

impl Config {
    /// From parsed JSON, which may name no other model; `path` is for messages.
    pub fn from_json(path: &Path, json: &Value) -> Result<Config> {
        only(path, json, &[("model_type", "bert".into())])?;
        Config::part(path, json)
    }

    /// As a part of another model's.
    pub(crate) fn part(path: &Path, json: &Value) -> Result<Config> {
        only(path, json, &[("position_embedding_type", "absolute".into()), ("is_decoder", false.into())])?;
        let defaults = json!({ "hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12 });
        config::read(path, json, defaults)
    }

    /// What the layers have in common.
    pub(crate) fn layers(&self, path: &Path) -> Result<LayerSpec> {
        let (d_ff, act, eps) = (self.intermediate_size, self.hidden_act, self.layer_norm_eps);
        let heads = heads(path, "num_attention_heads", self.hidden_size, self.num_attention_heads)?;
        Ok(LayerSpec::new(heads, d_ff, act, NormPlacement::Post, eps))
    }

    /// LN(word + type + position)
    pub(crate) fn embeddings(&self, w: &Weights<'_>) -> Result<Embeddings> {
        let d = self.hidden_size;
        let words = w.embedding("word_embeddings", self.vocab_size, d)?;
        let types = w.embedding("token_type_embeddings", self.type_vocab_size, d)?;
        let positions = w.embedding("position_embeddings", self.max_position_embeddings, d)?;
        let norm = w.at("LayerNorm").layer_norm(d, self.layer_norm_eps)?;
        Ok(Embeddings { types: Some(types), norm: Some(norm), ..Embeddings::new(words, positions) })
    }
}

/// The names of attention below `at`.
pub(crate) const fn attention(at: &'static str, norm: &'static str) -> Attention {
    Attention { at, qkv: Qkv::Each(["self.query", "self.key", "self.value"]), out: "output.dense", norm }
}

pub(crate) const ATTENTION: Attention = attention("attention", "attention.output.LayerNorm");
pub(crate) const FFN: Part = Part::Ffn(["intermediate.dense", "output.dense"], "output.LayerNorm");
pub(crate) const LAYER: &[Part] = &[Part::SelfAttention(ATTENTION), FFN];

/// The encoder and, if the checkpoint has one, its pooler.
#[derive(Debug)]
#[allow(missing_docs, reason = "see above")]
pub struct Bert {
    pub config: Config,
    pub encoder: Transformer,
    pub pooler: Option<Linear>,
}

impl Bert {
    /// Packs the weights of a checkpoint, with or without `bert.` before their names; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Bert> {
        Bert::new(path, Config::from_json(path, json)?, checkpoint)
    }

    pub(crate) fn new(path: &Path, config: Config, checkpoint: &Checkpoint) -> Result<Bert> {
        let spec = config.layers(path)?;
        let w = checkpoint.root(&["", "bert."], "embeddings.word_embeddings.weight");
        let embeddings = config.embeddings(&w.at("embeddings"))?;
        let layers = spec.stack(&w.at("encoder.layer"), LAYER, config.num_hidden_layers)?;
        let pooler = pooler(&w, config.hidden_size)?;
        Ok(Bert { config, encoder: Transformer { embeddings, layers }, pooler })
    }

    /// The last hidden state of every token, [T, hidden_size].
    pub fn forward(&self, run: &mut Run<'_>, batch: Batch<'_>) -> Result<Vec<f32>> {
        self.encoder.encode(run, batch)
    }

    /// The input of the first layer, and the output of every layer.
    pub fn hidden_states(&self, ctx: Context<'_>, batch: Batch<'_>) -> Result<Vec<Vec<f32>>> {
        let Transformer { embeddings, layers } = &self.encoder;
        let (tokens, segments) = (batch.ids.len(), batch.offsets.len().saturating_sub(1));
        let mut workspace = layers.stack.workspace(tokens, segments, ctx.members())?;
        let graph = batch.real(Graph::full())?;
        let mut states = vec![embeddings.forward(ctx, batch)?];
        for layer in layers.stack.layers() {
            let mut x = states[states.len() - 1].clone();
            let rows = MatMut::contiguous(&mut x, tokens, self.config.hidden_size)?;
            layer.forward(ctx, rows, batch.offsets, &graph, &mut workspace)?;
            states.push(x);
        }
        Ok(states)
    }

    /// The pooler over the first token of every sequence, [sequences, hidden_size]; `None` without a pooler.
    pub fn pool(&self, ctx: Context<'_>, hidden: &[f32], offsets: &[usize]) -> Result<Option<Vec<f32>>> {
        self.pooler.as_ref().map(|pooler| head::pool(ctx, pooler, hidden, offsets)).transpose()
    }
}

pub(crate) fn pooler(w: &Weights<'_>, d: usize) -> Result<Option<Linear>> {
    let w = w.at("pooler.dense");
    w.has("weight").then(|| w.linear(d, d)).transpose()
}
