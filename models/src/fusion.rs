//! Two streams of tokens, say of a picture and of a text, and the ways to fuse them in Transformer layers: the variants of
//! the survey by Xu, Zhu and Clifton (<https://arxiv.org/abs/2206.06488>), and bottleneck tokens (Nagrani et al. 2021,
//! MBT, <https://arxiv.org/abs/2107.00135>).

use std::path::Path;

use laneformer::{Graph, Inputs, Norm};
use serde::Deserialize;
use serde_json::Value;

use crate::config::from_value;
use crate::embedding::Embedding;
use crate::encoder::{self, Attention, ENCODER, LayerSpec, Layers, NormPlacement, Part};
use crate::error::check_size;
use crate::ragged::offsets;
use crate::weights::normalize;
use crate::{Checkpoint, Error, Result, Run, Weights};

/// Which variant.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Config {
    pub fusion: String,
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

/// A fusion of two streams.
#[derive(Debug)]
pub struct Fusion {
    /// The configuration.
    pub config: Config,
    /// What its layers are made of.
    pub layer_config: encoder::Config,
    steps: Vec<Step>,
    /// The bottleneck tokens that every sequence begins with, where streams meet in such.
    bottleneck: Option<Vec<f32>>,
}

/// What happens to the streams; C(a, b) is their concatenation, sequence by sequence.
#[derive(Debug)]
enum Step {
    /// a = alpha a + beta b
    Sum,
    /// a = a + m[0], b = b + m[1]
    Modality(Embedding),
    /// a = tf(a)
    A(Layers),
    /// b = tf(b)
    B(Layers),
    /// a, b = tf(C(a, b))
    Together(Layers),
    /// a = cross_a(a, b), b = cross_b(b, a), both from the old states
    Cross(Cross, Cross),
    /// Either stream runs with the bottleneck tokens, which become the mean of what both made of them.
    Through(Layers, Layers),
    /// a = norm(a), b = norm(b)
    Norm(Norm),
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
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Fusion> {
        // Their `alpha` is one field: of the norms, or of the sum.
        let (layers, config): (encoder::Config, Config) = (from_value(path, json)?, from_value(path, json)?);
        let (spec, n, d) = (layers.layers(path)?, layers.num_layers, layers.d_model);
        let w = Weights::new(checkpoint, "");
        let is_pre = spec.placement == NormPlacement::Pre;
        let tf = |name| spec.closed_stack(&w.at(name), ENCODER, n, is_pre);
        let cross = |name| w.at(name).at("layers").layers(n, |_, w| Cross::load(&w, &spec, is_pre));
        let mut bottleneck = None;
        let steps = match config.fusion.as_str() {
            "early_sum" => vec![Step::Sum, Step::A(tf("tf")?)],
            "early_concat" => {
                let modality = w.embedding("modality_embeddings", 2, d)?;
                vec![Step::Modality(modality), Step::Together(tf("tf")?)]
            }
            "hier_multi_to_one" => {
                vec![Step::A(tf("tf_a")?), Step::B(tf("tf_b")?), Step::Together(tf("tf")?)]
            }
            "hier_one_to_multi" => {
                vec![Step::Together(tf("tf")?), Step::A(tf("tf_a")?), Step::B(tf("tf_b")?)]
            }
            fusion @ ("cross" | "cross_concat") => {
                let pairs = cross("cross_a")?.into_iter().zip(cross("cross_b")?);
                let mut steps: Vec<_> = pairs.map(|(a, b)| Step::Cross(a, b)).collect();
                if fusion == "cross_concat" {
                    steps.push(Step::Together(tf("tf")?));
                }
                steps
            }
            "mbt" => {
                let layers = |name| w.at(name).at("layers").layers(n, |_, w| spec.single(&w, ENCODER));
                bottleneck = Some(w.tensor("bottleneck", &[1, config.num_bottlenecks, d])?.into_owned());
                let mut steps = vec![];
                for (i, (a, b)) in layers("encoder_a")?.into_iter().zip(layers("encoder_b")?).enumerate() {
                    if i < config.fusion_layer {
                        steps.extend([Step::A(a), Step::B(b)]);
                    } else {
                        steps.push(Step::Through(a, b));
                    }
                }
                steps.push(Step::Norm(spec.norm(&w.at("encoder_norm"))?));
                steps
            }
            other => {
                let known = "early_sum, early_concat, hier_multi_to_one, hier_one_to_multi, cross, cross_concat or mbt";
                return Err(Error::config(path, "fusion", known, other));
            }
        };
        Ok(Fusion { config, layer_config: layers, steps, bottleneck })
    }

