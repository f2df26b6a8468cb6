//! CLIP (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>): a pre-norm encoder over the patches of an image, a causal
//! one over a text, and their embeddings in one space, where a text is a class and its embedding the classifier's row.

use std::path::Path;

use laneformer::{Activation, Context, Epilogue, Graph, Inputs, Linear, MatMut, Norm, softmax};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::attend::project;
use crate::checkpoint::Checkpoint;
use crate::config::{activation, check_heads, from_value, read_json};
use crate::conv::{Conv, Images, Window};
use crate::embedding::{Embedding, sum};
use crate::encoder::{LayerSpec, Layers, NormKind, NormPlacement, Part};
use crate::ragged::Scratch;
use crate::weights::{Weights, linear, normalize_rows};
use crate::{Error, Result};

/// The parts of a layer.
const LAYER: &[Part] =
    &[Part::SelfAttention("self_attn", "layer_norm1"), Part::Ffn(["mlp.fc1", "mlp.fc2"], "layer_norm2")];

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
    pub hidden_act: String,
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

impl Config {
    /// From parsed JSON; `path` is for messages. Fields that Hugging Face leaves out of a file are those of ViT-B/32.
    pub fn from_json(path: &Path, json: serde_json::Value) -> Result<Config> {
        if let Some(model_type) = json.get("model_type").filter(|model_type| *model_type != "clip") {
            return Err(Error::config(path, "model_type", "\"clip\"", model_type));
        }
        let towers = json!({
            "text_config": filled(json.get("text_config"), text_defaults()),
            "vision_config": filled(json.get("vision_config"), vision_defaults()),
        });
        let all = filled(Some(&towers), filled(Some(&json), json!({ "projection_dim": 512 })));
        let mut config: Config = from_value(path, all)?;
        // Beside a vision tower the texts' own field is not used.
        config.text_config.projection_dim = config.projection_dim;
        Ok(config)
    }
}

/// A configuration with defaults for what it does not have.
fn filled(config: Option<&Value>, mut defaults: Value) -> Value {
    match (config, &mut defaults) {
        (None | Some(Value::Null), _) => defaults,
        (Some(Value::Object(fields)), Value::Object(all)) => {
            all.extend(fields.clone());
            defaults
        }
        (Some(other), _) => other.clone(),
    }
}

fn text_defaults() -> Value {
    json!({
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "vocab_size": 49408, "max_position_embeddings": 77,
        "eos_token_id": 49407, "projection_dim": 512,
    })
}

fn vision_defaults() -> Value {
    json!({
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32, "num_channels": 3,
    })
}

/// Packed tokens of texts; text `i` is tokens `offsets[i]..offsets[i + 1]`.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "one entry per token each")]
pub struct Texts<'a> {
    pub ids: &'a [u32],
    pub positions: &'a [u32],
    pub offsets: &'a [usize],
}

/// Both towers.
#[derive(Debug)]
pub struct Clip {
    config: Config,
    patches: Conv,
    class: Vec<f32>,
    places: Embedding,
    pre_norm: Norm,
    vision: Tower,
    /// The texts' half.
    pub text: TextEncoder,
    logit_scale: f32,
}

/// The tower of the texts, which also stands alone (`CLIPTextModelWithProjection`).
#[derive(Debug)]
pub struct TextEncoder {
    config: TextConfig,
    words: Embedding,
    positions: Embedding,
    tower: Tower,
}

/// The layers, the norm behind them, and the projection into the common space.
#[derive(Debug)]
struct Tower {
    layers: Layers,
    norm: Norm,
    projection: Linear,
}

impl Clip {
    /// Loads a directory with `config.json` and `model.safetensors`.
    pub fn open(dir: &Path) -> Result<Clip> {
        let path = dir.join("config.json");
        let config = Config::from_json(&path, read_json(&path)?)?;
        Clip::load(&path, config, &Checkpoint::open(&dir.join("model.safetensors"))?)
    }

