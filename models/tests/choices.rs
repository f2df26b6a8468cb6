//! Configurations whose choices this crate does not follow.

use std::path::Path;

use laneformer_models::bart::Bart;
use laneformer_models::bert::Bert;
use laneformer_models::clip::{Clip, TextEncoder};
use laneformer_models::detr::Detr;
use laneformer_models::fusion::Fusion;
use laneformer_models::gpt::Gpt;
use laneformer_models::lavit::Lavit;
use laneformer_models::longformer::Longformer;
use laneformer_models::transformer_xl::TransformerXl;
use laneformer_models::videobert::VideoBert;
use laneformer_models::xlnet::XlNet;
use laneformer_models::{Checkpoint, Result};
use serde_json::{Value, json};

/// A loader, with a small configuration.
type Small = (Box<dyn Fn(&Value) -> Result<()>>, Value);

fn small<M: 'static>(load: fn(&Path, &Value, &Checkpoint) -> Result<M>, config: Value) -> Small {
    (Box::new(move |json| load(Path::new("c"), json, &Checkpoint::random(1)).map(drop)), config)
}

fn bert() -> Small {
    let config = json!({
        "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4,
        "max_position_embeddings": 8,
    });
    small(Bert::load, config)
}

fn with(mut config: Value, fields: Value) -> Value {
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    config
}

fn videobert() -> Small {
    let video = json!({ "num_centroids": 5, "video_feature_dim": 4, "sep_token_id": 1, "mask_token_id": 2 });
    small(VideoBert::load, with(bert().1, video))
}

fn longformer() -> Small {
    let config = with(bert().1, json!({ "attention_window": 2 }));
    small(Longformer::load, config)
}

fn bart() -> Small {
    let config = json!({
        "vocab_size": 9, "d_model": 4, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 8,
    });
    small(Bart::load, config)
}

fn gpt() -> Small {
    let config = json!({ "vocab_size": 9, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2 });
    small(Gpt::load, config)
}

fn transformer_xl() -> Small {
    let config = json!({
        "vocab_size": 9, "d_model": 4, "n_head": 2, "d_head": 2, "d_inner": 4, "n_layer": 1, "mem_len": 4,
    });
    small(TransformerXl::load, config)
}

fn xlnet() -> Small {
    let config = json!({ "vocab_size": 9, "d_model": 4, "n_head": 2, "d_inner": 4, "n_layer": 1 });
    small(XlNet::load, config)
}

fn detr() -> Small {
    let config = json!({
        "d_model": 4, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 4,
        "backbone_config": { "embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic" },
    });
    small(Detr::load, config)
}

