//! Attention over graphs beyond an interval of positions, over other sequences' keys, and over a growing cache.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, slack};
use common::data::Rng;
use common::model::{offsets, reference_heads};
use common::{on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{
    Bits, Context, Cover, Error, Graph, Heads, Isa, KeyStore, KvCache, MatRef, QueryRows, Terms, attention,
};

const LIMIT: f64 = 3e-6;

fn heads() -> Heads {
    Heads::new(2, 8).unwrap()
}

fn view(x: &[f32]) -> MatRef<'_> {
    MatRef::contiguous(x, x.len() / 16, 16).unwrap()
}

/// Queries, keys and values of these lengths.
struct Batch {
    queries: Vec<usize>,
    keys: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Batch {
    fn new(queries: &[usize], keys: &[usize]) -> Batch {
        let mut rng = Rng::new(1);
        let (rows, keys_rows) = (queries.iter().sum::<usize>(), keys.iter().sum::<usize>());
        Batch {
            queries: queries.to_vec(),
            keys: keys.to_vec(),
            q: rng.vec(rows * 16, 2.0),
            k: rng.vec(keys_rows * 16, 2.0),
            v: rng.vec(keys_rows * 16, 1.0),
        }
    }

    fn run(&self, isa: Isa, graph: &Graph) -> Vec<f32> {
        let mut keys = KeyStore::new(&heads(), self.k.len() / 16, self.keys.len()).unwrap();
        keys.set(Context::serial(), view(&self.k), view(&self.v), &offsets(&self.keys)).unwrap();
        let mut out = Guarded::unset(self.q.len() / 16, 16);
        let offsets = offsets(&self.queries);
        let queries = QueryRows::new(view(&self.q), &offsets);
        keys.attend(serial(isa), &heads(), &queries, graph, &Terms::default(), out.view_mut()).unwrap();
        out.values()
    }

    fn reference(&self, allowed: impl Fn(usize, usize, usize, usize) -> bool) -> Vec<f64> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| r::to_f64(x));
        let (queries, keys) = (offsets(&self.queries), offsets(&self.keys));
        let shape = reference_heads(&heads());
        r::attention_packed(&q, &k, &v, &shape, &queries, &keys, allowed, |_, _, _, _| 0.0)
    }
}

/// A pattern without structure, in which some rows are empty.
fn scattered(s: usize, h: usize, i: usize, j: usize) -> bool {
    i % 5 != 3 && (s * 7 + h * 5 + i * 3 + j * 11).is_multiple_of(4)
}

