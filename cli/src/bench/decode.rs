//! `laneformer bench decode`: one more token of a decoder, whose weights and cache are read once per step, and its attention alone where query heads
//! share their keys.

use std::process::ExitCode;

use anyhow::Result;
use comfy_table::Table;
use laneformer::reference::to_f64;
use laneformer::{
    Activation, Context, Epilogue, Graph, Heads, Inputs, KvCache, Linear, MatMut, MatRef, PackedMatrix,
    Placement, QueryRows, Stack, Terms, Workspace, layernorm,
};
use serde::Serialize;

use crate::bench::check::{compare, same_bits};
use crate::bench::data::Buffer;
use crate::bench::layer::{Dims, random_layer};
use crate::bench::measure::{Deviation, Workload};
use crate::bench::ops::reference_attention;
use crate::bench::report::{Output, Record, aligned};
use crate::bench::rows::Cost;
use crate::bench::{Item, measure, no_row};
use crate::runtime::RuntimeArgs;

/// Arguments of `bench decode`.
#[derive(clap::Args)]
pub struct DecodeArgs {
    /// Only rows whose name contains this
    #[arg(value_name = "FILTER", default_value = "", hide_default_value = true)]
    filter: String,
    /// Tokens in the cache, of the longest sequence
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = clap::value_parser!(u16).range(1..=16384))]
    context: u16,
    /// Layers of the decoder
    #[arg(long, value_name = "N", default_value = "12", value_parser = clap::value_parser!(u16).range(1..=48))]
    layers: u16,
    /// One JSON object per row instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// GPT-2 small.
const DIMS: Dims = Dims { name: "gpt2", d_model: 768, n_heads: 12, d_ff: 3072 };
const VOCABULARY: usize = 50257;
const EPS: f32 = 1e-5;
/// Sequences of the larger batch.
const BATCH: usize = 8;
/// The heads of attention alone: those of Llama 3.2 1B.
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 64;

/// What `--json` prints: the fields of every row of `bench`, and those of a step.
#[derive(Serialize)]
struct DecodeRecord {
    #[serde(flatten)]
    record: Record,
    /// Tokens of a step, one per sequence.
    tokens: usize,
    ns_per_token: f64,
    tokens_per_s: f64,
    /// Packed weights that a step reads.
    weight_bytes: usize,
    /// Keys and values that a step reads.
    cache_bytes: usize,
}

/// A row: how many tokens each sequence has in the cache, and what is computed.
struct Row {
    name: String,
    contexts: Vec<usize>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Layers,
    /// The layers, a norm and the logits.
    LayersAndHead,
    /// Attention alone, with grouped heads.
    Attention,
}

/// Measures the rows; failure if an answer is wrong.
pub fn run(args: &DecodeArgs) -> Result<ExitCode> {
    let (longest, layers) = (usize::from(args.context), usize::from(args.layers));
    let wanted: Vec<Row> =
        rows(longest, layers).into_iter().filter(|row| row.name.contains(&args.filter)).collect();
    if wanted.is_empty() {
        return no_row(&args.filter, rows(longest, layers).into_iter().map(|row| row.name));
    }
    let runtime = args.runtime.build()?;
    let ctx = runtime.context();
    let mut output = Output::new(args.json, wanted.len());
    let mut model = None;
    if wanted.iter().any(|row| row.kind != Kind::Attention) {
        output.begin("weights");
        model = Some(Model::new(layers)?);
    }
    let mut decode: Option<Decode<'_>> = None;
    for Row { name, contexts, kind } in wanted {
        output.begin(&name);
        let tokens = contexts.len();
        let (workload, cost, weight_bytes): (Box<dyn Workload>, _, _) = match &model {
            Some(model) if kind != Kind::Attention => {
                let decode = match &mut decode {
                    Some(decode) if decode.contexts == contexts => decode,
                    other => other.insert(Decode::new(model, contexts, ctx)?),
                };
                let has_head = kind == Kind::LayersAndHead;
                let cost = decode.cost(has_head);
                (Box::new(Step { decode, has_head }), cost, model.bytes(has_head))
            }
            _ => {
                let attention = Attention::new(layers, &contexts)?;
                let cost = attention.cost();
                (Box::new(attention), cost, 0)
            }
        };
        let cache_bytes = cost.bytes - weight_bytes;
        for (name, record) in measure(vec![Item { name, cost, workload }], ctx)? {
            let record = record.map(|record| DecodeRecord {
                tokens,
                ns_per_token: record.median_ns / tokens as f64,
                tokens_per_s: tokens as f64 * 1e9 / record.median_ns,
                weight_bytes,
                cache_bytes,
                record,
            });
            output.add(&name, record)?;
        }
    }
    output.finish(ctx, table)
}

