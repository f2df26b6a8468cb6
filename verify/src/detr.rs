//! Cases of DETR's encoder.

use laneformer::Context;
use laneformer_models::Scratch;
use laneformer_models::conv::Images;
use laneformer_models::detr::{Detr, sine_positions, token_mask};
use laneformer_models::ragged::Ragged;

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn detr(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = Detr::load(case.path(), case.json(), case.weights())?;
    let d = model.config.d_model;
    let [batch, channels, height, width] = case.shape("pixel_values")?;
    let images = Images::from_planes(&case.f32("pixel_values")?, [batch, channels, height, width])?;
    let pixel_mask =
        if case.has("pixel_mask") { case.mask("pixel_mask")? } else { vec![true; batch * height * width] };
    if pixel_mask.len() != batch * height * width {
        return Err(case.error(format!("in.pixel_mask: expected the {batch}x{height}x{width} of the images")));
    }

    let mut scratch = Scratch::default();
    let features = model.backbone.forward(&mut scratch.with(ctx), &images)?;
    let size = [features.height, features.width];
    let mask = token_mask(&pixel_mask, [height, width], size);
    let tokens = Ragged::from_mask(&mask, size[0] * size[1]);
    let positions = sine_positions(&mask, size, d);
    let hidden = model.encode(&mut scratch.with(ctx), &features, &tokens, &tokens.gather(&positions, d)?)?;
    Ok(Outputs::from([
        ("feature_map".into(), features.to_planes()),
        ("token_mask".into(), mask.iter().map(|&real| f32::from(u8::from(real))).collect()),
        ("position_embeddings".into(), positions),
        ("encoder_last_hidden_state".into(), tokens.scatter(&hidden, d)),
    ]))
}
