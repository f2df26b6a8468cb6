#![no_main]
//! The FFN of any widths, rows and strides, gated or not.

use laneformer::reference as r;
use laneformer_fuzz::data::Rng;
use laneformer_fuzz::model::{ACTIVATIONS, Model, Shape};
use laneformer_fuzz::{everywhere, guarded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([u8; 3], [u8; 2], u8, bool, u64)| {
    let ([rows, d_model, d_ff], paddings, activation, gated, seed) = input;
    let (rows, d_model, d_ff) =
        (usize::from(rows % 140), usize::from(d_model % 90) + 1, usize::from(d_ff) * 3 + 1);
    let activation = ACTIVATIONS[usize::from(activation) % ACTIVATIONS.len()];
    let mut rng = Rng::new(seed);
    let model =
        Model::without_attention(Shape { activation, gated, ..Shape::new(1, d_model, d_ff) }, &mut rng);
    let x = rng.vec(rows * d_model, 1.5);
    let expected = model.reference_ffn_of(&r::to_f64(&x));
    let ffn = model.ffn();
    let x = guarded(rows, d_model, paddings[0], &x);
    everywhere(
        &expected,
        |_, _| 2e-5,
        |ctx| {
            let mut out = guarded(rows, d_model, paddings[1], &vec![9.0; rows * d_model]);
            ffn.forward(ctx, x.view(), out.view_mut()).unwrap();
            out.values()
        },
    );
});
