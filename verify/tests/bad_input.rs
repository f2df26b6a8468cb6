//! Configurations and checkpoints that do not fit: every field of every golden case set to values that nobody means, and every
//! tensor missing or of another shape. There is an error, or what is said is possible; there is never a panic.

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use common::golden;
use laneformer::Context;
use laneformer_verify::{Outcome, Verdict, verify};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The golden cases of models, copied to where they can be changed.
fn cases() -> Vec<(String, TempDir)> {
    let case = |path: PathBuf| {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["case.json", "io.safetensors", "weights.safetensors"] {
            fs::copy(path.join(name), dir.path().join(name)).expect("a copy");
        }
        (path.file_name().expect("a name").to_string_lossy().into_owned(), dir)
    };
    let dirs =
        fs::read_dir(golden("")).expect("the golden cases").map(|entry| entry.expect("an entry").path());
    let mut dirs: Vec<_> = dirs.filter(|path| path.join("case.json").exists()).collect();
    dirs.retain(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("op-")));
    dirs.sort();
    dirs.into_iter().map(case).collect()
}

/// What keeps the case from being computed, if anything does; a panic is the test's failure.
fn run(what: &str, dir: &Path) -> Option<String> {
    let verdicts = catch_unwind(AssertUnwindSafe(|| verify(Context::serial(), dir)));
    match verdicts.unwrap_or_else(|_| panic!("{what}: a panic")) {
        Err(error) => Some(error.to_string()),
        Ok(verdicts) => verdicts.into_iter().find_map(|verdict: Verdict| match verdict.outcome {
            Outcome::Missing(why) => Some(why),
            Outcome::Computed { .. } => None,
        }),
    }
}

/// The places of all fields, as JSON pointers.
fn fields(value: &Value, at: &str, found: &mut Vec<String>) {
    let below: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), value)).collect(),
        Value::Array(values) => values.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => vec![],
    };
    for (name, value) in below {
        let at = format!("{at}/{name}");
        fields(value, &at, found);
        found.push(at);
    }
}

/// The header of a safetensors file as JSON, and the bytes behind it.
fn split(file: &[u8]) -> (Value, &[u8]) {
    let (len, rest) = file.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
    (serde_json::from_slice(header).unwrap(), data)
}

fn join(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// How the names of fields end that must be numbers other than 0.
const DIMENSIONS: &[&str] = &[
    "size",
    "positions",
    "embeddings",
    "embd",
    "inner",
    "dim",
    "d_model",
    "d_ff",
    "d_head",
    "heads",
    "nhead",
    "n_head",
    "feedforward",
    "num_centroids",
    "num_channels",
    "num_answers",
    "num_hidden_layers",
    "/n_layer",
    "decoder_layers",
];

#[test]
fn no_configuration_makes_a_model_panic() {
    let numbers = [json!(0), json!(1), json!(7), json!(1u64 << 32), json!(u64::MAX), json!(-1), json!(1e300)];
    let values = [&numbers[..], &[json!(null), json!("other"), json!({})]].concat();
    for (name, dir) in cases() {
        let path = dir.path().join("case.json");
        let original: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let mut pointers = vec![];
        fields(&original["config"], "/config", &mut pointers);
        for pointer in pointers {
            let is_dimension = DIMENSIONS.iter().any(|dimension| pointer.ends_with(dimension));
            let is_used = !pointer.ends_with("_config/projection_dim");
            for value in &values {
                // GPT-2's way to say four times the width.
                let is_used = is_used && !(value.is_null() && pointer.ends_with("n_inner"));
                let mut case = original.clone();
                *case.pointer_mut(&pointer).unwrap() = value.clone();
                fs::write(&path, case.to_string()).unwrap();
                let what = format!("{name}: {pointer} = {value}");
                let refused = run(&what, dir.path()).is_some();
                let is_possible = value.as_u64().is_some_and(|n| n > 0 && n < u64::MAX);
                assert!(refused || is_possible || !is_dimension || !is_used, "{what} is not refused");
            }
        }
    }
}

/// Tensors that a checkpoint may lack.
const OPTIONAL: &[&str] = &["final_logits_bias", "pooler.dense.weight"];

#[test]
fn every_tensor_is_asked_for_by_name_shape_and_type() {
    for (name, dir) in cases() {
        let path = dir.path().join("weights.safetensors");
        let file = fs::read(&path).unwrap();
        let (original, data) = split(&file);
        for tensor in original.as_object().unwrap().keys().filter(|name| *name != "__metadata__") {
            let (mut missing, mut other_shape, mut other_type) =
                (original.clone(), original.clone(), original.clone());
            let taken = missing.as_object_mut().unwrap().remove(tensor).unwrap();
            missing[format!("extra.{tensor}")] = taken;
            other_shape[tensor]["shape"].as_array_mut().unwrap().push(json!(1));
            other_type[tensor]["dtype"] = json!("I32");
            for (how, header) in [("missing", missing), ("shape", other_shape), ("type", other_type)] {
                fs::write(&path, join(&header, data)).unwrap();
                let what = format!("{name}: {tensor} {how}");
                let why = run(&what, dir.path());
                // Without its prefix, or by what it is part of, where the other spelling of the names was looked for.
                let bare = tensor.trim_start_matches("bert.");
                let names = [bare, bare.rsplit_once('.').map_or(bare, |(parent, _)| parent)];
                let is_named = why.as_ref().is_some_and(|why| names.iter().any(|name| why.contains(name)));
                let is_optional =
                    how == "missing" && OPTIONAL.iter().any(|optional| tensor.ends_with(optional));
                assert!(is_named || is_optional, "{what}: {why:?}");
            }
        }
    }
}
