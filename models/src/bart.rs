//! BART (Lewis et al. 2019, <https://arxiv.org/abs/1910.13461>): an encoder and a decoder with learned positions, a norm
//! behind the embeddings, post-norm layers, and one table for both embeddings and the logits.

use std::path::Path;

use laneformer::{Context, Epilogue, KeyStore, KvCache, Linear, Norm};
use serde::Deserialize;

use crate::attend::project;
use crate::checkpoint::Checkpoint;
use crate::config::{activation, check_heads, from_value, read_json};
use crate::embedding::Embedding;
use crate::encoder::{LayerSpec, Layers, NormKind, NormPlacement, Part};
use crate::error::check_size;
use crate::gpt::Batch;
use crate::ragged::Scratch;
use crate::weights::{Weights, normalize_rows};
use crate::{Error, Result};

/// Rows of the position tables before that of position 0.
const POSITION_OFFSET: u32 = 2;
const EPS: f32 = 1e-5;

/// `config.json` of a BART directory.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub vocab_size: usize,
    pub d_model: usize,
    pub encoder_layers: usize,
    pub decoder_layers: usize,
    pub encoder_attention_heads: usize,
    pub decoder_attention_heads: usize,
    pub encoder_ffn_dim: usize,
    pub decoder_ffn_dim: usize,
    pub max_position_embeddings: usize,
    #[serde(default = "gelu")]
    pub activation_function: String,
    #[serde(default)]
    pub scale_embedding: bool,
    #[serde(default = "two")]
    pub decoder_start_token_id: u32,
    #[serde(default)]
    pub normalize_before: bool,
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
}

fn yes() -> bool {
    true
}

fn gelu() -> String {
    "gelu".into()
}

fn two() -> u32 {
    2
}

const ENCODER: &[Part] = &[
    Part::SelfAttention("self_attn", "self_attn_layer_norm"),
    Part::Ffn(["fc1", "fc2"], "final_layer_norm"),
];

const DECODER: &[Part] = &[
    Part::SelfAttention("self_attn", "self_attn_layer_norm"),
    Part::CrossAttention("encoder_attn", "encoder_attn_layer_norm"),
    Part::Ffn(["fc1", "fc2"], "final_layer_norm"),
];

/// Encoder, decoder and language-model head.
#[derive(Debug)]
pub struct Bart {
    config: Config,
    shared: Embedding,
    encoder: Side,
    decoder: Side,
    head: Linear,
}

/// What a decoder has of a batch: the keys and values of the memory, and those of its own tokens so far. Without caches (an
/// empty list) it sees the tokens of the same call only.
#[derive(Debug)]
#[allow(missing_docs, reason = "see above")]
pub struct Decoding {
    pub sources: Vec<KeyStore>,
    pub caches: Vec<KvCache>,
}

impl Bart {
    /// Loads a directory with `config.json` and `model.safetensors`.
    pub fn open(dir: &Path) -> Result<Bart> {
        let path = dir.join("config.json");
        let json: serde_json::Value = read_json(&path)?;
        match json.get("model_type").and_then(|model_type| model_type.as_str()) {
            Some("bart") => {}
            other => return Err(Error::config(&path, "model_type", "\"bart\"", other.unwrap_or("none"))),
        }
        let config = from_value(&path, json)?;
        Bart::load(&path, config, &Checkpoint::open(&dir.join("model.safetensors"))?)
    }

