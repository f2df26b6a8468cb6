//! BERT (Devlin et al. 2018, <https://arxiv.org/abs/1810.04805>): the sum of three embeddings, normalised, then
//! post-norm encoder layers with GELU, and a pooler over the first token.

use std::path::Path;

use laneformer::{
    Activation, Context, CrossAttention, Epilogue, Ffn, Graph, Heads, Layer, Linear, MatMut, Norm, Placement,
    Stack, SubLayer,
};
use serde::Deserialize;

use crate::attend::project;
use crate::checkpoint::Checkpoint;
use crate::config::{activation, check_heads, from_value, read_json};
use crate::embedding::{Embedding, sum};
use crate::error::check_size;
use crate::ragged::Scratch;
use crate::weights::{Weights, normalize, self_attention};
use crate::{Error, Result};

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
    #[serde(default = "gelu")]
    pub hidden_act: String,
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    #[serde(default = "tiny")]
    pub layer_norm_eps: f32,
    #[serde(default)]
    pub position_embedding_type: Option<String>,
    #[serde(default)]
    pub is_decoder: bool,
}

fn gelu() -> String {
    "gelu".into()
}

fn two() -> usize {
    2
}

fn tiny() -> f32 {
    1e-12
}

impl Config {
    /// Reads `path`, which must describe a BERT encoder.
    pub fn open(path: &Path) -> Result<Config> {
        Config::from_json(path, read_json(path)?)
    }

    /// As [`Config::open`], from parsed JSON; `path` is for messages.
    pub fn from_json(path: &Path, json: serde_json::Value) -> Result<Config> {
        if let Some(model_type) = json.get("model_type").filter(|model_type| *model_type != "bert") {
            return Err(Error::config(path, "model_type", "\"bert\"", model_type));
        }
        let config: Config = from_value(path, json)?;
        config.check(path)?;
        Ok(config)
    }

    /// The fields agree, and this crate can follow them.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        activation(path, "hidden_act", &self.hidden_act)?;
        check_heads(path, "num_attention_heads", self.hidden_size, self.num_attention_heads)?;
        match self.position_embedding_type.as_deref() {
            None | Some("absolute") => {}
            Some(other) => return Err(Error::config(path, "position_embedding_type", "\"absolute\"", other)),
        }
        if self.is_decoder {
            return Err(Error::config(path, "is_decoder", "false", true));
        }
        Ok(())
    }
}

/// Packed tokens of a batch; sequence `i` is tokens `offsets[i]..offsets[i + 1]`.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "one entry per token each")]
pub struct Batch<'a> {
    pub ids: &'a [u32],
    pub type_ids: &'a [u32],
    pub positions: &'a [u32],
    pub offsets: &'a [usize],
}

/// The encoder with its embeddings and, if the checkpoint has one, its pooler.
#[derive(Debug)]
pub struct Bert {
    config: Config,
    embeddings: Embeddings,
    encoder: Stack,
    pooler: Option<Linear>,
}

impl Bert {
    /// Loads a directory with `config.json` and `model.safetensors`.
    pub fn open(dir: &Path) -> Result<Bert> {
        let config_path = dir.join("config.json");
        let config = Config::open(&config_path)?;
        Bert::load(&config_path, config, &Checkpoint::open(&dir.join("model.safetensors"))?)
    }

    /// Packs the weights of a checkpoint, with or without `bert.` before their names; `config_path` is for messages.
    pub fn load(config_path: &Path, config: Config, checkpoint: &Checkpoint) -> Result<Bert> {
        let w = checkpoint.root(&["", "bert."], "embeddings.word_embeddings.weight");
        let d = config.hidden_size;
        let act = activation(config_path, "hidden_act", &config.hidden_act)?;
        let embeddings = Embeddings::load(&w.at("embeddings"), &config)?;
        let encoder = stack(&w.at("encoder.layer"), config.num_hidden_layers, &config, act)?;
        let pooler = w.at("pooler.dense");
        let pooler = if pooler.has("weight") { Some(pooler.linear(d, d)?) } else { None };
        Ok(Bert { config, embeddings, encoder, pooler })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The embeddings of the tokens, to which other tokens can be added behind the words.
    pub(crate) fn vocabulary(&mut self) -> &mut Embedding {
        &mut self.embeddings.word
    }

    /// Every token and type is in its embedding table.
    pub fn check(&self, ids: &[u32], type_ids: &[u32]) -> Result<()> {
        self.embeddings.check(ids, type_ids)
    }

    /// The last hidden state of every token, [T, hidden_size].
    pub fn forward(&self, ctx: Context<'_>, batch: Batch<'_>, scratch: &mut Scratch) -> Result<Vec<f32>> {
        let mut x = self.embeddings.forward(ctx, batch, self.config.hidden_size)?;
        scratch.run(ctx, &self.encoder, &mut x, batch.offsets, &Graph::full())?;
        Ok(x)
    }

    /// The input of the first layer, and the output of every layer.
    pub fn hidden_states(&self, ctx: Context<'_>, batch: Batch<'_>) -> Result<Vec<Vec<f32>>> {
        let (tokens, d) = (batch.ids.len(), self.config.hidden_size);
        let segments = batch.offsets.len().saturating_sub(1);
        let mut workspace = self.encoder.workspace(tokens, segments, ctx.members())?;
        let mut x = self.embeddings.forward(ctx, batch, d)?;
        let mut states = vec![x.clone()];
        for layer in self.encoder.layers() {
            let rows = MatMut::contiguous(&mut x, tokens, d)?;
            layer.forward(ctx, rows, batch.offsets, &Graph::full(), &mut workspace)?;
            states.push(x.clone());
        }
        Ok(states)
    }

    /// The pooler over the first token of every sequence, [sequences, hidden_size]; `None` without a pooler.
    ///
    /// # Errors
    /// What the library says of the sizes, and its [`ZeroDim`](laneformer::Error::ZeroDim) for a sequence without tokens.
    pub fn pool(&self, ctx: Context<'_>, hidden: &[f32], offsets: &[usize]) -> Result<Option<Vec<f32>>> {
        self.pooler.as_ref().map(|pooler| pool(ctx, pooler, hidden, offsets)).transpose()
    }
}

/// tanh(pooler(first token)) of every sequence.
pub(crate) fn pool(ctx: Context<'_>, pooler: &Linear, hidden: &[f32], offsets: &[usize]) -> Result<Vec<f32>> {
    let mut first = vec![];
    for ends in offsets.windows(2) {
        let is_empty = ends[0] >= ends[1];
        let row = hidden.chunks_exact(pooler.in_features().max(1)).nth(ends[0]).filter(|_| !is_empty);
        first.extend(row.ok_or(laneformer::Error::ZeroDim { arg: "tokens of a sequence" })?);
    }
    project(ctx, pooler, &first, &Epilogue::activation(Activation::Tanh))
}

/// Layers `0` to `n - 1`: x = LN(x + attention(x)), x = LN(x + ffn(x)).
pub(crate) fn stack(w: &Weights<'_>, n: usize, config: &Config, act: Activation) -> Result<Stack> {
    let layer = |_, w: Weights<'_>| {
        let attention = attention(&w.at("attention"), config)?;
        Ok(Layer::new(vec![attention, ffn(&w.at("intermediate"), &w.at("output"), config, act)?])?)
    };
    Ok(Stack::new(w.layers(n, layer)?)?)
}

