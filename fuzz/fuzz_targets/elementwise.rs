#![no_main]
//! Every elementwise function of any rows with any stride and special values.

use laneformer::reference as r;
use laneformer::{Function, elementwise, elementwise_into};
use laneformer_fuzz::{Values, assert_same, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

/// The error that the documentation allows: a part of the result, and a part of `max(1, |x|)`.
const FUNCTIONS: [(Function, fn(f64) -> f64, [f64; 2]); 8] = [
    (Function::Exp, r::exp, [1.1e-7, 0.0]),
    (Function::Tanh, r::tanh, [3e-7, 0.0]),
    (Function::Erf, r::erf, [6e-7, 0.0]),
    (Function::Relu, r::relu, [0.0, 0.0]),
    (Function::GeluErf, r::gelu_erf, [0.0, 1.7e-7]),
    (Function::GeluTanh, r::gelu_tanh, [0.0, 1.7e-7]),
    (Function::QuickGelu, r::quick_gelu, [0.0, 2e-7]),
    (Function::Silu, r::silu, [0.0, 2e-7]),
];

fuzz_target!(|input: (u8, u8, u16, u8, Values)| {
    let (function, rows, cols, padding, mut values) = input;
    let (function, reference, [relative, absolute]) = FUNCTIONS[usize::from(function) % FUNCTIONS.len()];
    let (rows, cols) = (usize::from(rows % 5), usize::from(cols % 300));
    let x = values.take(rows * cols);
    // What is beyond f32 is its infinity.
    let rounded = |y: f64| if (y as f32).is_infinite() { f64::from(y as f32) } else { y };
    let expected: Vec<f64> = r::to_f64(&x).iter().map(|&x| rounded(reference(x))).collect();
    everywhere(
        &expected,
        // Where a gelu is almost 0 it may be 0, and a subnormal result is known to five units.
        |i, e| {
            let size = f64::from(x[i]).abs();
            let vanishing = if absolute > 0.0 && x[i] < -5.0 { 4e-7 } else { 0.0 };
            relative * e.abs() + (absolute * size.max(1.0)).max(vanishing) + 7e-45
        },
        |ctx| {
            let mut y = guarded(rows, cols, padding, &x);
            elementwise(ctx, function, y.view_mut()).unwrap();
            let (x, mut out) =
                (guarded(rows, cols, 3, &x), guarded(rows, cols, padding, &vec![9.0; rows * cols]));
            elementwise_into(ctx, function, x.view(), out.view_mut()).unwrap();
            assert_same(&out.values(), &y.values(), "elementwise_into");
            y.values()
        },
    );
});
