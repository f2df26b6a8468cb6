//! What models share when they run.

use std::path::Path;

use laneformer::{Context, Isa};
use laneformer_models::bert::Bert;
use laneformer_models::encoder::Config;
use laneformer_models::lavit::{self, Lavit};
use laneformer_models::longformer::Longformer;
use laneformer_models::videobert::VideoBert;
use laneformer_models::{Batch, Checkpoint, Scratch};
use serde_json::json;

/// Stacks of any widths run with the same scratch, and make what they make alone.
#[test]
fn one_scratch_serves_narrow_and_wide_stacks() {
    let ctx = Context::new(Isa::best(), &laneformer::Serial);
    let mut shared = Scratch::default();
    for (d_model, d_ff, tokens) in [(16, 32, 7), (64, 256, 5), (16, 900, 7), (48, 8, 3), (64, 256, 7)] {
        let config = json!({
            "d_model": d_model, "num_heads": 4, "d_ff": d_ff, "num_layers": 2, "norm_placement": "pre", "eps": 1e-5,
            "activation": "gelu", "final_norm": true,
        });
        let config: Config = serde_json::from_value(config).unwrap();
        let layers = config.load(Path::new("config"), &Checkpoint::random(1)).unwrap();
        let x = Checkpoint::random(2).tensor("x", &[tokens, d_model]).unwrap().into_owned();
        let (mut alone, mut beside) = (x.clone(), x);
        layers.encode(&mut Scratch::default().with(ctx), &mut alone, &[0, tokens]).unwrap();
        layers.encode(&mut shared.with(ctx), &mut beside, &[0, tokens]).unwrap();
        assert_eq!(alone, beside, "{d_model} {d_ff} {tokens}");
    }
}

/// Of two names for the same a random checkpoint has the one that published models have.
#[test]
fn random_weights_have_the_usual_names() {
    let config = json!({
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 16,
    });
    let checkpoint = Checkpoint::random(1);
    Bert::load(Path::new("config"), &config, &checkpoint).unwrap();
    let names: Vec<String> = checkpoint.asked().into_keys().collect();
    let layer: Vec<&str> = names.iter().filter_map(|name| name.strip_prefix("encoder.layer.0.")).collect();
    let parts = [
        "attention.output.LayerNorm",
        "attention.output.dense",
        "attention.self.key",
        "attention.self.query",
        "attention.self.value",
        "intermediate.dense",
        "output.LayerNorm",
        "output.dense",
    ];
    let expected: Vec<String> =
        parts.iter().flat_map(|part| ["bias", "weight"].map(|tensor| format!("{part}.{tensor}"))).collect();
    assert_eq!(layer, expected);
}

#[test]
fn clips_outside_of_the_centroids_are_refused() {
    let config = json!({
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 16, "num_centroids": 5, "video_feature_dim": 4, "sep_token_id": 1, "mask_token_id": 2,
    });
    let model = VideoBert::load(Path::new("config"), &config, &Checkpoint::random(1)).unwrap();
    let joint = |ids: &[u32], masked: &[bool]| model.joint_sequence(&[3, 4], ids, masked);
    assert_eq!(joint(&[4, 0], &[false, true]).unwrap().0, [3, 4, 24, 2, 1]);
    for id in [5, u32::MAX] {
        let why = joint(&[0, id], &[false; 2]).unwrap_err().to_string();
        assert!(why.contains("centroids") && why.contains(&id.to_string()), "{why}");
    }
    assert!(joint(&[0, 1], &[false]).is_err());
}

/// Padding that keeps its place sees its sequence, and changes nothing for it.
#[test]
fn padding_that_keeps_its_place_is_not_seen() {
    let config = json!({
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 16,
    });
    let model = Bert::load(Path::new("config"), &config, &Checkpoint::random(1)).unwrap();
    let forward = |is_real: Option<&[bool]>, from: usize| {
        let (ids, positions) = ([0, 7, 9, 0, 5], [0, 1, 2, 0, 1]);
        let offsets = [0, 3 - from, 5 - from];
        let (ids, positions) = (&ids[from..], &positions[from..]);
        let batch = Batch { ids, type_ids: &[0; 5][from..], positions, offsets: &offsets, is_real };
        model.forward(&mut Scratch::default().with(Context::serial()), batch)
    };
    let padded = forward(Some(&[false, true, true, true, true]), 0).unwrap();
    let packed = forward(None, 1).unwrap();
    for (padded, packed) in padded[8..].iter().zip(&packed) {
        assert!((padded - packed).abs() < 1e-5, "{padded} {packed}");
    }
    assert_eq!(padded.len(), 40);
    assert!(padded[..8].iter().all(|x| x.is_finite() && *x != 0.0));
    let why = forward(Some(&[true; 4]), 0).unwrap_err().to_string();
    assert!(why.contains("is_real"), "{why}");
}

