//! Checkpoints and models that load, and those that are refused with the file, the tensor and the shapes.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use laneformer::Context;
use laneformer_models::bert::Bert;
use laneformer_models::ragged::Ragged;
use laneformer_models::{Batch, Checkpoint, Error, Result, Scratch, Weights};
use safetensors::tensor::{SafeTensors, TensorView};
use safetensors::{Dtype, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A file of the golden cases.
fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(name)
}

/// Writes tensors to a file and keeps its directory.
fn file(tensors: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)>) -> (TempDir, PathBuf) {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (*name, TensorView::new(*dtype, shape.clone(), data).expect("a tensor"))
    });
    write(&serialize(views, None).expect("tensors"))
}

fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, bytes).expect("a file");
    (dir, path)
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn floats_of_every_width_are_read() {
    let halves = [1.5f32, -2.0].map(|x| half::f16::from_f32(x).to_le_bytes()).concat();
    let bfloats = [1.5f32, -2.0].map(|x| half::bf16::from_f32(x).to_le_bytes()).concat();
    let (_dir, path) = file(vec![
        ("single", Dtype::F32, vec![2], bytes(&[1.5, -2.0])),
        ("half", Dtype::F16, vec![2], halves),
        ("bfloat", Dtype::BF16, vec![2], bfloats),
        ("integer", Dtype::I64, vec![1], 7i64.to_le_bytes().to_vec()),
    ]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    for name in ["single", "half", "bfloat"] {
        assert_eq!(*checkpoint.f32(name).unwrap(), [1.5, -2.0], "{name}");
    }
    assert_eq!(*checkpoint.i64("integer").unwrap(), [7]);
    let error = checkpoint.f32("integer").unwrap_err().to_string();
    assert!(error.contains("integer") && error.contains("I64") && error.contains("F32"), "{error}");
}

/// A writer that does not pad its header moves the data off the alignment of f32.
#[test]
fn unaligned_data_is_copied() {
    let mut aligned = 0;
    for padding in 0..4 {
        let header = format!(
            "{{\"x\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}}}{}",
            " ".repeat(padding)
        );
        let mut data = (header.len() as u64).to_le_bytes().to_vec();
        data.extend(header.as_bytes());
        data.extend(bytes(&[3.0, 4.0]));
        let (_dir, path) = write(&data);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let x = checkpoint.f32("x").unwrap();
        assert_eq!(*x, [3.0, 4.0]);
        aligned += usize::from(matches!(x, Cow::Borrowed(_)));
    }
    assert_eq!(aligned, 1);
}

#[test]
fn files_that_are_not_safetensors_are_named() {
    let good = std::fs::read(golden("bert-right-pad/weights.safetensors")).unwrap();
    let mut longer = good.clone();
    longer.push(0);
    for bytes in
        [&[][..], b"short", b"not a safetensors file at all", &good[..good.len() - 1], &good[..50], &longer]
    {
        let (_dir, path) = write(bytes);
        let error = Checkpoint::open(&path).unwrap_err();
        assert!(matches!(error, Error::Safetensors { .. }), "{error}");
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
    let error = Checkpoint::open(Path::new("nowhere/model.safetensors")).unwrap_err();
    assert!(error.to_string().contains("nowhere/model.safetensors"), "{error}");
}

#[test]
fn missing_tensors_and_other_shapes_are_named() {
    let (_dir, path) = file(vec![("a.weight", Dtype::F32, vec![2, 3], bytes(&[0.0; 6]))]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let w = Weights::new(&checkpoint, "");
    let error = w.at("a").linear(2, 3).unwrap_err().to_string();
    assert!(error.contains("a.weight: expected shape [3, 2], got [2, 3]"), "{error}");
    let error = w.at("b").linear(2, 3).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: no tensor b.weight"), "{error}");
}

fn config() -> Value {
    let case = std::fs::read(golden("bert-right-pad/case.json")).unwrap();
    serde_json::from_slice::<Value>(&case).unwrap()["config"].clone()
}

fn load(config: Value, checkpoint: &Checkpoint) -> Result<Bert> {
    Bert::load(Path::new("config.json"), &config, checkpoint)
}

fn last_hidden_state(bert: &Bert) -> Vec<f32> {
    let batch = Batch {
        ids: &[1, 2, 3, 4, 5],
        type_ids: &[0; 5],
        positions: &[0, 1, 0, 1, 2],
        offsets: &[0, 2, 5],
        is_real: None,
    };
    bert.forward(&mut Scratch::default().with(Context::serial()), batch).unwrap()
}

#[test]
fn names_with_a_prefix_and_old_names_of_norms_load() {
    let path = golden("bert-right-pad/weights.safetensors");
    let data = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&data).unwrap();
    let old_name = |name: &str| {
        let name =
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        format!("bert.{name}")
    };
    let renamed = tensors.tensors().into_iter().map(|(name, tensor)| (old_name(&name), tensor));
    let (_dir, old_path) = write(&serialize(renamed, None).unwrap());

    let new = load(config(), &Checkpoint::open(&path).unwrap()).unwrap();
    let old = load(config(), &Checkpoint::open(&old_path).unwrap()).unwrap();
    assert_eq!(last_hidden_state(&new), last_hidden_state(&old));
}

#[test]
fn configurations_that_cannot_be_followed_are_refused() {
    let checkpoint = Checkpoint::open(&golden("bert-right-pad/weights.safetensors")).unwrap();
    for (field, value, expected) in [
        (
            "hidden_act",
            json!("gelu_10"),
            "hidden_act: invalid value: string \"gelu_10\", expected one of the activations",
        ),
        ("num_attention_heads", json!(7), "num_attention_heads: expected a divisor of"),
        ("num_attention_heads", json!(0), "num_attention_heads: expected a divisor of"),
        ("hidden_size", json!(0), "num_attention_heads: expected a divisor of"),
        ("hidden_size", json!(-1), "config.json: hidden_size: invalid value"),
        ("hidden_size", Value::Null, "config.json: hidden_size: invalid type: null"),
        ("vocab_size", json!(61), "embeddings.word_embeddings.weight: expected shape [61, 60], got [60, 60]"),
        (
            "num_hidden_layers",
            json!(1),
            "tensor encoder.layer.1.attention.output.LayerNorm.bias, but the configuration has 1 such layers",
        ),
        (
            "layer_norm_eps",
            json!(-1e-5),
            "config.json: layer_norm_eps: invalid value: floating point `-0.00001`, expected a finite",
        ),
        ("num_hidden_layers", json!(3), "no tensor encoder.layer.2.attention.self.query.weight"),
    ] {
        let mut config = config();
        config[field] = value;
        let error = load(config, &checkpoint).unwrap_err().to_string();
        assert!(error.contains(expected), "{field}: {error}");
    }
}

#[test]
fn tokens_outside_the_tables_are_refused() {
    let checkpoint = Checkpoint::open(&golden("bert-right-pad/weights.safetensors")).unwrap();
    let bert = load(config(), &checkpoint).unwrap();
    let forward = |ids, type_ids, positions| {
        let batch = Batch { ids, type_ids, positions, offsets: &[0, 2], is_real: None };
        bert.forward(&mut Scratch::default().with(Context::serial()), batch).unwrap_err().to_string()
    };
    assert!(forward(&[1, 60], &[0, 0], &[0, 1]).contains("word_embeddings: index 60 at token 1"));
    assert!(forward(&[1, 2], &[2, 0], &[0, 1]).contains("token_type_embeddings: index 2 at token 0"));
    assert!(forward(&[1, 2], &[0, 0], &[0, 80]).contains("position_embeddings: index 80 at token 1"));
    assert!(forward(&[1, 2], &[0], &[0, 1]).contains("type_ids: expected 2, got 1"));
}

#[test]
fn a_sequence_without_tokens_has_nothing_to_pool() {
    let checkpoint = Checkpoint::open(&golden("bert-right-pad/weights.safetensors")).unwrap();
    let bert = load(config(), &checkpoint).unwrap();
    let hidden = last_hidden_state(&bert);
    assert_eq!(bert.pool(Context::serial(), &hidden, &[0, 2, 5]).unwrap().unwrap().len(), 2 * 60);
    for offsets in [&[0, 5, 5][..], &[0, 0, 5], &[5, 6]] {
        let error = bert.pool(Context::serial(), &hidden, offsets).unwrap_err().to_string();
        assert!(error.contains("tokens of a sequence"), "{error}");
    }
}

#[test]
fn padding_anywhere_is_left_out_and_put_back() {
    let mask = [false, true, true, true, false, true, false, false, false];
    let ragged = Ragged::from_mask(&mask, 3);
    assert_eq!(ragged.offsets(), [0, 2, 4, 4]);
    assert_eq!(ragged.positions(), [1, 2, 0, 2]);
    let padded: Vec<f32> = (0..18u8).map(f32::from).collect();
    let packed = ragged.gather(&padded, 2).unwrap();
    assert_eq!(packed, [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 10.0, 11.0]);
    let back = ragged.scatter(&packed, 2);
    for (i, (&before, &after)) in padded.iter().zip(&back).enumerate() {
        assert_eq!(after, if mask[i / 2] { before } else { 0.0 });
    }
    assert!(ragged.gather(&padded, 3).is_err());
}

#[test]
fn random_checkpoints_have_every_tensor_in_any_shape() {
    let checkpoint = Checkpoint::random(1);
    let tensor = |name, shape: &[usize]| checkpoint.tensor(name, shape).unwrap().into_owned();
    let weight = tensor("a.weight", &[64, 3, 400]);
    assert_eq!(weight.len(), 64 * 1200);
    for row in weight.chunks(1200) {
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 0.1, "{length}");
    }
    for (name, shape, centre) in [
        ("norm.weight", &[300][..], 1.0),
        ("norm.running_var", &[300], 1.0),
        ("logit_scale", &[], 1.0),
        ("norm.bias", &[300], 0.0),
    ] {
        assert!(tensor(name, shape).iter().all(|x| (x - centre).abs() <= 0.1), "{name}");
    }
    assert!(checkpoint.has("pooler.weight") && !checkpoint.has("norm.gamma"));
    let error = checkpoint.tensor("a.weight", &[usize::MAX, 2]).unwrap_err().to_string();
    assert!(error.contains("does not fit"), "{error}");
    assert!(matches!(checkpoint.f32("a.weight"), Err(Error::MissingTensor { .. })));
    let asked = checkpoint.asked();
    assert_eq!(
        (asked.len(), &asked["a.weight"][..], &asked["logit_scale"][..]),
        (5, &[64, 3, 400][..], &[][..])
    );
}

/// On every machine, in every release.
#[test]
fn random_numbers_depend_on_the_seed_and_the_name_alone() {
    let first = |seed, name: &str| Checkpoint::random(seed).tensor(name, &[2, 2]).unwrap().into_owned();
    assert_eq!(first(7, "a.weight"), [0.7469401, 1.1940383, 1.140417, 0.2541392]);
    assert_ne!(first(7, "a.weight"), first(8, "a.weight"));
    assert_ne!(first(7, "a.weight"), first(7, "b.weight"));
}

#[test]
fn a_model_of_random_weights_computes() {
    let config = |layers: u32| {
        let mut config = config();
        config["num_hidden_layers"] = layers.into();
        config
    };
    let state = |layers| last_hidden_state(&load(config(layers), &Checkpoint::random(3)).unwrap());
    let (x, same, deep) = (state(2), state(2), state(24));
    assert_eq!(x, same);
    assert_ne!(x, deep);
    let mean_square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    for x in [x, deep] {
        assert!((0.5..2.0).contains(&mean_square(&x)), "{}", mean_square(&x));
    }
}
