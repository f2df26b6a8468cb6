//! CLIP: four images and three texts in one space, and how well they fit. Usual: clip-vit-base-patch32.

mod common;

use laneformer_models::clip::Clip;
use laneformer_models::conv::Images;
use laneformer_models::{Batch, Scratch};
use serde_json::json;

fn main() -> common::Result {
    // What is not said is of this size.
    let (path, config, checkpoint) = common::model(json!({ "model_type": "clip" }))?;
    let clip = common::timed("load", || Clip::load(&path, &config, &checkpoint))?;
    let (ctx, vision, text) = (common::context(), &clip.config.vision_config, &clip.text.config);

    let (channels, side) = (vision.num_channels, vision.image_size);
    let pixels = common::features(4, channels * side * side)?;
    let images = Images::from_planes(&pixels, [4, channels, side, side])?;
    let images = common::timed("images", || {
        let states = clip.image_states(&mut Scratch::default().with(ctx), &images)?;
        clip.embed_images(ctx, &states)
    })?;
    common::show("images", &images, clip.config.projection_dim);

    let (ids, _) = common::tokens(24, text.vocab_size);
    let positions: Vec<_> = (0..24).map(|i| i % 8).collect();
    let texts = Batch { ids: &ids, positions: &positions, offsets: &[0, 8, 16, 24], ..Batch::default() };
    let texts = common::timed("texts", || {
        let states = clip.text.states(&mut Scratch::default().with(ctx), texts)?;
        clip.text.embed(ctx, texts, &states)
    })?;
    common::show("texts", &texts, clip.config.projection_dim);

    let logits = clip.logits_per_image(ctx, &images, &texts)?;
    common::show("probabilities", &clip.probabilities(ctx, logits, 3)?, 3);
    Ok(())
}
