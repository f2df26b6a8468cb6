//! BART (Lewis et al. 2019, <https://arxiv.org/abs/1910.13461>): an encoder and a decoder with learned positions, a norm
//! behind the embeddings, post-norm layers, and one table for both embeddings and the logits.

use std::path::Path;

use laneformer::{Activation, Linear};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{activation, heads, only, read};
use crate::embedding::Embeddings;
use crate::encoder::{Attention, LayerSpec, NormPlacement, Part, Transformer};
use crate::{Checkpoint, Result, Weights};

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
    #[serde(deserialize_with = "activation")]
    pub activation_function: Activation,
    pub scale_embedding: bool,
    pub decoder_start_token_id: u32,
}

const SELF_ATTENTION: Part = Part::SelfAttention(Attention::proj("self_attn", "self_attn_layer_norm"));
const CROSS_ATTENTION: Part =
    Part::CrossAttention(Attention::proj("encoder_attn", "encoder_attn_layer_norm"));
const FFN: Part = Part::Ffn(["fc1", "fc2"], "final_layer_norm");

/// The encoder, whose output is the memory that the decoder reads, the decoder, and the head that makes logits of the next token of its
/// hidden states.
#[derive(Debug)]
#[allow(missing_docs, reason = "see above")]
pub struct Bart {
    pub config: Config,
    pub encoder: Transformer,
    pub decoder: Transformer,
    pub head: Linear,
}

impl Bart {
    /// Packs the weights of a checkpoint, with or without `model.` before their names; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Bart> {
        only(path, json, &[("model_type", "bart".into()), ("normalize_before", false.into())])?;
        only(path, json, &[("tie_word_embeddings", true.into())])?;
        let defaults =
            json!({ "activation_function": "gelu", "scale_embedding": false, "decoder_start_token_id": 2 });
        let config: Config = read(path, json, defaults)?;
        let (d, vocab_size, act) = (config.d_model, config.vocab_size, config.activation_function);
        let w = checkpoint.root(&["model.", ""], "shared.weight");
        let shared = w.embedding("shared", vocab_size, d)?;
        let side = |name, parts: &[Part], (field, n_heads, d_ff, n)| {
            let (w, heads) = (w.at(name), heads(path, field, d, n_heads)?);
            let rows = config.max_position_embeddings.saturating_add(POSITION_OFFSET as usize);
            let embeddings = Embeddings {
                scale: if config.scale_embedding { (d as f32).sqrt() } else { 1.0 },
                first_position: POSITION_OFFSET,
                norm: Some(w.at("layernorm_embedding").layer_norm(d, EPS)?),
                ..Embeddings::new(shared.clone(), w.embedding("embed_positions", rows, d)?)
            };
            let spec = LayerSpec::new(heads, d_ff, act, NormPlacement::Post, EPS);
            Ok::<_, crate::Error>(Transformer { embeddings, layers: spec.stack(&w.at("layers"), parts, n)? })
        };
        let n_heads = config.encoder_attention_heads;
        let shape = ("encoder_attention_heads", n_heads, config.encoder_ffn_dim, config.encoder_layers);
        let encoder = side("encoder", &[SELF_ATTENTION, FFN], shape)?;
        let n_heads = config.decoder_attention_heads;
        let shape = ("decoder_attention_heads", n_heads, config.decoder_ffn_dim, config.decoder_layers);
        let decoder = side("decoder", &[SELF_ATTENTION, CROSS_ATTENTION, FFN], shape)?;
        let bias = Weights::new(checkpoint, "");
        let has_bias = bias.has("final_logits_bias");
        let bias = has_bias.then(|| bias.tensor("final_logits_bias", &[1, vocab_size])).transpose()?;
        Ok(Bart { head: shared.as_linear(bias.as_deref())?, config, encoder, decoder })
    }
}
