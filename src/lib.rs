//! Hand-tuned SIMD kernels for Transformer layers on CPUs, and one cache-blocked layer that is a single safe call.
//!
//! # Map
//!
//! | for | see |
//! |---|---|
//! | a whole layer, or many | [`Layer`], [`Stack`], [`SubLayer`], [`Placement`], [`Workspace`] |
//! | attention | [`attention()`], [`KeyStore`], [`KeyStream`], [`KvCache`], [`Graph`], [`Bits`], [`Terms`], [`Heads`], [`QkvProjection`], [`Rotary`] |
//! | products | [`Linear`], [`PackedMatrix`], [`Epilogue`], [`gemm::matmul`], [`Ffn`] |
//! | rows, in place or `_into` another matrix | [`softmax`], [`layernorm`], [`rmsnorm`], [`Affine`], [`elementwise`]; [`batchnorm_train`] |
//! | where it runs | [`Context`], [`Isa`], [`Executor`], [`AlignedBuffer`], [`peak`] |
//!
//! All sizes and strides are in elements. A batch is ragged: the tokens of all sequences packed one behind the other, and `offsets` that say
//! where each begins and where the last ends. Padding never enters.
//!
//! # Guarantees
//!
//! - **The same bits.** In f32 a token's result depends on its own sequence and the weights only: not on the number of threads, the batch around the
//!   sequence, the split of a sequence into calls with a cache, or the instruction set. [`Isa::PORTABLE`] is outside of this promise, and so are
//!   [`gemm::matmul`] and the payload of a NaN.
//! - **Bad input is an [`Error`]** that names the argument, what was expected and what came; nothing has been written then. No call panics on its input, prints,
//!   or reads the environment. Memory that the system does not have ends the process, as everywhere in Rust.
//! - **[`Layer::forward`] allocates nothing** (an executor may allocate one job per invited helper) and is one parallel region.
//! - The floating-point environment is the default one: denormals are neither flushed nor read as zero.
//!
//! # Special values
//!
//! | where | rule |
//! |---|---|
//! | a query without an allowed key, softmax of a row of `-inf` | 0 |
//! | softmax with `+inf` or NaN in an allowed place | a NaN row |
//! | NaN or infinity in keys or values behind the mask | does not reach the output |
//! | NaN in an allowed place | reaches the output |
//! | no rows, no columns | nothing to do; a model dimension of zero is an [`Error`] |
//!
//! # Accuracy
//!
//! Largest error found in sweeps over f32 against f64, checked by `tests/math.rs` and, for what is not public, in `src/math.rs`. Bounds here and of
//! the operations are those of instruction sets that [keep bits](Isa::keeps_bits); where a multiply-add rounds twice, errors are up to four times as large.
//!
//! | function | bound | range |
//! |---|---|---|
//! | exp | 0.91 ULP | all |
//! | exp of softmax and attention | 2.1 ULP, and 4.7 ULP below -10; 0 below -87.3365 | `x <= 0` |
//! | tanh | 2.5 ULP | all |
//! | erf | 3.5 ULP, 5 ULP below 8.4e-38 | all |
//! | gelu (erf), gelu (tanh) | `1.7e-7 max(1, abs x)`, 4e-7 where the result is below -5 | all |
//! | silu, quick-gelu | `2e-7 max(1, abs x)` | all |
//!
//! # Features
//!
//! `rayon` (default): [`Rayon`] and `rayon::ThreadPool` as executors.

#![deny(unsafe_code)]

mod activation;
mod attention;
mod batchnorm;
mod context;
mod error;
mod exec;
mod ffn;
pub mod gemm;
mod isa;
mod layer;
mod layernorm;
mod linear;
mod math;
mod norm;
pub mod peak;
mod reduce;
#[doc(hidden)]
pub mod reference;
mod residual;
mod rmsnorm;
mod rows;
mod simd;
mod softmax;
mod split;
mod view;
mod workspace;

pub use activation::{Activation, Function, elementwise, elementwise_into};
pub use attention::{
    Bias, Bits, Cover, Graph, Heads, KeyRows, KeyStore, KeyStream, KvCache, QkvProjection, QueryRows,
    Relative, RelativeTable, Rotary, RotaryPairs, SegmentTerm, Terms, Tile, attention,
};
pub use batchnorm::{Affine, BatchStats, batchnorm_train};
pub use context::Context;
pub use error::Error;
#[cfg(feature = "rayon")]
pub use exec::Rayon;
pub use exec::{Executor, Serial, Ticket};
pub use ffn::Ffn;
pub use gemm::PackedMatrix;
pub use isa::Isa;
pub use layer::{CrossAttention, Inputs, Layer, SelfAttention, Stack, SubLayer, Workspace};
pub use layernorm::{layernorm, layernorm_into};
pub use linear::{Epilogue, Linear};
pub use norm::{Norm, Placement};
pub use rmsnorm::{rmsnorm, rmsnorm_into};
pub use softmax::{softmax, softmax_into};
pub use view::{MatMut, MatRef};
pub use workspace::AlignedBuffer;

/// The README's example, compiled with the other examples.
#[cfg(all(doctest, feature = "rayon"))]
#[doc = include_str!("../README.md")]
struct Readme;
