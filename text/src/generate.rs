//! Text from text, token by token: GPT and GPT-2 go on with a prompt, BART's decoder writes about it.
//!
//! The next token is the most probable one, or drawn from the most probable ones with a seed. What `generate` of Hugging
//! Face does beyond that (beams, penalties, lengths, `forced_eos_token_id`) is not done here.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use laneformer::{Context, Linear, MatMut, softmax};
use laneformer_models::bart::Bart;
use laneformer_models::config::{check, from_value, model_type, open, read_json, read_object, with_defaults};
use laneformer_models::encoder::{Decoding, Transformer};
use laneformer_models::error::check_numbers;
use laneformer_models::gpt::Gpt;
use laneformer_models::head::argmax;
use laneformer_models::run::project;
use laneformer_models::{Batch, Error as ModelError, Scratch};
use rand_pcg::Pcg32;
use rand_pcg::rand_core::{Rng, SeedableRng};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::files::if_there;
use crate::tokens::TextTokenizer;
use crate::{Error, Result};

/// A language model with its tokenizer.
#[derive(Debug)]
pub struct Generator {
    model: Model,
    tokenizer: TextTokenizer,
    special: Special,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one")]
enum Model {
    Gpt(Gpt),
    Bart(Bart),
}

/// Tokens with a meaning to the generation: those of `generation_config.json`, or of `config.json` if there is no such file.
#[derive(Debug, Deserialize)]
struct Special {
    /// The file that they are from.
    #[serde(skip)]
    path: PathBuf,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    decoder_start_token_id: Option<u32>,
    forced_bos_token_id: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a token, or a list of them")]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl Special {
    fn open(dir: &Path) -> Result<Special> {
        let path = dir.join("generation_config.json");
        if let Some(special) = if_there(&path, read_object)? {
            return Ok(Special { path, ..special });
        }
        let path = dir.join("config.json");
        let config: Value = read_json(&path)?;
        let defaults = match config["model_type"].as_str() {
            Some("gpt2") => json!({ "bos_token_id": 50256, "eos_token_id": 50256 }),
            Some("bart") => json!({ "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2 }),
            _ => json!({}),
        };
        let special = from_value(&path, with_defaults(Some(&config), defaults))?;
        Ok(Special { path, ..special })
    }

    /// What the model is given without being asked has to be a token.
    fn check(&self, field: &'static str, id: u32, vocab_size: usize) -> Result<()> {
        let is_token = (id as usize) < vocab_size;
        Ok(check(&self.path, field, id, is_token, format!("a token below {vocab_size}"))?)
    }

    /// With what the prompt begins if it is empty.
    fn first(&self) -> Option<(&'static str, u32)> {
        let eos = || self.eos().first().map(|&id| ("eos_token_id", id));
        self.bos_token_id.map(|id| ("bos_token_id", id)).or_else(eos)
    }

    /// With what a decoder begins that has an encoder.
    fn start(&self) -> Option<(&'static str, u32)> {
        let bos = || self.bos_token_id.map(|id| ("bos_token_id", id));
        self.decoder_start_token_id.map(|id| ("decoder_start_token_id", id)).or_else(bos)
    }

    fn eos(&self) -> &[u32] {
        match &self.eos_token_id {
            None => &[],
            Some(OneOrMany::One(id)) => std::slice::from_ref(id),
            Some(OneOrMany::Many(ids)) => ids,
        }
    }
}

impl Generator {
    /// Loads a directory with `config.json`, `model.safetensors`, `tokenizer.json` and, if it is there,
    /// `generation_config.json`. The `model_type` of `config.json` says which model it is.
    pub fn open(dir: &Path) -> Result<Generator> {
        let load = match model_type(dir)?.as_deref() {
            Some("gpt2" | "openai-gpt") => |dir: &Path| open(dir, Gpt::load).map(Model::Gpt),
            Some("bart") => |dir: &Path| open(dir, Bart::load).map(Model::Bart),
            other => {
                let (path, served) = (dir.join("config.json"), "\"gpt2\", \"openai-gpt\" or \"bart\"");
                let actual = other.unwrap_or("none");
                return Err(ModelError::config(&path, "model_type", served, actual).into());
            }
        };
        let (special, tokenizer) = (Special::open(dir)?, TextTokenizer::open(dir)?);
        let model = load(dir)?;
        if let Model::Bart(bart) = &model {
            let forced = special.forced_bos_token_id.map(|id| ("forced_bos_token_id", id));
            for (field, id) in special.start().into_iter().chain(forced) {
                special.check(field, id, bart.config.vocab_size)?;
            }
        }
        Ok(Generator { model, tokenizer, special })
    }

    /// The tokens of a prompt. An empty one is the token with which texts begin, or else that with which they end, or else
    /// [`Error::EmptyPrompt`]; one of more tokens than the model has positions is [`Error::TooLong`].
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = self.tokenizer.encode(text)?;
        let embeddings = match &self.model {
            Model::Gpt(gpt) => &gpt.decoder.embeddings,
            Model::Bart(bart) => &bart.encoder.embeddings,
        };
        if tokens.is_empty() {
            let (field, id) = self.special.first().ok_or(Error::EmptyPrompt)?;
            self.special.check(field, id, embeddings.words.rows())?;
            tokens.ids.push(id);
        }
        let ids = tokens.within(self.positions())?.ids;
        embeddings.check(&ids, &[])?;
        Ok(ids)
    }

    /// The beginning of a generation of up to `max_tokens` tokens. BART reads the prompt here; GPT does so with the first
    /// token.
    pub fn begin(&self, ctx: Context<'_>, prompt: &[u32], max_tokens: usize) -> Result<Generation<'_>> {
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let (decoder, _) = self.parts();
        let (mut memory, mut offsets, mut next, mut forced) = (vec![], [0, 0], prompt.to_vec(), None);
        if let Model::Bart(bart) = &self.model {
            let positions: Vec<_> = (0..prompt.len() as u32).collect();
            offsets = [0, prompt.len()];
            let batch = Batch { ids: prompt, positions: &positions, offsets: &offsets, ..Batch::default() };
            memory = bart.encoder.encode(&mut Scratch::default().with(ctx), batch)?;
            let start = self.special.start().map(|(_, id)| id);
            next = vec![start.unwrap_or(bart.config.decoder_start_token_id)];
            forced = self.special.forced_bos_token_id;
        }
        let room = next.len().saturating_add(max_tokens).min(self.positions());
        let decoding = decoder.layers.begin(ctx, &memory, &offsets, room)?;
        let scratch = Scratch::default();
        Ok(Generation { generator: self, decoding, next, forced, seen: 0, left: max_tokens, scratch })
    }

    /// What writes, and its language-model head.
    fn parts(&self) -> (&Transformer, &Linear) {
        match &self.model {
            Model::Gpt(gpt) => (&gpt.decoder, &gpt.head),
            Model::Bart(bart) => (&bart.decoder, &bart.head),
        }
    }

    /// From tokens to the text that each adds; see [`TextTokenizer::decoder`].
    pub fn decoder(&self) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        self.tokenizer.decoder()
    }

    /// The longest prompt, in tokens; GPT's continuation is part of it.
    pub fn positions(&self) -> usize {
        match &self.model {
            Model::Gpt(gpt) => gpt.config.n_positions,
            Model::Bart(bart) => bart.config.max_position_embeddings,
        }
    }
}

/// A text that is being written.
#[derive(Debug)]
pub struct Generation<'a> {
    generator: &'a Generator,
    decoding: Decoding,
    /// Tokens that the model has not seen yet.
    next: Vec<u32>,
    /// A token that comes first, whatever the model says.
    forced: Option<u32>,
    /// Number of tokens that it has.
    seen: usize,
    left: usize,
    scratch: Scratch,
}

impl Generation<'_> {
    /// The next token; `None` behind the last: at one that ends texts, which is not returned, after `max_tokens`, or where
    /// the model has no more positions. [`NotANumber`](ModelError::NotANumber) if the model's answer is not one.
    pub fn next(&mut self, ctx: Context<'_>, sampler: &mut Sampler) -> Result<Option<u32>> {
        if self.left == 0 || self.is_full() {
            return Ok(None);
        }
        let id = match self.forced.take() {
            Some(id) => id,
            None => {
                let logits = self.advance(ctx)?;
                sampler.choose(ctx, &logits)?
            }
        };
        self.left -= 1;
        if self.generator.special.eos().contains(&id) {
            self.left = 0;
            return Ok(None);
        }
        self.next.push(id);
        Ok(Some(id))
    }

