//! Sentence embeddings as sentence-transformers makes them (Reimers and Gurevych 2019,
//! <https://arxiv.org/abs/1908.10084>): tokens, BERT or Longformer, the mean over all tokens, divided by its length; or the
//! text embedding of CLIP.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use laneformer::Context;
use laneformer_models::bert::Bert;
use laneformer_models::clip::TextEncoder;
use laneformer_models::config::{check, model_type, open, read_json, read_object};
use laneformer_models::error::check_numbers;
use laneformer_models::longformer::Longformer;
use laneformer_models::{Batch, Error as ModelError, Scratch};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::files::if_there;
pub use crate::tokens::Tokens;
use crate::tokens::{Packed, TextTokenizer};
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
    model: Model,
    tokenizer: TextTokenizer,
    config: SentenceConfig,
}

#[derive(Debug)]
enum Model {
    Bert(Bert),
    Longformer(Longformer),
    Clip(TextEncoder),
}

/// What is reused from batch to batch.
#[derive(Debug, Default)]
pub struct Buffers {
    packed: Packed,
    scratch: Scratch,
}

impl SentenceEncoder {
    /// Loads a directory with `config.json`, `model.safetensors`, `tokenizer.json` and, if it is there,
    /// `sentence_bert_config.json`. The `model_type` of `config.json` says which model it is, none is BERT.
    ///
    /// Sentences are cut off at `max_seq_length`; CLIP's at its positions, as its tokenizer does.
    pub fn open(dir: &Path) -> Result<SentenceEncoder> {
        let load = match model_type(dir)?.as_deref() {
            None | Some("bert") => |dir: &Path| open(dir, Bert::load).map(Model::Bert),
            Some("longformer") => |dir: &Path| open(dir, Longformer::load).map(Model::Longformer),
            Some("clip" | "clip_text_model") => |dir: &Path| open(dir, TextEncoder::load).map(Model::Clip),
            Some(other) => {
                let served = "\"bert\", \"longformer\" or \"clip\"";
                return Err(ModelError::config(&dir.join("config.json"), "model_type", served, other).into());
            }
        };
        check_modules(dir)?;
        check_prompt(dir)?;
        let path = dir.join("sentence_bert_config.json");
        let mut config: SentenceConfig = if_there(&path, read_object)?.unwrap_or_default();
        let (mut tokenizer, model) = (TextTokenizer::open(dir)?, load(dir)?);
        if config.max_seq_length.is_none() {
            config.max_seq_length = match model {
                Model::Clip(_) => Some(model.positions()),
                _ => model_max_length(dir)?.filter(|&max| max <= model.positions()),
            };
        }
        if let Some(max) = config.max_seq_length {
            let refused = |why| ModelError::config(&path, "max_seq_length", why, max);
            tokenizer.truncate_at(max).map_err(refused)?;
        }
        Ok(SentenceEncoder { model, tokenizer, config })
    }

    /// Elements of an embedding.
    pub fn dim(&self) -> usize {
        match &self.model {
            Model::Bert(bert) => bert.config.hidden_size,
            Model::Longformer(longformer) => longformer.config.hidden_size,
            Model::Clip(clip) => clip.config.projection_dim,
        }
    }

    /// The number of tokens at which sentences are cut off.
    pub fn max_seq_length(&self) -> Option<usize> {
        self.config.max_seq_length
    }

    /// The tokens of a sentence, which may be empty, if the model has as many positions ([`Error::TooLong`]) and these tokens.
    pub fn tokenize(&self, sentence: &str) -> Result<Tokens> {
        let lower = self.config.do_lower_case.then(|| sentence.to_lowercase());
        let tokens = self.tokenizer.encode(lower.as_deref().unwrap_or(sentence))?;
        let tokens = tokens.within(self.model.positions())?;
        let embeddings = match &self.model {
            Model::Bert(bert) => &bert.encoder.embeddings,
            Model::Longformer(longformer) => &longformer.embeddings,
            Model::Clip(clip) => &clip.decoder.embeddings,
        };
        embeddings.check(&tokens.ids, &tokens.type_ids)?;
        match &self.model {
            Model::Clip(_) if tokens.is_empty() => Err(Error::NoTokens),
            _ => Ok(tokens),
        }
    }

    /// The embeddings of a batch of sentences, [sentences, dim], each of length 1. The batch is packed, so sentences of
    /// any lengths go together; an embedding does not depend on the sentences around it.
    ///
    /// # Errors
    /// [`NotANumber`](ModelError::NotANumber) if an embedding is not one.
    pub fn embed(&self, ctx: Context<'_>, sentences: &[Tokens], buffers: &mut Buffers) -> Result<Vec<f32>> {
        let embeddings = self.embeddings(ctx, sentences, buffers)?;
        check_numbers("an embedding", &embeddings)?;
        Ok(embeddings)
    }

