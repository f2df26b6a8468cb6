//! Sentence embeddings as sentence-transformers makes them (Reimers and Gurevych 2019,
//! <https://arxiv.org/abs/1908.10084>): tokens, BERT, the mean over all tokens, divided by its length.

use std::path::{Path, PathBuf};

use laneformer::Context;
use serde::Deserialize;
use tokenizers::{PostProcessor, Tokenizer, TruncationParams};

use crate::bert::{Batch, Bert};
use crate::config::read_json_if_there;
use crate::ragged::Scratch;
use crate::{Error, Result};

/// `sentence_bert_config.json`.
#[derive(Debug, Default, Deserialize)]
struct SentenceConfig {
    #[serde(default)]
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

/// A model with its tokenizer.
#[derive(Debug)]
pub struct SentenceEncoder {
    bert: Bert,
    tokenizer: Tokenizer,
    tokenizer_path: PathBuf,
    config: SentenceConfig,
}

/// The tokens of one sentence.
#[derive(Clone, Debug)]
pub struct Tokens {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    /// Whether tokens were cut off at `max_seq_length`.
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
}

/// What is reused from batch to batch.
#[derive(Debug, Default)]
pub struct Buffers {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    positions: Vec<u32>,
    offsets: Vec<usize>,
    scratch: Scratch,
}

impl SentenceEncoder {
    /// Loads a directory with `config.json`, `model.safetensors`, `tokenizer.json` and, if it is there,
    /// `sentence_bert_config.json`.
    ///
    /// # Errors
    /// What is missing or disagrees, with its file and tensor.
    pub fn open(dir: &Path) -> Result<SentenceEncoder> {
        check_modules(dir)?;
        let bert = Bert::open(dir)?;
        let config_path = dir.join("sentence_bert_config.json");
        let config: SentenceConfig = read_json_if_there(&config_path)?.unwrap_or_default();
        let tokenizer_path = dir.join("tokenizer.json");
        let text = std::fs::read(&tokenizer_path).map_err(Error::io(&tokenizer_path))?;
        let mut tokenizer = Tokenizer::from_bytes(text).map_err(tokenizer_error(&tokenizer_path))?;
        let special = tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        let refused = |why: String| {
            let actual = config.max_seq_length.unwrap_or_default();
            Error::config(&config_path, "max_seq_length", why, actual)
        };
        if config.max_seq_length.is_some_and(|max| max < special) {
            return Err(refused(format!("room for {special} special tokens")));
        }
        // The file's own truncation and padding belong to whoever wrote it, not to the model.
        let truncation =
            config.max_seq_length.map(|max_length| TruncationParams { max_length, ..Default::default() });
        let truncated = tokenizer.with_padding(None).with_truncation(truncation);
        truncated.map_err(|error| refused(error.to_string()))?;
        Ok(SentenceEncoder { bert, tokenizer, tokenizer_path, config })
    }

    /// Elements of an embedding.
    pub fn dim(&self) -> usize {
        self.bert.config().hidden_size
    }

    /// The number of tokens at which sentences are cut off.
    pub fn max_seq_length(&self) -> Option<usize> {
        self.config.max_seq_length
    }

    /// The tokens of a sentence, which may be empty.
    ///
    /// # Errors
    /// [`Error::TooLong`] if the model has fewer positions, [`Error::Index`] if the tokenizer is not the model's,
    /// [`Error::Tokenizer`].
    pub fn tokenize(&self, sentence: &str) -> Result<Tokens> {
        let lower_case;
        let sentence = if self.config.do_lower_case {
            lower_case = sentence.to_lowercase();
            &lower_case
        } else {
            sentence
        };
        let encoding =
            self.tokenizer.encode_fast(sentence, true).map_err(tokenizer_error(&self.tokenizer_path))?;
        let tokens = Tokens {
            ids: encoding.get_ids().into(),
            type_ids: encoding.get_type_ids().into(),
            truncated: !encoding.get_overflowing().is_empty(),
        };
        let positions = self.bert.config().max_position_embeddings;
        if tokens.len() > positions {
            return Err(Error::TooLong { tokens: tokens.len(), positions });
        }
        self.bert.check(&tokens.ids, &tokens.type_ids)?;
        Ok(tokens)
    }

    /// The embeddings of a batch of sentences, [sentences, dim], each of length 1. The batch is packed, so sentences of
    /// any lengths go together; an embedding does not depend on the sentences around it.
    ///
    /// # Errors
    /// What the library says of the sizes.
    pub fn embed(&self, ctx: Context<'_>, sentences: &[Tokens], buffers: &mut Buffers) -> Result<Vec<f32>> {
        let Buffers { ids, type_ids, positions, offsets, scratch } = buffers;
        for buffer in [&mut *ids, type_ids, positions] {
            buffer.clear();
        }
        offsets.clear();
        offsets.push(0);
        for sentence in sentences {
            ids.extend(&sentence.ids);
            type_ids.extend(&sentence.type_ids);
            positions.extend(0..sentence.len() as u32);
            offsets.push(ids.len());
        }
        let hidden = self.bert.forward(ctx, Batch { ids, type_ids, positions, offsets }, scratch)?;
        let d = self.dim();
        let mut embeddings = Vec::with_capacity(sentences.len() * d);
        for ends in offsets.windows(2) {
            embeddings.extend(unit_mean(&hidden[ends[0] * d..ends[1] * d], d));
        }
        Ok(embeddings)
    }
}

/// The mean of rows of `d`, divided by its Euclidean length. A mean of zero stays zero.
fn unit_mean(rows: &[f32], d: usize) -> Vec<f32> {
    let mut sum = vec![0.0f64; d];
    for row in rows.chunks_exact(d) {
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    // The number of rows cancels out.
    let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
    let length = if length == 0.0 { 1.0 } else { length };
    sum.iter().map(|x| (x / length) as f32).collect()
}

fn tokenizer_error(path: &Path) -> impl FnOnce(tokenizers::Error) -> Error + '_ {
    move |error| Error::Tokenizer { path: path.into(), message: error.to_string() }
}

/// `modules.json` and the pooling's configuration, if they are there, describe what is computed here: other poolings
/// would give other vectors without a word.
fn check_modules(dir: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Module {
        #[serde(rename = "type")]
        kind: String,
        path: PathBuf,
    }
    let path = dir.join("modules.json");
    let modules: Vec<Module> = read_json_if_there(&path)?.unwrap_or_default();
    for module in modules {
        match module.kind.rsplit('.').next() {
            Some("Transformer" | "Normalize") => {}
            Some("Pooling") => check_pooling(&dir.join(module.path).join("config.json"))?,
            _ => return Err(Error::config(&path, "type", "Transformer, Pooling or Normalize", module.kind)),
        }
    }
    Ok(())
}

fn check_pooling(path: &Path) -> Result<()> {
    let pooling: serde_json::Map<String, serde_json::Value> = read_json_if_there(path)?.unwrap_or_default();
    let others = pooling.iter().filter(|(mode, on)| {
        mode.starts_with("pooling_mode_") && *mode != "pooling_mode_mean_tokens" && **on == true
    });
    match others.map(|(mode, _)| mode).next() {
        None => Ok(()),
        Some(mode) => Err(Error::config(path, "pooling mode", "pooling_mode_mean_tokens alone", mode)),
    }
}
