//! A post-norm encoder layer as a workload.

use anyhow::Result;
use laneformer::{
    Activation, Context, Ffn, Graph, Heads, Layer, Linear, MatMut, MatRef, Norm, PackedMatrix, Placement,
    QkvProjection, SelfAttention, SubLayer, Workspace, reference,
};

use crate::bench::check::{compare, gather, linear};
use crate::bench::data::Buffer;
use crate::bench::measure::{Deviation, Workload};
use crate::bench::ops::{reference_attention, sample_segments};

/// The sizes of a model's layer.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub name: &'static str,
    pub d_model: usize,
    pub n_heads: usize,
    pub d_ff: usize,
}

/// BERT-base.
pub const BERT_BASE: Dims = Dims { name: "bert-base", d_model: 768, n_heads: 12, d_ff: 3072 };
/// all-MiniLM-L6 and L12.
pub const MINILM: Dims = Dims { name: "minilm", d_model: 384, n_heads: 12, d_ff: 1536 };

impl Dims {
    /// Floating-point operations of the layer's products, two for each multiply-add.
    pub fn flops(self, batch: usize, seq_len: usize) -> u64 {
        let [b, s, d, f] = [batch, seq_len, self.d_model, self.d_ff].map(|x| x as u64);
        b * (8 * s * d * d + 4 * s * d * f + 4 * s * s * d)
    }

    /// Weights and biases.
    pub fn parameters(self) -> usize {
        let (d, f) = (self.d_model, self.d_ff);
        4 * d * d + 2 * d * f + 4 * d + f + d + 4 * d
    }
}

/// A layer with weights of its own that keep the size of what comes in.
pub fn random_layer(
    dims: Dims,
    activation: Activation,
    placement: fn(Norm) -> Placement,
    seed: u64,
) -> Result<Layer> {
    let Dims { d_model: d, n_heads, d_ff, .. } = dims;
    let mut seeds = seed..;
    let mut linear = |n: usize, k: usize| Map::new(n, k, seeds.next().unwrap_or(0)).packed();
    let norm = || placement(Norm::LayerNorm { gain: vec![1.0; d], bias: Some(vec![0.0; d]), eps: EPS });
    let heads = Heads::new(n_heads, d / n_heads)?;
    let qkv = QkvProjection::new(linear(d, d)?, linear(d, d)?, linear(d, d)?, heads)?;
    let attention = SelfAttention::new(qkv, linear(d, d)?)?;
    let ffn = Ffn::new(linear(d_ff, d)?, activation, linear(d, d_ff)?)?;
    Ok(Layer::new(vec![SubLayer::self_attention(attention, norm())?, SubLayer::ffn(ffn, norm())?])?)
}

/// A linear map as the reference wants it: `[out, in]`, not packed.
struct Map {
    weight: Buffer,
    bias: Buffer,
}

impl Map {
    fn new(out_features: usize, in_features: usize, seed: u64) -> Map {
        let scale = (3.0 / in_features as f32).sqrt();
        let bias = Buffer::uniform(out_features, 0.2, 100 + seed);
        Map { weight: Buffer::uniform(out_features * in_features, scale, seed), bias }
    }

    fn packed(&self) -> Result<Linear> {
        let out_features = self.bias.len();
        let weight = MatRef::contiguous(&self.weight, out_features, self.weight.len() / out_features)?;
        Ok(Linear::new(PackedMatrix::from_out_in(weight)?, Some(&self.bias))?)
    }

    fn apply(&self, x: &[f64]) -> Vec<f64> {
        linear(x, &self.weight, Some(&self.bias), self.weight.len() / self.bias.len())
    }
}

const EPS: f32 = 1e-12;

/// The layer, its unpacked weights for the reference, and its tokens.
pub struct EncoderLayer {
    dims: Dims,
    heads: Heads,
    seq_len: usize,
    offsets: Vec<usize>,
    /// Query, key, value, output, then the two of the FFN.
    maps: [Map; 6],
    gains: [Buffer; 2],
    biases: [Buffer; 2],
    layer: Layer,
    workspace: Workspace,
    source: Buffer,
    x: Buffer,
}

impl EncoderLayer {
    /// `members` threads may work on it.
    pub fn new(dims: Dims, batch: usize, seq_len: usize, members: usize) -> Result<EncoderLayer> {
        let Dims { d_model: d, n_heads, d_ff: f, .. } = dims;
        let heads = Heads::new(n_heads, d / n_heads)?;
        let shapes = [(d, d), (d, d), (d, d), (d, d), (f, d), (d, f)];
        let mut seeds = 10..;
        let maps = shapes.map(|(n, k)| Map::new(n, k, seeds.next().unwrap_or(0)));
        let gains = [20, 21].map(|seed| Buffer::uniform(d, 1.0, seed));
        let biases = [22, 23].map(|seed| Buffer::uniform(d, 0.2, seed));
        let [q, k, v, out, w1, w2] = &maps;
        let post = |i: usize| {
            let bias = Some(biases[i].to_vec());
            Placement::post(Norm::LayerNorm { gain: gains[i].to_vec(), bias, eps: EPS })
        };
        let qkv = QkvProjection::new(q.packed()?, k.packed()?, v.packed()?, heads)?;
        let attention = SelfAttention::new(qkv, out.packed()?)?;
        let ffn = Ffn::new(w1.packed()?, Activation::GeluErf, w2.packed()?)?;
        let layer =
            Layer::new(vec![SubLayer::self_attention(attention, post(0))?, SubLayer::ffn(ffn, post(1))?])?;
        let tokens = batch * seq_len;
        let workspace = layer.workspace(tokens, batch, members)?;
        let offsets = (0..=batch).map(|segment| segment * seq_len).collect();
        let (source, x) = (Buffer::uniform(tokens * d, 1.0, 30), Buffer::filled(tokens * d, 0.0));
        Ok(EncoderLayer { dims, heads, seq_len, offsets, maps, gains, biases, layer, workspace, source, x })
    }