on_every_isa! {
    fn other_sequences_keys(isa) {
        for (queries, keys) in [(&[3, 1, 70][..], &[5, 300, 1][..]), (&[2, 0, 1], &[0, 4, 64]), (&[1], &[257])] {
            let batch = Batch::new(queries, keys);
            let expected = batch.reference(|_, _, _, _| true);
            assert_close(&batch.run(isa, &Graph::full()), &expected, LIMIT * slack(isa), "full");
            // The last query stands at the last key.
            let place = |s: usize, i: usize| (i + keys[s]) as isize - queries[s] as isize;
            let expected = batch.reference(|s, _, i, j| j as isize <= place(s, i));
            assert_close(&batch.run(isa, &Graph::causal()), &expected, LIMIT * slack(isa), "causal");
        }
    }

    fn any_bits(isa) {
        for lens in [&[1, 17][..], &[64, 65], &[300, 2]] {
            let batch = Batch::new(lens, lens);
            let longest = *lens.iter().max().unwrap();
            let all = Bits::dense([2, 2, longest, longest], scattered).unwrap();
            let actual = batch.run(isa, &Graph::full().with_bits(all));
            let expected = batch.reference(scattered);
            assert_close(&actual, &expected, LIMIT * slack(isa), &format!("dense {lens:?}"));
            // One set for all sequences and heads, under a causal graph.
            let shared = Bits::dense([1, 1, longest, longest], scattered).unwrap();
            let actual = batch.run(isa, &Graph::causal().with_bits(shared));
            let expected = batch.reference(|_, _, i, j| j <= i && scattered(0, 0, i, j));
            assert_close(&actual, &expected, LIMIT * slack(isa), &format!("shared {lens:?}"));
        }
    }

    fn a_row_without_keys_is_zero(isa) {
        let batch = Batch::new(&[20], &[20]);
        let bits = Bits::dense([1, 1, 20, 20], |_, _, i, j| i != 7 && j <= i).unwrap();
        let y = batch.run(isa, &Graph::full().with_bits(bits));
        assert_bits(&y[7 * 16..8 * 16], &[0.0; 16], "row 7");
        assert!(y[6 * 16..7 * 16].iter().all(|x| *x != 0.0));
    }

    fn key_padding(isa) {
        let batch = Batch::new(&[5, 70], &[5, 70]);
        let masks: [Vec<bool>; 2] = [(0..5).map(|j| j < 3).collect(), (0..70).map(|j| j % 2 == 0).collect()];
        let bits = Bits::keys(&[&masks[0], &masks[1]]).unwrap();
        let expected = batch.reference(|s, _, _, j| masks[s][j]);
        assert_close(&batch.run(isa, &Graph::full().with_bits(bits)), &expected, LIMIT * slack(isa), "padding");
    }

    fn global_columns_beside_a_window(isa) {
        // So long that chunks of keys are beside the window for whole tiles.
        let batch = Batch::new(&[700], &[700]);
        let global: Vec<bool> = (0..700).map(|j| [0, 150, 300, 699].contains(&j)).collect();
        let graph = Graph::window(5, 5).with_columns(Bits::keys(&[&global]).unwrap());
        let expected = batch.reference(|_, _, i, j| global[j] || i.abs_diff(j) <= 5);
        assert_close(&batch.run(isa, &graph), &expected, LIMIT * slack(isa), "window and columns");
    }

    fn groups(isa) {
        let batch = Batch::new(&[20, 70], &[20, 70]);
        let ids: Vec<u32> = (0..90).map(|i| i * 7 % 3).collect();
        let table = [true, false, true, false, true, false, false, false, false];
        let bits = Bits::groups(&ids, &ids, &[0, 20, 90], 3, &table).unwrap();
        let expected = batch.reference(|s, _, i, j| {
            let first = [0, 20][s];
            table[ids[first + i] as usize * 3 + ids[first + j] as usize]
        });
        assert_close(&batch.run(isa, &Graph::full().with_bits(bits)), &expected, LIMIT * slack(isa), "groups");
    }

    fn poison_behind_bits_does_not_reach_the_output(isa) {
        let lens = [300];
        let hidden = |j: usize| j % 3 == 1;
        let graph = || Graph::full().with_bits(Bits::dense([1, 1, 1, 300], |_, _, _, j| !hidden(j)).unwrap());
        let mut batch = Batch::new(&lens, &lens);
        let expected = batch.run(isa, &graph());
        for j in (0..300).filter(|j| hidden(*j)) {
            batch.k[j * 16..][..16].fill(if j % 2 == 0 { f32::NAN } else { f32::INFINITY });
            batch.v[j * 16..][..16].fill(if j % 2 == 0 { f32::NEG_INFINITY } else { f32::NAN });
        }
        assert_bits(&batch.run(isa, &graph()), &expected, "behind bits");
    }

    fn poison_that_some_rows_of_a_band_may_not_see(isa) {
        // Key 70 is hidden from odd rows, key 400 from every third: in other chunks, and beside rows that see them.
        let allowed = |i: usize, j: usize| !(j == 70 && i % 2 == 1 || j == 400 && i.is_multiple_of(3));
        let graph = || Graph::full().with_bits(Bits::dense([1, 1, 600, 600], |_, _, i, j| allowed(i, j)).unwrap());
        let mut batch = Batch::new(&[600], &[600]);
        let expected = batch.run(isa, &graph());
        batch.v[70 * 16..][..16].fill(f32::NAN);
        batch.v[400 * 16..][..16].fill(f32::INFINITY);
        let actual = batch.run(isa, &graph());
        for (i, (actual, expected)) in actual.chunks(16).zip(expected.chunks(16)).enumerate() {
            if allowed(i, 70) || allowed(i, 400) {
                assert!(actual.iter().all(|x| !x.is_finite()), "{i} {actual:?}");
            } else {
                assert_bits(actual, expected, &format!("{i}"));
            }
        }
    }

    fn decoding_gives_the_bits_of_prefill(isa) {
        let total = 530;
        let mut rng = Rng::new(2);
        let [q, k, v] = std::array::from_fn(|_| rng.vec(total * 16, 1.5));
        for graph in [Graph::causal(), Graph::window(100, 0)] {
            let mut whole = Guarded::unset(total, 16);
            let (qs, ks, vs) = (view(&q), view(&k), view(&v));
            attention(serial(isa), &heads(), qs, ks, vs, &[0, total], &graph, whole.view_mut()).unwrap();
            let whole = whole.values();
            let ring = KvCache::ring(&heads(), 1, 101).unwrap();
            for (name, mut cache) in [("cache", KvCache::new(&heads(), 1, total).unwrap()), ("ring", ring)] {
                if name == "ring" && graph == Graph::causal() {
                    continue;
                }
                let mut done = 0;
                // A prompt, then steps of several sizes over the edges of blocks and chunks.
                for step in [1, 62, 1, 1, 63, 120, 7, 1, 1, 200, 54, 1, 1, 17] {
                    let rows = done * 16..(done + step) * 16;
                    cache.append(0, view(&k[rows.clone()]), view(&v[rows.clone()])).unwrap();
                    let mut out = Guarded::unset(step, 16);
                    let ends = [0, step];
                    let queries = QueryRows::new(view(&q[rows.clone()]), &ends);
                    let terms = Terms::default();
                    cache.keys().attend(serial(isa), &heads(), &queries, &graph, &terms, out.view_mut()).unwrap();
                    assert_bits(&out.values(), &whole[rows], &format!("{name}, {graph:?}, {step} from {done}"));
                    done += step;
                }
                assert_eq!((done, cache.len(0)), (total, total));
            }
        }
    }
}

