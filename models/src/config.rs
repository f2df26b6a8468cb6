//! Configuration files in the terms of Hugging Face.

use std::path::Path;

use laneformer::Activation;
use serde::Deserializer;
use serde::de::{DeserializeOwned, Error as _};

use crate::{Error, Result};

/// Reads a JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let mut json = serde_json::Deserializer::from_slice(&text);
    let read = from_json(path, &mut json)?;
    json.end().map_err(Error::json(path))?;
    Ok(read)
}

/// What parsed JSON says; `path` is for messages.
pub fn from_value<T: DeserializeOwned>(path: &Path, json: serde_json::Value) -> Result<T> {
    from_json(path, json)
}

fn from_json<'a, T: DeserializeOwned>(
    path: &Path,
    json: impl Deserializer<'a, Error = serde_json::Error>,
) -> Result<T> {
    serde_path_to_error::deserialize(json).map_err(|error| {
        let field = error.path().to_string();
        let reason = error.into_inner();
        // A dot is the whole.
        let reason =
            if field == "." { reason } else { serde_json::Error::custom(format!("{field}: {reason}")) };
        Error::json(path)(reason)
    })
}

/// As [`read_json`], but `None` if there is no such file.
pub fn read_json_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}

/// The `model_type` of the `config.json` in a directory, if it has one.
pub fn model_type(dir: &Path) -> Result<Option<String>> {
    let config: serde_json::Value = read_json(&dir.join("config.json"))?;
    Ok(config.get("model_type").and_then(|model_type| model_type.as_str()).map(String::from))
}

/// The activation that a configuration names.
pub fn activation(path: &Path, field: &'static str, name: &str) -> Result<Activation> {
    match name {
        "relu" => Ok(Activation::Relu),
        "gelu" => Ok(Activation::GeluErf),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "quick_gelu" => Ok(Activation::QuickGelu),
        "silu" | "swish" => Ok(Activation::Silu),
        _ => Err(Error::config(path, field, "relu, gelu, gelu_new, quick_gelu or silu", name)),
    }
}

/// `n_heads` divides `d_model`, and neither is zero.
pub(crate) fn check_heads(path: &Path, field: &'static str, d_model: usize, n_heads: usize) -> Result<()> {
    if d_model > 0 && n_heads > 0 && d_model.is_multiple_of(n_heads) {
        return Ok(());
    }
    Err(Error::config(path, field, format!("a divisor of the model size {d_model}"), n_heads))
}
