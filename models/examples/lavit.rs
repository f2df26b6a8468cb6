//! Pano-AVQA's LAViT: a question of 20 words about 36 objects and the stereo sound of a video. Usual: the paper's.

mod common;

use laneformer_models::Scratch;
use laneformer_models::lavit::{Batch, Features, Lavit};
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "vocab_size": 30522, "hidden_size": 768, "l_layers": 9, "num_attention_heads": 12, "intermediate_size": 3072,
        "max_position_embeddings": 512, "a_layers": 5, "v_layers": 5, "x_layers": 5, "audio_encoder": "stereo",
        "audio_feat_dim": 2048, "visual_feat_dim": 2048, "visual_coord_dim": 6, "num_answers": 2020,
    }))?;
    let model = common::timed("load", || Lavit::load(&path, &config, &checkpoint))?;
    let (ctx, config) = (common::context(), &model.config);

    let (ids, positions) = common::tokens(20, config.bert.vocab_size);
    let sound = common::features(3, config.audio_feat_dim)?;
    let (objects, places) =
        (common::features(36, config.visual_feat_dim)?, common::features(36, config.visual_coord_dim)?);
    let batch = Batch {
        language: laneformer_models::Batch {
            ids: &ids,
            type_ids: &[0; 20],
            positions: &positions,
            offsets: &[0, 20],
            is_real: None,
        },
        audio: Features { kinds: &[&sound, &sound], offsets: &[0, 3], is_real: None },
        video: Features { kinds: &[&objects, &places], offsets: &[0, 36], is_real: None },
    };
    let states = common::timed("three streams", || model.forward(&mut Scratch::default().with(ctx), &batch))?;
    for (name, state) in ["language", "audio", "video"].iter().zip(&states) {
        common::show(name, state, config.bert.hidden_size);
    }
    common::show("answers", &model.answer_logits(ctx, &states, batch.offsets())?, config.num_answers);
    Ok(())
}