#[test]
fn caches_refuse_what_does_not_fit() {
    let rows = vec![0.0; 20 * 16];
    let mut cache = KvCache::new(&heads(), 2, 10).unwrap();
    let some = |n: usize| view(&rows[..n * 16]);
    cache.append(1, some(4), some(4)).unwrap();
    let full = Error::TooLarge { arg: "tokens appended to the cache", max: 6, actual: 7 };
    assert_eq!(cache.append(1, some(7), some(7)), Err(full));
    assert_eq!(full.to_string(), "tokens appended to the cache: expected at most 6, got 7");
    assert_eq!(
        cache.append(2, some(1), some(1)),
        Err(Error::TooLarge { arg: "sequence", max: 1, actual: 2 })
    );
    assert_eq!(cache.append(0, some(2), some(1)), Err(Error::Size { arg: "v.rows", expected: 2, actual: 1 }));
    assert_eq!(cache.truncate(1, 5), Err(Error::TooLarge { arg: "len", max: 4, actual: 5 }));
    assert_eq!((cache.len(0), cache.len(1), cache.len(7)), (0, 4, 0));
    cache.truncate(1, 0).unwrap();
    assert!(cache.is_empty());
    assert_eq!(KvCache::new(&heads(), 0, 1).unwrap_err(), Error::ZeroDim { arg: "sequences" });
    assert_eq!(KvCache::new(&heads(), 1, 0).unwrap_err(), Error::ZeroDim { arg: "capacity" });
    for (sequences, capacity) in [(1, usize::MAX), (usize::MAX, 1), (usize::MAX, usize::MAX)] {
        assert!(matches!(KvCache::new(&heads(), sequences, capacity), Err(Error::Overflow { .. })));
        assert!(matches!(KvCache::ring(&heads(), sequences, capacity), Err(Error::Overflow { .. })));
    }
}

