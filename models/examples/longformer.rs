//! Longformer: a document of 4096 tokens, the first of which is global. Usual: longformer-base-4096.

mod common;

use laneformer_models::longformer::Longformer;
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 4098, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        "attention_window": 512,
    }))?;
    let longformer = common::timed("load", || Longformer::load(&path, &config, &checkpoint))?;

    let n = longformer.max_tokens();
    let (ids, _) = common::tokens(n, longformer.config.vocab_size);
    let (positions, type_ids) = (longformer.positions(&ids), vec![0; n]);
    let batch =
        Batch { ids: &ids, type_ids: &type_ids, positions: &positions, offsets: &[0, n], ..Batch::default() };
    let mut is_global = vec![false; n];
    is_global[0] = true;
    let hidden = common::timed("encode", || {
        longformer.forward(&mut Scratch::default().with(common::context()), batch, &is_global)
    })?;
    common::show("hidden states", &hidden, longformer.config.hidden_size);
    Ok(())
}
