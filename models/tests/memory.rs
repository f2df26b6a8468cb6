//! Transformer-XL's memory, as it grows and from elsewhere.

use std::path::Path;

use laneformer::Context;
use laneformer_models::transformer_xl::TransformerXl;
use laneformer_models::{Checkpoint, Scratch};
use serde_json::json;

const SEQUENCES: usize = 2;

fn model(pre_lnorm: bool) -> TransformerXl {
    let config = json!({
        "vocab_size": 50, "d_model": 24, "n_head": 3, "d_head": 7, "d_inner": 40, "n_layer": 3, "mem_len": 9,
        "clamp_len": 5, "same_length": true, "pre_lnorm": pre_lnorm,
    });
    TransformerXl::load(Path::new("config"), &config, &Checkpoint::random(1)).unwrap()
}

/// The inputs of the layers are all of a memory: who has them goes on with the same bits.
#[test]
fn a_memory_of_inputs_is_the_one_that_grew() {
    let ctx = Context::serial();
    for model in [model(false), model(true)] {
        let mut scratch = Scratch::default();
        let mut grown = model.memory(SEQUENCES);
        // Fewer rows than the memory holds, then more.
        for len in [4, 8] {
            let ids: Vec<u32> = (0..(SEQUENCES * len) as u32).collect();
            model.forward(&mut scratch.with(ctx), &ids, &mut grown).unwrap();
            let inputs: Vec<Vec<f32>> = (0..3).map(|i| grown.inputs(i).unwrap().to_vec()).collect();
            let mut given = model.memory_of(ctx, &inputs, SEQUENCES).unwrap();
            let next = [7, 8, 9, 10];
            let got = model.forward(&mut scratch.with(ctx), &next, &mut given).unwrap();
            assert_eq!(got, model.forward(&mut scratch.with(ctx), &next, &mut grown).unwrap());
        }
    }
}

#[test]
fn memories_that_do_not_fit_are_refused() {
    let (ctx, model) = (Context::serial(), model(false));
    let layer = vec![0.5; SEQUENCES * 4 * 24];
    let refused = |inputs: &[Vec<f32>]| model.memory_of(ctx, inputs, SEQUENCES).unwrap_err().to_string();
    for inputs in [vec![], vec![layer.clone(); 2], vec![layer.clone(), layer[24..].to_vec(), layer.clone()]] {
        assert!(refused(&inputs).contains("memory"), "{}", refused(&inputs));
    }
    assert!(refused(&vec![layer[1..].to_vec(); 3]).contains("memory"));
    assert!(refused(&vec![vec![]; 3]).contains("memory"));
}
