//! Products at the shapes of BERT-base, and of a single row. Throughput is floating-point operations.

mod common;

use common::{contexts, criterion, linear, random};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use laneformer::gemm::{Strided, StridedMut, matmul};
use laneformer::{Activation, Epilogue, MatMut, MatRef};

const SHAPES: [(usize, usize, usize); 4] =
    [(128, 768, 768), (128, 3072, 768), (1, 3072, 768), (8, 768, 3072)];

fn gemm(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm");
    for (m, n, k) in SHAPES {
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        let (map, x, mut y) = (linear(n, k), random(m * k), vec![0.0; m * n]);
        for ctx in contexts() {
            for (name, epilogue) in
                [("", Epilogue::NONE), ("-gelu", Epilogue::activation(Activation::GeluErf))]
            {
                group.bench_function(format!("{}/m{m}n{n}k{k}{name}", ctx.isa()), |b| {
                    b.iter(|| {
                        let x = MatRef::contiguous(&x, m, k).unwrap();
                        map.forward(ctx, x, &epilogue, MatMut::contiguous(&mut y, m, n).unwrap()).unwrap();
                    });
                });
            }
        }
        // The baseline: operands that are packed in every call.
        let weight = random(n * k);
        group.bench_function(format!("matrixmultiply/m{m}n{n}k{k}"), |b| {
            b.iter(|| {
                let x = Strided::new(&x, m, k, k, 1).unwrap();
                let weight = Strided::new(&weight, k, n, 1, k).unwrap();
                matmul(x, weight, StridedMut::new(&mut y, m, n, n, 1).unwrap()).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(name = benches; config = criterion(); targets = gemm);
criterion_main!(benches);
