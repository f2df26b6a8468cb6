//! Keys that come in parts: caches that grow, rings that drop, and stores behind a past that is not copied. Whatever the parts, the
//! bits are those of all keys at once.

mod common;

use common::buffer::Guarded;
use common::compare::assert_bits;
use common::data::Rng;
use common::model::{Model, Shape, offsets};
use common::{executors, on_every_isa, serial};
use laneformer::{
    Bias, Bits, Context, Error, Graph, Heads, Inputs, Isa, KeyStore, KvCache, MatRef, QueryRows, Relative,
    RelativeTable, SegmentTerm, Terms,
};

/// Grouped heads whose values are of another width than their keys.
fn heads() -> Heads {
    Heads::new(6, 9).unwrap().with_kv_heads(3).unwrap().with_value_dim(17).unwrap()
}

/// Queries, keys and values of sequences.
struct Batch {
    lens: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Rows of some tokens, guarded.
struct Rows {
    q: Guarded,
    k: Guarded,
    v: Guarded,
}

impl Batch {
    fn new(lens: &[usize], seed: u64) -> Batch {
        let (mut rng, tokens, heads) = (Rng::new(seed), lens.iter().sum::<usize>(), heads());
        Batch {
            lens: lens.to_vec(),
            q: rng.vec(tokens * heads.query_cols(), 2.0),
            k: rng.vec(tokens * heads.key_cols(), 2.0),
            v: rng.vec(tokens * heads.value_cols(), 1.0),
        }
    }

    /// Tokens `from[b]..to[b]` of each sequence, packed.
    fn rows(&self, from: &[usize], to: &[usize]) -> Rows {
        let starts = offsets(&self.lens);
        let some = |x: &[f32], cols: usize| {
            let part = |b: usize| &x[(starts[b] + from[b]) * cols..(starts[b] + to[b]) * cols];
            let values: Vec<f32> = (0..self.lens.len()).flat_map(|b| part(b).to_vec()).collect();
            Guarded::new(values.len() / cols, cols, &values)
        };
        let heads = heads();
        Rows {
            q: some(&self.q, heads.query_cols()),
            k: some(&self.k, heads.key_cols()),
            v: some(&self.v, heads.value_cols()),
        }
    }

    fn all(&self) -> Rows {
        self.rows(&vec![0; self.lens.len()], &self.lens)
    }

    /// A store of all keys.
    fn store(&self) -> KeyStore {
        let (rows, tokens) = (self.all(), self.lens.iter().sum());
        let mut keys = KeyStore::new(&heads(), tokens, self.lens.len()).unwrap();
        keys.set(Context::serial(), rows.k.view(), rows.v.view(), &offsets(&self.lens)).unwrap();
        keys
    }

