//! The Transformer of "Attention Is All You Need" (Vaswani et al. 2017, <https://arxiv.org/abs/1706.03762>) in PyTorch's
//! `nn.Transformer` form: optional token embeddings with sinusoids, encoder and decoder, optional closing norms.

use std::path::Path;

use laneformer::{Activation, Linear};
use serde::Deserialize;

use crate::config::{activation, epsilon, heads};
use crate::embedding::{Embeddings, Positions, Sinusoid};
use crate::encoder::{DECODER, ENCODER, LayerSpec, Layers, NormPlacement};
use crate::{Checkpoint, Result, Weights};

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
    /// The embeddings of the source, `E[id] sqrt(d) + sinusoid(position)`, if there is a vocabulary.
    pub source: Option<Embeddings>,
    /// Those of the target, and the product that makes logits of the next token, if there is a decoder, too.
    pub target: Option<(Embeddings, Linear)>,
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
        let (d, n) = (config.d_model, config.vocab_size);
        let embeddings = |name, sinusoid| -> Result<_> {
            let (words, scale) = (w.embedding(name, n, d)?, (d as f32).sqrt());
            let positions = Positions::Sinusoid(sinusoid);
            Ok(Embeddings { words, scale, types: None, positions, first_position: 0, norm: None })
        };
        let target = |(sinusoid, _)| -> Result<_> {
            Ok((embeddings("tgt_embed", sinusoid)?, w.at("generator").linear(d, n)?))
        };
        Ok(Vanilla {
            encoder: stack("encoder", ENCODER, config.num_encoder_layers)?,
            decoder: n_decoder.map(|n| stack("decoder", DECODER, n)).transpose()?,
            source: config.sinusoid.map(|sinusoid| embeddings("src_embed", sinusoid)).transpose()?,
            target: config.sinusoid.zip(n_decoder).map(target).transpose()?,
        })
    }
}
