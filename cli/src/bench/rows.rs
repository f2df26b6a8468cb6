//! The rows of the harness: names, shapes, and what a run costs.

use anyhow::Result;
use laneformer::Graph;
use serde::Serialize;

use crate::bench::layer::{BERT_BASE, Dims, EncoderLayer, MINILM};
use crate::bench::measure::Workload;
use crate::bench::ops::{Attention, Gemm, RowKind, RowOp};

/// A row: its operands are made when it is its turn.
pub struct Row {
    /// `operation/type/shape`.
    pub name: String,
    pub cost: Cost,
    pub kind: Kind,
}

/// What a run must do at least.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Of the products, two for each multiply-add. For elementwise operations, one for each operation of the formula, be it an addition or
    /// an exponential: a convention, which therefore does not choose the bound.
    pub flops: u64,
    /// Size of the operands, each counted once.
    pub bytes: usize,
    /// Elements of an elementwise operation.
    pub elements: Option<usize>,
}

/// Which roof a row stands under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// The multiply-adds.
    Fma,
    /// Reading the operands once.
    Read,
}

impl Cost {
    /// The roof that is lower, of GFLOP/s of multiply-adds and GB/s of reads.
    pub fn bound(&self, peak_gflops: f64, peak_gbps: f64) -> Bound {
        let reads_longer = self.bytes as f64 / peak_gbps > self.flops as f64 / peak_gflops;
        if self.elements.is_some() || reads_longer { Bound::Read } else { Bound::Fma }
    }
}

#[derive(Clone, Copy)]
pub enum Kind {
    Layer { dims: Dims, batch: usize, seq_len: usize },
    Gemm { m: usize, n: usize, k: usize },
    Attention { dims: Dims, batch: usize, seq_len: usize },
    Rows { kind: RowKind, rows: usize, cols: usize },
}

impl Row {
    fn new(name: String, flops: u64, floats: usize, elements: Option<usize>, kind: Kind) -> Row {
        Row { name, cost: Cost { flops, bytes: floats * size_of::<f32>(), elements }, kind }
    }

    fn layer(dims: Dims, batch: usize, seq_len: usize) -> Row {
        let name = format!("layer/f32/{}/b{batch}s{seq_len}", dims.name);
        let floats = dims.parameters() + batch * seq_len * dims.d_model;
        Row::new(name, dims.flops(batch, seq_len), floats, None, Kind::Layer { dims, batch, seq_len })
    }

    fn gemm(m: usize, n: usize, k: usize) -> Row {
        let flops = 2 * (m * n * k) as u64;
        let floats = m * k + n * k + m * n;
        Row::new(format!("gemm/f32/m{m}n{n}k{k}"), flops, floats, None, Kind::Gemm { m, n, k })
    }

    fn attention(dims: Dims, batch: usize, seq_len: usize) -> Row {
        let name = format!("attention/f32/{}/b{batch}s{seq_len}", dims.name);
        let flops = 4 * (batch * seq_len * seq_len * dims.d_model) as u64;
        let floats = 4 * batch * seq_len * dims.d_model;
        Row::new(name, flops, floats, None, Kind::Attention { dims, batch, seq_len })
    }

    fn rows(kind: RowKind, rows: usize, cols: usize) -> Row {
        let (name, flops_per_element, weights) = match kind {
            RowKind::Softmax => ("softmax", 5, 0),
            RowKind::LayerNorm => ("layernorm", 8, 2 * cols),
            RowKind::GeluErf => ("gelu_erf", 4, 0),
            RowKind::GeluTanh => ("gelu_tanh", 8, 0),
        };
        let elements = rows * cols;
        let name = format!("{name}/f32/{rows}x{cols}");
        let flops = (elements * flops_per_element) as u64;
        Row::new(name, flops, elements + weights, Some(elements), Kind::Rows { kind, rows, cols })
    }

    /// Makes the operands.
    pub fn workload(&self, members: usize) -> Result<Box<dyn Workload>> {
        Ok(match self.kind {
            Kind::Layer { dims, batch, seq_len } => {
                Box::new(EncoderLayer::new(dims, batch, seq_len, members)?)
            }
            Kind::Gemm { m, n, k } => Box::new(Gemm::new(m, n, k)?),
            Kind::Attention { dims, batch, seq_len } => {
                let head_dim = dims.d_model / dims.n_heads;
                Box::new(Attention::new(dims.n_heads, head_dim, batch, seq_len, Graph::full())?)
            }
            Kind::Rows { kind, rows, cols } => Box::new(RowOp::new(kind, rows, cols)),
        })
    }
}

/// The default rows. Those of elementwise operations are 768 KiB in place: in the L2 of a current core.
pub fn all() -> Vec<Row> {
    let mut rows = vec![];
    for dims in [BERT_BASE, MINILM] {
        for (batch, seq_len) in [(1, 16), (1, 128), (8, 128), (1, 512)] {
            rows.push(Row::layer(dims, batch, seq_len));
        }
    }
    let d = BERT_BASE.d_model;
    for m in [1, 8, 16, 128, 1024] {
        for (n, k) in [(d, d), (3 * d, d), (BERT_BASE.d_ff, d), (d, BERT_BASE.d_ff)] {
            rows.push(Row::gemm(m, n, k));
        }
    }
    for (batch, seq_len) in [(8, 128), (1, 512), (1, 2048)] {
        rows.push(Row::attention(BERT_BASE, batch, seq_len));
    }
    for (kind, shapes) in [
        (RowKind::Softmax, [(1536, 128), (384, 512)]),
        (RowKind::LayerNorm, [(256, 768), (512, 384)]),
        (RowKind::GeluErf, [(64, 3072), (128, 1536)]),
        (RowKind::GeluTanh, [(64, 3072), (128, 1536)]),
    ] {
        rows.extend(shapes.map(|(n, cols)| Row::rows(kind, n, cols)));
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_costs_are_counted() {
        let rows = all();
        let names: HashSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names.len(), rows.len());
        let cost = |name: &str| rows.iter().find(|row| row.name == name).map(|row| row.cost);
        let gemm = cost("gemm/f32/m1n3072k768").expect("a row");
        assert_eq!((gemm.flops, gemm.bytes), (4_718_592, 4 * (768 + 3072 * 768 + 3072)));
        let softmax = cost("softmax/f32/1536x128").expect("a row");
        assert_eq!((softmax.elements, softmax.bytes), (Some(196_608), 786_432));
        assert_eq!(cost("layer/f32/bert-base/b8s128").map(|c| c.flops), Some(14_898_167_808));
    }
}