    /// What queries `from[b]..to[b]` gather of all keys, at their own places.
    fn expected(&self, isa: Isa, from: &[usize], to: &[usize], graph: &Graph) -> Vec<f32> {
        let (rows, ends) = (self.rows(from, to), ends(from, to));
        let first: Vec<isize> = from.iter().map(|&i| i as isize).collect();
        let queries = QueryRows::new(rows.q.view(), &ends).starting_at(&first);
        attend(&self.store(), None, serial(isa), &queries, graph, ends.last().copied().unwrap_or(0))
    }
}

fn ends(from: &[usize], to: &[usize]) -> Vec<usize> {
    offsets(&from.iter().zip(to).map(|(from, to)| to - from).collect::<Vec<_>>())
}

fn attend(
    keys: &KeyStore,
    past: Option<&KeyStore>,
    ctx: Context<'_>,
    queries: &QueryRows<'_>,
    graph: &Graph,
    rows: usize,
) -> Vec<f32> {
    let (heads, terms) = (heads(), Terms::default());
    let mut out = Guarded::unset(rows, heads.output_cols());
    match past {
        Some(past) => keys.attend_after(past, ctx, &heads, queries, graph, &terms, out.view_mut()),
        None => keys.attend(ctx, &heads, queries, graph, &terms, out.view_mut()),
    }
    .unwrap();
    out.values()
}

/// Long sequences take seconds there, and show nothing that the others do not.
fn is_slow(isa: Isa) -> bool {
    matches!(isa.name(), "scalar" | "portable")
}

/// How a sequence's tokens come: in each call so many to each of three sequences.
const SPLITS: [&[[usize; 3]]; 4] = [
    // One at a time, to all.
    &[[1, 1, 1]],
    // A prompt of each length, then steps.
    &[[256, 3, 64], [1, 1, 1], [1, 0, 1]],
    // Over the edges of blocks and chunks.
    &[[63, 0, 1], [1, 256, 63], [193, 64, 191], [255, 1, 2]],
    // As much as a ring takes at once.
    &[[256, 256, 256]],
];

on_every_isa! {
    fn any_split_gives_the_bits_of_one_pass(isa) {
        let lens = [1100, 700, 530];
        let batch = Batch::new(&lens, 1);
        for (graph, window) in [
            (Graph::causal(), None),
            (Graph::window(99, 0), Some(100)),
            (Graph::window(0, 0), Some(1)),
            (Graph::window(255, 0), Some(256)),
            (Graph::window(256, 0), Some(257)),
        ] {
            let expected = batch.expected(isa, &[0; 3], &lens, &graph);
            let starts = offsets(&lens);
            if is_slow(isa) && window != Some(100) {
                continue;
            }
            for split in SPLITS {
                if is_slow(isa) && split == SPLITS[0] {
                    continue;
                }
                let cache = || KvCache::new(&heads(), 3, 1100).unwrap();
                let mut caches = vec![("cache", cache())];
                caches.extend(window.map(|window| ("ring", KvCache::ring(&heads(), 3, window).unwrap())));
                for (name, mut cache) in caches {
                    let (mut done, mut steps) = ([0; 3], split.iter().cycle());
                    let threads = executors::Threads(2);
                    while done != lens {
                        let step = steps.next().unwrap();
                        let to: [usize; 3] = std::array::from_fn(|b| lens[b].min(done[b] + step[b]));
                        let (rows, ends) = (batch.rows(&done, &to), ends(&done, &to));
                        cache.append_batch(rows.k.view(), rows.v.view(), &ends).unwrap();
                        let queries = QueryRows::new(rows.q.view(), &ends);
                        // Now and then with a helper.
                        let ctx = if done[0] % 2 == 0 { serial(isa) } else { Context::new(isa, &threads) };
                        let y = attend(cache.keys(), None, ctx, &queries, &graph, ends[3]);
                        let cols = heads().output_cols();
                        for b in 0..3 {
                            let rows = (starts[b] + done[b]) * cols..(starts[b] + to[b]) * cols;
                            let what = format!("{name}, {graph:?}, sequence {b}, {:?} to {to:?}", done);
                            assert_bits(&y[ends[b] * cols..ends[b + 1] * cols], &expected[rows], &what);
                        }
                        done = to;
                    }
                    assert_eq!(std::array::from_fn(|b| cache.len(b)), lens);
                }
            }
        }
    }

    fn a_store_behind_a_past_gives_the_bits_of_both_in_one(isa) {
        // Whole blocks, less, and more; whole chunks; nothing before, nothing new.
        for past in [[0, 1, 63], [64, 65, 128], [255, 256, 257], [300, 0, 512]] {
            for new in [[1, 1, 1], [0, 64, 2], [63, 129, 300]] {
                let lens: [usize; 3] = std::array::from_fn(|b| past[b] + new[b]);
                let batch = Batch::new(&lens, 2);
                let dense = Bits::dense([3, 1, 300, 812], |s, _, i, j| (s + 3 * i + j) % 5 != 1).unwrap();
                for graph in [
                    Graph::full(),
                    Graph::causal(),
                    Graph::window(70, 0),
                    Graph::full().with_bits(dense),
                ] {
                    if is_slow(isa) && graph != Graph::window(70, 0) {
                        continue;
                    }
                    let before = batch.rows(&[0; 3], &past);
                    let mut store = KeyStore::new(&heads(), 1100, 3).unwrap();
                    store.set(Context::serial(), before.k.view(), before.v.view(), &offsets(&past)).unwrap();
                    let mut cache = KvCache::new(&heads(), 3, 600).unwrap();
                    cache.append_batch(before.k.view(), before.v.view(), &offsets(&past)).unwrap();

                    let (rows, ends) = (batch.rows(&past, &lens), offsets(&new));
                    let expected = batch.expected(isa, &past, &lens, &graph);
                    for past_keys in [&store, cache.keys()] {
                        // A used store, whose old keys must not show.
                        let mut keys = KeyStore::new(&heads(), 492 + 3 * 256, 3).unwrap();
                        keys.set(Context::serial(), rows.k.view(), rows.v.view(), &ends).unwrap();
                        keys.set_after(past_keys, rows.k.view(), rows.v.view(), &ends).unwrap();
                        let queries = QueryRows::new(rows.q.view(), &ends);
                        let y = attend(&keys, Some(past_keys), serial(isa), &queries, &graph, ends[3]);
                        assert_bits(&y, &expected, &format!("{new:?} behind {past:?}, {graph:?}"));
                    }
                }
            }
        }
    }

    fn one_prefix_before_many_sequences(isa) {
        let (prefix, new) = (130, [3, 0, 70, 1]);
        let lens = new.map(|n| prefix + n);
        let mut batch = Batch::new(&lens, 3);
        // All begin with the tokens of the first.
        let (starts, heads) = (offsets(&lens), heads());
        for (x, cols) in [(&mut batch.k, heads.key_cols()), (&mut batch.v, heads.value_cols())] {
            for start in &starts[1..4] {
                x.copy_within(0..prefix * cols, start * cols);
            }
        }
        let shared = batch.rows(&[0; 4], &[prefix, 0, 0, 0]);
        let mut past = KeyStore::new(&heads, prefix, 1).unwrap();
        past.set(Context::serial(), shared.k.view(), shared.v.view(), &[0, prefix]).unwrap();
        let (rows, ends) = (batch.rows(&[prefix; 4], &lens), offsets(&new));
        let mut keys = KeyStore::new(&heads, 74 + 4 * 256, 4).unwrap();
        keys.set_after(&past, rows.k.view(), rows.v.view(), &ends).unwrap();
        let queries = QueryRows::new(rows.q.view(), &ends);
        for graph in [Graph::causal(), Graph::window(20, 0)] {
            let y = attend(&keys, Some(&past), serial(isa), &queries, &graph, 74);
            assert_bits(&y, &batch.expected(isa, &[prefix; 4], &lens, &graph), "behind a prefix");
        }
    }

    fn a_store_behind_a_ring(isa) {
        // The ring has dropped what no query of the window sees.
        let (past, new) = ([900, 37, 256], [40, 5, 200]);
        let lens: [usize; 3] = std::array::from_fn(|b| past[b] + new[b]);
        let (batch, graph) = (Batch::new(&lens, 4), Graph::window(150, 0));
        let mut ring = KvCache::ring(&heads(), 3, 151).unwrap();
        let mut done = [0; 3];
        while done != past {
            let to: [usize; 3] = std::array::from_fn(|b| past[b].min(done[b] + 100));
            let rows = batch.rows(&done, &to);
            ring.append_batch(rows.k.view(), rows.v.view(), &ends(&done, &to)).unwrap();
            done = to;
        }
        let (rows, ends) = (batch.rows(&past, &lens), offsets(&new));
        let mut keys = KeyStore::new(&heads(), 245 + 3 * 256, 3).unwrap();
        keys.set_after(ring.keys(), rows.k.view(), rows.v.view(), &ends).unwrap();
        let queries = QueryRows::new(rows.q.view(), &ends);
        let y = attend(&keys, Some(ring.keys()), serial(isa), &queries, &graph, 245);
        assert_bits(&y, &batch.expected(isa, &past, &lens, &graph), "behind a ring");
    }

    fn a_layer_appends_on_all_its_threads(isa) {
        let lens = [900, 20, 700];
        let (mut rng, ends) = (Rng::new(13), offsets(&lens));
        let layer = Model::new(Shape { heads: heads(), ..Shape::new(1, 11, 20) }, &mut rng).layer();
        let (x, graph) = (rng.vec(ends[3] * 11, 1.0), Graph::window(99, 0));
        let run = |ctx: Context<'_>, x: &[f32], offsets: &[usize], caches: &mut [KvCache]| {
            let mut y = Guarded::new(x.len() / 11, 11, x);
            let mut workspace = layer.workspace(x.len() / 11, 3, ctx.members()).unwrap();
            let mut inputs = Inputs { caches, ..Inputs::new(offsets, &graph) };
            layer.forward_with(ctx, y.view_mut(), &mut inputs, &mut workspace).unwrap();
            y.values()
        };
        let expected = run(serial(isa), &x, &ends, &mut []);
        // Rings of 12 blocks each: many rows of the batch are dealt out by blocks, few by heads, of which one of two threads has two.
        let ring = KvCache::ring(&heads(), 3, 100).unwrap();
        for cache in [ring, KvCache::new(&heads(), 3, 900).unwrap()] {
            let (mut caches, mut done, mut step) = ([cache], [0; 3], [250, 7, 3].iter().cycle());
            let threads = executors::Threads(2);
            while done != lens {
                let n = step.next().unwrap();
                let to: [usize; 3] = std::array::from_fn(|b| lens[b].min(done[b] + n));
                let part = |b: usize| (ends[b] + done[b]) * 11..(ends[b] + to[b]) * 11;
                let (rows, cuts) = ((0..3).flat_map(|b| x[part(b)].to_vec()).collect::<Vec<_>>(), super::ends(&done, &to));
                let y = run(Context::new(isa, &threads), &rows, &cuts, &mut caches);
                for b in 0..3 {
                    let y = &y[cuts[b] * 11..cuts[b + 1] * 11];
                    assert_bits(y, &expected[part(b)], &format!("sequence {b}, {done:?} to {to:?}"));
                }
                done = to;
            }
            assert_eq!([0, 1, 2].map(|b| caches[0].len(b)), lens);
        }
    }

