//! What the benches share: random inputs, and one row per instruction set that is worth its time.

#![allow(dead_code, reason = "every bench uses its own part of this")]

use std::time::Duration;

use criterion::Criterion;
use laneformer::{Context, Isa, Linear, MatRef, PackedMatrix, Serial};

/// Values in -1..1 from a fixed seed.
pub fn random(len: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The instruction sets of this CPU but `scalar`, which exists to be right.
pub fn contexts() -> Vec<Context<'static>> {
    let all = Isa::available().into_iter().filter(|isa| *isa != Isa::SCALAR);
    all.map(|isa| Context::new(isa, &Serial)).collect()
}

/// A linear map with weights that keep the size of rows.
pub fn linear(n: usize, k: usize) -> Linear {
    let weight: Vec<f32> = random(n * k).iter().map(|w| w * (3.0 / k as f32).sqrt()).collect();
    let weight = PackedMatrix::from_out_in(MatRef::contiguous(&weight, n, k).unwrap()).unwrap();
    Linear::new(weight, Some(&random(n))).unwrap()
}

/// Short, for a comparison of two commits; `laneformer bench` has percents of the peak.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}
