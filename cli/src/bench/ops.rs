//! The operations as workloads.

use anyhow::Result;
use laneformer::{
    Context, Epilogue, Function, Graph, Heads, KeyRows, KeyStore, KeyStream, Linear, MatMut, MatRef,
    PackedMatrix, QueryRows, Terms, elementwise, layernorm, reference, softmax,
};

use crate::bench::check::{SAMPLE, compare, gather, linear, sample};
use crate::bench::data::Buffer;
use crate::bench::measure::{Deviation, Workload};

/// `y = x W^T` with packed weights.
pub struct Gemm {
    m: usize,
    x: Buffer,
    weight: Buffer,
    packed: Linear,
    y: Buffer,
}

impl Gemm {
    pub fn new(m: usize, n: usize, k: usize) -> Result<Gemm> {
        let weight = Buffer::uniform(n * k, (3.0 / k as f32).sqrt(), 1);
        let packed = PackedMatrix::from_out_in(MatRef::contiguous(&weight, n, k)?)?;
        let (x, y) = (Buffer::uniform(m * k, 1.0, 2), Buffer::filled(m * n, 0.0));
        Ok(Gemm { m, x, weight, packed: Linear::new(packed, None)?, y })
    }
}

impl Workload for Gemm {
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation> {
        self.run(ctx)?;
        let (k, rows) = (self.packed.in_features(), sample(self.m, SAMPLE));
        let want = linear(&gather(&self.x, k, &rows), &self.weight, None, k);
        Ok(compare(&gather(&self.y, self.packed.out_features(), &rows), &want, 1e-5))
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<()> {
        let x = MatRef::contiguous(&self.x, self.m, self.packed.in_features())?;
        let y = MatMut::contiguous(&mut self.y, self.m, self.packed.out_features())?;
        Ok(self.packed.forward(ctx, x, &Epilogue::NONE, y)?)
    }
}

/// An operation on rows, in place.
pub struct RowOp {
    kind: RowKind,
    cols: usize,
    source: Buffer,
    x: Buffer,
    gain: Buffer,
    bias: Buffer,
}

#[derive(Clone, Copy)]
pub enum RowKind {
    Softmax,
    LayerNorm,
    GeluErf,
    GeluTanh,
}

const EPS: f32 = 1e-5;

impl RowOp {
    pub fn new(kind: RowKind, rows: usize, cols: usize) -> RowOp {
        let source = Buffer::uniform(rows * cols, 4.0, 3);
        let (gain, bias) = (Buffer::uniform(cols, 1.0, 4), Buffer::uniform(cols, 1.0, 5));
        RowOp { kind, cols, x: Buffer::filled(rows * cols, 0.0), source, gain, bias }
    }

    fn reference(&self, x: &[f64]) -> Vec<f64> {
        let each = |f: fn(f64) -> f64| x.iter().map(|&x| f(x)).collect();
        match self.kind {
            RowKind::Softmax => reference::softmax(x, self.cols),
            RowKind::LayerNorm => {
                let (gain, bias) = (reference::to_f64(&self.gain), reference::to_f64(&self.bias));
                reference::layernorm(x, &gain, Some(&bias), EPS.into())
            }
            RowKind::GeluErf => each(reference::gelu_erf),
            RowKind::GeluTanh => each(reference::gelu_tanh),
        }
    }
}

impl Workload for RowOp {
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation> {
        self.reset();
        self.run(ctx)?;
        let rows = sample(self.x.len() / self.cols, SAMPLE);
        let want = self.reference(&gather(&self.source, self.cols, &rows));
        Ok(compare(&gather(&self.x, self.cols, &rows), &want, 2e-6))
    }

    fn reset(&mut self) {
        self.x.copy_from_slice(&self.source);
    }

