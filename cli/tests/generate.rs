//! `laneformer generate` on tiny models: the tokens of golden cases, how a text ends, and how bad input is refused.

mod common;

use std::fs;

use common::{Model, golden, laneformer, parts, refused, words};
use laneformer::Context;
use laneformer_models::Checkpoint;
use laneformer_text::Error;
use laneformer_text::generate::Generator;
use safetensors::SafeTensors;
use serde_json::json;

fn gpt2() -> Model {
    Model::of("gpt2-full", "gpt2", 50)
}

fn bart() -> Model {
    Model::of("bart-decode", "bart", 40)
}

/// Standard output without its last line end, and standard error.
fn generate(model: &Model, prompt: &str, args: &[&str]) -> (String, String) {
    let args = [&["generate", "--model", model.arg(), "--prompt", prompt][..], args].concat();
    let (status, stdout, stderr) = parts(&laneformer(&args, b""));
    assert_eq!(status, 0, "{args:?}: {stderr}");
    (stdout.strip_suffix('\n').expect("a line").into(), stderr)
}

fn text(model: &Model, prompt: &str, args: &[&str]) -> String {
    generate(model, prompt, args).0
}

fn io(case: &str) -> Checkpoint {
    Checkpoint::open(&golden(case).join("io.safetensors")).unwrap()
}

fn argmax(x: &[f32]) -> usize {
    (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b])).unwrap()
}

#[test]
fn bart_writes_the_greedy_tokens_of_the_golden_case() {
    let (model, io) = (bart(), io("bart-decode"));
    let (ids, mask, expected) = (
        io.i64("in.input_ids").unwrap(),
        io.u8("in.attention_mask").unwrap(),
        io.i64("out.greedy_ids").unwrap(),
    );
    for (row, expected) in expected.chunks(8).enumerate() {
        let row = row * 17..(row + 1) * 17;
        let real = ids[row.clone()].iter().zip(&mask[row]).filter(|(_, real)| **real == 1);
        // The case goes on behind the end token, 2.
        let expected = words(expected.iter().take_while(|id| **id != 2));
        for args in [&["--threads", "1"][..], &["--threads", "2", "--isa", "scalar"]] {
            let args = [args, &["--max-tokens", "8"]].concat();
            assert_eq!(text(&model, &words(real.clone().map(|(id, _)| id)), &args), expected);
        }
    }
}

#[test]
fn gpt2_goes_on_with_the_most_probable_token() {
    let (model, io) = (gpt2(), io("gpt2-full"));
    let (ids, logits) = (io.i64("in.input_ids").unwrap(), io.f32("out.logits").unwrap());
    for len in [1, 2, 17, 69] {
        let expected = argmax(&logits[(len - 1) * 50..len * 50]);
        let prompt = words(&ids[..len]);
        let (stdout, stderr) = generate(&model, &prompt, &["--max-tokens", "1"]);
        assert_eq!(stdout, if expected == 0 { String::new() } else { words([expected]) }, "{len}");
        assert!(stderr.contains(&format!("prefill: {len} tokens in ")), "{stderr}");
        assert!(stderr.contains("decode: 0 tokens") && stderr.contains("tokens/s"), "{stderr}");
    }
}

#[test]
fn tokens_through_the_cache_are_those_of_a_longer_prompt() {
    let model = gpt2();
    model.set("config.json", "eos_token_id", json!(null));
    let all = text(&model, "w5 w6", &["--max-tokens", "20"]);
    assert_eq!(all.split(' ').count(), 20);
    let mut prompt = "w5 w6".to_string();
    for word in all.split(' ') {
        assert_eq!(text(&model, &prompt, &["--max-tokens", "1"]), word);
        prompt += &format!(" {word}");
    }
}

/// A GPT-2 that finds many tokens likely.
fn undecided() -> Model {
    let model = gpt2();
    model.set("config.json", "eos_token_id", json!(null));
    let path = model.path().join("model.safetensors");
    let mut data = fs::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&data).unwrap();
    let (start, end) = metadata.info("transformer.ln_f.weight").unwrap().data_offsets;
    for gain in data[8 + header..][start..end].chunks_exact_mut(4) {
        let scaled = f32::from_le_bytes(gain.try_into().unwrap()) / 8.0;
        gain.copy_from_slice(&scaled.to_le_bytes());
    }
    fs::write(path, data).unwrap();
    model
}

