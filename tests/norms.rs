//! Layer, RMS and batch normalisation against the f64 reference, at their edges and with special values.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, assert_within, slack};
use common::data::Rng;
use common::sizes::{COLS, ROWS};
use common::{on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{
    Affine, BatchStats, Context, Isa, MatMut, MatRef, Norm, batchnorm_train, layernorm, layernorm_into,
    rmsnorm, rmsnorm_into,
};

const EPS: f32 = 1e-5;

/// Runs both forms of an operation on guarded buffers; they agree in bits.
fn both(
    isa: Isa,
    cols: usize,
    x: &[f32],
    in_place: impl Fn(Context<'_>, MatMut<'_>),
    into: impl Fn(Context<'_>, MatRef<'_>, MatMut<'_>),
) -> Vec<f32> {
    let rows = x.len() / cols;
    let mut y = Guarded::new(rows, cols, x);
    in_place(serial(isa), y.view_mut());
    let (input, mut out) = (Guarded::new(rows, cols, x), Guarded::unset(rows, cols));
    into(serial(isa), input.view(), out.view_mut());
    assert_bits(&out.values(), &y.values(), "the form with an output");
    assert_bits(&input.values(), x, "its input");
    y.values()
}

fn run_layernorm(isa: Isa, x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32) -> Vec<f32> {
    both(
        isa,
        gain.len(),
        x,
        |ctx, x| layernorm(ctx, x, gain, bias, eps).unwrap(),
        |ctx, x, out| layernorm_into(ctx, x, gain, bias, eps, out).unwrap(),
    )
}

fn run_rmsnorm(isa: Isa, x: &[f32], gain: &[f32], eps: f32) -> Vec<f32> {
    both(
        isa,
        gain.len(),
        x,
        |ctx, x| rmsnorm(ctx, x, gain, eps).unwrap(),
        |ctx, x, out| rmsnorm_into(ctx, x, gain, eps, out).unwrap(),
    )
}

/// Trains on guarded buffers.
fn run_train(
    isa: Isa,
    x: &[f32],
    valid: Option<&[bool]>,
    (gain, bias): (&[f32], &[f32]),
    stats: &mut BatchStats,
) -> Vec<f32> {
    let mut y = Guarded::new(x.len() / gain.len(), gain.len(), x);
    batchnorm_train(serial(isa), y.view_mut(), valid, gain, bias, EPS, stats).unwrap();
    y.values()
}

const INF: f32 = f32::INFINITY;

on_every_isa! {
    fn layernorm_edge_sizes(isa) {
        let mut rng = Rng::new(1);
        for &cols in COLS {
            for &rows in ROWS {
                let (x, gain, bias) = (rng.vec(rows * cols, 3.0), rng.vec(cols, 1.5), rng.vec(cols, 1.0));
                let wide = (r::to_f64(&x), r::to_f64(&gain), r::to_f64(&bias));
                for bias in [None, Some((&bias, &wide.2))] {
                    let expected = r::layernorm(&wide.0, &wide.1, bias.map(|b| &b.1[..]), f64::from(EPS));
                    let actual = run_layernorm(isa, &x, &gain, bias.map(|b| &b.0[..]), EPS);
                    // Normed values reach sqrt(cols), gains 1.5; the error follows the larger of the value and its parts.
                    let limit = |_, e: f64| (1e-6 * e.abs() + 1e-6) * slack(isa);
                    assert_within(&actual, &expected, limit, &format!("[{rows}, {cols}]"));
                }
            }
        }
    }

    fn a_norm_with_its_weights_is_the_function(isa) {
        let mut rng = Rng::new(12);
        for &cols in COLS {
            let (x, gain, bias) = (rng.vec(3 * cols, 3.0), rng.vec(cols, 1.5), rng.vec(cols, 1.0));
            let affine = Affine::new(gain.clone(), bias.clone()).unwrap();
            let mut scaled = Guarded::new(3, cols, &x);
            affine.apply(serial(isa), scaled.view_mut()).unwrap();
            let layer = |bias: Option<&Vec<f32>>| Norm::LayerNorm { gain: gain.clone(), bias: bias.cloned(), eps: EPS };
            for (norm, expected) in [
                (layer(Some(&bias)), run_layernorm(isa, &x, &gain, Some(&bias), EPS)),
                (layer(None), run_layernorm(isa, &x, &gain, None, EPS)),
                (Norm::RmsNorm { gain: gain.clone(), eps: EPS }, run_rmsnorm(isa, &x, &gain, EPS)),
                (Norm::BatchNorm(affine), scaled.values()),
            ] {
                let mut y = Guarded::new(3, cols, &x);
                norm.apply(serial(isa), y.view_mut()).unwrap();
                assert_bits(&y.values(), &expected, &format!("{cols} columns"));
                let mut wide = vec![0.0; cols + 1];
                let wide = MatMut::contiguous(&mut wide, 1, cols + 1).unwrap();
                assert!(norm.apply(serial(isa), wide).is_err());
            }
        }
    }

    fn layernorm_far_from_zero(isa) {
        // Documented: mean 1e4, deviation 0.01, error 2e-7 of the deviation beside the inputs' own rounding, which
        // the reference shares here.
        let mut rng = Rng::new(2);
        let x: Vec<f32> = rng.vec(2 * 768, 0.017).iter().map(|x| 1e4 + x).collect();
        let gain = vec![1.0; 768];
        let expected = r::layernorm(&r::to_f64(&x), &r::to_f64(&gain), None, 0.0);
        assert_close(&run_layernorm(isa, &x, &gain, None, 0.0), &expected, 1e-6 * slack(isa), "shifted");
    }

    fn constant_rows_and_channels_of_any_length(isa) {
        // Sums of many numbers leave a mean so far off that what is taken from the squares is more than they are.
        for n in [9001, 100_000] {
            for value in (0..40).map(|i| 99.5 + i as f32 * 0.612_03) {
                let y = run_layernorm(isa, &vec![value; n], &vec![1.0; n], None, EPS);
                assert!(y.iter().all(|y| y.is_finite()), "a row of {n} times {value}: {}", y[0]);
                let mut stats = BatchStats::new(vec![0.0], vec![1.0], 1.0).unwrap();
                let y = run_train(isa, &vec![value; n], None, (&[1.0], &[0.0]), &mut stats);
                assert!(y.iter().all(|y| y.is_finite()), "a channel of {n} times {value}: {}", y[0]);
                assert!(stats.batch_var[0] >= 0.0 && stats.running_var[0] >= 0.0, "{stats:?}");
            }
        }
    }

    fn layernorm_of_constant_rows(isa) {
        // The centred row is what the mean's rounding left: its variance must not turn negative.
        for cols in [1, 3, 7, 17, 63, 100, 129, 1031] {
            for value in [0.0, 0.1, -3.3, 1e5, 1.234_567e10, 1e15] {
                let y = run_layernorm(isa, &vec![value; cols], &vec![1.0; cols], None, EPS);
                assert!(y.iter().all(|y| y.is_finite()), "{cols} times {value:e}: {}", y[0]);
                if value < 1e4 {
                    assert_close(&y, &vec![0.0; cols], 1e-2, &format!("{cols} times {value:e}"));
                }
            }
        }
    }

    fn layernorm_special_values(isa) {
        for cols in [1, 16, 17, 65] {
            for at in [0, cols - 1] {
                for special in [f32::NAN, INF, -INF] {
                    let mut x = vec![0.5; 2 * cols];
                    x[at] = special;
                    let y = run_layernorm(isa, &x, &vec![1.0; cols], Some(&vec![0.25; cols]), EPS);
                    assert!(y[..cols].iter().all(|y| y.is_nan()), "{special} at {at} of {cols}: {y:?}");
                    assert_bits(&y[cols..], &vec![0.25; cols], "the next row");
                }
            }
        }
    }

    fn layernorm_rows_do_not_meet(isa) {
        // The sums of rows that follow are found beside the squares of those before.
        for cols in [1, 70, 128, 1500] {
            let mut rng = Rng::new(5);
            let (mut x, gain, bias) = (rng.vec(11 * cols, 5.0), rng.vec(cols, 1.0), rng.vec(cols, 1.0));
            for (row, special) in [(1, f32::NAN), (2, -INF), (6, INF), (8, 1e30)] {
                x[row * cols + cols / 2] = special;
            }
            let together = run_layernorm(isa, &x, &gain, Some(&bias), EPS);
            for (row, alone) in x.chunks(cols).enumerate() {
                let alone = run_layernorm(isa, alone, &gain, Some(&bias), EPS);
                assert_bits(&together[row * cols..][..cols], &alone, &format!("row {row} of {cols}"));
            }
        }
    }

    fn rmsnorm_edge_sizes(isa) {
        let mut rng = Rng::new(3);
        for &cols in COLS {
            for &rows in ROWS {
                let (x, gain) = (rng.vec(rows * cols, 3.0), rng.vec(cols, 1.5));
                let expected = r::rmsnorm(&r::to_f64(&x), &r::to_f64(&gain), f64::from(EPS));
                let relative = 4e-7 + 1e-7 * (cols as f64).log2();
                let limit = |_, e: f64| relative * slack(isa) * e.abs() + 1e-40;
                assert_within(&run_rmsnorm(isa, &x, &gain, EPS), &expected, limit, &format!("[{rows}, {cols}]"));
            }
        }
    }

    fn rmsnorm_special_values(isa) {
        for cols in [1, 16, 17, 65] {
            let with = |special: f32| {
                let mut x = vec![0.5; cols];
                x[cols / 2] = special;
                run_rmsnorm(isa, &x, &vec![1.0; cols], EPS)
            };
            assert!(with(f32::NAN).iter().all(|y| y.is_nan()));
            for special in [INF, -INF, 1e30] {
                // A square beyond f32 counts as infinite: 1 / inf is 0, and 0 * inf is NaN.
                for (i, y) in with(special).into_iter().enumerate() {
                    let expected = if i == cols / 2 && special.is_infinite() { f32::NAN } else { 0.0 };
                    assert_bits(&[y], &[expected], &format!("{special} among {cols}, element {i}"));
                }
            }
        }
        assert_bits(&run_rmsnorm(isa, &[0.0; 20], &[1.0; 20], EPS), &[0.0; 20], "zeros");
    }

    fn norms_of_nothing(isa) {
        for (rows, cols) in [(0, 0), (0, 7), (7, 0)] {
            let gain = vec![1.0; cols];
            let empty = || MatMut::contiguous(&mut [], rows, cols).unwrap();
            layernorm(serial(isa), empty(), &gain, Some(&gain), EPS).unwrap();
            rmsnorm(serial(isa), empty(), &gain, EPS).unwrap();
        }
    }

    fn batchnorm_at_inference(isa) {
        let mut rng = Rng::new(4);
        for &cols in COLS {
            for &rows in ROWS {
                let (x, gain, bias, mean) =
                    (rng.vec(rows * cols, 3.0), rng.vec(cols, 1.5), rng.vec(cols, 1.0), rng.vec(cols, 1.0));
                let var: Vec<f32> = rng.vec(cols, 0.9).iter().map(|x| 1.0 + x).collect();
                let [wx, wg, wb, wm, wv] = [&x, &gain, &bias, &mean, &var].map(|v| r::to_f64(v));
                let expected = r::batchnorm(&wx, &wg, &wb, &wm, &wv, f64::from(EPS));
                let mut y = Guarded::new(rows, cols, &x);
                let affine = Affine::from_running(&gain, &bias, &mean, &var, EPS).unwrap();
                affine.apply(serial(isa), y.view_mut()).unwrap();
                let (input, mut out) = (Guarded::new(rows, cols, &x), Guarded::unset(rows, cols));
                affine.apply_into(serial(isa), input.view(), out.view_mut()).unwrap();
                assert_bits(&out.values(), &y.values(), "apply_into");
                // Terms reach 3 * 1.5 / sqrt(0.1), and some cancel.
                assert_close(&y.values(), &expected, 4e-6 * slack(isa), &format!("[{rows}, {cols}]"));
            }
        }
    }

    fn batchnorm_special_values(isa) {
        let affine = Affine::new(vec![2.0, 0.0, -1.0], vec![1.0, 1.0, 1.0]).unwrap();
        let mut y = Guarded::new(3, 3, &[f32::NAN, 1.0, 1.0, INF, INF, INF, -INF, f32::NAN, -0.0]);
        affine.apply(serial(isa), y.view_mut()).unwrap();
        let expected = [f32::NAN, 1.0, 0.0, INF, f32::NAN, -INF, -INF, f32::NAN, 1.0];
        assert_bits(&y.values(), &expected, "scale and shift");
    }

    fn batchnorm_training(isa) {
        let mut rng = Rng::new(5);
        for cols in [1, 15, 16, 17, 33, 64, 65] {
            for rows in [1, 2, 3, 50, 257] {
                for some in [false, true] {
                    let (x, gain, bias) = (rng.vec(rows * cols, 3.0), rng.vec(cols, 1.5), rng.vec(cols, 1.0));
                    let valid: Vec<bool> = (0..rows).map(|i| i == 0 || rng.below(3) > 0).collect();
                    let valid = some.then_some(&valid[..]);
                    let (mean, var) = (rng.vec(cols, 1.0), vec![0.75; cols]);
                    let [wx, wg, wb, wm, wv] = [&x, &gain, &bias, &mean, &var].map(|v| r::to_f64(v));
                    let expected =
                        r::batchnorm_train(&wx, valid, &wg, &wb, f64::from(EPS), &wm, &wv, f64::from(0.1_f32));
                    let mut stats = BatchStats::new(mean, var, 0.1).unwrap();
                    let y = run_train(isa, &x, valid, (&gain, &bias), &mut stats);

                    let what = format!("[{rows}, {cols}], some rows {some}");
                    // Few rows that are close together make a small deviation, by which errors of 1e-7 are divided.
                    let limit = |i: usize, e: f64| {
                        let deviation = (expected.batch_var[i % cols] + f64::from(EPS)).sqrt();
                        1e-6 * (1.0 + e.abs() + 1.0 / deviation) * slack(isa)
                    };
                    assert_within(&y, &expected.y, limit, &what);
                    let limit = 4e-6 * slack(isa);
                    assert_close(&stats.batch_mean, &expected.batch_mean, limit, &what);
                    assert_close(&stats.batch_var, &expected.batch_var, limit, &what);
                    assert_close(&stats.running_mean, &expected.running_mean, limit, &what);
                    assert_close(&stats.running_var, &expected.running_var, limit, &what);
                    for (i, row) in x.chunks(cols).enumerate().filter(|(i, _)| valid.is_some_and(|v| !v[*i])) {
                        assert_bits(&y[i * cols..][..cols], row, "an invalid row");
                    }
                }
            }
        }
    }

    fn batchnorm_training_far_from_zero(isa) {
        let mut rng = Rng::new(6);
        let x: Vec<f32> = rng.vec(300 * 5, 0.017).iter().map(|x| 1e4 + x).collect();
        let (ones, zeros) = (vec![1.0; 5], vec![0.0; 5]);
        let wide = [&ones, &zeros].map(|v| r::to_f64(v));
        let [one, zero] = &wide;
        let expected = r::batchnorm_train(&r::to_f64(&x), None, one, zero, 0.0, zero, one, 0.5);
        let mut y = Guarded::new(300, 5, &x);
        let mut stats = BatchStats::new(zeros.clone(), ones.clone(), 0.5).unwrap();
        batchnorm_train(serial(isa), y.view_mut(), None, &ones, &zeros, 0.0, &mut stats).unwrap();
        assert_close(&y.values(), &expected.y, 2e-6 * slack(isa), "shifted");
        assert_within(&stats.batch_var, &expected.batch_var, |_, e| 2e-6 * slack(isa) * e, "variance");
    }

    fn batchnorm_training_without_valid_rows_changes_nothing(isa) {
        let mut stats = BatchStats::new(vec![1.0, 2.0], vec![3.0, 4.0], 0.5).unwrap();
        stats.batch_mean = vec![5.0, 6.0];
        let before = stats.clone();
        let x = [1.0, 2.0, f32::NAN, 4.0];
        let y = run_train(isa, &x, Some(&[false, false]), (&[1.0, 1.0], &[0.0, 0.0]), &mut stats);
        assert_bits(&y, &x, "rows");
        assert_eq!(stats, before);
        assert!(run_train(isa, &[], None, (&[1.0, 1.0], &[0.0, 0.0]), &mut stats).is_empty());
        assert_eq!(stats, before);
    }

    fn batchnorm_training_special_values(isa) {
        for special in [f32::NAN, INF, -INF] {
            // Channel 1 has it in a valid row, channel 2 in an invalid one.
            let x = [1.0, special, 2.0, 3.0, 1.0, special, 2.0, 5.0, 3.0];
            let mut stats = BatchStats::new(vec![0.0; 3], vec![1.0; 3], 0.5).unwrap();
            let weights: (&[f32], &[f32]) = (&[1.0; 3], &[0.0; 3]);
            let y = run_train(isa, &x, Some(&[true, false, true]), weights, &mut stats);
            assert_bits(&y[3..6], &x[3..6], "the invalid row");
            assert!(y[1].is_nan() && y[7].is_nan(), "{special} reaches its channel");
            assert!(stats.batch_mean[1].is_nan() || stats.batch_mean[1].is_infinite(), "{stats:?}");
            assert!(stats.batch_var[1].is_nan() && stats.running_var[1].is_nan(), "{stats:?}");
            for i in [0, 2, 6, 8] {
                assert!(y[i].is_finite(), "{special} stays in its channel");
            }
            assert_eq!((stats.batch_mean[0], stats.batch_mean[2]), (1.5, 2.5));
        }
    }
}