#[test]
fn bits_that_do_not_fit_the_batch_are_refused() {
    let batch = Batch::new(&[5, 2, 1], &[5, 2, 1]);
    let ends = [0, 5, 7, 8];
    let mut keys = KeyStore::new(&heads(), 8, 3).unwrap();
    keys.set(Context::serial(), view(&batch.k), view(&batch.v), &ends).unwrap();
    let mut out = Guarded::unset(8, 16);
    for bits in [
        Bits::dense([2, 1, 5, 5], |_, _, _, _| true).unwrap(),
        Bits::dense([1, 1, 4, 5], |_, _, _, _| true).unwrap(),
        Bits::dense([1, 1, 5, 4], |_, _, _, _| true).unwrap(),
        Bits::keys(&[&[true; 5][..]; 2]).unwrap(),
        Bits::groups(&[0; 7], &[0; 8], &ends, 1, &[true]).unwrap(),
    ] {
        let queries = QueryRows::new(view(&batch.q), &ends);
        let (ctx, graph) = (laneformer::Context::serial(), Graph::full().with_bits(bits));
        let result = keys.attend(ctx, &heads(), &queries, &graph, &Terms::default(), out.view_mut());
        assert!(result.is_err(), "{graph:?}");
    }
    out.assert_unset();
    assert!(Bits::dense([1, 0, 5, 5], |_, _, _, _| true).is_err());
    assert!(Bits::dense([usize::MAX, 2, 5, 5], |_, _, _, _| true).is_err());
    assert!(Bits::groups(&[0], &[2], &[0, 1], 2, &[true; 4]).is_err());
    assert!(Bits::groups(&[0], &[0], &[0, 1], 2, &[true; 3]).is_err());
    assert!(Bits::groups(&[0], &[0], &[0, 2], 1, &[true]).is_err());
    assert!(Bits::groups(&[], &[], &[0], usize::MAX, &[]).is_err());
}

/// Every pair of a query and a key of its sequence is in one tile, which knows whether the query sees the key.
fn assert_tiles(
    graph: &Graph,
    head: usize,
    queries: &[usize],
    keys: &[usize],
    allowed: impl Fn(usize, usize, usize) -> bool,
) {
    let (q_offsets, k_offsets) = (offsets(queries), offsets(keys));
    let (rows, cols) = (q_offsets[queries.len()], k_offsets[keys.len()]);
    let mut met = vec![0; rows * cols];
    for tile in graph.tiles(head, &q_offsets, &k_offsets).unwrap() {
        let s = k_offsets.partition_point(|&end| end <= tile.keys.start) - 1;
        let mut edges = 0;
        for query in tile.queries.clone() {
            for key in tile.keys.clone() {
                met[query * cols + key] += 1;
                let seen = tile.seen(query) >> (key - tile.keys.start) & 1 == 1;
                assert_eq!(seen, allowed(s, query - q_offsets[s], key - k_offsets[s]), "{query} {key}");
                assert!(!seen || tile.computed.contains(&key), "{query} {key} {tile:?}");
                edges += usize::from(seen);
            }
        }
        assert_eq!((tile.seen(tile.queries.end), tile.seen(usize::MAX)), (0, 0));
        assert_eq!(edges, tile.edges());
        let cover = match edges {
            0 => Cover::Empty,
            n if n == tile.queries.len() * tile.keys.len() => Cover::Full,
            _ => Cover::Partial,
        };
        assert_eq!((cover, tile.scores() == 0), (tile.cover, edges == 0), "{tile:?}");
        assert_eq!((tile.computed.start - tile.keys.start) % 16, 0);
        assert!(tile.computed.end == tile.keys.end || (tile.computed.end - tile.keys.start) % 16 == 0);
    }
    for (i, n) in met.iter().enumerate() {
        let own = q_offsets.partition_point(|&end| end <= i / cols)
            == k_offsets.partition_point(|&end| end <= i % cols);
        assert_eq!(*n, i32::from(own), "{} {}", i / cols, i % cols);
    }
}

