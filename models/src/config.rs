//! Configuration files in the terms of Hugging Face.

use std::path::Path;

use laneformer::{Activation, Heads};
use serde::de::{DeserializeOwned, Error as _, Unexpected};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::{Error, Result};

/// Reads a JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let mut json = serde_json::Deserializer::from_slice(&text);
    let read = from_value(path, &mut json)?;
    json.end().map_err(Error::json(path))?;
    Ok(read)
}

/// As [`read_json`], of an object: a list of a struct's fields is none.
pub fn read_object<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let fields: serde_json::Map<String, Value> = read_json(path)?;
    from_value(path, Value::from(fields))
}

/// What JSON says, such as a `&Value`; `path` is for messages, which name the field.
pub fn from_value<'a, T: DeserializeOwned>(
    path: &Path,
    json: impl Deserializer<'a, Error = serde_json::Error>,
) -> Result<T> {
    serde_path_to_error::deserialize(json).map_err(|error| {
        let place = error.path().to_string();
        // A dot is the whole, a question mark where nothing could be read.
        let field = place.trim_end_matches(['.', '?']);
        let reason = error.into_inner();
        let reason =
            if field.is_empty() { reason } else { serde_json::Error::custom(format!("{field}: {reason}")) };
        Error::json(path)(reason)
    })
}

/// A model from the `config.json` and the `model.safetensors` of a directory.
pub fn open<M>(dir: &Path, load: impl FnOnce(&Path, &Value, &Checkpoint) -> Result<M>) -> Result<M> {
    let path = dir.join("config.json");
    load(&path, &read_json(&path)?, &Checkpoint::open(&dir.join("model.safetensors"))?)
}

/// The `model_type` of the `config.json` of a directory, if it has one.
pub fn model_type(dir: &Path) -> Result<Option<String>> {
    let json: Value = read_json(&dir.join("config.json"))?;
    Ok(json.get("model_type").and_then(Value::as_str).map(String::from))
}

/// A configuration, or none, with defaults for what it does not have.
pub fn with_defaults(json: Option<&Value>, mut defaults: Value) -> Value {
    match (json, &mut defaults) {
        (None | Some(Value::Null), _) => defaults,
        (Some(Value::Object(fields)), Value::Object(all)) => {
            all.extend(fields.clone());
            defaults
        }
        (Some(other), _) => other.clone(),
    }
}

/// A model's configuration: what Hugging Face leaves out of a file is as its classes have it.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, json: &Value, defaults: Value) -> Result<T> {
    from_value(path, with_defaults(Some(json), defaults))
}

/// Fields of which this crate follows one value. They may be absent, or null (Python's `None`) unless that value is true: `None` counts as false.
pub(crate) fn only(path: &Path, json: &Value, fields: &[(&'static str, Value)]) -> Result<()> {
    fields.iter().try_for_each(|(field, followed)| match json.get(field) {
        Some(other) if other != followed && (!other.is_null() || *followed == true) => {
            Err(Error::config(path, field, followed.to_string(), other))
        }
        _ => Ok(()),
    })
}

/// What has to hold of a field's value.
pub fn check(
    path: &Path,
    field: &'static str,
    actual: impl ToString,
    holds: bool,
    expected: impl Into<String>,
) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::config(path, field, expected, actual)) }
}

/// An activation by its name.
pub(crate) fn activation<'de, D: Deserializer<'de>>(json: D) -> Result<Activation, D::Error> {
    let name = String::deserialize(json)?;
    Ok(match &name[..] {
        "relu" => Activation::Relu,
        "gelu" => Activation::GeluErf,
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "silu" | "swish" => Activation::Silu,
        other => {
            let known = "one of the activations relu, gelu, gelu_new, quick_gelu and silu";
            return Err(D::Error::invalid_value(Unexpected::Str(other), &known));
        }
    })
}

/// The epsilon of a norm.
pub(crate) fn epsilon<'de, D: Deserializer<'de>>(json: D) -> Result<f32, D::Error> {
    let given = f64::deserialize(json)?;
    match given as f32 {
        eps if eps.is_finite() && eps >= 0.0 => Ok(eps),
        _ => Err(D::Error::invalid_value(Unexpected::Float(given), &"a finite number of at least 0")),
    }
}

/// `n_heads` heads that share the width of the model between them.
pub(crate) fn heads(path: &Path, field: &'static str, d_model: usize, n_heads: usize) -> Result<Heads> {
    let divides = d_model > 0 && n_heads > 0 && d_model.is_multiple_of(n_heads);
    check(path, field, n_heads, divides, format!("a divisor of the model size {d_model}"))?;
    Ok(Heads::new(n_heads, d_model / n_heads)?)
}
