//! Attention over rows that are stored where they are read: the bits of a store that holds them all, in memory of a few windows.

mod common;

use common::buffer::Guarded;
use common::compare::assert_bits;
use common::data::Rng;
use common::model::offsets;
use common::{executors, on_every_isa, serial};
use laneformer::{
    Bias, Bits, Context, Error, Graph, Heads, Isa, KeyRows, KeyStore, KeyStream, MatRef, QueryRows, Terms,
    attention,
};

/// Two query heads to each of two key heads, and dimensions that are no whole vectors.
fn heads() -> Heads {
    Heads::new(4, 9).unwrap().with_kv_heads(2).unwrap().with_value_dim(17).unwrap().with_softcap(7.0)
}

struct Batch {
    q: Guarded,
    k: Guarded,
    v: Guarded,
    queries: Vec<usize>,
    keys: Vec<usize>,
}

impl Batch {
    fn new(queries: &[usize], keys: &[usize], seed: u64) -> Batch {
        let (heads, mut rng) = (heads(), Rng::new(seed));
        let mut rows = |lens: &[usize], cols: usize| {
            let n = lens.iter().sum();
            Guarded::with_stride(n, cols, cols + 5, &rng.vec(n * cols, 2.0))
        };
        Batch {
            q: rows(queries, heads.query_cols()),
            k: rows(keys, heads.key_cols()),
            v: rows(keys, heads.value_cols()),
            queries: offsets(queries),
            keys: offsets(keys),
        }
    }

    fn queries(&self) -> QueryRows<'_> {
        QueryRows::new(self.q.view(), &self.queries)
    }

    fn out(&self) -> Guarded {
        Guarded::unset(self.queries.last().copied().unwrap_or(0), heads().output_cols())
    }

    fn stored(&self, isa: Isa, queries: &QueryRows<'_>, graph: &Graph, terms: &Terms<'_>) -> Vec<f32> {
        let rows = self.keys.last().copied().unwrap_or(0);
        let mut store = KeyStore::new(&heads(), rows, self.keys.len() - 1).unwrap();
        store.set(serial(isa), self.k.view(), self.v.view(), &self.keys).unwrap();
        let mut out = self.out();
        store.attend(serial(isa), &heads(), queries, graph, terms, out.view_mut()).unwrap();
        out.values()
    }

    fn streamed(
        &self,
        stream: &mut KeyStream,
        ctx: Context<'_>,
        queries: &QueryRows<'_>,
        graph: &Graph,
        terms: &Terms<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut out = self.out();
        let rows = KeyRows::new(self.k.view(), self.v.view(), &self.keys);
        let result = stream.attend(ctx, &heads(), queries, &rows, graph, terms, out.view_mut());
        match result {
            Ok(()) => Ok(out.values()),
            Err(error) => {
                out.assert_unset();
                Err(error)
            }
        }
    }
}

