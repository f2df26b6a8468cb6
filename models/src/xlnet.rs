//! XLNet (Yang et al. 2019, <https://arxiv.org/abs/1906.08237>): Transformer-XL's relative positions and memory, in both
//! directions, with relative segments and, where targets are predicted, a second stream that does not see its own token.

use std::borrow::Cow;
use std::path::Path;

use laneformer::{
    Activation, Bits, Graph, Inputs, KeyStore, Linear, MatRef, PackedMatrix, Relative, RelativeTable,
    SegmentTerm, Terms,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{activation, check, epsilon, heads, only, read};
use crate::embedding::Embedding;
use crate::encoder::{LayerSpec, Layers, NormPlacement};
use crate::error::{check_most, check_size};
use crate::memory::{Rows, positions};
use crate::ragged::{len_of_each, offsets};
use crate::weights::linear;
use crate::{Checkpoint, Result, Run, Weights};

/// `config.json` of an XLNet directory.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of Hugging Face")]
pub struct Config {
    pub vocab_size: usize,
    pub d_model: usize,
    pub n_head: usize,
    pub d_inner: usize,
    pub n_layer: usize,
    #[serde(deserialize_with = "activation")]
    pub ff_activation: Activation,
    pub attn_type: Directions,
    pub clamp_len: i64,
    pub same_length: bool,
    pub mem_len: Option<usize>,
    #[serde(deserialize_with = "epsilon")]
    pub layer_norm_eps: f32,
}

/// What tokens see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Directions {
    /// All of their sequence.
    Bi,
    /// What is before them.
    Uni,
}

/// A batch of sequences of the same length T, padding included.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// How many sequences.
    pub sequences: usize,
    /// Tokens [sequences, T].
    pub ids: &'a [u32],
    /// Which tokens are no padding [sequences, T]; all if absent.
    pub is_real: Option<&'a [bool]>,
    /// The segment of every token [sequences, T]; without them there is no such term.
    pub segments: Option<&'a [u32]>,
    /// Whom a token may not see, [sequences, T, T].
    pub is_hidden: Option<&'a [bool]>,
    /// The places to predict, as many for each sequence: [sequences, targets].
    pub targets: Option<&'a [usize]>,
    /// The memory of each layer [sequences, M, d_model], of segment 0; none at first.
    pub mems: &'a [Vec<f32>],
}

/// Positions relative to one another as each layer of a model sees them. They depend on the model and on lengths alone, so one serves all
/// batches within its reach.
#[derive(Debug)]
pub struct Positions {
    tokens: usize,
    /// Rows of memory and tokens.
    keys: usize,
    layers: Vec<RelativeTable>,
}

/// What the layers make of a batch.
#[derive(Clone, Debug)]
pub struct Output {
    /// The content stream [sequences, T, d_model].
    pub content: Vec<f32>,
    /// The query stream [sequences, targets, d_model], if there are targets.
    pub queries: Option<Vec<f32>>,
    /// The memory of each layer for the next call [sequences, M, d_model].
    pub mems: Vec<Vec<f32>>,
}

/// The layers with their embeddings and the language-model head.
#[derive(Debug)]
pub struct XlNet {
    /// The configuration.
    pub config: Config,
    tokens: Embedding,
    mask_emb: Vec<f32>,
    layers: Vec<Layer>,
    /// From the rows of a stream to logits of their tokens.
    pub head: Linear,
}

#[derive(Debug)]
struct Layer {
    layers: Layers,
    r: Linear,
    u: Vec<f32>,
    w: Vec<f32>,
    s: Vec<f32>,
    seg_embed: Vec<f32>,
}

impl XlNet {
    /// Packs the weights; `path` is for messages.
    pub fn load(path: &Path, json: &Value, checkpoint: &Checkpoint) -> Result<XlNet> {
        only(path, json, &[("tie_word_embeddings", true.into()), ("bi_data", false.into())])?;
        only(path, json, &[("reuse_len", 0.into())])?;
        let defaults = json!({
            "ff_activation": "gelu", "attn_type": "bi", "clamp_len": 0, "same_length": false, "layer_norm_eps": 1e-12,
        });
        let config: Config = read(path, json, defaults)?;
        let (d, act, eps) = (config.d_model, config.ff_activation, config.layer_norm_eps);
        let heads = heads(path, "n_head", d, config.n_head)?;
        check(path, "d_model", d, d.is_multiple_of(2), "an even number")?;
        let spec = LayerSpec::new(heads, config.d_inner, act, NormPlacement::Post, eps);
        let root = Weights::new(checkpoint, "");
        let w = root.at("transformer");
        let tokens = w.embedding("word_embedding", config.vocab_size, d)?;
        let head = tokens.as_linear(Some(&root.tensor("lm_loss.bias", &[config.vocab_size])?))?;
        let mask_emb = w.tensor("mask_emb", &[1, 1, d])?.into_owned();
        let layers = w.at("layer").layers(config.n_layer, |_, w| Layer::load(&w, &spec))?;
        Ok(XlNet { config, tokens, mask_emb, layers, head })
    }

