//! XLNet: 512 tokens with a second stream that predicts 85 of them. Usual: xlnet-base-cased.

mod common;

use laneformer_models::Scratch;
use laneformer_models::run::project;
use laneformer_models::xlnet::{Batch, XlNet};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 32000, "d_model": 768, "n_head": 12, "d_inner": 3072, "n_layer": 12,
    }))?;
    let model = common::timed("load", || XlNet::load(&path, &config, &checkpoint))?;
    let ctx = common::context();

    let (ids, _) = common::tokens(512, model.config.vocab_size);
    let targets: Vec<_> = (0..85).map(|i| 6 * i).collect();
    // Nobody sees the targets.
    let is_hidden: Vec<_> = (0..512 * 512).map(|i| targets.contains(&(i % 512))).collect();
    let batch = Batch {
        sequences: 1,
        ids: &ids,
        segments: Some(&[0; 512]),
        is_hidden: Some(&is_hidden),
        targets: Some(&targets),
        ..Batch::default()
    };
    let mut scratch = Scratch::default();
    let run = &mut scratch.with(ctx);
    let positions = common::timed("positions", || model.positions(run, 512, 0))?;
    let output = common::timed("both streams", || model.forward(run, &batch, &positions))?;
    common::show("content", &output.content, model.config.d_model);
    let logits = project(ctx, &model.head, &output.queries.unwrap_or_default())?;
    common::show("logits of the targets", &logits, model.config.vocab_size);
    Ok(())
}
