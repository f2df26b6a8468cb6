//! Cases of Pano-AVQA's three-stream model.

use laneformer::Context;
use laneformer_models::lavit::{self, Lavit};
use laneformer_models::{Batch, Scratch};

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn lavit(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = Lavit::load(case.path(), case.json(), case.weights())?;
    let config = &model.config;
    let (l, l_real) = case.ragged_from_first("l_mask", case.shape("input_ids")?)?;
    let ids = l.gather(&case.indices("input_ids")?, 1)?;
    let types = vec![0; ids.len()];

    // [B, T, f], or [B, channels, T, f] of which each channel is gathered by itself.
    let a_shape = case.io().shape("in.a_feat")?;
    let &[sequences, .., a_len, a_dim] = a_shape else {
        return Err(case.error(format!("in.a_feat: expected 3 or 4 dimensions, got {a_shape:?}")));
    };
    let (a, a_real) = case.ragged_from_first("a_mask", [sequences, a_len])?;
    let (a_feat, channel) = (case.f32("a_feat")?, (a_len * a_dim).max(1));
    let channels = a_shape[1..a_shape.len() - 2].iter().product();
    let mut audio = vec![];
    for c in 0..channels {
        let feat: Vec<_> =
            a_feat.chunks_exact(channel).skip(c).step_by(channels).flatten().copied().collect();
        audio.push(a.gather(&feat, a_dim)?);
    }
    if config.audio_encoder.ends_with("_st") {
        let [_, _, coord_dim] = case.shape("a_coord")?;
        audio.push(a.gather(&case.f32("a_coord")?, coord_dim)?);
    }

    let [_, v_len, _] = case.shape("v_feat")?;
    let (v, v_real) = case.ragged_from_first("v_mask", [sequences, v_len])?;
    let v_feat = v.gather(&case.f32("v_feat")?, config.visual_feat_dim)?;
    let v_coord = v.gather(&case.f32("v_coord")?, config.visual_coord_dim)?;

    let (positions, offsets) = (l.positions(), l.offsets());
    let question = Batch { ids: &ids, type_ids: &types, positions, offsets, is_real: Some(&l_real) };
    let sound = Batch { offsets: a.offsets(), is_real: Some(&a_real), ..Batch::default() };
    let objects = Batch { offsets: v.offsets(), is_real: Some(&v_real), ..Batch::default() };
    let audio: Vec<_> = audio.iter().map(Vec::as_slice).collect();
    let batch =
        lavit::Batch { streams: [question, sound, objects], audio: &audio, video: &[&v_feat, &v_coord] };
    let states = model.forward(&mut Scratch::default().with(ctx), &batch)?;
    let answer_logits = model.answer_logits(ctx, &batch, &states)?;
    let d = model.language.config.hidden_size;
    Ok(Outputs::from([
        ("l".into(), l.scatter(&states[0], d)),
        ("a".into(), a.scatter(&states[1], d)),
        ("v".into(), v.scatter(&states[2], d)),
        ("answer_logits".into(), answer_logits),
    ]))
}