#[test]
fn a_seed_draws_the_same_text_everywhere() {
    let model = undecided();
    let draw = |k, seed, isa| {
        let args = ["--max-tokens", "12", "--threads", "2", "--isa", isa, "--top-k", k, "--seed", seed];
        text(&model, "w1 w2", &args)
    };
    let first = draw("20", "1", "scalar");
    assert_eq!(first, "w20 w18 w27 w29 w46 w29 w33 w16 w40 w16 w18 w41");
    for isa in laneformer::Isa::available() {
        // The portable backend is the one without a promise of bits.
        if isa.name() != "portable" {
            assert_eq!(draw("20", "1", isa.name()), first, "{isa}");
        }
    }
    assert_ne!(draw("20", "2", "scalar"), first);
    assert_ne!(draw("2", "1", "scalar"), first);
    assert_eq!(draw("1", "1", "scalar"), text(&model, "w1 w2", &["--max-tokens", "12"]));
    // More than there are tokens is all of them.
    assert_eq!(draw("50", "1", "scalar"), draw("1000", "1", "scalar"));
}

#[test]
fn a_text_ends_at_its_end_token() {
    let model = gpt2();
    model.set("config.json", "eos_token_id", json!(null));
    let all = text(&model, "w5 w6", &["--max-tokens", "20"]);
    let third: usize = all.split(' ').nth(2).unwrap()[1..].parse().unwrap();
    let before = all.split(' ').take_while(|word| word[1..] != third.to_string());
    let before = before.collect::<Vec<_>>().join(" ");
    model.set("config.json", "eos_token_id", json!(third));
    assert_eq!(text(&model, "w5 w6", &["--max-tokens", "20"]), before);
    // The generation's own file counts if there is one.
    model.write_json("generation_config.json", &json!({}));
    assert_eq!(text(&model, "w5 w6", &["--max-tokens", "20"]), all);
    model.write_json("generation_config.json", &json!({ "eos_token_id": [49, third] }));
    assert!(all.starts_with(&text(&model, "w5 w6", &["--max-tokens", "20"])));
    assert!(text(&model, "w5 w6", &["--max-tokens", "20"]).len() <= before.len());
}

#[test]
fn a_forced_token_comes_first() {
    let model = bart();
    model.set("config.json", "forced_bos_token_id", json!(7));
    let forced = text(&model, "w4 w11", &["--max-tokens", "3"]);
    assert!(forced.starts_with("w7"), "{forced}");
    assert_eq!(text(&model, "w4 w11", &["--max-tokens", "1"]), "w7");
}

#[test]
fn the_positions_of_the_model_are_the_end() {
    let model = gpt2();
    model.set("config.json", "eos_token_id", json!(null));
    let prompt = words(vec![3; 78]);
    // Two more can be fed, and the last one is predicted.
    let (stdout, stderr) = generate(&model, &prompt, &[]);
    assert_eq!(stdout.split(' ').count(), 3, "{stdout}");
    assert!(stderr.contains("no more than 80 positions"), "{stderr}");
    let too_long = words(vec![3; 81]);
    refused(
        &["generate", "--model", model.arg(), "--prompt", &too_long],
        &["--prompt: 81 tokens, but the model has 80 positions"],
    );
    let (model, too_long) = (bart(), words(vec![3; 41]));
    refused(
        &["generate", "--model", model.arg(), "--prompt", &too_long],
        &["--prompt: 41 tokens, but the model has 40 positions"],
    );
}

