//! CLIP (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>): a pre-norm encoder over the patches of an image, a causal
//! one over a text, and their embeddings in one space, where a text is a class and its embedding the classifier's row.

use std::collections::HashMap;
use std::path::Path;

use laneformer::{Activation, Context, Linear, MatMut, Norm, softmax};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{activation, check, epsilon, from_value, heads, only, with_defaults};
use crate::conv::{Conv, Images, Window};
use crate::embedding::{Embedding, Embeddings};
use crate::encoder::{Attention, Decoding, LayerSpec, Layers, NormPlacement, Part, Transformer};
use crate::error::{check_numbers, check_size};
use crate::ragged::offsets;
use crate::run::project;
use crate::weights::{linear, normalize};
use crate::{Batch, Checkpoint, Result, Run, Weights};

const LAYER: &[Part] = &[
    Part::SelfAttention(Attention::proj("self_attn", "layer_norm1")),
    Part::Ffn(["mlp.fc1", "mlp.fc2"], "layer_norm2"),
];

/// `config.json` of a CLIP directory.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub text_config: TextConfig,
    pub vision_config: VisionConfig,
    pub projection_dim: usize,
}

/// The layers of either tower.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct TowerConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    #[serde(deserialize_with = "activation")]
    pub hidden_act: Activation,
    #[serde(deserialize_with = "epsilon")]
    pub layer_norm_eps: f32,
}

/// `text_config`.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct TextConfig {
    #[serde(flatten)]
    pub tower: TowerConfig,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub eos_token_id: u32,
    pub projection_dim: usize,
}

/// `vision_config`.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct VisionConfig {
    #[serde(flatten)]
    pub tower: TowerConfig,
    pub image_size: usize,
    pub patch_size: usize,
    pub num_channels: usize,
}

/// ViT-B/32.
fn text_defaults() -> Value {
    json!({
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "vocab_size": 49408, "max_position_embeddings": 77,
        "eos_token_id": 49407, "projection_dim": 512,
    })
}

/// ViT-B/32.
fn vision_defaults() -> Value {
    json!({
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32, "num_channels": 3,
    })
}

impl Config {
    fn from_json(path: &Path, json: &Value) -> Result<Config> {
        only(path, json, &[("model_type", "clip".into())])?;
        let towers = json!({
            "text_config": with_defaults(json.get("text_config"), text_defaults()),
            "vision_config": with_defaults(json.get("vision_config"), vision_defaults()),
        });
        // As parts of the others they would not say which of their fields is wrong.
        from_value::<HashMap<String, TowerConfig>>(path, &towers)?;
        let all = with_defaults(Some(json), json!({ "projection_dim": 512 }));
        let mut config: Config = from_value(path, with_defaults(Some(&towers), all))?;
        // Beside a vision tower the texts' own field is not used.
        config.text_config.projection_dim = config.projection_dim;
        Ok(config)
    }
}

impl TowerConfig {
    fn layers(&self, path: &Path) -> Result<LayerSpec> {
        let heads = heads(path, "num_attention_heads", self.hidden_size, self.num_attention_heads)?;
        let (d_ff, act, eps) = (self.intermediate_size, self.hidden_act, self.layer_norm_eps);
        Ok(LayerSpec::new(heads, d_ff, act, NormPlacement::Pre, eps))
    }
}

/// Both towers.
#[derive(Debug)]
pub struct Clip {
    /// The configuration.
    pub config: Config,
    patches: Conv,
    class: Vec<f32>,
    places: Embedding,
    pre_norm: Norm,
    layers: Layers,
    post_norm: Norm,
    projection: Linear,
    /// The texts' half.
    pub text: TextEncoder,
    logit_scale: f32,
}

/// The tower of the texts, which also stands alone (`CLIPTextModelWithProjection`).
#[derive(Debug)]
pub struct TextEncoder {
    /// The configuration.
    pub config: TextConfig,
    /// The layers with their embeddings.
    pub decoder: Transformer,
    projection: Linear,
}

