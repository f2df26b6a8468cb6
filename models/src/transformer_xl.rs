//! Transformer-XL (Dai et al. 2019, <https://arxiv.org/abs/1901.02860>): a decoder over consecutive segments, whose tokens
//! also see the inputs that each layer had in the segments before, by relative positions.

use std::borrow::Cow;
use std::path::Path;
use std::slice;

use laneformer::{Activation, Context, Graph, Heads, Inputs, Linear, Norm, Relative, RelativeTable, Terms};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{check, only, read};
use crate::embedding::Embedding;
use crate::encoder::{LayerSpec, Layers, NormPlacement};
use crate::error::check_size;
use crate::memory::{Rows, positions};
use crate::ragged::{len_of_each, offsets};
use crate::run::{project, rows};
use crate::weights::normalize;
use crate::{Checkpoint, Result, Run, Weights};

/// The epsilon of PyTorch's LayerNorm.
const EPS: f32 = 1e-5;

/// The arguments of the original `MemTransformerLM`.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of the original")]
pub struct Config {
    pub vocab_size: usize,
    pub d_model: usize,
    pub n_head: usize,
    pub d_head: usize,
    pub d_inner: usize,
    pub n_layer: usize,
    pub mem_len: usize,
    pub clamp_len: i64,
    pub same_length: bool,
    pub pre_lnorm: bool,
    pub untie_r: bool,
}

/// The decoder with its embeddings and its language-model head.
#[derive(Debug)]
pub struct TransformerXl {
    /// The configuration.
    pub config: Config,
    tokens: Embedding,
    layers: Vec<Layer>,
    /// From hidden states to logits of the next token.
    pub head: Linear,
}

#[derive(Debug)]
struct Layer {
    layers: Layers,
    /// What keys and values are projected behind, too, if that is where norms stand.
    norm: Option<Norm>,
    r: Linear,
    u: Vec<f32>,
    w: Vec<f32>,
}

/// What the layers remember of a batch of sequences: their inputs and, so that no row is projected twice, its keys and values.
#[derive(Debug)]
pub struct Memory {
    sequences: usize,
    /// Rows of each sequence.
    len: usize,
    /// Inputs, keys and values of each layer.
    layers: Vec<[Rows; 3]>,
    /// Projected positions of each layer, for distances below `reach`.
    positions: Vec<RelativeTable>,
    reach: usize,
}

impl Memory {
    /// The inputs that layer `i` remembers, [sequences, rows, d_model].
    pub fn inputs(&self, i: usize) -> Option<Vec<f32>> {
        self.layers.get(i).map(|[inputs, ..]| inputs.packed(&mut vec![]).to_vec())
    }
}

