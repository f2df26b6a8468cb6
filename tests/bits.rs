//! The same bits: on every instruction set inside the promise, with any number of threads, alone or inside a batch.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::compare::assert_bits;
use common::data::Rng;
use common::model::{ACTIVATIONS, Map, Model, NormKind, PlacementKind, Shape, offsets};
use common::{bit_keeping, executors, serial};
use laneformer::{
    Affine, BatchStats, Context, Epilogue, Executor, Function, Graph, Heads, Isa, KeyStore, MatMut, MatRef,
    QueryRows, Rotary, RotaryPairs, Stack, Terms, attention, batchnorm_train, elementwise, elementwise_into,
    layernorm, layernorm_into, rmsnorm, rmsnorm_into, softmax, softmax_into,
};

/// Pools are shared by the tests: starting one for each call would be most of the time.
fn all_executors() -> Vec<(String, Box<dyn Executor>)> {
    [1, 2, 3].into_iter().flat_map(executors::of).collect()
}

/// `run` gives the same bits on every instruction set and with every executor.
#[track_caller]
fn everywhere(what: &str, run: impl Fn(Context<'_>) -> Vec<f32>) {
    let expected = run(serial(Isa::SCALAR));
    for isa in bit_keeping() {
        assert_bits(&run(serial(isa)), &expected, &format!("{what} on {isa}"));
        for (name, executor) in all_executors() {
            let actual = run(Context::new(isa, &*executor));
            assert_bits(&actual, &expected, &format!("{what} on {isa} with {name}"));
        }
    }
}

fn mat(x: &mut [f32], cols: usize) -> MatMut<'_> {
    let rows = x.len() / cols;
    MatMut::contiguous(x, rows, cols).unwrap()
}

fn view(x: &[f32], cols: usize) -> MatRef<'_> {
    MatRef::contiguous(x, x.len() / cols, cols).unwrap()
}

/// Shapes of row operations: tails of every kind, and three that are large enough for helpers, of rows that go together, of whole vectors and not, and of
/// rows that do not.
const SHAPES: [(usize, usize); 7] = [(3, 1), (2, 17), (3, 64), (2, 193), (459, 144), (173, 390), (131, 1031)];

#[test]
fn row_operations() {
    let mut rng = Rng::new(1);
    for (rows, cols) in SHAPES {
        let (x, gain, bias) = (rng.vec(rows * cols, 20.0), rng.vec(cols, 1.0), rng.vec(cols, 1.0));
        let var: Vec<f32> = bias.iter().map(|b| b.abs() + 0.1).collect();
        let in_place = |what: &str, f: &dyn Fn(Context<'_>, MatMut<'_>)| {
            everywhere(&format!("{what} [{rows}, {cols}]"), |ctx| {
                let mut y = x.clone();
                f(ctx, mat(&mut y, cols));
                y
            });
        };
        in_place("softmax", &|ctx, x| softmax(ctx, x).unwrap());
        in_place("layernorm", &|ctx, x| layernorm(ctx, x, &gain, Some(&bias), 1e-5).unwrap());
        in_place("layernorm without bias", &|ctx, x| layernorm(ctx, x, &gain, None, 1e-5).unwrap());
        in_place("rmsnorm", &|ctx, x| rmsnorm(ctx, x, &gain, 1e-5).unwrap());
        let affine = Affine::from_running(&gain, &bias, &bias, &var, 1e-5).unwrap();
        in_place("batchnorm", &|ctx, x| affine.apply(ctx, x).unwrap());
        for pairs in [RotaryPairs::Halves, RotaryPairs::Interleaved] {
            let rotary = Rotary::new(pairs, cols / 2 * 2, 1e4, 200).ok();
            let positions: Vec<usize> = (0..rows).map(|i| i * 7 % 200).collect();
            if let Some(rotary) = rotary {
                in_place("rotary", &|ctx, x| rotary.apply(ctx, cols, &positions, x).unwrap());
            }
        }
        for function in [
            Function::Exp,
            Function::Tanh,
            Function::Erf,
            Function::Relu,
            Function::GeluErf,
            Function::GeluTanh,
            Function::QuickGelu,
            Function::Silu,
        ] {
            in_place(&format!("{function:?}"), &|ctx, x| elementwise(ctx, function, x).unwrap());
        }
        // Tiles find their rows of the input.
        let x = view(&x, cols);
        let into = |what: &str, f: &dyn Fn(Context<'_>, MatMut<'_>)| {
            everywhere(&format!("{what} [{rows}, {cols}]"), |ctx| {
                let mut y = vec![f32::NAN; rows * cols];
                f(ctx, mat(&mut y, cols));
                assert!(y.iter().all(|y| !y.is_nan()), "{what} [{rows}, {cols}]");
                y
            });
        };
        into("softmax_into", &|ctx, out| softmax_into(ctx, x, out).unwrap());
        into("layernorm_into", &|ctx, out| layernorm_into(ctx, x, &gain, None, 1e-5, out).unwrap());
        into("rmsnorm_into", &|ctx, out| rmsnorm_into(ctx, x, &gain, 1e-5, out).unwrap());
        into("batchnorm into", &|ctx, out| affine.apply_into(ctx, x, out).unwrap());
        into("tanh into", &|ctx, out| elementwise_into(ctx, Function::Tanh, x, out).unwrap());
    }
}

