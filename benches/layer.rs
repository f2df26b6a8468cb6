//! A layer of MiniLM's and of BERT-base's size, in place. Throughput is floating-point operations.

mod common;

use common::{contexts, criterion, linear, random};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use laneformer::{
    Activation, Ffn, Graph, Heads, Layer, MatMut, Norm, Placement, QkvProjection, SelfAttention, SubLayer,
};

fn layer(n_heads: usize, head_dim: usize) -> Layer {
    let d = n_heads * head_dim;
    let norm =
        || Placement::post(Norm::LayerNorm { gain: vec![1.0; d], bias: Some(vec![0.0; d]), eps: 1e-12 });
    let heads = Heads::new(n_heads, head_dim).unwrap();
    let qkv = QkvProjection::new(linear(d, d), linear(d, d), linear(d, d), heads).unwrap();
    let attention = SelfAttention::new(qkv, linear(d, d)).unwrap();
    let ffn = Ffn::new(linear(4 * d, d), Activation::GeluErf, linear(d, 4 * d)).unwrap();
    Layer::new(vec![
        SubLayer::self_attention(attention, norm()).unwrap(),
        SubLayer::ffn(ffn, norm()).unwrap(),
    ])
    .unwrap()
}

fn layers(c: &mut Criterion) {
    let mut group = c.benchmark_group("layer");
    for (name, n_heads, head_dim) in [("minilm", 12, 32), ("bert-base", 12, 64)] {
        let layer = layer(n_heads, head_dim);
        for (batch, seq_len) in [(1, 16), (1, 128), (8, 128)] {
            run(&mut group, name, &layer, batch, seq_len);
        }
    }
    group.finish();
}

type Group<'a> = BenchmarkGroup<'a, criterion::measurement::WallTime>;

fn run(group: &mut Group<'_>, name: &str, layer: &Layer, batch: usize, seq_len: usize) {
    let (d, tokens) = (layer.d_model(), batch * seq_len);
    let offsets: Vec<usize> = (0..=batch).map(|i| i * seq_len).collect();
    group.throughput(Throughput::Elements((tokens * (24 * d * d + 4 * seq_len * d)) as u64));
    let mut workspace = layer.workspace(tokens, batch, 1).unwrap();
    for ctx in contexts() {
        let mut x = random(tokens * d);
        group.bench_function(format!("{}/{name}-b{batch}s{seq_len}", ctx.isa()), |b| {
            b.iter(|| {
                let x = MatMut::contiguous(&mut x, tokens, d).unwrap();
                layer.forward(ctx, x, &offsets, &Graph::full(), &mut workspace).unwrap();
            });
        });
    }
}

criterion_group!(name = benches; config = criterion(); targets = layers);
criterion_main!(benches);
