//! Attention and the projection before it, against the f64 reference: graphs, heads, ragged batches, special values.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, slack};
use common::data::Rng;
use common::model::{Model, Shape, offsets, reference_heads};
use common::sizes::{HEAD_DIMS, SEGMENTS};
use common::{on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{Context, Graph, Heads, Isa, KeyStore, MatMut, QueryRows, Terms, attention};

/// Outputs are means of values of size 1.
const LIMIT: f64 = 3e-6;

struct Case {
    heads: Heads,
    lens: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(heads: Heads, lens: &[usize], seed: u64) -> Case {
        let mut rng = Rng::new(seed);
        let tokens: usize = lens.iter().sum();
        // Scores of a few units, so that weights differ.
        let size = 3.0 / (heads.head_dim as f32).powf(0.25);
        Case {
            heads,
            lens: lens.to_vec(),
            q: rng.vec(tokens * heads.query_cols(), size),
            k: rng.vec(tokens * heads.key_cols(), size),
            v: rng.vec(tokens * heads.value_cols(), 1.0),
        }
    }

    fn tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    fn run(&self, isa: Isa, graph: &Graph) -> Vec<f32> {
        let (heads, tokens) = (&self.heads, self.tokens());
        let q = Guarded::new(tokens, heads.query_cols(), &self.q);
        let k = Guarded::new(tokens, heads.key_cols(), &self.k);
        let v = Guarded::new(tokens, heads.value_cols(), &self.v);
        let mut out = Guarded::unset(tokens, heads.output_cols());
        let offsets = offsets(&self.lens);
        attention(serial(isa), heads, q.view(), k.view(), v.view(), &offsets, graph, out.view_mut()).unwrap();
        out.values()
    }

    fn reference(&self, graph: &Graph) -> Vec<f64> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| r::to_f64(x));
        let offsets = offsets(&self.lens);
        let shape = reference_heads(&self.heads);
        let allowed = |_, _, i, j| graph.allows(i, j);
        r::attention_packed(&q, &k, &v, &shape, &offsets, &offsets, allowed, |_, _, _, _| 0.0)
    }

    #[track_caller]
    fn check(&self, isa: Isa, graph: &Graph) {
        let what = format!("{:?} {:?} {graph:?}", self.heads, self.lens);
        assert_close(&self.run(isa, graph), &self.reference(graph), LIMIT * slack(isa), &what);
    }
}

fn heads(n: usize, dim: usize) -> Heads {
    Heads::new(n, dim).unwrap()
}

const GRAPHS: [Graph; 6] = [
    Graph::full(),
    Graph::causal(),
    Graph::window(0, 0),
    Graph::window(5, 3),
    Graph::window(100, 0),
    Graph::window(0, usize::MAX),
];

