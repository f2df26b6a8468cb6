//! Two streams of tokens, say of a picture and of a text, and the ways to fuse them in Transformer layers: the variants of
//! the survey by Xu, Zhu and Clifton (<https://arxiv.org/abs/2206.06488>), and bottleneck tokens (Nagrani et al. 2021,
//! MBT, <https://arxiv.org/abs/2107.00135>).

use std::path::Path;

use laneformer::{Context, Graph, Inputs, Norm};
use serde::Deserialize;

use crate::attend::offsets;
use crate::checkpoint::Checkpoint;
use crate::embedding::Embedding;
use crate::encoder::{self, Attention, ENCODER, LayerSpec, Layers, NormPlacement, Part};
use crate::error::check_size;
use crate::ragged::Scratch;
use crate::weights::{Weights, normalize};
use crate::{Error, Result};

/// Which variant, and what its layers are made of.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Config {
    pub fusion: String,
    #[serde(flatten)]
    pub layers: encoder::Config,
    pub alpha: Option<f32>,
    pub beta: Option<f32>,
    #[serde(default)]
    pub fusion_layer: usize,
    #[serde(default)]
    pub num_bottlenecks: usize,
}

/// Packed tokens, [T, d_model]; sequence `i` is tokens `offsets[i]..offsets[i + 1]`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "see above")]
pub struct Stream {
    pub x: Vec<f32>,
    pub offsets: Vec<usize>,
}

/// A fusion of two streams; C(a, b) is their concatenation, sequence by sequence.
#[derive(Debug)]
pub struct Fusion {
    variant: Variant,
    d_model: usize,
}

#[derive(Debug)]
enum Variant {
    /// a = tf(alpha a + beta b)
    EarlySum { tf: Layers, alpha: f32, beta: f32 },
    /// a, b = tf(C(a + m[0], b + m[1]))
    EarlyConcat { tf: Layers, modality: Embedding },
    /// a, b = tf(C(tf_a(a), tf_b(b)))
    MultiToOne { tf_a: Layers, tf_b: Layers, tf: Layers },
    /// a, b = tf(C(a, b)), then tf_a(a), tf_b(b)
    OneToMulti { tf: Layers, tf_a: Layers, tf_b: Layers },
    /// Layer by layer a = cross_a(a, b), b = cross_b(b, a), both from the old states; then perhaps tf(C(a, b)).
    Cross { layers: Vec<[Cross; 2]>, tf: Option<Layers> },
    /// From a layer on, either stream runs with bottleneck tokens, which become the mean of what both made of them.
    Bottleneck { layers: Vec<[Layers; 2]>, first: usize, tokens: Vec<f32>, norm: Norm },
}

/// A layer whose queries are of one stream, and keys and values of the other.
#[derive(Debug)]
struct Cross {
    layer: Layers,
    norm_kv: Option<Norm>,
}

const CROSS: &[Part] = &[
    Part::CrossAttention(Attention::proj("cross_attn", "norm1")),
    Part::Ffn(["linear1", "linear2"], "norm2"),
];