    /// A gelu halves small values each time: sixteen times keep them far from denormals.
    fn runs_per_reset(&self) -> Option<usize> {
        Some(16)
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<()> {
        let rows = self.x.len() / self.cols;
        let x = MatMut::contiguous(&mut self.x, rows, self.cols)?;
        match self.kind {
            RowKind::Softmax => softmax(ctx, x)?,
            RowKind::LayerNorm => layernorm(ctx, x, &self.gain, Some(&self.bias), EPS)?,
            RowKind::GeluErf => elementwise(ctx, Function::GeluErf, x)?,
            RowKind::GeluTanh => elementwise(ctx, Function::GeluTanh, x)?,
        }
        Ok(())
    }
}

/// Attention of `batch` segments of `seq_len` tokens over themselves.
pub struct Attention {
    heads: Heads,
    graph: Graph,
    seq_len: usize,
    offsets: Vec<usize>,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    keys: Keys,
    out: Buffer,
}

/// Where a run finds keys and values by head. The memory is kept between runs, as an engine keeps it.
enum Keys {
    /// It stores all of them first.
    Stored(KeyStore),
    /// They are stored already, as a layer's projection leaves them: the check before the runs does that.
    StoredBefore(KeyStore),
    /// It stores them where it reads them.
    Streamed(KeyStream),
}

impl Attention {
    /// All segments see what `graph` lets the first see.
    pub fn new(
        n_heads: usize,
        head_dim: usize,
        batch: usize,
        seq_len: usize,
        graph: Graph,
    ) -> Result<Attention> {
        let heads = Heads::new(n_heads, head_dim)?;
        let len = batch * seq_len * heads.query_cols();
        let offsets = (0..=batch).map(|segment| segment * seq_len).collect();
        let [q, k, v] = [6, 7, 8].map(|seed| Buffer::uniform(len, 1.0, seed));
        let keys = Keys::Stored(KeyStore::new(&heads, batch * seq_len, batch)?);
        let out = Buffer::filled(len, 0.0);
        Ok(Attention { heads, graph, seq_len, offsets, q, k, v, keys, out })
    }

    /// The same over keys that are stored already.
    pub fn over_stored_keys(self) -> Attention {
        let keys = match self.keys {
            Keys::Stored(store) => Keys::StoredBefore(store),
            keys => keys,
        };
        Attention { keys, ..self }
    }

    /// The same over a stream of keys, for a graph of windows and so many threads.
    pub fn over_a_stream(self, members: usize) -> Result<Attention> {
        Ok(Attention { keys: Keys::Streamed(KeyStream::new(&self.heads, &self.graph, members)?), ..self })
    }

