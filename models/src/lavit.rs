//! The audio-visual question answering model of Pano-AVQA (Yun et al. 2021, <https://arxiv.org/abs/2110.05122>), after LXMERT:
//! a stream of BERT layers each for language, audio and video; then layers in which language reads audio, audio reads
//! video and video reads language, before each goes on by itself; and an answer from the first token of all three.

use std::path::Path;

use laneformer::{Context, Graph, Inputs, Linear, Norm};
use serde::Deserialize;
use serde_json::Value;

use crate::bert::{self, Bert, attention};
use crate::config::from_value;
use crate::encoder::{Layers, Part};
use crate::error::check_size;
use crate::head::{self, Head};
use crate::run::project;
use crate::weights::normalize;
use crate::{Checkpoint, Error, Result, Run, Weights};

/// What the other streams add to the configuration of the language stream, a BERT's.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Config {
    pub a_layers: usize,
    pub v_layers: usize,
    pub x_layers: usize,
    pub audio_encoder: String,
    pub audio_feat_dim: usize,
    pub visual_feat_dim: usize,
    pub visual_coord_dim: usize,
    pub num_answers: usize,
}

/// Packed tokens of a batch, each stream with its own offsets. Features are rows of each kind, one per token.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The question; and of audio and video where their sequences begin and which tokens are real. They have no ids, types or positions.
    pub streams: [crate::Batch<'a>; 3],
    /// What the audio encoder reads: the features of each channel, and with an `_st` encoder the coordinates.
    pub audio: &'a [&'a [f32]],
    /// The features and the coordinates of the objects.
    pub video: &'a [&'a [f32]],
}

/// The streams of a layer of the third stage.
const CROSS: [&[Part]; 3] = [
    &[
        Part::CrossAttention(attention("la_attention", "la_attention.output.LayerNorm")),
        Part::SelfAttention(attention("l_self_att", "l_self_att.output.LayerNorm")),
        Part::Ffn(["l_inter.dense", "l_output.dense"], "l_output.LayerNorm"),
    ],
    &[
        Part::CrossAttention(attention("av_attention", "av_attention.output.LayerNorm")),
        Part::SelfAttention(attention("a_self_att", "a_self_att.output.LayerNorm")),
        Part::Ffn(["a_inter.dense", "a_output.dense"], "a_output.LayerNorm"),
    ],
    &[
        Part::CrossAttention(attention("vl_attention", "vl_attention.output.LayerNorm")),
        Part::SelfAttention(attention("v_self_att", "v_self_att.output.LayerNorm")),
        Part::Ffn(["v_inter.dense", "v_output.dense"], "v_output.LayerNorm"),
    ],
];

/// The three streams and the head. Where there are three of something, they stand in the order language, audio, video.
#[derive(Debug)]
pub struct Lavit {
    /// The configuration.
    pub config: Config,
    /// The language stream.
    pub language: Bert,
    audio: Stream,
    video: Stream,
    cross: Vec<[Layers; 3]>,
    poolers: [Linear; 3],
    head: Head,
}

