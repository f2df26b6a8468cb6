//! Transformer-XL: segments of 128 tokens, of which each sees the memory of those before it. Usual: the base model for enwik8.

mod common;

use laneformer_models::Scratch;
use laneformer_models::run::project;
use laneformer_models::transformer_xl::TransformerXl;
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 204, "d_model": 512, "n_head": 8, "d_head": 64, "d_inner": 2048, "n_layer": 12, "mem_len": 512,
    }))?;
    let model = common::timed("load", || TransformerXl::load(&path, &config, &checkpoint))?;
    let ctx = common::context();

    let (ids, _) = common::tokens(5 * 128, model.config.vocab_size);
    let (mut memory, mut scratch) = (model.memory(1), Scratch::default());
    for (i, segment) in ids.chunks(128).enumerate() {
        let hidden = common::timed(&format!("segment {i}"), || {
            model.forward(&mut scratch.with(ctx), segment, &mut memory)
        })?;
        common::show("logits", &project(ctx, &model.head, &hidden)?, model.config.vocab_size);
    }
    Ok(())
}
