//! GPT-2: a prompt of 64 tokens through the key cache, then one token after another. Usual: gpt2.

mod common;

use laneformer_models::encoder::Decoding;
use laneformer_models::gpt::Gpt;
use laneformer_models::run::project;
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    }))?;
    let gpt = common::timed("load", || Gpt::load(&path, &config, &checkpoint))?;
    let (ctx, d) = (common::context(), gpt.config.n_embd);

    let (mut ids, mut positions) = common::tokens(64, gpt.config.vocab_size);
    let (caches, mut scratch) = (gpt.decoder.layers.caches(1, 64 + 8)?, Scratch::default());
    let mut state = Decoding { caches, ..Decoding::default() };
    let mut written = vec![];
    while written.len() < 8 {
        let batch = Batch { ids: &ids, positions: &positions, offsets: &[0, ids.len()], ..Batch::default() };
        let logits = common::timed(&format!("{} tokens", ids.len()), || {
            let hidden = gpt.decoder.decode(&mut scratch.with(ctx), batch, &mut state)?;
            project(ctx, &gpt.head, &hidden[hidden.len() - d..])
        })?;
        let next = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32;
        written.push(next);
        (ids, positions) = (vec![next], vec![63 + written.len() as u32]);
    }
    println!("tokens {written:?}");
    Ok(())
}
