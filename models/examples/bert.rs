//! BERT: a sentence of 128 tokens to its hidden states and the pooled first one. Usual: bert-base-uncased.

mod common;

use laneformer_models::bert::Bert;
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512,
    }))?;
    let bert = common::timed("load", || Bert::load(&path, &config, &checkpoint))?;
    let (ctx, d) = (common::context(), bert.config.hidden_size);

    let (ids, positions) = common::tokens(128, bert.config.vocab_size);
    let batch = Batch {
        ids: &ids,
        type_ids: &[0; 128],
        positions: &positions,
        offsets: &[0, 128],
        ..Batch::default()
    };
    let hidden = common::timed("encode", || bert.forward(&mut Scratch::default().with(ctx), batch))?;
    common::show("hidden states", &hidden, d);
    if let Some(pooled) = bert.pool(ctx, &hidden, batch.offsets)? {
        common::show("pooled", &pooled, d);
    }
    Ok(())
}