    /// The positions of batches with up to `tokens` tokens in a sequence, and up to `memory` rows of memory before them.
    pub fn positions(&self, run: &mut Run<'_>, tokens: usize, memory: usize) -> Result<Positions> {
        len_of_each("tokens", tokens, 1)?;
        // From the first token before the last key to the last after the first.
        let n = memory.checked_add(tokens).and_then(|keys| keys.checked_add(tokens - 1));
        let n = n.filter(|&n| i32::try_from(n).is_ok());
        let n = n.ok_or(laneformer::Error::Overflow { arg: "tokens and memory" })?;
        let distances = 1 - tokens as isize..n as isize + 1 - tokens as isize;
        let r = self.layers.iter().map(|layer| &layer.r);
        let layers = positions(run, r, self.config.n_head, distances, self.config.clamp_len)?;
        Ok(Positions { tokens, keys: memory + tokens, layers })
    }

    /// Runs the content stream and, if there are targets, the query stream. `positions` reach as far as the batch.
    pub fn forward(&self, run: &mut Run<'_>, batch: &Batch<'_>, positions: &Positions) -> Result<Output> {
        let [t, memory] = self.sizes(batch, positions)?;
        let (n, d) = (batch.sequences, self.config.d_model);
        let key_offsets = offsets(n, memory + t);
        // In one direction only what comes before, with `same_length` as many keys for every query.
        let graph = match (self.config.attn_type, self.config.same_length) {
            (Directions::Bi, _) => Graph::full(),
            (_, false) => Graph::causal(),
            (_, true) => Graph::window(memory, 0),
        };
        let content = Stream::new(batch, [t, memory], graph.clone(), None)?;
        let stream = |targets| Stream::new(batch, [t, memory], graph, Some(targets));
        let targets = batch.targets.map(stream).transpose()?;
        let mem_len = self.config.mem_len.filter(|&len| len > 0).unwrap_or(usize::MAX);

        let mut h = self.tokens.gather(batch.ids, 1.0)?;
        let mut g = batch.targets.map(|targets| self.mask_emb.repeat(targets.len()));
        let (mut mems, mut buffer) = (vec![], vec![]);
        for (i, (layer, table)) in self.layers.iter().zip(&positions.layers).enumerate() {
            // Both streams read the content as it enters the layer.
            let mut source = Rows::new(n);
            source.push(batch.mems.get(i).map_or(&[], Vec::as_slice));
            source.push(&h);
            let keys = layer.layers.sources(run, source.packed(&mut buffer), &key_offsets)?;
            layer.advance(run, &mut h, &content, &keys, table)?;
            if let Some((g, targets)) = g.as_mut().zip(targets.as_ref()) {
                layer.advance(run, g, targets, &keys, table)?;
            }
            run.scratch.give_stores(keys);
            source.keep_last(mem_len, d);
            mems.push(source.packed(&mut buffer).to_vec());
        }
        Ok(Output { content: h, queries: g, mems })
    }

    /// Tokens of every sequence and rows of its memory, if everything fits.
    fn sizes(&self, batch: &Batch<'_>, positions: &Positions) -> Result<[usize; 2]> {
        let (n, tokens, layers) = (batch.sequences, batch.ids.len(), self.layers.len());
        let queries = len_of_each("tokens", tokens, n)?;
        let memory = batch.mems.first().map_or(0, Vec::len) / (n * self.config.d_model);
        check_size("mems.len()", if batch.mems.is_empty() { 0 } else { layers }, batch.mems.len())?;
        for mems in batch.mems {
            check_size("mems", n * memory * self.config.d_model, mems.len())?;
        }
        check_size("layers of the positions", layers, positions.layers.len())?;
        check_most("tokens", positions.tokens, queries)?;
        check_most("tokens and memory", positions.keys, memory + queries)?;
        check_size("is_real", tokens, batch.is_real.map_or(tokens, <[bool]>::len))?;
        check_size("segments", tokens, batch.segments.map_or(tokens, <[u32]>::len))?;
        check_size("is_hidden", tokens * queries, batch.is_hidden.map_or(tokens * queries, <[bool]>::len))?;
        if let Some(targets) = batch.targets {
            len_of_each("targets", targets.len(), n)?;
            targets.iter().try_for_each(|&target| check_most("target", queries - 1, target))?;
        }
        Ok([queries, memory])
    }
}