/// x = LN(x + attention(x))
pub(crate) fn attention(w: &Weights<'_>, config: &Config) -> Result<SubLayer> {
    let ([q, k, v], out, placement) = attention_parts(w, config)?;
    Ok(SubLayer::self_attention(self_attention([q, k, v], out, config.num_attention_heads)?, placement)?)
}

/// x = LN(x + attention(x over another stream))
pub(crate) fn cross_attention(w: &Weights<'_>, config: &Config) -> Result<SubLayer> {
    let ([q, k, v], out, placement) = attention_parts(w, config)?;
    let heads = Heads::new(config.num_attention_heads, config.hidden_size / config.num_attention_heads)?;
    Ok(SubLayer::cross_attention(CrossAttention::new(q, k, v, out, heads)?, placement)?)
}

pub(crate) fn attention_parts(w: &Weights<'_>, config: &Config) -> Result<([Linear; 3], Linear, Placement)> {
    let d = config.hidden_size;
    let [q, k, v] = ["query", "key", "value"].map(|name| w.at("self").at(name).linear(d, d));
    let (qkv, out) = ([q?, k?, v?], w.at("output.dense").linear(d, d)?);
    let norm = w.at("output.LayerNorm").layer_norm(d, config.layer_norm_eps)?;
    Ok((qkv, out, Placement::post(norm)))
}

/// x = LN(x + ffn(x))
pub(crate) fn ffn(
    inner: &Weights<'_>,
    outer: &Weights<'_>,
    config: &Config,
    act: Activation,
) -> Result<SubLayer> {
    let (d, d_ff) = (config.hidden_size, config.intermediate_size);
    let norm = outer.at("LayerNorm").layer_norm(d, config.layer_norm_eps)?;
    let ffn = Ffn::new(inner.at("dense").linear(d, d_ff)?, act, outer.at("dense").linear(d_ff, d)?)?;
    Ok(SubLayer::ffn(ffn, Placement::post(norm))?)
}

/// LN(word + type + position).
#[derive(Debug)]
pub(crate) struct Embeddings {
    word: Embedding,
    token_type: Embedding,
    position: Embedding,
    norm: Norm,
}

impl Embeddings {
    pub(crate) fn load(w: &Weights<'_>, config: &Config) -> Result<Embeddings> {
        let d = config.hidden_size;
        Ok(Embeddings {
            word: w.embedding("word_embeddings", config.vocab_size, d)?,
            token_type: w.embedding("token_type_embeddings", config.type_vocab_size, d)?,
            position: w.embedding("position_embeddings", config.max_position_embeddings, d)?,
            norm: w.at("LayerNorm").layer_norm(d, config.layer_norm_eps)?,
        })
    }

    pub(crate) fn check(&self, ids: &[u32], type_ids: &[u32]) -> Result<()> {
        self.word.check(ids)?;
        self.token_type.check(type_ids)
    }

    pub(crate) fn forward(&self, ctx: Context<'_>, batch: Batch<'_>, d: usize) -> Result<Vec<f32>> {
        let Batch { ids, type_ids, positions, .. } = batch;
        check_size("type_ids", ids.len(), type_ids.len())?;
        check_size("positions", ids.len(), positions.len())?;
        let mut x = sum([(&self.word, ids), (&self.token_type, type_ids), (&self.position, positions)])?;
        normalize(ctx, &self.norm, MatMut::contiguous(&mut x, ids.len(), d)?)?;
        Ok(x)
    }
}
