//! The audio-visual question answering model of Pano-AVQA (Yun et al. 2021, <https://arxiv.org/abs/2110.05122>), after LXMERT:
//! a stream of BERT layers each for language, audio and video; then layers in which language reads audio, audio reads
//! video and video reads language, before each goes on by itself; and an answer from the first token of all three.

use std::path::Path;

use laneformer::{Activation, Context, Epilogue, Graph, Inputs, Layer, Linear, Norm, Stack};
use serde::Deserialize;

use crate::attend::project;
use crate::bert::{self, Bert};
use crate::checkpoint::Checkpoint;
use crate::config::activation;
use crate::encoder::sources;
use crate::ragged::Scratch;
use crate::weights::{Weights, normalize_rows};
use crate::{Error, Result};

/// The configuration; BERT's is that of the language stream.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Config {
    #[serde(flatten)]
    pub bert: bert::Config,
    pub a_layers: usize,
    pub v_layers: usize,
    pub x_layers: usize,
    pub audio_encoder: String,
    pub audio_feat_dim: usize,
    pub visual_feat_dim: usize,
    pub visual_coord_dim: usize,
    pub num_answers: usize,
}

/// Packed tokens of a batch, each stream with its own offsets.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The question.
    pub language: bert::Batch<'a>,
    /// What the audio encoder reads: the features of each channel, and with an `_st` encoder the coordinates.
    pub audio: &'a [&'a [f32]],
    /// Where the audio of each sequence begins, and the end.
    pub audio_offsets: &'a [usize],
    /// The features and the coordinates of the objects.
    pub video: [&'a [f32]; 2],
    /// Where the objects of each sequence begin, and the end.
    pub video_offsets: &'a [usize],
}

impl<'a> Batch<'a> {
    /// The offsets of language, audio and video.
    pub fn offsets(&self) -> [&'a [usize]; 3] {
        [self.language.offsets, self.audio_offsets, self.video_offsets]
    }
}

/// The three streams and the head. Where there are three of something, they stand in the order language, audio, video.
#[derive(Debug)]
pub struct Lavit {
    config: Config,
    language: Bert,
    audio: (Features, Option<Stack>),
    video: (Features, Option<Stack>),
    cross: Vec<[Stack; 3]>,
    poolers: [Linear; 3],
    head: (Linear, Norm, Linear),
}