    fn terms_behind_a_past(isa) {
        let (past, new, heads) = ([100, 3, 64], [70, 66, 1], heads());
        let lens: [usize; 3] = std::array::from_fn(|b| past[b] + new[b]);
        let (batch, mut rng) = (Batch::new(&lens, 5), Rng::new(6));
        let bias = rng.vec(3 * 6 * 70 * 170, 1.0);
        let r = rng.vec(200 * heads.query_cols(), 1.0);
        let table =
            RelativeTable::new(MatRef::contiguous(&r, 200, heads.query_cols()).unwrap(), -20, 6).unwrap();
        let (u, w) = (rng.vec(heads.query_cols(), 0.5), rng.vec(heads.query_cols(), 0.5));
        let terms = Terms {
            bias: Some(Bias::new(&bias, [3, 6, 70, 170]).unwrap()),
            relative: Some(Relative { u: &u, w: &w, table: &table }),
            ..Terms::default()
        };
        let before = batch.rows(&[0; 3], &past);
        let mut store = KeyStore::new(&heads, 167, 3).unwrap();
        store.set(Context::serial(), before.k.view(), before.v.view(), &offsets(&past)).unwrap();
        let (rows, ends) = (batch.rows(&past, &lens), offsets(&new));
        let mut keys = KeyStore::new(&heads, 137 + 3 * 256, 3).unwrap();
        keys.set_after(&store, rows.k.view(), rows.v.view(), &ends).unwrap();
        let (graph, queries) = (Graph::causal(), QueryRows::new(rows.q.view(), &ends));
        let mut out = [(); 2].map(|()| Guarded::unset(137, heads.output_cols()));
        let [whole, parts] = &mut out;
        let all = batch.store();
        all.attend(serial(isa), &heads, &queries, &graph, &terms, whole.view_mut()).unwrap();
        keys.attend_after(&store, serial(isa), &heads, &queries, &graph, &terms, parts.view_mut()).unwrap();
        assert_bits(&parts.values(), &whole.values(), "bias and relative positions");
    }
}