impl Lavit {
    /// Packs the weights of a checkpoint; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Lavit> {
        let (bert, config): (_, Config) = (bert::Config::part(path, json)?, from_value(path, json)?);
        let (spec, d) = (bert.layers(path)?, bert.hidden_size);
        let w = Weights::new(checkpoint, "bert");
        let encoder = w.at("encoder");
        let stream = |features, parts: &[_], layers, n: usize| {
            let w = encoder.at(features);
            let part = |&(linear, norm, n)| Ok((w.at(linear).linear(n, d)?, spec.norm(&w.at(norm))?));
            let layers = || spec.stack(&encoder.at(layers), bert::LAYER, n);
            Ok::<_, Error>(Stream {
                features: parts.iter().map(part).collect::<Result<_>>()?,
                layers: (n > 0).then(layers).transpose()?,
            })
        };
        let visual = [
            ("feature_fc", "feature_ln", config.visual_feat_dim),
            ("coord_fc", "coord_in", config.visual_coord_dim),
        ];
        let cross = |_, w: Weights<'_>| {
            let [l, a, v] = CROSS.map(|parts| spec.single(&w, parts));
            Ok([l?, a?, v?])
        };
        let [l, a, v] = ["pooler", "a_pooler", "v_pooler"].map(|name| w.at(name).at("dense").linear(d, d));
        let head = Weights::new(checkpoint, "answer_head.logit_fc");
        Ok(Lavit {
            language: Bert::new(path, bert, checkpoint)?,
            audio: stream("a_fc", &audio_features(path, &config)?, "a_layers", config.a_layers)?,
            video: stream("v_fc", &visual, "v_layers", config.v_layers)?,
            cross: encoder.at("x_layers").layers(config.x_layers, cross)?,
            poolers: [l?, a?, v?],
            head: Head {
                dense: head.at(0).linear(3 * d, 6 * d)?,
                norm: head.at(2).layer_norm(6 * d, spec.eps)?,
                out: head.at(3).linear(6 * d, config.num_answers)?,
            },
            config,
        })
    }

    /// The last hidden states of language, audio and video.
    pub fn forward(&self, run: &mut Run<'_>, batch: &Batch<'_>) -> Result<[Vec<f32>; 3]> {
        let [l, a, v] = batch.streams;
        let offsets = [l.offsets, a.offsets, v.offsets];
        let graphs = [l.real(Graph::full())?, a.real(Graph::full())?, v.real(Graph::full())?];
        let l = self.language.forward(run, l)?;
        let a = self.audio.forward(run, batch.audio, &mut Inputs::new(offsets[1], &graphs[1]))?;
        let v = self.video.forward(run, batch.video, &mut Inputs::new(offsets[2], &graphs[2]))?;

        let mut states = [l, a, v];
        for layers in &self.cross {
            // Every stream reads the next one as it was before this layer.
            let mut keys = |i: usize| layers[i].sources(run, &states[(i + 1) % 3], offsets[(i + 1) % 3]);
            let keys = [keys(0)?, keys(1)?, keys(2)?];
            for (i, state) in states.iter_mut().enumerate() {
                let (sources, source_graph) = (&keys[i][..], &graphs[(i + 1) % 3]);
                let mut inputs = Inputs { sources, source_graph, ..Inputs::new(offsets[i], &graphs[i]) };
                layers[i].forward(run, state, &mut inputs)?;
            }
            run.scratch.give_stores(keys.into_iter().flatten());
        }
        Ok(states)
    }

    /// The logits of the answers, [sequences, num_answers]; see [`head::pool`] for a sequence without tokens.
    pub fn answer_logits(
        &self,
        ctx: Context<'_>,
        batch: &Batch<'_>,
        states: &[Vec<f32>; 3],
    ) -> Result<Vec<f32>> {
        let d = self.language.config.hidden_size;
        let pool = |i: usize| head::pool(ctx, &self.poolers[i], &states[i], batch.streams[i].offsets);
        let (l, a, v) = (pool(0)?, pool(1)?, pool(2)?);
        check_size("sequences of audio", l.len() / d, a.len() / d)?;
        check_size("sequences of video", l.len() / d, v.len() / d)?;
        let rows = l.chunks_exact(d).zip(a.chunks_exact(d)).zip(v.chunks_exact(d));
        let pooled: Vec<_> = rows.flat_map(|((l, a), v)| [l, a, v]).flatten().copied().collect();
        self.head.forward(ctx, &pooled)
    }
}

/// The layers, norms and widths of the audio encoder.
fn audio_features(path: &Path, config: &Config) -> Result<Vec<(&'static str, &'static str, usize)>> {
    let name = config.audio_encoder.as_str();
    let n = config.audio_feat_dim;
    let mut features = match name.strip_suffix("_st").unwrap_or(name) {
        "mono" => vec![("feat_fc", "feat_ln", n)],
        "stereo" => vec![("left_fc", "left_ln", n), ("righ_fc", "righ_ln", n)],
        _ => return Err(Error::config(path, "audio_encoder", "mono, stereo, mono_st or stereo_st", name)),
    };
    if name.ends_with("_st") {
        features.push(("cord_fc", "cord_ln", 3));
    }
    Ok(features)
}

/// Layers over the mean of LN(linear(x)) of several features of the same tokens.
#[derive(Debug)]
struct Stream {
    features: Vec<(Linear, Norm)>,
    layers: Option<Layers>,
}

impl Stream {
    fn forward(&self, run: &mut Run<'_>, features: &[&[f32]], inputs: &mut Inputs<'_>) -> Result<Vec<f32>> {
        check_size("features of a token", self.features.len(), features.len())?;
        let mut sum: Option<Vec<f32>> = None;
        for ((linear, norm), x) in self.features.iter().zip(features) {
            let mut y = project(run.ctx, linear, x)?;
            normalize(run.ctx, norm, &mut y)?;
            let sum = sum.get_or_insert_with(|| vec![0.0; y.len()]);
            check_size("features of all tokens", sum.len(), y.len())?;
            sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
        }
        let mut mean = sum.unwrap_or_default();
        mean.iter_mut().for_each(|sum| *sum /= self.features.len() as f32);
        if let Some(layers) = &self.layers {
            layers.forward(run, &mut mean, inputs)?;
        }
        Ok(mean)
    }
}
