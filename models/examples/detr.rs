//! DETR: an image of 800 x 1066 pixels through a ResNet, and the encoder over its 25 x 34 features. Usual: detr-resnet-50.

mod common;

use laneformer_models::Scratch;
use laneformer_models::conv::Images;
use laneformer_models::detr::{Detr, sine_positions};
use laneformer_models::ragged::Ragged;
use serde_json::json;

fn main() -> common::Result {
    let (path, config, checkpoint) = common::model(json!({
        "d_model": 256, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
        "activation_function": "relu", "position_embedding_type": "sine",
        "backbone_config": {
            "num_channels": 3, "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
            "layer_type": "bottleneck",
        },
    }))?;
    let detr = common::timed("load", || Detr::load(&path, &config, &checkpoint))?;
    let (ctx, d) = (common::context(), detr.config.d_model);

    let channels = detr.config.backbone_config.num_channels;
    let pixels = common::features(channels, 800 * 1066)?;
    let image = Images::from_planes(&pixels, [1, channels, 800, 1066])?;
    let mut scratch = Scratch::default();
    let features = common::timed("backbone", || detr.backbone.forward(&mut scratch.with(ctx), &image))?;
    println!("features {} x {}, {} channels", features.height, features.width, features.channels);

    let size = [features.height, features.width];
    let mask = vec![true; size[0] * size[1]];
    let (tokens, positions) = (Ragged::from_mask(&mask, mask.len()), sine_positions(&mask, size, d));
    let hidden =
        common::timed("encoder", || detr.encode(&mut scratch.with(ctx), &features, &tokens, &positions))?;
    common::show("hidden states", &hidden, d);
    Ok(())
}
