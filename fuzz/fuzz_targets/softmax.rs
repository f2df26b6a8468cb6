#![no_main]
//! Softmax of any rows with any stride and special values.

use laneformer::reference as r;
use laneformer::{softmax, softmax_into};
use laneformer_fuzz::{Values, assert_same, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u16, u8, Values)| {
    let (rows, cols, padding, mut values) = input;
    let (rows, cols) = (usize::from(rows % 5), usize::from(cols % 300));
    let x = values.take(rows * cols);
    let expected = r::softmax(&r::to_f64(&x), cols);
    let relative = |i: usize| {
        // The difference to the maximum is rounded: half a unit of it. Beyond 87.3 the result is 0.
        let row = &x[i / cols * cols..][..cols];
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        4e-7 + 1e-7 * (cols as f64).log2() + f64::from(max - x[i]).min(104.0) * 6e-8
    };
    everywhere(
        &expected,
        |i, e| e * relative(i) + 1.2e-38,
        |ctx| {
            let mut y = guarded(rows, cols, padding, &x);
            softmax(ctx, y.view_mut()).unwrap();
            let (x, mut out) =
                (guarded(rows, cols, 3, &x), guarded(rows, cols, padding, &vec![9.0; rows * cols]));
            softmax_into(ctx, x.view(), out.view_mut()).unwrap();
            assert_same(&out.values(), &y.values(), "softmax_into");
            y.values()
        },
    );
});