impl Fusion {
    /// Packs the weights; `path` is for messages.
    pub fn load(path: &Path, config: &Config, checkpoint: &Checkpoint) -> Result<Fusion> {
        let (spec, n, d) = (config.layers.layers(path)?, config.layers.num_layers, config.layers.d_model);
        let w = Weights::new(checkpoint, "");
        let is_pre = spec.placement == NormPlacement::Pre;
        let tf = |name| {
            let w = w.at(name);
            let norm = is_pre.then(|| spec.norm(&w.at("norm"))).transpose()?;
            Ok::<_, Error>(spec.stack(&w.at("layers"), ENCODER, n)?.with_norm(norm))
        };
        let cross = |name| w.at(name).at("layers").layers(n, |_, w| Cross::load(&w, &spec, is_pre));
        let both = || Ok::<_, Error>(pairs(cross("cross_a")?, cross("cross_b")?));
        let with_bottleneck = |name| w.at(name).at("layers").layers(n, |_, w| spec.single(&w, ENCODER));
        let variant = match config.fusion.as_str() {
            "early_sum" => Variant::EarlySum {
                tf: tf("tf")?,
                alpha: config.alpha.unwrap_or(1.0),
                beta: config.beta.unwrap_or(1.0),
            },
            "early_concat" => {
                Variant::EarlyConcat { tf: tf("tf")?, modality: w.embedding("modality_embeddings", 2, d)? }
            }
            "hier_multi_to_one" => {
                Variant::MultiToOne { tf_a: tf("tf_a")?, tf_b: tf("tf_b")?, tf: tf("tf")? }
            }
            "hier_one_to_multi" => {
                Variant::OneToMulti { tf: tf("tf")?, tf_a: tf("tf_a")?, tf_b: tf("tf_b")? }
            }
            "cross" => Variant::Cross { layers: both()?, tf: None },
            "cross_concat" => Variant::Cross { layers: both()?, tf: Some(tf("tf")?) },
            "mbt" => Variant::Bottleneck {
                layers: pairs(with_bottleneck("encoder_a")?, with_bottleneck("encoder_b")?),
                first: config.fusion_layer,
                tokens: w.tensor("bottleneck", &[1, config.num_bottlenecks, d])?.into_owned(),
                norm: spec.norm(&w.at("encoder_norm"))?,
            },
            other => {
                let known = "early_sum, early_concat, hier_multi_to_one, hier_one_to_multi, cross, cross_concat or mbt";
                return Err(Error::config(path, "fusion", known, other));
            }
        };
        Ok(Fusion { variant, d_model: d })
    }

    /// Runs over two streams of as many sequences, in place. Summation makes `a` the fused stream and leaves `b` alone; its
    /// streams have the same lengths. The bottleneck tokens [sequences, n, d_model] are returned where there are any.
    pub fn forward(&self, ctx: Context<'_>, a: &mut Stream, b: &mut Stream) -> Result<Option<Vec<f32>>> {
        let d = self.d_model;
        check_size("sequences of b", a.offsets.len(), b.offsets.len())?;
        for (arg, stream) in [("a", &*a), ("b", &*b)] {
            let elements = stream.offsets.last().map_or(0, |tokens| tokens.saturating_mul(d));
            check_size(arg, elements, stream.x.len())?;
            if let Some(i) = stream.offsets.windows(2).position(|ends| ends[0] > ends[1]) {
                return Err(laneformer::Error::NotAscending { arg: "offsets", at: i + 1 }.into());
            }
        }
        match &self.variant {
            Variant::EarlySum { tf, alpha, beta } => {
                check_size("b", a.x.len(), b.x.len())?;
                a.x.iter_mut().zip(&b.x).for_each(|(a, b)| *a = alpha * *a + beta * b);
                run(ctx, tf, a)?;
            }
            Variant::EarlyConcat { tf, modality } => {
                for (i, stream) in [&mut *a, &mut *b].into_iter().enumerate() {
                    let rows = stream.x.chunks_exact_mut(d);
                    rows.for_each(|row| {
                        row.iter_mut().zip(modality.row(i as u32)).for_each(|(x, m)| *x += m)
                    });
                }
                together(ctx, tf, a, b, d)?;
            }
            Variant::MultiToOne { tf_a, tf_b, tf } => {
                run(ctx, tf_a, a)?;
                run(ctx, tf_b, b)?;
                together(ctx, tf, a, b, d)?;
            }
            Variant::OneToMulti { tf, tf_a, tf_b } => {
                together(ctx, tf, a, b, d)?;
                run(ctx, tf_a, a)?;
                run(ctx, tf_b, b)?;
            }
            Variant::Cross { layers, tf } => {
                for [cross_a, cross_b] in layers {
                    let old_a = a.clone();
                    cross_a.forward(ctx, a, b)?;
                    cross_b.forward(ctx, b, &old_a)?;
                }
                tf.as_ref().map_or(Ok(()), |tf| together(ctx, tf, a, b, d))?;
            }
            Variant::Bottleneck { layers, first, tokens, norm } => {
                let (sequences, n) = (a.offsets.len().saturating_sub(1), tokens.len() / d);
                let mut bottleneck = Stream { x: tokens.repeat(sequences), offsets: offsets(sequences, n) };
                for (i, [layer_a, layer_b]) in layers.iter().enumerate() {
                    if i < *first {
                        run(ctx, layer_a, a)?;
                        run(ctx, layer_b, b)?;
                        continue;
                    }
                    let mut of_b = bottleneck.clone();
                    together(ctx, layer_a, a, &mut bottleneck, d)?;
                    together(ctx, layer_b, b, &mut of_b, d)?;
                    bottleneck.x.iter_mut().zip(&of_b.x).for_each(|(a, b)| *a = 0.5 * (*a + b));
                }
                normalize(ctx, norm, &mut a.x)?;
                normalize(ctx, norm, &mut b.x)?;
                return Ok(Some(bottleneck.x));
            }
        }
        Ok(None)
    }
}