    /// Whether the model has no position for the next token.
    pub fn is_full(&self) -> bool {
        self.seen + self.next.len() > self.generator.positions()
    }

    /// Feeds what is new to the model, and gives the logits of the token that follows.
    fn advance(&mut self, ctx: Context<'_>) -> Result<Vec<f32>> {
        let end = self.seen + self.next.len();
        let positions: Vec<_> = (self.seen as u32..end as u32).collect();
        let offsets = [0, positions.len()];
        let batch = Batch { ids: &self.next, positions: &positions, offsets: &offsets, ..Batch::default() };
        let (decoder, head) = self.generator.parts();
        let hidden = decoder.decode(&mut self.scratch.with(ctx), batch, &mut self.decoding)?;
        let last = &hidden[hidden.len() - head.in_features()..];
        self.seen = end;
        self.next.clear();
        Ok(project(ctx, head, last)?)
    }
}

/// How the next token is chosen.
#[derive(Debug)]
pub struct Sampler(Option<(NonZeroUsize, Pcg32)>);

impl Sampler {
    /// Always the most probable token.
    pub fn greedy() -> Sampler {
        Sampler(None)
    }

    /// One of the `k` most probable tokens, by their probabilities among themselves. The numbers that a seed gives are the same
    /// everywhere, and so are the bits of the logits and of softmax on every instruction set but the portable one: the
    /// same tokens are drawn.
    pub fn top_k(k: NonZeroUsize, seed: u64) -> Sampler {
        Sampler(Some((k, Pcg32::seed_from_u64(seed))))
    }

    fn choose(&mut self, ctx: Context<'_>, logits: &[f32]) -> Result<u32> {
        check_numbers("a logit", logits)?;
        let Some((k, rng)) = &mut self.0 else { return Ok(argmax(logits) as u32) };
        let (at, k) = (|id: u32| logits[id as usize], k.get().min(logits.len()));
        let order = |&a: &u32, &b: &u32| at(b).total_cmp(&at(a)).then(a.cmp(&b));
        let mut best: Vec<u32> = (0..logits.len() as u32).collect();
        best.select_nth_unstable_by(k - 1, order);
        best.truncate(k);
        best.sort_unstable_by(order);
        let mut probabilities: Vec<f32> = best.iter().map(|&id| at(id)).collect();
        softmax(ctx, MatMut::contiguous(&mut probabilities, 1, k)?)?;
        check_numbers("a probability", &probabilities)?;
        // 24 bits are exact in an f32: from 0 up to 1.
        let mut rest = (rng.next_u32() >> 8) as f32 / (1 << 24) as f32;
        let drawn = best.iter().zip(probabilities).find(|&(_, probability)| {
            rest -= probability;
            rest < 0.0
        });
        Ok(drawn.map_or(best[k - 1], |(&id, _)| id))
    }
}
