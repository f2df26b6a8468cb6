#![no_main]
//! RMS norm of any rows with any stride and special values.

use laneformer::reference as r;
use laneformer::{rmsnorm, rmsnorm_into};
use laneformer_fuzz::{Values, assert_same, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u16, u8, Values)| {
    let (rows, cols, padding, mut values) = input;
    let (rows, cols) = (usize::from(rows % 5), usize::from(cols % 300));
    let x = values.take(rows * cols);
    let gain: Vec<f32> = (0..cols).map(|i| 0.5 + (i % 7) as f32 / 8.0).collect();
    let expected = r::rmsnorm(&r::to_f64(&x), &r::to_f64(&gain), f64::from(1e-5_f32));
    let relative = 4e-7 + 1e-7 * (cols.max(1) as f64).log2();
    everywhere(
        &expected,
        |_, e| relative * e.abs() + 1e-40,
        |ctx| {
            let mut y = guarded(rows, cols, padding, &x);
            rmsnorm(ctx, y.view_mut(), &gain, 1e-5).unwrap();
            let (x, mut out) =
                (guarded(rows, cols, 3, &x), guarded(rows, cols, padding, &vec![9.0; rows * cols]));
            rmsnorm_into(ctx, x.view(), &gain, 1e-5, out.view_mut()).unwrap();
            assert_same(&out.values(), &y.values(), "rmsnorm_into");
            y.values()
        },
    );
});