#[test]
fn tiles_hold_every_edge() {
    for (queries, keys) in [(&[300][..], &[300][..]), (&[3, 1, 70], &[5, 300, 1]), (&[2, 0, 1], &[0, 4, 64])]
    {
        let at = |s: usize, i: usize| (i + keys[s]) as isize - queries[s] as isize;
        let causal = |s, i, j: usize| j as isize <= at(s, i);
        assert_tiles(&Graph::full(), 0, queries, keys, |_, _, _| true);
        assert_tiles(&Graph::causal(), 0, queries, keys, causal);
        let column = |j: usize| j.is_multiple_of(100);
        let columns: Vec<bool> = (0..300).map(column).collect();
        let columns = Bits::keys(&vec![&columns[..]; keys.len()]).unwrap();
        assert_tiles(&Graph::window(9, 5).with_columns(columns), 0, queries, keys, |s, i, j| {
            column(j) || (at(s, i) - 9..=at(s, i) + 5).contains(&(j as isize))
        });
        let bits = Bits::dense([3, 2, 300, 300], scattered).unwrap();
        assert_tiles(&Graph::causal().with_bits(bits), 1, queries, keys, |s, i, j| {
            causal(s, i, j) && scattered(s, 1, i, j)
        });
    }
    let ids: Vec<u32> = (0..90).map(|i| u32::from(i % 20 >= 16)).collect();
    let table = [true, false, true, true];
    let bits = Bits::groups(&ids, &ids, &[0, 20, 90], 2, &table).unwrap();
    assert_tiles(&Graph::full().with_bits(bits), 0, &[20, 70], &[20, 70], |s, i, j| {
        let id = |i: usize| ids[[0, 20][s] + i] as usize;
        table[id(i) * 2 + id(j)]
    });
}

#[test]
fn tiles_are_as_many_as_the_edges_need() {
    let scores = |graph: Graph, n: usize| -> usize {
        graph.tiles(0, &[0, n], &[0, n]).unwrap().map(|tile| tile.scores()).sum()
    };
    assert_eq!(scores(Graph::full(), 1000), 1_000_000);
    // A window: so many more scores per query that they are whole vectors of the union of some rows.
    assert!(scores(Graph::window(50, 50), 4096) < 4096 * (101 + 64 + 32));
    assert_eq!(scores(Graph::window(50, 50), 8192) / scores(Graph::window(50, 50), 4096), 2);
    let none = Bits::dense([1, 1, 1, 70], |_, _, _, _| false).unwrap();
    assert_eq!(scores(Graph::full().with_bits(none), 70), 0);
}

#[test]
fn tiles_of_what_does_not_fit_are_refused() {
    let error = |graph: &Graph, head, offsets: &[usize], keys: &[usize]| {
        graph.tiles(head, offsets, keys).map(|_| ()).unwrap_err()
    };
    let full = Graph::full();
    assert_eq!(error(&full, 0, &[], &[0]), Error::TooSmall { arg: "offsets", min: 1, actual: 0 });
    assert_eq!(
        error(&full, 0, &[0, 1], &[0]),
        Error::Size { arg: "key_offsets.len()", expected: 2, actual: 1 }
    );
    assert_eq!(error(&full, 0, &[0, 5, 3], &[0, 1, 2]), Error::NotAscending { arg: "offsets", at: 2 });
    assert_eq!(error(&full, 0, &[0, 1], &[1, 2]), Error::Size { arg: "key_offsets", expected: 0, actual: 1 });
    let two = Graph::full().with_bits(Bits::dense([1, 2, 4, 4], |_, _, _, _| true).unwrap());
    assert!(two.tiles(1, &[0, 4], &[0, 4]).is_ok());
    for (head, n) in [(2, 4), (usize::MAX, 4), (0, 5)] {
        assert!(two.tiles(head, &[0, n], &[0, n]).is_err(), "{head} {n}");
    }
}
