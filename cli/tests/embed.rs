//! `laneformer embed` on a tiny model: what it writes, and how it refuses bad input.

mod common;

use std::fs;

use common::{Model, golden, laneformer, parts, words};
use laneformer::Context;
use laneformer_models::config::open;
use laneformer_models::longformer::Longformer;
use laneformer_models::{Batch, Checkpoint, Scratch};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// The embeddings of JSON lines, whose indices must ascend from 0.
fn embeddings(stdout: &str) -> Vec<Vec<f32>> {
    let embedding = |(index, line): (usize, &str)| {
        let record: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(record["index"], index);
        let embedding = record["embedding"].as_array().expect("an array");
        embedding.iter().map(|x| x.as_f64().expect("a number") as f32).collect()
    };
    stdout.lines().enumerate().map(embedding).collect()
}

#[test]
fn json_lines_come_in_order_and_have_length_one() {
    let model = Model::new();
    let args = ["embed", "--model", model.arg(), "--threads", "1"];
    let (status, stdout, stderr) = parts(&laneformer(&args, b"w1 w2 w3\n\nw4\nw1 w2 w3"));
    assert_eq!(status, 0, "{stderr}");
    let embeddings = embeddings(&stdout);
    assert_eq!(embeddings.len(), 4);
    for embedding in &embeddings {
        assert_eq!(embedding.len(), 96);
        let length = embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-6, "{length}");
    }
    assert_eq!(embeddings[0], embeddings[3]);
    assert_ne!(embeddings[0], embeddings[1]);
    assert!(stderr.contains("4 sentences, 15 tokens"), "{stderr}");
    assert!(stderr.contains("sentences/s") && stderr.contains("tokens/s"), "{stderr}");
}

#[test]
fn line_ends_of_either_kind_and_threads_change_nothing() {
    let model = Model::new();
    let run = |input: &[u8], threads| {
        parts(&laneformer(&["embed", "--model", model.arg(), "--threads", threads], input)).1
    };
    let expected = run(b"w1 w2\nw3\n", "1");
    assert_eq!(expected.lines().count(), 2);
    assert_eq!(run(b"w1 w2\r\nw3", "1"), expected);
    assert_eq!(run(b"w1 w2\nw3\n", "3"), expected);
    assert_eq!(run(b"", "1"), "");
}

#[test]
fn many_lines_go_through_many_batches() {
    let model = Model::new();
    let input: String = (0..2000).map(|i| format!("w{} w{}\n", i % 57, i % 5)).collect();
    let path = model.path().join("input.txt");
    fs::write(&path, &input).unwrap();
    let args = ["embed", "--model", model.arg(), "--input", path.to_str().unwrap()];
    let (status, stdout, stderr) = parts(&laneformer(&args, b""));
    assert_eq!(status, 0, "{stderr}");
    let embeddings = embeddings(&stdout);
    assert_eq!(embeddings.len(), 2000);
    // The sentences repeat after 57 * 5 lines; their neighbours in the batch are others.
    assert_eq!(embeddings[..285], embeddings[285..570]);
}

#[test]
fn a_safetensors_file_holds_the_same_numbers() {
    let model = Model::new();
    let output = model.path().join("out.safetensors");
    fs::write(&output, "what was there before").unwrap();
    let input = b"w1\nw2 w3\n\n";
    let args = ["embed", "--model", model.arg()];
    let (_, stdout, _) = parts(&laneformer(&args, input));
    let with_output = [&args[..], &["--output", output.to_str().unwrap()]].concat();
    let before = fs::read_dir(model.path()).unwrap().count();
    let (status, nothing, stderr) = parts(&laneformer(&with_output, input));
    assert_eq!((status, nothing.as_str()), (0, ""), "{stderr}");
    assert_eq!(fs::read_dir(model.path()).unwrap().count(), before, "a temporary file is left");

    let data = fs::read(&output).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let tensor = file.tensor("embeddings").unwrap();
    assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[3, 96][..]));
    let rows = tensor.data().chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
    assert_eq!(rows.collect::<Vec<_>>(), embeddings(&stdout).concat());
}

