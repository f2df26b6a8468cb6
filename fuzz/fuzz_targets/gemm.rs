#![no_main]
//! A packed product with its epilogue, of any shape with any strides and special values.

use laneformer::reference as r;
use laneformer::{Activation, Epilogue, Linear, PackedMatrix};
use laneformer_fuzz::{Values, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

type Function = fn(f64) -> f64;

const ACTIVATIONS: [(Activation, Function); 4] = [
    (Activation::None, |x| x),
    (Activation::Relu, r::relu),
    (Activation::GeluErf, r::gelu_erf),
    (Activation::Tanh, r::tanh),
];

fuzz_target!(|input: ([u8; 3], [u8; 4], u8, Option<i8>, Values, Values)| {
    let ([m, n, k], paddings, activation, residual, mut values, mut weights) = input;
    // K over a block of 512 now and then.
    let (m, n, k) = (usize::from(m % 14), usize::from(n % 140) + 1, usize::from(k) * 3 + 1);
    let (activation, function) = ACTIVATIONS[usize::from(activation) % ACTIVATIONS.len()];
    let (x, w, bias) = (values.take(m * k), weights.take(n * k), weights.take(n));
    let residual = residual.map(|scale| (f32::from(scale) / 16.0, values.take(m * n)));

    let (wide_w, wide_bias) = (r::to_f64(&w), r::to_f64(&bias));
    let map = r::Linear { weight: &wide_w, bias: Some(&wide_bias), in_features: k };
    let wide_residual = residual.as_ref().map(|(scale, x)| (f64::from(*scale), r::to_f64(x)));
    let wide_residual = wide_residual.as_ref().map(|(scale, x)| (*scale, &x[..]));
    let expected = r::linear(&r::to_f64(&x), &map, function, wide_residual);

    let weight = guarded(n, k, paddings[0], &w);
    let linear = Linear::new(PackedMatrix::from_out_in(weight.view()).unwrap(), Some(&bias)).unwrap();
    let x = guarded(m, k, paddings[1], &x);
    let rows = residual.as_ref().map(|(scale, r)| (*scale, guarded(m, n, paddings[2], r)));
    let mut epilogue = Epilogue::activation(activation);
    if let Some((scale, rows)) = &rows {
        epilogue = epilogue.with_residual(*scale, rows.view());
    }
    // Every product and partial sum is below `size * k`; roundings of one chain and of the activation.
    let size = values.size() * weights.size() * k as f64 + 8.0 * values.size();
    let limit = 6e-8 * size * 8.0 + 1e-6;
    everywhere(
        &expected,
        |_, _| limit,
        |ctx| {
            let mut y = guarded(m, n, paddings[3], &vec![f32::NAN; m * n]);
            linear.forward(ctx, x.view(), &epilogue, y.view_mut()).unwrap();
            y.values()
        },
    );
});
