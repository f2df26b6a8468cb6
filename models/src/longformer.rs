//! Longformer (Beltagy et al. 2020, <https://arxiv.org/abs/2004.05150>): BERT whose tokens see a window around them and a few
//! global tokens, which see everything through projections of their own.

use std::path::Path;

use laneformer::{Context, Graph, Linear};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::attend::{Block, Projections};
use crate::bert::{self, ATTENTION, FFN};
use crate::config::{check, check_model_type, from_value, with_defaults};
use crate::embedding::Embeddings;
use crate::encoder::LayerSpec;
use crate::error::check_size;
use crate::head;
use crate::ragged::keys;
use crate::{Batch, Checkpoint, Result, Run, Weights};

/// What `config.json` of a Longformer directory has beyond that of a BERT.
#[derive(Deserialize)]
struct Fields {
    attention_window: Windows,
    pad_token_id: u32,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, or one for each layer")]
enum Windows {
    Same(usize),
    Each(Vec<usize>),
}

/// One window for all layers is written out for each: more than so many are a mistake, not a model.
const MOST_LAYERS: usize = 1 << 16;

/// Keys that a token sees on each side, by layer.
fn reach(path: &Path, n: usize, windows: Windows) -> Result<Vec<usize>> {
    check(path, "num_hidden_layers", n, n <= MOST_LAYERS, format!("at most {MOST_LAYERS}"))?;
    let windows = match windows {
        Windows::Same(window) => vec![window; n],
        Windows::Each(windows) => windows,
    };
    let fit = windows.len() == n && windows.iter().all(|&window| window > 0 && window.is_multiple_of(2));
    let expected = format!("a positive even number for each of {n} layers");
    check(path, "attention_window", format!("{windows:?}"), fit, expected)?;
    Ok(windows.iter().map(|window| window / 2).collect())
}

/// The encoder and, if the checkpoint has one, its pooler.
#[derive(Debug)]
pub struct Longformer {
    /// What its configuration has in common with BERT's.
    pub config: bert::Config,
    /// The token of padding, which has no position of its own.
    pub pad_token_id: u32,
    /// Of words, types and positions.
    pub embeddings: Embeddings,
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
    /// Packs the weights of a checkpoint, with or without `longformer.` before their names; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Longformer> {
        check_model_type(path, json, "longformer")?;
        let json = with_defaults(Some(json), bert::defaults());
        let json = with_defaults(Some(&json), json!({ "pad_token_id": 1 }));
        let Fields { attention_window, pad_token_id } = from_value(path, json.clone())?;
        let config: bert::Config = from_value(path, json)?;
        let spec = config.layers(path)?;
        let reach = reach(path, config.num_hidden_layers, attention_window)?;
        let w = checkpoint.root(&["", "longformer."], "embeddings.word_embeddings.weight");
        Ok(Longformer {
            embeddings: config.embeddings(&w.at("embeddings"))?,
            layers: w.at("encoder.layer").layers(reach.len(), |i, w| Layer::load(&w, &spec, reach[i]))?,
            pooler: bert::pooler(&w, spec.d_model)?,
            config,
            pad_token_id,
        })
    }

    /// The longest sequence: the first rows of the position table are before that of the first token.
    pub fn max_tokens(&self) -> usize {
        let before = (self.pad_token_id as usize).saturating_add(1);
        self.config.max_position_embeddings.saturating_sub(before)
    }

    /// The positions of a sequence's tokens, padding included: they count the tokens that are not padding, from behind its id.
    pub fn positions(&self, ids: &[u32]) -> Vec<u32> {
        let pad = self.pad_token_id;
        let mut last = pad;
        let position = |&id: &u32| {
            last = last.saturating_add(u32::from(id != pad));
            if id == pad { pad } else { last }
        };
        ids.iter().map(position).collect()
    }

    /// The last hidden state of every token, [T, hidden_size]. `is_global` tokens see and are seen by all of their
    /// sequence.
    pub fn forward(&self, run: &mut Run<'_>, batch: Batch<'_>, is_global: &[bool]) -> Result<Vec<f32>> {
        check_size("is_global", batch.ids.len(), is_global.len())?;
        let mut x = self.embeddings.forward(run.ctx, batch)?;
        let globals = Globals::new(batch.offsets, is_global);
        let (columns, everything) = (keys(batch.offsets, is_global)?, batch.real(Graph::full())?);
        for layer in &self.layers {
            // The window and the global columns for all rows, then everything for the global rows.
            let local = batch.real(Graph::window(layer.reach, layer.reach).with_columns(columns.clone()))?;
            let own = &layer.block.projections;
            let mut attended = own.attend_to(run, &x, batch.offsets, (&x, batch.offsets), &local)?;
            if !globals.rows.is_empty() {
                let d = layer.global.q.in_features();
                let rows: Vec<f32> =
                    globals.rows.iter().flat_map(|&row| &x[row * d..][..d]).copied().collect();
                let source = (&x[..], batch.offsets);
                let seen = layer.global.attend_to(run, &rows, &globals.offsets, source, &everything)?;
                for (seen, &row) in seen.chunks_exact(d).zip(&globals.rows) {
                    attended[row * d..][..d].copy_from_slice(seen);
                }
            }
            layer.block.close(run, &mut x, attended)?;
        }
        Ok(x)
    }

    /// The pooler over the first token of every sequence, [sequences, hidden_size]; `None` without a pooler.
    pub fn pool(&self, ctx: Context<'_>, hidden: &[f32], offsets: &[usize]) -> Result<Option<Vec<f32>>> {
        self.pooler.as_ref().map(|pooler| head::pool(ctx, pooler, hidden, offsets)).transpose()
    }
}

impl Layer {
    fn load(w: &Weights<'_>, spec: &LayerSpec, reach: usize) -> Result<Layer> {
        let global = |name| w.at("attention.self").at(name).linear(spec.d_model, spec.d_model);
        let (q, k, v) = (global("query_global")?, global("key_global")?, global("value_global")?);
        let block = spec.block(w, &ATTENTION, &FFN)?;
        Ok(Layer { block, global: Projections { q, k, v, heads: spec.heads }, reach })
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