    /// Bytes of keys and values by head and of the scratch of `members` threads.
    pub fn workspace_bytes(&self, members: usize) -> Result<usize> {
        match &self.keys {
            Keys::Stored(store) | Keys::StoredBefore(store) => {
                Ok(store.bytes() + members * self.heads.scratch_bytes()?)
            }
            Keys::Streamed(stream) => Ok(stream.bytes()),
        }
    }
}

impl Workload for Attention {
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation> {
        let cols = self.heads.query_cols();
        let mat = |x| MatRef::contiguous(x, self.k.len() / cols, cols);
        if let Keys::StoredBefore(store) = &mut self.keys {
            store.set(ctx, mat(&self.k)?, mat(&self.v)?, &self.offsets)?;
        }
        self.run(ctx)?;
        let batch = self.offsets.len() - 1;
        let (mut got, mut want) = (vec![], vec![]);
        for (first, rows) in sample_segments(batch, self.seq_len) {
            let segment: Vec<usize> = (first..first + self.seq_len).collect();
            let [k, v] = [&self.k, &self.v].map(|x| gather(x, cols, &segment));
            let q = gather(&self.q, cols, &rows);
            // Once for all heads.
            let sees = |row: &usize| -> Vec<bool> {
                (0..self.seq_len).map(|key| self.graph.allows(row - first, key)).collect()
            };
            let sees: Vec<Vec<bool>> = rows.iter().map(sees).collect();
            want.extend(reference_attention(&self.heads, &q, &k, &v, |row, key| sees[row][key]));
            got.extend(gather(&self.out, cols, &rows));
        }
        Ok(compare(&got, &want, 1e-5))
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<()> {
        let Attention { heads, graph, offsets, q, k, v, keys, out, .. } = self;
        let (tokens, cols) = (q.len() / heads.query_cols(), heads.query_cols());
        let [q, k, v] = [q, k, v].map(|x| MatRef::contiguous(x, tokens, cols));
        let (queries, k, v) = (QueryRows::new(q?, offsets), k?, v?);
        let (terms, out) = (Terms::default(), MatMut::contiguous(out, tokens, cols)?);
        if let Keys::Stored(store) = keys {
            store.set(ctx, k, v, offsets)?;
        }
        match keys {
            Keys::Stored(store) | Keys::StoredBefore(store) => {
                store.attend(ctx, heads, &queries, graph, &terms, out)?;
            }
            Keys::Streamed(stream) => {
                let rows = KeyRows::new(k, v, offsets);
                stream.attend(ctx, heads, &queries, &rows, graph, &terms, out)?;
            }
        }
        Ok(())
    }
}

/// Rows to compare from as few segments as hold enough:
/// the first row of each segment, and the rows. What a row needs of its segment is most of the work of a check.
pub fn sample_segments(batch: usize, seq_len: usize) -> Vec<(usize, Vec<usize>)> {
    let segments = SAMPLE.div_ceil(seq_len).max(2).min(batch);
    sample(batch, segments)
        .into_iter()
        .map(|segment| {
            let first = segment * seq_len;
            let rows = sample(seq_len, SAMPLE.div_ceil(segments));
            (first, rows.into_iter().map(|row| first + row).collect())
        })
        .collect()
}

/// [`reference::attention`] where query `i` sees key `j` if `sees(i, j)`.
pub fn reference_attention(
    heads: &Heads,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    sees: impl Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let shape = reference::Attention {
        n_heads: heads.n_heads,
        n_kv_heads: heads.n_kv_heads,
        head_dim: heads.head_dim,
        value_dim: heads.value_dim,
        scale: heads.scale.into(),
        softcap: None,
    };
    reference::attention(q, k, v, &shape, |_, i, j| sees(i, j), |_, _, _| 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_rows_of_few_segments() {
        for (batch, seq_len, segments) in [(1, 16, 1), (1, 512, 1), (8, 128, 2), (8, 20, 4), (3, 5, 3)] {
            let sampled = sample_segments(batch, seq_len);
            let rows: usize = sampled.iter().map(|(_, rows)| rows.len()).sum();
            assert_eq!(sampled.len(), segments, "{batch} {seq_len}");
            assert!(rows >= SAMPLE.min(batch * seq_len), "{batch} {seq_len}");
            assert_eq!(sampled[segments - 1].1.last(), Some(&(batch * seq_len - 1)));
        }
    }

    #[test]
    fn every_operation_passes_and_a_wrong_one_does_not() -> Result<()> {
        let ctx = Context::serial();
        let kinds = [RowKind::Softmax, RowKind::LayerNorm, RowKind::GeluErf, RowKind::GeluTanh];
        let mut all: Vec<Box<dyn Workload>> =
            kinds.into_iter().map(|kind| Box::new(RowOp::new(kind, 70, 50)) as Box<dyn Workload>).collect();
        all.push(Box::new(Gemm::new(5, 70, 33)?));
        all.push(Box::new(Attention::new(2, 8, 3, 30, Graph::full())?));
        all.push(Box::new(Attention::new(2, 8, 1, 300, Graph::window(9, 5))?));
        all.push(Box::new(Attention::new(2, 8, 1, 300, Graph::window(9, 5))?.over_a_stream(2)?));
        for workload in &mut all {
            let Deviation { max_err, limit } = workload.check(ctx)?;
            assert!(max_err <= limit && limit > 0.0, "{max_err} {limit}");
        }
        let mut gemm = Gemm::new(5, 70, 33)?;
        gemm.weight[40] += 0.01;
        let Deviation { max_err, limit } = gemm.check(ctx)?;
        assert!(max_err > limit);
        Ok(())
    }
}
