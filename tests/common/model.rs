//! Random layers, as the library's and as the reference's.

use laneformer::reference as r;
use laneformer::{
    Activation, Affine, Context, Epilogue, Ffn, Graph, Heads, Layer, Linear, MatRef, Norm, PackedMatrix,
    Placement, QkvProjection, Rotary, RotaryPairs, SelfAttention, SubLayer,
};

use super::buffer::Guarded;
use super::data::Rng;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    LayerNorm,
    LayerNormWithoutBias,
    RmsNorm,
    BatchNorm,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PlacementKind {
    Post,
    DeepNorm,
    Pre,
    Sandwich,
}

const ALPHA: f32 = 1.75;

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub d_model: usize,
    pub d_ff: usize,
    pub heads: Heads,
    pub activation: Activation,
    pub norm: NormKind,
    pub placement: PlacementKind,
    /// Pairs, and how many columns of a head turn.
    pub rotary: Option<(RotaryPairs, usize)>,
    pub gated: bool,
}

/// The base of the tests' rotaries, and their positions.
pub const ROTARY_BASE: f64 = 1000.0;
pub const ROTARY_POSITIONS: usize = 1000;

impl Shape {
    /// A BERT-like layer.
    pub fn new(n_heads: usize, head_dim: usize, d_ff: usize) -> Shape {
        Shape {
            d_model: n_heads * head_dim,
            d_ff,
            heads: Heads::new(n_heads, head_dim).unwrap(),
            activation: Activation::GeluErf,
            norm: NormKind::LayerNorm,
            placement: PlacementKind::Post,
            rotary: None,
            gated: false,
        }
    }
}

/// A linear map's values.
pub struct Map {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub k: usize,
    wide: (Vec<f64>, Vec<f64>),
}

impl Map {
    /// Weights that keep the variance of rows, and a small bias.
    pub fn new(n: usize, k: usize, rng: &mut Rng) -> Map {
        let weight = rng.vec(n * k, (3.0 / k as f32).sqrt());
        let bias = rng.vec(n, 0.2);
        let wide = (r::to_f64(&weight), r::to_f64(&bias));
        Map { weight, bias, k, wide }
    }

    pub fn n(&self) -> usize {
        self.bias.len()
    }

    pub fn packed(&self) -> Linear {
        let weight = MatRef::contiguous(&self.weight, self.n(), self.k).unwrap();
        Linear::new(PackedMatrix::from_out_in(weight).unwrap(), Some(&self.bias)).unwrap()
    }

    pub fn reference(&self) -> r::Linear<'_> {
        r::Linear { weight: &self.wide.0, bias: Some(&self.wide.1), in_features: self.k }
    }
}

/// A norm's values; which of them count is the kind's business.
struct NormValues {
    gain: Vec<f32>,
    bias: Vec<f32>,
    mean: Vec<f32>,
    var: Vec<f32>,
    wide: [Vec<f64>; 4],
}

const EPS: f32 = 1e-5;

impl NormValues {
    fn new(d: usize, rng: &mut Rng) -> NormValues {
        let gain: Vec<f32> = rng.vec(d, 0.5).iter().map(|x| 1.0 + x).collect();
        let (bias, mean) = (rng.vec(d, 0.2), rng.vec(d, 0.2));
        let var: Vec<f32> = rng.vec(d, 0.5).iter().map(|x| 1.5 + x).collect();
        let wide = [r::to_f64(&gain), r::to_f64(&bias), r::to_f64(&mean), r::to_f64(&var)];
        NormValues { gain, bias, mean, var, wide }
    }

    fn norm(&self, kind: NormKind) -> Norm {
        let NormValues { gain, bias, mean, var, .. } = self;
        match kind {
            NormKind::LayerNorm => Norm::LayerNorm { gain: gain.clone(), bias: Some(bias.clone()), eps: EPS },
            NormKind::LayerNormWithoutBias => Norm::LayerNorm { gain: gain.clone(), bias: None, eps: EPS },
            NormKind::RmsNorm => Norm::RmsNorm { gain: gain.clone(), eps: EPS },
            NormKind::BatchNorm => Norm::BatchNorm(Affine::from_running(gain, bias, mean, var, EPS).unwrap()),
        }
    }

    fn reference(&self, kind: NormKind) -> r::Norm<'_> {
        let [gain, bias, mean, var] = &self.wide;
        let eps = f64::from(EPS);
        match kind {
            NormKind::LayerNorm => r::Norm::LayerNorm { gain, bias: Some(bias), eps },
            NormKind::LayerNormWithoutBias => r::Norm::LayerNorm { gain, bias: None, eps },
            NormKind::RmsNorm => r::Norm::RmsNorm { gain, eps },
            NormKind::BatchNorm => r::Norm::BatchNorm { gain, bias, mean, var, eps },
        }
    }
}

