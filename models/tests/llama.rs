//! A decoder layer of Llama: pre-norm RMSNorm, rotary positions, grouped heads, a gated FFN, no biases. Against transformers in float64
//! (`tests/data/llama-layer/make.py` has made the file), and with a window and a soft cap against the library's own reference.

use std::path::Path;

use laneformer::reference as r;
use laneformer::{
    Activation, Context, Executor, Ffn, Graph, Heads, Inputs, Isa, KvCache, Layer, MatMut, Placement,
    QkvProjection, Rotary, RotaryPairs, SelfAttention, Serial, SubLayer,
};
use laneformer_models::weights::NormKind;
use laneformer_models::{Checkpoint, Result, Weights};

const D: usize = 32;
const D_FF: usize = 44;
const HEAD_DIM: usize = 12;
const TOKENS: usize = 70;
const EPS: f32 = 1e-5;
const BASE: f64 = 500.0;

/// Outputs are of size 4 at most.
const LIMIT: f64 = 4e-6;

fn file() -> Checkpoint {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/llama-layer/layer.safetensors");
    Checkpoint::open(Path::new(path)).unwrap()
}

fn heads() -> Heads {
    Heads::new(4, HEAD_DIM).unwrap().with_kv_heads(2).unwrap()
}

/// The layer, its positions slower by a factor.
fn layer(file: &Checkpoint, heads: Heads, factor: f64) -> Result<Layer> {
    let w = Weights::new(file, "");
    let (attention, mlp) = (w.at("self_attn"), w.at("mlp"));
    let norm = |name| {
        Ok::<_, laneformer_models::Error>(Placement::pre(w.at(name).norm(NormKind::RmsNorm, D, EPS)?))
    };
    let frequencies = Rotary::frequencies(HEAD_DIM, BASE)?.iter().map(|f| f / factor).collect::<Vec<_>>();
    let qkv = QkvProjection::new(
        attention.at("q_proj").linear_without_bias(D, heads.query_cols())?,
        attention.at("k_proj").linear_without_bias(D, heads.key_cols())?,
        attention.at("v_proj").linear_without_bias(D, heads.value_cols())?,
        heads,
    )?
    .with_rotary(Rotary::with_frequencies(RotaryPairs::Halves, &frequencies, 128)?)?;
    let out = attention.at("o_proj").linear_without_bias(heads.output_cols(), D)?;
    let ffn = Ffn::gated(
        mlp.at("gate_proj").linear_without_bias(D, D_FF)?,
        Activation::Silu,
        mlp.at("up_proj").linear_without_bias(D, D_FF)?,
        mlp.at("down_proj").linear_without_bias(D_FF, D)?,
    )?;
    Ok(Layer::new(vec![
        SubLayer::self_attention(SelfAttention::new(qkv, out)?, norm("input_layernorm")?)?,
        SubLayer::ffn(ffn, norm("post_attention_layernorm")?)?,
    ])?)
}

/// The same in f64.
fn reference(file: &Checkpoint, heads: Heads, graph: &Graph) -> Vec<f64> {
    let wide = |name: &str| r::to_f64(&file.f32(name).unwrap());
    let names =
        ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"];
    let weights = names.map(|name| wide(&format!("{name}_proj.weight")));
    let map = |i: usize| {
        let rows = [heads.query_cols(), heads.key_cols(), heads.value_cols(), D, D_FF, D_FF, D][i];
        r::Linear { weight: &weights[i], bias: None, in_features: weights[i].len() / rows }
    };
    let project = |i: usize, x: &[f64]| r::linear(x, &map(i), |x| x, None);
    let places: Vec<usize> = (0..TOKENS).collect();
    let turn = |x: Vec<f64>| r::rotary(&x, HEAD_DIM, &r::rotary_frequencies(HEAD_DIM, BASE), false, &places);
    let shape = r::Attention {
        n_heads: heads.n_heads,
        n_kv_heads: heads.n_kv_heads,
        head_dim: heads.head_dim,
        value_dim: heads.value_dim,
        scale: f64::from(heads.scale),
        softcap: (heads.softcap > 0.0).then_some(f64::from(heads.softcap)),
    };
    let attend = |x: &[f64]| {
        let (q, k, v) = (turn(project(0, x)), turn(project(1, x)), project(2, x));
        project(3, &r::attention(&q, &k, &v, &shape, |_, i, j| graph.allows(i, j), |_, _, _| 0.0))
    };
    let gains = ["input_layernorm.weight", "post_attention_layernorm.weight"].map(wide);
    let pre = |i: usize| r::Placement::Pre { norm: r::Norm::RmsNorm { gain: &gains[i], eps: EPS.into() } };
    let ffn = r::Ffn { w1: map(4), activation: r::silu, w2: map(6) };
    let x = r::sub_layer(&wide("x"), &pre(0), attend);
    r::sub_layer(&x, &pre(1), |x| r::gated_ffn(x, &ffn, &map(5)))
}