impl Clip {
    /// Packs the weights of a checkpoint; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Clip> {
        let config = Config::from_json(path, json)?;
        let VisionConfig { tower, image_size: side, patch_size: size, num_channels } = &config.vision_config;
        let (&size, &side, d) = (size, side, tower.hidden_size);
        check(path, "patch_size", size, (1..=side).contains(&size), format!("1 to the image size {side}"))?;
        let (w, spec) = (Weights::new(checkpoint, ""), tower.layers(path)?);
        let v = w.at("vision_model");
        let embeddings = v.at("embeddings");
        let window = Window { kernel: size, stride: size, padding: 0 };
        let tokens = (side / size).saturating_pow(2).saturating_add(1);
        Ok(Clip {
            patches: Conv::load(&embeddings.at("patch_embedding"), [*num_channels, d], window)?,
            class: embeddings.tensor("class_embedding", &[d])?.into_owned(),
            places: embeddings.embedding("position_embedding", tokens, d)?,
            pre_norm: spec.norm(&v.at("pre_layrnorm"))?,
            layers: spec.stack(&v.at("encoder.layers"), LAYER, tower.num_hidden_layers)?,
            post_norm: spec.norm(&v.at("post_layernorm"))?,
            projection: w.at("visual_projection").linear_without_bias(d, config.projection_dim)?,
            text: TextEncoder::new(path, config.text_config.clone(), checkpoint)?,
            logit_scale: w.tensor("logit_scale", &[])?[0].exp(),
            config,
        })
    }

    /// The last hidden state of every patch behind that of its image's class token, before any norm: [images * tokens, d].
    /// Images are as large as the configuration says.
    pub fn image_states(&self, run: &mut Run<'_>, images: &Images) -> Result<Vec<f32>> {
        let (side, d) = (self.config.vision_config.image_size, self.class.len());
        check_size("image height", side, images.height)?;
        check_size("image width", side, images.width)?;
        let patches = self.patches.forward(run, images, Activation::None, None)?;
        let tokens = self.places.rows();
        let mut x = vec![];
        for patches in patches.pixels().chunks_exact((tokens - 1) * d) {
            let features = self.class.iter().chain(patches);
            let places = (0..tokens as u32).flat_map(|place| self.places.row(place));
            x.extend(features.zip(places).map(|(x, place)| x + place));
        }
        normalize(run.ctx, &self.pre_norm, &mut x)?;
        self.layers.encode(run, &mut x, &offsets(images.batch, tokens))?;
        Ok(x)
    }

    /// The embeddings of images, of length 1, from [`Clip::image_states`]: [images, projection_dim].
    pub fn embed_images(&self, ctx: Context<'_>, states: &[f32]) -> Result<Vec<f32>> {
        let image = self.places.rows() * self.class.len();
        let classes = states.chunks_exact(image).flat_map(|image| &image[..self.class.len()]);
        let mut classes: Vec<_> = classes.copied().collect();
        normalize(ctx, &self.post_norm, &mut classes)?;
        embed(ctx, &self.projection, &classes)
    }

    /// How well each text fits each image, as logits [images, texts].
    pub fn logits_per_image(&self, ctx: Context<'_>, images: &[f32], texts: &[f32]) -> Result<Vec<f32>> {
        let d = self.config.projection_dim;
        let classifier = linear(texts, d, texts.len() / d.max(1), None)?;
        let mut logits = project(ctx, &classifier, images)?;
        logits.iter_mut().for_each(|logit| *logit *= self.logit_scale);
        Ok(logits)
    }

    /// The probability of each text for each image, from [`Clip::logits_per_image`]; [`NotANumber`](crate::Error::NotANumber) where there is none.
    pub fn probabilities(&self, ctx: Context<'_>, mut logits: Vec<f32>, texts: usize) -> Result<Vec<f32>> {
        let images = logits.len() / texts.max(1);
        softmax(ctx, MatMut::contiguous(&mut logits, images, texts)?)?;
        check_numbers("a probability", &logits)?;
        Ok(logits)
    }
}

impl TextEncoder {
    /// Packs the weights of the texts' half of a CLIP, or of a checkpoint that has only that; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<TextEncoder> {
        let is_alone = json.get("model_type").is_some_and(|model_type| model_type == "clip_text_model");
        let config = if is_alone {
            let json = with_defaults(Some(json), text_defaults());
            // As a part of the other it would not say which of its fields is wrong.
            from_value::<TowerConfig>(path, &json)?;
            from_value(path, &json)?
        } else {
            Config::from_json(path, json)?.text_config
        };
        TextEncoder::new(path, config, checkpoint)
    }

    fn new(path: &Path, config: TextConfig, checkpoint: &Checkpoint) -> Result<TextEncoder> {
        let (spec, d) = (config.tower.layers(path)?, config.tower.hidden_size);
        let w = Weights::new(checkpoint, "text_model");
        let words = w.at("embeddings").embedding("token_embedding", config.vocab_size, d)?;
        let n = config.max_position_embeddings;
        let positions = w.at("embeddings").embedding("position_embedding", n, d)?;
        let layers = spec.stack(&w.at("encoder.layers"), LAYER, config.tower.num_hidden_layers)?;
        let layers = layers.with_norm(Some(spec.norm(&w.at("final_layer_norm"))?));
        let projection = Weights::new(checkpoint, "text_projection");
        let projection = projection.linear_without_bias(d, config.projection_dim)?;
        let decoder = Transformer { embeddings: Embeddings::new(words, positions), layers };
        Ok(TextEncoder { config, decoder, projection })
    }

    /// The last hidden state of every token of texts, normed: [tokens, d].
    pub fn states(&self, run: &mut Run<'_>, texts: Batch<'_>) -> Result<Vec<f32>> {
        self.decoder.decode(run, texts, &mut Decoding::default())
    }

    /// The embeddings of texts, of length 1, from [`TextEncoder::states`]: [texts, projection_dim]. A text without tokens is
    /// the library's [`ZeroDim`](laneformer::Error::ZeroDim).
    pub fn embed(&self, ctx: Context<'_>, texts: Batch<'_>, states: &[f32]) -> Result<Vec<f32>> {
        let (eos, d) = (self.config.eos_token_id, self.projection.in_features());
        let mut pooled = vec![];
        for ends in texts.offsets.windows(2) {
            let ids = texts.ids.get(ends[0]..ends[1]).unwrap_or(&[]);
            // The first checkpoints say 2, but end texts with the largest id of the vocabulary.
            let end = if eos == 2 { ids.iter().max() } else { Some(&eos) };
            let at = ends[0] + ids.iter().position(|id| Some(id) == end).unwrap_or(0);
            let row = states.chunks_exact(d).nth(at).filter(|_| !ids.is_empty());
            pooled.extend(row.ok_or(laneformer::Error::ZeroDim { arg: "tokens of a text" })?);
        }
        embed(ctx, &self.projection, &pooled)
    }
}

/// From pooled states to the common space, on its unit sphere.
fn embed(ctx: Context<'_>, projection: &Linear, pooled: &[f32]) -> Result<Vec<f32>> {
    let mut x = project(ctx, projection, pooled)?;
    for row in x.chunks_exact_mut(projection.out_features().max(1)) {
        let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    Ok(x)
}