/// The values of a layer `[self-attention, ffn]`.
pub struct Model {
    pub shape: Shape,
    q: Map,
    k: Map,
    v: Map,
    out: Map,
    w1: Map,
    up: Map,
    w2: Map,
    norms: [NormValues; 4],
}

impl Model {
    pub fn new(shape: Shape, rng: &mut Rng) -> Model {
        let Shape { d_model: d, d_ff, heads, .. } = shape;
        Model {
            shape,
            q: Map::new(heads.query_cols(), d, rng),
            k: Map::new(heads.key_cols(), d, rng),
            v: Map::new(heads.value_cols(), d, rng),
            out: Map::new(d, heads.output_cols(), rng),
            w1: Map::new(d_ff, d, rng),
            w2: Map::new(d, d_ff, rng),
            up: Map::new(if shape.gated { d_ff } else { 0 }, d, rng),
            norms: std::array::from_fn(|_| NormValues::new(d, rng)),
        }
    }

    /// Only what an FFN needs: the attention's maps would be wide and unused.
    pub fn without_attention(shape: Shape, rng: &mut Rng) -> Model {
        let Shape { d_model: d, d_ff, .. } = shape;
        let [q, k, v, out] = std::array::from_fn(|_| Map::new(0, 1, rng));
        let (w1, w2) = (Map::new(d_ff, d, rng), Map::new(d, d_ff, rng));
        let up = Map::new(if shape.gated { d_ff } else { 0 }, d, rng);
        Model { shape, q, k, v, out, w1, up, w2, norms: std::array::from_fn(|_| NormValues::new(d, rng)) }
    }

    /// A layer `[ffn]`.
    pub fn ffn_layer(&self) -> Layer {
        Layer::new(vec![SubLayer::ffn(self.ffn(), self.placement(2)).unwrap()]).unwrap()
    }

    pub fn projection(&self) -> QkvProjection {
        let (q, k, v) = (self.q.packed(), self.k.packed(), self.v.packed());
        let projection = QkvProjection::new(q, k, v, self.shape.heads).unwrap();
        match self.shape.rotary {
            Some((pairs, dim)) => projection
                .with_rotary(Rotary::new(pairs, dim, ROTARY_BASE, ROTARY_POSITIONS).unwrap())
                .unwrap(),
            None => projection,
        }
    }

    /// Queries, keys and values as rows, without a rotary.
    pub fn project(&self, ctx: Context<'_>, x: MatRef<'_>) -> [Guarded; 3] {
        [&self.q, &self.k, &self.v].map(|map| {
            let mut y = Guarded::unset(x.rows(), map.n());
            map.packed().forward(ctx, x, &Epilogue::NONE, y.view_mut()).unwrap();
            y
        })
    }

    pub fn ffn(&self) -> Ffn {
        let (w1, activation, w2) = (self.w1.packed(), self.shape.activation, self.w2.packed());
        if self.shape.gated {
            Ffn::gated(w1, activation, self.up.packed(), w2).unwrap()
        } else {
            Ffn::new(w1, activation, w2).unwrap()
        }
    }

