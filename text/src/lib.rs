//! Text in and out of laneformer's models: a tokenizer, sentence embeddings, and texts written token by token.
//!
//! It is apart from the models because of its dependencies: the tokenizer brings as many crates as all of the rest, and an inference engine
//! has a tokenizer of its own.
//!
//! - [`tokens`]: `tokenizer.json`, texts to tokens and back.
//! - [`sentence`]: a sentence's embedding, by BERT, Longformer or CLIP.
//! - [`generate`]: what GPT, GPT-2 and BART write.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use laneformer::{Context, Isa, Rayon};
//! use laneformer_text::generate::{Generator, Sampler};
//! use laneformer_text::sentence::{Buffers, SentenceEncoder};
//!
//! let ctx = Context::new(Isa::best(), &Rayon);
//! let encoder = SentenceEncoder::open(Path::new("all-MiniLM-L6-v2"))?;
//! let sentences = [encoder.tokenize("One sentence.")?, encoder.tokenize("And another.")?];
//! let embeddings = encoder.embed(ctx, &sentences, &mut Buffers::default())?;
//! assert_eq!(embeddings.len(), 2 * encoder.dim());
//!
//! let generator = Generator::open(Path::new("gpt2"))?;
//! let (mut sampler, mut decoder) = (Sampler::greedy(), generator.decoder());
//! let mut text = generator.begin(ctx, &generator.prompt("Once upon a time")?, 32)?;
//! while let Some(token) = text.next(ctx, &mut sampler)? {
//!     print!("{}", decoder(token)?.unwrap_or_default());
//! }
//! # Ok::<(), laneformer_text::Error>(())
//! ```
//!
//! # Errors
//! Nothing panics on bad input. Opening fails with the file and what of it is missing or disagrees, as loading a model does
//! ([`laneformer_models`]); a text that is not cut off fails with its number of tokens where the model has fewer positions
//! ([`Error::TooLong`]). Functions name only
//! what they add to this.

#![forbid(unsafe_code)]

mod files;
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
    /// What CLIP embeds is the state of a token.
    #[error("no tokens, not even special ones")]
    NoTokens,
    #[error("the prompt is empty, and the model has no bos_token_id or eos_token_id to begin with")]
    EmptyPrompt,
    /// What the model says: of its directory, or of what it was given.
    #[error(transparent)]
    Model(#[from] laneformer_models::Error),
    /// The library refused a call.
    #[error(transparent)]
    Kernel(#[from] laneformer::Error),
}
