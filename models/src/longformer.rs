//! Longformer (Beltagy et al. 2020, <https://arxiv.org/abs/2004.05150>): BERT whose tokens see a window around them and a few
//! global tokens, which see everything through projections of their own.

use std::path::Path;
use std::slice;

use laneformer::{
    Context, Epilogue, Graph, Heads, Inputs, KeyStore, Linear, MatMut, MatRef, Norm, PackedMatrix, QueryRows,
    Terms,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bert::{self, ATTENTION, FFN};
use crate::config::{check, only, read};
use crate::embedding::Embeddings;
use crate::encoder::{Attention, LayerSpec, Layers, Part, Qkv};
use crate::error::check_size;
use crate::head;
use crate::ragged::{Ragged, keys};
use crate::run::rows;
use crate::weights::{linear, normalize};
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

/// The attention of the global rows, where all rows are its source.
const GLOBAL: Part = Part::CrossAttention(Attention {
    qkv: Qkv::Each(["self.query_global", "self.key_global", "self.value_global"]),
    ..ATTENTION
});

#[derive(Debug)]
struct Layer {
    local: Layers,
    global: Layers,
    ffn: Layers,
    norm: Norm,
    /// `W_k^T` and `W_v` of each global head, for [`attend_few`](Layer::attend_few): a second copy, as a head's part of the packed maps of
    /// `global` is not read alone. The map of what the heads gather is in `local` and in `global`.
    few: Vec<[Linear; 2]>,
    reach: usize,
}

impl Longformer {
    /// Packs the weights of a checkpoint, with or without `longformer.` before their names; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<Longformer> {
        only(path, json, &[("model_type", "longformer".into())])?;
        let config = bert::Config::part(path, json)?;
        let Fields { attention_window, pad_token_id } = read(path, json, json!({ "pad_token_id": 1 }))?;
        let spec = config.layers(path)?;
        let n = config.num_hidden_layers;
        let (windows, has_each) = match &attention_window {
            Windows::Same(window) => (slice::from_ref(window), true),
            Windows::Each(windows) => (&windows[..], windows.len() == n),
        };
        let fit = has_each && windows.iter().all(|&window| window > 0 && window.is_multiple_of(2));
        let expected = format!("a positive even number for each of {n} layers");
        check(path, "attention_window", format!("{windows:?}"), fit, expected)?;
        let layer = |i, w: Weights<'_>| Layer::load(&w, &spec, windows[i % windows.len()] / 2);
        let w = checkpoint.root(&["", "longformer."], "embeddings.word_embeddings.weight");
        let has_positions = (pad_token_id as usize).saturating_add(1) < config.max_position_embeddings;
        check(path, "pad_token_id", pad_token_id, has_positions, "less than the positions but one")?;
        Ok(Longformer {
            embeddings: config.embeddings(&w.at("embeddings"))?,
            layers: w.at("encoder.layer").layers(n, layer)?,
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
        let (columns, everything) = (keys(batch.offsets, is_global)?, batch.real(Graph::full())?);
        let d = self.config.hidden_size;
        let few: Vec<bool> =
            batch.offsets.windows(2).map(|ends| self.has_few(&batch, is_global, ends)).collect();
        let many = Ragged::choose(batch.offsets, |sequence, row| is_global[row] && !few[sequence]);
        let few = Ragged::choose(batch.offsets, |sequence, row| is_global[row] && few[sequence]);
        // The rows of a layer as keys and values.
        let mut inputs = None;
        if !few.is_empty() {
            inputs = Some(run.scratch.take_store(&Heads::new(1, d)?, batch.ids.len(), batch.offsets)?);
        }
        for layer in &self.layers {
            // Everything for the global rows, and the window and the global columns for the others.
            let (mut of_few, mut of_many) = (few.gather(&x, d)?, many.gather(&x, d)?);
            if let Some(inputs) = &mut inputs {
                let all = rows(&x, d)?;
                inputs.set(run.ctx, all, all, batch.offsets)?;
                layer.attend_few(run, &mut of_few, few.offsets(), inputs, &everything)?;
            }
            if !many.is_empty() {
                let sources = layer.global.sources(run, &x, batch.offsets)?;
                let full = Graph::full();
                let inputs = Inputs::new(many.offsets(), &full);
                let mut inputs = Inputs { sources: &sources, source_graph: &everything, ..inputs };
                layer.global.forward(run, &mut of_many, &mut inputs)?;
                run.scratch.give_stores(sources);
            }
            let local = batch.real(Graph::window(layer.reach, layer.reach).with_columns(columns.clone()))?;
            layer.local.forward(run, &mut x, &mut Inputs::new(batch.offsets, &local))?;
            few.scatter_into(&of_few, d, &mut x);
            many.scatter_into(&of_many, d, &mut x);
            run.scratch.give(of_few);
            layer.ffn.encode(run, &mut x, batch.offsets)?;
        }
        run.scratch.give_stores(inputs);
        Ok(x)
    }

    /// Whether the global rows of a sequence go by [`Layer::attend_few`]: the same way alone and in any batch.
    fn has_few(&self, batch: &Batch<'_>, is_global: &[bool], ends: &[usize]) -> bool {
        let (d, n_heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let (sequence, t) = (ends[0]..ends[1], ends[1] - ends[0]);
        let n = is_global[sequence.clone()].iter().filter(|&&global| global).count();
        let sees_some = batch.is_real.is_none_or(|is_real| is_real[sequence].contains(&true));
        // Twice the multiply-adds of the few, as their products are smaller, against those of the projections and what they save.
        sees_some && 2 * n * (d + n_heads * t) <= t * (d + n)
    }

    /// The pooler over the first token of every sequence, [sequences, hidden_size]; `None` without a pooler.
    pub fn pool(&self, ctx: Context<'_>, hidden: &[f32], offsets: &[usize]) -> Result<Option<Vec<f32>>> {
        self.pooler.as_ref().map(|pooler| head::pool(ctx, pooler, hidden, offsets)).transpose()
    }
}

impl Layer {
    fn load(w: &Weights<'_>, spec: &LayerSpec, reach: usize) -> Result<Layer> {
        let (d, attention) = (spec.d_model, w.at("attention.self"));
        let tensor = |name, shape: &[usize]| attention.tensor(name, shape);
        let (keys, values) = (tensor("key_global.weight", &[d, d])?, tensor("value_global.weight", &[d, d])?);
        let (bias, dim) = (tensor("value_global.bias", &[d])?, spec.heads.head_dim);
        let of_head =
            keys.chunks_exact(dim * d).zip(values.chunks_exact(dim * d)).zip(bias.chunks_exact(dim));
        let few = of_head.map(|((keys, values), bias)| {
            let keys = Linear::new(PackedMatrix::from_in_out(MatRef::contiguous(keys, dim, d)?)?, None)?;
            Ok([keys, linear(values, d, dim, Some(bias))?])
        });
        let few = few.collect::<Result<_>>()?;
        let part = |part| spec.single(w, &[part]);
        let (local, global, ffn) = (part(Part::SelfAttention(ATTENTION))?, part(GLOBAL)?, part(FFN)?);
        Ok(Layer { local, global, ffn, norm: spec.norm(&w.at(ATTENTION.norm))?, few, reach })
    }

    /// As `global`, of few rows that each see something, without a projection of all keys and values: as
    /// `q . W_k x = (W_k^T q) . x` and `sum p (W_v x + b) = W_v (sum p x) + b`, the rows of the tokens, `inputs`, are keys and values
    /// themselves, of one head that all query heads share. The bias of the keys adds the same to every score of a query, so softmax does
    /// not see it.
    fn attend_few(
        &self,
        run: &mut Run<'_>,
        x: &mut Vec<f32>,
        offsets: &[usize],
        inputs: &KeyStore,
        graph: &Graph,
    ) -> Result<()> {
        let Some(cross) = self.global.cross().next() else { return Ok(()) };
        let ([q, ..], d) = (cross.projections(), self.norm.channels());
        let Heads { n_heads, head_dim, scale, .. } = *cross.heads();
        let (n, wide) = (x.len() / d, n_heads * d);
        let shared = Heads::new(n_heads, d)?.with_kv_heads(1)?.with_scale(scale);
        let q = run.project(q, x, &Epilogue::NONE)?;
        let [mut queries, mut sums] = [(); 2].map(|()| run.scratch.take(n * wide));
        for (head, [keys, _]) in self.few.iter().enumerate() {
            let q = MatRef::new(&q[head * head_dim..], n, head_dim, d)?;
            let queries = MatMut::new(&mut queries[head * d..], n, d, wide)?;
            keys.forward(run.ctx, q, &Epilogue::NONE, queries)?;
        }
        let of_inputs = QueryRows::new(MatRef::contiguous(&queries, n, wide)?, offsets);
        let out = MatMut::contiguous(&mut sums, n, wide)?;
        inputs.attend(run.ctx, &shared, &of_inputs, graph, &Terms::default(), out)?;
        // The queries have been read: their rows are as wide.
        let mut gathered = q;
        for (head, [_, values]) in self.few.iter().enumerate() {
            let sums = MatRef::new(&sums[head * d..], n, d, wide)?;
            let out = MatMut::new(&mut gathered[head * head_dim..], n, head_dim, d)?;
            values.forward(run.ctx, sums, &Epilogue::NONE, out)?;
        }
        *x = run.project(cross.out(), &gathered, &Epilogue::NONE.with_residual(1.0, rows(x, d)?))?;
        [queries, sums, gathered].into_iter().for_each(|rows| run.scratch.give(rows));
        normalize(run.ctx, &self.norm, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    #[test]
    fn both_ways_of_global_rows_agree() -> Result<()> {
        let config = json!({
            "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8,
            "max_position_embeddings": 40, "attention_window": 6, "type_vocab_size": 1,
        });
        let checkpoint = Checkpoint::random(3);
        let model = Longformer::load(Path::new("config"), &config, &checkpoint)?;
        let (layer, d) = (&model.layers[0], 24);
        // More than a chunk of keys, and a sequence without global rows.
        let (offsets, globals) = ([0, 300, 310, 330], [0, 5, 5, 6]);
        let x = checkpoint.tensor("x", &[330, d])?;
        let queries = checkpoint.tensor("queries", &[6, d])?;
        let mut scratch = Scratch::default();
        let run = &mut scratch.with(Context::serial());
        let mut inputs = KeyStore::new(&Heads::new(1, d)?, 330, 3)?;
        inputs.set(run.ctx, rows(&x, d)?, rows(&x, d)?, &offsets)?;
        let (mut few, mut many) = (queries.to_vec(), queries.to_vec());
        layer.attend_few(run, &mut few, &globals, &inputs, &Graph::full())?;
        let (sources, full) = (layer.global.sources(run, &x, &offsets)?, Graph::full());
        let mut seen = Inputs { sources: &sources, ..Inputs::new(&globals, &full) };
        layer.global.forward(run, &mut many, &mut seen)?;
        assert_eq!(few.len(), many.len());
        for (few, many) in few.iter().zip(&many) {
            assert!((few - many).abs() < 1e-5 && *many != 0.0, "{few} {many}");
        }
        Ok(())
    }
}
