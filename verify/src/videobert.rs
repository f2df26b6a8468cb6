//! Cases of VideoBERT.

use laneformer::Context;
use laneformer_models::run::project;
use laneformer_models::videobert::VideoBert;
use laneformer_models::{Batch, Scratch};

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn videobert(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = VideoBert::load(case.path(), case.json(), case.weights())?;
    let video_ids = model.video_ids(ctx, &case.f32("video_features")?)?;
    let (text, masked) = (case.indices("input_ids")?, case.mask("video_masked")?);
    let ([_, text_len], [_, clips]) = (case.shape("input_ids")?, case.shape("video_masked")?);
    let (mut ids, mut type_ids) = (vec![], vec![]);
    for (i, text) in text.chunks(text_len.max(1)).enumerate() {
        let clips = i * clips..(i + 1) * clips;
        let video_ids = video_ids.get(clips.clone()).unwrap_or(&[]);
        let (sequence, types) = model.joint_sequence(text, video_ids, masked.get(clips).unwrap_or(&[]))?;
        ids.extend(sequence);
        type_ids.extend(types);
    }

    let (tokens, is_real) = case.ragged_from_first("attention_mask", case.shape("attention_mask")?)?;
    let (ids, type_ids) = (tokens.gather(&ids, 1)?, tokens.gather(&type_ids, 1)?);
    let (positions, offsets) = (tokens.positions(), tokens.offsets());
    let batch = Batch { ids: &ids, type_ids: &type_ids, positions, offsets, is_real: Some(&is_real) };
    let hidden = model.bert.forward(&mut Scratch::default().with(ctx), batch)?;
    let config = &model.bert.config;
    let vocab_size = config.vocab_size + model.config.num_centroids;
    let mut outputs = Outputs::from([
        ("video_ids".into(), video_ids.iter().map(|&id| id as f32).collect()),
        ("last_hidden_state".into(), tokens.scatter(&hidden, config.hidden_size)),
        ("logits".into(), tokens.scatter(&model.logits(ctx, &hidden)?, vocab_size)),
    ]);
    if let Some(pooled) = model.bert.pool(ctx, &hidden, offsets)? {
        outputs.insert("alignment_logits".into(), project(ctx, &model.alignment, &pooled)?);
        outputs.insert("pooler_output".into(), pooled);
    }
    Ok(outputs)
}
