//! One graph said in several ways. Where the keys stand at the same places the bits are the same: intervals and their bits, ragged
//! segments and calls of their own. Where they stand elsewhere (streams in one sequence, permutations) results agree within roundings.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, slack};
use common::data::Rng;
use common::model::offsets;
use common::{on_every_isa, serial};
use laneformer::reference::to_f64;
use laneformer::{Bits, Context, Graph, Heads, Isa, KeyStore, MatRef, QueryRows, Terms};

const LIMIT: f64 = 3e-6;

fn heads() -> Heads {
    Heads::new(4, 9).unwrap().with_kv_heads(2).unwrap().with_value_dim(20).unwrap()
}

/// Columns of queries, keys, values and the output.
fn cols() -> [usize; 4] {
    [heads().query_cols(), heads().key_cols(), heads().value_cols(), heads().output_cols()]
}

/// Rows of queries, keys and values.
struct Rows([Vec<f32>; 3]);

impl Rows {
    fn new(tokens: usize, seed: u64) -> Rows {
        let mut rng = Rng::new(seed);
        Rows([0, 1, 2].map(|i| rng.vec(tokens * cols()[i], [2.0, 2.0, 1.0][i])))
    }

    /// These rows, in this order.
    fn pick(&self, rows: impl Iterator<Item = usize> + Clone) -> Rows {
        let pick = |i: usize| {
            let row = |row: usize| &self.0[i][row * cols()[i]..(row + 1) * cols()[i]];
            rows.clone().flat_map(row).copied().collect()
        };
        Rows([pick(0), pick(1), pick(2)])
    }
}

/// Attention of the queries of sequences over the keys and values of others.
fn attend(isa: Isa, q: &Rows, queries: &[usize], kv: &Rows, keys: &[usize], graph: &Graph) -> Vec<f32> {
    let [q_cols, k_cols, v_cols, out_cols] = cols();
    let tokens = |x: &[f32], cols: usize| x.len() / cols;
    let view = |x: &[f32], cols: usize| Guarded::new(tokens(x, cols), cols, x);
    let (q, k, v) = (view(&q.0[0], q_cols), view(&kv.0[1], k_cols), view(&kv.0[2], v_cols));
    let mut store = KeyStore::new(&heads(), tokens(&kv.0[1], k_cols), keys.len()).unwrap();
    store.set(Context::serial(), k.view(), v.view(), &offsets(keys)).unwrap();
    let ends = offsets(queries);
    let mut out = Guarded::unset(ends[queries.len()], out_cols);
    let (rows, terms) = (QueryRows::new(q.view(), &ends), Terms::default());
    store.attend(serial(isa), &heads(), &rows, graph, &terms, out.view_mut()).unwrap();
    out.values()
}

fn own(isa: Isa, x: &Rows, lens: &[usize], graph: &Graph) -> Vec<f32> {
    attend(isa, x, lens, x, lens, graph)
}

/// Rows of the output.
fn out(y: &[f32], rows: std::ops::Range<usize>) -> &[f32] {
    &y[rows.start * cols()[3]..rows.end * cols()[3]]
}

