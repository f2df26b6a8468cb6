//! Properties that hold for any input, on random ones.

mod common;

use common::compare::{assert_bits, assert_close, slack};
use common::data::Rng;
use common::model::{Model, Shape, offsets};
use common::{on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{
    Activation, Epilogue, Graph, Heads, Isa, Linear, MatMut, MatRef, PackedMatrix, attention, layernorm,
    rmsnorm, softmax,
};
use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop};
use proptest::test_runner::{Config, TestRunner};

/// Runs `test` on 64 inputs and shrinks one that fails. The seed is fixed, so that a failure is one everywhere.
fn for_all<T: std::fmt::Debug>(inputs: impl Strategy<Value = T>, test: impl Fn(T)) {
    let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    if let Err(error) = runner.run(&inputs, |input| {
        test(input);
        Ok(())
    }) {
        panic!("{error}");
    }
}

fn row(max: usize, size: f32) -> impl Strategy<Value = Vec<f32>> {
    vec(-size..size, 1..max)
}

fn view(x: &[f32], cols: usize) -> MatRef<'_> {
    MatRef::contiguous(x, x.len() / cols, cols).unwrap()
}

fn mat(x: &mut [f32], cols: usize) -> MatMut<'_> {
    let rows = x.len() / cols;
    MatMut::contiguous(x, rows, cols).unwrap()
}

fn softmax_of(isa: Isa, x: &[f32]) -> Vec<f32> {
    let mut y = x.to_vec();
    let cols = y.len();
    softmax(serial(isa), mat(&mut y, cols)).unwrap();
    y
}

