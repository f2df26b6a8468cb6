//! Cases of CLIP.

use laneformer::Context;

use super::case::{Case, Outputs};
use crate::clip::Clip;
use crate::conv::Images;
use crate::{Batch, Result, Scratch};

pub(super) fn clip(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = Clip::load(case.path(), case.json(), case.weights())?;
    let images = Images::from_planes(&case.f32("pixel_values")?, case.shape("pixel_values")?)?;
    let image_states = model.image_states(&mut Scratch::default().with(ctx), &images)?;
    let image_embeds = model.embed_images(ctx, &image_states)?;

    let tokens = case.ragged_or_full("attention_mask", case.shape("input_ids")?)?;
    let ids = tokens.gather(&case.indices("input_ids")?, 1)?;
    let texts =
        Batch { ids: &ids, positions: tokens.positions(), offsets: tokens.offsets(), ..Batch::default() };
    let text_states = model.text.states(&mut Scratch::default().with(ctx), texts)?;
    let text_embeds = model.text.embed(ctx, texts, &text_states)?;

    let text_count = tokens.offsets().len() - 1;
    let logits = model.logits_per_image(ctx, &image_embeds, &text_embeds)?;
    let d = model.config.text_config.tower.hidden_size;
    Ok(Outputs::from([
        ("vision_last_hidden_state".into(), image_states),
        ("text_last_hidden_state".into(), tokens.scatter(&text_states, d)),
        ("image_embeds".into(), image_embeds),
        ("text_embeds".into(), text_embeds),
        ("probs".into(), model.probabilities(ctx, logits.clone(), text_count)?),
        ("logits_per_image".into(), logits),
    ]))
}