#[test]
fn an_empty_prompt_is_the_first_token() {
    let model = gpt2();
    assert_eq!(text(&model, "", &["--max-tokens", "4"]), text(&model, "w0", &["--max-tokens", "4"]));
    model.set("config.json", "bos_token_id", json!(null));
    model.set("config.json", "eos_token_id", json!([9, 0]));
    assert_eq!(text(&model, "", &["--max-tokens", "4"]), text(&model, "w9", &["--max-tokens", "4"]));
    for (field, other) in [("bos_token_id", "eos_token_id"), ("eos_token_id", "bos_token_id")] {
        model.set("config.json", field, json!(5000));
        model.set("config.json", other, json!(null));
        let expected = format!("config.json: {field}: expected a token below 50, got 5000");
        refused(&["generate", "--model", model.arg(), "--prompt", ""], &["--prompt: ", &expected]);
    }
    model.set("config.json", "eos_token_id", json!(null));
    let empty = "the prompt is empty, and the model has no bos_token_id or eos_token_id";
    refused(&["generate", "--model", model.arg(), "--prompt", ""], &[empty]);
    // The library does not begin without a token either.
    for model in [gpt2(), bart()] {
        let generator = Generator::open(model.path()).unwrap();
        assert!(matches!(generator.begin(Context::serial(), &[], 4), Err(Error::EmptyPrompt)));
    }
}

#[test]
fn directories_that_do_not_fit_are_refused() {
    let refused = |model: &Model, expected: &[&str]| {
        refused(&["generate", "--model", model.arg(), "--prompt", "w1 w2"], expected);
    };
    refused(
        &Model::of("longformer-local-only", "longformer", 40),
        &["config.json", "expected \"gpt2\", \"openai-gpt\" or \"bart\", got longformer"],
    );
    for (field, value, expected) in [
        ("n_layer", json!(3), "no tensor transformer.h.2.attn.c_attn.weight"),
        ("vocab_size", json!(51), "wte.weight: expected shape [51, 48], got [50, 48]"),
        ("n_head", json!(0), "n_head: expected a divisor of the model size 48, got 0"),
        (
            "activation_function",
            json!("mish"),
            "activation_function: invalid value: string \"mish\", expected one of the activations",
        ),
        ("add_cross_attention", json!(true), "add_cross_attention: expected false"),
        ("tie_word_embeddings", json!(false), "no tensor lm_head.weight"),
        ("bos_token_id", json!("first"), "config.json"),
    ] {
        let model = gpt2();
        model.set("config.json", field, value);
        refused(&model, &[expected]);
    }
    for (field, value, expected) in [
        ("decoder_start_token_id", json!(40), "decoder_start_token_id: expected a token below 40, got 40"),
        ("forced_bos_token_id", json!(99), "forced_bos_token_id: expected a token below 40, got 99"),
        ("normalize_before", json!(true), "normalize_before: expected false"),
        ("tie_word_embeddings", json!(false), "tie_word_embeddings: expected true"),
        ("max_position_embeddings", json!(0), "embed_positions"),
    ] {
        let model = bart();
        model.set("config.json", field, value);
        refused(&model, &[expected]);
    }
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let model = gpt2();
        fs::remove_file(model.path().join(name)).unwrap();
        refused(&model, &[name, "No such file"]);
    }
    let model = gpt2();
    fs::write(model.path().join("generation_config.json"), "{").unwrap();
    refused(&model, &["generation_config.json"]);
}

#[test]
fn tokens_and_arguments_that_make_no_sense_are_refused() {
    let model = Model::of("gpt2-full", "gpt2", 60);
    refused(
        &["generate", "--model", model.arg(), "--prompt", "w1 w50"],
        &["--prompt: wte: index 50 at token 1"],
    );
    for (args, expected) in [
        (&["--max-tokens", "0"][..], "--max-tokens"),
        (&["--top-k", "0"], "--top-k"),
        (&["--seed", "1"], "--top-k"),
        (&["--top-k", "2", "--seed", "-1"], "-1"),
    ] {
        let args = [&["generate", "--model", model.arg(), "--prompt", "w1"][..], args].concat();
        refused(&args, &[expected]);
    }
    refused(&["generate", "--model", model.arg()], &["--prompt"]);
    model.lose_numbers();
    refused(&["generate", "--model", model.arg(), "--prompt", "w1"], &["a logit: not a number"]);
}
