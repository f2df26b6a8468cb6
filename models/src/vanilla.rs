//! The Transformer of "Attention Is All You Need" (Vaswani et al. 2017, <https://arxiv.org/abs/1706.03762>) in PyTorch's
//! `nn.Transformer` form: optional token embeddings with sinusoids, encoder and decoder, optional closing norms.

use std::path::Path;

use laneformer::{Activation, Context, Linear};
use serde::Deserialize;

use crate::config::{activation, epsilon, heads};
use crate::embedding::{Embedding, Sinusoid};
use crate::encoder::{DECODER, ENCODER, LayerSpec, Layers, NormPlacement};
use crate::error::check_size;
use crate::run::project;
use crate::{Checkpoint, Error, Result, Weights};

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
    #[serde(deserialize_with = "activation")]
    pub activation: Activation,
    pub norm_first: bool,
    pub final_norm: bool,
    #[serde(deserialize_with = "epsilon")]
    pub layer_norm_eps: f32,
    #[serde(default)]
    pub vocab_size: usize,
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
    /// Packs the weights; `path` is for messages.
    pub fn load(path: &Path, config: &Config, checkpoint: &Checkpoint) -> Result<Vanilla> {
        let heads = heads(path, "nhead", config.d_model, config.nhead)?;
        let placement = if config.norm_first { NormPlacement::Pre } else { NormPlacement::Post };
        let (d_ff, eps) = (config.dim_feedforward, config.layer_norm_eps);
        let spec = LayerSpec::new(heads, d_ff, config.activation, placement, eps);
        let w = Weights::new(checkpoint, "");
        let stack = |name, parts, n| spec.closed_stack(&w.at(name), parts, n, config.final_norm);
        let n_decoder = Some(config.num_decoder_layers).filter(|&n| n > 0);
        Ok(Vanilla {
            encoder: stack("encoder", ENCODER, config.num_encoder_layers)?,
            decoder: n_decoder.map(|n| stack("decoder", DECODER, n)).transpose()?,
            vocabulary: config.sinusoid.map(|sinusoid| Vocabulary::load(&w, config, sinusoid)).transpose()?,
        })
    }
}

/// Embeddings of source and target, and the logits of the next token.
#[derive(Debug)]
pub struct Vocabulary {
    src: Embedding,
    sinusoid: Sinusoid,
    /// The decoder's embeddings and logits.
    tgt: Option<(Embedding, Linear)>,
}

impl Vocabulary {
    fn load(w: &Weights<'_>, config: &Config, sinusoid: Sinusoid) -> Result<Vocabulary> {
        let (d, n) = (config.d_model, config.vocab_size);
        let tgt = || Ok::<_, Error>((w.embedding("tgt_embed", n, d)?, w.at("generator").linear(d, n)?));
        let tgt = (config.num_decoder_layers > 0).then(tgt).transpose()?;
        Ok(Vocabulary { src: w.embedding("src_embed", n, d)?, sinusoid, tgt })
    }

    /// The input of the encoder: `E[id] sqrt(d) + sinusoid(position)`, `[T, d_model]`.
    pub fn source(&self, ids: &[u32], positions: &[u32]) -> Result<Vec<f32>> {
        self.embed(&self.src, ids, positions)
    }

    /// The input of the decoder, likewise; [`Error::NotBuilt`] for a model without a decoder.
    pub fn target(&self, ids: &[u32], positions: &[u32]) -> Result<Vec<f32>> {
        self.embed(&self.decoder("a target")?.0, ids, positions)
    }

    /// The logits of the next token, [T, vocab_size], for any rows of the decoder's output; [`Error::NotBuilt`] for a model
    /// without a decoder.
    pub fn logits(&self, ctx: Context<'_>, hidden: &[f32]) -> Result<Vec<f32>> {
        project(ctx, &self.decoder("logits")?.1, hidden)
    }

    fn decoder(&self, what: &str) -> Result<&(Embedding, Linear)> {
        self.tgt.as_ref().ok_or_else(|| Error::NotBuilt(format!("{what} without a decoder")))
    }

    fn embed(&self, table: &Embedding, ids: &[u32], positions: &[u32]) -> Result<Vec<f32>> {
        check_size("positions", ids.len(), positions.len())?;
        let d = table.d;
        let mut x = table.gather(ids, (d as f32).sqrt())?;
        for (i, x) in x.iter_mut().enumerate() {
            *x += self.sinusoid.at(positions[i / d], i % d, d);
        }
        Ok(x)
    }
}