/// The layers of both streams, side by side.
fn pairs<T>(a: Vec<T>, b: Vec<T>) -> Vec<[T; 2]> {
    a.into_iter().zip(b).map(|(a, b)| [a, b]).collect()
}

impl Cross {
    fn load(w: &Weights<'_>, spec: &LayerSpec, is_pre: bool) -> Result<Cross> {
        let norm_kv = is_pre.then(|| spec.norm(&w.at("norm_kv"))).transpose()?;
        Ok(Cross { layer: spec.single(w, CROSS)?, norm_kv })
    }

    fn forward(&self, ctx: Context<'_>, queries: &mut Stream, source: &Stream) -> Result<()> {
        let mut x = source.x.clone();
        if let Some(norm) = &self.norm_kv {
            normalize(ctx, norm, &mut x)?;
        }
        let sources = self.layer.sources(ctx, &x, &source.offsets)?;
        let graph = Graph::full();
        let mut inputs = Inputs { sources: &sources, ..Inputs::new(&queries.offsets, &graph) };
        self.layer.forward(ctx, &mut queries.x, &mut inputs, &mut Scratch::default())
    }
}

fn run(ctx: Context<'_>, layers: &Layers, stream: &mut Stream) -> Result<()> {
    layers.encode(ctx, &mut stream.x, &stream.offsets, &mut Scratch::default())
}

/// Runs over C(a, b) and cuts it into a and b again.
fn together(ctx: Context<'_>, layers: &Layers, a: &mut Stream, b: &mut Stream, d: usize) -> Result<()> {
    let offsets = a.offsets.iter().zip(&b.offsets).map(|(a, b)| a + b).collect();
    let mut both = Stream { x: Vec::with_capacity(a.x.len() + b.x.len()), offsets };
    for (a_ends, b_ends) in a.offsets.windows(2).zip(b.offsets.windows(2)) {
        both.x.extend(&a.x[a_ends[0] * d..a_ends[1] * d]);
        both.x.extend(&b.x[b_ends[0] * d..b_ends[1] * d]);
    }
    run(ctx, layers, &mut both)?;
    let mut rest = &both.x[..];
    for (a_ends, b_ends) in a.offsets.windows(2).zip(b.offsets.windows(2)) {
        for (stream, ends) in [(&mut *a.x, a_ends), (&mut *b.x, b_ends)] {
            let part = &mut stream[ends[0] * d..ends[1] * d];
            let (rows, behind) = rest.split_at(part.len());
            part.copy_from_slice(rows);
            rest = behind;
        }
    }
    Ok(())
}