#[test]
fn batchnorm_training() {
    let mut rng = Rng::new(2);
    for (rows, cols) in [(1, 1), (50, 17), (33, 64)] {
        let (x, gain, bias) = (rng.vec(rows * cols, 3.0), rng.vec(cols, 1.0), rng.vec(cols, 1.0));
        let valid: Vec<bool> = (0..rows).map(|i| i % 3 != 1).collect();
        everywhere("batchnorm_train", |ctx| {
            let mut stats = BatchStats::new(bias.clone(), gain.clone(), 0.1).unwrap();
            let mut y = x.clone();
            let view = mat(&mut y, cols);
            batchnorm_train(ctx, view, Some(&valid), &gain, &bias, 1e-5, &mut stats).unwrap();
            [y, stats.batch_mean, stats.batch_var, stats.running_mean, stats.running_var].concat()
        });
    }
}

#[test]
fn linear() {
    let mut rng = Rng::new(3);
    // The last two are large enough for helpers: cut by rows, and with few rows by columns.
    for (m, n, k) in [(1, 1, 1), (5, 17, 600), (7, 131, 33), (97, 130, 200), (9, 700, 400)] {
        let linear = Map::new(n, k, &mut rng).packed();
        let (x, residual) = (rng.vec(m * k, 1.0), rng.vec(m * n, 1.0));
        for activation in ACTIVATIONS {
            if m > 7 && !(activation as usize).is_multiple_of(3) {
                continue;
            }
            everywhere(&format!("linear m{m} n{n} k{k} {activation:?}"), |ctx| {
                let mut y = vec![0.0; m * n];
                let epilogue = Epilogue::activation(activation).with_residual(0.3, view(&residual, n));
                linear.forward(ctx, view(&x, k), &epilogue, mat(&mut y, n)).unwrap();
                y
            });
        }
    }
}

#[test]
fn linear_of_rows_made_in_place() {
    let mut rng = Rng::new(30);
    for (m, n, k) in [(0, 5, 3), (1, 1, 1), (5, 17, 600), (97, 130, 200), (200, 65, 4700), (9, 700, 400)] {
        let linear = Map::new(n, k, &mut rng).packed();
        let (x, residual) = (rng.vec(m * k, 1.0), rng.vec(m * n, 1.0));
        let epilogue = Epilogue::activation(ACTIVATIONS[2]).with_residual(0.3, view(&residual, n));
        everywhere(&format!("linear m{m} n{n} k{k}, filled"), |ctx| {
            let (mut y, mut expected) = (vec![0.0; m * n], vec![0.0; m * n]);
            let asked: Vec<AtomicUsize> = (0..m).map(|_| AtomicUsize::new(0)).collect();
            let fill = |rows: std::ops::Range<usize>, mut tile: MatMut<'_>| {
                assert_eq!((tile.rows(), tile.cols()), (rows.len(), k));
                for (i, row) in rows.enumerate() {
                    asked[row].fetch_add(1, Ordering::Relaxed);
                    tile.row_mut(i).copy_from_slice(&x[row * k..][..k]);
                }
            };
            linear.forward_filled(ctx, fill, &epilogue, mat(&mut y, n)).unwrap();
            assert!(asked.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            linear.forward(ctx, view(&x, k), &epilogue, mat(&mut expected, n)).unwrap();
            assert_bits(&y, &expected, "the same as of rows that are there");
            y
        });
    }
}