/// The first `n` keys of sequences of `lens`.
fn first(n: usize, lens: &[usize]) -> Bits {
    let sequences: Vec<Vec<bool>> = lens.iter().map(|&len| (0..len).map(|key| key < n).collect()).collect();
    Bits::keys(&sequences.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
}

on_every_isa! {
    fn the_bits_of_a_store(isa) {
        // A sequence of many rounds of the ring, an empty one, short ones, and one that ends inside of a block.
        // Long ones take seconds where it shows nothing that the others do not.
        let long = if matches!(isa.name(), "scalar" | "portable") { 500 } else { 1100 };
        let lens = [long, 0, 3, 64, 330];
        let (batch, other) = (Batch::new(&lens, &lens, 1), Batch::new(&lens, &lens, 2));
        let mut nan = Batch::new(&lens, &lens, 3);
        for (rows, cols) in [(&mut nan.k, heads().key_cols()), (&mut nan.v, heads().value_cols())] {
            *rows = Guarded::new(nan.keys[5], cols, &vec![f32::NAN; nan.keys[5] * cols]);
        }
        let odd = Bits::dense([1, 4, 1, long], |_, head, _, key| key % (3 + head) != 0).unwrap();
        let none = Terms::default();
        for graph in [
            Graph::window(0, 0),
            Graph::window(99, 0),
            Graph::window(0, 70),
            Graph::window(256, 256),
            Graph::window(130, 40).with_columns(first(16, &lens)),
            Graph::window(64, 64).with_columns(first(300, &lens)),
            Graph::window(100, 100).with_bits(first(long - 50, &lens)).with_bits(odd),
        ] {
            let expected = batch.stored(isa, &batch.queries(), &graph, &none);
            let expected_of_other = other.stored(isa, &other.queries(), &graph, &none);
            for threads in [1, 3] {
                let mut stream = KeyStream::new(&heads(), &graph, threads).unwrap();
                for (name, executor) in executors::of(threads) {
                    let (ctx, what) = (Context::new(isa, &*executor), format!("{graph:?} with {name}"));
                    let y = batch.streamed(&mut stream, ctx, &batch.queries(), &graph, &none).unwrap();
                    assert_bits(&y, &expected, &what);
                    // What one call has stored is not the next one's, nor does it reach a sequence's end.
                    nan.streamed(&mut stream, ctx, &nan.queries(), &graph, &none).unwrap();
                    let y = other.streamed(&mut stream, ctx, &other.queries(), &graph, &none).unwrap();
                    assert_bits(&y, &expected_of_other, &format!("{what}, other keys"));
                }
            }
        }
    }

    fn queries_anywhere_and_terms(isa) {
        let (queries, lens) = ([200, 70, 1], [700, 70, 300]);
        let batch = Batch::new(&queries, &lens, 3);
        let graph = Graph::window(90, 20).with_columns(first(5, &lens));
        let data = Rng::new(4).vec(3 * 200 * 700, 2.0);
        let bias = Bias::new(&data, [3, 1, 200, 700]).unwrap();
        let mut stream = KeyStream::new(&heads(), &graph, 2).unwrap();
        // From before the first key to behind the last, and in an order of their own that stays inside of a window.
        let starts = [-30, 0, 310];
        let each: Vec<isize> = (0..271).map(|row| (row / 64 * 64 + row * 37 % 64) as isize).collect();
        for (what, placed) in [
            ("at the end", batch.queries()),
            ("from places", batch.queries().starting_at(&starts)),
            ("each at its own", batch.queries().at(&each)),
        ] {
            for terms in [Terms::default(), Terms { bias: Some(bias), ..Terms::default() }] {
                let expected = batch.stored(isa, &placed, &graph, &terms);
                for (name, executor) in executors::of(2) {
                    let ctx = Context::new(isa, &*executor);
                    let y = batch.streamed(&mut stream, ctx, &placed, &graph, &terms).unwrap();
                    assert_bits(&y, &expected, &format!("{what} with {name}"));
                }
            }
        }
    }
}

#[test]
fn room_does_not_depend_on_the_sequence() {
    let (heads, columns) =
        (Heads::new(12, 64).unwrap(), |n: usize| Graph::window(256, 256).with_columns(first(16, &[n])));
    let bytes = |n: usize| KeyStream::new(&heads, &columns(n), 2).unwrap().bytes();
    assert_eq!(bytes(1000), bytes(100_000));
    // Four blocks with the columns and twelve with the window, of 384 KiB each, and less than one with the rest, for each of two.
    let blocks = bytes(1000) / (2 * 12 * 128 * 64 * 4);
    assert_eq!(blocks, 16);
}

#[test]
fn one_call_chooses_by_memory() {
    // Twelve blocks for each of one or two threads, against twenty and ten of the batch.
    let (heads, graph) = (Heads::new(2, 8).unwrap(), Graph::window(256, 256));
    for (n, threads) in [(1280, 1), (1280, 2), (640, 1)] {
        let x = Rng::new(6).vec(n * 16, 2.0);
        let (x, ends) = (MatRef::contiguous(&x, n, 16).unwrap(), [0, n / 3, n]);
        let [mut actual, mut expected] = [(); 2].map(|()| Guarded::unset(n, 16));
        let mut store = KeyStore::new(&heads, n, 2).unwrap();
        store.set(Context::serial(), x, x, &ends).unwrap();
        let (queries, none) = (QueryRows::new(x, &ends), Terms::default());
        store.attend(Context::serial(), &heads, &queries, &graph, &none, expected.view_mut()).unwrap();
        for (name, executor) in executors::of(threads) {
            let ctx = Context::new(Isa::best(), &*executor);
            attention(ctx, &heads, x, x, x, &ends, &graph, actual.view_mut()).unwrap();
            assert_bits(&actual.values(), &expected.values(), &format!("{n} tokens with {name}"));
        }
    }
}

#[test]
fn graphs_that_do_not_fit() {
    let lens = [700];
    let batch = Batch::new(&lens, &lens, 5);
    let narrow = Graph::window(60, 60);
    let mut stream = KeyStream::new(&heads(), &narrow, 1).unwrap();
    let none = Terms::default();
    let mut run = |graph: &Graph, queries: &QueryRows<'_>| {
        batch.streamed(&mut stream, Context::serial(), queries, graph, &none).map(drop)
    };
    let too_large = |actual| {
        let arg = "blocks of 64 keys that 64 queries see";
        Err(Error::TooLarge { arg, max: 4, actual })
    };
    let queries = batch.queries();
    assert_eq!(run(&narrow, &queries), Ok(()));
    assert_eq!(run(&Graph::window(100, 60), &queries), Ok(()));
    assert_eq!(run(&Graph::window(256, 60), &queries), too_large(6));
    assert_eq!(run(&Graph::full(), &queries), too_large(11));
    assert_eq!(run(&narrow.clone().with_columns(first(1, &lens)), &queries), too_large(7));
    let apart: Vec<isize> = (0..700).map(|row| row * 97 % 700).collect();
    assert_eq!(run(&narrow, &queries.at(&apart)), too_large(11));
    assert_eq!(run(&narrow, &queries), Ok(()));

    let overflow = Error::Overflow { arg: "keys and values" };
    for graph in [Graph::full(), Graph::causal()] {
        assert_eq!(KeyStream::new(&heads(), &graph, 1).unwrap_err(), overflow);
    }
}

