//! Longformer (Beltagy et al. 2020, <https://arxiv.org/abs/2004.05150>): BERT whose tokens see a window around them and a few
//! global tokens, which see everything through projections of their own.

use std::path::Path;

use laneformer::{Activation, Bits, Context, Graph, Heads, Linear};
use serde::Deserialize;

use crate::attend::{Block, Projections, Seen};
use crate::bert::{self, Batch, Embeddings, attention_parts, ffn};
use crate::checkpoint::Checkpoint;
use crate::config::{activation, from_value, read_json};
use crate::error::check_size;
use crate::ragged::Scratch;
use crate::weights::Weights;
use crate::{Error, Result};

/// `config.json` of a Longformer directory.
#[derive(Clone, Debug)]
pub struct Config {
    /// What it has in common with BERT.
    pub bert: bert::Config,
    /// Keys that a token sees on each side, by layer.
    pub reach: Vec<usize>,
    /// The token of padding, which has no position of its own.
    pub pad_token_id: u32,
}

#[derive(Deserialize)]
struct Fields {
    attention_window: Windows,
    #[serde(default = "one")]
    pad_token_id: u32,
}

fn one() -> u32 {
    1
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, or one for each layer")]
enum Windows {
    Same(usize),
    Each(Vec<usize>),
}

/// One window for all layers is written out for each: more than so many are a mistake, not a model.
const MOST_LAYERS: usize = 1 << 16;

impl Config {
    /// Reads `path`, which must describe a Longformer.
    pub fn open(path: &Path) -> Result<Config> {
        Config::from_json(path, read_json(path)?)
    }

    /// As [`Config::open`], from parsed JSON; `path` is for messages.
    pub fn from_json(path: &Path, mut json: serde_json::Value) -> Result<Config> {
        let model_type = json.as_object_mut().and_then(|fields| fields.remove("model_type"));
        if let Some(model_type) = model_type.filter(|model_type| model_type != "longformer") {
            return Err(Error::config(path, "model_type", "\"longformer\"", model_type));
        }
        let Fields { attention_window, pad_token_id } = from_value(path, json.clone())?;
        let bert = bert::Config::from_json(path, json)?;
        let n = bert.num_hidden_layers;
        if n > MOST_LAYERS {
            return Err(Error::config(path, "num_hidden_layers", format!("at most {MOST_LAYERS}"), n));
        }
        let windows = match attention_window {
            Windows::Same(window) => vec![window; n],
            Windows::Each(windows) => windows,
        };
        if windows.len() != n || windows.iter().any(|&window| window == 0 || !window.is_multiple_of(2)) {
            let expected = format!("a positive even number for each of {n} layers");
            return Err(Error::config(path, "attention_window", expected, format!("{windows:?}")));
        }
        Ok(Config { bert, reach: windows.iter().map(|window| window / 2).collect(), pad_token_id })
    }
}

/// The encoder with its embeddings and, if the checkpoint has one, its pooler.
#[derive(Debug)]
pub struct Longformer {
    config: Config,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    pooler: Option<Linear>,
}

#[derive(Debug)]
struct Layer {
    block: Block,
    global: Projections,
    reach: usize,
}

impl Longformer {
    /// Loads a directory with `config.json` and `model.safetensors`.
    pub fn open(dir: &Path) -> Result<Longformer> {
        let path = dir.join("config.json");
        Longformer::load(&path, Config::open(&path)?, &Checkpoint::open(&dir.join("model.safetensors"))?)
    }

    /// Packs the weights of a checkpoint, with or without `longformer.` before their names; `path` is for messages.
    pub fn load(path: &Path, config: Config, checkpoint: &Checkpoint) -> Result<Longformer> {
        let w = checkpoint.root(&["", "longformer."], "embeddings.word_embeddings.weight");
        let (bert, d) = (&config.bert, config.bert.hidden_size);
        let act = activation(path, "hidden_act", &bert.hidden_act)?;
        let embeddings = Embeddings::load(&w.at("embeddings"), bert)?;
        let layer = |i: usize, w| Layer::load(&w, bert, act, config.reach[i]);
        let layers = w.at("encoder.layer").layers(config.reach.len(), layer)?;
        let pooler = w.at("pooler.dense");
        let pooler = if pooler.has("weight") { Some(pooler.linear(d, d)?) } else { None };
        Ok(Longformer { config, embeddings, layers, pooler })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The longest sequence: the first rows of the position table are before that of the first token.
    pub fn max_tokens(&self) -> usize {
        let before = (self.config.pad_token_id as usize).saturating_add(1);
        self.config.bert.max_position_embeddings.saturating_sub(before)
    }

    /// Every token and type is in its embedding table.
    pub fn check(&self, ids: &[u32], type_ids: &[u32]) -> Result<()> {
        self.embeddings.check(ids, type_ids)
    }

    /// The positions of a sequence's tokens, padding included: they count the tokens that are not padding, from behind its id.
    pub fn positions(&self, ids: &[u32]) -> Vec<u32> {
        let pad = self.config.pad_token_id;
        let mut last = pad;
        let position = |&id: &u32| {
            last = last.saturating_add(u32::from(id != pad));
            if id == pad { pad } else { last }
        };
        ids.iter().map(position).collect()
    }

    /// The last hidden state of every token, [T, hidden_size]. `is_global` tokens see and are seen by all of their
    /// sequence; those that are not `is_real`, padding between the others, are not seen.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        batch: Batch<'_>,
        is_global: &[bool],
        is_real: &[bool],
        scratch: &mut Scratch,
    ) -> Result<Vec<f32>> {
        check_size("is_global", batch.ids.len(), is_global.len())?;
        check_size("is_real", batch.ids.len(), is_real.len())?;
        let d = self.config.bert.hidden_size;
        let mut x = self.embeddings.forward(ctx, batch, d)?;
        let globals = Globals::new(batch.offsets, is_global);
        let real = keys(batch.offsets, is_real)?;
        let real =
            |graph: Graph| if is_real.contains(&false) { graph.with_bits(real.clone()) } else { graph };
        let columns = keys(batch.offsets, is_global)?;
        let everything = real(Graph::full());
        for layer in &self.layers {
            let local = real(Graph::window(layer.reach, layer.reach).with_columns(columns.clone()));
            let attended = layer.attend(ctx, &x, batch.offsets, &local, &globals, &everything, scratch)?;
            layer.block.close(ctx, &mut x, attended, scratch)?;
        }
        Ok(x)
    }

    /// The pooler over the first token of every sequence, [sequences, hidden_size]; `None` without a pooler.
    ///
    /// # Errors
    /// As [`Bert::pool`](bert::Bert::pool).
    pub fn pool(&self, ctx: Context<'_>, hidden: &[f32], offsets: &[usize]) -> Result<Option<Vec<f32>>> {
        self.pooler.as_ref().map(|pooler| bert::pool(ctx, pooler, hidden, offsets)).transpose()
    }
}

impl Layer {
    fn load(w: &Weights<'_>, bert: &bert::Config, act: Activation, reach: usize) -> Result<Layer> {
        let d = bert.hidden_size;
        let heads = Heads::new(bert.num_attention_heads, d / bert.num_attention_heads)?;
        let ([q, k, v], out, placement) = attention_parts(&w.at("attention"), bert)?;
        let global = |name| w.at("attention.self").at(name).linear(d, d);
        let (q_global, k_global) = (global("query_global")?, global("key_global")?);
        let global = Projections { q: q_global, k: k_global, v: global("value_global")?, heads };
        let ffn = ffn(&w.at("intermediate"), &w.at("output"), bert, act)?;
        let block = Block::new(Projections { q, k, v, heads }, out, placement, ffn)?;
        Ok(Layer { block, global, reach })
    }

    /// The window and the global columns for all rows, then everything for the global rows.
    fn attend(
        &self,
        ctx: Context<'_>,
        x: &[f32],
        offsets: &[usize],
        local: &Graph,
        globals: &Globals,
        everything: &Graph,
        scratch: &mut Scratch,
    ) -> Result<Vec<f32>> {
        let projections = &self.block.projections;
        let keys = projections.keys(ctx, x, x, offsets, scratch)?;
        let mut attended = projections.attend(ctx, x, &Seen::new(&keys, offsets, local), scratch)?;
        scratch.give_store(keys);
        if globals.rows.is_empty() {
            return Ok(attended);
        }
        let keys = self.global.keys(ctx, x, x, offsets, scratch)?;
        let seen = Seen::new(&keys, &globals.offsets, everything);
        let d = self.global.q.in_features();
        let queries: Vec<f32> = globals.rows.iter().flat_map(|&row| &x[row * d..][..d]).copied().collect();
        let global = self.global.attend(ctx, &queries, &seen, scratch)?;
        scratch.give_store(keys);
        for (result, &row) in global.chunks_exact(d).zip(&globals.rows) {
            attended[row * d..][..d].copy_from_slice(result);
        }
        Ok(attended)
    }
}

/// The global rows of a batch.
struct Globals {
    rows: Vec<usize>,
    offsets: Vec<usize>,
}

impl Globals {
    fn new(offsets: &[usize], is_global: &[bool]) -> Globals {
        let rows: Vec<usize> = (0..is_global.len()).filter(|&row| is_global[row]).collect();
        let offsets = offsets.iter().map(|&end| rows.partition_point(|&row| row < end)).collect();
        Globals { rows, offsets }
    }
}

/// The chosen tokens of each sequence as keys.
fn keys(offsets: &[usize], chosen: &[bool]) -> Result<Bits> {
    let sequences: Option<Vec<_>> = offsets.windows(2).map(|ends| chosen.get(ends[0]..ends[1])).collect();
    let sequences = sequences.ok_or(laneformer::Error::NotAscending { arg: "offsets", at: 0 })?;
    Ok(Bits::keys(&sequences)?)
}
