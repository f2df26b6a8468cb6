//! The encoder of DETR (Carion et al. 2020, <https://arxiv.org/abs/2005.12872>): the pixels of a ResNet's feature map are the
//! tokens of post-norm layers, whose queries and keys, but not values, see where they stand.

use std::collections::HashMap;
use std::f64::consts::TAU;
use std::ops::Range;
use std::path::Path;

use laneformer::{Activation, Graph, Inputs, Linear};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{activation, check, from_value, heads, only, with_defaults};
use crate::conv::Images;
use crate::embedding::Sinusoid;
use crate::encoder::{Attention, LayerSpec, Layers, NormPlacement, Part};
use crate::ragged::Ragged;
use crate::resnet::{self, ResNet};
use crate::run::{project, rows};
use crate::weights::linear;
use crate::{Checkpoint, Result, Run};

/// `config.json` of a DETR directory.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub d_model: usize,
    pub encoder_layers: usize,
    pub encoder_attention_heads: usize,
    pub encoder_ffn_dim: usize,
    #[serde(deserialize_with = "activation")]
    pub activation_function: Activation,
    pub backbone_config: resnet::Config,
}

const LAYER: &[Part] = &[
    Part::SelfAttention(Attention { out: "o_proj", ..Attention::proj("self_attn", "self_attn_layer_norm") }),
    Part::Ffn(["mlp.fc1", "mlp.fc2"], "final_layer_norm"),
];

/// Backbone, projection and encoder.
#[derive(Debug)]
pub struct Detr {
    /// The configuration.
    pub config: Config,
    /// From images to their feature maps.
    pub backbone: ResNet,
    projection: Linear,
    layers: Layers,
}

impl Detr {
    /// Packs the weights of a checkpoint, with or without `model.` before their names; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Detr> {
        only(path, json, &[("position_embedding_type", "sine".into())])?;
        let backbone = with_defaults(json.get("backbone_config"), resnet::defaults());
        let json = with_defaults(Some(json), json!({ "activation_function": "relu" }));
        let config: Config =
            from_value(path, with_defaults(Some(&json!({ "backbone_config": backbone })), json))?;
        let (d, act) = (config.d_model, config.activation_function);
        let expected = "a multiple of 4, for sines and cosines of y and x";
        check(path, "d_model", d, d.is_multiple_of(4), expected)?;
        let heads = heads(path, "encoder_attention_heads", d, config.encoder_attention_heads)?;
        let spec = LayerSpec::new(heads, config.encoder_ffn_dim, act, NormPlacement::Post, 1e-5);
        let w = checkpoint.root(&["", "model."], "input_projection.weight");
        let layers = spec.stack(&w.at("encoder.layers"), LAYER, config.encoder_layers)?;
        let channels = config.backbone_config.hidden_sizes.last().copied().unwrap_or(0);
        let weight = w.at("input_projection").tensor("weight", &[d, channels, 1, 1])?;
        let bias = w.at("input_projection").tensor("bias", &[d])?;
        let projection = linear(&weight, channels, d, Some(&bias))?;
        let backbone = ResNet::load(path, &w.at("backbone.model"), &config.backbone_config)?;
        Ok(Detr { config, backbone, projection, layers })
    }

    /// The last hidden state of every token: the pixels of the feature map that `tokens` lists, at these `positions`, both
    /// [T, d_model].
    pub fn encode(
        &self,
        run: &mut Run<'_>,
        features: &Images,
        tokens: &Ragged,
        positions: &[f32],
    ) -> Result<Vec<f32>> {
        let pixels = tokens.gather(features.pixels(), features.channels)?;
        let mut x = project(run.ctx, &self.projection, &pixels)?;
        let graph = Graph::full();
        let mut inputs = Inputs {
            position_embedding: Some(rows(positions, self.config.d_model)?),
            ..Inputs::new(tokens.offsets(), &graph)
        };
        self.layers.forward(run, &mut x, &mut inputs)?;
        Ok(x)
    }
}

/// Which pixels of a feature map lie in the images, from which of theirs do: the nearest.
pub fn token_mask(
    pixel_mask: &[bool],
    [height, width]: [usize; 2],
    [rows, columns]: [usize; 2],
) -> Vec<bool> {
    let images = pixel_mask.chunks_exact((height * width).max(1));
    let nearest = |mask: &[bool], i: usize| {
        let (y, x) = (i / columns * height / rows, i % columns * width / columns);
        mask.get(y * width + x) == Some(&true)
    };
    images.flat_map(|mask| (0..rows * columns).map(move |i| nearest(mask, i))).collect()
}

/// Sinusoids of where each pixel [B, rows, columns] stands among those of the mask, as a part of a turn: half of the `d` channels
/// for y, half for x.
pub fn sine_positions(mask: &[bool], [rows, columns]: [usize; 2], d: usize) -> Vec<f32> {
    let half = d / 2;
    // Pixels of a row or column share most of them.
    let mut sinusoids: HashMap<[usize; 2], Vec<f32>> = HashMap::new();
    let mut positions = vec![];
    for mask in mask.chunks_exact((rows * columns).max(1)) {
        let count = |pixels: Range<usize>, step| pixels.step_by(step).filter(|&i| mask[i]).count();
        for i in 0..rows * columns {
            let x = i % columns;
            let up_to = [count(x..i + 1, columns), count(i - x..i + 1, 1)];
            let all = [count(x..rows * columns, columns), count(i - x..i - x + columns, 1)];
            for (up_to, all) in up_to.into_iter().zip(all) {
                let sinusoid = sinusoids.entry([up_to, all]).or_insert_with(|| {
                    let place = up_to as f64 / (all as f64 + 1e-6) * TAU;
                    (0..half).map(|c| Sinusoid::Interleaved.at(place, c, half)).collect()
                });
                positions.extend_from_slice(sinusoid);
            }
        }
    }
    positions
}
