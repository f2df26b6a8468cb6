//! Terms of the scores with tiles of many rows: against f64, and row by row.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, slack};
use common::data::Rng;
use common::model::reference_heads;
use common::{on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{
    Bias, Bits, Context, Graph, Heads, KeyStore, MatRef, QueryRows, Relative, RelativeTable, SegmentTerm,
    Terms,
};

/// Two heads of 8.
const COLS: usize = 16;
const QUERIES: usize = 130;
/// Distances from -30 to 269.
const FIRST: isize = -30;
const DISTANCES: usize = 300;
/// Keys before and after a query that it sees.
const WINDOW: (usize, usize) = (190, 40);

fn view(x: &[f32]) -> MatRef<'_> {
    MatRef::contiguous(x, x.len() / COLS, COLS).unwrap()
}

/// Whether query `i` has a key of `j` taken away by its bias.
fn is_barred(h: usize, i: usize, j: usize) -> bool {
    (h + 3 * i + 7 * j).is_multiple_of(11)
}

fn are_of_one_segment(i: usize, j: usize) -> bool {
    i / 50 == j / 90
}

on_every_isa! {
    fn every_term_at_every_place(isa) {
        let heads = Heads::new(2, 8).unwrap();
        let mut rng = Rng::new(5);
        let [u, w, s] = std::array::from_fn(|_| rng.vec(COLS, 1.0));
        let (positions, e) = (rng.vec(DISTANCES * COLS, 1.0), rng.vec(2 * COLS, 1.0));
        let table = RelativeTable::new(view(&positions), FIRST, 2).unwrap();
        // The first query before all keys, at any place of a panel, and so late that the last ones stand behind all keys.
        for (keys, first) in [(330, -40_isize), (330, 0), (530, 1), (530, 63), (530, 200), (530, 399), (100, 90)] {
            let [q, k, v] = [QUERIES, keys, keys].map(|rows| rng.vec(rows * COLS, 1.0));
            let bias: Vec<f32> = (0..2 * QUERIES * keys)
                .map(|at| {
                    let (h, i, j) = (at / keys / QUERIES, at / keys % QUERIES, at % keys);
                    if is_barred(h, i, j) { f32::NEG_INFINITY } else { rng.uniform(1.0) }
                })
                .collect();
            let same = Bits::dense([1, 1, QUERIES, keys], |_, _, i, j| are_of_one_segment(i, j)).unwrap();
            let terms = Terms {
                bias: Some(Bias::new(&bias, [1, 2, QUERIES, keys]).unwrap()),
                relative: Some(Relative { u: &u, w: &w, table: &table }),
                segment: Some(SegmentTerm { s: &s, e: &e, same: &same }),
            };
            let graph = Graph::window(WINDOW.0, WINDOW.1);
            let mut store = KeyStore::new(&heads, keys, 1).unwrap();
            store.set(Context::serial(), view(&k), view(&v), &[0, keys]).unwrap();
            let run = |queries: &QueryRows<'_>| {
                let mut out = Guarded::unset(QUERIES, COLS);
                store.attend(serial(isa), &heads, queries, &graph, &terms, out.view_mut()).unwrap();
                out.values()
            };
            let (offsets, what) = ([0, QUERIES], format!("{keys} keys, first query at {first}"));
            let (first_of, each): ([_; 1], Vec<_>) = ([first], (0..QUERIES as isize).map(|i| first + i).collect());
            let queries = QueryRows::new(view(&q), &offsets);
            let actual = run(&queries.starting_at(&first_of));

            let [q, k, v, u, w, s, e, positions] =
                [&q, &k, &v, &u, &w, &s, &e, &positions].map(|x| r::to_f64(x));
            let distance = |i: usize, j: usize| first + i as isize - j as isize;
            let sees = |h: usize, i: usize, j: usize| {
                let seen = -(WINDOW.1 as isize)..=WINDOW.0 as isize;
                seen.contains(&distance(i, j)) && !is_barred(h, i, j)
            };
            let term = |h: usize, i: usize, j: usize| {
                let sum = |f: &dyn Fn(usize, usize) -> f64| (0..8).map(|d| f(i * COLS + h * 8 + d, h * 8 + d)).sum::<f64>();
                let content = sum(&|_, d| u[d] * k[j * COLS + d]);
                let row = usize::try_from(distance(i, j) - FIRST).ok().filter(|&row| row < DISTANCES);
                let place = row.map_or(0.0, |row| sum(&|at, d| (q[at] + w[d]) * positions[row * COLS + d]));
                let of = if are_of_one_segment(i, j) { 0 } else { COLS };
                let segment = sum(&|at, d| (q[at] + s[d]) * e[of + d]);
                f64::from(heads.scale) * (content + place + segment) + f64::from(bias[(h * QUERIES + i) * keys + j])
            };
            let shape = reference_heads(&heads);
            let expected = r::attention(&q, &k, &v, &shape, sees, term);
            assert_close(&actual, &expected, 4e-6 * slack(isa), &what);
            // A row alone is what it is in a tile.
            assert_bits(&run(&queries.at(&each)), &actual, &what);
        }
    }
}