    /// Packs the weights of a checkpoint; `path` is for messages.
    pub fn load(path: &Path, config: Config, checkpoint: &Checkpoint) -> Result<Clip> {
        let vision = &config.vision_config;
        let (d, size, side) = (vision.tower.hidden_size, vision.patch_size, vision.image_size);
        if size == 0 || side < size {
            return Err(Error::config(path, "patch_size", format!("1 to the image size {side}"), size));
        }
        let w = Weights::new(checkpoint, "");
        let v = w.at("vision_model");
        let window = Window { kernel: size, stride: size, padding: 0 };
        Ok(Clip {
            patches: Conv::load(&v.at("embeddings.patch_embedding"), [vision.num_channels, d], window)?,
            class: v.tensor("embeddings.class_embedding", &[d])?.into_owned(),
            places: v.at("embeddings").embedding(
                "position_embedding",
                (side / size).saturating_pow(2).saturating_add(1),
                d,
            )?,
            pre_norm: v.at("pre_layrnorm").layer_norm(d, vision.tower.layer_norm_eps)?,
            vision: Tower::load(
                path,
                &v,
                &vision.tower,
                "post_layernorm",
                &w.at("visual_projection"),
                config.projection_dim,
            )?,
            text: TextEncoder::load(path, config.text_config.clone(), checkpoint)?,
            logit_scale: w.tensor("logit_scale", &[])?[0].exp(),
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The last hidden state of every patch behind that of its image's class token, before any norm: [images * tokens, d].
    pub fn image_states(&self, ctx: Context<'_>, images: &Images, scratch: &mut Scratch) -> Result<Vec<f32>> {
        let (expected, d) = (self.config.vision_config.image_size, self.class.len());
        for (arg, actual) in [("image height", images.height), ("image width", images.width)] {
            if actual != expected {
                return Err(laneformer::Error::Size { arg, expected, actual }.into());
            }
        }
        let patches = self.patches.forward(ctx, images, Activation::None, None, scratch)?;
        let tokens = self.places.rows();
        let mut x = vec![];
        for patches in patches.pixels.chunks_exact((tokens - 1) * d) {
            let features = self.class.iter().chain(patches);
            let places = (0..tokens as u32).flat_map(|place| self.places.row(place));
            x.extend(features.zip(places).map(|(x, place)| x + place));
        }
        normalize_rows(ctx, &self.pre_norm, &mut x)?;
        let offsets: Vec<_> = (0..=images.batch).map(|image| image * tokens).collect();
        self.vision.layers.forward(ctx, &mut x, &offsets, scratch)?;
        Ok(x)
    }

    /// The embeddings of images, of length 1, from [`Clip::image_states`]: [images, projection_dim].
    pub fn embed_images(&self, ctx: Context<'_>, states: &[f32]) -> Result<Vec<f32>> {
        let image = self.places.rows() * self.class.len();
        let classes = states.chunks_exact(image).flat_map(|image| &image[..self.class.len()]);
        let mut classes: Vec<_> = classes.copied().collect();
        normalize_rows(ctx, &self.vision.norm, &mut classes)?;
        self.vision.embed(ctx, &classes)
    }

    /// How well each text fits each image, as logits [images, texts].
    pub fn logits_per_image(&self, ctx: Context<'_>, images: &[f32], texts: &[f32]) -> Result<Vec<f32>> {
        let d = self.config.projection_dim;
        let classifier = linear(texts, d, texts.len() / d.max(1), None)?;
        let mut logits = project(ctx, &classifier, images, &Epilogue::NONE)?;
        logits.iter_mut().for_each(|logit| *logit *= self.logit_scale);
        Ok(logits)
    }

    /// The probability of each text for each image, from [`Clip::logits_per_image`].
    pub fn probabilities(&self, ctx: Context<'_>, mut logits: Vec<f32>, texts: usize) -> Result<Vec<f32>> {
        let images = logits.len() / texts.max(1);
        softmax(ctx, MatMut::contiguous(&mut logits, images, texts)?)?;
        Ok(logits)
    }
}

impl TextEncoder {
    /// Loads the texts' half of a CLIP directory, or a directory that has only that.
    pub fn open(dir: &Path) -> Result<TextEncoder> {
        let path = dir.join("config.json");
        let json: Value = read_json(&path)?;
        let config = if json.get("model_type").is_some_and(|model_type| model_type == "clip_text_model") {
            from_value(&path, filled(Some(&json), text_defaults()))?
        } else {
            Config::from_json(&path, json)?.text_config
        };
        TextEncoder::load(&path, config, &Checkpoint::open(&dir.join("model.safetensors"))?)
    }

    /// Packs the weights of a checkpoint; `path` is for messages.
    pub fn load(path: &Path, config: TextConfig, checkpoint: &Checkpoint) -> Result<TextEncoder> {
        let (d, d_out) = (config.tower.hidden_size, config.projection_dim);
        let (w, projection) =
            (Weights::new(checkpoint, "text_model"), Weights::new(checkpoint, "text_projection"));
        let embeddings = w.at("embeddings");
        Ok(TextEncoder {
            words: embeddings.embedding("token_embedding", config.vocab_size, d)?,
            positions: embeddings.embedding("position_embedding", config.max_position_embeddings, d)?,
            tower: Tower::load(path, &w, &config.tower, "final_layer_norm", &projection, d_out)?,
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Elements of an embedding.
    pub fn dim(&self) -> usize {
        self.tower.projection.out_features()
    }

    /// Every token is in the embedding table.
    pub fn check(&self, ids: &[u32]) -> Result<()> {
        self.words.check(ids)
    }

    /// The last hidden state of every token of texts, normed: [tokens, d].
    pub fn states(&self, ctx: Context<'_>, texts: Texts<'_>, scratch: &mut Scratch) -> Result<Vec<f32>> {
        let mut x = sum([(&self.words, texts.ids), (&self.positions, texts.positions)])?;
        let graph = Graph::causal();
        self.tower.layers.forward_with(ctx, &mut x, &mut Inputs::new(texts.offsets, &graph), scratch)?;
        normalize_rows(ctx, &self.tower.norm, &mut x)?;
        Ok(x)
    }

    /// The embeddings of texts, of length 1, from [`TextEncoder::states`]: [texts, projection_dim].
    ///
    /// # Errors
    /// What the library says of the sizes, and its [`ZeroDim`](laneformer::Error::ZeroDim) for a text without tokens.
    pub fn embed(&self, ctx: Context<'_>, texts: Texts<'_>, states: &[f32]) -> Result<Vec<f32>> {
        let (eos, d) = (self.config.eos_token_id, self.tower.projection.in_features());
        let mut pooled = vec![];
        for ends in texts.offsets.windows(2) {
            let ids = texts.ids.get(ends[0]..ends[1]).unwrap_or(&[]);
            // The first checkpoints say 2, but end texts with the largest id of the vocabulary.
            let end = if eos == 2 { ids.iter().max() } else { Some(&eos) };
            let at = ends[0] + ids.iter().position(|id| Some(id) == end).unwrap_or(0);
            let row = states.chunks_exact(d).nth(at).filter(|_| !ids.is_empty());
            pooled.extend(row.ok_or(laneformer::Error::ZeroDim { arg: "tokens of a text" })?);
        }
        self.tower.embed(ctx, &pooled)
    }
}

impl Tower {
    fn load(
        path: &Path,
        w: &Weights<'_>,
        config: &TowerConfig,
        norm: &str,
        projection: &Weights<'_>,
        d_out: usize,
    ) -> Result<Tower> {
        let d = config.hidden_size;
        check_heads(path, "num_attention_heads", d, config.num_attention_heads)?;
        let spec = LayerSpec {
            d_model: d,
            n_heads: config.num_attention_heads,
            d_ff: config.intermediate_size,
            activation: activation(path, "hidden_act", &config.hidden_act)?,
            norm: NormKind::LayerNorm,
            placement: NormPlacement::Pre,
            eps: config.layer_norm_eps,
        };
        let layers = spec.stack(&w.at("encoder"), LAYER, config.num_hidden_layers, false)?;
        Ok(Tower {
            layers,
            norm: spec.norm(&w.at(norm))?,
            projection: projection.linear_without_bias(d, d_out)?,
        })
    }

    fn embed(&self, ctx: Context<'_>, pooled: &[f32]) -> Result<Vec<f32>> {
        let mut x = project(ctx, &self.projection, pooled, &Epilogue::NONE)?;
        for row in x.chunks_exact_mut(self.projection.out_features().max(1)) {
            let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
        }
        Ok(x)
    }
}
