//! Systems of the survey at their usual sizes, with random weights: what `bench systems` and `compare` run.

mod cost;
mod models;

use std::path::Path;

use anyhow::Result;
use laneformer_models::Checkpoint;
use serde::Serialize;
use serde_json::{Value, json};

pub use models::Model;

/// Which model, and what of it. The peers' workers know these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Bert,
    /// A text through an empty cache, up to the logits of its last token.
    GptPrefill,
    /// One more token, up to its logits.
    GptDecode,
    Longformer,
    TransformerXl,
    Xlnet,
    /// The tower of the images, up to their embeddings.
    Clip,
    /// The encoder over a feature map and its positions.
    DetrEncoder,
    /// The same from the pixels on.
    Detr,
    /// A text, and the logits of another that is given.
    Bart,
}

/// How much goes in.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Size {
    /// Sequences or images.
    pub batch: usize,
    /// Tokens of each, for which something is computed.
    pub tokens: usize,
    /// What else they see: tokens in the cache (GPT), rows of the memory (Transformer-XL), tokens of the text (BART). For
    /// Longformer, how many of them are global.
    pub context: usize,
    /// Height and width of an image, or of the feature map where one goes in.
    pub grid: [usize; 2],
}

/// What is counted: tokens or images.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Items {
    #[serde(rename = "items")]
    pub count: usize,
    pub unit: &'static str,
}

impl Items {
    /// How many in a second, if all take `ns`.
    pub fn per_second(self, ns: f64) -> f64 {
        self.count as f64 * 1e9 / ns
    }
}

/// A model with its configuration, as Hugging Face has it, and what goes in.
#[derive(Clone, Debug, Serialize)]
pub struct System {
    #[serde(skip)]
    pub name: String,
    #[serde(rename = "system")]
    pub kind: Kind,
    pub config: Value,
    #[serde(flatten)]
    pub size: Size,
    /// A smaller input for the same weights.
    #[serde(skip)]
    pub check: Size,
}

const SEED: u64 = 1;

impl System {
    /// The model with random weights, and the checkpoint that made them.
    pub fn load(&self) -> Result<(Box<dyn Model>, Checkpoint)> {
        let checkpoint = Checkpoint::random(SEED);
        let model = models::load(self, Path::new(&self.name), &checkpoint)?;
        Ok((model, checkpoint))
    }

    /// What is counted.
    pub fn items(&self) -> Items {
        let Size { batch, tokens, context, .. } = self.size;
        let (count, unit) = match self.kind {
            Kind::Clip | Kind::DetrEncoder | Kind::Detr => (batch, "images"),
            Kind::Bart => (batch * (tokens + context), "tokens"),
            _ => (batch * tokens, "tokens"),
        };
        Items { count, unit }
    }

    /// The same with one layer, a small vocabulary and the smaller input.
    fn small(mut self) -> System {
        shrink(&mut self.config);
        System { name: format!("{}/small", self.name), size: self.check, ..self }
    }
}

/// One layer of everything.
fn shrink(config: &mut Value) {
    let Some(fields) = config.as_object_mut() else { return };
    for (name, value) in fields {
        match name.as_str() {
            "num_hidden_layers" | "n_layer" | "encoder_layers" | "decoder_layers" => *value = json!(1),
            "vocab_size" => *value = json!(1000),
            "depths" => *value = json!([1, 1, 1, 1]),
            _ => shrink(value),
        }
    }
}

/// All rows; `small` ones show that everything runs, and no speed.
pub fn all(small: bool) -> Vec<System> {
    let systems = usual();
    if small { systems.into_iter().map(System::small).collect() } else { systems }
}

