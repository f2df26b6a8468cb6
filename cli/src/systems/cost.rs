//! What a run of a system must do at least: its products, and the weights and caches that it reads once.

use anyhow::{Context as _, Result};
use laneformer::Graph;
use serde_json::Value;

use crate::bench::rows::Cost;
use crate::graph::with_global;
use crate::systems::{Kind, Size, System};

/// Layers of one width.
#[derive(Clone, Copy)]
struct Layers {
    n: u64,
    d: u64,
    d_ff: u64,
}

/// Multiply-adds, and the weights that take part.
#[derive(Clone, Copy, Default)]
struct Work {
    products: u64,
    weights: u64,
}

impl std::ops::Add for Work {
    type Output = Work;
    fn add(self, other: Work) -> Work {
        Work { products: self.products + other.products, weights: self.weights + other.weights }
    }
}

impl Layers {
    /// Self-attention and the feed-forward network of `tokens` tokens with `edges` pairs of a query and a key, each in `terms`
    /// products as wide as the model: scores and sums are two, a relative term is one more.
    fn work(self, tokens: u64, edges: u64, terms: u64) -> Work {
        let weights = self.n * (4 * self.d * self.d + 2 * self.d * self.d_ff);
        Work { products: tokens * weights + self.n * terms * edges * self.d, weights }
    }
}

/// A linear map of `rows` rows.
fn linear(rows: u64, inputs: u64, outputs: u64) -> Work {
    Work { products: rows * inputs * outputs, weights: inputs * outputs }
}

/// Pairs where every one of `tokens` tokens sees what is before it, `context` of them from earlier, and itself; at most `most`.
fn causal(tokens: u64, context: u64, most: u64) -> u64 {
    (1..=tokens).map(|i| (context + i).min(most)).sum()
}

impl System {
    /// The products of its formula, two operations for each multiply-add. What can be kept from run to run is not counted:
    /// Transformer-XL's memory is projected once, and so are its positions and XLNet's.
    pub fn cost(&self) -> Result<Cost> {
        let Size { batch, tokens, context, grid } = self.size;
        let (batch, t, context) = (batch as u64, tokens as u64, context as u64);
        let field = |name: &str| number(&self.config, name);
        let mut cached = 0;
        let work = match self.kind {
            Kind::Bert => self.bert()?.work(t, t * t, 2),
            Kind::GptPrefill | Kind::GptDecode => {
                let layers = Layers { n: field("n_layer")?, d: field("n_embd")?, d_ff: 4 * field("n_embd")? };
                cached = 2 * layers.n * context * layers.d;
                layers.work(t, causal(t, context, u64::MAX), 2) + linear(1, layers.d, field("vocab_size")?)
            }
            Kind::Longformer => {
                let (layers, globals) = (self.bert()?, context);
                let seen = edges(tokens, field("attention_window")? as usize / 2, globals as usize)?;
                // Projections of their own: queries of the global tokens, keys and values of all, or instead, if it is less, queries that meet the
                // tokens' own rows in every head.
                let Layers { n, d, .. } = layers;
                let heads = field("num_attention_heads")?;
                let weights = 3 * n * d * d;
                let all = 2 * t * d * d + 2 * globals * t * d;
                let few = 2 * globals * d * d + 2 * globals * heads * t * d;
                let products = n * (globals * d * d + all.min(few));
                layers.work(t, seen, 2) + Work { products, weights }
            }
            Kind::TransformerXl => {
                let layers = Layers { n: field("n_layer")?, d: field("d_model")?, d_ff: field("d_inner")? };
                cached = 3 * layers.n * context * layers.d;
                layers.work(t, causal(t, context, field("mem_len")?), 3)
            }
            Kind::Xlnet => {
                let layers = Layers { n: field("n_layer")?, d: field("d_model")?, d_ff: field("d_inner")? };
                cached = layers.n * (2 * t - 1) * layers.d;
                layers.work(t, t * t, 3)
            }
            Kind::Clip => {
                let vision = &self.config["vision_config"];
                let layers = Layers {
                    n: number(vision, "num_hidden_layers")?,
                    d: number(vision, "hidden_size")?,
                    d_ff: number(vision, "intermediate_size")?,
                };
                let patch = number(vision, "patch_size")?;
                let patches = (number(vision, "image_size")? / patch).pow(2);
                let t = patches + 1;
                layers.work(batch * t, batch * t * t, 2)
                    + linear(batch * patches, patch * patch * number(vision, "num_channels")?, layers.d)
                    + linear(batch, layers.d, field("projection_dim")?)
            }
            Kind::DetrEncoder => self.detr(grid)?,
            Kind::Detr => {
                let (backbone, features) = resnet(&self.config["backbone_config"], grid)?;
                backbone + self.detr(features)?
            }
            Kind::Bart => {
                let [d, d_ff] = [field("d_model")?, field("encoder_ffn_dim")?];
                let encoder = Layers { n: field("encoder_layers")?, d, d_ff };
                let decoder = Layers { n: field("decoder_layers")?, d, d_ff: field("decoder_ffn_dim")? };
                let own = decoder.work(t, causal(t, 0, u64::MAX) + t * context, 2);
                encoder.work(context, context * context, 2)
                    + own
                    + linear(decoder.n * t, d, 2 * d)
                    + linear(decoder.n * context, d, 2 * d)
                    + linear(t, d, field("vocab_size")?)
            }
        };
        let bytes = (work.weights + cached) as usize * size_of::<f32>();
        Ok(Cost { flops: 2 * work.products, bytes, elements: None })
    }

    fn bert(&self) -> Result<Layers> {
        let field = |name: &str| number(&self.config, name);
        Ok(Layers {
            n: field("num_hidden_layers")?,
            d: field("hidden_size")?,
            d_ff: field("intermediate_size")?,
        })
    }