impl TransformerXl {
    /// Packs the weights; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<TransformerXl> {
        // Relative positions, and one embedding table.
        only(path, json, &[("attn_type", 0.into()), ("div_val", 1.into())])?;
        let defaults = json!({ "clamp_len": 0, "same_length": false, "pre_lnorm": false, "untie_r": false });
        let config: Config = read(path, json, defaults)?;
        let Config { vocab_size, d_model, n_head, d_head, mem_len, same_length, .. } = config;
        // Every token would see the last 0 tokens.
        check(path, "mem_len", mem_len, mem_len > 0 || !same_length, "a memory, with same_length")?;
        check(path, "d_model", d_model, d_model > 0 && d_model.is_multiple_of(2), "an even number")?;
        let fits = n_head.checked_mul(d_head).is_some();
        check(path, "d_head", d_head, fits, "a width that fits n_head heads")?;
        let w = Weights::new(checkpoint, "");
        let tokens = w.embedding("word_emb.emb_layers.0", vocab_size, d_model)?;
        let head = tokens.as_linear(Some(&w.tensor("crit.out_layers.0.bias", &[vocab_size])?))?;
        let layers = w.at("layers").layers(config.n_layer, |_, layer| Layer::load(&w, &layer, &config))?;
        Ok(TransformerXl { config, tokens, layers, head })
    }

    /// The memory before the first segment of `sequences` sequences.
    pub fn memory(&self, sequences: usize) -> Memory {
        let layers = vec![[(); 3].map(|()| Rows::new(sequences)); self.layers.len()];
        Memory { sequences, len: 0, layers, positions: vec![], reach: 0 }
    }

    /// A memory of inputs from elsewhere: those of each layer, [sequences, rows, d_model], as [`Memory::inputs`] has them.
    pub fn memory_of(&self, ctx: Context<'_>, inputs: &[Vec<f32>], sequences: usize) -> Result<Memory> {
        check_size("memory layers", self.layers.len(), inputs.len())?;
        let (d, mem_len) = (self.config.d_model, self.config.mem_len);
        let rows = len_of_each("memory", inputs.first().map_or(0, Vec::len) / d, sequences)?;
        let (mut memory, mut buffer) = (self.memory(sequences), vec![]);
        let layers = self.layers.iter().zip(&mut memory.layers).zip(inputs);
        for ((layer, [kept, keys, values]), inputs) in layers {
            check_size("memory", sequences * rows * d, inputs.len())?;
            kept.push(inputs);
            kept.keep_last(mem_len, d);
            layer.remember(ctx, kept.packed(&mut buffer), [keys, values])?;
        }
        memory.len = rows.min(mem_len);
        Ok(memory)
    }

    /// The last hidden state of every token of the next segment, [sequences, T, d_model], of ids [sequences, T].
    pub fn forward(&self, run: &mut Run<'_>, ids: &[u32], memory: &mut Memory) -> Result<Vec<f32>> {
        check_size("memory layers", self.layers.len(), memory.layers.len())?;
        let (n, mem_len) = (memory.sequences, self.config.mem_len);
        let queries = len_of_each("tokens", ids.len(), n)?;
        let len = memory.len + queries;
        if len > memory.reach {
            // And some more while the memory grows.
            let reach = (2 * len).min(mem_len.saturating_add(queries));
            let (r, distances) = (self.layers.iter().map(|layer| &layer.r), 0..reach as isize);
            memory.positions = positions(run, r, self.config.n_head, distances, self.config.clamp_len)?;
            memory.reach = reach;
        }
        // All of the memory and what comes before; with `same_length` as many keys for every query.
        let is_cut = self.config.same_length && len > mem_len;
        let graph = if is_cut { Graph::window(mem_len - 1, 0) } else { Graph::causal() };
        let (offsets, key_offsets) = (offsets(n, queries), offsets(n, len));
        let positions: Vec<_> = (0..n).flat_map(|_| memory.len as isize..len as isize).collect();

        let (mut of_keys, mut of_values) = (vec![], vec![]);
        let mut x = self.tokens.gather(ids, (self.config.d_model as f32).sqrt())?;
        let layers = self.layers.iter().zip(&mut memory.layers).zip(&memory.positions);
        for ((layer, [kept, keys, values]), table) in layers {
            layer.remember(run.ctx, &x, [keys, values])?;
            let heads = layer.layers.heads;
            let mut stored = run.scratch.take_store(&heads, n * len, &key_offsets)?;
            let k = rows(keys.packed(&mut of_keys), heads.key_cols())?;
            let v = rows(values.packed(&mut of_values), heads.value_cols())?;
            stored.set(run.ctx, k, v, &key_offsets)?;
            kept.push(&x);
            kept.keep_last(mem_len, self.config.d_model);
            keys.keep_last(mem_len, heads.key_cols());
            values.keep_last(mem_len, heads.value_cols());
            let relative = Some(Relative { u: &layer.u, w: &layer.w, table });
            let mut inputs = Inputs {
                sources: slice::from_ref(&stored),
                source_graph: &graph,
                source_terms: Terms { relative, ..Terms::default() },
                source_positions: Some(&positions),
                ..Inputs::new(&offsets, &graph)
            };
            layer.layers.forward(run, &mut x, &mut inputs)?;
            run.scratch.give_stores([stored]);
        }
        memory.len = len.min(mem_len);
        Ok(x)
    }
}

impl Layer {
    fn load(root: &Weights<'_>, w: &Weights<'_>, config: &Config) -> Result<Layer> {
        let Config { d_model: d, n_head, d_head, d_inner, .. } = *config;
        let (heads, attention) = (Heads::new(n_head, d_head)?, w.at("dec_attn"));
        let placement = if config.pre_lnorm { NormPlacement::Pre } else { NormPlacement::Post };
        let spec =
            LayerSpec { d_model: d, ..LayerSpec::new(heads, d_inner, Activation::Relu, placement, EPS) };
        let cols = heads.query_cols();
        let [q, k, v] = attention.qkv("qkv_net.weight", None, d, cols)?;
        let out = attention.at("o_net").linear_without_bias(cols, d)?;
        let ffn = spec.ffn(w, ["pos_ff.CoreNet.0", "pos_ff.CoreNet.3"], "pos_ff.layer_norm")?;
        let placement = spec.placement(&attention, "layer_norm")?;
        let biases = if config.untie_r { &attention } else { root };
        let bias = |name| biases.tensor(name, &[n_head, d_head]).map(Cow::into_owned);
        let norm = config.pre_lnorm.then(|| spec.norm(&attention.at("layer_norm"))).transpose()?;
        Ok(Layer {
            layers: spec.reader([q, k, v], out, placement, ffn)?,
            norm,
            r: attention.at("r_net").linear_without_bias(d, cols)?,
            u: bias("r_w_bias")?,
            w: bias("r_r_bias")?,
        })
    }

    /// Projects the inputs of the layer to keys and values, behind those that are there.
    fn remember(&self, ctx: Context<'_>, x: &[f32], kept: [&mut Rows; 2]) -> Result<()> {
        let mut x = Cow::Borrowed(x);
        if let Some(norm) = &self.norm {
            normalize(ctx, norm, x.to_mut())?;
        }
        let maps = self.layers.cross().flat_map(|cross| cross.projections().into_iter().skip(1));
        for (kept, map) in kept.into_iter().zip(maps) {
            kept.push(&project(ctx, map, &x)?);
        }
        Ok(())
    }
}