#[test]
fn any_row_count() {
    let mut rng = Rng::new(4);
    for (n, k) in [(130, 200), (65, 1031)] {
        let linear = Map::new(n, k, &mut rng).packed();
        let x = rng.vec(97 * k, 1.0);
        let run = |isa: Isa, rows: std::ops::Range<usize>| {
            let mut y = vec![0.0; rows.len() * n];
            let x = view(&x[rows.start * k..rows.end * k], k);
            linear.forward(serial(isa), x, &Epilogue::NONE, mat(&mut y, n)).unwrap();
            y
        };
        for isa in bit_keeping() {
            let all = run(isa, 0..97);
            for count in [1, 2, 3, 4, 5, 6, 7, 13, 96] {
                for start in [0, 1, 97 - count] {
                    let some = run(isa, start..start + count);
                    let what = format!("rows {start}..+{count} of 97, n{n} k{k} on {isa}");
                    assert_bits(&some, &all[start * n..(start + count) * n], &what);
                }
            }
        }
    }
}

#[test]
fn attention_everywhere() {
    let mut rng = Rng::new(5);
    let plain = Heads::new(2, 8).unwrap();
    let grouped = Heads::new(4, 17).unwrap().with_kv_heads(2).unwrap().with_value_dim(5).unwrap();
    for heads in [plain, grouped, plain.with_softcap(2.0)] {
        // The last three are enough for several threads, the last one also for keys and values to be stored by them.
        for lens in [&[1][..], &[0, 17, 64, 65, 2], &[300], &[0, 170, 64, 165, 2], &[63; 24]] {
            let tokens = lens.iter().sum::<usize>();
            let q = rng.vec(tokens * heads.query_cols(), 2.0);
            let (k, v) = (rng.vec(tokens * heads.key_cols(), 2.0), rng.vec(tokens * heads.value_cols(), 1.0));
            for graph in [Graph::full(), Graph::causal(), Graph::window(20, 3)] {
                everywhere(&format!("attention {heads:?} {lens:?} {graph:?}"), |ctx| {
                    let mut out = vec![0.0; tokens * heads.output_cols()];
                    let (q, k, v) = (
                        view(&q, heads.query_cols()),
                        view(&k, heads.key_cols()),
                        view(&v, heads.value_cols()),
                    );
                    let out_view = mat(&mut out, heads.output_cols());
                    attention(ctx, &heads, q, k, v, &offsets(lens), &graph, out_view).unwrap();
                    out
                });
            }
        }
    }
}

#[test]
fn projection() {
    let mut rng = Rng::new(6);
    let turned = |shape: Shape, pairs, dim| Shape { rotary: Some((pairs, dim)), ..shape };
    // Heads that are whole panels can be split between helpers, others not.
    for shape in [
        Shape::new(2, 8, 1),
        Shape::new(4, 64, 1),
        Shape::new(3, 21, 1),
        turned(Shape::new(2, 128, 1), RotaryPairs::Halves, 128),
        turned(Shape::new(4, 64, 1), RotaryPairs::Interleaved, 50),
        turned(Shape::new(3, 21, 1), RotaryPairs::Halves, 20),
    ] {
        let projection = Model::new(shape, &mut rng).projection();
        // The last is for heads of 21, fewer tokens of which one thread projects alone.
        for lens in [&[3][..], &[70, 5], &[200, 0, 90], &[520, 0, 90]] {
            if lens[0] == 520 && shape.d_model != 63 {
                continue;
            }
            let tokens = lens.iter().sum::<usize>();
            let x = rng.vec(tokens * shape.d_model, 1.0);
            everywhere(&format!("projection {shape:?} {lens:?}"), |ctx| {
                let mut q = vec![0.0; tokens * shape.d_model];
                let mut keys = KeyStore::new(&shape.heads, tokens, lens.len()).unwrap();
                let (x, q_view) = (view(&x, shape.d_model), mat(&mut q, shape.d_model));
                projection.forward(ctx, x, &offsets(lens), q_view, &mut keys).unwrap();
                // What the store holds shows in what attention makes of it.
                let mut out = vec![0.0; tokens * shape.d_model];
                let (queries, out_view) = (view(&q, shape.d_model), mat(&mut out, shape.d_model));
                keys.attend(
                    ctx,
                    &shape.heads,
                    &QueryRows::new(queries, &offsets(lens)),
                    &Graph::causal(),
                    &Terms::default(),
                    out_view,
                )
                .unwrap();
                [q, out].concat()
            });
        }
    }
}

const PLACEMENTS: [PlacementKind; 4] =
    [PlacementKind::Post, PlacementKind::DeepNorm, PlacementKind::Pre, PlacementKind::Sandwich];