/// Sequences with few global tokens go another way than those with many, each the same way alone and beside others.
#[test]
fn global_tokens_give_the_same_bits_alone_and_in_a_batch() {
    let config = json!({
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 40, "attention_window": 6, "type_vocab_size": 1,
    });
    let model = Longformer::load(Path::new("config"), &config, &Checkpoint::random(3)).unwrap();
    // Three are few, four are not.
    let globals = [0, 3, 4, 1, 0, 30, 3, 1, 5];
    let len = 30;
    let ids: Vec<u32> = (0..(globals.len() * len) as u32).map(|i| 2 + i * 7 % 38).collect();
    let is_global: Vec<bool> =
        globals.iter().flat_map(|&n| (0..len).map(move |i| i * 11 % len < n)).collect();
    // Of the last two sequences nothing is real.
    let is_real: Vec<bool> = (0..ids.len()).map(|i| i % 9 != 5 && i < 7 * len).collect();
    for isa in Isa::available() {
        let forward = |sequences: core::ops::Range<usize>, pads: bool| {
            let tokens = sequences.start * len..sequences.end * len;
            let ids = &ids[tokens.clone()];
            let positions: Vec<u32> = ids.chunks(len).flat_map(|ids| model.positions(ids)).collect();
            let offsets: Vec<usize> = (0..=sequences.len()).map(|i| i * len).collect();
            let is_real = pads.then_some(&is_real[tokens.clone()]);
            let type_ids = vec![0; ids.len()];
            let batch = Batch { ids, type_ids: &type_ids, positions: &positions, offsets: &offsets, is_real };
            let ctx = Context::new(isa, &laneformer::Rayon);
            model.forward(&mut Scratch::default().with(ctx), batch, &is_global[tokens]).unwrap()
        };
        for pads in [false, true] {
            let together = forward(0..globals.len(), pads);
            for (i, together) in together.chunks(len * 16).enumerate() {
                assert_eq!(forward(i..i + 1, pads), together, "{isa}, {} global tokens, {pads}", globals[i]);
                assert!(together.iter().all(|x| x.is_finite()));
            }
        }
    }
}

/// Each kind of features has a row for each token of its stream, also where the first has none.
#[test]
fn features_of_other_tokens_are_refused() {
    let config = json!({
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 16, "a_layers": 0, "v_layers": 0, "x_layers": 1, "audio_encoder": "mono",
        "audio_feat_dim": 3, "visual_feat_dim": 3, "visual_coord_dim": 2, "num_answers": 5,
    });
    let model = Lavit::load(Path::new("config"), &config, &Checkpoint::random(1)).unwrap();
    let ctx = Context::new(Isa::best(), &laneformer::Serial);
    let language =
        Batch { ids: &[1, 2], type_ids: &[0; 2], positions: &[0, 1], offsets: &[0, 2], is_real: None };
    let stream = |offsets| Batch { offsets, ..Batch::default() };
    let run = |features: &[f32], coordinates: &[f32]| {
        let video = [features, coordinates];
        let streams = [language, stream(&[0, 1]), stream(&[0, 2])];
        let batch = lavit::Batch { streams, audio: &[&[0.5; 3]], video: &video };
        model.forward(&mut Scratch::default().with(ctx), &batch)
    };
    assert_eq!(run(&[0.5; 6], &[0.5; 4]).unwrap()[2].len(), 16);
    for (features, coordinates) in [(&[][..], &[0.5; 4][..]), (&[0.5; 6], &[]), (&[0.5; 6], &[0.5; 2])] {
        let why = run(features, coordinates).unwrap_err().to_string();
        assert!(why.contains("features of all tokens"), "{why}");
    }
}