#[test]
fn truncation_is_noted_once() {
    let model = Model::new();
    let long = "w1 w2 w3 w4 w5 w6 w7 w8 w9";
    let input = format!("{long}\n{long} w10\nw1 w2 w3 w4 w5 w6\n");
    let (status, stdout, stderr) = parts(&laneformer(&["embed", "--model", model.arg()], input.as_bytes()));
    assert_eq!(status, 0, "{stderr}");
    let embeddings = embeddings(&stdout);
    assert_eq!(embeddings[0], embeddings[1], "the first six words and the special tokens are left of both");
    assert_eq!(embeddings[0], embeddings[2]);
    assert_eq!(stderr.matches("truncated").count(), 1, "{stderr}");
    assert!(stderr.contains("2 of 3 sentences truncated at 8 tokens"), "{stderr}");
}

#[test]
fn special_tokens_are_never_cut_off() {
    let model = Model::new();
    model.set("sentence_bert_config.json", "max_seq_length", json!(1));
    refused(&model, &["sentence_bert_config.json", "max_seq_length", "2 special tokens", "got 1"]);
    model.set("sentence_bert_config.json", "max_seq_length", json!(2));
    let (status, stdout, stderr) = parts(&laneformer(&["embed", "--model", model.arg()], b"w1\n\n"));
    assert_eq!(status, 0, "{stderr}");
    let embeddings = embeddings(&stdout);
    assert_eq!(embeddings[0], embeddings[1]);
}

