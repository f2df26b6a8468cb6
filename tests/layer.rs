//! The layer, the stack and the FFN against the f64 reference.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, slack};
use common::data::Rng;
use common::model::{Map, Model, NormKind, PlacementKind, Shape, offsets};
use common::{executors, on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{
    Activation, Affine, Bias, Bits, Context, CrossAttention, Epilogue, Graph, Heads, Inputs, Isa, KeyStore,
    KvCache, Layer, Linear, MatMut, MatRef, Norm, Placement, QueryRows, Relative, RelativeTable, SegmentTerm,
    SelfAttention, Stack, SubLayer, Terms, Workspace,
};

/// Absolute error of a layer's outputs, which are of size 1 and pass some ten sums of up to a thousand products.
const LIMIT: f64 = 2e-5;

/// Runs the layer in place on a guarded buffer.
fn run(ctx: Context<'_>, layer: &Layer, x: &[f32], lens: &[usize], graph: &Graph) -> Vec<f32> {
    let offsets = offsets(lens);
    let tokens = *offsets.last().unwrap();
    let mut workspace = layer.workspace(tokens, lens.len(), ctx.members()).unwrap();
    let mut y = Guarded::new(tokens, layer.d_model(), x);
    layer.forward(ctx, y.view_mut(), &offsets, graph, &mut workspace).unwrap();
    y.values()
}

fn check(ctx: Context<'_>, shape: Shape, lens: &[usize], graph: &Graph) {
    let mut rng = Rng::new(lens.len() as u64);
    let model = Model::new(shape, &mut rng);
    let x = rng.vec(lens.iter().sum::<usize>() * shape.d_model, 1.5);
    let expected = model.reference(&r::to_f64(&x), &offsets(lens), graph);
    let actual = run(ctx, &model.layer(), &x, lens, graph);
    let what = format!("{:?} {:?} {shape:?} {lens:?} {graph:?}", ctx.isa(), ctx.members());
    assert_close(&actual, &expected, LIMIT * slack(ctx.isa()), &what);
}

const PLACEMENTS: [PlacementKind; 4] =
    [PlacementKind::Post, PlacementKind::DeepNorm, PlacementKind::Pre, PlacementKind::Sandwich];
const NORMS: [NormKind; 4] =
    [NormKind::LayerNorm, NormKind::LayerNormWithoutBias, NormKind::RmsNorm, NormKind::BatchNorm];

on_every_isa! {
    fn every_norm_in_every_place(isa) {
        for placement in PLACEMENTS {
            for norm in NORMS {
                let shape = Shape { norm, placement, ..Shape::new(2, 20, 70) };
                check(serial(isa), shape, &[3, 0, 17], &Graph::full());
            }
        }
    }

    fn every_norm_in_every_place_with_helpers(isa) {
        for (_, executor) in executors::of(2) {
            for placement in PLACEMENTS {
                for norm in NORMS {
                    let shape = Shape { norm, placement, ..Shape::new(2, 20, 131) };
                    check(Context::new(isa, &*executor), shape, &[3, 0, 17], &Graph::full());
                }
            }
        }
    }

    fn batch_norms_folded_into_weights(isa) {
        let mut rng = Rng::new(9);
        for placement in PLACEMENTS {
            for (norm, gated) in [(NormKind::BatchNorm, false), (NormKind::BatchNorm, true), (NormKind::RmsNorm, true)] {
                let heads = Heads::new(4, 20).unwrap().with_kv_heads(2).unwrap().with_value_dim(7).unwrap();
                let shape = Shape { norm, placement, heads, gated, ..Shape::new(2, 17, 131) };
                let model = Model::new(shape, &mut rng);
                let folded = model.layer().fold_batchnorm().unwrap();
                for lens in [&[3, 0, 17][..], &[130]] {
                    let x = rng.vec(lens.iter().sum::<usize>() * shape.d_model, 1.5);
                    let expected = model.reference(&r::to_f64(&x), &offsets(lens), &Graph::causal());
                    let what = format!("{placement:?} {norm:?} {gated} {lens:?}");
                    let alone = run(serial(isa), &folded, &x, lens, &Graph::causal());
                    assert_close(&alone, &expected, LIMIT * slack(isa), &what);
                    let executor = executors::Threads(2);
                    let together = run(Context::new(isa, &executor), &folded, &x, lens, &Graph::causal());
                    if isa.keeps_bits() {
                        assert_bits(&together, &alone, &what);
                    }
                    // Behind the residual, or of another kind, it stays.
                    let stays = matches!(placement, PlacementKind::Post | PlacementKind::DeepNorm);
                    let plain = run(serial(isa), &model.layer(), &x, lens, &Graph::causal());
                    assert_eq!(plain == alone, stays || norm != NormKind::BatchNorm, "{what}");
                }
            }
        }
    }

    fn batch_norms_around_cross_attention_folded_into_weights(isa) {
        let mut rng = Rng::new(10);
        let heads = Heads::new(2, 9).unwrap().with_value_dim(5).unwrap();
        let [q, k, v, out] = [(18, 20), (18, 11), (10, 11), (20, 10)].map(|(n, k)| Map::new(n, k, &mut rng));
        let (mut affine, (source, x)) = (
            || Affine::new(rng.vec(20, 1.0), rng.vec(20, 0.5)).unwrap(),
            (Rng::new(11).vec(7 * 11, 1.0), Rng::new(12).vec(30 * 20, 1.0)),
        );
        let (before, after) = (affine(), affine());
        let layer = || {
            let attention =
                CrossAttention::new(q.packed(), k.packed(), v.packed(), out.packed(), heads).unwrap();
            let (before, after) = (Norm::BatchNorm(before.clone()), Norm::BatchNorm(after.clone()));
            let placement = Placement::Sandwich { before, after };
            Layer::new(vec![SubLayer::cross_attention(attention, placement).unwrap()]).unwrap()
        };
        let forward = |layer: &Layer| {
            let cross = layer.sub_layers()[0].as_cross_attention().unwrap();
            let source = MatRef::contiguous(&source, 7, 11).unwrap();
            let keys = [cross.keys(serial(isa), source, &[0, 3, 7]).unwrap()];
            let (offsets, graph) = ([0, 10, 30], Graph::full());
            let mut inputs = Inputs { sources: &keys, ..Inputs::new(&offsets, &graph) };
            let mut y = Guarded::new(30, 20, &x);
            let mut workspace = layer.workspace(30, 2, 1).unwrap();
            layer.forward_with(serial(isa), y.view_mut(), &mut inputs, &mut workspace).unwrap();
            y.values()
        };
        let (plain, folded) = (forward(&layer()), forward(&layer().fold_batchnorm().unwrap()));
        assert_close(&folded, &r::to_f64(&plain), LIMIT * slack(isa), "cross-attention");
        assert!(plain != folded);
    }

    fn queries_of_a_source_stand_behind_what_a_cache_holds(isa) {
        let mut rng = Rng::new(15);
        let heads = Heads::new(2, 9).unwrap();
        let shape = Shape { heads, ..Shape::new(2, 9, 30) };
        let [q, k, v, out] = [18; 4].map(|n| Map::new(n, 18, &mut rng));
        let attention = SelfAttention::new(Model::new(shape, &mut rng).projection(), out.packed()).unwrap();
        let cross = CrossAttention::new(q.packed(), k.packed(), v.packed(), out.packed(), heads).unwrap();
        let layer = Layer::new(vec![
            SubLayer::self_attention(attention, Placement::Plain).unwrap(),
            SubLayer::cross_attention(cross, Placement::Plain).unwrap(),
        ])
        .unwrap();
        let (x, source) = (rng.vec(16 * 18, 1.0), rng.vec(26 * 18, 1.0));
        let cross = layer.sub_layers()[1].as_cross_attention().unwrap();
        let source = MatRef::contiguous(&source, 26, 18).unwrap();
        let sources = [cross.keys(serial(isa), source, &[0, 12, 26]).unwrap()];
        let of_cache = layer.sub_layers()[0].as_self_attention().unwrap().heads();
        assert!(layer.sub_layers()[1].as_self_attention().is_none());
        let mut workspace = layer.workspace(16, 2, 1).unwrap();
        for source_graph in [Graph::causal(), Graph::window(2, 1), Graph::full()] {
            let mut forward = |x: &[f32], offsets: &[usize], caches: &mut [KvCache]| {
                let graph = Graph::causal();
                let mut inputs = Inputs {
                    caches,
                    sources: &sources,
                    source_graph: &source_graph,
                    ..Inputs::new(offsets, &graph)
                };
                let mut y = Guarded::new(x.len() / 18, 18, x);
                layer.forward_with(serial(isa), y.view_mut(), &mut inputs, &mut workspace).unwrap();
                y.values()
            };
            // Sequences of 6 and 10, and in calls of 4 and 3, then 2 and 7 tokens.
            let at_once = forward(&x, &[0, 6, 16], &mut []);
            let part = |from: usize, to: usize| &x[from * 18..to * 18];
            let mut caches = [KvCache::new(of_cache, 2, 10).unwrap()];
            let first = forward(&[part(0, 4), part(6, 9)].concat(), &[0, 4, 7], &mut caches);
            let second = forward(&[part(4, 6), part(9, 16)].concat(), &[0, 2, 9], &mut caches);
            let (first, second) = (first.split_at(4 * 18), second.split_at(2 * 18));
            let calls = [first.0, second.0, first.1, second.1].concat();
            assert_bits(&calls, &at_once, &format!("{source_graph:?}"));
        }
    }

    fn a_source_with_terms_is_the_attention_between_its_products(isa) {
        let mut rng = Rng::new(16);
        let heads = Heads::new(4, 20).unwrap().with_kv_heads(2).unwrap().with_value_dim(9).unwrap();
        let [q, k, v, out] = [(80, 17), (40, 11), (18, 11), (17, 36)].map(|(n, k)| Map::new(n, k, &mut rng));
        let cross = CrossAttention::new(q.packed(), k.packed(), v.packed(), out.packed(), heads).unwrap();
        let layer = Layer::new(vec![SubLayer::cross_attention(cross, Placement::Plain).unwrap()]).unwrap();
        let cross = layer.sub_layers()[0].as_cross_attention().unwrap();
        // Rows that stand one after another, anywhere, and before the first key.
        let (offsets, source_offsets) = ([0, 70, 70, 75], [0, 131, 135, 138]);
        let (tokens, of_source) = (75, 138);
        let mut positions: Vec<isize> = (61..131).collect();
        positions.extend([2, 3, -1, 2, 0]);
        let (x, source) = (rng.vec(tokens * 17, 1.0), rng.vec(of_source * 11, 1.0));
        let (x_rows, source) = (MatRef::contiguous(&x, tokens, 17), MatRef::contiguous(&source, of_source, 11));
        let (x_rows, source) = (x_rows.unwrap(), source.unwrap());
        let [u, w, s] = [(); 3].map(|()| rng.vec(80, 0.5));
        let (r, e, bias) = (rng.vec(150 * 80, 0.5), rng.vec(2 * 80, 0.5), rng.vec(4 * 131, 0.5));
        let table = RelativeTable::new(MatRef::contiguous(&r, 150, 80).unwrap(), -10, 4).unwrap();
        let same = Bits::dense([3, 1, 70, 131], |_, _, i, j| (i + j) % 3 == 0).unwrap();
        let terms = Terms {
            bias: Some(Bias::new(&bias, [1, 4, 1, 131]).unwrap()),
            relative: Some(Relative { u: &u, w: &w, table: &table }),
            segment: Some(SegmentTerm { s: &s, e: &e, same: &same }),
        };
        let project = |linear: &Linear, x: MatRef<'_>, epilogue: &Epilogue<'_>| {
            let mut y = Guarded::new(x.rows(), linear.out_features(), &vec![0.0; x.rows() * linear.out_features()]);
            linear.forward(serial(isa), x, epilogue, y.view_mut()).unwrap();
            y.values()
        };
        let [q, k, v] = cross.projections();
        let (k, v) = (project(k, source, &Epilogue::NONE), project(v, source, &Epilogue::NONE));
        let mut store = KeyStore::new(cross.heads(), of_source, 3).unwrap();
        let (k, v) = (MatRef::contiguous(&k, of_source, 40), MatRef::contiguous(&v, of_source, 18));
        store.set(serial(isa), k.unwrap(), v.unwrap(), &source_offsets).unwrap();
        let q = project(q, x_rows, &Epilogue::NONE);
        let queries = QueryRows::new(MatRef::contiguous(&q, tokens, 80).unwrap(), &offsets).at(&positions);
        for graph in [Graph::causal(), Graph::window(9, 30), Graph::full()] {
            let mut attended = Guarded::new(tokens, 36, &vec![0.0; tokens * 36]);
            store.attend(serial(isa), &heads, &queries, &graph, &terms, attended.view_mut()).unwrap();
            let residual = Epilogue::NONE.with_residual(1.0, x_rows);
            let attended = attended.values();
            let expected = project(cross.out(), MatRef::contiguous(&attended, tokens, 36).unwrap(), &residual);
            for (name, executor) in executors::of(2).into_iter().chain(executors::of(1)) {
                let ctx = Context::new(isa, &*executor);
                // Room for more, and something there already.
                let mut keys = KeyStore::new(cross.heads(), 200, 5).unwrap();
                for offsets in [&[0, 138][..], &source_offsets] {
                    cross.set_keys(ctx, source, offsets, &mut keys).unwrap();
                }
                let mut inputs = Inputs {
                    sources: std::slice::from_ref(&keys),
                    source_graph: &graph,
                    source_terms: terms,
                    source_positions: Some(&positions),
                    ..Inputs::new(&offsets, &graph)
                };
                let mut y = Guarded::new(tokens, 17, &x);
                let mut workspace = layer.workspace(tokens, 3, ctx.members()).unwrap();
                layer.forward_with(ctx, y.view_mut(), &mut inputs, &mut workspace).unwrap();
                if isa.keeps_bits() {
                    assert_bits(&y.values(), &expected, &format!("{name} {graph:?}"));
                } else {
                    assert_close(&y.values(), &r::to_f64(&expected), LIMIT * slack(isa), &format!("{name} {graph:?}"));
                }
            }
        }
    }

    fn keys_of_a_source_are_its_projections(isa) {
        // Enough work for several members, who take one tile of rows by heads, or several tiles.
        let mut rng = Rng::new(18);
        let heads = Heads::new(8, 16).unwrap().with_value_dim(32).unwrap();
        let [q, k, v, out] = [(128, 20), (128, 256), (256, 256), (20, 256)].map(|(n, k)| Map::new(n, k, &mut rng));
        let cross = CrossAttention::new(q.packed(), k.packed(), v.packed(), out.packed(), heads).unwrap();
        for offsets in [&[0, 64][..], &[0, 7, 7, 64], &[0, 131, 150, 300]] {
            let tokens = offsets[offsets.len() - 1];
            let source = rng.vec(tokens * 256, 1.0);
            let source = MatRef::contiguous(&source, tokens, 256).unwrap();
            let [_, k, v] = cross.projections();
            let [k, v] = [k, v].map(|linear| {
                let mut y = vec![0.0; tokens * linear.out_features()];
                let out = MatMut::contiguous(&mut y, tokens, linear.out_features()).unwrap();
                linear.forward(serial(isa), source, &Epilogue::NONE, out).unwrap();
                y
            });
            let (k, v) = (MatRef::contiguous(&k, tokens, 128).unwrap(), MatRef::contiguous(&v, tokens, 256).unwrap());
            let mut store = KeyStore::new(&heads, tokens, offsets.len() - 1).unwrap();
            store.set(serial(isa), k, v, offsets).unwrap();
            let queries = rng.vec(tokens * 128, 1.0);
            let queries = QueryRows::new(MatRef::contiguous(&queries, tokens, 128).unwrap(), offsets);
            let attend = |keys: &KeyStore| {
                let mut y = Guarded::new(tokens, 256, &vec![0.0; tokens * 256]);
                let (graph, terms) = (Graph::full(), Terms::default());
                keys.attend(serial(isa), &heads, &queries, &graph, &terms, y.view_mut()).unwrap();
                y.values()
            };
            let expected = attend(&store);
            for members in [1, 2, 3] {
                for (name, executor) in executors::of(members) {
                    let keys = cross.keys(Context::new(isa, &*executor), source, offsets).unwrap();
                    if isa.keeps_bits() {
                        assert_bits(&attend(&keys), &expected, &format!("{name} {offsets:?}"));
                    }
                }
            }
        }
    }

    fn a_workspace_that_grows(isa) {
        let mut rng = Rng::new(17);
        let model = |n_heads, head_dim, d_ff, rng: &mut Rng| Model::new(Shape::new(n_heads, head_dim, d_ff), rng);
        let (small, wide) = (model(2, 9, 20, &mut rng), model(5, 30, 131, &mut rng));
        let (small, wide) = (small.layer(), wide.layer());
        let mut workspace = Workspace::default();
        let executor = executors::Threads(2);
        let ctx = Context::new(isa, &executor);
        let reserve = |layer: &Layer, tokens, segments, members, workspace: &mut Workspace| {
            workspace.reserve(std::slice::from_ref(layer), tokens, segments, members).unwrap();
            workspace.bytes()
        };
        let mut forward = |layer: &Layer, lens: &[usize], workspace: &mut Workspace| {
            let (offsets, tokens) = (offsets(lens), lens.iter().sum::<usize>());
            let x = rng.vec(tokens * layer.d_model(), 1.0);
            let expected = run(serial(isa), layer, &x, lens, &Graph::full());
            let mut y = Guarded::new(tokens, layer.d_model(), &x);
            layer.forward(ctx, y.view_mut(), &offsets, &Graph::full(), workspace).unwrap();
            if isa.keeps_bits() {
                assert_bits(&y.values(), &expected, &format!("{lens:?}"));
            }
        };
        for (layer, lens) in [
            (&small, &[3][..]),
            (&wide, &[3]),
            (&small, &[70, 1]),
            (&wide, &[1, 0, 2]),
            (&small, &[40, 31]),
            (&wide, &[131]),
        ] {
            let tokens = lens.iter().sum();
            let bytes = reserve(layer, tokens, lens.len(), ctx.members(), &mut workspace);
            forward(layer, lens, &mut workspace);
            // What fits leaves it as it is.
            assert_eq!(reserve(layer, 1, 1, 1, &mut workspace), bytes);
        }
        // What fitted before still does, also a batch of the larger size.
        let mut workspace = wide.workspace(3, 1, 2).unwrap();
        reserve(&small, 71, 2, 2, &mut workspace);
        forward(&wide, &[3], &mut workspace);
        forward(&wide, &[70, 1], &mut workspace);
        forward(&small, &[71], &mut workspace);
        reserve(&wide, 131, 3, 1, &mut workspace);
        // As large as both need, and no larger.
        let both = Stack::new(vec![wide]).unwrap().workspace(131, 3, 2).unwrap();
        assert!(workspace.bytes() <= both.bytes());
    }

    fn position_embeddings(isa) {
        // Added in front of queries and keys, not of values, and behind the norm.
        let mut rng = Rng::new(13);
        let heads = Heads::new(4, 20).unwrap().with_kv_heads(2).unwrap().with_value_dim(9).unwrap();
        for placement in PLACEMENTS {
            let shape = Shape { placement, heads, ..Shape::new(3, 17, 70) };
            let model = Model::new(shape, &mut rng);
            let (layer, d) = (model.layer(), shape.d_model);
            for lens in [&[3, 0, 17][..], &[130, 70]] {
                let (tokens, offsets) = (lens.iter().sum::<usize>(), offsets(lens));
                let (x, added) = (rng.vec(tokens * d, 1.5), rng.vec(tokens * d, 1.5));
                let graph = Graph::causal();
                let expected = model.reference_with(&r::to_f64(&x), &offsets, &graph, &r::to_f64(&added));
                let added = Guarded::new(tokens, d, &added);
                let forward = |ctx: Context<'_>, caches: &mut [KvCache]| {
                    let mut inputs = Inputs {
                        caches,
                        position_embedding: Some(added.view()),
                        ..Inputs::new(&offsets, &graph)
                    };
                    let mut workspace = layer.workspace(tokens, lens.len(), ctx.members()).unwrap();
                    let mut y = Guarded::new(tokens, d, &x);
                    layer.forward_with(ctx, y.view_mut(), &mut inputs, &mut workspace).unwrap();
                    y.values()
                };
                let what = format!("{placement:?} {lens:?}");
                let alone = forward(serial(isa), &mut []);
                assert_close(&alone, &expected, LIMIT * slack(isa), &what);
                let threads = executors::Threads(2);
                for (ctx, cached) in
                    [(Context::new(isa, &threads), false), (serial(isa), true), (Context::new(isa, &threads), true)]
                {
                    let mut caches: Vec<_> = cached
                        .then(|| KvCache::new(&heads, lens.len(), 130).unwrap())
                        .into_iter()
                        .collect();
                    assert_bits(&forward(ctx, &mut caches), &alone, &what);
                }
                // Without it the result is another.
                assert!(run(serial(isa), &layer, &x, lens, &graph) != alone);
            }
        }
    }

    fn widths(isa) {
        // One column, a lane more and less than vectors and panels, a prime; a hidden width that needs two blocks of K.
        for (n_heads, head_dim, d_ff) in [(1, 1, 1), (1, 15, 17), (2, 8, 64), (3, 21, 65), (5, 13, 63), (2, 32, 513)] {
            check(serial(isa), Shape::new(n_heads, head_dim, d_ff), &[5, 2], &Graph::full());
        }
    }

    fn every_graph(isa) {
        let shape = Shape::new(2, 8, 32);
        for graph in [Graph::full(), Graph::causal(), Graph::window(3, 0), Graph::window(70, 5), Graph::window(0, 0)] {
            check(serial(isa), shape, &[1, 130, 0, 7], &graph);
        }
    }

    fn other_heads(isa) {
        let heads = Heads::new(4, 10).unwrap();
        for heads in [
            heads.with_kv_heads(2).unwrap(),
            heads.with_kv_heads(1).unwrap().with_value_dim(7).unwrap(),
            heads.with_softcap(0.7),
            heads.with_scale(0.1),
        ] {
            check(serial(isa), Shape { heads, ..Shape::new(1, 24, 30) }, &[9, 4], &Graph::causal());
        }
    }

    fn heads_of_short_sequences_with_helpers(isa) {
        // Tiles of several sequences, cut by heads where there are few of them or their number leaves members without work. Panels of 64
        // columns hold several heads, or parts of two.
        for (n_heads, head_dim) in [(6, 16), (4, 20), (3, 80)] {
            let mut rng = Rng::new(3);
            let layer = Model::new(Shape::new(n_heads, head_dim, 30), &mut rng).layer();
            for lens in [&[5, 16, 40, 3, 33][..], &[64, 1, 63, 17], &[16; 20], &[70, 130, 90, 29]] {
                if matches!(isa.name(), "scalar" | "portable") && lens.len() != 5 {
                    continue;
                }
                let x = rng.vec(lens.iter().sum::<usize>() * layer.d_model(), 1.5);
                let alone = run(serial(isa), &layer, &x, lens, &Graph::full());
                for threads in [2, 3, 5] {
                    let together =
                        run(Context::new(isa, &executors::Threads(threads)), &layer, &x, lens, &Graph::full());
                    assert_bits(&together, &alone, &format!("{n_heads} of {head_dim}, {lens:?}, {threads} threads"));
                }
            }
        }
    }

    fn every_row_count_with_helpers(isa) {
        // Whether the FFN is cut into rows or columns depends on the rows, on the threads, and on how many rows of this width
        // fit into L2: more than 96, about 37, and fewer than a member's least share.
        for d_model in [96, 2304, 6000] {
            let mut rng = Rng::new(1);
            let shape = Shape { activation: Activation::Relu, ..Shape::new(1, d_model, 70) };
            let model = Model::without_attention(shape, &mut rng);
            let (layer, ffn) = (model.ffn_layer(), model.ffn());
            for threads in [2, 3] {
                let executor = executors::Threads(threads);
                for tokens in [1, 23, 37, 47, 48, 49, 60, 72, 73, 75, 96, 97, 145] {
                    // On the slow instruction sets a few are enough.
                    if matches!(isa.name(), "scalar" | "portable") && ![23, 49, 75].contains(&tokens) {
                        continue;
                    }
                    let what = format!("{tokens} tokens of {d_model}, {threads} threads");
                    let x = rng.vec(tokens * d_model, 1.5);
                    let alone = run(serial(isa), &layer, &x, &[tokens], &Graph::full());
                    let together = run(Context::new(isa, &executor), &layer, &x, &[tokens], &Graph::full());
                    assert_bits(&together, &alone, &format!("layer, {what}"));

                    let mut y = Guarded::unset(tokens, d_model);
                    let x = Guarded::new(tokens, d_model, &x);
                    ffn.forward(Context::new(isa, &executor), x.view(), y.view_mut()).unwrap();
                    let together = y.values();
                    ffn.forward(serial(isa), x.view(), y.view_mut()).unwrap();
                    assert_bits(&together, &y.values(), &format!("ffn, {what}"));
                }
            }
        }
    }

    fn ffn_meets_the_reference(isa) {
        for (d_model, d_ff, rows) in [(1, 1, 1), (17, 65, 7), (64, 63, 13), (33, 513, 97)] {
            for activation in common::model::ACTIVATIONS {
                let shape = Shape { activation, ..Shape::new(1, d_model, d_ff) };
                let mut rng = Rng::new(2);
                let model = Model::new(shape, &mut rng);
                let x = rng.vec(rows * d_model, 1.5);
                let expected = r::ffn(&r::to_f64(&x), &model.reference_ffn());
                let mut y = Guarded::unset(rows, d_model);
                let x = Guarded::new(rows, d_model, &x);
                model.ffn().forward(serial(isa), x.view(), y.view_mut()).unwrap();
                let what = format!("{d_model} {d_ff} {rows} {activation:?}");
                assert_close(&y.values(), &expected, LIMIT * slack(isa), &what);
            }
        }
    }

    fn a_stack_is_its_layers_in_order(isa) {
        let mut rng = Rng::new(3);
        let shapes = [Shape::new(2, 8, 40), Shape { placement: PlacementKind::Pre, ..Shape::new(1, 16, 20) }];
        let [first, second] = shapes.map(|shape| Model::new(shape, &mut rng));
        let lens = [4, 9];
        let x = rng.vec(13 * 16, 1.0);
        let once = run(serial(isa), &first.layer(), &x, &lens, &Graph::causal());
        let twice = run(serial(isa), &second.layer(), &once, &lens, &Graph::causal());

        let stack = Stack::new(vec![first.layer(), second.layer()]).unwrap();
        let mut workspace = stack.workspace(13, 2, 1).unwrap();
        let mut y = Guarded::new(13, 16, &x);
        stack.forward(serial(isa), y.view_mut(), &offsets(&lens), &Graph::causal(), &mut workspace).unwrap();
        assert_bits(&y.values(), &twice, "stack");
    }

    fn a_used_workspace_leaves_no_trace(isa) {
        let mut rng = Rng::new(4);
        let shape = Shape::new(2, 8, 40);
        let layer = Model::new(shape, &mut rng).layer();
        let mut workspace = layer.workspace(300, 4, 1).unwrap();
        let mut poison = vec![f32::NAN; 300 * 16];
        let whole = MatMut::contiguous(&mut poison, 300, 16).unwrap();
        layer.forward(serial(isa), whole, &[0, 300], &Graph::full(), &mut workspace).unwrap();
        for lens in [vec![5], vec![1, 70], vec![0, 0, 2]] {
            let tokens = lens.iter().sum::<usize>();
            let x = rng.vec(tokens * 16, 1.0);
            let fresh = run(serial(isa), &layer, &x, &lens, &Graph::full());
            let mut y = x.clone();
            let view = MatMut::contiguous(&mut y, tokens, 16).unwrap();
            layer.forward(serial(isa), view, &offsets(&lens), &Graph::full(), &mut workspace).unwrap();
            assert_bits(&y, &fresh, "after a batch of NaN");
        }
    }

    fn nothing_to_do(isa) {
        let layer = Model::new(Shape::new(2, 8, 40), &mut Rng::new(5)).layer();
        let mut workspace = layer.workspace(0, 2, 1).unwrap();
        let empty = || MatMut::contiguous(&mut [], 0, 16).unwrap();
        layer.forward(serial(isa), empty(), &[0], &Graph::full(), &mut workspace).unwrap();
        layer.forward(serial(isa), empty(), &[0, 0, 0], &Graph::full(), &mut workspace).unwrap();
    }

    fn nan_stays_in_its_segment(isa) {
        let mut rng = Rng::new(6);
        let layer = Model::new(Shape::new(2, 8, 40), &mut rng).layer();
        let mut x = rng.vec(20 * 16, 1.0);
        let clean = run(serial(isa), &layer, &x, &[6, 6, 8], &Graph::full());
        x[7 * 16] = f32::NAN;
        let y = run(serial(isa), &layer, &x, &[6, 6, 8], &Graph::full());
        assert_bits(&y[..6 * 16], &clean[..6 * 16], "before");
        assert!(y[6 * 16..12 * 16].iter().all(|x| x.is_nan()), "all of the segment see it");
        assert_bits(&y[12 * 16..], &clean[12 * 16..], "after");
        // Under a causal graph only what comes after sees it.
        let clean = run(serial(isa), &layer, &clean, &[20], &Graph::causal());
        assert!(clean.iter().all(|x| x.is_finite()));
        let y = run(serial(isa), &layer, &x, &[20], &Graph::causal());
        assert!(y[..7 * 16].iter().all(|x| x.is_finite()) && y[7 * 16..].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let shape = Shape { norm: NormKind::BatchNorm, placement: PlacementKind::Pre, ..Shape::new(2, 8, 40) };
    let layer = Model::new(shape, &mut Rng::new(14)).layer();
    let (x, graph) = (vec![0.0; 200], Graph::full());
    let forward = |layer: &Layer, rows, cols| {
        let mut workspace = layer.workspace(5, 1, 1).unwrap();
        let position_embedding = Some(MatRef::contiguous(&x, rows, cols).unwrap());
        let mut inputs = Inputs { position_embedding, ..Inputs::new(&[0, 5], &graph) };
        let mut y = Guarded::unset(5, 16);
        let result = layer.forward_with(Context::serial(), y.view_mut(), &mut inputs, &mut workspace);
        if result.is_err() {
            y.assert_unset();
        }
        result.map_err(|error| error.to_string())
    };
    assert_eq!(forward(&layer, 4, 16), Err("position_embedding.rows: expected 5, got 4".into()));
    assert_eq!(forward(&layer, 5, 17), Err("position_embedding.cols: expected 16, got 17".into()));
    let message =
        "position_embedding: expected none, as the batch norm in the weights would normalise it too";
    let mut folded = layer;
    for times in 1..3 {
        folded = folded.fold_batchnorm().unwrap();
        assert_eq!(forward(&folded, 5, 16), Err(message.into()), "folded {times} times");
    }
}

#[test]
fn shared_by_threads_with_their_own_workspaces() {
    let mut rng = Rng::new(7);
    let layer = Model::new(Shape::new(2, 8, 40), &mut rng).layer();
    let x = rng.vec(50 * 16, 1.0);
    let isa = Isa::best();
    let alone = run(serial(isa), &layer, &x, &[50], &Graph::full());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let y = run(serial(isa), &layer, &x, &[50], &Graph::full());
                    assert_bits(&y, &alone, "beside other threads");
                }
            });
        }
    });
}

#[test]
fn views_of_every_stride_give_the_same() {
    let mut rng = Rng::new(8);
    let layer = Model::new(Shape::new(2, 8, 40), &mut rng).layer();
    let x = rng.vec(5 * 16, 1.0);
    let guarded = run(Context::serial(), &layer, &x, &[5], &Graph::full());
    let mut y = x.clone();
    let mut workspace = layer.workspace(5, 1, 1).unwrap();
    let view = MatMut::contiguous(&mut y, 5, 16).unwrap();
    layer.forward(Context::serial(), view, &[0, 5], &Graph::full(), &mut workspace).unwrap();
    assert_bits(&y, &guarded, "contiguous");
    assert_eq!(MatRef::contiguous(&y, 5, 16).unwrap().row_stride(), 16);
}
