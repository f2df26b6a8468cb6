//! BART: a text of 128 tokens is encoded, and the decoder writes about it through its key cache. Usual: bart-base.

mod common;

use laneformer_models::bart::Bart;
use laneformer_models::run::project;
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072, "max_position_embeddings": 1024,
    }))?;
    let bart = common::timed("load", || Bart::load(&path, &config, &checkpoint))?;
    let ctx = common::context();

    let (ids, positions) = common::tokens(128, bart.config.vocab_size);
    let text = Batch { ids: &ids, positions: &positions, offsets: &[0, 128], ..Batch::default() };
    let memory = common::timed("encode", || bart.encoder.encode(&mut Scratch::default().with(ctx), text))?;
    common::show("memory", &memory, bart.config.d_model);

    let mut decoding =
        common::timed("keys of the memory", || bart.decoder.layers.begin(ctx, &memory, text.offsets, 8))?;
    let (mut written, mut scratch) = (vec![bart.config.decoder_start_token_id], Scratch::default());
    for position in 0..8 {
        let batch = Batch {
            ids: &written[position..],
            positions: &[position as u32],
            offsets: &[0, 1],
            ..Batch::default()
        };
        let logits = common::timed("a token", || {
            let hidden = bart.decoder.decode(&mut scratch.with(ctx), batch, &mut decoding)?;
            project(ctx, &bart.head, &hidden)
        })?;
        written.push((0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32);
    }
    println!("tokens {written:?}");
    Ok(())
}
