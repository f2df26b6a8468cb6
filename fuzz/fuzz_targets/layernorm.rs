#![no_main]
//! Layer normalisation of any rows with any stride and special values.

use laneformer::reference as r;
use laneformer::{layernorm, layernorm_into};
use laneformer_fuzz::{Values, assert_same, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u16, u8, bool, Values)| {
    let (rows, cols, padding, with_bias, mut values) = input;
    let (rows, cols) = (usize::from(rows % 5), usize::from(cols % 300));
    let x = values.take(rows * cols);
    let gain: Vec<f32> = (0..cols).map(|i| 0.5 + (i % 7) as f32 / 8.0).collect();
    let bias = with_bias.then(|| vec![0.25; cols]);
    let (wide_gain, wide_bias) = (r::to_f64(&gain), bias.as_deref().map(r::to_f64));
    let mut expected = r::layernorm(&r::to_f64(&x), &wide_gain, wide_bias.as_deref(), 1e-5);
    // An infinity has no mean; the reference makes NaN of it as the library does, but only where it meets arithmetic.
    for (row, y) in x.chunks(cols.max(1)).zip(expected.chunks_mut(cols.max(1))) {
        if row.iter().any(|x| !x.is_finite()) {
            y.fill(f64::NAN);
        }
    }
    everywhere(
        &expected,
        |_, e| 2e-6 * (1.0 + e.abs()),
        |ctx| {
            let mut y = guarded(rows, cols, padding, &x);
            layernorm(ctx, y.view_mut(), &gain, bias.as_deref(), 1e-5).unwrap();
            let (x, mut out) =
                (guarded(rows, cols, 3, &x), guarded(rows, cols, padding, &vec![9.0; rows * cols]));
            layernorm_into(ctx, x.view(), &gain, bias.as_deref(), 1e-5, out.view_mut()).unwrap();
            assert_same(&out.values(), &y.values(), "layernorm_into");
            y.values()
        },
    );
});