fn clip() -> Small {
    let tower =
        json!({ "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2 });
    let text = with(tower.clone(), json!({ "vocab_size": 9, "max_position_embeddings": 8 }));
    let vision = with(tower, json!({ "image_size": 4, "patch_size": 2 }));
    let config = json!({ "text_config": text, "vision_config": vision, "projection_dim": 4 });
    small(Clip::load, config)
}

fn clip_text() -> Small {
    small(
        TextEncoder::load,
        with(clip().1["text_config"].clone(), json!({ "model_type": "clip_text_model" })),
    )
}

fn lavit() -> Small {
    let streams = json!({
        "a_layers": 1, "v_layers": 1, "x_layers": 1, "audio_encoder": "mono", "audio_feat_dim": 3, "visual_feat_dim": 3,
        "visual_coord_dim": 2, "num_answers": 5,
    });
    small(Lavit::load, with(bert().1, streams))
}

fn fusion() -> Small {
    let config = json!({
        "fusion": "cross", "d_model": 4, "num_heads": 2, "d_ff": 4, "num_layers": 1, "norm_placement": "post",
        "eps": 1e-5, "activation": "relu",
    });
    small(Fusion::load, config)
}

/// An option of which one value is followed loads with that value, without the field, and with null unless null means the other; any other
/// value is refused by the field's name.
#[test]
fn options_with_one_value_are_checked() {
    for ((load, config), field, followed, other, null_is_fine) in [
        (bert(), "model_type", json!("bert"), json!("roberta"), true),
        (bert(), "is_decoder", json!(false), json!(true), true),
        (bert(), "position_embedding_type", json!("absolute"), json!("relative_key"), true),
        (videobert(), "is_decoder", json!(false), json!(true), true),
        (longformer(), "model_type", json!("longformer"), json!("bert"), true),
        (longformer(), "position_embedding_type", json!("absolute"), json!("relative_key"), true),
        (bart(), "model_type", json!("bart"), json!("mbart"), true),
        (bart(), "normalize_before", json!(false), json!(true), true),
        (bart(), "tie_word_embeddings", json!(true), json!(false), false),
        (gpt(), "model_type", json!("gpt2"), json!("gptj"), true),
        (gpt(), "add_cross_attention", json!(false), json!(true), true),
        (transformer_xl(), "attn_type", json!(0), json!(2), true),
        (transformer_xl(), "div_val", json!(1), json!(4), true),
        (xlnet(), "tie_word_embeddings", json!(true), json!(false), false),
        (xlnet(), "bi_data", json!(false), json!(true), true),
        (xlnet(), "reuse_len", json!(0), json!(5), true),
        (detr(), "position_embedding_type", json!("sine"), json!("learned"), true),
        (clip(), "model_type", json!("clip"), json!("siglip"), true),
    ] {
        let result = |value: Value| load(&with(config.clone(), json!({ field: value })));
        load(&config).unwrap();
        result(followed.clone()).unwrap();
        assert_eq!(result(Value::Null).is_ok(), null_is_fine, "{field}");
        let error = result(other.clone()).unwrap_err().to_string();
        assert_eq!(error, format!("c: {field}: expected {followed}, got {other}"));
    }
}

/// Wherever in a configuration it stands.
#[test]
fn a_wrong_choice_is_named_by_its_field() {
    let mut vision = clip().1["vision_config"].clone();
    vision["hidden_act"] = json!("mish");
    for ((load, config), field, value, expected) in [
        (
            videobert(),
            "hidden_act",
            json!("mish"),
            "c: hidden_act: invalid value: string \"mish\", expected one of",
        ),
        (longformer(), "layer_norm_eps", json!(-1), "c: layer_norm_eps: invalid value"),
        (lavit(), "layer_norm_eps", json!(-1), "c: layer_norm_eps: invalid value"),
        (lavit(), "audio_encoder", json!("quad"), "c: audio_encoder: expected mono, stereo"),
        (clip_text(), "hidden_act", json!("mish"), "c: hidden_act: invalid value: string \"mish\""),
        (fusion(), "norm_placement", json!("deepnorm"), "c: alpha: expected a number, got none"),
        (clip(), "vision_config", vision, "c: vision_config.hidden_act: invalid value: string \"mish\""),
        (fusion(), "activation", json!("mish"), "c: activation: invalid value: string \"mish\""),
        (
            fusion(),
            "norm_placement",
            json!("both"),
            "c: norm_placement: unknown variant `both`, expected one of `post`, `pre`, `sandwich`, `deepnorm`",
        ),
        (fusion(), "fusion", json!("late"), "c: fusion: expected early_sum"),
        (xlnet(), "attn_type", json!("tri"), "c: attn_type: unknown variant `tri`, expected `bi` or `uni`"),
    ] {
        load(&config).unwrap();
        let error = load(&with(config, json!({ field: value }))).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}, not {expected}");
    }
}

/// The `alpha` of DeepNorm reaches the layers of a fusion, too.
#[test]
fn a_fusion_can_have_deepnorm() {
    let (load, config) = fusion();
    load(&with(config, json!({ "norm_placement": "deepnorm", "alpha": 2.0 }))).unwrap();
}
