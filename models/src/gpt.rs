//! GPT (Radford et al. 2018) and GPT-2 (Radford et al. 2019): token and position embeddings, causal layers with the tanh
//! form of GELU, and logits by the token embeddings. GPT norms after each sub-layer, GPT-2 before, with one more at the end.

use std::path::Path;

use laneformer::{
    Activation, Context, Epilogue, Ffn, Graph, Heads, Inputs, KvCache, Layer, Linear, MatMut, Norm,
    Placement, QkvProjection, SelfAttention, Stack, SubLayer,
};
use serde::Deserialize;

use crate::attend::project;
use crate::checkpoint::Checkpoint;
use crate::config::{activation, check_heads, from_value, read_json};
use crate::embedding::{Embedding, sum};
use crate::ragged::Scratch;
use crate::weights::{Weights, normalize};
use crate::{Error, Result};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "their names")]
pub enum Version {
    Gpt1,
    Gpt2,
}

/// `config.json` of a GPT or GPT-2 directory.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    #[serde(default)]
    pub n_inner: Option<usize>,
    #[serde(alias = "afn", default = "gelu_new")]
    pub activation_function: String,
    #[serde(default = "small")]
    pub layer_norm_epsilon: f32,
    #[serde(default = "yes")]
    pub scale_attn_weights: bool,
    #[serde(default)]
    pub scale_attn_by_inverse_layer_idx: bool,
    #[serde(default)]
    pub add_cross_attention: bool,
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
}

fn gelu_new() -> String {
    "gelu_new".into()
}

fn small() -> f32 {
    1e-5
}

fn yes() -> bool {
    true
}

/// Packed tokens of a batch; sequence `i` is tokens `offsets[i]..offsets[i + 1]`.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "one entry per token each")]
pub struct Batch<'a> {
    pub ids: &'a [u32],
    pub positions: &'a [u32],
    pub offsets: &'a [usize],
}

/// The decoder with its embeddings and its language-model head.
#[derive(Debug)]
pub struct Gpt {
    config: Config,
    tokens: Embedding,
    positions: Embedding,
    decoder: Stack,
    norm: Option<Norm>,
    head: Linear,
}

impl Gpt {
    /// Loads a directory with `config.json` and `model.safetensors`.
    pub fn open(dir: &Path) -> Result<Gpt> {
        let path = dir.join("config.json");
        let json: serde_json::Value = read_json(&path)?;
        let version = match json.get("model_type").and_then(|model_type| model_type.as_str()) {
            Some("openai-gpt") => Version::Gpt1,
            Some("gpt2") => Version::Gpt2,
            other => {
                let known = "\"openai-gpt\" or \"gpt2\"";
                return Err(Error::config(&path, "model_type", known, other.unwrap_or("none")));
            }
        };
        let config = from_value(&path, json)?;
        Gpt::load(&path, version, config, &Checkpoint::open(&dir.join("model.safetensors"))?)
    }