/// What the heads of a test see, and what their scores have.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sees {
    AllBefore,
    /// Columns of its own for each head, and a window.
    OwnColumns,
    /// Bits of its own for each head.
    OwnBits,
    /// A bias of its own for each head, a segment term and a soft cap.
    OwnTerms,
    /// The same, and a negative scale instead of the soft cap.
    OwnBitsAndTerms,
}

on_every_isa! {
    /// The last query alone, its heads that share keys taken together or not, is what it is behind four others.
    fn one_query_of_heads_that_share_keys(isa) {
        const QUERIES: usize = 5;
        for (n_heads, n_kv_heads, head_dim, threads) in [
            (12, 3, 48, 1), (12, 3, 48, 2), (12, 3, 48, 5), (6, 1, 81, 2), (32, 1, 16, 2), (10, 5, 48, 3), (12, 2, 40, 4),
            (7, 7, 64, 2), (70, 1, 6, 1), (71, 1, 6, 1), (71, 1, 6, 2),
        ] {
            let heads = Heads::new(n_heads, head_dim).unwrap().with_kv_heads(n_kv_heads).unwrap().with_value_dim(7).unwrap();
            let (mut rng, keys) = (Rng::new(n_heads as u64), 600);
            let [q_cols, k_cols, v_cols] = [heads.query_cols(), heads.key_cols(), heads.value_cols()];
            let (q, k) = (rng.vec(QUERIES * q_cols, 1.0), rng.vec(keys * k_cols, 1.0));
            let mut v = rng.vec(keys * v_cols, 1.0);
            // Nobody sees the first key.
            v[..v_cols].fill(f32::NAN);
            let (s, e) = (rng.vec(q_cols, 1.0), rng.vec(2 * q_cols, 1.0));
            let bias = rng.vec(n_heads * QUERIES * keys, 1.0);
            let is_same = |h: usize, i: usize, j: usize| (h + i + j / 20).is_multiple_of(2);
            let dense = |i: usize, f: &dyn Fn(usize, usize, usize) -> bool| {
                Bits::dense([1, n_heads, QUERIES - i, keys], |_, h, row, j| f(h, row + i, j)).unwrap()
            };
            let mut store = KeyStore::new(&heads, keys, 1).unwrap();
            let [k, v] = [(&k, k_cols), (&v, v_cols)].map(|(x, cols)| MatRef::contiguous(x, keys, cols).unwrap());
            store.set(Context::serial(), k, v, &[0, keys]).unwrap();

            for sees in [Sees::AllBefore, Sees::OwnColumns, Sees::OwnBits, Sees::OwnTerms, Sees::OwnBitsAndTerms] {
                let has_terms = matches!(sees, Sees::OwnTerms | Sees::OwnBitsAndTerms);
                let heads = match sees {
                    Sees::OwnTerms => heads.with_softcap(3.0),
                    Sees::OwnBitsAndTerms => heads.with_scale(-0.2),
                    _ => heads,
                };
                let from = |first: usize, ctx: Context<'_>| {
                    let rows = QUERIES - first;
                    let q = MatRef::contiguous(&q[first * q_cols..], rows, q_cols).unwrap();
                    let of_rows = |x: &[f32]| -> Vec<f32> {
                        x.chunks(QUERIES * keys).flat_map(|x| x[first * keys..].to_vec()).collect()
                    };
                    let (bias, same) = (of_rows(&bias), dense(first, &is_same));
                    let terms = Terms {
                        bias: has_terms.then(|| Bias::new(&bias, [1, n_heads, rows, keys]).unwrap()),
                        segment: has_terms.then_some(SegmentTerm { s: &s, e: &e, same: &same }),
                        ..Terms::default()
                    };
                    let graph = match sees {
                        Sees::OwnColumns => {
                            // The second head has none, and others have theirs in a chunk or in two.
                            let column = |h: usize, j: usize| h != 1 && (h + j).is_multiple_of(97) && j < 200 + 10 * h;
                            let columns = Bits::dense([1, n_heads, 1, keys], |_, h, _, j| column(h, j)).unwrap();
                            Graph::window(40, 0).with_columns(columns)
                        }
                        _ => Graph::causal(),
                    };
                    let graph = graph.with_bits(match sees {
                        Sees::OwnBits | Sees::OwnBitsAndTerms => dense(first, &|h, i, j| {
                            j > 0 && !(h + i + j).is_multiple_of(5) && (h != 1 || j < 256)
                        }),
                        _ => Bits::dense([1, 1, 1, keys], |_, _, _, j| j > 0).unwrap(),
                    });
                    let (ends, mut out) = ([0, rows], Guarded::unset(rows, heads.output_cols()));
                    let queries = QueryRows::new(q, &ends);
                    store.attend(ctx, &heads, &queries, &graph, &terms, out.view_mut()).unwrap();
                    out.values()
                };
                let together = from(0, serial(isa));
                let (ctx, what) = (executors::Threads(threads), format!("{heads:?}, {threads} threads, {sees:?}"));
                let alone = from(QUERIES - 1, Context::new(isa, &ctx));
                assert!(alone.iter().all(|x| x.is_finite()), "{what}");
                assert_bits(&alone, &together[(QUERIES - 1) * heads.output_cols()..], &what);
            }
        }
    }

    /// Heads that are taken together, of a few queries each, are what each is alone; also where a bias hides from one what another may see, and where
    /// that is not finite.
    fn few_queries_of_many_heads(isa) {
        const KEYS: usize = 300;
        const DIM: usize = 12;
        for (rows, n_heads, n_kv_heads) in [(1, 6, 3), (3, 6, 6), (7, 6, 3), (16, 5, 5), (17, 4, 4), (31, 3, 3)] {
            let heads = Heads::new(n_heads, DIM).unwrap().with_kv_heads(n_kv_heads).unwrap();
            let mut rng = Rng::new(rows as u64);
            let (q, k) = (rng.vec(rows * n_heads * DIM, 1.0), rng.vec(KEYS * n_kv_heads * DIM, 1.0));
            let mut v = rng.vec(KEYS * n_kv_heads * DIM, 1.0);
            v[70 * n_kv_heads * DIM..][..n_kv_heads * DIM].fill(f32::NAN);
            // Every second head sees the key that is no number, and every third nothing of the second chunk.
            let is_seen = |h: usize, j: usize| (j != 70 || h.is_multiple_of(2)) && (j < 256 || h % 3 != 2);
            let at = |i: usize| (i / KEYS / rows, i % KEYS);
            let mut bias = rng.vec(n_heads * rows * KEYS, 1.0);
            for (_, x) in bias.iter_mut().enumerate().filter(|(i, _)| !is_seen(at(*i).0, at(*i).1)) {
                *x = f32::NEG_INFINITY;
            }
            // Some of the columns and of the bias, as a problem of its own.
            let run = |heads: &Heads, of: std::ops::Range<usize>, of_kv: std::ops::Range<usize>| {
                let cut = |x: &[f32], all: usize, of: &std::ops::Range<usize>| -> Vec<f32> {
                    x.chunks(all * DIM).flat_map(|row| row[of.start * DIM..of.end * DIM].to_vec()).collect()
                };
                let (q, k, v) = (cut(&q, n_heads, &of), cut(&k, n_kv_heads, &of_kv), cut(&v, n_kv_heads, &of_kv));
                let [k, v] = [&k, &v].map(|x| MatRef::contiguous(x, KEYS, of_kv.len() * DIM).unwrap());
                let mut store = KeyStore::new(heads, KEYS, 1).unwrap();
                store.set(Context::serial(), k, v, &[0, KEYS]).unwrap();
                let bias = &bias[of.start * rows * KEYS..of.end * rows * KEYS];
                let bias = Some(Bias::new(bias, [1, of.len(), rows, KEYS]).unwrap());
                let (ends, mut out) = ([0, rows], Guarded::unset(rows, of.len() * DIM));
                let queries = QueryRows::new(MatRef::contiguous(&q, rows, of.len() * DIM).unwrap(), &ends);
                let terms = Terms { bias, ..Terms::default() };
                store.attend(serial(isa), heads, &queries, &Graph::causal(), &terms, out.view_mut()).unwrap();
                out.values()
            };
            let together = run(&heads, 0..n_heads, 0..n_kv_heads);
            for h in 0..n_heads {
                let kv = h * n_kv_heads / n_heads;
                let alone = run(&Heads::new(1, DIM).unwrap(), h..h + 1, kv..kv + 1);
                for (i, alone) in alone.chunks(DIM).enumerate() {
                    let of_head = &together[(i * n_heads + h) * DIM..][..DIM];
                    let what = format!("{heads:?}, {rows} rows: row {i} of head {h}");
                    assert_eq!(of_head.iter().all(|x| x.is_finite()), !h.is_multiple_of(2), "{what}");
                    if h % 2 == 1 {
                        assert_bits(of_head, alone, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn batches_are_appended_as_sequences_are() {
    let (batch, lens) = (Batch::new(&[5, 0, 130], 7), [5, 0, 130]);
    let (rows, ends) = (batch.all(), offsets(&lens));
    let (mut at_once, mut one_by_one) =
        (KvCache::new(&heads(), 3, 200).unwrap(), KvCache::new(&heads(), 3, 200).unwrap());
    at_once.append_batch(rows.k.view(), rows.v.view(), &ends).unwrap();
    for b in 0..3 {
        let mut from = [0; 3];
        let mut to = [0; 3];
        (from[b], to[b]) = (0, lens[b]);
        let rows = batch.rows(&from, &to);
        one_by_one.append(b, rows.k.view(), rows.v.view()).unwrap();
    }
    let queries = QueryRows::new(rows.q.view(), &ends);
    let [a, b] = [&at_once, &one_by_one]
        .map(|cache| attend(cache.keys(), None, Context::serial(), &queries, &Graph::full(), 135));
    assert_bits(&a, &b, "at once and one by one");
    // A sequence that is emptied begins anew.
    at_once.truncate(2, 0).unwrap();
    at_once.truncate(0, 3).unwrap();
    assert_eq!([0, 1, 2].map(|b| at_once.len(b)), [3, 0, 0]);
}

/// What a cache gives to queries, to see whether it is still what it was.
fn shows(cache: &KvCache) -> Vec<f32> {
    let q = Rng::new(8).vec(2 * heads().query_cols(), 1.0);
    let q = MatRef::contiguous(&q, 2, heads().query_cols()).unwrap();
    let lens: Vec<usize> = (0..2).map(|b| cache.len(b)).collect();
    let mut shows =
        attend(cache.keys(), None, Context::serial(), &QueryRows::new(q, &[0, 1, 2]), &Graph::full(), 2);
    shows.extend(lens.iter().map(|&len| len as f32));
    shows
}

#[test]
fn a_refused_append_leaves_the_cache_as_it_was() {
    let (k_cols, v_cols) = (heads().key_cols(), heads().value_cols());
    let x = vec![9.0; 400 * v_cols];
    let k = |rows, cols| MatRef::contiguous(&x, rows, cols).unwrap();
    let batch = Batch::new(&[20, 60], 9);
    let rows = batch.all();
    let caches = [KvCache::new(&heads(), 2, 70).unwrap(), KvCache::ring(&heads(), 2, 5).unwrap()];
    for (mut cache, full) in caches.into_iter().zip([11, 257]) {
        cache.append_batch(rows.k.view(), rows.v.view(), &[0, 20, 80]).unwrap();
        let before = shows(&cache);
        let max = full - 1;
        let refused = |result: Result<(), Error>, expected: Error| assert_eq!(result, Err(expected));
        let room = Error::TooLarge { arg: "tokens appended to the cache", max, actual: full };
        refused(cache.append(1, k(full, k_cols), k(full, v_cols)), room);
        // The first sequence has room, the second has not.
        let ends = [0, 1, 1 + full];
        refused(cache.append_batch(k(1 + full, k_cols), k(1 + full, v_cols), &ends), room);
        let size = |arg, expected, actual| Error::Size { arg, expected, actual };
        refused(cache.append(0, k(1, k_cols + 1), k(1, v_cols)), size("k.cols", k_cols, k_cols + 1));
        refused(cache.append(0, k(2, k_cols), k(1, v_cols)), size("v.rows", 2, 1));
        refused(cache.append(0, k(1, k_cols), k(1, k_cols)), size("v.cols", v_cols, k_cols));
        refused(
            cache.append(2, k(1, k_cols), k(1, v_cols)),
            Error::TooLarge { arg: "sequence", max: 1, actual: 2 },
        );
        let mut append = |ends: &[usize]| cache.append_batch(k(3, k_cols), k(3, v_cols), ends);
        refused(append(&[]), Error::TooSmall { arg: "offsets", min: 1, actual: 0 });
        refused(append(&[0, 3]), size("offsets.len() - 1", 2, 1));
        refused(append(&[0, 1, 2]), size("offsets", 3, 2));
        refused(append(&[1, 2, 3]), size("offsets", 0, 1));
        refused(append(&[0, 4, 3]), Error::NotAscending { arg: "offsets", at: 2 });
        assert_bits(&shows(&cache), &before, "after refusals");
    }
    // A ring forgets all or nothing.
    let mut ring = KvCache::ring(&heads(), 2, 5).unwrap();
    ring.append_batch(rows.k.view(), rows.v.view(), &[0, 20, 80]).unwrap();
    assert_eq!(ring.truncate(0, 1), Err(Error::TooLarge { arg: "len", max: 0, actual: 1 }));
    ring.truncate(0, 0).unwrap();
    ring.truncate(1, 60).unwrap();
    assert_eq!([ring.len(0), ring.len(1)], [0, 60]);
    assert_eq!([ring.room(0), ring.room(1), ring.room(2)], [256, 256, 0]);
    let cache = KvCache::new(&heads(), 1, 70).unwrap();
    assert_eq!([cache.room(0), cache.room(1)], [70, 0]);
}

/// A ring of this window whose sequences have all tokens of the batch.
fn full_ring(window: usize, batch: &Batch) -> KvCache {
    let (mut ring, mut done) =
        (KvCache::ring(&heads(), batch.lens.len(), window).unwrap(), vec![0; batch.lens.len()]);
    while done != batch.lens {
        let to: Vec<usize> = done.iter().zip(&batch.lens).map(|(&done, &len)| len.min(done + 200)).collect();
        let rows = batch.rows(&done, &to);
        ring.append_batch(rows.k.view(), rows.v.view(), &ends(&done, &to)).unwrap();
        done = to;
    }
    ring
}

#[test]
fn a_graph_that_sees_what_a_ring_has_dropped_is_refused() {
    // 768 tokens, of which a chunk of 256 has made room for the last.
    let batch = Batch::new(&[900, 20], 11);
    let ring = full_ring(100, &batch);
    let (rows, ends) = (batch.rows(&[899, 19], &[900, 20]), [0, 1, 2]);
    let columns = |column: usize| {
        let keys: Vec<bool> = (0..900).map(|j| j == column).collect();
        Bits::keys(&[&keys[..]; 2]).unwrap()
    };
    let window = Graph::window(99, 0);
    for (graph, dropped) in [
        (Graph::full(), Some(256)),
        (Graph::causal(), Some(256)),
        (Graph::window(700, 0), Some(57)),
        (Graph::window(643, 0), None),
        (window.clone(), None),
        (window.clone().with_columns(columns(3)), Some(253)),
        (window.clone().with_columns(columns(256)), None),
        // No window is there for bits to narrow.
        (Graph::full().with_bits(columns(899)), Some(256)),
    ] {
        let expected = match dropped {
            Some(actual) => {
                let arg = "keys that the graph sees and a ring has dropped";
                Err(Error::TooLarge { arg, max: 0, actual })
            }
            None => Ok(()),
        };
        let queries = QueryRows::new(rows.q.view(), &ends);
        let mut out = Guarded::unset(2, heads().output_cols());
        let (ctx, terms) = (Context::serial(), Terms::default());
        let result = ring.keys().attend(ctx, &heads(), &queries, &graph, &terms, out.view_mut());
        assert_eq!(result, expected, "{graph:?}");
        if dropped.is_some() {
            out.assert_unset();
        }
        // Queries that stand further back than the window was made for.
        let early = queries.starting_at(&[300, 0]);
        let result = ring.keys().attend(ctx, &heads(), &early, &window, &terms, out.view_mut());
        assert!(matches!(result, Err(Error::TooLarge { actual: 55, .. })), "{result:?}");
    }
}

#[test]
fn a_copy_of_a_sequence_goes_its_own_way() {
    let (batch, window) = (Batch::new(&[900, 20, 300], 12), Graph::window(99, 0));
    let mut whole = KvCache::new(&heads(), 3, 1000).unwrap();
    let rows = batch.all();
    whole.append_batch(rows.k.view(), rows.v.view(), &offsets(&batch.lens)).unwrap();
    for mut cache in [full_ring(100, &batch), whole] {
        let missing = Error::TooLarge { arg: "sequence", max: 2, actual: 3 };
        assert_eq!([cache.copy(0, 3), cache.copy(3, 0)], [Err(missing); 2]);
        let next = batch.rows(&[0; 3], &[2, 0, 2]);
        // Onto a longer, a shorter and itself.
        for (from, to) in [(2, 0), (0, 1), (1, 1), (1, 2)] {
            cache.copy(from, to).unwrap();
            assert_eq!(cache.len(to), cache.len(from));
        }
        assert_eq!([0, 1, 2].map(|b| cache.len(b)), [300; 3]);
        cache.append_batch(next.k.view(), next.v.view(), &[0, 2, 2, 4]).unwrap();
        let ask = |at: usize| {
            let q = batch.rows(&[at, 0, at], &[at + 1, 1, at + 1]);
            // The same query of all.
            let q = [&q.q.values()[..heads().query_cols()]; 3].concat();
            let q = Guarded::new(3, heads().query_cols(), &q);
            let queries = QueryRows::new(q.view(), &[0, 1, 2, 3]);
            attend(cache.keys(), None, Context::serial(), &queries, &window, 3)
        };
        let y = ask(5);
        let of = |b: usize| &y[b * heads().output_cols()..][..heads().output_cols()];
        assert!(of(0) != of(1) && of(2) != of(1), "they have gone on, and sequence 1 has not");
        let mut alone = Batch::new(&[300], 0);
        let tokens = batch.rows(&[0, 0, 0], &[0, 0, 300]);
        (alone.k, alone.v) = (tokens.k.values(), tokens.v.values());
        let q = batch.rows(&[5, 0, 0], &[6, 0, 0]);
        let queries = QueryRows::new(q.q.view(), &[0, 1]);
        assert_bits(
            of(1),
            &attend(&alone.store(), None, Context::serial(), &queries, &window, 1),
            "the copy",
        );
    }
}

#[test]
fn stores_that_do_not_stand_behind_one_another_are_refused() {
    let (heads, ctx, graph) = (heads(), Context::serial(), Graph::full());
    let size = |arg, expected, actual| Error::Size { arg, expected, actual };
    let batch = Batch::new(&[70, 3], 10);
    let (rows, ends) = (batch.all(), [0, 70, 73]);
    let (k, v) = (rows.k.view(), rows.v.view());
    let store = |heads: &Heads| KeyStore::new(heads, 200, 3).unwrap();
    let mut past = store(&heads);
    past.set(Context::serial(), k, v, &ends).unwrap();
    let mut keys = store(&heads);
    keys.set(Context::serial(), k, v, &ends).unwrap();

    let mut out = Guarded::unset(73, heads.output_cols());
    let mut after = |keys: &KeyStore, past: &KeyStore| {
        let queries = QueryRows::new(rows.q.view(), &ends);
        keys.attend_after(past, ctx, &heads, &queries, &graph, &Terms::default(), out.view_mut())
    };
    let alone = after(&keys, &past).unwrap_err();
    assert_eq!(alone.to_string(), "keys: expected a store that set_after has filled");

    let one_head = Heads::new(2, 9).unwrap().with_kv_heads(1).unwrap().with_value_dim(17).unwrap();
    let narrow = Heads::new(3, 8).unwrap().with_value_dim(17).unwrap();
    let short = Heads::new(3, 9).unwrap().with_value_dim(16).unwrap();
    for (other, arg, expected, actual) in [
        (one_head, "past n_kv_heads", 3, 1),
        (narrow, "past head_dim", 9, 8),
        (short, "past value_dim", 17, 16),
    ] {
        assert_eq!(keys.set_after(&store(&other), k, v, &ends), Err(size(arg, expected, actual)));
    }
    assert_eq!(keys.set_after(&past, k, v, &[0, 1, 2, 73]), Err(size("past sequences", 3, 2)));
    assert_eq!(keys.set_after(&past, k, v, &[0, 72, 1]), Err(Error::NotAscending { arg: "offsets", at: 2 }));
    assert_eq!(keys.set_after(&past, k, rows.q.view(), &ends), Err(size("v.cols", 51, 54)));
    let mut small = KeyStore::new(&heads, 73, 2).unwrap();
    let large = Error::TooLarge { arg: "blocks of 64 tokens in the batch", max: 3, actual: 4 };
    // Without what the past leaves of its chunks the new keys would have room.
    assert_eq!(small.set_after(&past, k, v, &ends), Err(large));
    small.set(Context::serial(), k, v, &ends).unwrap();
    // All those have left the store as it was.
    let queries = QueryRows::new(rows.q.view(), &ends);
    let y = attend(&keys, None, ctx, &queries, &graph, 73);
    assert_bits(&y, &attend(&past, None, ctx, &queries, &graph, 73), "after refusals");

    keys.set_after(&past, k, v, &ends).unwrap();
    after(&keys, &past).unwrap();
    // Alone it is not whole, nor can it be the past of another or a source.
    let mut out = Guarded::unset(73, heads.output_cols());
    let result = keys.attend(ctx, &heads, &queries, &graph, &Terms::default(), out.view_mut());
    assert_eq!(result.unwrap_err().to_string(), "keys: expected a store that does not stand behind another");
    let chain = small.set_after(&keys, k, v, &ends).unwrap_err();
    assert_eq!(chain.to_string(), "past: expected a store that does not stand behind another");
    out.assert_unset();
    // A past that has changed since.
    let mut after = |keys: &KeyStore, past: &KeyStore| {
        keys.attend_after(past, ctx, &heads, &queries, &graph, &Terms::default(), out.view_mut())
    };
    past.set(Context::serial(), k, v, &[0, 69, 73]).unwrap();
    assert_eq!(after(&keys, &past), Err(size("past tokens", 70, 69)));
    past.set(Context::serial(), k, v, &[0, 1, 2, 73]).unwrap();
    assert_eq!(after(&keys, &past), Err(size("past sequences", 2, 3)));
    out.assert_unset();
    // Filled anew it stands alone.
    keys.set(Context::serial(), k, v, &ends).unwrap();
    assert_bits(&attend(&keys, None, ctx, &queries, &graph, 73), &y, "alone again");
}