on_every_isa! {
    fn segment_lengths(isa) {
        for &len in SEGMENTS {
            for graph in &GRAPHS {
                Case::new(heads(1, 8), &[len], 1).check(isa, graph);
            }
        }
    }

    fn several_chunks(isa) {
        for graph in &GRAPHS {
            Case::new(heads(1, 4), &[600], 2).check(isa, graph);
        }
    }

    /// Here -1e-30 times the weight of its key underflows to -0, which a masked key would make +0 if it were computed.
    fn zeros_are_positive(isa) {
        let case = |n: usize, last: f32| {
            let (k, v) = ([-80.0, 0.0, 0.0], [-1e-30, -0.0, last]);
            Case { heads: heads(1, 1), lens: vec![n], q: vec![1.0; n], k: k[..n].to_vec(), v: v[..n].to_vec() }
        };
        for (n, last) in [(2, 0.0), (3, 1.0), (3, f32::NAN)] {
            assert_eq!(case(n, last).run(isa, &Graph::causal())[1].to_bits(), 0, "{n} keys, {last}");
        }
    }

    /// The largest score that is a number overflows by the scale: the NaN beside it still is one.
    fn a_nan_beside_scores_that_overflow(isa) {
        let heads = heads(1, 1).with_scale(10.0);
        let case = Case { heads, lens: vec![2], q: vec![1.0; 2], k: vec![-3e38, f32::NAN], v: vec![1.0; 2] };
        assert!(case.run(isa, &Graph::full()).iter().all(|x| x.is_nan()));
    }

    fn ragged(isa) {
        for graph in &GRAPHS {
            for lens in [&[1, 2, 3][..], &[0, 5, 0, 0, 70, 1, 0], &[64, 64, 1], &[257, 3]] {
                Case::new(heads(2, 8), lens, 3).check(isa, graph);
            }
        }
    }

    fn head_widths(isa) {
        for &dim in HEAD_DIMS {
            for value_dim in [1, dim, 33] {
                let heads = heads(2, dim).with_value_dim(value_dim).unwrap();
                Case::new(heads, &[19, 66], 4).check(isa, &Graph::causal());
            }
        }
    }

    fn grouped_queries(isa) {
        for (n_heads, n_kv_heads) in [(4, 2), (6, 2), (5, 1), (3, 3)] {
            for dim in [8, 33] {
                let heads = heads(n_heads, dim).with_kv_heads(n_kv_heads).unwrap();
                Case::new(heads, &[30, 70], 5).check(isa, &Graph::full());
                Case::new(heads.with_value_dim(5).unwrap(), &[30, 70], 5).check(isa, &Graph::window(9, 1));
            }
        }
    }

    fn scale_and_softcap(isa) {
        for (scale, softcap) in [(0.0, 0.0), (-1.0, 0.0), (2.0, 0.5), (1.0, 3.0), (1e-3, 50.0)] {
            let heads = heads(2, 8).with_scale(scale).with_softcap(softcap);
            Case::new(heads, &[17, 100], 6).check(isa, &Graph::causal());
        }
    }

    fn sharp_scores(isa) {
        // Scores of hundreds: almost all weights vanish, and chunks' maxima differ beyond the exponential's range.
        let mut case = Case::new(heads(1, 8), &[600], 7);
        case.q.iter_mut().for_each(|x| *x *= 60.0);
        let (actual, expected) = (case.run(isa, &Graph::full()), case.reference(&Graph::full()));
        // A score of 300 is known to 2^-16 at best.
        assert_close(&actual, &expected, 1e-3, "sharp");
    }

    fn masked_poison_does_not_reach_the_output(isa) {
        for lens in [&[20][..], &[70, 30], &[300]] {
            let clean = Case::new(heads(2, 8), lens, 8);
            let graph = Graph::causal();
            let expected = clean.run(isa, &graph);
            let last = lens[0] - 1;
            for poison in [f32::NAN, f32::INFINITY, -f32::INFINITY, f32::MAX] {
                // The last key of the first segment: only the last query sees it.
                for (of_keys, of_values) in [(true, false), (false, true), (true, true)] {
                    let mut case = Case::new(heads(2, 8), lens, 8);
                    if of_keys { case.k[last * 16..][..16].fill(poison) }
                    if of_values { case.v[last * 16..][..16].fill(poison) }
                    let y = case.run(isa, &graph);
                    let what = format!("{poison} in keys {of_keys}, in values {of_values}, of {lens:?}");
                    assert_bits(&y[..last * 16], &expected[..last * 16], &what);
                    assert_bits(&y[(last + 1) * 16..], &expected[(last + 1) * 16..], &what);
                }
            }
        }
    }

    fn poison_in_a_whole_masked_block_does_not_reach_the_output(isa) {
        // A window hides whole blocks and whole chunks, before and after.
        let graph = Graph::window(10, 10);
        let mut case = Case::new(heads(1, 8), &[700], 9);
        let expected = case.run(isa, &graph);
        case.k[..300 * 8].fill(f32::NAN);
        case.v[..300 * 8].fill(f32::INFINITY);
        case.k[500 * 8..].fill(f32::INFINITY);
        case.v[500 * 8..].fill(f32::NAN);
        let y = case.run(isa, &graph);
        assert_bits(&y[310 * 8..490 * 8], &expected[310 * 8..490 * 8], "what sees none of it");
    }

    fn allowed_specials_reach_the_output(isa) {
        for at in [0, 5, 69, 299] {
            // NaN in an allowed key: the whole row.
            let mut case = Case::new(heads(1, 8), &[300], 10);
            case.k[at * 8] = f32::NAN;
            let y = case.run(isa, &Graph::causal());
            assert!(y[..at * 8].iter().all(|x| x.is_finite()), "queries before key {at}");
            assert!(y[at * 8..].iter().all(|x| x.is_nan()), "queries from key {at}");
            // NaN in an allowed value: its column.
            let mut case = Case::new(heads(1, 8), &[300], 10);
            case.v[at * 8 + 3] = f32::NAN;
            let y = case.run(isa, &Graph::causal());
            for (i, x) in y.iter().enumerate() {
                assert_eq!(x.is_nan(), i >= at * 8 && i % 8 == 3, "key {at}, element {i}");
            }
        }
    }

    fn infinite_scores(isa) {
        // q = 1, so a key is its score.
        let one = |k: &[f32], v: &[f32]| {
            let case = Case {
                heads: heads(1, 1),
                lens: vec![k.len()],
                q: vec![1.0; k.len()],
                k: k.to_vec(),
                v: v.to_vec(),
            };
            case.run(isa, &Graph::full())
        };
        const INF: f32 = f32::INFINITY;
        assert_bits(&one(&[0.0, INF], &[1.0, 2.0]), &[f32::NAN; 2], "+inf");
        assert_bits(&one(&[0.0, -INF], &[1.0, 2.0]), &[1.0; 2], "-inf takes no part");
        assert_bits(&one(&[-INF, -INF], &[1.0, 2.0]), &[0.0; 2], "only -inf");
        assert_bits(&one(&[-INF, f32::NAN], &[1.0, 2.0]), &[f32::NAN; 2], "NaN among -inf");
        // The same over several chunks.
        let mut k = vec![-INF; 520];
        assert_bits(&one(&k, &vec![1.0; 520]), &vec![0.0; 520], "only -inf, long");
        k[300] = 2.0;
        assert_bits(&one(&k, &vec![3.0; 520]), &vec![3.0; 520], "one score, long");
        k[519] = f32::NAN;
        assert_bits(&one(&k, &vec![3.0; 520]), &vec![f32::NAN; 520], "NaN in the last chunk");
        (k[519], k[0]) = (0.0, INF);
        assert_bits(&one(&k, &vec![3.0; 520]), &vec![f32::NAN; 520], "+inf in the first chunk");
    }

    fn nothing_to_do(isa) {
        assert!(Case::new(heads(2, 8), &[], 11).run(isa, &Graph::full()).is_empty());
        assert!(Case::new(heads(2, 8), &[0, 0], 11).run(isa, &Graph::full()).is_empty());
    }

    fn projection_meets_the_reference(isa) {
        for shape in [
            Shape::new(2, 8, 1),
            Shape::new(3, 21, 1),
            Shape { heads: heads(4, 16).with_kv_heads(2).unwrap().with_value_dim(9).unwrap(), ..Shape::new(1, 37, 1) },
            Shape::new(2, 64, 1),
        ] {
            let mut rng = Rng::new(12);
            let model = Model::new(shape, &mut rng);
            let (projection, heads) = (model.projection(), shape.heads);
            for lens in [&[5][..], &[1, 0, 66, 2], &[130]] {
                let tokens = lens.iter().sum::<usize>();
                let x = rng.vec(tokens * shape.d_model, 1.0);
                let mut keys = KeyStore::new(&heads, tokens, lens.len()).unwrap();
                let mut q = Guarded::unset(tokens, heads.query_cols());
                let guarded = Guarded::new(tokens, shape.d_model, &x);
                let offsets = offsets(lens);
                projection.forward(serial(isa), guarded.view(), &offsets, q.view_mut(), &mut keys).unwrap();
                let mut out = Guarded::unset(tokens, heads.output_cols());
                let queries = q.values();
                let queries = Guarded::new(tokens, heads.query_cols(), &queries);
                keys.attend(serial(isa), &heads, &QueryRows::new(queries.view(), &offsets), &Graph::causal(), &Terms::default(), out.view_mut()).unwrap();

                let (want_q, want) = model.reference_attention(&r::to_f64(&x), &offsets, &Graph::causal());
                let what = format!("{shape:?} {lens:?}");
                assert_close(&queries.values(), &want_q, LIMIT * slack(isa), &what);
                assert_close(&out.values(), &want, LIMIT * slack(isa), &what);
            }
        }
    }

    fn a_store_takes_smaller_batches(isa) {
        let heads = heads(2, 8);
        let mut keys = KeyStore::new(&heads, 200, 3).unwrap();
        for lens in [&[200][..], &[3], &[70, 0, 1], &[64, 65, 66]] {
            let case = Case::new(heads, lens, 13);
            let k = Guarded::new(case.tokens(), 16, &case.k);
            let v = Guarded::new(case.tokens(), 16, &case.v);
            let q = Guarded::new(case.tokens(), 16, &case.q);
            let mut out = Guarded::unset(case.tokens(), 16);
            keys.set(Context::serial(), k.view(), v.view(), &offsets(lens)).unwrap();
            keys.attend(serial(isa), &heads, &QueryRows::new(q.view(), &offsets(lens)), &Graph::full(), &Terms::default(), out.view_mut()).unwrap();
            assert_bits(&out.values(), &case.run(isa, &Graph::full()), "a used store");
        }
    }
}

#[test]
fn graphs_say_what_they_allow() {
    for (graph, low, high) in [
        (Graph::full(), 0, 99),
        (Graph::causal(), 0, 50),
        (Graph::window(0, 0), 50, 50),
        (Graph::window(3, 2), 47, 52),
        (Graph::window(usize::MAX, usize::MAX), 0, 99),
        (Graph::window(60, 1), 0, 51),
    ] {
        let seen: Vec<usize> = (0..100).filter(|&j| graph.allows(50, j)).collect();
        assert_eq!(seen, (low..=high).collect::<Vec<_>>(), "{graph:?}");
    }
}

#[test]
fn an_empty_matrix_has_no_tokens() {
    let heads = heads(1, 4);
    let mut keys = KeyStore::new(&heads, 0, 0).unwrap();
    let empty = || MatMut::contiguous(&mut [], 0, 4).unwrap();
    keys.set(Context::serial(), empty().as_ref(), empty().as_ref(), &[0]).unwrap();
    keys.attend(
        laneformer::Context::serial(),
        &heads,
        &QueryRows::new(empty().as_ref(), &[0]),
        &Graph::full(),
        &Terms::default(),
        empty(),
    )
    .unwrap();
}