    /// Runs over two streams of as many sequences, in place. Summation makes `a` the fused stream and leaves `b` alone; its
    /// streams have the same lengths. The bottleneck tokens [sequences, n, d_model] of `mbt` are returned.
    pub fn forward(&self, run: &mut Run<'_>, a: &mut Stream, b: &mut Stream) -> Result<Option<Vec<f32>>> {
        let d = self.layer_config.d_model;
        check_size("sequences of b", a.offsets.len(), b.offsets.len())?;
        for (arg, stream) in [("a", &*a), ("b", &*b)] {
            let elements = stream.offsets.last().map_or(0, |tokens| tokens.saturating_mul(d));
            check_size(arg, elements, stream.x.len())?;
            if let Some(i) = stream.offsets.windows(2).position(|ends| ends[0] > ends[1]) {
                return Err(laneformer::Error::NotAscending { arg: "offsets", at: i + 1 }.into());
            }
        }
        let n = a.offsets.len().saturating_sub(1);
        let tokens = self.bottleneck.as_deref().unwrap_or(&[]);
        let mut bottleneck = Stream { x: tokens.repeat(n), offsets: offsets(n, tokens.len() / d) };
        for step in &self.steps {
            match step {
                Step::Sum => {
                    let (alpha, beta) = (self.config.alpha.unwrap_or(1.0), self.config.beta.unwrap_or(1.0));
                    check_size("b", a.x.len(), b.x.len())?;
                    a.x.iter_mut().zip(&b.x).for_each(|(a, b)| *a = alpha * *a + beta * b);
                }
                Step::Modality(modality) => {
                    for (i, stream) in [(0, &mut *a), (1, &mut *b)] {
                        let places = modality.row(i).iter().cycle();
                        stream.x.iter_mut().zip(places).for_each(|(x, m)| *x += m);
                    }
                }
                Step::A(tf) => tf.encode(run, &mut a.x, &a.offsets)?,
                Step::B(tf) => tf.encode(run, &mut b.x, &b.offsets)?,
                Step::Together(tf) => together(run, tf, a, b, d)?,
                Step::Cross(cross_a, cross_b) => {
                    let old_a = a.clone();
                    cross_a.forward(run, a, b)?;
                    cross_b.forward(run, b, &old_a)?;
                }
                Step::Through(tf_a, tf_b) => {
                    let mut of_b = bottleneck.clone();
                    together(run, tf_a, a, &mut bottleneck, d)?;
                    together(run, tf_b, b, &mut of_b, d)?;
                    bottleneck.x.iter_mut().zip(&of_b.x).for_each(|(a, b)| *a = 0.5 * (*a + b));
                }
                Step::Norm(norm) => {
                    normalize(run.ctx, norm, &mut a.x)?;
                    normalize(run.ctx, norm, &mut b.x)?;
                }
            }
        }
        Ok(self.bottleneck.is_some().then_some(bottleneck.x))
    }
}

impl Cross {
    fn load(w: &Weights<'_>, spec: &LayerSpec, is_pre: bool) -> Result<Cross> {
        let norm_kv = is_pre.then(|| spec.norm(&w.at("norm_kv"))).transpose()?;
        Ok(Cross { layer: spec.single(w, CROSS)?, norm_kv })
    }

    fn forward(&self, run: &mut Run<'_>, queries: &mut Stream, source: &Stream) -> Result<()> {
        let mut x = source.x.clone();
        if let Some(norm) = &self.norm_kv {
            normalize(run.ctx, norm, &mut x)?;
        }
        let sources = self.layer.sources(run, &x, &source.offsets)?;
        let graph = Graph::full();
        let mut inputs = Inputs { sources: &sources, ..Inputs::new(&queries.offsets, &graph) };
        self.layer.forward(run, &mut queries.x, &mut inputs)?;
        run.scratch.give_stores(sources);
        Ok(())
    }
}

/// Runs over C(a, b) and cuts it into a and b again.
fn together(run: &mut Run<'_>, layers: &Layers, a: &mut Stream, b: &mut Stream, d: usize) -> Result<()> {
    let offsets = a.offsets.iter().zip(&b.offsets).map(|(a, b)| a + b).collect();
    let mut both = Stream { x: Vec::with_capacity(a.x.len() + b.x.len()), offsets };
    for (a_ends, b_ends) in a.offsets.windows(2).zip(b.offsets.windows(2)) {
        both.x.extend(&a.x[a_ends[0] * d..a_ends[1] * d]);
        both.x.extend(&b.x[b_ends[0] * d..b_ends[1] * d]);
    }
    layers.encode(run, &mut both.x, &both.offsets)?;
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
