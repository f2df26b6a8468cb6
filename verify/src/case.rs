//! The files of a golden case.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use laneformer_models::config::{from_value, read_json};
use laneformer_models::ragged::Ragged;
use laneformer_models::{Checkpoint, Error as ModelError};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// The version of the format that is read here.
const FORMAT: u64 = 1;

/// Computed outputs by name, without the `out.`.
pub(crate) type Outputs = BTreeMap<String, Vec<f32>>;

#[derive(Debug, Deserialize)]
struct Description {
    format: u64,
    system: String,
    config: serde_json::Value,
    #[serde(default)]
    run: Run,
    outputs: BTreeMap<String, OutputSpec>,
}

/// Options of the run.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Run {
    #[serde(default)]
    pub train: bool,
    #[serde(default)]
    pub hidden_states: bool,
    #[serde(default)]
    pub no_pooler: bool,
    /// Feed the decoder one token at a time, with a cache.
    #[serde(default)]
    pub cached: bool,
    /// Tokens to choose one after another, always the most probable.
    #[serde(default)]
    pub greedy_steps: usize,
    /// Lengths of the pieces that are fed one after another, with a cache.
    #[serde(default)]
    pub chunks: Vec<usize>,
    /// Lengths of consecutive segments with a memory.
    #[serde(default)]
    pub segments: Vec<usize>,
}

/// What is known of an output.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct OutputSpec {
    dtype: String,
    pub rows: Option<String>,
    #[serde(default)]
    torch_f32_max_abs: f64,
    #[serde(default)]
    ref_max_abs: f64,
}

impl OutputSpec {
    /// The largest error that passes: integers are exact.
    pub fn limit(&self) -> f64 {
        if self.is_integer() { 0.0 } else { 4.0 * self.torch_f32_max_abs + 1e-6 * self.ref_max_abs }
    }

    pub fn is_integer(&self) -> bool {
        self.dtype == "i64"
    }
}

/// A golden case.
#[derive(Debug)]
pub struct Case {
    name: String,
    path: PathBuf,
    description: Description,
    io: Checkpoint,
    weights: Checkpoint,
}

impl Case {
    /// Reads the case in a directory.
    ///
    /// # Errors
    /// What is missing or does not parse.
    pub fn open(dir: &Path) -> Result<Case> {
        let path = dir.join("case.json");
        let description: Description = read_json(&path)?;
        if description.format != FORMAT {
            return Err(ModelError::config(&path, "format", FORMAT.to_string(), description.format).into());
        }
        let name = dir.canonicalize().map_err(ModelError::io(dir))?;
        let name = name.file_name().unwrap_or(name.as_os_str()).to_string_lossy().into_owned();
        let io = Checkpoint::open(&dir.join("io.safetensors"))?;
        let weights = Checkpoint::open(&dir.join("weights.safetensors"))?;
        Ok(Case { name, path, description, io, weights })
    }

    /// The name of the directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The system: `"bert"`, `"op"`, ...
    pub fn system(&self) -> &str {
        &self.description.system
    }

    /// `case.json`, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn weights(&self) -> &Checkpoint {
        &self.weights
    }

    /// The configuration of the model, parsed.
    pub(crate) fn json(&self) -> &serde_json::Value {
        &self.description.config
    }

    pub(crate) fn config<T: DeserializeOwned>(&self) -> Result<T> {
        Ok(from_value(&self.path, self.json())?)
    }

    pub(crate) fn run(&self) -> &Run {
        &self.description.run
    }

    /// The outputs, without the `out.` of their names.
    pub(crate) fn outputs(&self) -> impl Iterator<Item = (&str, &OutputSpec)> {
        let outputs = self.description.outputs.iter();
        outputs.map(|(name, spec)| (name.strip_prefix("out.").unwrap_or(name), spec))
    }

    /// The file of inputs and expected outputs.
    pub(crate) fn io(&self) -> &Checkpoint {
        &self.io
    }

    /// Whether there is an input of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.io.has(&format!("in.{name}"))
    }

    /// The shape of an input with this number of dimensions.
    pub(crate) fn shape<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let shape = self.io.shape(&format!("in.{name}"))?;
        shape.try_into().map_err(|_| self.error(format!("in.{name}: expected {N} dimensions, got {shape:?}")))
    }

    /// An input of floats.
    pub(crate) fn f32(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.io.f32(&format!("in.{name}"))?.into_owned())
    }

    /// An input of floats that may be left out.
    pub(crate) fn f32_if_there(&self, name: &str) -> Result<Option<Vec<f32>>> {
        if self.has(name) { self.f32(name).map(Some) } else { Ok(None) }
    }

    /// An input of token ids or the like.
    pub(crate) fn indices(&self, name: &str) -> Result<Vec<u32>> {
        let name = format!("in.{name}");
        let index = |&i| u32::try_from(i).map_err(|_| self.error(format!("{name}: {i} is not an index")));
        self.io.i64(&name)?.iter().map(index).collect()
    }

    /// A mask; `true` is a real token.
    pub(crate) fn mask(&self, name: &str) -> Result<Vec<bool>> {
        Ok(self.io.u8(&format!("in.{name}"))?.iter().map(|&byte| byte != 0).collect())
    }

    /// A mask [B, T] as the real tokens of B sequences.
    pub(crate) fn ragged(&self, mask: &str) -> Result<Ragged> {
        let [_, seq_len] = self.shape(mask)?;
        Ok(Ragged::from_mask(&self.mask(mask)?, seq_len))
    }

    /// The real tokens of a batch [B, T], all if there is no mask, and the first of each sequence, of which a pooler makes something even
    /// if it is padding; and which of them are real.
    pub(crate) fn ragged_from_first(
        &self,
        mask: &str,
        [sequences, seq_len]: [usize; 2],
    ) -> Result<(Ragged, Vec<bool>)> {
        let mask = if self.has(mask) { self.mask(mask)? } else { vec![true; sequences * seq_len] };
        let mut kept = mask.clone();
        kept.iter_mut().step_by(seq_len.max(1)).for_each(|first| *first = true);
        let tokens = Ragged::from_mask(&kept, seq_len);
        let is_real = tokens.gather(&mask, 1)?;
        Ok((tokens, is_real))
    }

    pub(crate) fn error(&self, message: String) -> Error {
        Error::Case { path: self.path.clone(), message }
    }
}