    /// Packs the weights of a checkpoint, with or without `transformer.` before their names; `path` is for messages.
    pub fn load(path: &Path, version: Version, config: Config, checkpoint: &Checkpoint) -> Result<Gpt> {
        let (d, eps) = (config.n_embd, config.layer_norm_epsilon);
        check_heads(path, "n_head", d, config.n_head)?;
        if config.add_cross_attention {
            return Err(Error::config(path, "add_cross_attention", "false", true));
        }
        // GPT calls the tanh form `gelu`.
        let act = match (version, config.activation_function.as_str()) {
            (Version::Gpt1, "gelu") => Activation::GeluTanh,
            (Version::Gpt1, name) => activation(path, "afn", name)?,
            (Version::Gpt2, name) => activation(path, "activation_function", name)?,
        };
        let (tokens, positions) = match version {
            Version::Gpt1 => ("tokens_embed", "positions_embed"),
            Version::Gpt2 => ("wte", "wpe"),
        };
        let w = checkpoint.root(&["transformer.", ""], &format!("{tokens}.weight"));
        let tokens = w.embedding(tokens, config.vocab_size, d)?;
        let positions = w.embedding(positions, config.n_positions, d)?;
        let layers = w.at("h").layers(config.n_layer, |i, w| layer(&w, version, &config, act, i))?;
        let norm = match version {
            Version::Gpt1 => None,
            Version::Gpt2 => Some(w.at("ln_f").layer_norm(d, eps)?),
        };
        let head = match config.tie_word_embeddings {
            true => tokens.as_linear(None)?,
            false => Weights::new(checkpoint, "lm_head").linear_without_bias(d, config.vocab_size)?,
        };
        Ok(Gpt { config, tokens, positions, decoder: Stack::new(layers)?, norm, head })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Empty caches for sequences of up to `capacity` tokens.
    pub fn caches(&self, sequences: usize, capacity: usize) -> Result<Vec<KvCache>> {
        let heads = Heads::new(self.config.n_head, self.config.n_embd / self.config.n_head)?;
        let cache = |_| KvCache::new(&heads, sequences, capacity).map_err(Error::from);
        (0..self.config.n_layer).map(cache).collect()
    }

    /// The last hidden state of every token, [T, n_embd]. With [`caches`](Gpt::caches), which grow by these tokens, they
    /// see those of earlier calls; without (an empty slice), only one another.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        batch: Batch<'_>,
        caches: &mut [KvCache],
        scratch: &mut Scratch,
    ) -> Result<Vec<f32>> {
        let mut x = sum([(&self.tokens, batch.ids), (&self.positions, batch.positions)])?;
        let graph = Graph::causal();
        let mut inputs = Inputs { caches, ..Inputs::new(batch.offsets, &graph) };
        scratch.run_with(ctx, &self.decoder, &mut x, &mut inputs)?;
        if let Some(norm) = &self.norm {
            normalize(ctx, norm, MatMut::contiguous(&mut x, batch.ids.len(), self.config.n_embd)?)?;
        }
        Ok(x)
    }

    /// The logits of the next token, [T, vocab_size], for any rows of the last hidden state.
    pub fn logits(&self, ctx: Context<'_>, hidden: &[f32]) -> Result<Vec<f32>> {
        project(ctx, &self.head, hidden, &Epilogue::NONE)
    }
}

fn layer(w: &Weights<'_>, version: Version, config: &Config, act: Activation, index: usize) -> Result<Layer> {
    let (d, n_heads) = (config.n_embd, config.n_head);
    let mut heads = Heads::new(n_heads, d / n_heads)?;
    if !config.scale_attn_weights {
        heads = heads.with_scale(1.0);
    }
    if config.scale_attn_by_inverse_layer_idx {
        heads = heads.with_scale(heads.scale / (index + 1) as f32);
    }
    let placement = match version {
        Version::Gpt1 => Placement::post,
        Version::Gpt2 => Placement::pre,
    };
    let norm = |name| w.at(name).layer_norm(d, config.layer_norm_epsilon).map(placement);

    let qkv = |i| w.at("attn.c_attn").conv1d(d, 3 * d, i * d..(i + 1) * d);
    let qkv = QkvProjection::new(qkv(0)?, qkv(1)?, qkv(2)?, heads)?;
    let attention = SelfAttention::new(qkv, w.at("attn.c_proj").conv1d(d, d, 0..d)?)?;
    let d_ff = config.n_inner.unwrap_or(4 * d);
    let w1 = w.at("mlp.c_fc").conv1d(d, d_ff, 0..d_ff)?;
    let ffn = Ffn::new(w1, act, w.at("mlp.c_proj").conv1d(d_ff, d, 0..d)?)?;
    Ok(Layer::new(vec![
        SubLayer::self_attention(attention, norm("ln_1")?)?,
        SubLayer::ffn(ffn, norm("ln_2")?)?,
    ])?)
}
