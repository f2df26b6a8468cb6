#![no_main]
//! Rotary positions of any heads, pairs, strides and positions, with special values.

use laneformer::reference as r;
use laneformer::{Rotary, RotaryPairs};
use laneformer_fuzz::{Values, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([u8; 3], [u16; 4], u8, bool, Values)| {
    let ([heads, dim, turned], positions, padding, interleaved, mut values) = input;
    let (heads, dim) = (usize::from(heads % 4), usize::from(dim % 140) + 2);
    let turned = (usize::from(turned) % dim / 2 + 1).min(dim / 2) * 2;
    let pairs = if interleaved { RotaryPairs::Interleaved } else { RotaryPairs::Halves };
    let (rotary, positions) =
        (Rotary::new(pairs, turned, 100.0, 500).unwrap(), positions.map(|p| usize::from(p) % 500));
    let cols = heads * dim;
    let x = values.take(positions.len() * cols);
    let frequencies = r::rotary_frequencies(turned, 100.0);
    let expected = if cols == 0 {
        vec![]
    } else {
        r::rotary(&r::to_f64(&x), dim, &frequencies, interleaved, &positions)
    };
    let size = values.size();
    everywhere(
        &expected,
        |_, _| 5e-7 * size,
        |ctx| {
            let mut y = guarded(positions.len(), cols, padding, &x);
            rotary.apply(ctx, dim, &positions, y.view_mut()).unwrap();
            y.values()
        },
    );
});
