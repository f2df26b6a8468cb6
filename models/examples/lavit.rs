//! Pano-AVQA's LAViT: a question of 20 words about 36 objects and the stereo sound of a video. Usual: the paper's.

mod common;

use laneformer_models::lavit::{self, Lavit};
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 30522, "hidden_size": 768, "l_layers": 9, "num_attention_heads": 12, "intermediate_size": 3072,
        "max_position_embeddings": 512, "a_layers": 5, "v_layers": 5, "x_layers": 5, "audio_encoder": "stereo",
        "audio_feat_dim": 2048, "visual_feat_dim": 2048, "visual_coord_dim": 6, "num_answers": 2020,
    }))?;
    let model = common::timed("load", || Lavit::load(&path, &config, &checkpoint))?;
    let (ctx, config, bert) = (common::context(), &model.config, &model.language.config);

    let (ids, positions) = common::tokens(20, bert.vocab_size);
    let sound = common::features(3, config.audio_feat_dim)?;
    let (objects, places) =
        (common::features(36, config.visual_feat_dim)?, common::features(36, config.visual_coord_dim)?);
    let question =
        Batch { ids: &ids, type_ids: &[0; 20], positions: &positions, offsets: &[0, 20], is_real: None };
    let stream = |offsets| Batch { offsets, ..Batch::default() };
    let batch = lavit::Batch {
        streams: [question, stream(&[0, 3]), stream(&[0, 36])],
        audio: &[&sound, &sound],
        video: &[&objects, &places],
    };
    let states = common::timed("three streams", || model.forward(&mut Scratch::default().with(ctx), &batch))?;
    for (name, state) in ["language", "audio", "video"].iter().zip(&states) {
        common::show(name, state, bert.hidden_size);
    }
    common::show("answers", &model.answer_logits(ctx, &batch, &states)?, config.num_answers);
    Ok(())
}
