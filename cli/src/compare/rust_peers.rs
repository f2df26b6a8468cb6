//! Products by other Rust libraries; all but the one that laneformer itself depends on are behind the feature `peers`.

#[cfg(feature = "peers")]
mod optional;

use std::iter;

#[cfg(not(feature = "peers"))]
use anyhow::bail;
use anyhow::{Result, ensure};
use laneformer::gemm::{Strided, StridedMut, matmul};

use crate::bench::data::Buffer;
use crate::compare::contest::{Contestant, Engine};
use crate::compare::ours::Operands;
use crate::compare::task::{Spec, Task, Tensor};

/// All of them, on `threads` threads.
pub fn start(threads: usize) -> Vec<Contestant<'static>> {
    let matrixmultiply = native("matrixmultiply 0.3".to_owned(), move |shape, operands| {
        // It reads its number of threads from the environment, once.
        ensure!(threads == 1, "one thread only");
        Ok(Box::new(Matrixmultiply::new(shape, operands)?))
    });
    #[cfg(not(feature = "peers"))]
    let others = ["candle", "rten-gemm"]
        .map(|name| native(name.to_owned(), |_, _| bail!("built without feature `peers`")));
    #[cfg(feature = "peers")]
    let others = [
        native("candle 0.11".to_owned(), move |shape, operands| {
            Ok(Box::new(optional::Candle::new(shape, operands, threads)?))
        }),
        native("rten-gemm 0.27".to_owned(), move |shape, operands| {
            Ok(Box::new(optional::Rten::new(shape, operands, threads)?))
        }),
    ];
    iter::once(matrixmultiply).chain(others).collect()
}

/// Rows, columns and depth of a product.
pub type Shape = [usize; 3];

fn native(
    name: String,
    make: impl Fn(Shape, &Operands<'_>) -> Result<Box<dyn Engine>> + 'static,
) -> Contestant<'static> {
    let make = Box::new(move |task: &Task, tensors: &[Tensor]| match task.spec {
        Spec::Gemm { m, n, k } => make([m, n, k], &Operands(tensors)).map(Some),
        _ => Ok(None),
    });
    Contestant::Native { name, make }
}

/// It packs the weight in every call: it has no other way.
struct Matrixmultiply {
    shape: Shape,
    x: Vec<f32>,
    weight: Vec<f32>,
    y: Buffer,
}

impl Matrixmultiply {
    fn new(shape: Shape, operands: &Operands<'_>) -> Result<Self> {
        let (x, weight) = (operands.get("x")?.to_vec(), operands.get("weight")?.to_vec());
        Ok(Matrixmultiply { shape, x, weight, y: Buffer::filled(shape[0] * shape[1], 0.0) })
    }
}

impl Engine for Matrixmultiply {
    fn run(&mut self) -> Result<()> {
        let [m, n, k] = self.shape;
        let (a, b) = (Strided::new(&self.x, m, k, k, 1)?, Strided::new(&self.weight, k, n, 1, k)?);
        Ok(matmul(a, b, StridedMut::new(&mut self.y, m, n, n, 1)?)?)
    }

    fn output(&self) -> &[f32] {
        &self.y
    }
}