    fn embeddings(&self, ctx: Context<'_>, sentences: &[Tokens], buffers: &mut Buffers) -> Result<Vec<f32>> {
        let Buffers { packed, scratch } = buffers;
        packed.set(sentences);
        let batch = packed.batch();
        let hidden = match &self.model {
            Model::Bert(bert) => bert.forward(&mut scratch.with(ctx), batch)?,
            Model::Longformer(longformer) => {
                let positions = sentences.iter().flat_map(|sentence| longformer.positions(&sentence.ids));
                let batch = Batch { positions: &positions.collect::<Vec<_>>(), ..batch };
                // Only windows: sentence-transformers makes no token global.
                longformer.forward(&mut scratch.with(ctx), batch, &vec![false; batch.ids.len()])?
            }
            Model::Clip(clip) => {
                let states = clip.states(&mut scratch.with(ctx), batch)?;
                return Ok(clip.embed(ctx, batch, &states)?);
            }
        };
        let d = self.dim();
        let mut embeddings = Vec::with_capacity(sentences.len() * d);
        for ends in batch.offsets.windows(2) {
            embeddings.extend(unit_mean(&hidden[ends[0] * d..ends[1] * d], d));
        }
        Ok(embeddings)
    }
}

impl Model {
    /// The longest sentence, in tokens.
    fn positions(&self) -> usize {
        match self {
            Model::Bert(bert) => bert.config.max_position_embeddings,
            Model::Longformer(longformer) => longformer.max_tokens(),
            Model::Clip(clip) => clip.config.max_position_embeddings,
        }
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

/// Where newer directories say at what length sentences are cut off. Tokenizers without a limit have a very large one.
fn model_max_length(dir: &Path) -> Result<Option<usize>, ModelError> {
    let config: Option<Value> = if_there(&dir.join("tokenizer_config.json"), read_object)?;
    Ok(config
        .and_then(|config| config["model_max_length"].as_u64())
        .and_then(|max| usize::try_from(max).ok()))
}

/// A prompt that stands before all sentences is not for a model that gets them as they are.
fn check_prompt(dir: &Path) -> Result<(), ModelError> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Config {
        default_prompt_name: Option<String>,
        prompts: HashMap<String, String>,
    }
    let path = dir.join("config_sentence_transformers.json");
    let Config { default_prompt_name, prompts } = if_there(&path, read_object)?.unwrap_or_default();
    let Some(name) = default_prompt_name else { return Ok(()) };
    let is_empty = prompts.get(&name).is_some_and(String::is_empty);
    check(&path, "default_prompt_name", name, is_empty, "null, or the name of an empty prompt")
}

/// `modules.json` and the pooling's configuration, if they are there, describe what is computed here: other poolings
/// would give other vectors without a word.
fn check_modules(dir: &Path) -> Result<(), ModelError> {
    #[derive(Deserialize)]
    struct Module {
        #[serde(rename = "type")]
        kind: String,
        path: PathBuf,
    }
    let path = dir.join("modules.json");
    let modules: Vec<Module> = if_there(&path, read_json)?.unwrap_or_default();
    for module in modules {
        match module.kind.rsplit('.').next() {
            Some("Transformer" | "Normalize") => {}
            Some("Pooling") => check_pooling(&dir.join(module.path).join("config.json"))?,
            _ => {
                return Err(ModelError::config(
                    &path,
                    "type",
                    "Transformer, Pooling or Normalize",
                    module.kind,
                ));
            }
        }
    }
    Ok(())
}

fn check_pooling(path: &Path) -> Result<(), ModelError> {
    let pooling: serde_json::Map<String, Value> = read_json(path)?;
    // One field in newer directories, a name or a list of names.
    let mode = pooling.get("pooling_mode").cloned().unwrap_or(json!("mean"));
    check(path, "pooling_mode", &mode, mode == json!("mean") || mode == json!(["mean"]), "\"mean\"")?;
    let other = pooling.iter().find(|(mode, on)| {
        let is_followed = if *mode == "pooling_mode_mean_tokens" { **on == true } else { **on == false };
        mode.starts_with("pooling_mode_") && !is_followed
    });
    let expected = "pooling_mode_mean_tokens alone";
    other.map_or(Ok(()), |(mode, on)| {
        Err(ModelError::config(path, "pooling mode", expected, format!("{mode}: {on}")))
    })
}