    /// Packs the weights of a checkpoint, with or without `model.` before their names; `path` is for messages.
    pub fn load(path: &Path, config: Config, checkpoint: &Checkpoint) -> Result<Bart> {
        if config.normalize_before {
            return Err(Error::config(path, "normalize_before", "false", true));
        }
        if !config.tie_word_embeddings {
            return Err(Error::config(path, "tie_word_embeddings", "true, one table", false));
        }
        let (d, vocab_size) = (config.d_model, config.vocab_size);
        let w = checkpoint.root(&["model.", ""], "shared.weight");
        let shared = w.embedding("shared", vocab_size, d)?;
        let bias = Weights::new(checkpoint, "");
        let has_bias = bias.has("final_logits_bias");
        let bias = has_bias.then(|| bias.tensor("final_logits_bias", &[1, vocab_size])).transpose()?;
        let head = shared.as_linear(bias.as_deref())?;
        let n_heads = config.encoder_attention_heads;
        let shape = ("encoder_attention_heads", n_heads, config.encoder_ffn_dim, config.encoder_layers);
        let encoder = Side::load(path, &w.at("encoder"), &config, ENCODER, shape)?;
        let n_heads = config.decoder_attention_heads;
        let shape = ("decoder_attention_heads", n_heads, config.decoder_ffn_dim, config.decoder_layers);
        let decoder = Side::load(path, &w.at("decoder"), &config, DECODER, shape)?;
        Ok(Bart { config, shared, encoder, decoder, head })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The memory that the decoder reads, [T, d_model].
    pub fn encode(&self, ctx: Context<'_>, batch: Batch<'_>, scratch: &mut Scratch) -> Result<Vec<f32>> {
        let mut x = self.encoder.embed(ctx, &self.shared, self.scale(), batch)?;
        self.encoder.layers.forward(ctx, &mut x, batch.offsets, scratch)?;
        Ok(x)
    }

    /// What decoding with this memory begins with; `capacity` is the number of tokens that each cache has room for, 0 is
    /// without caches.
    pub fn begin(
        &self,
        ctx: Context<'_>,
        memory: &[f32],
        offsets: &[usize],
        capacity: usize,
    ) -> Result<Decoding> {
        let layers = &self.decoder.layers;
        let sequences = offsets.len().saturating_sub(1);
        let caches = if capacity == 0 { vec![] } else { layers.caches(sequences, capacity)? };
        Ok(Decoding { sources: layers.sources(ctx, memory, offsets)?, caches })
    }

    /// The last hidden state of the decoder, [T, d_model], for its next tokens.
    pub fn decode(
        &self,
        ctx: Context<'_>,
        decoding: &mut Decoding,
        batch: Batch<'_>,
        scratch: &mut Scratch,
    ) -> Result<Vec<f32>> {
        let mut x = self.decoder.embed(ctx, &self.shared, self.scale(), batch)?;
        let state = (&decoding.sources[..], &mut decoding.caches[..]);
        self.decoder.layers.decode(ctx, &mut x, batch.offsets, state, scratch)?;
        Ok(x)
    }

    /// The logits of the next token, [T, vocab_size], for any rows of the decoder's hidden state.
    pub fn logits(&self, ctx: Context<'_>, hidden: &[f32]) -> Result<Vec<f32>> {
        project(ctx, &self.head, hidden, &Epilogue::NONE)
    }

    fn scale(&self) -> f32 {
        if self.config.scale_embedding { (self.config.d_model as f32).sqrt() } else { 1.0 }
    }
}

/// Encoder or decoder: positions, the norm behind the embeddings, layers.
#[derive(Debug)]
struct Side {
    positions: Embedding,
    norm: Norm,
    layers: Layers,
}

impl Side {
    /// `field` is what the configuration calls the number of heads.
    fn load(
        path: &Path,
        w: &Weights<'_>,
        config: &Config,
        parts: &[Part],
        (field, n_heads, d_ff, n): (&'static str, usize, usize, usize),
    ) -> Result<Side> {
        let d = config.d_model;
        check_heads(path, field, d, n_heads)?;
        let activation = activation(path, "activation_function", &config.activation_function)?;
        let (norm, placement) = (NormKind::LayerNorm, NormPlacement::Post);
        let spec = LayerSpec { d_model: d, n_heads, d_ff, activation, norm, placement, eps: EPS };
        let rows = config.max_position_embeddings.saturating_add(POSITION_OFFSET as usize);
        Ok(Side {
            positions: w.embedding("embed_positions", rows, d)?,
            norm: w.at("layernorm_embedding").layer_norm(d, EPS)?,
            layers: spec.stack(w, parts, n, false)?,
        })
    }

    /// LN(scale * token + position).
    fn embed(&self, ctx: Context<'_>, shared: &Embedding, scale: f32, batch: Batch<'_>) -> Result<Vec<f32>> {
        check_size("positions", batch.ids.len(), batch.positions.len())?;
        let positions: Vec<u32> = batch.positions.iter().map(|p| p.saturating_add(POSITION_OFFSET)).collect();
        shared.check(batch.ids)?;
        self.positions.check(&positions)?;
        let rows = batch.ids.iter().zip(&positions);
        let pairs = rows.flat_map(|(&id, &p)| shared.row(id).iter().zip(self.positions.row(p)));
        let mut x: Vec<f32> = pairs.map(|(e, p)| scale * e + p).collect();
        normalize_rows(ctx, &self.norm, &mut x)?;
        Ok(x)
    }
}