    /// The encoder over a feature map, with the projection before it.
    fn detr(&self, [height, width]: [usize; 2]) -> Result<Work> {
        let field = |name: &str| number(&self.config, name);
        let layers =
            Layers { n: field("encoder_layers")?, d: field("d_model")?, d_ff: field("encoder_ffn_dim")? };
        let t = (height * width) as u64;
        let channels = numbers(&self.config["backbone_config"], "hidden_sizes")?;
        let channels = channels.last().copied().unwrap_or(0);
        Ok(layers.work(t, t * t, 2) + linear(t, channels, layers.d))
    }
}

/// Pairs of a window that reaches as far to each side, with `globals` columns.
fn edges(tokens: usize, reach: usize, globals: usize) -> Result<u64> {
    let graph = with_global(Graph::window(reach, reach), globals, tokens)?;
    let tiles = graph.tiles(0, &[0, tokens], &[0, tokens])?;
    Ok(tiles.map(|tile| tile.edges() as u64).sum())
}

/// The convolutions of a bottleneck ResNet, whose strides are in those of 3x3, and the size of its feature map.
fn resnet(config: &Value, [height, width]: [usize; 2]) -> Result<(Work, [usize; 2])> {
    let mut size = [height as u64, width as u64];
    let halved = |size: [u64; 2]| size.map(|n| n.div_ceil(2));
    let pixels = |[height, width]: [u64; 2]| height * width;
    let (depths, channels) = (numbers(config, "depths")?, numbers(config, "hidden_sizes")?);
    let mut from = number(config, "embedding_size")?;
    size = halved(size);
    let mut work = linear(pixels(size), 7 * 7 * number(config, "num_channels")?, from);
    size = halved(size);
    for (stage, (&to, &depth)) in channels.iter().zip(&depths).enumerate() {
        let inner = to / 4;
        for i in 0..depth {
            let before = size;
            if i == 0 && stage > 0 {
                size = halved(size);
            }
            work = work
                + linear(pixels(before), from, inner)
                + linear(pixels(size), 9 * inner, inner)
                + linear(pixels(size), inner, to);
            if from != to {
                work = work + linear(pixels(size), from, to);
            }
            from = to;
        }
    }
    Ok((work, size.map(|n| n as usize)))
}

fn number(config: &Value, field: &str) -> Result<u64> {
    config[field].as_u64().with_context(|| format!("no number {field} in the configuration"))
}

fn numbers(config: &Value, field: &str) -> Result<Vec<u64>> {
    let numbers = config[field].as_array().map(|list| list.iter().filter_map(Value::as_u64).collect());
    numbers.with_context(|| format!("no numbers {field} in the configuration"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::layer::BERT_BASE;
    use crate::systems::all;

    #[test]
    fn products_are_counted() -> Result<()> {
        let systems = all(false);
        let cost = |kind| systems.iter().find(|s| s.kind == kind).expect("a system").cost();
        assert_eq!(cost(Kind::Bert)?.flops, 12 * BERT_BASE.flops(1, 512));
        // All weights of GPT-2 small but its tables, the head, and keys and values of 1023 tokens.
        let weights = 12 * 12 * 768 * 768 + 50257 * 768;
        assert_eq!(cost(Kind::GptDecode)?.bytes, 4 * (weights + 12 * 2 * 1023 * 768));
        assert_eq!(cost(Kind::GptDecode)?.flops, 2 * (weights as u64 + 12 * 2 * 1024 * 768));
        // Every token sees 1600 keys, by three products.
        let layer = 128 * (4 * 1024 * 1024 + 2 * 1024 * 4096) + 3 * 1600 * 128 * 1024;
        assert_eq!(cost(Kind::TransformerXl)?.flops, 2 * 18 * layer);
        // Three products of 512 tokens and keys, whose distances are kept.
        let weights = 4 * 768 * 768 + 2 * 768 * 3072;
        assert_eq!(cost(Kind::Xlnet)?.flops, 2 * 12 * (512 * weights + 3 * 512 * 512 * 768));
        assert_eq!(cost(Kind::Xlnet)?.bytes as u64, 4 * 12 * (weights + 1023 * 768));
        // 16 global queries that meet rows of 768 in 12 heads, and come to them and from them by a projection each.
        let seen = edges(4096, 256, 16)?;
        let global = 3 * 16 * 768 * 768 + 2 * 16 * 12 * 4096 * 768;
        assert_eq!(cost(Kind::Longformer)?.flops, 2 * 12 * (4096 * weights + 2 * seen * 768 + global));
        Ok(())
    }

    /// The usual figure of ResNet-50 is 4.1 GFLOP (multiply-adds) and 25.6 million parameters, of which its classifier has 2.
    #[test]
    fn resnet_50_is_counted() -> Result<()> {
        let systems = all(false);
        let detr = systems.iter().find(|s| s.kind == Kind::Detr).expect("a system");
        let (work, size) = resnet(&detr.config["backbone_config"], [224, 224])?;
        assert_eq!(size, [7, 7]);
        assert!((4.05e9..4.12e9).contains(&(work.products as f64)), "{}", work.products);
        assert!((23.4e6..23.6e6).contains(&(work.weights as f64)), "{}", work.weights);
        assert_eq!(resnet(&detr.config["backbone_config"], [800, 1066])?.1, [25, 34]);
        Ok(())
    }

    #[test]
    fn what_is_seen_is_counted() -> Result<()> {
        assert_eq!((causal(4, 0, 9), causal(2, 3, 9), causal(2, 8, 9)), (10, 9, 18));
        // 3 keys but at the ends, and the first column where it is not in the window.
        assert_eq!(edges(10, 1, 1)?, 28 + 8);
        Ok(())
    }
}
