//! `tokenizer.json`: texts to tokens and back, and batches of them.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use laneformer_models::Batch;
use laneformer_models::Error as ModelError;
use tokenizers::{ModelWrapper, PostProcessor, Tokenizer, TruncationParams};

use crate::{Error, Result};

/// The tokens of one text.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// Special ones included.
    pub ids: Vec<u32>,
    /// To which part of the text each belongs.
    pub type_ids: Vec<u32>,
    /// Whether tokens were cut off.
    pub truncated: bool,
}

impl Tokens {
    /// Number of tokens, special ones included.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token at all, not even a special one.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The same, if a model has as many positions, or else [`Error::TooLong`].
    pub fn within(self, positions: usize) -> Result<Tokens> {
        let tokens = self.len();
        if tokens <= positions { Ok(self) } else { Err(Error::TooLong { tokens, positions }) }
    }
}

/// The tokenizer of a model directory.
#[derive(Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    path: PathBuf,
}

impl TextTokenizer {
    /// Reads `tokenizer.json`. The file's own truncation and padding belong to whoever wrote it, not to the model: texts
    /// are as long as they are. Dropout belongs to training: a text has the same tokens each time.
    pub fn open(dir: &Path) -> Result<TextTokenizer> {
        let path = dir.join("tokenizer.json");
        let text = std::fs::read(&path).map_err(ModelError::io(&path))?;
        let mut tokenizer = guard(&path, || Tokenizer::from_bytes(text))?;
        guard(&path, || tokenizer.with_padding(None).with_truncation(None).map(drop))?;
        if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            tokenizer.with_model(bpe);
        }
        Ok(TextTokenizer { tokenizer, path })
    }

    /// Cuts texts off at a number of tokens, special ones included.
    ///
    /// # Errors
    /// What the number would have to be.
    pub fn truncate_at(&mut self, max_length: usize) -> Result<(), String> {
        let special =
            self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        if max_length < special {
            return Err(format!("room for {special} special tokens"));
        }
        let truncation = Some(TruncationParams { max_length, ..Default::default() });
        self.tokenizer.with_truncation(truncation).map(drop).map_err(|error| error.to_string())
    }

    /// The tokens of a text, with the special ones.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let encoding = guard(&self.path, || self.tokenizer.encode_fast(text, true))?;
        Ok(Tokens {
            ids: encoding.get_ids().into(),
            type_ids: encoding.get_type_ids().into(),
            truncated: !encoding.get_overflowing().is_empty(),
        })
    }

    /// From tokens, one after another, to the text that each adds. A token that ends within a character adds nothing; the
    /// one that completes it adds all of it. Special tokens have no text.
    pub fn decoder(&self) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        let mut stream = self.tokenizer.decode_stream(true);
        move |id| guard(&self.path, || stream.step(id))
    }
}

/// What a call of the tokenizer gives. It panics where a file that it has read does not hold what its parts ask for.
fn guard<T>(path: &Path, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let message = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("malformed: {}", reason(&*panic)),
    };
    Err(Error::Tokenizer { path: path.into(), message })
}

fn reason(panic: &(dyn Any + Send)) -> &str {
    let formatted = panic.downcast_ref::<String>().map(String::as_str);
    formatted.or(panic.downcast_ref::<&str>().copied()).unwrap_or("unknown")
}

/// A [`Batch`] of texts, with memory that is used again.
#[derive(Debug, Default)]
pub struct Packed {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    positions: Vec<u32>,
    offsets: Vec<usize>,
}

impl Packed {
    /// Replaces what is there.
    pub fn set(&mut self, texts: &[Tokens]) {
        for buffer in [&mut self.ids, &mut self.type_ids, &mut self.positions] {
            buffer.clear();
        }
        self.offsets.clear();
        self.offsets.push(0);
        for text in texts {
            self.ids.extend(&text.ids);
            self.type_ids.extend(&text.type_ids);
            self.positions.extend(0..text.len() as u32);
            self.offsets.push(self.ids.len());
        }
    }

    /// What is there.
    pub fn batch(&self) -> Batch<'_> {
        let Packed { ids, type_ids, positions, offsets } = self;
        Batch { ids, type_ids, positions, offsets, is_real: None }
    }
}
