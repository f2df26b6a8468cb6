//! Text in and out of laneformer's models: a tokenizer, sentence embeddings, and texts written token by token.
//!
//! It is apart from the models because of its dependencies: the tokenizer brings more crates than all else together, and an engine
//! has one already.
//!
//! - [`tokens`]: `tokenizer.json`, texts to tokens and back.
//! - [`sentence`]: a sentence's embedding, by BERT, Longformer or CLIP.
//! - [`generate`]: what GPT, GPT-2 and BART write.

#![forbid(unsafe_code)]

pub mod generate;
pub mod sentence;
pub mod tokens;

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a text could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the variants and their fields are")]
pub enum Error {
    /// The tokenizer file does not load, or refuses a text.
    #[error("{}: {message}", path.display())]
    Tokenizer { path: PathBuf, message: String },
    /// Special tokens are counted.
    #[error("{tokens} tokens, but the model has {positions} positions")]
    TooLong { tokens: usize, positions: usize },
    #[error("the prompt is empty, and the model has no bos_token_id or eos_token_id to begin with")]
    EmptyPrompt,
    /// What the model says: of its directory, or of what it was given.
    #[error(transparent)]
    Model(#[from] laneformer_models::Error),
    /// The library refused a call.
    #[error(transparent)]
    Kernel(#[from] laneformer::Error),
}
