//! Why a model could not be loaded or run; every message names the file and the tensor, field or token.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be loaded or run. The message is complete: it contains that of the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the variants and their fields are")]
pub enum Error {
    #[error("{}: {reason}", path.display())]
    Io { path: PathBuf, reason: std::io::Error },
    #[error("{}: not a complete safetensors file: {reason}", path.display())]
    Safetensors { path: PathBuf, reason: safetensors::SafeTensorError },
    #[error("{}: {reason}", path.display())]
    Json { path: PathBuf, reason: serde_json::Error },
    /// A field of a configuration has a value that this crate cannot follow.
    #[error("{}: {field}: expected {expected}, got {actual}", path.display())]
    Config { path: PathBuf, field: &'static str, expected: String, actual: String },
    #[error("{}: no tensor {name}", path.display())]
    MissingTensor { path: PathBuf, name: String },
    /// `name` is a tensor of the first layer that is too many.
    #[error("{}: tensor {name}, but the configuration has {layers} such layers", path.display())]
    MoreLayers { path: PathBuf, name: String, layers: usize },
    /// A tensor has another shape than the configuration implies.
    #[error("{}: tensor {name}: expected shape {expected:?}, got {actual:?}", path.display())]
    Shape { path: PathBuf, name: String, expected: Vec<usize>, actual: Vec<usize> },
    #[error("{}: tensor {name}: expected elements of type {expected}, got {actual}", path.display())]
    Dtype { path: PathBuf, name: String, expected: &'static str, actual: safetensors::Dtype },
    /// A token, type or position is outside its embedding table; `at` says which of the batch.
    #[error("{table}: index {index} at token {at} is outside the table of {rows} rows")]
    Index { table: &'static str, index: u32, at: usize, rows: usize },
    #[error("{0}: not a number; the weights are not all finite, too large for f32, or zero")]
    NotANumber(&'static str),
    /// The library refused a call.
    #[error(transparent)]
    Kernel(#[from] laneformer::Error),
}

impl Error {
    /// An error of a file.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |reason| Error::Io { path: path.into(), reason }
    }

    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Error + '_ {
        move |reason| Error::Json { path: path.into(), reason }
    }

    /// A field of a file, what would have worked, and its value.
    pub fn config(
        path: &Path,
        field: &'static str,
        expected: impl Into<String>,
        actual: impl ToString,
    ) -> Error {
        Error::Config { path: path.into(), field, expected: expected.into(), actual: actual.to_string() }
    }
}

/// The library's error of a size, if it is not the one that it has to be.
pub(crate) fn check_size(arg: &'static str, expected: usize, actual: usize) -> Result<()> {
    if actual == expected { Ok(()) } else { Err(laneformer::Error::Size { arg, expected, actual }.into()) }
}

/// The library's error of a size that is too large.
pub(crate) fn check_most(arg: &'static str, max: usize, actual: usize) -> Result<()> {
    if actual <= max { Ok(()) } else { Err(laneformer::Error::TooLarge { arg, max, actual }.into()) }
}

/// [`Error::Index`] if an index is outside of a table.
pub(crate) fn check_indices(table: &'static str, rows: usize, indices: &[u32]) -> Result<()> {
    match indices.iter().position(|&index| index as usize >= rows) {
        None => Ok(()),
        Some(at) => Err(Error::Index { table, index: indices[at], at, rows }),
    }
}

/// [`Error::NotANumber`] if there is a NaN in `x`.
pub fn check_numbers(what: &'static str, x: &[f32]) -> Result<()> {
    if x.iter().any(|x| x.is_nan()) { Err(Error::NotANumber(what)) } else { Ok(()) }
}
