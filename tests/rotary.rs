//! Rotary positions: alone, in the projection, in a layer, and over a cache.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, slack};
use common::data::Rng;
use common::model::{Model, NormKind, PlacementKind, ROTARY_BASE, ROTARY_POSITIONS, Shape, offsets};
use common::{executors, on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{
    Activation, Context, Error, Executor, Graph, Heads, Inputs, KeyStore, KvCache, Layer, MatMut, QueryRows,
    Rotary, RotaryPairs, Serial, Terms,
};

const PAIRS: [RotaryPairs; 2] = [RotaryPairs::Halves, RotaryPairs::Interleaved];

/// Inputs are of size 1, and a turn is two products and a sum.
const LIMIT: f64 = 3e-7;

/// Shapes whose heads are less than a panel, whole panels, several, and none of it; some turn in part only.
fn shapes() -> Vec<Shape> {
    let heads = |n, kv, dim| Heads::new(n, dim).unwrap().with_kv_heads(kv).unwrap();
    let shape = |heads: Heads, turned, pairs| Shape {
        heads,
        rotary: Some((pairs, turned)),
        ..Shape::new(1, heads.n_heads * 9, 1)
    };
    let all = [
        (heads(2, 2, 8), 8),
        (heads(4, 2, 64), 64),
        (heads(2, 1, 128), 128),
        (heads(2, 2, 128), 32),
        (heads(3, 3, 21), 20),
        (heads(4, 2, 80).with_value_dim(17).unwrap(), 80),
        (heads(2, 2, 1 + 2 * 37), 2),
    ];
    let pairs = |(heads, turned)| PAIRS.map(|pairs| shape(heads, turned, pairs));
    all.into_iter().flat_map(pairs).collect()
}

/// A decoder's layer: pre-norm, grouped heads, gated FFN.
fn decoder(pairs: RotaryPairs, turned: usize) -> Shape {
    Shape {
        heads: Heads::new(4, 20).unwrap().with_kv_heads(2).unwrap().with_value_dim(9).unwrap(),
        activation: Activation::Silu,
        norm: NormKind::RmsNorm,
        placement: PlacementKind::Pre,
        rotary: Some((pairs, turned)),
        gated: true,
        ..Shape::new(2, 20, 70)
    }
}

/// The layer over rows that continue those of the caches.
fn forward(ctx: Context<'_>, layer: &Layer, x: &[f32], inputs: &mut Inputs<'_>) -> Vec<f32> {
    let (d, tokens) = (layer.d_model(), x.len() / layer.d_model());
    let mut workspace = layer.workspace(tokens, inputs.offsets.len() - 1, ctx.members()).unwrap();
    let mut y = Guarded::new(tokens, d, x);
    layer.forward_with(ctx, y.view_mut(), inputs, &mut workspace).unwrap();
    y.values()
}

on_every_isa! {
    fn rows_meet_the_reference(isa) {
        let mut rng = Rng::new(1);
        let positions = [0, 999, 1, 513, 2];
        for pairs in PAIRS {
            for (n_heads, head_dim, turned) in
                [(1, 2, 2), (3, 8, 6), (2, 31, 30), (2, 32, 32), (1, 64, 34), (2, 128, 128), (1, 131, 98)]
            {
                let rotary = Rotary::new(pairs, turned, ROTARY_BASE, ROTARY_POSITIONS).unwrap();
                let x = rng.vec(5 * n_heads * head_dim, 1.0);
                let mut y = Guarded::new(5, n_heads * head_dim, &x);
                rotary.apply(serial(isa), head_dim, &positions, y.view_mut()).unwrap();
                let frequencies = r::rotary_frequencies(turned, ROTARY_BASE);
                let interleaved = pairs == RotaryPairs::Interleaved;
                let expected = r::rotary(&r::to_f64(&x), head_dim, &frequencies, interleaved, &positions);
                let what = format!("{pairs:?}, {n_heads} heads, {turned} of {head_dim}");
                assert_close(&y.values(), &expected, LIMIT * slack(isa), &what);
                // At position 0 nothing turns, and columns behind the turned ones never do.
                assert_bits(&y.values()[..n_heads * head_dim], &x[..n_heads * head_dim], &what);
                let kept = |x: &[f32]| -> Vec<f32> {
                    x.chunks(head_dim).flat_map(|head| &head[turned..]).copied().collect()
                };
                assert_bits(&kept(&y.values()), &kept(&x), &what);
            }
        }
    }

    fn nothing_to_turn(isa) {
        let rotary = Rotary::new(RotaryPairs::Halves, 2, ROTARY_BASE, 1).unwrap();
        rotary.apply(serial(isa), 2, &[], MatMut::contiguous(&mut [], 0, 4).unwrap()).unwrap();
        rotary.apply(serial(isa), 2, &[0; 3], MatMut::contiguous(&mut [], 3, 0).unwrap()).unwrap();
    }

    fn specials_reach_their_pair_only(isa) {
        for (pairs, partner) in [(RotaryPairs::Halves, 4), (RotaryPairs::Interleaved, 2)] {
            let rotary = Rotary::new(pairs, 8, ROTARY_BASE, 10).unwrap();
            let mut x = [1.0; 10];
            x[if partner == 4 { 0 } else { 3 }] = f32::NAN;
            rotary.apply(serial(isa), 10, &[7], MatMut::contiguous(&mut x, 1, 10).unwrap()).unwrap();
            let nan: Vec<usize> = (0..10).filter(|&i| x[i].is_nan()).collect();
            assert_eq!(nan, if partner == 4 { [0, 4] } else { [2, 3] }, "{pairs:?}");
        }
    }

    fn the_projection_meets_the_reference(isa) {
        let mut rng = Rng::new(2);
        for shape in shapes() {
            let model = Model::new(shape, &mut rng);
            let (projection, heads) = (model.projection(), shape.heads);
            for lens in [&[3][..], &[1, 0, 66, 2], &[130]] {
                let (tokens, offsets) = (lens.iter().sum::<usize>(), offsets(lens));
                let x = rng.vec(tokens * shape.d_model, 1.0);
                let mut keys = KeyStore::new(&heads, tokens, lens.len()).unwrap();
                let mut q = Guarded::unset(tokens, heads.query_cols());
                let mut out = Guarded::unset(tokens, heads.output_cols());
                let x_rows = Guarded::new(tokens, shape.d_model, &x);
                projection.forward(serial(isa), x_rows.view(), &offsets, q.view_mut(), &mut keys).unwrap();
                let queries = QueryRows::new(q.view(), &offsets);
                let (graph, terms) = (Graph::causal(), Terms::default());
                keys.attend(serial(isa), &heads, &queries, &graph, &terms, out.view_mut()).unwrap();
                let (want_q, want) = model.reference_attention(&r::to_f64(&x), &offsets, &graph);
                let what = format!("{shape:?} {lens:?}");
                assert_close(&q.values(), &want_q, 3e-6 * slack(isa), &what);
                assert_close(&out.values(), &want, 3e-6 * slack(isa), &what);
            }
        }
    }

    fn stored_keys_are_turned_as_rows_are(isa) {
        // A projection to a store, and rows that are projected, turned and appended by hand: bit for bit.
        let mut rng = Rng::new(3);
        for shape in shapes() {
            let model = Model::new(shape, &mut rng);
            let (heads, lens) = (shape.heads, [70, 1, 0, 64]);
            let (tokens, offsets) = (135, offsets(&lens));
            let x = Guarded::new(tokens, shape.d_model, &rng.vec(tokens * shape.d_model, 1.0));
            let mut keys = KeyStore::new(&heads, tokens, 4).unwrap();
            let mut q = Guarded::unset(tokens, heads.query_cols());
            model.projection().forward(serial(isa), x.view(), &offsets, q.view_mut(), &mut keys).unwrap();

            let places: Vec<usize> = lens.iter().flat_map(|&len| 0..len).collect();
            let [mut by_hand, mut k, v] = model.project(serial(isa), x.view());
            let (pairs, turned) = shape.rotary.unwrap();
            let rotary = Rotary::new(pairs, turned, ROTARY_BASE, ROTARY_POSITIONS).unwrap();
            for x in [&mut by_hand, &mut k] {
                rotary.apply(serial(isa), heads.head_dim, &places, x.view_mut()).unwrap();
            }
            assert_bits(&q.values(), &by_hand.values(), &format!("queries of {shape:?}"));
            let mut set = KeyStore::new(&heads, tokens, 4).unwrap();
            set.set(Context::serial(), k.view(), v.view(), &offsets).unwrap();
            let [stored, set] = [&keys, &set].map(|keys| {
                let mut out = Guarded::unset(tokens, heads.output_cols());
                let queries = QueryRows::new(q.view(), &offsets);
                let (graph, terms) = (Graph::full(), Terms::default());
                keys.attend(serial(isa), &heads, &queries, &graph, &terms, out.view_mut()).unwrap();
                out.values()
            });
            assert_bits(&stored, &set, &format!("keys of {shape:?}"));
        }
    }

    fn a_decoder_layer_meets_the_reference(isa) {
        let mut rng = Rng::new(4);
        for (pairs, turned) in [(PAIRS[0], 20), (PAIRS[1], 20), (PAIRS[0], 6), (PAIRS[1], 14)] {
            let model = Model::new(decoder(pairs, turned), &mut rng);
            let layer = model.layer();
            for lens in [&[9, 1, 0, 4][..], &[130, 3]] {
                let (tokens, offsets) = (lens.iter().sum::<usize>(), offsets(lens));
                let x = rng.vec(tokens * 40, 1.5);
                for graph in [Graph::causal(), Graph::window(5, 0)] {
                    let expected = model.reference(&r::to_f64(&x), &offsets, &graph);
                    let executor = executors::Threads(2);
                    for executor in [&Serial as &dyn Executor, &executor] {
                        let ctx = Context::new(isa, executor);
                        let actual = forward(ctx, &layer, &x, &mut Inputs::new(&offsets, &graph));
                        let what = format!("{pairs:?} {turned} {lens:?} {graph:?} {}", ctx.members());
                        assert_close(&actual, &expected, 2e-5 * slack(isa), &what);
                    }
                }
            }
        }
    }

    fn decoding_gives_the_bits_of_prefill(isa) {
        // Two sequences, which continue by different numbers of tokens in each call; on two threads few rows are split by columns.
        let mut rng = Rng::new(5);
        for (pairs, turned) in [(PAIRS[0], 20), (PAIRS[1], 14)] {
            let shape = decoder(pairs, turned);
            let layer = Model::new(shape, &mut rng).layer();
            let sequences = [rng.vec(150 * 40, 1.0), rng.vec(90 * 40, 1.0)];
            let graph = Graph::causal();
            let whole = |x: &Vec<f32>| {
                forward(serial(isa), &layer, x, &mut Inputs::new(&[0, x.len() / 40], &graph))
            };
            let expected = sequences.each_ref().map(whole);
            for members in [1, 2] {
                let executor = executors::Threads(members);
                let ctx = Context::new(isa, &executor);
                let mut caches = [KvCache::new(&shape.heads, 2, 150).unwrap()];
                let mut done = [0, 0];
                for step in [[70, 3], [1, 1], [0, 64], [1, 1], [60, 0], [17, 20], [1, 1]] {
                    let rows = |b: usize| done[b] * 40..(done[b] + step[b]) * 40;
                    let x = [&sequences[0][rows(0)], &sequences[1][rows(1)]].concat();
                    let ends = offsets(&step);
                    let mut inputs = Inputs { caches: &mut caches, ..Inputs::new(&ends, &graph) };
                    let y = forward(ctx, &layer, &x, &mut inputs);
                    let want = [&expected[0][rows(0)], &expected[1][rows(1)]].concat();
                    assert_bits(&y, &want, &format!("{step:?} from {done:?}, {members} threads"));
                    done = [done[0] + step[0], done[1] + step[1]];
                }
                assert_eq!(done, [150, 90]);
            }
        }
    }

    fn explicit_positions(isa) {
        let mut rng = Rng::new(6);
        for pairs in PAIRS {
            let shape = decoder(pairs, 20);
            let model = Model::new(shape, &mut rng);
            let layer = model.layer();
            let x = rng.vec(75 * 40, 1.0);
            let (ends, graph) = ([0, 70, 75], Graph::causal());
            let at = |positions: Option<&[usize]>| {
                forward(serial(isa), &layer, &x, &mut Inputs { positions, ..Inputs::new(&ends, &graph) })
            };
            // Those of the places change nothing.
            let places: Vec<usize> = (0..70).chain(0..5).collect();
            assert_bits(&at(Some(&places)), &at(None), "places");
            // Scores depend on distances only, so a shift changes no more than roundings, and a stretch does.
            let shifted: Vec<usize> = places.iter().map(|p| p + 321).collect();
            assert_close(&at(Some(&shifted)), &r::to_f64(&at(None)), 1e-4, "shifted");
            let stretched: Vec<usize> = places.iter().map(|p| 3 * p).collect();
            let largest = at(Some(&stretched)).iter().zip(at(None)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(largest > 1e-2, "{largest}");
            // Over a cache too: the second half of a sequence at its own positions.
            let mut caches = [KvCache::new(&shape.heads, 1, 70).unwrap()];
            let x = &x[..70 * 40];
            let mut run = |rows: std::ops::Range<usize>| {
                let ends = [0, rows.len()];
                let positions = Some(&stretched[rows.clone()]);
                let mut inputs = Inputs { positions, caches: &mut caches, ..Inputs::new(&ends, &graph) };
                forward(serial(isa), &layer, &x[rows.start * 40..rows.end * 40], &mut inputs)
            };
            let halves = [run(0..33), run(33..70)].concat();
            assert_bits(&halves, &at(Some(&stretched))[..70 * 40], "over a cache");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let halves = RotaryPairs::Halves;
    let new = |dim, base, positions| Rotary::new(halves, dim, base, positions).unwrap_err();
    assert_eq!(new(0, 1e4, 10), Error::ZeroDim { arg: "rotary_dim" });
    assert_eq!(new(7, 1e4, 10), Error::NotDivisible { arg: "rotary_dim", actual: 7, by: 2 });
    assert_eq!(new(8, 1e4, 0), Error::ZeroDim { arg: "positions" });
    for base in [0.0, -1.0, 0.999, f64::NAN, f64::INFINITY] {
        assert_eq!(new(8, base, 10).to_string(), "base: expected a finite number of at least 1");
    }
    assert_eq!(new(8, 1e4, usize::MAX), Error::Overflow { arg: "positions" });
    for frequency in [f64::NAN, f64::INFINITY, f64::MAX] {
        let error = Rotary::with_frequencies(halves, &[1.0, frequency], 10).unwrap_err();
        assert_eq!(error.to_string(), "frequencies: expected numbers whose angles are finite");
    }
    let none = Rotary::with_frequencies(halves, &[], 10).unwrap_err();
    assert_eq!(none, Error::ZeroDim { arg: "frequencies.len()" });

    let rotary = Rotary::new(halves, 8, 1e4, 10).unwrap();
    assert_eq!((rotary.rotary_dim(), rotary.positions()), (8, 10));
    let mut y = Guarded::unset(3, 16);
    let mut apply = |head_dim, positions: &[usize]| {
        rotary.apply(Context::serial(), head_dim, positions, y.view_mut()).unwrap_err()
    };
    assert_eq!(apply(0, &[0; 3]), Error::ZeroDim { arg: "head_dim" });
    assert_eq!(apply(4, &[0; 3]), Error::TooLarge { arg: "rotary_dim", max: 4, actual: 8 });
    assert_eq!(apply(9, &[0; 3]), Error::NotDivisible { arg: "x.cols", actual: 16, by: 9 });
    assert_eq!(apply(8, &[0; 2]), Error::Size { arg: "positions.len()", expected: 3, actual: 2 });
    assert_eq!(apply(8, &[0, 9, 10]), Error::TooLarge { arg: "position", max: 9, actual: 10 });
    y.assert_unset();

    let model = Model::new(Shape::new(2, 6, 12), &mut Rng::new(7));
    let wide = model.projection().with_rotary(rotary).unwrap_err();
    assert_eq!(wide.to_string(), "rotary_dim: expected at most 6, got 8");
}

#[test]
fn positions_beyond_the_table_are_refused_before_anything_is_written() {
    let mut rng = Rng::new(8);
    let shape = decoder(RotaryPairs::Halves, 20);
    let model = Model::new(shape, &mut rng);
    let (layer, ctx, graph) = (model.layer(), Context::serial(), Graph::causal());
    let beyond = |actual| Err(Error::TooLarge { arg: "position", max: ROTARY_POSITIONS - 1, actual });
    let x = rng.vec(1001 * 40, 1.0);

    // A projection and a layer of a sequence that is too long.
    let (rows, mut q) = (Guarded::new(1001, 40, &x), Guarded::unset(1001, 80));
    let mut keys = KeyStore::new(&shape.heads, 1001, 1).unwrap();
    let result = model.projection().forward(ctx, rows.view(), &[0, 1001], q.view_mut(), &mut keys);
    assert_eq!(result, beyond(1000));
    q.assert_unset();
    let mut workspace = layer.workspace(1001, 2, 1).unwrap();
    let mut run = |tokens: usize, inputs: &mut Inputs<'_>| {
        let mut y = Guarded::new(tokens, 40, &x[..tokens * 40]);
        let result = layer.forward_with(ctx, y.view_mut(), inputs, &mut workspace);
        if result.is_err() {
            assert_bits(&y.values(), &x[..tokens * 40], "written");
        }
        result
    };
    assert_eq!(run(1001, &mut Inputs::new(&[0, 1001], &graph)), beyond(1000));
    // In two sequences they fit.
    run(1001, &mut Inputs::new(&[0, 1000, 1001], &graph)).unwrap();

    // A cache that has room, but whose next token has no angle.
    let mut caches = [KvCache::ring(&shape.heads, 2, 10).unwrap()];
    let (ends, window) = ([0, 250, 252], Graph::window(9, 0));
    for _ in 0..4 {
        run(252, &mut Inputs { caches: &mut caches, ..Inputs::new(&ends, &window) }).unwrap();
    }
    let full = run(2, &mut Inputs { caches: &mut caches, ..Inputs::new(&[0, 1, 2], &window) });
    assert_eq!((full, caches[0].len(0), caches[0].len(1)), (beyond(1000), 1000, 8));

    // Explicit positions.
    let with = |positions| Inputs { positions: Some(positions), ..Inputs::new(&[0, 3, 3], &graph) };
    assert_eq!(run(3, &mut with(&[0, 1000, 1])), beyond(1000));
    assert_eq!(
        run(3, &mut with(&[0, 1])),
        Err(Error::Size { arg: "positions.len()", expected: 3, actual: 2 })
    );
    run(3, &mut with(&[5, 999, 5])).unwrap();
}

#[test]
fn scores_depend_on_the_distance_only() {
    let rotary = Rotary::new(RotaryPairs::Interleaved, 32, 1e4, 5000).unwrap();
    let mut rng = Rng::new(9);
    let (q, k) = (rng.vec(32, 1.0), rng.vec(32, 1.0));
    let dot = |p: usize, j: usize| {
        let mut rows = [q.clone(), k.clone()].concat();
        let view = MatMut::contiguous(&mut rows, 2, 32).unwrap();
        rotary.apply(Context::serial(), 32, &[p, j], view).unwrap();
        (0..32).map(|i| f64::from(rows[i]) * f64::from(rows[32 + i])).sum::<f64>()
    };
    for shift in [1, 100, 4000] {
        assert!((dot(17 + shift, 3 + shift) - dot(17, 3)).abs() < 3e-6, "{shift}");
    }
    assert!((dot(17, 3) - dot(18, 3)).abs() > 1e-3);
    // The pairing is another order of columns, no more.
    let halves = Rotary::new(RotaryPairs::Halves, 32, 1e4, 5000).unwrap();
    let (mut a, mut b) = (q.clone(), [0.0; 32]);
    for i in 0..16 {
        (b[i], b[16 + i]) = (q[2 * i], q[2 * i + 1]);
    }
    rotary.apply(Context::serial(), 32, &[77], MatMut::contiguous(&mut a, 1, 32).unwrap()).unwrap();
    halves.apply(Context::serial(), 32, &[77], MatMut::contiguous(&mut b, 1, 32).unwrap()).unwrap();
    let back: Vec<f32> = (0..32).map(|i| b[i % 2 * 16 + i / 2]).collect();
    assert_bits(&a, &back, "another pairing");
}