/// Rows of one sequence through the layer.
fn run(ctx: Context<'_>, layer: &Layer, x: &[f32], inputs: &mut Inputs<'_>) -> Vec<f32> {
    let (mut y, rows) = (x.to_vec(), x.len() / D);
    let mut workspace = layer.workspace(rows, 1, ctx.members()).unwrap();
    layer.forward_with(ctx, MatMut::contiguous(&mut y, rows, D).unwrap(), inputs, &mut workspace).unwrap();
    y
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f64], what: &str) {
    assert_eq!(actual.len(), expected.len());
    let error = actual.iter().zip(expected).map(|(&a, e)| (f64::from(a) - e).abs()).fold(0.0, f64::max);
    assert!(error < LIMIT, "{what}: largest difference {error:e}");
}

/// On every instruction set, with one thread and with two.
fn everywhere(mut test: impl FnMut(Context<'_>)) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for isa in Isa::available() {
        for executor in [&Serial as &dyn Executor, &pool] {
            test(Context::new(isa, executor));
        }
    }
}

#[test]
fn the_layer_is_that_of_transformers() {
    let (file, graph, offsets) = (file(), Graph::causal(), [0, TOKENS]);
    let tensor = |name: &str| file.f32(name).unwrap();
    let positions: Vec<usize> =
        file.i64("positions").unwrap().iter().map(|&p| usize::try_from(p).unwrap()).collect();
    for (name, factor, positions) in
        [("y", 1.0, None), ("y_linear", 4.0, None), ("y_positions", 1.0, Some(&positions[..]))]
    {
        let (layer, expected) = (layer(&file, heads(), factor).unwrap(), r::to_f64(&tensor(name)));
        everywhere(|ctx| {
            let mut inputs = Inputs { positions, ..Inputs::new(&offsets, &graph) };
            let y = run(ctx, &layer, &tensor("x"), &mut inputs);
            assert_close(&y, &expected, &format!("{name} on {:?}", ctx));
        });
    }
}

#[test]
fn the_reference_is_that_of_transformers() {
    let file = file();
    let expected = r::to_f64(&file.f32("y").unwrap());
    let actual = reference(&file, heads(), &Graph::causal());
    // Both in f64; but the file is rounded to f32, and so are the library's scale and epsilon.
    let error =
        actual.iter().zip(&expected).map(|(a, e)| (a - e).abs() / e.abs().max(1.0)).fold(0.0, f64::max);
    assert!(error < 2e-7, "{error:e}");
}

#[test]
fn windows_and_soft_caps_meet_the_reference() {
    let (file, offsets) = (file(), [0, TOKENS]);
    let x = file.f32("x").unwrap();
    for heads in [heads(), heads().with_softcap(1.5), heads().with_softcap(20.0).with_scale(0.5)] {
        let layer = layer(&file, heads, 1.0).unwrap();
        for graph in [Graph::causal(), Graph::window(15, 0), Graph::window(0, 0), Graph::full()] {
            let expected = reference(&file, heads, &graph);
            everywhere(|ctx| {
                let y = run(ctx, &layer, &x, &mut Inputs::new(&offsets, &graph));
                assert_close(&y, &expected, &format!("{heads:?} {graph:?} on {:?}", ctx));
            });
        }
    }
}

#[test]
fn steps_over_a_cache_give_the_bits_of_one_pass() {
    let file = file();
    let x = file.f32("x").unwrap();
    for heads in [heads(), heads().with_softcap(1.5)] {
        let layer = layer(&file, heads, 1.0).unwrap();
        for (graph, cache) in [
            (Graph::causal(), KvCache::new(&heads, 1, TOKENS)),
            (Graph::window(15, 0), KvCache::ring(&heads, 1, 16)),
        ] {
            let mut caches = [cache.unwrap()];
            everywhere(|ctx| {
                let whole = run(ctx, &layer, &x, &mut Inputs::new(&[0, TOKENS], &graph));
                caches[0].truncate(0, 0).unwrap();
                let mut done = 0;
                let mut steps = vec![];
                for rows in [33, 1, 1, 30, 1, 1, 1, 1, 1] {
                    let ends = [0, rows];
                    let mut inputs = Inputs { caches: &mut caches, ..Inputs::new(&ends, &graph) };
                    steps.extend(run(ctx, &layer, &x[done * D..(done + rows) * D], &mut inputs));
                    done += rows;
                }
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&steps), bits(&whole), "{heads:?} {graph:?} on {:?}", ctx);
            });
        }
    }
}
