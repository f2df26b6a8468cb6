#![no_main]
//! Caches whose sequences grow, shrink, begin anew and are copied in any order, refused calls among them: what they give is what a store of the
//! same keys gives, in bits.

use arbitrary::Arbitrary;
use laneformer::{Context, Graph, Heads, Isa, KeyStore, KvCache, MatRef, QueryRows, Serial, Terms};
use laneformer_fuzz::data::Rng;
use laneformer_fuzz::model::offsets;
use laneformer_fuzz::{assert_same, guarded};
use libfuzzer_sys::fuzz_target;

const SEQUENCES: usize = 3;

#[derive(Arbitrary, Debug)]
enum Step {
    Append(u8, u16),
    /// To every sequence.
    AppendBatch([u16; SEQUENCES]),
    Truncate(u8, u16),
    Copy(u8, u8),
}

/// Keys and values of a sequence.
type Tokens = (Vec<f32>, Vec<f32>);

fuzz_target!(|input: (u64, [u8; 3], u16, bool, Vec<Step>)| {
    let (seed, [kv_heads, dim, value_dim], size, is_ring, steps) = input;
    let mut rng = Rng::new(seed);
    let n_kv = usize::from(kv_heads % 2) + 1;
    let heads = Heads::new(2 * n_kv, usize::from(dim % 20) + 1).unwrap().with_kv_heads(n_kv).unwrap();
    let heads = heads.with_value_dim(usize::from(value_dim % 20) + 1).unwrap();
    let (k_cols, v_cols) = (heads.key_cols(), heads.value_cols());
    let size = usize::from(size % 600) + 1;
    let mut cache =
        if is_ring { KvCache::ring(&heads, SEQUENCES, size) } else { KvCache::new(&heads, SEQUENCES, size) }
            .unwrap();
    let graph = if is_ring { Graph::window(size - 1, 0) } else { Graph::causal() };
    let mut tokens: [Tokens; SEQUENCES] = Default::default();

    for step in steps.iter().take(12) {
        let lens: [usize; SEQUENCES] = std::array::from_fn(|s| tokens[s].0.len() / k_cols);
        let room = |s: usize| if is_ring { 256 } else { size - lens[s] };
        (0..SEQUENCES).for_each(|s| assert_eq!(cache.room(s), room(s)));
        let added: [usize; SEQUENCES] = match *step {
            Step::Append(s, n) => {
                let (s, n) = (usize::from(s % 4), usize::from(n % 300));
                let (k, v) = (rng.vec(n * k_cols, 1.0), rng.vec(n * v_cols, 1.0));
                let appended = cache.append(s, view(&k, n, k_cols), view(&v, n, v_cols));
                let is_fine = s < SEQUENCES && n <= room(s);
                assert_eq!(appended.is_ok(), is_fine, "{appended:?}");
                if is_fine {
                    tokens[s].0.extend(k);
                    tokens[s].1.extend(v);
                }
                std::array::from_fn(|of| if of == s && is_fine { n } else { 0 })
            }
            Step::AppendBatch(added) => {
                let added = added.map(|n| usize::from(n % 280));
                let (ends, total) = (offsets(&added), added.iter().sum::<usize>());
                let (k, v) = (rng.vec(total * k_cols, 1.0), rng.vec(total * v_cols, 1.0));
                let appended = cache.append_batch(view(&k, total, k_cols), view(&v, total, v_cols), &ends);
                let is_fine = (0..SEQUENCES).all(|s| added[s] <= room(s));
                assert_eq!(appended.is_ok(), is_fine, "{appended:?}");
                if is_fine {
                    for (s, (keys, values)) in tokens.iter_mut().enumerate() {
                        keys.extend(&k[ends[s] * k_cols..ends[s + 1] * k_cols]);
                        values.extend(&v[ends[s] * v_cols..ends[s + 1] * v_cols]);
                    }
                }
                added.map(|n| if is_fine { n } else { 0 })
            }
            Step::Truncate(s, len) => {
                let (s, len) = (usize::from(s % 4), usize::from(len) % (size + 2));
                let is_fine = s < SEQUENCES && len <= lens[s] && (!is_ring || len == 0 || len == lens[s]);
                assert_eq!(cache.truncate(s, len).is_ok(), is_fine);
                if is_fine {
                    tokens[s].0.truncate(len * k_cols);
                    tokens[s].1.truncate(len * v_cols);
                }
                [0; SEQUENCES]
            }
            Step::Copy(from, to) => {
                let (from, to) = (usize::from(from % 4), usize::from(to % 4));
                let is_fine = from.max(to) < SEQUENCES;
                assert_eq!(cache.copy(from, to).is_ok(), is_fine);
                if is_fine {
                    tokens[to] = tokens[from].clone();
                }
                [0; SEQUENCES]
            }
        };

        // The new tokens ask, or one of each sequence.
        let lens: [usize; SEQUENCES] = std::array::from_fn(|s| tokens[s].0.len() / k_cols);
        assert_eq!(std::array::from_fn(|s| cache.len(s)), lens);
        let asking: [usize; SEQUENCES] = std::array::from_fn(|s| added[s].max(1).min(lens[s]));
        let (ends, rows) = (offsets(&asking), asking.iter().sum::<usize>());
        let q = rng.vec(rows * heads.query_cols(), 1.0);
        let queries = QueryRows::new(view(&q, rows, heads.query_cols()), &ends);
        let (k, v) =
            (tokens.each_ref().map(|t| &t.0[..]).concat(), tokens.each_ref().map(|t| &t.1[..]).concat());
        let (key_ends, total) = (offsets(&lens), lens.iter().sum::<usize>());
        let mut store = KeyStore::new(&heads, total, SEQUENCES).unwrap();
        store.set(Context::serial(), view(&k, total, k_cols), view(&v, total, v_cols), &key_ends).unwrap();
        let attend = |keys: &KeyStore, isa: Isa| {
            let mut out = guarded(rows, heads.output_cols(), 3, &vec![9.0; rows * heads.output_cols()]);
            let ctx = Context::new(isa, &Serial);
            keys.attend(ctx, &heads, &queries, &graph, &Terms::default(), out.view_mut()).unwrap();
            out.values()
        };
        for isa in Isa::available() {
            assert_same(&attend(cache.keys(), isa), &attend(&store, isa), isa.name());
        }
    }
});

fn view(x: &[f32], rows: usize, cols: usize) -> MatRef<'_> {
    MatRef::contiguous(x, rows, cols).unwrap()
}
