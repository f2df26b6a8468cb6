//! VideoBERT: 32 words and 64 clips of a video, of which each becomes the nearest of the centroids. Usual: the paper's, of the
//! size of BERT-large.

mod common;

use laneformer_models::run::project;
use laneformer_models::videobert::VideoBert;
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "max_position_embeddings": 512,
        "num_centroids": 20736, "video_feature_dim": 1024, "sep_token_id": 102, "mask_token_id": 103,
    }))?;
    let model = common::timed("load", || VideoBert::load(&path, &config, &checkpoint))?;
    let (ctx, config, bert) = (common::context(), &model.config, &model.bert.config);

    let (text, _) = common::tokens(32, bert.vocab_size);
    let clips = common::features(64, config.video_feature_dim)?;
    let video_ids = common::timed("nearest centroids", || model.video_ids(ctx, &clips))?;
    println!("centroids of the first clips {:?}", &video_ids[..4]);
    let (ids, type_ids) = model.joint_sequence(&text, &video_ids, &[false; 64])?;
    let positions: Vec<_> = (0..ids.len() as u32).collect();
    let batch = Batch {
        ids: &ids,
        type_ids: &type_ids,
        positions: &positions,
        offsets: &[0, ids.len()],
        ..Batch::default()
    };
    let hidden = common::timed("encode", || model.bert.forward(&mut Scratch::default().with(ctx), batch))?;
    common::show("logits", &model.logits(ctx, &hidden)?, bert.vocab_size + config.num_centroids);
    if let Some(pooled) = model.bert.pool(ctx, &hidden, batch.offsets)? {
        common::show("alignment", &project(ctx, &model.alignment, &pooled)?, 2);
    }
    Ok(())
}