/// Status 2, a message with all of `expected`, and nothing on standard output.
fn refused(model: &Model, expected: &[&str]) {
    let (status, stdout, stderr) = parts(&laneformer(&["embed", "--model", model.arg()], b"w1\n"));
    assert_eq!((status, stdout.as_str()), (2, ""), "{stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

#[test]
fn files_that_are_not_there_are_named() {
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let model = Model::new();
        fs::remove_file(model.path().join(name)).unwrap();
        refused(&model, &[name, "No such file"]);
    }
}

#[test]
fn broken_files_are_named() {
    for (name, expected) in [
        ("config.json", "line 1 column 3"),
        ("tokenizer.json", "tokenizer.json"),
        ("sentence_bert_config.json", "line 1 column 3"),
        ("model.safetensors", "not a complete safetensors file"),
    ] {
        let model = Model::new();
        fs::write(model.path().join(name), "{ this is not it").unwrap();
        refused(&model, &[name, expected]);
    }
    let model = Model::new();
    let weights = model.path().join("model.safetensors");
    let data = fs::read(&weights).unwrap();
    fs::write(&weights, &data[..data.len() / 2]).unwrap();
    refused(&model, &["model.safetensors", "not a complete safetensors file"]);
}

#[test]
fn another_architecture_is_refused() {
    let model = Model::new();
    model.write_json("config.json", &json!({ "model_type": "gpt2", "n_embd": 96 }));
    refused(&model, &["config.json", "model_type", "bert", "gpt2"]);
    let model = Model::new();
    model.set("config.json", "hidden_act", json!("mish"));
    refused(&model, &["config.json", "hidden_act", "mish"]);
    let model = Model::new();
    model.write_json(
        "modules.json",
        &json!([{ "type": "sentence_transformers.models.Dense", "path": "2_Dense" }]),
    );
    refused(&model, &["modules.json", "Dense"]);
    let model = Model::new();
    model
        .write_json("modules.json", &json!([{ "type": "sentence_transformers.models.Pooling", "path": "" }]));
    model.set("config.json", "pooling_mode_cls_token", json!(true));
    refused(&model, &["config.json", "pooling_mode_cls_token"]);
    model.set("config.json", "pooling_mode_cls_token", json!(false));
    model.set("config.json", "pooling_mode", json!("cls"));
    refused(&model, &["config.json", "pooling_mode", "\"cls\""]);
    let model = Model::new();
    let prompts = json!({ "prompts": { "query": "query: ", "none": "" }, "default_prompt_name": "query" });
    model.write_json("config_sentence_transformers.json", &prompts);
    refused(&model, &["config_sentence_transformers.json", "default_prompt_name", "query"]);
    model.set("config_sentence_transformers.json", "default_prompt_name", json!("none"));
    let (status, _, stderr) = parts(&laneformer(&["embed", "--model", model.arg()], b"w1\n"));
    assert_eq!(status, 0, "{stderr}");
}

#[test]
fn poolings_that_are_not_followed_are_refused() {
    for (field, value) in [
        ("pooling_mode_mean_tokens", json!(false)),
        ("pooling_mode_cls_token", json!("true")),
        ("pooling_mode_max_tokens", json!(1)),
    ] {
        let model = Model::new();
        model.write_json("modules.json", &json!([{ "type": "Pooling", "path": "pooling" }]));
        refused(&model, &["pooling/config.json", "No such file"]);
        fs::create_dir(model.path().join("pooling")).unwrap();
        model.write_json("pooling/config.json", &json!({ field: value }));
        refused(
            &model,
            &["pooling/config.json: pooling mode: expected pooling_mode_mean_tokens alone", field],
        );
    }
    let model = Model::new();
    for (name, value, expected) in [
        ("config_sentence_transformers.json", json!({ "default_prompt_name": 5 }), "default_prompt_name"),
        ("config_sentence_transformers.json", json!({ "default_prompt_name": "x" }), "got x"),
        ("sentence_bert_config.json", json!([]), "expected a map"),
    ] {
        model.write_json(name, &value);
        refused(&model, &[name, expected]);
        fs::remove_file(model.path().join(name)).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn links_that_lead_nowhere_are_no_absent_files() {
    for name in ["sentence_bert_config.json", "modules.json", "config_sentence_transformers.json"] {
        let model = Model::new();
        let path = model.path().join(name);
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink(model.path().join("nowhere"), path).unwrap();
        refused(&model, &[name, "No such file"]);
    }
}

/// The tokenizer panics over some of these.
#[test]
fn malformed_tokenizers_are_named() {
    for (field, value) in [
        (
            "post_processor",
            json!({ "type": "TemplateProcessing", "single": "[X] $A", "pair": "$A $B", "special_tokens": {} }),
        ),
        ("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "" })),
        ("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        ("model", json!({ "type": "BPE", "vocab": { "w": 0, "1": 1 }, "merges": ["w 1"] })),
    ] {
        let model = Model::new();
        model.set("tokenizer.json", field, value);
        let (status, stdout, stderr) = parts(&laneformer(&["embed", "--model", model.arg()], b"w1\n"));
        assert_eq!((status, stdout.as_str()), (2, ""), "{field}: {stderr}");
        assert!(stderr.contains("tokenizer.json: ") && !stderr.contains("panicked"), "{field}: {stderr}");
    }
}

/// Directories of newer versions of sentence-transformers have the length in the configuration of the tokenizer.
#[test]
fn the_tokenizer_says_where_sentences_are_cut_off() {
    let model = Model::new();
    fs::remove_file(model.path().join("sentence_bert_config.json")).unwrap();
    for (max, note) in [(json!(5), "1 sentences truncated at 5 tokens"), (json!(1e30), "")] {
        model.write_json("tokenizer_config.json", &json!({ "model_max_length": max }));
        let output = laneformer(&["embed", "--model", model.arg()], b"w1 w2 w3 w4 w5 w6\n");
        let (status, _, stderr) = parts(&output);
        assert_eq!(status, 0, "{stderr}");
        assert!(stderr.contains(note) && stderr.contains("truncated") != note.is_empty(), "{stderr}");
    }
}

#[cfg(unix)]
#[test]
fn links_lead_to_what_is_written_and_what_is_read_is_not_overwritten() {
    let model = Model::new();
    let (input, file, link) =
        (model.path().join("in.txt"), model.path().join("file.st"), model.path().join("link.st"));
    fs::write(&input, "w1\n").unwrap();
    fs::write(&file, "before").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let embed = |output: &std::path::Path| {
        let args = ["embed", "--model", model.arg(), "--input", input.to_str().unwrap(), "--output"];
        parts(&laneformer(&[&args[..], &[output.to_str().unwrap()]].concat(), b""))
    };
    assert_eq!(embed(&link).0, 0);
    let socket = model.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(link.is_symlink() && fs::read(&file).unwrap() != b"before");
    let [weights, config, tokenizer] =
        ["model.safetensors", "config.json", "tokenizer.json"].map(|name| model.path().join(name));
    for output in [input.clone(), weights, config, tokenizer, socket, model.path().join("new.st/")] {
        let (status, _, stderr) = embed(&output);
        assert_eq!(status, 2, "{stderr}");
        assert!(stderr.contains(output.to_str().unwrap()), "{stderr}");
    }
    assert_eq!(fs::read(&input).unwrap(), b"w1\n");
}

#[test]
fn tensors_that_are_missing_or_of_another_shape_are_named() {
    let model = Model::new();
    model.set("config.json", "num_hidden_layers", json!(2));
    refused(&model, &["model.safetensors", "no tensor encoder.layer.1.attention.self.query.weight"]);
    let model = Model::new();
    model.set("config.json", "intermediate_size", json!(53));
    refused(
        &model,
        &["model.safetensors", "encoder.layer.0.intermediate.dense.weight", "[53, 96]", "[52, 96]"],
    );
}

#[test]
fn a_bad_line_is_named_and_the_lines_before_it_are_written() {
    let model = Model::new();
    let args = ["embed", "--model", model.arg()];
    let (status, stdout, stderr) = parts(&laneformer(&args, b"w1\nw2 w3\nw4 \xff w5\nw6\n"));
    assert_eq!(status, 2, "{stderr}");
    assert_eq!(embeddings(&stdout).len(), 2);
    assert!(stderr.contains("standard input: line 3") && stderr.contains("not UTF-8"), "{stderr}");

    // Without a length to truncate at, a line longer than the 80 positions is bad input.
    fs::remove_file(model.path().join("sentence_bert_config.json")).unwrap();
    let (fits, too_long) = ("w1 ".repeat(78), "w1 ".repeat(79));
    let input = model.path().join("input.txt");
    fs::write(&input, format!("{fits}\n{too_long}\n{fits}\n")).unwrap();
    let output = model.path().join("out.safetensors");
    let files = ["--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()];
    let (status, _, stderr) = parts(&laneformer(&[&args[..], &files].concat(), b""));
    assert_eq!(status, 2, "{stderr}");
    assert!(stderr.contains("input.txt: line 2: 81 tokens, but the model has 80 positions"), "{stderr}");
    let data = fs::read(&output).unwrap();
    assert_eq!(SafeTensors::deserialize(&data).unwrap().tensor("embeddings").unwrap().shape(), [1, 96]);
}

#[test]
fn a_tokenizer_of_another_model_is_refused_at_its_line() {
    let model = Model::new();
    let mut tokenizer: Value =
        serde_json::from_slice(&fs::read(model.path().join("tokenizer.json")).unwrap()).unwrap();
    tokenizer["model"]["vocab"]["foreign"] = json!(60);
    model.write_json("tokenizer.json", &tokenizer);
    let (status, stdout, stderr) =
        parts(&laneformer(&["embed", "--model", model.arg()], b"w1\nw2 foreign\n"));
    assert_eq!((status, stdout.lines().count()), (2, 1), "{stderr}");
    assert!(stderr.contains("line 2: word_embeddings: index 60"), "{stderr}");
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let model = Model::new();
    let missing = model.path().join("nowhere/out.safetensors");
    for (args, expected) in [
        (vec!["--isa", "mmx"], "scalar, portable, avx2, avx512"),
        (vec!["--threads", "0"], "--threads"),
        (vec!["--input", "nowhere.txt"], "nowhere.txt"),
        (vec!["--input", model.arg()], model.arg()),
        (vec!["--output", missing.to_str().unwrap()], "nowhere/out.safetensors"),
        (vec!["--output", model.arg()], model.arg()),
        (vec!["--nonsense"], "--nonsense"),
    ] {
        let args = [&["embed", "--model", model.arg()][..], &args].concat();
        let (status, stdout, stderr) = parts(&laneformer(&args, b"w1\n"));
        assert_eq!((status, stdout.as_str()), (2, ""), "{args:?} {stderr}");
        assert!(stderr.contains(expected), "{expected:?} is not in: {stderr}");
    }
    let case = golden("bert-right-pad");
    let (status, _, stderr) = parts(&laneformer(&["embed", "--model", case.to_str().unwrap()], b""));
    assert_eq!(status, 2);
    assert!(stderr.contains("config.json"), "{stderr}");
}

/// What the program writes for these sentences.
fn embed(model: &Model, input: &str) -> (Vec<Vec<f32>>, String) {
    let (status, stdout, stderr) = parts(&laneformer(&["embed", "--model", model.arg()], input.as_bytes()));
    assert_eq!(status, 0, "{stderr}");
    (embeddings(&stdout), stderr)
}

#[test]
fn clip_embeds_texts_as_the_golden_case_does() {
    let model = Model::of("clip-quick-gelu", "clip", 40);
    let io = Checkpoint::open(&golden("clip-quick-gelu/io.safetensors")).unwrap();
    let (ids, expected) = (io.i64("in.input_ids").unwrap(), io.f32("out.text_embeds").unwrap());
    // Padding, 0, is behind the end token.
    let texts = ids.chunks(13).map(|ids| words(ids.iter().filter(|id| **id != 0)) + "\n");
    let (embeddings, _) = embed(&model, &texts.collect::<String>());
    for (actual, expected) in embeddings.concat().iter().zip(&*expected) {
        assert!((actual - expected).abs() < 1e-6, "{actual} {expected}");
    }

    // The same of a directory with the texts' half alone.
    let mut config: Value =
        serde_json::from_slice(&fs::read(model.path().join("config.json")).unwrap()).unwrap();
    config["text_config"]["model_type"] = json!("clip_text_model");
    model.write_json("config.json", &config["text_config"]);
    assert_eq!(embed(&model, &words([38, 26, 11, 5, 19, 3, 39])).0, embeddings[..1]);
}

#[test]
fn clip_cuts_texts_off_at_its_positions_and_keeps_their_ends() {
    let model = Model::of("clip-quick-gelu", "clip", 40);
    let around = json!({ "type": "BertProcessing", "sep": ["w39", 39], "cls": ["w38", 38] });
    model.set("tokenizer.json", "post_processor", around);
    let (embeddings, stderr) = embed(&model, &format!("{}\n{}", words(vec![5; 12]), words(vec![5; 30])));
    assert_eq!(embeddings[0], embeddings[1]);
    assert!(stderr.contains("1 of 2 sentences truncated at 14 tokens"), "{stderr}");
    assert_ne!(embed(&model, &words(vec![5; 11])).0[0], embeddings[0]);
}

#[test]
fn longformer_embeds_with_its_windows_alone() {
    let model = Model::of("longformer-local-only", "longformer", 40);
    let ids = [12u32, 8, 37, 19, 25, 1, 27, 30, 39, 29, 4, 19, 11, 7, 20, 7, 16, 16, 18, 30, 11, 31];
    let (embeddings, _) = embed(&model, &format!("{}\n{}", words(ids), words(&ids[..3])));

    let longformer = open(model.path(), Longformer::load).unwrap();
    for (embedding, ids) in embeddings.iter().zip([&ids[..], &ids[..3]]) {
        let (n, types, positions) = (ids.len(), vec![0; ids.len()], longformer.positions(ids));
        let batch = Batch { ids, type_ids: &types, positions: &positions, offsets: &[0, n], is_real: None };
        let (none, mut scratch) = (vec![false; n], Scratch::default());
        let hidden = longformer.forward(&mut scratch.with(Context::serial()), batch, &none).unwrap();
        let mean: Vec<f64> =
            (0..36).map(|c| hidden.chunks(36).map(|row| f64::from(row[c])).sum::<f64>()).collect();
        let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
        for (actual, mean) in embedding.iter().zip(mean) {
            assert!((f64::from(*actual) - mean / length).abs() < 1e-6);
        }
    }
    // 80 rows of positions, of which the first two are before the first token.
    assert_eq!(embed(&model, &words(vec![5; 78])).0.len(), 1);
    let args = ["embed", "--model", model.arg()];
    let (status, _, stderr) = parts(&laneformer(&args, words(vec![5; 79]).as_bytes()));
    assert_eq!(status, 2);
    assert!(stderr.contains("line 1: 79 tokens, but the model has 78 positions"), "{stderr}");
    model.set("config.json", "pad_token_id", json!(79));
    refused(&model, &["config.json: pad_token_id: expected less than the positions but one, got 79"]);
}

#[test]
fn a_sentence_without_an_embedding_is_named_and_those_before_it_are_written() {
    let model = Model::new();
    // The row of `w7`, token 10.
    model.lose_elements("embeddings.word_embeddings.weight", 10 * 96..11 * 96);
    let (status, stdout, stderr) =
        parts(&laneformer(&["embed", "--model", model.arg()], b"w1\nw2\nw7\nw3\n"));
    assert_eq!(status, 2, "{stderr}");
    assert!(stderr.contains("standard input: line 3: an embedding: not a number"), "{stderr}");
    let expected = parts(&laneformer(&["embed", "--model", model.arg()], b"w1\nw2\n")).1;
    assert_eq!((stdout.lines().count(), stdout), (2, expected));

    let clip = Model::of("clip-quick-gelu", "clip", 40);
    let (status, stdout, stderr) = parts(&laneformer(&["embed", "--model", clip.arg()], b"w1\n\nw3\n"));
    assert_eq!((status, stdout.lines().count()), (2, 1), "{stderr}");
    assert!(stderr.contains("line 2: no tokens"), "{stderr}");
}

#[test]
fn nothing_written_is_no_reason_to_replace_a_file() {
    let model = Model::new();
    let [input, output] = ["in.txt", "out.st"].map(|name| model.path().join(name));
    fs::write(&input, b"\xff\nw1\n").unwrap();
    fs::write(&output, "before").unwrap();
    for input in [&input, model.path()] {
        let args = ["embed", "--model", model.arg(), "--input", input.to_str().unwrap(), "--output"];
        let (status, _, stderr) = parts(&laneformer(&[&args[..], &[output.to_str().unwrap()]].concat(), b""));
        assert_eq!(status, 2, "{stderr}");
        assert!(stderr.contains(input.to_str().unwrap()), "{stderr}");
        assert_eq!(fs::read(&output).unwrap(), b"before");
    }
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_first_line() {
    let model = Model::new();
    let run = |input: &[u8]| parts(&laneformer(&["embed", "--model", model.arg()], input)).1;
    assert_eq!(run(b"\xef\xbb\xbfw1\nw2\n"), run(b"w1\nw2\n"));
}

#[cfg(target_os = "linux")]
#[test]
fn messages_that_nobody_reads_change_nothing() {
    let model = Model::new();
    for (dir, status) in [(model.arg(), 0), ("nowhere", 2)] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_laneformer"));
        command.args(["embed", "--model", dir]).stdin(std::process::Stdio::null()).stderr(full);
        assert_eq!(command.output().unwrap().status.code(), Some(status));
    }
}

#[test]
fn weights_that_are_no_numbers_are_an_error_and_nothing_is_written() {
    for model in [Model::new(), Model::of("clip-quick-gelu", "clip", 40)] {
        model.lose_numbers();
        let (status, stdout, stderr) = parts(&laneformer(&["embed", "--model", model.arg()], b"w1\n"));
        assert_eq!((status, &stdout[..]), (2, ""), "{stderr}");
        assert!(stderr.contains("an embedding: not a number"), "{stderr}");
    }
}
