//! A tiny model directory, and the program run on it.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A file or directory of the golden cases.
pub fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(name)
}

/// Runs the program with `input` on its standard input.
pub fn laneformer(args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_laneformer"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // The program may end without reading its input.
    let _ = child.stdin.take().expect("a pipe").write_all(input);
    child.wait_with_output().expect("the program ends")
}

/// Status, standard output and standard error.
pub fn parts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// A BERT of 96 elements and one layer with a tokenizer of the words `w0` to `w56`.
pub struct Model(TempDir);

impl Model {
    pub fn new() -> Model {
        let dir = tempfile::tempdir().expect("a directory");
        let case = golden("bert-no-pad-long");
        fs::copy(case.join("weights.safetensors"), dir.path().join("model.safetensors")).expect("weights");
        let model = Model(dir);
        let case: Value =
            serde_json::from_slice(&fs::read(case.join("case.json")).expect("a case")).expect("JSON");
        model.write_json("config.json", &case["config"]);
        model.write_json("tokenizer.json", &tokenizer());
        model.write_json("sentence_bert_config.json", &json!({ "max_seq_length": 8 }));
        model
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn arg(&self) -> &str {
        self.path().to_str().expect("UTF-8")
    }

    pub fn write_json(&self, name: &str, value: &Value) {
        fs::write(self.path().join(name), value.to_string()).expect("a file");
    }

    /// Replaces one field of a JSON file.
    pub fn set(&self, name: &str, field: &str, value: Value) {
        let path = self.path().join(name);
        let mut json: Value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
        json[field] = value;
        self.write_json(name, &json);
    }
}

fn tokenizer() -> Value {
    let mut vocab = json!({ "[CLS]": 0, "[SEP]": 1, "[UNK]": 2 });
    for i in 0..57 {
        vocab[format!("w{i}")] = json!(i + 3);
    }
    let special =
        |token: &str, id| (token.to_string(), json!({ "id": token, "ids": [id], "tokens": [token] }));
    let template = json!([
        { "SpecialToken": { "id": "[CLS]", "type_id": 0 } },
        { "Sequence": { "id": "A", "type_id": 0 } },
        { "SpecialToken": { "id": "[SEP]", "type_id": 0 } },
    ]);
    json!({
        "version": "1.0",
        // Truncation and padding that are to be ignored.
        "truncation": { "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 },
        "padding": {
            "strategy": { "Fixed": 16 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[CLS]",
        },
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": Value::Object([special("[CLS]", 0), special("[SEP]", 1)].into_iter().collect()),
        },
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" },
    })
}