on_every_isa! {
    fn intervals_and_their_bits(isa) {
        // Not on the instruction sets without vectors: 600 tokens take seconds.
        let longest = if isa.name().starts_with("avx") { 600 } else { 300 };
        for lens in [&[longest][..], &[64, 1, 0, 130], &[257, 63]] {
            let x = Rows::new(lens.iter().sum(), 1);
            for (left, right) in
                [(usize::MAX, usize::MAX), (usize::MAX, 0), (0, usize::MAX), (0, 0), (5, 3), (64, 0), (130, 70), (0, 40)]
            {
                let sees = |p: usize, j: usize| p.saturating_sub(left) <= j && j <= p.saturating_add(right);
                let interval = Graph::window(left, right);
                let bits = Bits::dense([1, 1, longest, longest], |_, _, p, j| sees(p, j)).unwrap();
                let what = format!("{lens:?}, {left} before, {right} after");
                let expected = own(isa, &x, lens, &interval);
                assert_bits(&own(isa, &x, lens, &Graph::full().with_bits(bits.clone())), &expected, &what);
                // Said twice it is no other graph.
                assert_bits(&own(isa, &x, lens, &interval.with_bits(bits)), &expected, &what);
            }
        }
    }

    fn global_columns_prefixes_and_their_bits(isa) {
        let lens = [300, 70];
        let x = Rows::new(370, 2);
        for (name, graph, is_column) in [
            ("global", Graph::window(9, 9), (|s, j| s == 0 && (j == 0 || j == 170)) as fn(usize, usize) -> bool),
            ("prefix", Graph::causal(), |s, j| j < [130, 5][s]),
            ("whole", Graph::window(3, 0), |s, _| s == 1),
            ("none", Graph::causal(), |_, _| false),
        ] {
            let columns: [Vec<bool>; 2] = [0, 1].map(|s| (0..lens[s]).map(|j| is_column(s, j)).collect());
            let columns = Bits::keys(&[&columns[0], &columns[1]]).unwrap();
            let plain = graph.clone();
            let bits = Bits::dense([2, 1, 300, 300], |s, _, p, j| plain.allows(p, j) || is_column(s, j)).unwrap();
            let expected = own(isa, &x, &lens, &graph.with_columns(columns));
            assert_bits(&own(isa, &x, &lens, &Graph::full().with_bits(bits)), &expected, name);
        }
    }

    fn bits_by_head_sequence_and_query_where_all_are_alike(isa) {
        let (lens, x) = ([70, 33], Rows::new(103, 3));
        let sees = |j: usize| j % 3 != 1;
        let one = Bits::dense([1, 1, 1, 70], |_, _, _, j| sees(j)).unwrap();
        let expected = own(isa, &x, &lens, &Graph::causal().with_bits(one));
        for dims in [[2, 1, 1, 70], [1, 4, 1, 70], [1, 1, 70, 70], [2, 4, 70, 70]] {
            let bits = Bits::dense(dims, |_, _, _, j| sees(j)).unwrap();
            assert_bits(&own(isa, &x, &lens, &Graph::causal().with_bits(bits)), &expected, &format!("{dims:?}"));
        }
        let row: Vec<bool> = (0..70).map(sees).collect();
        let keys = Bits::keys(&[&row, &row]).unwrap();
        assert_bits(&own(isa, &x, &lens, &Graph::causal().with_bits(keys)), &expected, "keys");
        // As groups: those who are seen, and the others.
        let ids: Vec<u32> = lens.iter().flat_map(|&len| (0..len).map(|j| u32::from(sees(j)))).collect();
        let groups = Bits::groups(&ids, &ids, &[0, 70, 103], 2, &[false, true, false, true]).unwrap();
        assert_bits(&own(isa, &x, &lens, &Graph::causal().with_bits(groups)), &expected, "groups");
    }

    fn ragged_segments_and_calls_of_their_own(isa) {
        let (queries, keys) = ([3, 0, 70, 1, 65], [300, 5, 70, 0, 64]);
        let (q, kv) = (Rows::new(139, 4), Rows::new(439, 5));
        let (q_ends, k_ends) = (offsets(&queries), offsets(&keys));
        for graph in [Graph::full(), Graph::causal(), Graph::window(20, 2)] {
            let together = attend(isa, &q, &queries, &kv, &keys, &graph);
            for s in 0..5 {
                let (q_rows, k_rows) = (q_ends[s]..q_ends[s + 1], k_ends[s]..k_ends[s + 1]);
                let (q, kv) = (q.pick(q_rows.clone()), kv.pick(k_rows));
                let alone = attend(isa, &q, &queries[s..s + 1], &kv, &keys[s..s + 1], &graph);
                assert_bits(&alone, out(&together, q_rows), &format!("segment {s}, {graph:?}"));
            }
        }
    }

    fn blocks_on_the_diagonal_and_calls_of_their_own(isa) {
        // Three sequences as groups of one: the same edges over keys at other places.
        let lens = [70, 3, 130];
        let (x, ends) = (Rows::new(203, 6), offsets(&lens));
        let ids: Vec<u32> = (0..3).flat_map(|g| vec![g; lens[g as usize]]).collect();
        let table: Vec<bool> = (0..9).map(|i| i / 3 == i % 3).collect();
        let bits = Bits::groups(&ids, &ids, &[0, 203], 3, &table).unwrap();
        for graph in [Graph::full(), Graph::causal()] {
            let apart = own(isa, &x, &lens, &graph);
            let together = own(isa, &x, &[203], &graph.clone().with_bits(bits.clone()));
            assert_close(&together, &to_f64(&apart), LIMIT * slack(isa), &format!("{graph:?}"));
            // The first stands where it would alone.
            assert_bits(out(&together, 0..ends[1]), out(&apart, 0..ends[1]), "the first");
        }
    }

    fn cross_attention_and_early_concatenation(isa) {
        // Two streams that see each other and not themselves.
        let (a, b) = (90, 170);
        let x = Rows::new(a + b, 7);
        let (first, second) = (x.pick(0..a), x.pick(a..a + b));
        let ids: Vec<u32> = (0..a + b).map(|i| u32::from(i >= a)).collect();
        let bits = Bits::groups(&ids, &ids, &[0, a + b], 2, &[false, true, true, false]).unwrap();
        let together = own(isa, &x, &[a + b], &Graph::full().with_bits(bits));
        let full = Graph::full();
        let a_sees_b = attend(isa, &first, &[a], &second, &[b], &full);
        let b_sees_a = attend(isa, &second, &[b], &first, &[a], &full);
        assert_close(out(&together, 0..a), &to_f64(&a_sees_b), LIMIT * slack(isa), "the first over the second");
        // Its keys stand at their places.
        assert_bits(out(&together, a..a + b), &b_sees_a, "the second over the first");
    }

    fn permuted_tokens(isa) {
        let n = 150;
        let x = Rows::new(n, 8);
        let edge = |i: usize, j: usize| (i * 5 + j * 3) % 7 < 3 || i == j;
        let order: Vec<usize> = (0..n).map(|i| (i * 47 + 11) % n).collect();
        let bits = |f: &dyn Fn(usize, usize) -> bool| Bits::dense([1, 1, n, n], |_, _, i, j| f(i, j)).unwrap();
        let y = own(isa, &x, &[n], &Graph::full().with_bits(bits(&edge)));
        let permuted = x.pick(order.iter().copied());
        let graph = Graph::full().with_bits(bits(&|i, j| edge(order[i], order[j])));
        let z = own(isa, &permuted, &[n], &graph);
        let expected: Vec<f32> = order.iter().flat_map(|&i| out(&y, i..i + 1)).copied().collect();
        assert_close(&z, &to_f64(&expected), LIMIT * slack(isa), "permuted");
        // Queries alone may stand in any order, each by itself or several that follow one another: their keys are where they were.
        let ends = [0, n];
        let mut store = KeyStore::new(&heads(), n, 1).unwrap();
        let [k, v] = [1, 2].map(|i| MatRef::contiguous(&x.0[i], n, cols()[i]).unwrap());
        store.set(Context::serial(), k, v, &ends).unwrap();
        let (graph, terms) = (Graph::window(30, 4), Terms::default());
        let y = own(isa, &x, &[n], &graph);
        let runs = [80..81, 3..5, 130..150, 5..80, 0..3, 81..130].into_iter().flatten().collect();
        for order in [order, runs, (0..n).collect()] {
            let q = x.pick(order.iter().copied());
            let rows = QueryRows::new(MatRef::contiguous(&q.0[0], n, cols()[0]).unwrap(), &ends);
            let places: Vec<isize> = order.iter().map(|&i| i as isize).collect();
            let mut z = Guarded::unset(n, cols()[3]);
            store.attend(serial(isa), &heads(), &rows.at(&places), &graph, &terms, z.view_mut()).unwrap();
            let expected: Vec<f32> = order.iter().flat_map(|&i| out(&y, i..i + 1)).copied().collect();
            assert_bits(&z.values(), &expected, "queries in any order");
        }
    }

    fn keys_that_nobody_sees_need_not_be_there(isa) {
        // Keys behind the last that is seen change no bit, whatever they are.
        let (n, seen) = (70, [1, 63, 64, 65, 200, 256]);
        let x = Rows::new(n + 330, 9);
        let q = x.pick(0..n);
        for seen in seen {
            let row: Vec<bool> = (0..330).map(|j| j < seen).collect();
            let graph = Graph::full().with_bits(Bits::keys(&[&row]).unwrap());
            let masked = attend(isa, &q, &[n], &x.pick(n..n + 330), &[330], &graph);
            let short = attend(isa, &q, &[n], &x.pick(n..n + seen), &[seen], &Graph::full());
            assert_bits(&masked, &short, &format!("{seen} of 330"));
        }
    }
}

#[test]
fn graphs_tell_of_what_they_do_not_hold() {
    let bits = Bits::dense([2, 3, 4, 5], |s, h, _, _| s == 0 && h == 0).unwrap();
    let graph = Graph::full().with_bits(bits);
    assert!(graph.allows(3, 4) && !graph.allows(4, 0) && !graph.allows(0, 5) && !graph.allows(usize::MAX, 0));
    let groups = Bits::groups(&[0, 1], &[0, 1, 1], &[0, 3], 2, &[true, false, true, true]).unwrap();
    let graph = Graph::full().with_bits(groups);
    let seen: Vec<bool> =
        (0..3).flat_map(|p| (0..4).map(move |j| (p, j))).map(|(p, j)| graph.allows(p, j)).collect();
    let expected = [true, false, false, false, true, true, true, false, false, false, false, false];
    assert_eq!(seen, expected);
    let none = Graph::window(0, 0).with_columns(Bits::keys(&[]).unwrap());
    assert!(!none.allows(0, 0));
    assert!(Graph::full().allows(0, 1 << 40) && Graph::causal().allows(1 << 40, 0));
    assert!(!Graph::full().allows(usize::MAX, 0) && !Graph::full().allows(0, usize::MAX));
}
