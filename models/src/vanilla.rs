//! The Transformer of "Attention Is All You Need" (Vaswani et al. 2017, <https://arxiv.org/abs/1706.03762>) in PyTorch's
//! `nn.Transformer` form: optional token embeddings with sinusoids, encoder and decoder, optional closing norms.

use std::path::Path;

use laneformer::{Context, Epilogue, Linear};
use serde::Deserialize;

use crate::attend::project;
use crate::checkpoint::Checkpoint;
use crate::config::{activation, check_heads};
use crate::embedding::{Embedding, Sinusoid};
use crate::encoder::{DECODER, ENCODER, LayerSpec, Layers, NormKind, NormPlacement};
use crate::error::check_size;
use crate::weights::Weights;
use crate::{Error, Result};

/// The arguments of `nn.Transformer`.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of PyTorch")]
pub struct Config {
    pub d_model: usize,
    pub nhead: usize,
    pub dim_feedforward: usize,
    pub num_encoder_layers: usize,
    #[serde(default)]
    pub num_decoder_layers: usize,
    pub activation: String,
    pub norm_first: bool,
    pub final_norm: bool,
    pub layer_norm_eps: f32,
    #[serde(default)]
    pub vocab_size: usize,
    #[serde(default)]
    pub sinusoid: Option<Sinusoid>,
}

/// The two stacks and, if the model has a vocabulary, what stands before and behind them.
#[derive(Debug)]
pub struct Vanilla {
    /// The layers over the source; their output is the memory that the decoder reads.
    pub encoder: Layers,
    /// The layers over the target, if there are any.
    pub decoder: Option<Layers>,
    /// From token ids to the stacks and back.
    pub vocabulary: Option<Vocabulary>,
}

impl Vanilla {
    /// Packs the weights; `config_path` is for messages.
    pub fn load(config_path: &Path, config: &Config, checkpoint: &Checkpoint) -> Result<Vanilla> {
        check_heads(config_path, "nhead", config.d_model, config.nhead)?;
        let spec = LayerSpec {
            d_model: config.d_model,
            n_heads: config.nhead,
            d_ff: config.dim_feedforward,
            activation: activation(config_path, "activation", &config.activation)?,
            norm: NormKind::LayerNorm,
            placement: if config.norm_first { NormPlacement::Pre } else { NormPlacement::Post },
            eps: config.layer_norm_eps,
        };
        let w = Weights::new(checkpoint, "");
        let decoder = |n| spec.stack(&w.at("decoder"), DECODER, n, config.final_norm);
        let n_decoder = Some(config.num_decoder_layers).filter(|&n| n > 0);
        Ok(Vanilla {
            encoder: spec.stack(&w.at("encoder"), ENCODER, config.num_encoder_layers, config.final_norm)?,
            decoder: n_decoder.map(decoder).transpose()?,
            vocabulary: config.sinusoid.map(|sinusoid| Vocabulary::load(&w, config, sinusoid)).transpose()?,
        })
    }
}

/// Embeddings of source and target, and the logits of the next token.
#[derive(Debug)]
pub struct Vocabulary {
    src: Embedding,
    tgt: Option<Embedding>,
    sinusoid: Sinusoid,
    generator: Option<Linear>,
}

impl Vocabulary {
    fn load(w: &Weights<'_>, config: &Config, sinusoid: Sinusoid) -> Result<Vocabulary> {
        let (d, n) = (config.d_model, config.vocab_size);
        let has_decoder = config.num_decoder_layers > 0;
        let tgt = has_decoder.then(|| w.embedding("tgt_embed", n, d)).transpose()?;
        let generator = has_decoder.then(|| w.at("generator").linear(d, n)).transpose()?;
        Ok(Vocabulary { src: w.embedding("src_embed", n, d)?, tgt, sinusoid, generator })
    }

    /// The input of the encoder: `E[id] sqrt(d) + sinusoid(position)`, `[T, d_model]`.
    pub fn source(&self, ids: &[u32], positions: &[u32]) -> Result<Vec<f32>> {
        self.embed(&self.src, ids, positions)
    }

    /// The input of the decoder, likewise.
    ///
    /// # Errors
    /// [`Error::Index`]; [`Error::NotBuilt`] for a model without a decoder.
    pub fn target(&self, ids: &[u32], positions: &[u32]) -> Result<Vec<f32>> {
        let table = self.tgt.as_ref().ok_or_else(|| Error::NotBuilt("a target without a decoder".into()))?;
        self.embed(table, ids, positions)
    }

    /// The logits of the next token, [T, vocab_size], for any rows of the decoder's output.
    ///
    /// # Errors
    /// [`Error::NotBuilt`] for a model without a decoder.
    pub fn logits(&self, ctx: Context<'_>, hidden: &[f32]) -> Result<Vec<f32>> {
        let generator = self.generator.as_ref();
        let generator = generator.ok_or_else(|| Error::NotBuilt("logits without a decoder".into()))?;
        project(ctx, generator, hidden, &Epilogue::NONE)
    }

    fn embed(&self, table: &Embedding, ids: &[u32], positions: &[u32]) -> Result<Vec<f32>> {
        table.check(ids)?;
        check_size("positions", ids.len(), positions.len())?;
        let tokens = ids.iter().zip(positions);
        let row = |(&id, &position)| {
            let row = table.row(id);
            let scale = (row.len() as f32).sqrt();
            let column =
                move |(c, e): (usize, &f32)| e.mul_add(scale, self.sinusoid.at(position, c, row.len()));
            row.iter().enumerate().map(column)
        };
        Ok(tokens.flat_map(row).collect())
    }
}
