//! Row operations, in place on a buffer that stays in L2. Throughput is elements.

mod common;

use common::{contexts, criterion, random};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use laneformer::{Context, Function, MatMut, Rotary, RotaryPairs, elementwise, layernorm, softmax};

const SHAPES: [(usize, usize); 2] = [(128, 128), (128, 768)];

/// `f` on rows whose values it does not drive out of range when it is applied again and again.
fn rows(c: &mut Criterion, name: &str, f: impl Fn(Context<'_>, MatMut<'_>)) {
    let mut group = c.benchmark_group(name);
    for (rows, cols) in SHAPES {
        group.throughput(Throughput::Elements((rows * cols) as u64));
        for ctx in contexts() {
            let mut x = random(rows * cols);
            group.bench_function(format!("{}/{rows}x{cols}", ctx.isa()), |b| {
                b.iter(|| f(ctx, MatMut::contiguous(&mut x, rows, cols).unwrap()));
            });
        }
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    rows(c, "softmax", |ctx, x| softmax(ctx, x).unwrap());
    let (gain, bias) = (vec![1.0; 768], random(768));
    rows(c, "layernorm", |ctx, x| {
        let cols = x.cols();
        layernorm(ctx, x, &gain[..cols], Some(&bias[..cols]), 1e-5).unwrap();
    });
    let positions: Vec<usize> = (0..128).collect();
    for (name, pairs) in
        [("rotary halves", RotaryPairs::Halves), ("rotary interleaved", RotaryPairs::Interleaved)]
    {
        let rotary = Rotary::new(pairs, 64, 1e4, 128).unwrap();
        rows(c, name, |ctx, x| rotary.apply(ctx, 64, &positions, x).unwrap());
    }
    rows(c, "gelu", |ctx, x| elementwise(ctx, Function::GeluErf, x).unwrap());
}

criterion_group!(name = benches; config = criterion(); targets = all);
criterion_main!(benches);
