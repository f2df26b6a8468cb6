//! ResNet (He et al. 2015, <https://arxiv.org/abs/1512.03385>) as a backbone: a stem, then stages of residual blocks, every
//! convolution with its batch norm folded in.

use std::mem;
use std::path::Path;

use laneformer::{Activation, MatMut, elementwise};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{activation, check};
use crate::conv::{Conv, Images, Window};
use crate::{Result, Run, Weights};

/// The epsilon of all batch norms.
const EPS: f32 = 1e-5;

/// How the pooling behind the stem moves.
const POOL: Window = Window { kernel: 3, stride: 2, padding: 1 };

/// The configuration.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub num_channels: usize,
    pub embedding_size: usize,
    pub hidden_sizes: Vec<usize>,
    pub depths: Vec<usize>,
    pub layer_type: LayerType,
    #[serde(deserialize_with = "activation")]
    pub hidden_act: Activation,
    pub downsample_in_first_stage: bool,
    pub downsample_in_bottleneck: bool,
}

pub(crate) fn defaults() -> Value {
    json!({
        "num_channels": 3, "layer_type": "bottleneck", "hidden_act": "relu", "downsample_in_first_stage": false,
        "downsample_in_bottleneck": false,
    })
}

/// The convolutions of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerType {
    /// Two of 3x3.
    Basic,
    /// 1x1 to a quarter of the channels, 3x3, and 1x1 back.
    Bottleneck,
}

/// The network up to its last feature map.
#[derive(Debug)]
pub struct ResNet {
    stem: Conv,
    blocks: Vec<Block>,
    activation: Activation,
}

/// act(convs(x) + shortcut(x))
#[derive(Debug)]
struct Block {
    convs: Vec<Conv>,
    last: Conv,
    shortcut: Option<Conv>,
}

impl ResNet {
    /// The network here; `path` is for messages.
    pub fn load(path: &Path, w: &Weights<'_>, config: &Config) -> Result<ResNet> {
        let (n, sizes) = (config.depths.len(), config.hidden_sizes.len());
        check(path, "depths", n, n == sizes, format!("{sizes} numbers, as hidden_sizes has"))?;
        let mut channels = config.embedding_size;
        let stem = conv(&w.at("embedder.embedder"), [config.num_channels, channels], 7, 2)?;
        let mut blocks = vec![];
        for (stage, (&size, &depth)) in config.hidden_sizes.iter().zip(&config.depths).enumerate() {
            let w = w.at(format_args!("encoder.stages.{stage}.layers"));
            for i in 0..depth {
                let downsamples = i == 0 && (stage > 0 || config.downsample_in_first_stage);
                let stride = if downsamples { 2 } else { 1 };
                blocks.push(Block::load(&w.at(i), config, [channels, size], stride)?);
                channels = size;
            }
        }
        Ok(ResNet { stem, blocks, activation: config.hidden_act })
    }

    /// The last feature map.
    pub fn forward(&self, run: &mut Run<'_>, images: &Images) -> Result<Images> {
        let stem = self.stem.forward(run, images, self.activation, None)?;
        let mut x = stem.max_pool(run, POOL);
        run.scratch.give(stem.pixels);
        for block in &self.blocks {
            let next = block.forward(run, &x)?;
            run.scratch.give(mem::replace(&mut x, next).pixels);
            let (rows, channels) = (x.batch * x.height * x.width, x.channels);
            if let Some(function) = self.activation.function() {
                elementwise(run.ctx, function, MatMut::contiguous(&mut x.pixels, rows, channels)?)?;
            }
        }
        // The buffer of a large map is not for a small one's life.
        let own = x.pixels().to_vec();
        run.scratch.give(mem::replace(&mut x.pixels, own));
        Ok(x)
    }
}

impl Block {
    fn load(w: &Weights<'_>, config: &Config, [from, to]: [usize; 2], stride: usize) -> Result<Block> {
        let layer = |i: usize, channels, kernel, stride| conv(&w.at("layer").at(i), channels, kernel, stride);
        let (convs, last) = match config.layer_type {
            LayerType::Basic => (vec![layer(0, [from, to], 3, stride)?], layer(1, [to, to], 3, 1)?),
            LayerType::Bottleneck => {
                let inner = to / 4;
                let strides = if config.downsample_in_bottleneck { [stride, 1] } else { [1, stride] };
                let first = layer(0, [from, inner], 1, strides[0])?;
                (vec![first, layer(1, [inner, inner], 3, strides[1])?], layer(2, [inner, to], 1, 1)?)
            }
        };
        let shortcut = || conv(&w.at("shortcut"), [from, to], 1, stride);
        let shortcut = (from != to || stride != 1).then(shortcut).transpose()?;
        Ok(Block { convs, last, shortcut })
    }

    fn forward(&self, run: &mut Run<'_>, x: &Images) -> Result<Images> {
        let shortcut = self.shortcut.as_ref();
        let residual = shortcut.map(|conv| conv.forward(run, x, Activation::None, None)).transpose()?;
        let mut y: Option<Images> = None;
        for conv in &self.convs {
            // Inside of a block it is always this one: as published, whatever the configuration has elsewhere.
            let next = conv.forward(run, y.as_ref().unwrap_or(x), Activation::Relu, None)?;
            y.replace(next).into_iter().for_each(|y| run.scratch.give(y.pixels));
        }
        let (input, shortcut) = (y.as_ref().unwrap_or(x), residual.as_ref().unwrap_or(x));
        let out = self.last.forward(run, input, Activation::None, Some(shortcut))?;
        y.into_iter().chain(residual).for_each(|images| run.scratch.give(images.pixels));
        Ok(out)
    }
}

/// A convolution that keeps the size, up to its stride, with the running statistics of its norm folded into it.
fn conv(w: &Weights<'_>, channels: [usize; 2], kernel: usize, stride: usize) -> Result<Conv> {
    let norm = w.at("normalization").batch_norm(channels[1], EPS)?;
    let window = Window { kernel, stride, padding: kernel / 2 };
    let mut conv = Conv::load(&w.at("convolution"), channels, window)?;
    conv.linear = conv.linear.with_affine_after(&norm)?;
    Ok(conv)
}
