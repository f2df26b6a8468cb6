//! The Transformer of "Attention Is All You Need": a sentence of 64 tokens, and the logits of a translation of 64. Usual:
//! the base model.

mod common;

use laneformer::{Graph, Inputs};
use laneformer_models::run::project;
use laneformer_models::vanilla::{Config, Vanilla};
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "d_model": 512, "nhead": 8, "dim_feedforward": 2048, "num_encoder_layers": 6, "num_decoder_layers": 6,
        "activation": "relu", "norm_first": false, "final_norm": false, "layer_norm_eps": 1e-5,
        "vocab_size": 37000, "sinusoid": "interleaved",
    }))?;
    let config: Config = serde_json::from_value(config)?;
    let model = common::timed("load", || Vanilla::load(&path, &config, &checkpoint))?;
    let (Some(source), Some((target, head)), Some(decoder)) = (&model.source, &model.target, &model.decoder)
    else {
        anyhow::bail!("{}: no vocabulary or no decoder", path.display());
    };
    let (ctx, offsets) = (common::context(), [0, 64]);

    let (ids, positions) = common::tokens(64, config.vocab_size);
    let batch = Batch { ids: &ids, positions: &positions, offsets: &offsets, ..Batch::default() };
    let mut memory = source.forward(ctx, batch)?;
    common::timed("encode", || {
        model.encoder.encode(&mut Scratch::default().with(ctx), &mut memory, &offsets)
    })?;
    common::show("memory", &memory, config.d_model);

    let mut x = target.forward(ctx, batch)?;
    let logits = common::timed("decode", || {
        let mut scratch = Scratch::default();
        let run = &mut scratch.with(ctx);
        let (sources, graph) = (decoder.sources(run, &memory, &offsets)?, Graph::causal());
        let mut inputs = Inputs { sources: &sources, ..Inputs::new(&offsets, &graph) };
        decoder.forward(run, &mut x, &mut inputs)?;
        project(ctx, head, &x)
    })?;
    common::show("logits", &logits, config.vocab_size);
    Ok(())
}