/// One sequence of the longest context, and [`BATCH`] of a part of it each; attention alone of [`BATCH`] of the longest.
fn rows(longest: usize, layers: usize) -> Vec<Row> {
    let parts: Vec<usize> = (1..=BATCH).map(|i| (longest * i / BATCH).max(1)).collect();
    let shapes =
        [(format!("b1c{longest}"), vec![longest]), (format!("b{BATCH}c{}-{longest}", parts[0]), parts)];
    let row = |(shape, contexts): (String, Vec<usize>)| {
        [("", Kind::Layers), ("+head", Kind::LayersAndHead)].map(|(head, kind)| Row {
            name: format!("decode/f32/{}{head}/l{layers}{shape}", DIMS.name),
            contexts: contexts.clone(),
            kind,
        })
    };
    let attention = Row {
        name: format!("decode/f32/attention/h{HEADS}kv{KV_HEADS}l{layers}b{BATCH}c{longest}"),
        contexts: vec![longest; BATCH],
        kind: Kind::Attention,
    };
    shapes.into_iter().flat_map(row).chain([attention]).collect()
}

/// The layers, the norm behind them and the language-model head.
struct Model {
    stack: Stack,
    gain: Vec<f32>,
    bias: Vec<f32>,
    head: Linear,
    graph: Graph,
}

impl Model {
    fn new(layers: usize) -> Result<Model> {
        let layer = |i| random_layer(DIMS, Activation::GeluTanh, Placement::pre, 1 + 6 * i as u64);
        let stack = Stack::new((0..layers).map(layer).collect::<Result<_>>()?)?;
        let d = DIMS.d_model;
        let head = Buffer::uniform(VOCABULARY * d, (3.0 / d as f32).sqrt(), 1000);
        let head = PackedMatrix::from_out_in(MatRef::contiguous(&head, VOCABULARY, d)?)?;
        let head = Linear::new(head, None)?;
        Ok(Model { stack, gain: vec![1.0; d], bias: vec![0.0; d], head, graph: Graph::causal() })
    }

    fn bytes(&self, has_head: bool) -> usize {
        self.stack.bytes() + if has_head { self.head.bytes() } else { 0 }
    }

    /// The logits of the rows of a last hidden state, which is normed in place.
    fn logits(&self, ctx: Context<'_>, x: &mut [f32], logits: &mut [f32]) -> Result<()> {
        let (d, rows) = (DIMS.d_model, x.len() / DIMS.d_model);
        layernorm(ctx, MatMut::contiguous(x, rows, d)?, &self.gain, Some(&self.bias), EPS)?;
        let out = MatMut::contiguous(logits, rows, VOCABULARY)?;
        Ok(self.head.forward(ctx, MatRef::contiguous(x, rows, d)?, &Epilogue::NONE, out)?)
    }
}

/// Sequences whose next tokens are computed, over and over.
struct Decode<'a> {
    model: &'a Model,
    contexts: Vec<usize>,
    /// `[0, 1, ..., sequences]`.
    offsets: Vec<usize>,
    caches: Vec<KvCache>,
    workspace: Workspace,
    /// The next tokens, what becomes of them, and their logits.
    source: Buffer,
    x: Buffer,
    logits: Buffer,
    /// The next tokens as rows of a pass over the whole sequences, without a cache.
    expected: Vec<f32>,
}

impl<'a> Decode<'a> {
    /// Fills the caches, and computes what a step is to give.
    fn new(model: &'a Model, contexts: Vec<usize>, ctx: Context<'_>) -> Result<Decode<'a>> {
        let (d, batch) = (DIMS.d_model, contexts.len());
        let ends = |more: usize| -> Vec<usize> {
            let sums = contexts.iter().scan(0, |end, n| {
                *end += n + more;
                Some(*end)
            });
            [0].into_iter().chain(sums).collect()
        };
        let (before, whole) = (ends(0), ends(1));
        let mut all = Buffer::uniform(whole[batch] * d, 1.0, 40);
        let (mut prompt, mut source) =
            (Buffer::filled(before[batch] * d, 0.0), Buffer::filled(batch * d, 0.0));
        for (i, n) in contexts.iter().enumerate() {
            let (tokens, next) = all[whole[i] * d..whole[i + 1] * d].split_at(n * d);
            prompt[before[i] * d..before[i + 1] * d].copy_from_slice(tokens);
            source[i * d..(i + 1) * d].copy_from_slice(next);
        }

