//! Cases of CLIP.

use laneformer::Context;
use laneformer_models::clip::Clip;
use laneformer_models::conv::Images;
use laneformer_models::ragged::Ragged;
use laneformer_models::{Batch, Scratch};

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn clip(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = Clip::load(case.path(), case.json(), case.weights())?;
    let images = Images::from_planes(&case.f32("pixel_values")?, case.shape("pixel_values")?)?;
    let image_states = model.image_states(&mut Scratch::default().with(ctx), &images)?;
    let image_embeds = model.embed_images(ctx, &image_states)?;

    // Padding stays: the token that stands for a text is looked for there, too.
    let [sequences, seq_len] = case.shape("input_ids")?;
    let tokens = Ragged::from_mask(&vec![true; sequences * seq_len], seq_len);
    let is_real = case.has("attention_mask").then(|| case.mask("attention_mask")).transpose()?;
    let (ids, is_real) = (case.indices("input_ids")?, is_real.as_deref());
    let (positions, offsets) = (tokens.positions(), tokens.offsets());
    let texts = Batch { ids: &ids, positions, offsets, is_real, ..Batch::default() };
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
