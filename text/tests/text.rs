//! Tokens to text, as they come.

use std::fs;

use laneformer_text::tokens::TextTokenizer;
use serde_json::{Value, json};

/// A tokenizer whose tokens are bytes: `é` is 0 and 1, `😀` is 2 to 5, `a` is 6, a space and `b` are 7, the end is 8.
fn bytes() -> TextTokenizer {
    let dir = tempfile::tempdir().expect("a directory");
    let names = ["Ã", "©", "ð", "Ł", "ĺ", "Ģ", "a", "Ġb", "<end>"];
    let vocab: serde_json::Map<_, _> = (0..).zip(names).map(|(id, name)| (name.into(), json!(id))).collect();
    let end = json!({
        "id": 8, "content": "<end>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "vocab": Value::Object(vocab), "merges": [] },
    });
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).expect("a file");
    TextTokenizer::open(dir.path()).expect("a tokenizer")
}

/// What each token adds.
fn decoded(ids: &[u32]) -> Vec<Option<String>> {
    let tokenizer = bytes();
    let mut decoder = tokenizer.decoder();
    ids.iter().map(|&id| decoder(id).expect("text")).collect()
}

#[test]
fn a_character_comes_whole_or_not_at_all() {
    let some = |text: &str| Some(text.to_string());
    assert_eq!(decoded(&[6, 0, 1, 7]), [some("a"), None, some("é"), some(" b")]);
    assert_eq!(decoded(&[2, 3, 4, 5, 6]), [None, None, None, some("😀"), some("a")]);
    assert_eq!(decoded(&[6, 2, 3, 4]), [some("a"), None, None, None]);
    // What never becomes a character is replaced as soon as the next one shows it.
    assert_eq!(decoded(&[6, 0, 6]), [some("a"), None, some("\u{fffd}a")]);
}

#[test]
fn special_and_unknown_tokens_have_no_text() {
    assert_eq!(decoded(&[8, 6, 8, 99, 7]), [None, Some("a".into()), None, None, Some(" b".into())]);
}

#[test]
fn texts_are_tokens_and_back() {
    let tokenizer = bytes();
    let tokens = tokenizer.encode("aé😀").unwrap();
    assert_eq!(tokens.ids, [6, 0, 1, 2, 3, 4, 5]);
    let text: String = decoded(&tokens.ids).into_iter().flatten().collect();
    assert_eq!(text, "aé😀");
}

#[test]
fn texts_have_the_same_tokens_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let model =
        json!({ "type": "BPE", "dropout": 0.5, "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": ["a b"] });
    fs::write(dir.path().join("tokenizer.json"), json!({ "version": "1.0", "model": model }).to_string())
        .unwrap();
    let tokenizer = TextTokenizer::open(dir.path()).unwrap();
    // One word after another: the tokenizer remembers those that it has seen.
    for words in 1..50 {
        assert_eq!(tokenizer.encode(&"ab".repeat(words)).unwrap().ids, vec![2; words]);
    }
}

#[test]
fn a_decoder_that_panics_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = json!({
        "version": "1.0",
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "a" }, "content": "é" },
            { "type": "Strip", "content": "é", "start": 1, "stop": 1 },
        ] },
        "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [] },
    });
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tokenizer = TextTokenizer::open(dir.path()).unwrap();
    let error = tokenizer.decoder()(0).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: malformed: "), "{error}");
}