#[test]
fn layer() {
    let mut rng = Rng::new(7);
    for placement in PLACEMENTS {
        for (norm, shape) in [
            (NormKind::LayerNorm, Shape::new(3, 16, 100)),
            (NormKind::RmsNorm, Shape::new(2, 64, 300)),
            (NormKind::BatchNorm, Shape::new(1, 41, 65)),
            (
                NormKind::RmsNorm,
                Shape { rotary: Some((RotaryPairs::Halves, 30)), gated: true, ..Shape::new(2, 32, 90) },
            ),
        ] {
            let model = Model::new(Shape { norm, placement, ..shape }, &mut rng);
            // Batch norms also in the weights.
            let folded = (norm == NormKind::BatchNorm).then(|| model.layer().fold_batchnorm().unwrap());
            let layers: Vec<_> = std::iter::once(model.layer()).chain(folded).collect();
            // Few rows, which helpers share by columns, and more, which they share by rows.
            for lens in [&[1][..], &[5, 0, 20], &[70, 130]] {
                let tokens = lens.iter().sum::<usize>();
                let x = rng.vec(tokens * shape.d_model, 1.0);
                for layer in &layers {
                    everywhere(&format!("{placement:?} {norm:?} {shape:?} {lens:?}"), |ctx| {
                        let mut y = x.clone();
                        let mut workspace = layer.workspace(tokens, lens.len(), ctx.members()).unwrap();
                        let view = mat(&mut y, shape.d_model);
                        layer.forward(ctx, view, &offsets(lens), &Graph::causal(), &mut workspace).unwrap();
                        y
                    });
                }
            }
        }
    }
}

#[test]
fn stack_alone_and_inside_a_ragged_batch() {
    let mut rng = Rng::new(8);
    let shape = Shape::new(3, 16, 100);
    let d = shape.d_model;
    let layers = PLACEMENTS.map(|placement| Model::new(Shape { placement, ..shape }, &mut rng).layer());
    let stack = Stack::new(layers.into()).unwrap();
    let lens = [1, 17, 0, 64, 65, 130, 3];
    let ends = offsets(&lens);
    let x = rng.vec(280 * d, 1.0);
    for graph in [Graph::full(), Graph::causal(), Graph::window(30, 5)] {
        let run = |ctx: Context<'_>, x: &[f32], lens: &[usize]| {
            let mut y = x.to_vec();
            let mut workspace = stack.workspace(x.len() / d, lens.len(), ctx.members()).unwrap();
            stack.forward(ctx, mat(&mut y, d), &offsets(lens), &graph, &mut workspace).unwrap();
            y
        };
        let expected = run(serial(Isa::SCALAR), &x, &lens);
        for isa in bit_keeping() {
            for (name, executor) in all_executors() {
                let ctx = Context::new(isa, &*executor);
                assert_bits(&run(ctx, &x, &lens), &expected, &format!("batch on {isa} with {name}"));
                for (i, &len) in lens.iter().enumerate() {
                    let rows = ends[i] * d..ends[i + 1] * d;
                    let alone = run(ctx, &x[rows.clone()], &[len]);
                    assert_bits(&alone, &expected[rows], &format!("segment {i} alone on {isa} with {name}"));
                }
            }
        }
    }
}

#[test]
fn a_causal_prefix_does_not_see_what_follows() {
    let mut rng = Rng::new(9);
    let shape = Shape::new(2, 8, 40);
    let layer = Model::new(shape, &mut rng).layer();
    let x = rng.vec(300 * 16, 1.0);
    let run = |tokens: usize| {
        let mut y = x[..tokens * 16].to_vec();
        let mut workspace = layer.workspace(tokens, 1, 1).unwrap();
        let ctx = Context::serial();
        layer.forward(ctx, mat(&mut y, 16), &[0, tokens], &Graph::causal(), &mut workspace).unwrap();
        y
    };
    let whole = run(300);
    for tokens in [1, 2, 63, 64, 65, 255, 256, 257] {
        assert_bits(&run(tokens), &whole[..tokens * 16], &format!("the first {tokens} tokens"));
    }
}

#[test]
fn repeated_calls_with_helpers_never_differ() {
    // Helpers come early, late or not at all: none of it may show.
    let mut rng = Rng::new(10);
    let shape = Shape::new(2, 64, 300);
    let layer = Model::new(shape, &mut rng).layer();
    let x = rng.vec(90 * 128, 1.0);
    let expected = Mutex::new(None);
    for (name, executor) in all_executors() {
        let ctx = Context::new(Isa::best(), &*executor);
        let mut workspace = layer.workspace(90, 2, 3).unwrap();
        for _ in 0..100 {
            let mut y = x.clone();
            layer.forward(ctx, mat(&mut y, 128), &[0, 31, 90], &Graph::full(), &mut workspace).unwrap();
            let mut expected = expected.lock().unwrap();
            assert_bits(&y, expected.get_or_insert_with(|| y.clone()), &name);
        }
    }
}
