//! What models keep from call to call: Transformer-XL's memory, as it grows and from elsewhere, and XLNet's positions.

use std::path::Path;

use laneformer::Context;
use laneformer_models::transformer_xl::TransformerXl;
use laneformer_models::xlnet::{self, XlNet};
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
    for (n, pre_lnorm) in [(1, false), (SEQUENCES, false), (SEQUENCES, true)] {
        let (model, mut scratch) = (model(pre_lnorm), Scratch::default());
        let mut grown = model.memory(n);
        // Fewer rows than the memory holds, then more, and a few at a time, so that some have gone and not yet others moved.
        for len in [4, 8, 1, 1, 2, 1, 1, 1, 1, 3, 5, 1, 1, 30, 1, 2] {
            let ids: Vec<u32> = (0..(n * len) as u32).map(|i| i % 50).collect();
            model.forward(&mut scratch.with(ctx), &ids, &mut grown).unwrap();
            let inputs: Vec<Vec<f32>> = (0..3).map(|i| grown.inputs(i).unwrap()).collect();
            let mut given = model.memory_of(ctx, &inputs, n).unwrap();
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

fn xlnet(attn_type: &str, clamp_len: i64, n_layer: usize) -> XlNet {
    let config = json!({
        "vocab_size": 50, "d_model": 24, "n_head": 3, "d_inner": 40, "n_layer": n_layer, "attn_type": attn_type,
        "clamp_len": clamp_len,
    });
    XlNet::load(Path::new("config"), &config, &Checkpoint::random(2)).unwrap()
}

/// Sequences of 70 tokens behind 9 rows of memory.
fn xlnet_batch<'a>(ids: &'a [u32], mems: &'a [Vec<f32>]) -> xlnet::Batch<'a> {
    xlnet::Batch { sequences: SEQUENCES, ids, targets: Some(&[3, 69]), mems, ..xlnet::Batch::default() }
}

#[test]
fn positions_that_reach_further_give_the_same_bits() {
    let ids: Vec<u32> = (0..140).map(|i| i % 50).collect();
    let mems: Vec<Vec<f32>> = (0..2).map(|layer| vec![0.1 + layer as f32; SEQUENCES * 9 * 24]).collect();
    let mut scratch = Scratch::default();
    let run = &mut scratch.with(Context::serial());
    for (attn_type, clamp_len) in [("bi", 0), ("bi", 5), ("uni", 0), ("uni", 60)] {
        let model = xlnet(attn_type, clamp_len, 2);
        let batch = xlnet_batch(&ids, &mems);
        let mut forward = |tokens, memory| {
            let positions = model.positions(run, tokens, memory).unwrap();
            let output = model.forward(run, &batch, &positions).unwrap();
            (output.content, output.queries)
        };
        let exact = forward(70, 9);
        for (tokens, memory) in [(71, 8), (200, 0), (200, 300)] {
            let what = format!("{attn_type} {clamp_len}, {tokens} tokens behind {memory}");
            assert_eq!(forward(tokens, memory), exact, "{what}");
        }
    }
}

#[test]
fn positions_that_do_not_reach_or_fit_are_refused() {
    let ids: Vec<u32> = (0..140).map(|i| i % 50).collect();
    let mems = vec![vec![0.5; SEQUENCES * 9 * 24]; 2];
    let mut scratch = Scratch::default();
    let run = &mut scratch.with(Context::serial());
    let model = xlnet("bi", 0, 2);
    for (positions, expected) in [
        (model.positions(run, 69, 9), "tokens: expected at most 69, got 70"),
        (model.positions(run, 70, 8), "tokens and memory: expected at most 78, got 79"),
        (xlnet("bi", 0, 3).positions(run, 70, 9), "layers of the positions: expected 2, got 3"),
        (model.positions(run, 0, 9), "tokens"),
        (model.positions(run, usize::MAX, 9), "tokens and memory"),
        (model.positions(run, usize::MAX / 2 + 1, 0), "tokens and memory"),
        (model.positions(run, 2, i32::MAX as usize), "tokens and memory"),
    ] {
        let with = |positions| model.forward(run, &xlnet_batch(&ids, &mems), &positions);
        let refused = positions.and_then(with).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}, not {expected}");
    }
}