#[test]
fn shapes_that_do_not_fit() {
    let (heads, graph) = (Heads::new(2, 8).unwrap(), Graph::window(4, 4));
    let mut stream = KeyStream::new(&heads, &graph, 1).unwrap();
    let x = [1.0; 8 * 16];
    let mat = |rows: usize, cols: usize| MatRef::contiguous(&x[..rows * cols], rows, cols).unwrap();
    let ends = [0, 5, 8];
    let mut out = Guarded::unset(8, 16);
    let mut run = |heads: &Heads, q: MatRef<'_>, ends: &[usize], rows: &KeyRows<'_>| {
        let (queries, none) = (QueryRows::new(q, ends), Terms::default());
        let error = stream.attend(Context::serial(), heads, &queries, rows, &graph, &none, out.view_mut());
        error.unwrap_err()
    };
    let size = |arg, expected, actual| Error::Size { arg, expected, actual };
    let (good, q) = (KeyRows::new(mat(8, 16), mat(8, 16), &ends), mat(8, 16));
    let other = Heads::new(1, 16).unwrap();
    assert_eq!(run(&other, q, &ends, &good), size("heads.n_kv_heads", 2, 1));
    assert_eq!(run(&heads, q, &ends, &KeyRows::new(mat(8, 15), mat(8, 16), &ends)), size("k.cols", 16, 15));
    assert_eq!(run(&heads, q, &ends, &KeyRows::new(mat(8, 16), mat(7, 16), &ends)), size("v.rows", 8, 7));
    assert_eq!(run(&heads, q, &ends, &KeyRows::new(mat(8, 16), mat(8, 15), &ends)), size("v.cols", 16, 15));
    let descending = Error::NotAscending { arg: "key offsets", at: 2 };
    assert_eq!(run(&heads, q, &ends, &KeyRows::new(mat(8, 16), mat(8, 16), &[0, 8, 5])), descending);
    assert_eq!(run(&heads, q, &[0, 8], &good), size("offsets.len() - 1", 2, 1));
    assert_eq!(run(&heads, mat(8, 15), &ends, &good), size("q.cols", 16, 15));
    assert_eq!(run(&heads, mat(7, 16), &[0, 5, 7], &good), size("out.rows", 7, 8));
    out.assert_unset();
}
