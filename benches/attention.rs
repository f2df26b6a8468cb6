//! Attention of one sequence, 12 heads of 64. Throughput is floating-point operations of the edges of the graph.

mod common;

use common::{contexts, criterion, random};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use laneformer::{Context, Graph, Heads, KeyStore, MatMut, MatRef, QueryRows, Terms};

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    let heads = Heads::new(12, 64).unwrap();
    for tokens in [128, 512] {
        let x = random(tokens * 768);
        let view = MatRef::contiguous(&x, tokens, 768).unwrap();
        let offsets = [0, tokens];
        let mut keys = KeyStore::new(&heads, tokens, 1).unwrap();
        keys.set(Context::serial(), view, view, &offsets).unwrap();
        let mut out = vec![0.0; x.len()];
        for (name, graph, edges) in
            [("full", Graph::full(), tokens * tokens), ("causal", Graph::causal(), tokens * (tokens + 1) / 2)]
        {
            group.throughput(Throughput::Elements(4 * 768 * edges as u64));
            for ctx in contexts() {
                group.bench_function(format!("{}/{name}-s{tokens}", ctx.isa()), |b| {
                    b.iter(|| {
                        let out = MatMut::contiguous(&mut out, tokens, 768).unwrap();
                        let queries = QueryRows::new(view, &offsets);
                        keys.attend(ctx, &heads, &queries, &graph, &Terms::default(), out).unwrap();
                    });
                });
            }
        }
    }
    group.finish();
}

criterion_group!(name = benches; config = criterion(); targets = attention);
criterion_main!(benches);
