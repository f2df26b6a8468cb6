//! Encoder stacks in every placement (post, pre, sandwich, DeepNorm) of every norm (LayerNorm, RMSNorm, BatchNorm).

use std::path::Path;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::encoder::{Config, ENCODER, Layers};
use crate::weights::Weights;

/// Packs the weights of the stack; `config_path` is for messages.
pub fn load(config_path: &Path, config: &Config, checkpoint: &Checkpoint) -> Result<Layers> {
    let spec = config.layers(config_path)?;
    spec.stack(&Weights::new(checkpoint, ""), ENCODER, config.num_layers, config.final_norm)
}