fn usual() -> Vec<System> {
    let text = |tokens, context| Size { batch: 1, tokens, context, grid: [0, 0] };
    let image = |batch, grid| Size { batch, tokens: 0, context: 0, grid };
    let system = |name: &str, kind, config: &Value, size, check| System {
        name: format!("systems/f32/{name}"),
        kind,
        config: config.clone(),
        size,
        check,
    };
    let bert = json!({
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512,
    });
    let gpt = json!({
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    });
    let longformer = json!({
        "vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 4098, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        "attention_window": 512, "pad_token_id": 1,
    });
    // The large model for WikiText-103 as its authors evaluate it. Of its vocabulary only a part is here: the hidden
    // states are computed, and not the adaptive softmax.
    let transformer_xl = json!({
        "vocab_size": 20000, "d_model": 1024, "n_head": 16, "d_head": 64, "d_inner": 4096, "n_layer": 18,
        "mem_len": 1600, "clamp_len": 1000, "same_length": true,
    });
    let xlnet = json!({
        "vocab_size": 32000, "d_model": 768, "n_head": 12, "d_inner": 3072, "n_layer": 12, "mem_len": null,
    });
    // The texts' tower does not take part.
    let clip = json!({
        "projection_dim": 512,
        "text_config": { "num_hidden_layers": 1, "vocab_size": 1000 },
        "vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32,
            "num_channels": 3,
        },
    });
    let detr = json!({
        "d_model": 256, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
        "activation_function": "relu", "position_embedding_type": "sine",
        "backbone_config": {
            "num_channels": 3, "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
            "layer_type": "bottleneck", "hidden_act": "relu",
        },
    });
    let bart = json!({
        "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072, "max_position_embeddings": 1024,
    });
    vec![
        system("bert-base/b1s512", Kind::Bert, &bert, text(512, 0), text(64, 0)),
        system("gpt2-prefill/b1s1024", Kind::GptPrefill, &gpt, text(1024, 0), text(64, 0)),
        system("gpt2-decode/b1c1023", Kind::GptDecode, &gpt, text(1, 1023), text(1, 63)),
        // Windows of 256 tokens to each side, and the first 16 tokens are global. The check is longer than a window.
        system("longformer-base/b1s4096", Kind::Longformer, &longformer, text(4096, 16), text(320, 16)),
        system(
            "transformer-xl-large/b1s128m1600",
            Kind::TransformerXl,
            &transformer_xl,
            text(128, 1600),
            text(16, 70),
        ),
        system("xlnet-base/b1s512", Kind::Xlnet, &xlnet, text(512, 0), text(64, 0)),
        system("clip-vit-b32/images8", Kind::Clip, &clip, image(8, [224, 224]), image(1, [224, 224])),
        system("detr-encoder/25x34", Kind::DetrEncoder, &detr, image(1, [25, 34]), image(1, [9, 8])),
        system("detr-resnet50/800x1066", Kind::Detr, &detr, image(1, [800, 1066]), image(1, [96, 130])),
        system("bart-base/b1s512t64", Kind::Bart, &bart, text(64, 512), text(16, 40)),
    ]
}

#[cfg(test)]
mod tests {
    use laneformer::Context;

    use super::*;

    #[test]
    fn every_system_computes() -> Result<()> {
        for system in all(true) {
            let (mut model, checkpoint) = system.load()?;
            model.prepare(Context::serial(), &system.size)?;
            let x = model.run(Context::serial())?;
            assert!(!x.is_empty() && x.iter().all(|x| x.is_finite()), "{}", system.name);
            assert!(x.iter().any(|&y| y != x[0]), "{}", system.name);
            assert!(!checkpoint.asked().is_empty() && !model.inputs().is_empty(), "{}", system.name);
            for (name, shape, data) in model.inputs() {
                assert_eq!(shape.iter().product::<usize>(), data.len(), "{}: {name}", system.name);
            }
        }
        Ok(())
    }

    #[test]
    fn names_are_unique_and_items_are_counted() {
        let systems = all(false);
        let names: std::collections::HashSet<&str> = systems.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names.len(), systems.len());
        let items: Vec<(usize, &str)> = systems.iter().map(|s| (s.items().count, s.items().unit)).collect();
        assert_eq!(items[0], (512, "tokens"));
        assert_eq!(items[2], (1, "tokens"));
        assert_eq!(items[6], (8, "images"));
        assert_eq!(items[9], (576, "tokens"));
        assert_eq!(systems[0].items().per_second(1e6), 512_000.0);
    }
}
