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

/// A directory with a tiny model.
pub struct Model(TempDir);

impl Model {
    /// A BERT of 96 elements and one layer with a tokenizer of the words `w0` to `w56`.
    pub fn new() -> Model {
        let model = Model::golden("bert-no-pad-long");
        model.write_json("tokenizer.json", &tokenizer());
        model.write_json("sentence_bert_config.json", &json!({ "max_seq_length": 8 }));
        model
    }

    /// The weights and the configuration of a golden case.
    fn golden(name: &str) -> Model {
        let dir = tempfile::tempdir().expect("a directory");
        let case = golden(name);
        fs::copy(case.join("weights.safetensors"), dir.path().join("model.safetensors")).expect("weights");
        let model = Model(dir);
        let case: Value =
            serde_json::from_slice(&fs::read(case.join("case.json")).expect("a case")).expect("JSON");
        model.write_json("config.json", &case["config"]);
        model
    }

    /// The same as a model of this type, with a tokenizer whose word `w7` is the token 7.
    pub fn of(name: &str, model_type: &str, words: usize) -> Model {
        let model = Model::golden(name);
        model.set("config.json", "model_type", json!(model_type));
        let vocab = (0..words).map(|i| (format!("w{i}"), json!(i)));
        model.write_json(
            "tokenizer.json",
            &json!({
                "version": "1.0",
                "added_tokens": [],
                "normalizer": null,
                "pre_tokenizer": { "type": "WhitespaceSplit" },
                "post_processor": null,
                "decoder": null,
                "model": { "type": "WordLevel", "vocab": Value::Object(vocab.collect()), "unk_token": "w0" },
            }),
        );
        model
    }

    /// Makes every weight a NaN.
    pub fn lose_numbers(&self) {
        let path = self.path().join("model.safetensors");
        let mut bytes = fs::read(&path).expect("a file");
        let (len, rest) = bytes.split_first_chunk_mut::<8>().expect("a header");
        rest[u64::from_le_bytes(*len) as usize..].fill(0xff);
        fs::write(path, bytes).expect("a file");
    }

    /// Makes some elements of a tensor NaN.
    pub fn lose_elements(&self, tensor: &str, elements: std::ops::Range<usize>) {
        let path = self.path().join("model.safetensors");
        let mut bytes = fs::read(&path).expect("a file");
        let (len, rest) = bytes.split_first_chunk_mut::<8>().expect("a header");
        let (header, data) = rest.split_at_mut(u64::from_le_bytes(*len) as usize);
        let header: Value = serde_json::from_slice(header).expect("JSON");
        let start = header[tensor]["data_offsets"][0].as_u64().expect("a tensor") as usize;
        data[start + 4 * elements.start..start + 4 * elements.end].fill(0xff);
        fs::write(path, bytes).expect("a file");
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

/// The words of tokens, for [`Model::of`].
pub fn words(ids: impl IntoIterator<Item = impl std::fmt::Display>) -> String {
    ids.into_iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ")
}

/// Status 2 and a message with all of `expected`.
pub fn refused(args: &[&str], expected: &[&str]) {
    let (status, _, stderr) = parts(&laneformer(args, b"w1\n"));
    assert_eq!(status, 2, "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{args:?}: {part:?} is not in: {stderr}");
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
