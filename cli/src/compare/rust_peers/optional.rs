//! The Rust libraries of the feature `peers`.

use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor};
use rayon::ThreadPool;
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions, PackedBMatrix};
use rten_tensor::NdTensorView;

use crate::bench::data::Buffer;
use crate::compare::contest::Engine;
use crate::compare::ours::Operands;
use crate::compare::rust_peers::Shape;

fn pool(threads: usize) -> Result<ThreadPool> {
    Ok(rayon::ThreadPoolBuilder::new().num_threads(threads).build()?)
}

/// On the crate `gemm`, which packs the weight in every call.
pub struct Candle {
    pool: ThreadPool,
    x: Tensor,
    /// A transposed view, as candle's own linear layer multiplies.
    weight: Tensor,
    y: Vec<f32>,
}

impl Candle {
    pub fn new([m, n, k]: Shape, operands: &Operands<'_>, threads: usize) -> Result<Self> {
        let x = Tensor::from_slice(operands.get("x")?, (m, k), &Device::Cpu)?;
        let weight = Tensor::from_slice(operands.get("weight")?, (n, k), &Device::Cpu)?.t()?;
        let mut candle = Candle { pool: pool(threads)?, x, weight, y: vec![] };
        // The result is a new tensor each time; the first is what is compared.
        candle.y = candle.x.matmul(&candle.weight)?.flatten_all()?.to_vec1()?;
        Ok(candle)
    }
}

impl Engine for Candle {
    fn run(&mut self) -> Result<()> {
        let Candle { pool, x, weight, .. } = self;
        pool.install(|| x.matmul(weight))?;
        Ok(())
    }

    fn output(&self) -> &[f32] {
        &self.y
    }
}

/// With its weight packed before.
pub struct Rten {
    shape: Shape,
    pool: ThreadPool,
    executor: GemmExecutor,
    x: Vec<f32>,
    weight: PackedBMatrix<f32>,
    y: Buffer,
}

impl Rten {
    pub fn new(shape: Shape, operands: &Operands<'_>, threads: usize) -> Result<Self> {
        let [m, n, k] = shape;
        let executor = GemmExecutor::new();
        let weight = operands.get("weight")?;
        let weight = NdTensorView::from_data([n, k], weight);
        let weight = executor.prepack_b(weight.transposed());
        let x = operands.get("x")?.to_vec();
        Ok(Rten { shape, pool: pool(threads)?, executor, x, weight, y: Buffer::filled(m * n, 0.0) })
    }
}

impl Engine for Rten {
    fn run(&mut self) -> Result<()> {
        let [m, _, k] = self.shape;
        let Rten { pool, executor, x, weight, y, .. } = self;
        let product = || {
            let a = GemmInputA::Unpacked(NdTensorView::from_data([m, k], x.as_slice()));
            executor.gemm(y, a, GemmInputB::Packed(weight), GemmOptions::default())
        };
        pool.install(product).map_err(|error| anyhow!("{error:?}"))
    }

    fn output(&self) -> &[f32] {
        &self.y
    }
}