        let mut workspace = model.stack.workspace(whole[batch], batch, ctx.members())?;
        let x = MatMut::contiguous(&mut all, whole[batch], d)?;
        model.stack.forward(ctx, x, &whole, &model.graph, &mut workspace)?;
        let last = |end: &usize| all[(end - 1) * d..end * d].to_vec();
        let expected = whole[1..].iter().flat_map(last).collect();

        let heads = Heads::new(DIMS.n_heads, d / DIMS.n_heads)?;
        let room = contexts.iter().max().map_or(1, |n| n + 1);
        let mut caches = KvCache::for_layers(model.stack.layers().len(), &heads, batch, room)?;
        let mut inputs = Inputs { caches: &mut caches, ..Inputs::new(&before, &model.graph) };
        let x = MatMut::contiguous(&mut prompt, before[batch], d)?;
        model.stack.forward_with(ctx, x, &mut inputs, &mut workspace)?;

        Ok(Decode {
            model,
            offsets: (0..=batch).collect(),
            caches,
            workspace: model.stack.workspace(batch, batch, ctx.members())?,
            x: Buffer::filled(batch * d, 0.0),
            logits: Buffer::filled(batch * VOCABULARY, 0.0),
            source,
            expected,
            contexts,
        })
    }

    /// Keys and values in the caches before a step.
    fn cache_bytes(&self) -> usize {
        let tokens: usize = self.contexts.iter().sum();
        tokens * 2 * DIMS.d_model * size_of::<f32>() * self.caches.len()
    }

    /// All weights and all keys and values once.
    fn cost(&self, has_head: bool) -> Cost {
        let [d, f, vocabulary] = [DIMS.d_model, DIMS.d_ff, VOCABULARY].map(|n| n as u64);
        let head = if has_head { 2 * vocabulary * d } else { 0 };
        let flops = self.contexts.iter().map(|&context| {
            let seen = context as u64 + 1;
            self.caches.len() as u64 * (8 * d * d + 4 * d * f + 4 * seen * d) + head
        });
        let bytes = self.model.bytes(has_head) + self.cache_bytes();
        Cost { flops: flops.sum(), bytes, elements: None }
    }
}

/// A step of all sequences, with or without the head.
struct Step<'a, 'b> {
    decode: &'a mut Decode<'b>,
    has_head: bool,
}

impl Workload for Step<'_, '_> {
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation> {
        self.reset();
        self.run(ctx)?;
        let Decode { model, x, logits, expected, .. } = &*self.decode;
        if !self.has_head {
            return Ok(same_bits(ctx.isa().keeps_bits(), x, expected));
        }
        // Row by row: a batch must not change them either.
        let mut want = vec![0.0; logits.len()];
        for (x, want) in expected.chunks(DIMS.d_model).zip(want.chunks_mut(VOCABULARY)) {
            model.logits(ctx, &mut x.to_vec(), want)?;
        }
        Ok(same_bits(ctx.isa().keeps_bits(), logits, &want))
    }

    /// The caches forget the token that a step has appended.
    fn reset(&mut self) {
        let Decode { caches, contexts, x, source, .. } = &mut *self.decode;
        x.copy_from_slice(source);
        for cache in caches {
            for (sequence, &context) in contexts.iter().enumerate() {
                // It has more: a step appends.
                let _ = cache.truncate(sequence, context);
            }
        }
    }

