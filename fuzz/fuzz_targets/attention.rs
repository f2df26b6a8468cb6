#![no_main]
//! Attention of ragged batches with any heads, strides and graphs; special values stand behind the mask.

use laneformer::reference as r;
use laneformer::{Graph, Heads, attention};
use laneformer_fuzz::{Values, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([u8; 4], [u16; 3], [u8; 4], Option<u8>, Option<u8>, Values)| {
    let ([groups, kv_heads, dim, value_dim], lens, paddings, left, right, mut values) = input;
    let (n_kv, dim) = (usize::from(kv_heads % 3) + 1, usize::from(dim % 40) + 1);
    let n_heads = n_kv * (usize::from(groups % 3) + 1);
    let heads = Heads::new(n_heads, dim).unwrap();
    let heads = heads.with_kv_heads(n_kv).unwrap().with_value_dim(usize::from(value_dim % 40) + 1).unwrap();
    let lens = lens.map(|len| usize::from(len) % if dim < 8 { 300 } else { 70 });
    let ends = [0, lens[0], lens[0] + lens[1], lens.iter().sum()];
    let tokens = ends[3];
    let limit = |side: Option<u8>| side.map_or(usize::MAX, usize::from);
    let graph = Graph::window(limit(left), limit(right));

    // Of the size of an activation, whatever the input's: a score of thousands is known to no more than its rounding.
    let mut finite = |len: usize| -> Vec<f32> {
        let size = values.size() as f32;
        values.take(len).iter().map(|x| if x.is_finite() { x / size } else { 0.5 }).collect()
    };
    let (q, mut k, mut v) = (
        finite(tokens * heads.query_cols()),
        finite(tokens * heads.key_cols()),
        finite(tokens * heads.value_cols()),
    );
    // What no query sees: under a window without a right side only the reference tells, so ask the graph.
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for (segment, &len) in lens.iter().enumerate() {
        for j in (0..len).filter(|&j| (0..len).all(|i| !graph.allows(i, j))) {
            let row = ends[segment] + j;
            k[row * heads.key_cols()..][..heads.key_cols()].fill(special[j % 3]);
            v[row * heads.value_cols()..][..heads.value_cols()].fill(special[(j + 1) % 3]);
        }
    }
    // And the last key of the first segment, for those who do not see it.
    if lens[0] > 1 && !graph.allows(0, lens[0] - 1) {
        let row = lens[0] - 1;
        v[row * heads.value_cols()] = f32::NAN;
        k[row * heads.key_cols()] = f32::NAN;
    }

    let shape = r::Attention {
        n_heads,
        n_kv_heads: n_kv,
        head_dim: dim,
        value_dim: heads.value_dim,
        scale: f64::from(heads.scale),
        softcap: None,
    };
    let expected = r::attention_packed(
        &r::to_f64(&q),
        &r::to_f64(&k),
        &r::to_f64(&v),
        &shape,
        &ends,
        &ends,
        |_, _, i, j| graph.allows(i, j),
        |_, _, _, _| 0.0,
    );
    let q = guarded(tokens, heads.query_cols(), paddings[0], &q);
    let k = guarded(tokens, heads.key_cols(), paddings[1], &k);
    let v = guarded(tokens, heads.value_cols(), paddings[2], &v);
    everywhere(
        &expected,
        |_, _| 4e-6,
        |ctx| {
            let mut out =
                guarded(tokens, heads.output_cols(), paddings[3], &vec![0.0; tokens * heads.output_cols()]);
            attention(ctx, &heads, q.view(), k.view(), v.view(), &ends, &graph, out.view_mut()).unwrap();
            out.values()
        },
    );
});
