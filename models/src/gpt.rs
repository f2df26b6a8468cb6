//! GPT (Radford et al. 2018) and GPT-2 (Radford et al. 2019): token and position embeddings, causal layers with the tanh
//! form of GELU, and logits by the token embeddings. GPT norms after each sub-layer, GPT-2 before, with one more at the end.

use std::path::Path;

use laneformer::{Activation, Linear};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{activation, epsilon, heads, only, read};
use crate::embedding::Embeddings;
use crate::encoder::{Attention, LayerSpec, NormPlacement, Part, Qkv, Transformer};
use crate::{Checkpoint, Result, Weights};

/// `config.json` of a GPT or GPT-2 directory.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub n_inner: Option<usize>,
    #[serde(alias = "afn", deserialize_with = "activation")]
    pub activation_function: Activation,
    #[serde(deserialize_with = "epsilon")]
    pub layer_norm_epsilon: f32,
    pub scale_attn_weights: bool,
    pub scale_attn_by_inverse_layer_idx: bool,
    pub tie_word_embeddings: bool,
}

const LAYER: &[Part] = &[
    Part::SelfAttention(Attention {
        at: "attn",
        qkv: Qkv::Joined(["c_attn.weight", "c_attn.bias"]),
        out: "c_proj",
        norm: "ln_1",
    }),
    Part::Ffn(["mlp.c_fc", "mlp.c_proj"], "ln_2"),
];

/// The decoder, and the head that makes logits of the next token of its hidden states.
#[derive(Debug)]
#[allow(missing_docs, reason = "see above")]
pub struct Gpt {
    pub config: Config,
    pub decoder: Transformer,
    pub head: Linear,
}

impl Gpt {
    /// Packs the weights of a checkpoint, with or without `transformer.` before their names; `path` is for messages. The
    /// `model_type` tells the versions apart; none is GPT-2.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Gpt> {
        let is_first = json.get("model_type").is_some_and(|model_type| model_type == "openai-gpt");
        let (model_type, tables, placement) = if is_first {
            ("openai-gpt", ["tokens_embed", "positions_embed"], NormPlacement::Post)
        } else {
            ("gpt2", ["wte", "wpe"], NormPlacement::Pre)
        };
        only(path, json, &[("model_type", model_type.into()), ("add_cross_attention", false.into())])?;
        // Beside the alias, a default would be the same field twice.
        let field = if json.get("afn").is_some() { "afn" } else { "activation_function" };
        let defaults = json!({
            field: "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": true,
            "scale_attn_by_inverse_layer_idx": false, "tie_word_embeddings": true,
        });
        let config: Config = read(path, json, defaults)?;
        let (d, eps) = (config.n_embd, config.layer_norm_epsilon);
        let mut heads = heads(path, "n_head", d, config.n_head)?;
        let act = match config.activation_function {
            // GPT calls the tanh form `gelu`.
            Activation::GeluErf if is_first => Activation::GeluTanh,
            other => other,
        };
        let w = checkpoint.root(&["transformer.", ""], &format!("{}.weight", tables[0]));
        let words = w.embedding(tables[0], config.vocab_size, d)?;
        let positions = w.embedding(tables[1], config.n_positions, d)?;
        if !config.scale_attn_weights {
            heads = heads.with_scale(1.0);
        }
        let spec = LayerSpec::new(heads, config.n_inner.unwrap_or(d.saturating_mul(4)), act, placement, eps);
        let layers = w.at("h").in_out().layers(config.n_layer, |i, w| {
            let part = if config.scale_attn_by_inverse_layer_idx { (i + 1) as f32 } else { 1.0 };
            LayerSpec { heads: heads.with_scale(heads.scale / part), ..spec }.layer(&w, LAYER)
        })?;
        let norm = (!is_first).then(|| spec.norm(&w.at("ln_f"))).transpose()?;
        let head = match config.tie_word_embeddings {
            true => words.as_linear(None)?,
            false => Weights::new(checkpoint, "lm_head").linear_without_bias(d, config.vocab_size)?,
        };
        let (embeddings, layers) = (Embeddings::new(words, positions), spec.layers(layers)?.with_norm(norm));
        Ok(Gpt { config, decoder: Transformer { embeddings, layers }, head })
    }
}