    fn runs_per_reset(&self) -> Option<usize> {
        Some(1)
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<()> {
        let Decode { model, offsets, caches, workspace, x, logits, .. } = &mut *self.decode;
        let mut inputs = Inputs { caches, ..Inputs::new(offsets, &model.graph) };
        let rows = MatMut::contiguous(x, offsets.len() - 1, DIMS.d_model)?;
        model.stack.forward_with(ctx, rows, &mut inputs, workspace)?;
        if self.has_head { model.logits(ctx, x, logits) } else { Ok(()) }
    }
}

/// Attention of the next token of some sequences in each of some layers, whose caches hold the same.
struct Attention {
    heads: Heads,
    graph: Graph,
    /// `[0, 1, ..., sequences]`.
    offsets: Vec<usize>,
    caches: Vec<KvCache>,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    out: Buffer,
}

impl Attention {
    /// All contexts are as long as the first.
    fn new(layers: usize, contexts: &[usize]) -> Result<Attention> {
        let heads = Heads::new(HEADS, HEAD_DIM)?.with_kv_heads(KV_HEADS)?;
        let (batch, context, cols) = (contexts.len(), contexts[0], heads.key_cols());
        let [k, v] = [41, 42].map(|seed| Buffer::uniform(context * cols, 1.0, seed));
        let q = Buffer::uniform(batch * heads.query_cols(), 1.0, 43);
        let mut caches = KvCache::for_layers(layers, &heads, batch, context)?;
        for cache in &mut caches {
            for sequence in 0..batch {
                let [k, v] = [&k, &v].map(|x| MatRef::contiguous(x, context, cols));
                cache.append(sequence, k?, v?)?;
            }
        }
        let out = Buffer::filled(batch * heads.output_cols(), 0.0);
        Ok(Attention { heads, graph: Graph::causal(), offsets: (0..=batch).collect(), caches, q, k, v, out })
    }

    /// All keys and values once.
    fn cost(&self) -> Cost {
        let tokens = self.caches.len() * (self.offsets.len() - 1) * self.k.len() / self.heads.key_cols();
        let flops = (4 * tokens * self.heads.query_cols()) as u64;
        Cost { flops, bytes: 2 * tokens * self.heads.key_cols() * size_of::<f32>(), elements: None }
    }
}

impl Workload for Attention {
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation> {
        self.run(ctx)?;
        let [q, k, v, out] = [&self.q, &self.k, &self.v, &self.out].map(|x| to_f64(x));
        Ok(compare(&out, &reference_attention(&self.heads, &q, &k, &v, |_, _| true), 1e-5))
    }

    fn run(&mut self, ctx: Context<'_>) -> Result<()> {
        let Attention { heads, graph, offsets, caches, q, out, .. } = self;
        let rows = offsets.len() - 1;
        for cache in caches {
            let queries = QueryRows::new(MatRef::contiguous(q, rows, heads.query_cols())?, offsets);
            let out = MatMut::contiguous(out, rows, heads.output_cols())?;
            cache.keys().attend(ctx, heads, &queries, graph, &Terms::default(), out)?;
        }
        Ok(())
    }
}

fn table(records: &[DecodeRecord]) -> Table {
    let header =
        ["name", "median", "min", "ms/token", "tokens/s", "rate", "bound", "peak", "of peak", "max error"];
    aligned(
        header,
        records.iter().map(|r| {
            let own = [format!("{:.3}", r.ns_per_token / 1e6), format!("{:.1}", r.tokens_per_s)];
            r.record.cells_around(own)
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_checked_to_the_bit() -> Result<()> {
        let ctx = Context::serial();
        let model = Model::new(2)?;
        let mut decode = Decode::new(&model, vec![3, 70], ctx)?;
        assert_eq!(decode.cache_bytes(), 73 * 2 * 768 * 4 * 2);
        for has_head in [false, true, false] {
            let mut step = Step { decode: &mut decode, has_head };
            let deviation = step.check(ctx)?;
            assert_eq!((deviation.max_err, deviation.limit), (0.0, 0.0));
            assert_eq!([0, 1].map(|i| step.decode.caches[1].len(i)), [4, 71]);
        }
        decode.expected[5] += 1e-6;
        assert!(!Step { decode: &mut decode, has_head: false }.check(ctx)?.is_right());
        Ok(())
    }

    #[test]
    fn attention_alone_is_checked() -> Result<()> {
        let mut attention = Attention::new(2, &[70; 3])?;
        let cost = attention.cost();
        assert_eq!((cost.bytes, cost.flops), (2 * 3 * 70 * 2 * 512 * 4, 2 * 3 * 70 * 4 * 2048));
        assert!(attention.check(Context::serial())?.is_right());
        attention.k[100] += 1.0;
        assert!(!attention.check(Context::serial())?.is_right());
        Ok(())
    }

    #[test]
    fn rows_have_contexts() {
        let rows = rows(1024, 12);
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names[0], "decode/f32/gpt2/l12b1c1024");
        assert_eq!(names[3], "decode/f32/gpt2+head/l12b8c128-1024");
        assert_eq!(rows[3].contexts, [128, 256, 384, 512, 640, 768, 896, 1024]);
        assert_eq!(rows[4].name, "decode/f32/attention/h32kv8l12b8c1024");
    }
}
