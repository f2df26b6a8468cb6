//! What the examples share. Each runs a model of random weights at the size of its usual checkpoint, or the one in the directory
//! that its argument names: `config.json`, with the fields that the example shows, and `model.safetensors`.

#![allow(dead_code, reason = "not every example uses all of it")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use laneformer::{Context, Isa, Rayon};
use laneformer_models::Checkpoint;
use laneformer_models::config::read_json;
use serde_json::Value;

pub type Result<T = ()> = anyhow::Result<T>;

/// The path of the configuration, for messages, the configuration, and the weights.
pub fn model(usual: Value) -> Result<(PathBuf, Value, Checkpoint)> {
    let Some(dir) = std::env::args_os().nth(1) else {
        return Ok(("config of the example".into(), usual, Checkpoint::random(1)));
    };
    let (path, weights) = (Path::new(&dir).join("config.json"), Path::new(&dir).join("model.safetensors"));
    let config = read_json(&path)?;
    Ok((path, config, Checkpoint::open(&weights)?))
}

/// The widest instruction set, on all threads.
pub fn context() -> Context<'static> {
    Context::new(Isa::best(), &Rayon)
}

/// Some tokens of a vocabulary, and their places.
pub fn tokens(n: usize, vocab_size: usize) -> (Vec<u32>, Vec<u32>) {
    let id = |i: usize| ((i * 7919 + 13) % vocab_size.max(1)) as u32;
    ((0..n).map(id).collect(), (0..n as u32).collect())
}

/// Some features, [rows, cols].
pub fn features(rows: usize, cols: usize) -> Result<Vec<f32>> {
    Ok(Checkpoint::random(2).tensor("features", &[rows, cols])?.into_owned())
}

/// Computes, and says how long it took.
pub fn timed<T>(what: &str, compute: impl FnOnce() -> laneformer_models::Result<T>) -> Result<T> {
    let start = Instant::now();
    let computed = compute()?;
    println!("{what}: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    Ok(computed)
}

/// The shape of a matrix of so many columns, and where it begins.
pub fn show(what: &str, x: &[f32], cols: usize) {
    let first: Vec<_> = x.iter().take(4).map(|x| format!("{x:.4}")).collect();
    println!("{what} [{}, {cols}]: {} ...", x.len() / cols.max(1), first.join(" "));
}
