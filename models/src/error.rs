//! Why a model could not be loaded or run; every message names the file and the tensor, field or token.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be loaded or run. The message is complete: it contains that of the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: std::io::Error,
    },
    /// A file is not in the safetensors format, or is cut short.
    #[error("{}: not a complete safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        reason: safetensors::SafeTensorError,
    },
    /// A JSON file does not parse, or lacks a field.
    #[error("{}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        reason: serde_json::Error,
    },
    /// A field of a configuration has a value that this crate cannot follow.
    #[error("{}: {field}: expected {expected}, got {actual}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What would have worked.
        expected: String,
        /// The value.
        actual: String,
    },
    /// A tensor is not in the file.
    #[error("{}: no tensor {name}", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The file has layers beyond those of the configuration.
    #[error("{}: tensor {name}, but the configuration has {layers} such layers", path.display())]
    MoreLayers {
        /// The file.
        path: PathBuf,
        /// A tensor of the first layer that is too many.
        name: String,
        /// Layers of the configuration.
        layers: usize,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("{}: tensor {name}: expected shape {expected:?}, got {actual:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape in the file.
        actual: Vec<usize>,
    },
    /// A tensor has an element type that is not read here.
    #[error("{}: tensor {name}: expected elements of type {expected}, got {actual}", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The element types that are read.
        expected: &'static str,
        /// The element type in the file.
        actual: safetensors::Dtype,
    },
    /// The tokenizer file does not load, or refuses a text.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer says.
        message: String,
    },
    /// A token, type or position is outside its embedding table.
    #[error("{table}: index {index} at token {at} is outside the table of {rows} rows")]
    Index {
        /// The table.
        table: &'static str,
        /// The index.
        index: u32,
        /// Which token of the batch.
        at: usize,
        /// Rows of the table.
        rows: usize,
    },
    /// A text has more tokens than the model has positions.
    #[error("{tokens} tokens, but the model has {positions} positions")]
    TooLong {
        /// Tokens of the text, special ones included.
        tokens: usize,
        /// Positions of the model.
        positions: usize,
    },
    /// A prompt without a token, and a model without one to begin with.
    #[error("the prompt is empty, and the model has no bos_token_id or eos_token_id to begin with")]
    EmptyPrompt,
    /// A part of the survey that this version does not have.
    #[error("not built yet: {0}")]
    NotBuilt(String),
    /// A golden case contradicts itself.
    #[error("{}: {message}", path.display())]
    Case {
        /// The case.
        path: PathBuf,
        /// How.
        message: String,
    },
    /// The library refused a call.
    #[error(transparent)]
    Kernel(#[from] laneformer::Error),
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |reason| Error::Io { path: path.into(), reason }
    }

    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Error + '_ {
        move |reason| Error::Json { path: path.into(), reason }
    }

    pub(crate) fn config(
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
