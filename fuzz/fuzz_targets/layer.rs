#![no_main]
//! A whole layer: any heads, norms, places of them, rotary, graph and ragged batch; a second call with the same workspace, and the same
//! layer with its batch norms folded. With a causal graph also in two calls over a cache.

use laneformer::reference as r;
use laneformer::{Context, Graph, Heads, Inputs, KvCache, Layer, RotaryPairs};
use laneformer_fuzz::data::Rng;
use laneformer_fuzz::model::{ACTIVATIONS, Model, NormKind, PlacementKind, Shape, offsets};
use laneformer_fuzz::{assert_same, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

const NORMS: [NormKind; 4] =
    [NormKind::LayerNorm, NormKind::LayerNormWithoutBias, NormKind::RmsNorm, NormKind::BatchNorm];
const PLACEMENTS: [PlacementKind; 4] =
    [PlacementKind::Post, PlacementKind::DeepNorm, PlacementKind::Pre, PlacementKind::Sandwich];

fuzz_target!(|input: ([u8; 6], [u8; 3], u8, [u8; 4], [Option<u8>; 2], bool, u64)| {
    let ([groups, kv_heads, dim, value_dim, d_model, d_ff], lens, split, kinds, sides, gated, seed) = input;
    let n_kv = usize::from(kv_heads % 3) + 1;
    let dim = usize::from(dim % 33) + 1;
    let heads = Heads::new(n_kv * (usize::from(groups % 3) + 1), dim).unwrap();
    let heads = heads.with_kv_heads(n_kv).unwrap().with_value_dim(usize::from(value_dim % 33) + 1).unwrap();
    let [norm, placement, activation, rotary] = kinds.map(usize::from);
    let pairs = [RotaryPairs::Halves, RotaryPairs::Interleaved][rotary % 2];
    let shape = Shape {
        d_model: usize::from(d_model % 70) + 1,
        heads,
        norm: NORMS[norm % 4],
        placement: PLACEMENTS[placement % 4],
        activation: ACTIVATIONS[activation % ACTIVATIONS.len()],
        rotary: (rotary > 127 && dim > 1).then(|| (pairs, (rotary / 2 % (dim / 2) + 1) * 2)),
        gated,
        ..Shape::new(1, 1, usize::from(d_ff) + 1)
    };
    let lens = lens.map(|len| usize::from(len % 100));
    let (ends, tokens) = (offsets(&lens), lens.iter().sum::<usize>());
    let limit = |side: Option<u8>| side.map_or(usize::MAX, usize::from);
    let graph = Graph::window(limit(sides[0]), limit(sides[1]));

    let mut rng = Rng::new(seed);
    let model = Model::new(shape, &mut rng);
    let x = rng.vec(tokens * shape.d_model, 1.5);
    let expected = model.reference(&r::to_f64(&x), &ends, &graph);
    // A norm of few channels divides by a deviation that may be small.
    let close = if shape.d_model < 16 && shape.norm != NormKind::BatchNorm { 1e-2 } else { 5e-5 };
    let check = |layer: &Layer| {
        everywhere(
            &expected,
            |_, e| close * e.abs().max(1.0),
            |ctx| {
                let mut workspace = layer.workspace(tokens, 3, ctx.members()).unwrap();
                let [first, second] = [(); 2].map(|()| {
                    let mut y = guarded(tokens, shape.d_model, sides[0].unwrap_or(7), &x);
                    layer.forward(ctx, y.view_mut(), &ends, &graph, &mut workspace).unwrap();
                    y.values()
                });
                assert_same(&second, &first, "with a used workspace");
                if sides[1] == Some(0) {
                    let split = lens.map(|len| len * usize::from(split) / 255);
                    let calls = in_two_calls(ctx, layer, &heads, &x, (&lens, &split), &graph);
                    assert_same(&calls, &first, "in two calls");
                }
                first
            },
        );
    };
    let layer = model.layer();
    check(&layer);
    check(&layer.fold_batchnorm().unwrap());
});

/// The first tokens of each sequence, then the others.
fn in_two_calls(
    ctx: Context<'_>,
    layer: &Layer,
    heads: &Heads,
    x: &[f32],
    (lens, split): (&[usize; 3], &[usize; 3]),
    graph: &Graph,
) -> Vec<f32> {
    let (d, ends) = (layer.d_model(), offsets(lens));
    let mut caches = [KvCache::new(heads, 3, 100).unwrap()];
    let mut y = vec![0.0; x.len()];
    for (from, to) in [([0; 3], *split), (*split, *lens)] {
        let part = |s: usize| (ends[s] + from[s]) * d..(ends[s] + to[s]) * d;
        let offsets = offsets(&[0, 1, 2].map(|s| to[s] - from[s]));
        let values: Vec<f32> = (0..3).flat_map(|s| x[part(s)].to_vec()).collect();
        let mut rows = guarded(offsets[3], d, 1, &values);
        let mut workspace = layer.workspace(offsets[3], 3, ctx.members()).unwrap();
        let mut inputs = Inputs { caches: &mut caches, ..Inputs::new(&offsets, graph) };
        layer.forward_with(ctx, rows.view_mut(), &mut inputs, &mut workspace).unwrap();
        let values = rows.values();
        for s in 0..3 {
            y[part(s)].copy_from_slice(&values[offsets[s] * d..offsets[s + 1] * d]);
        }
    }
    y
}