on_every_isa! {
    fn softmax_rows_sum_to_one(isa) {
        for_all(row(300, 50.0), |x| {
            let y = softmax_of(isa, &x);
            let sum: f64 = y.iter().map(|y| f64::from(*y)).sum();
            assert!((sum - 1.0).abs() < 2e-6 * slack(isa), "{sum}");
            assert!(y.iter().all(|y| (0.0..=1.0).contains(y)));
        });
    }

    fn softmax_keeps_the_order(isa) {
        for_all(row(100, 20.0), |x| {
            let y = softmax_of(isa, &x);
            for i in 1..x.len() {
                // The exponential is monotone up to its error.
                assert!(x[i] <= x[0] || y[i] >= y[0] * (1.0 - 1e-6), "{} {} {} {}", x[i], x[0], y[i], y[0]);
            }
        });
    }

    fn softmax_is_shift_invariant(isa) {
        // A shift by a power of two is exact on numbers with few digits, so the differences are the same.
        let digits = vec(-2000_i32..2000, 1..200).prop_map(|v| v.iter().map(|&x| x as f32 / 64.0).collect::<Vec<_>>());
        for_all((digits, -8_i32..8), |(x, shift)| {
            let shifted: Vec<f32> = x.iter().map(|x| x + (shift * 64) as f32).collect();
            assert_bits(&softmax_of(isa, &shifted), &softmax_of(isa, &x), "shifted");
        });
        for_all((row(200, 10.0), -100.0_f32..100.0), |(x, shift)| {
            let shifted: Vec<f32> = x.iter().map(|x| x + shift).collect();
            let expected = r::to_f64(&softmax_of(isa, &x));
            // The sums round to 2^-18.
            assert_close(&softmax_of(isa, &shifted), &expected, 2e-5, "shifted");
        });
    }

    fn layernorm_has_mean_0_and_variance_1(isa) {
        for_all((vec(-1.0_f32..1.0, 8..300), -100.0_f32..100.0, 0.01_f32..100.0), |(x, shift, scale)| {
            let n = x.len();
            let mut y: Vec<f32> = x.iter().map(|x| x * scale + shift).collect();
            let spread = y.iter().copied().fold(f32::MIN, f32::max) - y.iter().copied().fold(f32::MAX, f32::min);
            // Shrinking goes to constant rows, whose variance is 0.
            if spread < 1e-3 { return }
            layernorm(serial(isa), mat(&mut y, n), &vec![1.0; n], None, 0.0).unwrap();
            let mean = y.iter().map(|y| f64::from(*y)).sum::<f64>() / n as f64;
            let var = y.iter().map(|y| (f64::from(*y) - mean).powi(2)).sum::<f64>() / n as f64;
            assert!(mean.abs() < 1e-6 * slack(isa) && (var - 1.0).abs() < 4e-6 * slack(isa), "{mean:e} {var}");
        });
    }

    fn norms_do_not_see_a_power_of_two(isa) {
        for_all((row(200, 1.0), -20_i32..20), |(x, exponent)| {
            let n = x.len();
            let scale = 2_f32.powi(exponent);
            let scaled: Vec<f32> = x.iter().map(|x| x * scale).collect();
            let run = |x: &[f32], f: &dyn Fn(MatMut<'_>)| {
                let mut y = x.to_vec();
                f(mat(&mut y, n));
                y
            };
            // Squares stay inside the normal numbers unless shrinking leads to them.
            if x.iter().any(|x| x.abs() < 1e-6) { return }
            let rms = |y: MatMut<'_>| rmsnorm(serial(isa), y, &vec![1.0; n], 0.0).unwrap();
            assert_bits(&run(&scaled, &rms), &run(&x, &rms), "rmsnorm");
            let layer = |y: MatMut<'_>| layernorm(serial(isa), y, &vec![1.0; n], None, 0.0).unwrap();
            assert_bits(&run(&scaled, &layer), &run(&x, &layer), "layernorm");
        });
    }

    fn the_identity_changes_nothing(isa) {
        for_all((1_usize..140, 1_usize..20, any::<u64>()), |(n, rows, seed)| {
            let mut weight = vec![0.0; n * n];
            weight.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
            let identity = Linear::new(PackedMatrix::from_out_in(view(&weight, n)).unwrap(), None).unwrap();
            let x = Rng::new(seed).vec(rows * n, 1e3);
            let mut y = vec![0.0; rows * n];
            identity.forward(serial(isa), view(&x, n), &Epilogue::NONE, mat(&mut y, n)).unwrap();
            assert_eq!(y, x);
            let epilogue = Epilogue::activation(Activation::Relu).with_residual(-1.0, view(&x, n));
            identity.forward(serial(isa), view(&x, n), &epilogue, mat(&mut y, n)).unwrap();
            assert!(x.iter().zip(&y).all(|(x, y)| *y == if *x > 0.0 { 0.0 } else { -x }), "relu(x) - x");
        });
    }

    fn a_power_of_two_passes_through_a_product(isa) {
        for_all((1_usize..70, 1_usize..70, -10_i32..10, any::<u64>()), |(n, k, exponent, seed)| {
            let mut rng = Rng::new(seed);
            let weight = rng.vec(n * k, 1.0);
            let linear = Linear::new(PackedMatrix::from_out_in(view(&weight, k)).unwrap(), None).unwrap();
            let x = rng.vec(3 * k, 1.0);
            let scale = 2_f32.powi(exponent);
            let run = |x: &[f32]| {
                let mut y = vec![0.0; 3 * n];
                linear.forward(serial(isa), view(x, k), &Epilogue::NONE, mat(&mut y, n)).unwrap();
                y
            };
            let expected: Vec<f32> = run(&x).iter().map(|y| y * scale).collect();
            assert_bits(&run(&x.iter().map(|x| x * scale).collect::<Vec<_>>()), &expected, "scaled");
        });
    }

    fn attention_does_not_see_the_order_of_keys(isa) {
        let heads = Heads::new(2, 8).unwrap();
        let order = (1_usize..300).prop_flat_map(|n| proptest::strategy::Just((0..n).collect::<Vec<_>>()).prop_shuffle());
        for_all((order, any::<u64>()), |(order, seed)| {
            let (n, mut rng) = (order.len(), Rng::new(seed));
            let (q, k, v) = (rng.vec(n * 16, 1.0), rng.vec(n * 16, 1.0), rng.vec(n * 16, 1.0));
            let run = |q: &[f32], k: &[f32], v: &[f32]| {
                let mut out = vec![0.0; n * 16];
                let (q, k, v) = (view(q, 16), view(k, 16), view(v, 16));
                attention(serial(isa), &heads, q, k, v, &[0, n], &Graph::full(), mat(&mut out, 16)).unwrap();
                out
            };
            let permuted = |x: &[f32]| order.iter().flat_map(|&i| x[i * 16..][..16].to_vec()).collect::<Vec<_>>();
            let expected = run(&q, &k, &v);
            // Other places in chunks, so within the tolerance; and queries take their rows along, whose bits are theirs.
            let shuffled_keys = run(&q, &permuted(&k), &permuted(&v));
            assert_close(&shuffled_keys, &r::to_f64(&expected), 2e-6 * slack(isa), "keys and values permuted");
            assert_bits(&run(&permuted(&q), &k, &v), &permuted(&expected), "queries permuted");
        });
    }

    fn a_ragged_batch_is_its_segments(isa) {
        let mut rng = Rng::new(1);
        let layer = Model::new(Shape::new(2, 8, 40), &mut rng).layer();
        let graphs = [Graph::full(), Graph::causal(), Graph::window(5, 2)];
        for_all((vec(0_usize..90, 1..6), prop::sample::select(graphs.to_vec()), any::<u64>()), |(lens, graph, seed)| {
            let ends = offsets(&lens);
            let tokens = ends[lens.len()];
            let x = Rng::new(seed).vec(tokens * 16, 1.0);
            let run = |x: &[f32], offsets: &[usize]| {
                let mut y = x.to_vec();
                let mut workspace = layer.workspace(x.len() / 16, offsets.len() - 1, 1).unwrap();
                layer.forward(serial(isa), mat(&mut y, 16), offsets, &graph, &mut workspace).unwrap();
                y
            };
            let batch = run(&x, &ends);
            for (i, &len) in lens.iter().enumerate() {
                let rows = ends[i] * 16..ends[i + 1] * 16;
                assert_bits(&run(&x[rows.clone()], &[0, len]), &batch[rows], &format!("segment {i} of {lens:?}"));
            }
        });
    }
}
