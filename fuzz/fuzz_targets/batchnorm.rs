#![no_main]
//! Batch norm in training over some rows, and with running statistics; special values in channels of their own.

use laneformer::reference as r;
use laneformer::{Affine, BatchStats, batchnorm_train};
use laneformer_fuzz::{Values, assert_same, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

const EPS: f32 = 1e-3;
const MOMENTUM: f32 = 0.25;

fuzz_target!(|input: (u8, u8, u8, Option<u64>, Values)| {
    let (rows, channels, padding, some, mut values) = input;
    let (rows, channels) = (usize::from(rows % 90), usize::from(channels % 140) + 1);
    let mut x = values.take(rows * channels);
    let valid = some.map(|bits| (0..rows).map(|i| bits >> (i % 64) & 1 == 1).collect::<Vec<_>>());
    let valid = valid.as_deref();
    // One in a channel makes all of its results NaN, which the reference tells only where arithmetic does.
    let is_valid = |row: usize| valid.is_none_or(|valid| valid[row]);
    let mut is_special = vec![false; channels];
    for (i, x) in x.iter().enumerate() {
        is_special[i % channels] |= !x.is_finite() && is_valid(i / channels);
    }
    for (i, x) in x.iter_mut().enumerate() {
        if is_special[i % channels] && is_valid(i / channels) {
            *x = f32::NAN;
        }
    }
    let channel = |f: fn(usize) -> f32| (0..channels).map(f).collect::<Vec<f32>>();
    let (gain, bias) = (channel(|c| 0.5 + (c % 7) as f32 / 8.0), channel(|c| (c % 3) as f32 - 1.0));
    let (mean, var) = (channel(|c| (c % 5) as f32 / 4.0), channel(|c| 0.25 + (c % 4) as f32));
    let [wide_x, wide_gain, wide_bias, wide_mean, wide_var] =
        [&x, &gain, &bias, &mean, &var].map(|x| r::to_f64(x));
    let (eps, momentum) = (f64::from(EPS), f64::from(MOMENTUM));
    let trained =
        r::batchnorm_train(&wide_x, valid, &wide_gain, &wide_bias, eps, &wide_mean, &wide_var, momentum);
    let statistics = [&trained.batch_mean, &trained.batch_var, &trained.running_mean, &trained.running_var];
    let expected: Vec<f64> = trained.y.iter().chain(statistics.into_iter().flatten()).copied().collect();
    let size = values.size();
    everywhere(
        &expected,
        |i, e| {
            if i >= x.len() {
                // A variance is the square of a deviation; both are sums of what is rounded.
                return 4e-6 * (e.abs() + if (i - x.len()) / channels % 2 == 0 { size } else { size * size });
            }
            // Errors of a mean are divided by the deviation.
            let deviation = (trained.batch_var[i % channels] + eps).sqrt();
            if is_valid(i / channels) { 2e-6 * (1.0 + e.abs() + size / deviation) } else { 0.0 }
        },
        |ctx| {
            let mut y = guarded(rows, channels, padding, &x);
            let mut stats = BatchStats::new(mean.clone(), var.clone(), MOMENTUM).unwrap();
            batchnorm_train(ctx, y.view_mut(), valid, &gain, &bias, EPS, &mut stats).unwrap();
            let BatchStats { batch_mean, batch_var, running_mean, running_var, .. } = stats;
            [y.values(), batch_mean, batch_var, running_mean, running_var].concat()
        },
    );

    let running = Affine::from_running(&gain, &bias, &mean, &var, EPS).unwrap();
    let expected = r::batchnorm(&wide_x, &wide_gain, &wide_bias, &wide_mean, &wide_var, eps);
    everywhere(
        &expected,
        // The shift is rounded with the product of mean and scale in it.
        |i, e| {
            4e-7 * (e.abs() + 8.0) + if wide_x[i].is_finite() { 4e-7 * wide_x[i].abs() * 4.0 } else { 0.0 }
        },
        |ctx| {
            let mut y = guarded(rows, channels, padding, &x);
            running.apply(ctx, y.view_mut()).unwrap();
            let (x, mut out) = (
                guarded(rows, channels, 3, &x),
                guarded(rows, channels, padding, &vec![9.0; rows * channels]),
            );
            running.apply_into(ctx, x.view(), out.view_mut()).unwrap();
            assert_same(&out.values(), &y.values(), "apply_into");
            y.values()
        },
    );
});
