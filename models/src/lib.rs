//! Transformer models built from laneformer layers.
//!
//! A model here is its embeddings, a [`laneformer::Stack`] of layers and a head: no model has a layer, an attention loop
//! or a loader of its own. Batches are ragged: the tokens of all sequences are packed one behind the other, and padding
//! is left out before the first layer ([`ragged`]).
//!
//! - [`checkpoint`] and [`weights`]: a memory-mapped safetensors file, and the parts of a layer read from it.
//! - [`config`]: `config::open(dir, Bert::load)` loads a model from the `config.json` and the `model.safetensors` of a directory.
//!   `load` knows what a configuration may leave out; the fields alone have no defaults.
//! - [`embedding`], [`encoder`], [`head`]: what stands before the layers, stacks by the names of their tensors, and what stands behind them.
//! - [`memory`]: relative positions, and the rows that a model remembers.
//! - [`run`] and [`ragged`]: a context with its scratch, and padded batches as packed ones.
//! - [`vanilla`], [`bert`], [`bart`], [`gpt`], [`longformer`], [`transformer_xl`], [`xlnet`], [`videobert`],
//!   [`clip`], [`detr`], [`lavit`], [`fusion`]: the models.
//!
//! # Errors
//! Loading and running do not panic on bad input. Loading fails with the file and what of it is missing or disagrees: the tensor and both
//! shapes or types, or the field, what would have worked, and its value. Running fails with the table and the index of a token
//! outside of it, or with what the library says of sizes that do not fit one another. Functions name only what they add to this.

#![deny(unsafe_code)]

pub mod bart;
pub mod bert;
pub mod checkpoint;
pub mod clip;
pub mod config;
pub mod conv;
pub mod detr;
pub mod embedding;
pub mod encoder;
pub mod error;
pub mod fusion;
pub mod gpt;
pub mod head;
pub mod lavit;
pub mod longformer;
pub mod memory;
pub mod ragged;
pub mod resnet;
pub mod run;
pub mod transformer_xl;
pub mod vanilla;
pub mod videobert;
pub mod weights;
pub mod xlnet;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use ragged::Batch;
pub use run::{Run, Scratch};
pub use weights::Weights;