    pub fn reference_ffn(&self) -> r::Ffn<'_> {
        r::Ffn {
            w1: self.w1.reference(),
            activation: activation(self.shape.activation),
            w2: self.w2.reference(),
        }
    }

    /// The FFN of rows.
    pub fn reference_ffn_of(&self, x: &[f64]) -> Vec<f64> {
        match self.shape.gated {
            true => r::gated_ffn(x, &self.reference_ffn(), &self.up.reference()),
            false => r::ffn(x, &self.reference_ffn()),
        }
    }

    fn placement(&self, first: usize) -> Placement {
        let norm = |i: usize| self.norms[first + i].norm(self.shape.norm);
        match self.shape.placement {
            PlacementKind::Post => Placement::post(norm(0)),
            PlacementKind::DeepNorm => Placement::Post { norm: norm(0), alpha: ALPHA },
            PlacementKind::Pre => Placement::pre(norm(0)),
            PlacementKind::Sandwich => Placement::Sandwich { before: norm(0), after: norm(1) },
        }
    }

    fn reference_placement(&self, first: usize) -> r::Placement<'_> {
        let norm = |i: usize| self.norms[first + i].reference(self.shape.norm);
        match self.shape.placement {
            PlacementKind::Post => r::Placement::Post { norm: norm(0), alpha: 1.0 },
            PlacementKind::DeepNorm => r::Placement::Post { norm: norm(0), alpha: f64::from(ALPHA) },
            PlacementKind::Pre => r::Placement::Pre { norm: norm(0) },
            PlacementKind::Sandwich => r::Placement::Sandwich { before: norm(0), after: norm(1) },
        }
    }

    pub fn layer(&self) -> Layer {
        let attention = SelfAttention::new(self.projection(), self.out.packed()).unwrap();
        let attention = SubLayer::self_attention(attention, self.placement(0)).unwrap();
        Layer::new(vec![attention, SubLayer::ffn(self.ffn(), self.placement(2)).unwrap()]).unwrap()
    }

    /// The projected queries, and the attention's output before its own projection.
    pub fn reference_attention(&self, x: &[f64], offsets: &[usize], graph: &Graph) -> (Vec<f64>, Vec<f64>) {
        self.reference_attention_of(x, x, offsets, graph)
    }

    /// The same of queries and keys from `x`, and values from `of_values`.
    fn reference_attention_of(
        &self,
        x: &[f64],
        of_values: &[f64],
        offsets: &[usize],
        graph: &Graph,
    ) -> (Vec<f64>, Vec<f64>) {
        let project = |map: &Map, x: &[f64]| r::linear(x, &map.reference(), |x| x, None);
        let (mut q, mut k, v) = (project(&self.q, x), project(&self.k, x), project(&self.v, of_values));
        let shape = reference_heads(&self.shape.heads);
        if let Some((pairs, dim)) = self.shape.rotary {
            let places: Vec<usize> = offsets.windows(2).flat_map(|ends| 0..ends[1] - ends[0]).collect();
            let frequencies = r::rotary_frequencies(dim, ROTARY_BASE);
            let interleaved = pairs == RotaryPairs::Interleaved;
            for x in [&mut q, &mut k] {
                *x = r::rotary(x, shape.head_dim, &frequencies, interleaved, &places);
            }
        }
        let allowed = |_, _, i, j| graph.allows(i, j);
        let out = r::attention_packed(&q, &k, &v, &shape, offsets, offsets, allowed, |_, _, _, _| 0.0);
        (q, out)
    }

    pub fn reference(&self, x: &[f64], offsets: &[usize], graph: &Graph) -> Vec<f64> {
        self.reference_with(x, offsets, graph, &vec![0.0; x.len()])
    }

    /// The same, with `added` to the rows that queries and keys are projected from.
    pub fn reference_with(&self, x: &[f64], offsets: &[usize], graph: &Graph, added: &[f64]) -> Vec<f64> {
        let attend = |x: &[f64]| {
            let sum: Vec<f64> = x.iter().zip(added).map(|(x, y)| x + y).collect();
            let (_, attended) = self.reference_attention_of(&sum, x, offsets, graph);
            r::linear(&attended, &self.out.reference(), |x| x, None)
        };
        let x = r::sub_layer(x, &self.reference_placement(0), attend);
        r::sub_layer(&x, &self.reference_placement(2), |x| self.reference_ffn_of(x))
    }
}

/// The heads as the reference has them.
pub fn reference_heads(heads: &Heads) -> r::Attention {
    r::Attention {
        n_heads: heads.n_heads,
        n_kv_heads: heads.n_kv_heads,
        head_dim: heads.head_dim,
        value_dim: heads.value_dim,
        scale: f64::from(heads.scale),
        softcap: (heads.softcap > 0.0).then_some(f64::from(heads.softcap)),
    }
}

/// Every activation of an epilogue.
pub const ACTIVATIONS: [Activation; 7] = [
    Activation::None,
    Activation::Relu,
    Activation::GeluErf,
    Activation::GeluTanh,
    Activation::QuickGelu,
    Activation::Silu,
    Activation::Tanh,
];

/// The reference of an activation.
pub fn activation(activation: Activation) -> fn(f64) -> f64 {
    match activation {
        Activation::None => |x| x,
        Activation::Relu => r::relu,
        Activation::GeluErf => r::gelu_erf,
        Activation::GeluTanh => r::gelu_tanh,
        Activation::QuickGelu => r::quick_gelu,
        Activation::Silu => r::silu,
        Activation::Tanh => r::tanh,
        other => panic!("no reference of {other:?} yet"),
    }
}

/// Offsets of segments of these lengths.
pub fn offsets(lens: &[usize]) -> Vec<usize> {
    let ends = lens.iter().scan(0, |end, len| {
        *end += len;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}
