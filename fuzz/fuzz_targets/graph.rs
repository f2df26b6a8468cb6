#![no_main]
//! Attention over any graph with any terms in the scores, its queries anywhere: from a store, from rows, from a cache, behind a past and in a
//! layer, with the same bits.

use arbitrary::Arbitrary;
use laneformer::{
    Bias, Bits, CrossAttention, Graph, Heads, Inputs, KeyRows, KeyStore, KeyStream, KvCache, Layer, Linear,
    MatRef, PackedMatrix, Placement, QueryRows, Relative, RelativeTable, SegmentTerm, SubLayer, Terms,
};
use laneformer_fuzz::data::Rng;
use laneformer_fuzz::model::offsets;
use laneformer_fuzz::{assert_same, everywhere, guarded};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    seed: u64,
    queries: [u8; 2],
    keys: [u16; 2],
    groups: u8,
    kv_heads: u8,
    dims: [u8; 2],
    softcap: bool,
    sides: [Option<u16>; 2],
    columns: Option<u16>,
    bits: Option<BitsInput>,
    positions: Option<([i16; 2], bool)>,
    bias: Option<[bool; 3]>,
    relative: Option<(i16, u16)>,
    has_segments: bool,
    past: u16,
}

#[derive(Arbitrary, Debug)]
enum BitsInput {
    /// Own bits of each sequence, head and query, or of all; one of so many is missing.
    Dense([bool; 3], u8),
    Padding(u16),
    Groups(u8),
}

/// Something about a pair that looks like chance.
fn pattern(at: [usize; 4]) -> usize {
    at.iter().fold(7, |hash, &x| (hash ^ x).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)) >> 7
}

/// What a query at a place of its sequence may see of its keys: `(sequence, head, query, key)`.
type Allowed = Box<dyn Fn(usize, usize, usize, usize) -> bool>;

fn bits(input: &BitsInput, heads: usize, queries: [usize; 2], keys: [usize; 2]) -> (Bits, Allowed) {
    let longest = |lens: [usize; 2]| lens[0].max(lens[1]);
    match *input {
        BitsInput::Dense(own, one_in) => {
            let own = own.map(usize::from);
            let allowed = move |s: usize, h: usize, i: usize, j: usize| {
                pattern([s * own[0], h * own[1], i * own[2], j]) % (usize::from(one_in) + 1) != 1
            };
            let size = |i: usize, n: usize| if own[i] == 1 { n.max(1) } else { 1 };
            let dims = [size(0, 2), size(1, heads), size(2, longest(queries)), longest(keys)];
            (Bits::dense(dims, allowed).unwrap(), Box::new(allowed))
        }
        BitsInput::Padding(len) => {
            let is_real = move |s: usize, j: usize| j + s * 5 < usize::from(len) % 800;
            let masks: [Vec<bool>; 2] =
                std::array::from_fn(|s| (0..keys[s]).map(|j| is_real(s, j)).collect());
            (Bits::keys(&[&masks[0], &masks[1]]).unwrap(), Box::new(move |s, _, _, j| is_real(s, j)))
        }
        BitsInput::Groups(table) => {
            // Three groups that see one another as eight of nine bits say, and a run of tokens each.
            let group = |s: usize, i: usize| (i / 50 + s) % 3;
            let table: [bool; 9] = std::array::from_fn(|i| table >> (i % 8) & 1 == 1);
            let ids = |lens: [usize; 2]| -> Vec<u32> {
                (0..2).flat_map(|s| (0..lens[s]).map(move |i| group(s, i) as u32)).collect()
            };
            let bits = Bits::groups(&ids(queries), &ids(keys), &offsets(&keys), 3, &table).unwrap();
            (bits, Box::new(move |s, _, i, j| table[group(s, i) * 3 + group(s, j)]))
        }
    }
}

