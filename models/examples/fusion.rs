//! Fusion of two streams, the patches of a video and of a spectrogram, that meet in four bottleneck tokens. Usual: MBT-base.

mod common;

use laneformer_models::Scratch;
use laneformer_models::fusion::{Fusion, Stream};
use serde_json::json;

fn main() -> common::Result {
    // The other fusions: early_sum, early_concat, hier_multi_to_one, hier_one_to_multi, cross, cross_concat.
    let (path, config, checkpoint) = common::model(json!({
        "fusion": "mbt", "fusion_layer": 8, "num_bottlenecks": 4, "d_model": 768, "num_heads": 12, "d_ff": 3072,
        "num_layers": 12, "norm_placement": "pre", "eps": 1e-6, "activation": "gelu_new",
    }))?;
    let fusion = common::timed("load", || Fusion::load(&path, &config, &checkpoint))?;

    let d = fusion.layer_config.d_model;
    let mut video = Stream { x: common::features(784, d)?, offsets: vec![0, 784] };
    let mut sound = Stream { x: common::features(400, d)?, offsets: vec![0, 400] };
    let bottleneck = common::timed("fuse", || {
        fusion.forward(&mut Scratch::default().with(common::context()), &mut video, &mut sound)
    })?;
    common::show("video", &video.x, d);
    common::show("sound", &sound.x, d);
    if let Some(tokens) = bottleneck {
        common::show("bottleneck", &tokens, d);
    }
    Ok(())
}