    /// The layer's output for `rows` of the segment from `first` on: [`reference::encoder_layer`] without the rows that nothing
    /// asks for.
    fn reference(&self, first: usize, rows: &[usize]) -> Vec<f64> {
        let d = self.dims.d_model;
        let [q, k, v, out, w1, w2] = &self.maps;
        let segment: Vec<usize> = (first..first + self.seq_len).collect();
        let segment = gather(&self.source, d, &segment);
        let (keys, values) = (k.apply(&segment), v.apply(&segment));
        let attend = |x: &[f64]| {
            out.apply(&reference_attention(&self.heads, &q.apply(x), &keys, &values, |_, _| true))
        };
        let feed = |x: &[f64]| {
            let hidden: Vec<f64> = w1.apply(x).into_iter().map(reference::gelu_erf).collect();
            w2.apply(&hidden)
        };
        let x = self.closed(0, &gather(&self.source, d, rows), attend);
        self.closed(1, &x, feed)
    }

    /// Sub-layer `i` with its residual and its norm.
    fn closed(&self, i: usize, x: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
        let (gain, bias) = (reference::to_f64(&self.gains[i]), reference::to_f64(&self.biases[i]));
        let norm = reference::Norm::LayerNorm { gain: &gain, bias: Some(&bias), eps: EPS.into() };
        reference::sub_layer(x, &reference::Placement::Post { norm, alpha: 1.0 }, f)
    }
}

impl Workload for EncoderLayer {
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation> {
        self.reset();
        self.run(ctx)?;
        let (mut got, mut want) = (vec![], vec![]);
        for (first, rows) in sample_segments(self.offsets.len() - 1, self.seq_len) {
            want.extend(self.reference(first, &rows));
            got.extend(gather(&self.x, self.dims.d_model, &rows));
        }
        Ok(compare(&got, &want, 1e-5))
    }

    fn reset(&mut self) {
        self.x.copy_from_slice(&self.source);
    }

    fn runs_per_reset(&self) -> Option<usize> {
        Some(1)
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<()> {
        let d = self.dims.d_model;
        let tokens = self.x.len() / d;
        let x = MatMut::contiguous(&mut self.x, tokens, d)?;
        Ok(self.layer.forward(ctx, x, &self.offsets, &Graph::full(), &mut self.workspace)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Dims = Dims { name: "small", d_model: 24, n_heads: 3, d_ff: 40 };

    #[test]
    fn the_short_reference_is_the_whole_one() -> Result<()> {
        let layer = EncoderLayer::new(SMALL, 2, 70, 1)?;
        let wide = |x: &Buffer| reference::to_f64(x);
        let weights = layer.maps.each_ref().map(|map| (wide(&map.weight), wide(&map.bias)));
        let map = |i: usize| reference::Linear {
            weight: &weights[i].0,
            bias: Some(&weights[i].1),
            in_features: weights[i].0.len() / weights[i].1.len(),
        };
        let (gains, biases) = (layer.gains.each_ref().map(wide), layer.biases.each_ref().map(wide));
        let post = |i: usize| reference::Placement::Post {
            norm: reference::Norm::LayerNorm { gain: &gains[i], bias: Some(&biases[i]), eps: EPS.into() },
            alpha: 1.0,
        };
        let shape = reference::Attention {
            n_heads: 3,
            n_kv_heads: 3,
            head_dim: 8,
            value_dim: 8,
            scale: f64::from(layer.heads.scale),
            softcap: None,
        };
        let whole = reference::LayerWeights {
            attention: reference::SelfAttention { q: map(0), k: map(1), v: map(2), out: map(3), shape },
            attention_placement: post(0),
            ffn: reference::Ffn { w1: map(4), activation: reference::gelu_erf, w2: map(5) },
            ffn_placement: post(1),
        };
        let (all, no_bias) = (|_, _, _, _| true, |_, _, _, _| 0.0);
        let want = reference::encoder_layer(&wide(&layer.source), &whole, &layer.offsets, all, no_bias);
        for row in [0, 69, 70, 139] {
            let got = layer.reference(row / 70 * 70, &[row]);
            assert!(compare(&got, &want[row * 24..(row + 1) * 24], 1e-12).max_err < 1e-12);
        }
        Ok(())
    }

    #[test]
    fn the_layer_passes() -> Result<()> {
        let Deviation { max_err, limit } = EncoderLayer::new(SMALL, 3, 50, 1)?.check(Context::serial())?;
        assert!(max_err <= limit, "{max_err} {limit}");
        Ok(())
    }

    #[test]
    fn counts() {
        assert_eq!(BERT_BASE.flops(8, 128), 14_898_167_808);
        assert_eq!(BERT_BASE.parameters(), 7_087_872); // A layer of bert-base-uncased.
    }
}