impl Lavit {
    /// Packs the weights of a checkpoint; `path` is for messages.
    pub fn load(path: &Path, config: Config, checkpoint: &Checkpoint) -> Result<Lavit> {
        config.bert.check(path)?;
        let (d, eps) = (config.bert.hidden_size, config.bert.layer_norm_eps);
        let act = activation(path, "hidden_act", &config.bert.hidden_act)?;
        let w = Weights::new(checkpoint, "bert");
        let encoder = w.at("encoder");
        let features = |name, parts: &[_]| Features::load(&encoder.at(name), parts, d, eps);
        let stack =
            |name, n| (n > 0).then(|| bert::stack(&encoder.at(name), n, &config.bert, act)).transpose();
        let cross = |_, w: Weights<'_>| {
            let stream = |reads: &str, name: &str| {
                let at = |part| w.at(format_args!("{name}_{part}"));
                Ok::<_, Error>(Stack::new(vec![Layer::new(vec![
                    bert::cross_attention(&w.at(reads), &config.bert)?,
                    bert::attention(&at("self_att"), &config.bert)?,
                    bert::ffn(&at("inter"), &at("output"), &config.bert, act)?,
                ])?])?)
            };
            Ok([stream("la_attention", "l")?, stream("av_attention", "a")?, stream("vl_attention", "v")?])
        };
        let pooler = |name| w.at(name).at("dense").linear(d, d);
        let visual = [
            ("feature_fc", "feature_ln", config.visual_feat_dim),
            ("coord_fc", "coord_in", config.visual_coord_dim),
        ];
        let head = Weights::new(checkpoint, "answer_head.logit_fc");
        Ok(Lavit {
            language: Bert::load(path, config.bert.clone(), checkpoint)?,
            audio: (features("a_fc", &audio_parts(path, &config)?)?, stack("a_layers", config.a_layers)?),
            video: (features("v_fc", &visual)?, stack("v_layers", config.v_layers)?),
            cross: encoder.at("x_layers").layers(config.x_layers, cross)?,
            poolers: [pooler("pooler")?, pooler("a_pooler")?, pooler("v_pooler")?],
            head: (
                head.at(0).linear(3 * d, 6 * d)?,
                head.at(2).layer_norm(6 * d, eps)?,
                head.at(3).linear(6 * d, config.num_answers)?,
            ),
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The last hidden states of language, audio and video.
    pub fn forward(&self, ctx: Context<'_>, batch: &Batch<'_>) -> Result<[Vec<f32>; 3]> {
        let (mut scratch, full) = (Scratch::default(), Graph::full());
        let l = self.language.forward(ctx, batch.language, &mut scratch)?;
        let mut stream = |(features, layers): &(Features, Option<Stack>), inputs: &[&[f32]], offsets| {
            let mut x = features.forward(ctx, inputs)?;
            layers.as_ref().map_or(Ok(()), |layers| scratch.run(ctx, layers, &mut x, offsets, &full))?;
            Ok::<_, Error>(x)
        };
        let a = stream(&self.audio, batch.audio, batch.audio_offsets)?;
        let v = stream(&self.video, &batch.video, batch.video_offsets)?;

        let (mut states, offsets, mut scratch) = ([l, a, v], batch.offsets(), Scratch::default());
        for layers in &self.cross {
            // Every stream reads the next one as it was before this layer.
            let keys = |i: usize| sources(ctx, &layers[i], &states[(i + 1) % 3], offsets[(i + 1) % 3]);
            let keys = [keys(0)?, keys(1)?, keys(2)?];
            for (i, state) in states.iter_mut().enumerate() {
                let mut inputs = Inputs { sources: &keys[i], ..Inputs::new(offsets[i], &full) };
                scratch.run_with(ctx, &layers[i], state, &mut inputs)?;
            }
        }
        Ok(states)
    }

    /// The logits of the answers, [sequences, num_answers].
    ///
    /// # Errors
    /// What the library says of the sizes, and its [`ZeroDim`](laneformer::Error::ZeroDim) for a sequence without tokens.
    pub fn answer_logits(
        &self,
        ctx: Context<'_>,
        states: &[Vec<f32>; 3],
        offsets: [&[usize]; 3],
    ) -> Result<Vec<f32>> {
        let d = self.config.bert.hidden_size;
        let pool = |i: usize| bert::pool(ctx, &self.poolers[i], &states[i], offsets[i]);
        let (l, a, v) = (pool(0)?, pool(1)?, pool(2)?);
        let rows = l.chunks_exact(d).zip(a.chunks_exact(d)).zip(v.chunks_exact(d));
        let pooled: Vec<_> = rows.flat_map(|((l, a), v)| [l, a, v]).flatten().copied().collect();
        let (inner, norm, outer) = &self.head;
        let mut x = project(ctx, inner, &pooled, &Epilogue::activation(Activation::GeluErf))?;
        normalize_rows(ctx, norm, &mut x)?;
        project(ctx, outer, &x, &Epilogue::NONE)
    }
}

/// The layers, norms and widths of the audio encoder.
fn audio_parts(path: &Path, config: &Config) -> Result<Vec<(&'static str, &'static str, usize)>> {
    let name = config.audio_encoder.as_str();
    let (channels, coordinates) = match name.strip_suffix("_st") {
        Some(channels) => (channels, Some(("cord_fc", "cord_ln", 3))),
        None => (name, None),
    };
    let n = config.audio_feat_dim;
    let mut parts = match channels {
        "mono" => vec![("feat_fc", "feat_ln", n)],
        "stereo" => vec![("left_fc", "left_ln", n), ("righ_fc", "righ_ln", n)],
        _ => {
            return Err(Error::config(path, "audio_encoder", "mono, stereo, mono_st or stereo_st", name));
        }
    };
    parts.extend(coordinates);
    Ok(parts)
}

/// The mean of LN(linear(x)) over several features of the same tokens.
#[derive(Debug)]
struct Features(Vec<(Linear, Norm)>);

impl Features {
    fn load(w: &Weights<'_>, parts: &[(&str, &str, usize)], d: usize, eps: f32) -> Result<Features> {
        let part = |&(fc, ln, n)| Ok((w.at(fc).linear(n, d)?, w.at(ln).layer_norm(d, eps)?));
        parts.iter().map(part).collect::<Result<_>>().map(Features)
    }

    fn forward(&self, ctx: Context<'_>, features: &[&[f32]]) -> Result<Vec<f32>> {
        let check = |arg, expected, actual| match actual == expected {
            true => Ok(()),
            false => Err(laneformer::Error::Size { arg, expected, actual }),
        };
        check("features of a token", self.0.len(), features.len())?;
        let mut sum: Vec<f32> = vec![];
        for ((linear, norm), x) in self.0.iter().zip(features) {
            let mut y = project(ctx, linear, x, &Epilogue::NONE)?;
            normalize_rows(ctx, norm, &mut y)?;
            sum.resize(if sum.is_empty() { y.len() } else { sum.len() }, 0.0);
            check("features of all tokens", sum.len(), y.len())?;
            sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
        }
        sum.iter_mut().for_each(|sum| *sum /= self.0.len() as f32);
        Ok(sum)
    }
}