fuzz_target!(|input: Input| {
    let mut rng = Rng::new(input.seed);
    let n_kv = usize::from(input.kv_heads % 2) + 1;
    let heads =
        Heads::new(n_kv * (usize::from(input.groups % 3) + 1), usize::from(input.dims[0] % 20) + 1).unwrap();
    let heads =
        heads.with_kv_heads(n_kv).unwrap().with_value_dim(usize::from(input.dims[1] % 20) + 1).unwrap();
    let heads = if input.softcap { heads.with_softcap(1.5) } else { heads };
    let (n_heads, dim, value_dim) = (heads.n_heads, heads.head_dim, heads.value_dim);
    let queries = input.queries.map(|n| usize::from(n % 80));
    let keys = input.keys.map(|n| usize::from(n % 700));
    let (ends, key_ends) = (offsets(&queries), offsets(&keys));
    let (rows, key_rows) = (ends[2], key_ends[2]);
    let (longest, longest_key) = (queries[0].max(queries[1]), keys[0].max(keys[1]));
    let [q, k, v] = [rows * heads.query_cols(), key_rows * heads.key_cols(), key_rows * heads.value_cols()]
        .map(|len| rng.vec(len, 1.0));

    // Who sees whom.
    let side = |side: Option<u16>| side.map_or(usize::MAX, |side| usize::from(side % 600));
    let [left, right] = input.sides.map(side);
    let mut graph = Graph::window(left, right);
    // Every other seed has columns of their own for the heads.
    let is_global = |s: usize, h: usize, j: usize| {
        input.columns.is_some_and(|seed| {
            let (seed, own) = (usize::from(seed), usize::from(seed % 2));
            j < keys[s].min(seed % 500) && pattern([seed, s, h * own, j]).is_multiple_of(9)
        })
    };
    if let Some(seed) = input.columns {
        let dims = [2, if seed % 2 == 1 { n_heads } else { 1 }, 1, longest_key];
        graph = graph.with_columns(Bits::dense(dims, |s, h, _, j| is_global(s, h, j)).unwrap());
    }
    let mut by_bits: Option<Allowed> = None;
    if let Some(input) = &input.bits {
        let (bits, allowed) = bits(input, n_heads, queries, keys);
        (graph, by_bits) = (graph.with_bits(bits), Some(allowed));
    }
    let first: [isize; 2] = match input.positions {
        Some((first, _)) => first.map(|p| isize::from(p % 900)),
        None => std::array::from_fn(|s| keys[s] as isize - queries[s] as isize),
    };
    // One by one they may stand anywhere, and some one after another.
    let is_apart = input.positions.is_some_and(|(_, is_apart)| is_apart);
    let position = move |s: usize, i: usize| {
        first[s] + if is_apart { (i + i / 5 * 3) as isize % 41 } else { i as isize }
    };
    let each: Vec<isize> = (0..2).flat_map(|s| (0..queries[s]).map(move |i| position(s, i))).collect();

    // What is in a score beside the product.
    let own = input.bias.unwrap_or_default();
    let size = |i: usize, n: usize| if own[i] { n.max(1) } else { 1 };
    let bias_dims = [size(0, 2), size(1, n_heads), size(2, longest), longest_key];
    let mut bias = rng.vec(bias_dims.iter().product(), 1.0);
    bias.iter_mut().step_by(13).for_each(|x| *x = f32::NEG_INFINITY);
    let bias_of = |s: usize, h: usize, i: usize, j: usize| {
        let [s, h, i] = [(s, 0), (h, 1), (i, 2)].map(|(x, axis)| if bias_dims[axis] == 1 { 0 } else { x });
        bias[((s * bias_dims[1] + h) * bias_dims[2] + i) * bias_dims[3] + j]
    };
    let cols = heads.query_cols();
    let [u, w, s_term] = std::array::from_fn(|_| rng.vec(cols, 0.5));
    let e = rng.vec(2 * cols, 1.0);
    let (from, distances) =
        input.relative.map_or((0, 1), |(from, n)| (isize::from(from % 700), usize::from(n % 900) + 1));
    let r = rng.vec(distances * cols, 1.0);
    let r_rows = guarded(distances, cols, 0, &r);
    let table = RelativeTable::new(r_rows.view(), from, n_heads).unwrap();
    let same_segment = |s: usize, i: usize, j: usize| pattern([3, s, i / 9, j / 40]) % 2 == 0;
    let same = Bits::dense([2, 1, longest.max(1), longest_key], |s, _, i, j| same_segment(s, i, j)).unwrap();
    let terms = Terms {
        bias: input.bias.map(|_| Bias::new(&bias, bias_dims).unwrap()),
        relative: input.relative.map(|_| Relative { u: &u, w: &w, table: &table }),
        segment: input.has_segments.then_some(SegmentTerm { s: &s_term, e: &e, same: &same }),
    };

    // By the formula.
    let wide = f64::from;
    let score = |s: usize, h: usize, i: usize, j: usize| {
        let query = |d: usize| wide(q[(ends[s] + i) * cols + h * dim + d]);
        let kv = h * n_kv / n_heads;
        let key = |d: usize| wide(k[(key_ends[s] + j) * heads.key_cols() + kv * dim + d]);
        let sum = |f: &dyn Fn(usize) -> f64| (0..dim).map(f).sum::<f64>();
        let of_head = |x: &[f32], d: usize| wide(x[h * dim + d]);
        let mut score = sum(&|d| query(d) * key(d));
        if terms.relative.is_some() {
            score += sum(&|d| of_head(&u, d) * key(d));
            let row = position(s, i) - j as isize - from;
            if (0..distances as isize).contains(&row) {
                score += sum(&|d| (query(d) + of_head(&w, d)) * of_head(&r[row as usize * cols..], d));
            }
        }
        if terms.segment.is_some() {
            let e = if same_segment(s, i, j) { &e[..cols] } else { &e[cols..] };
            score += sum(&|d| (query(d) + of_head(&s_term, d)) * of_head(e, d));
        }
        score *= wide(heads.scale);
        if input.softcap {
            score = 1.5 * (score / 1.5).tanh();
        }
        if terms.bias.is_some() { score + wide(bias_of(s, h, i, j)) } else { score }
    };
    let allowed = |s: usize, h: usize, i: usize, j: usize| {
        let (p, key) = (position(s, i), j as isize);
        let is_near = (left == usize::MAX || key >= p - left as isize)
            && (right == usize::MAX || key <= p + right as isize);
        (is_near || is_global(s, h, j)) && by_bits.as_ref().is_none_or(|by_bits| by_bits(s, h, i, j))
    };
    let mut expected = vec![];
    for (s, i) in (0..2).flat_map(|s| (0..queries[s]).map(move |i| (s, i))) {
        for h in 0..n_heads {
            let seen = (0..keys[s]).filter(|&j| allowed(s, h, i, j)).map(|j| (j, score(s, h, i, j)));
            let seen: Vec<(usize, f64)> = seen.filter(|(_, score)| *score > f64::NEG_INFINITY).collect();
            let max = seen.iter().fold(f64::NEG_INFINITY, |max, (_, score)| max.max(*score));
            let total: f64 = seen.iter().map(|(_, score)| (score - max).exp()).sum();
            let value = |j: usize, d: usize| {
                wide(v[(key_ends[s] + j) * heads.value_cols() + h * n_kv / n_heads * value_dim + d])
            };
            for d in 0..value_dim {
                let sum: f64 = seen.iter().map(|&(j, score)| (score - max).exp() * value(j, d)).sum();
                expected.push(if seen.is_empty() { 0.0 } else { sum / total });
            }
        }
    }

    let [q, k, v] = [(rows, cols, &q), (key_rows, heads.key_cols(), &k), (key_rows, heads.value_cols(), &v)]
        .map(|(rows, cols, x)| guarded(rows, cols, 5, x));
    let query_rows = QueryRows::new(q.view(), &ends);
    let query_rows = match input.positions {
        Some((_, true)) => query_rows.at(&each),
        Some((_, false)) => query_rows.starting_at(&first),
        None => query_rows,
    };
    let past: [usize; 2] = std::array::from_fn(|s| usize::from(input.past) % (keys[s] + 1));
    let part = |x: &laneformer_fuzz::Guarded, from: [usize; 2], to: [usize; 2]| {
        let cols = x.view().cols();
        let values = x.values();
        let of = |s: usize| values[(key_ends[s] + from[s]) * cols..(key_ends[s] + to[s]) * cols].to_vec();
        let values = [of(0), of(1)].concat();
        guarded(values.len() / cols, cols, 2, &values)
    };
    // In a layer whose maps take columns as they are: queries are its rows, keys and values stand beside each other in its source.
    let (key_cols, value_cols, out_cols) = (heads.key_cols(), heads.value_cols(), heads.output_cols());
    let source_cols = key_cols + value_cols;
    let cross = CrossAttention::new(
        columns(cols, 0, cols),
        columns(source_cols, 0, key_cols),
        columns(source_cols, key_cols, value_cols),
        columns(out_cols, 0, cols),
        heads,
    );
    let sub_layer = SubLayer::cross_attention(cross.unwrap(), Placement::Plain).unwrap();
    let layer = Layer::new(vec![sub_layer]).unwrap();
    let (k_values, v_values) = (k.values(), v.values());
    let beside =
        |i: usize| [&k_values[i * key_cols..][..key_cols], &v_values[i * value_cols..][..value_cols]];
    let source: Vec<f32> = (0..key_rows).flat_map(beside).flatten().copied().collect();
    let source = guarded(key_rows, source_cols, 1, &source);
    let unset = vec![9.0; rows * heads.output_cols()];
    everywhere(
        &expected,
        |_, _| 1e-5,
        |ctx| {
            let mut store = KeyStore::new(&heads, key_rows, 2).unwrap();
            store.set(ctx, k.view(), v.view(), &key_ends).unwrap();
            let out = || guarded(rows, heads.output_cols(), 3, &unset);
            let mut y = out();
            store.attend(ctx, &heads, &query_rows, &graph, &terms, y.view_mut()).unwrap();
            let y = y.values();
            if let Ok(mut stream) = KeyStream::new(&heads, &graph, ctx.members()) {
                let (rows, mut of_rows) = (KeyRows::new(k.view(), v.view(), &key_ends), out());
                // Queries that stand one by one may see more at a time than there is room for.
                if stream.attend(ctx, &heads, &query_rows, &rows, &graph, &terms, of_rows.view_mut()).is_ok()
                {
                    assert_same(&of_rows.values(), &y, "a stream");
                } else {
                    assert!(is_apart, "a stream without room");
                }
            }
            let [before, behind] =
                [([0, 0], past), (past, keys)].map(|(from, to)| (part(&k, from, to), part(&v, from, to)));
            let past_ends = offsets(&past);
            let mut cache = KvCache::new(&heads, 2, longest_key.max(1)).unwrap();
            cache.append_batch(before.0.view(), before.1.view(), &past_ends).unwrap();
            let mut new = KeyStore::new(&heads, key_rows + 2 * 256, 2).unwrap();
            let new_ends = [0, keys[0] - past[0], key_rows - past_ends[2]];
            new.set_after(cache.keys(), behind.0.view(), behind.1.view(), &new_ends).unwrap();
            let mut of_both = out();
            new.attend_after(cache.keys(), ctx, &heads, &query_rows, &graph, &terms, of_both.view_mut())
                .unwrap();
            assert_same(&of_both.values(), &y, "behind a past");
            cache.append_batch(behind.0.view(), behind.1.view(), &new_ends).unwrap();
            let mut of_cache = out();
            cache.keys().attend(ctx, &heads, &query_rows, &graph, &terms, of_cache.view_mut()).unwrap();
            assert_same(&of_cache.values(), &y, "a cache");
            let cross = layer.sub_layers()[0].as_cross_attention().unwrap();
            let sources = [cross.keys(ctx, source.view(), &key_ends).unwrap()];
            let mut inputs = Inputs {
                sources: &sources,
                source_graph: &graph,
                source_terms: terms,
                source_positions: Some(&each),
                ..Inputs::new(&ends, &graph)
            };
            let q = q.values();
            let (mut x, mut workspace) =
                (guarded(rows, cols, 4, &q), layer.workspace(rows, 2, ctx.members()).unwrap());
            layer.forward_with(ctx, x.view_mut(), &mut inputs, &mut workspace).unwrap();
            let gathered =
                |i: usize| if i % cols < out_cols { y[i / cols * out_cols + i % cols] } else { 0.0 };
            let with_residual: Vec<f32> = q.iter().enumerate().map(|(i, q)| gathered(i) + q).collect();
            assert_same(&x.values(), &with_residual, "a layer");
            y
        },
    );
});

/// A map to `n` columns: those from `first` on, zeros where there are none.
fn columns(all: usize, first: usize, n: usize) -> Linear {
    let weight: Vec<f32> = (0..n * all).map(|i| f32::from(i % all == first + i / all)).collect();
    let weight = MatRef::contiguous(&weight, n, all).unwrap();
    Linear::new(PackedMatrix::from_out_in(weight).unwrap(), None).unwrap()
}