impl Layer {
    fn load(w: &Weights<'_>, spec: &LayerSpec) -> Result<Layer> {
        let (d, heads, attention) = (spec.d_model, spec.heads, w.at("rel_attn"));
        let tensor = |name, rows| attention.tensor(name, &[rows, heads.n_heads, heads.head_dim]);
        let inward = |name| -> Result<Linear> {
            let weight = PackedMatrix::from_in_out(MatRef::contiguous(&tensor(name, d)?, d, d)?)?;
            Ok(Linear::new(weight, None)?)
        };
        let out = linear(&tensor("o", d)?, d, d, None)?;
        let placement = spec.placement(&attention, "layer_norm")?;
        let ffn = spec.ffn(w, ["ff.layer_1", "ff.layer_2"], "ff.layer_norm")?;
        let bias = |name| attention.tensor(name, &[heads.n_heads, heads.head_dim]).map(Cow::into_owned);
        Ok(Layer {
            layers: spec.reader([inward("q")?, inward("k")?, inward("v")?], out, placement, ffn)?,
            r: inward("r")?,
            u: bias("r_w_bias")?,
            w: bias("r_r_bias")?,
            s: bias("r_s_bias")?,
            seg_embed: tensor("seg_embed", 2)?.into_owned(),
        })
    }

    /// The layer over the rows of a stream.
    fn advance(
        &self,
        run: &mut Run<'_>,
        x: &mut [f32],
        stream: &Stream,
        sources: &[KeyStore],
        table: &RelativeTable,
    ) -> Result<()> {
        let segment = stream.same.as_ref();
        let segment = segment.map(|same| SegmentTerm { s: &self.s, e: &self.seg_embed, same });
        let relative = Some(Relative { u: &self.u, w: &self.w, table });
        let mut inputs = Inputs {
            sources,
            source_graph: &stream.graph,
            source_terms: Terms { relative, segment, ..Terms::default() },
            source_positions: Some(&stream.positions),
            ..Inputs::new(&stream.offsets, &stream.graph)
        };
        self.layers.forward(run, x, &mut inputs)
    }
}

/// The rows of a stream: where they stand, and what they see.
struct Stream {
    offsets: Vec<usize>,
    positions: Vec<isize>,
    graph: Graph,
    same: Option<Bits>,
}

impl Stream {
    /// A row for every token, which always sees itself; or one for every target, which knows its place but not its token.
    /// Sequences have `t` tokens and `memory` rows before them.
    fn new(
        batch: &Batch<'_>,
        [t, memory]: [usize; 2],
        mut graph: Graph,
        targets: Option<&[usize]>,
    ) -> Result<Stream> {
        let rows = targets.map_or(t, |targets| targets.len() / batch.sequences);
        let place = |b: usize, i: usize| targets.map_or(i, |targets| targets[b * rows + i]);
        let dims = [batch.sequences, 1, rows, memory + t];
        if batch.is_real.is_some() || batch.is_hidden.is_some() {
            graph = graph.with_bits(Bits::dense(dims, |b, _, i, key| {
                let (i, Some(j)) = (place(b, i), key.checked_sub(memory)) else { return true };
                let is_real = batch.is_real.is_none_or(|is_real| is_real[b * t + j]);
                let is_hidden = batch.is_hidden.is_some_and(|is_hidden| is_hidden[(b * t + i) * t + j]);
                (targets.is_none() && i == j) || (is_real && !is_hidden)
            })?);
        }
        let same = |segments: &[u32]| {
            Bits::dense(dims, |b, _, i, key| {
                let of_key = key.checked_sub(memory).map_or(0, |j| segments[b * t + j]);
                segments[b * t + place(b, i)] == of_key
            })
        };
        let same = batch.segments.map(same).transpose()?;
        let of = |b| (0..rows).map(move |i| (memory + place(b, i)) as isize);
        let positions = (0..batch.sequences).flat_map(of).collect();
        Ok(Stream { offsets: offsets(batch.sequences, rows), positions, graph, same })
    }
}
