//! `laneformer bench scaling`: what grows with the work, and what does not.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::value_parser;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use laneformer::{Activation, Context, Graph, Layer, MatMut, Placement};
use serde::Serialize;

use crate::bench::data::Buffer;
use crate::bench::layer::{BERT_BASE, Dims, random_layer};
use crate::bench::roof::Roof;
use crate::compare::picture;
use crate::output::check_writable;
use crate::runtime::RuntimeArgs;

/// Arguments of `bench scaling`.
#[derive(clap::Args)]
pub struct ScalingArgs {
    /// The longest sequence
    #[arg(long, value_name = "TOKENS", default_value = "16384", value_parser = value_parser!(u32).range(SHORTEST as i64..=1 << 20))]
    longest: u32,
    /// The largest batch
    #[arg(long, value_name = "SEQUENCES", default_value = "64", value_parser = value_parser!(u32).range(1..=1 << 16))]
    largest: u32,
    /// Draw the curves to this SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// One JSON object per shape instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

const DIMS: Dims = BERT_BASE;
const SHORTEST: usize = 64;
/// Tokens of each sequence where the batch grows.
const BATCHED: usize = 128;

/// Time in timed runs of a shape; at least two runs.
const TIMED: Duration = Duration::from_millis(400);
const LEAST_RUNS: usize = 2;

/// A measured shape.
#[derive(Debug, Serialize)]
struct Scale {
    batch: usize,
    seq_len: usize,
    threads: usize,
    ns_per_token: f64,
    /// FLOP per token of the products with weights: the same at every shape.
    linear_flops: u64,
    /// FLOP per token of attention's products: they grow with the sequence.
    attention_flops: u64,
    /// Part of the peak of multiply-adds.
    of_peak: f64,
    workspace_bytes: usize,
    workspace_bytes_per_token: f64,
    /// What the workspace may take: so much per token and per member, and nothing per pair of tokens.
    workspace_bound: usize,
}

/// Measures every shape; an error if a workspace is beyond its bound.
pub fn run(args: &ScalingArgs) -> Result<()> {
    if let Some(svg) = &args.svg {
        check_writable(svg)?;
    }
    let runtime = args.runtime.build()?;
    let ctx = runtime.context();
    let layer = random_layer(DIMS, Activation::GeluErf, Placement::post, 1)?;
    let lengths = doubling(SHORTEST, args.longest as usize).into_iter().map(|seq_len| (1, seq_len));
    let batches = doubling(1, args.largest as usize).into_iter().map(|batch| (batch, BATCHED));
    let mut out = io::stdout().lock();
    let mut scales: Vec<Scale> = vec![];
    for (batch, seq_len) in lengths.chain(batches) {
        let scale = measure(&layer, ctx, batch, seq_len)?;
        if scale.workspace_bytes > scale.workspace_bound {
            anyhow::bail!("b{batch}s{seq_len}: workspace of {} bytes", scale.workspace_bytes);
        }
        if args.json {
            writeln!(out, "{}", serde_json::to_string(&scale)?)?;
            out.flush()?;
        }
        scales.push(scale);
    }
    if !args.json {
        writeln!(out, "{}, isa {}, threads {}\n{}", DIMS.name, ctx.isa(), ctx.members(), table(&scales))?;
    }
    match &args.svg {
        Some(path) => draw(path, &scales, ctx.members()),
        None => Ok(()),
    }
}

fn doubling(first: usize, last: usize) -> Vec<usize> {
    std::iter::successors(Some(first), |n| n.checked_mul(2)).take_while(|n| *n <= last).collect()
}

fn measure(layer: &Layer, ctx: Context<'_>, batch: usize, seq_len: usize) -> Result<Scale> {
    let (tokens, d, f) = (batch * seq_len, DIMS.d_model, DIMS.d_ff);
    let offsets: Vec<usize> = (0..=batch).map(|i| i * seq_len).collect();
    let mut workspace = layer.workspace(tokens, batch, ctx.members())?;
    // A layer's output is normalised: it can be the next run's input.
    let mut x = Buffer::uniform(tokens * d, 1.0, 1);
    let mut run = || -> Result<Duration> {
        let start = Instant::now();
        layer.forward(
            ctx,
            MatMut::contiguous(&mut x, tokens, d)?,
            &offsets,
            &Graph::full(),
            &mut workspace,
        )?;
        Ok(start.elapsed())
    };
    run()?;
    let roof = Roof { isa: ctx.isa(), threads: ctx.members() };
    let (mut times, mut peak) = (vec![], 0.0_f64);
    while times.len() < LEAST_RUNS || times.iter().sum::<Duration>() < TIMED {
        if times.len() % 8 == 0 {
            peak = peak.max(roof.fma());
        }
        times.push(run()?);
    }
    times.sort_unstable();
    let ns = times[times.len() / 2].as_nanos() as f64;
    let bytes = workspace.bytes();
    Ok(Scale {
        batch,
        seq_len,
        threads: ctx.members(),
        ns_per_token: ns / tokens as f64,
        linear_flops: (8 * d * d + 4 * d * f) as u64,
        attention_flops: (4 * seq_len * d) as u64,
        of_peak: DIMS.flops(batch, seq_len) as f64 / ns / peak,
        workspace_bytes: bytes,
        workspace_bytes_per_token: bytes as f64 / tokens as f64,
        workspace_bound: bound(tokens, batch, ctx.members()),
    })
}

/// Queries, keys, values and attended rows, each with a line of padding and keys in whole blocks of 64; then the tiles of each member.
fn bound(tokens: usize, batch: usize, members: usize) -> usize {
    let per_token = 6 * (DIMS.d_model + 64) * size_of::<f32>();
    let per_member = 4 << 20;
    per_token * (tokens + 64 * batch) + per_member * members
}

fn table(scales: &[Scale]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "batch",
        "seq_len",
        "us/token",
        "MFLOP/token",
        "in attention",
        "of peak",
        "workspace",
        "per token",
    ]);
    table.add_rows(scales.iter().map(|s| {
        let flops = s.linear_flops + s.attention_flops;
        [
            s.batch.to_string(),
            s.seq_len.to_string(),
            format!("{:.2}", s.ns_per_token / 1e3),
            format!("{:.1}", flops as f64 / 1e6),
            format!("{:.1} %", 100.0 * s.attention_flops as f64 / flops as f64),
            format!("{:.1} %", 100.0 * s.of_peak),
            format!("{:.1} MiB", s.workspace_bytes as f64 / f64::from(1 << 20)),
            format!("{:.1} KiB", s.workspace_bytes_per_token / 1024.0),
        ]
    }));
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Time per token over the length of a sequence, beside what the operations alone make of the first time.
fn draw(path: &std::path::Path, scales: &[Scale], threads: usize) -> Result<()> {
    let by_length: Vec<&Scale> = scales.iter().take_while(|s| s.batch == 1).collect();
    let lengths =
        by_length.iter().enumerate().take_while(|(i, s)| *i == 0 || s.seq_len > by_length[i - 1].seq_len);
    let by_length: Vec<&Scale> = lengths.map(|(_, s)| *s).collect();
    let us = |s: &Scale| (s.seq_len as f64, s.ns_per_token / 1e3);
    let flops = |s: &Scale| (s.linear_flops + s.attention_flops) as f64;
    // The best rate of all lengths at every length.
    let rate = by_length.iter().map(|s| flops(s) / s.ns_per_token).fold(0.0, f64::max);
    let ideal = |s: &&Scale| (s.seq_len as f64, flops(s) / rate / 1e3);
    let linear = |s: &&Scale| (s.seq_len as f64, s.linear_flops as f64 / rate / 1e3);
    let series = [
        ("measured".to_owned(), by_length.iter().map(|s| us(s)).collect()),
        ("operations at the best rate".to_owned(), by_length.iter().map(ideal).collect()),
        ("of these, products with weights".to_owned(), by_length.iter().map(linear).collect()),
    ];
    let title = format!("One {} layer, {threads} thread{}", DIMS.name, if threads == 1 { "" } else { "s" });
    picture::curves(path, &title, ["tokens of the sequence", "us per token"], &series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workspaces_grow_with_tokens_only() -> Result<()> {
        let layer = random_layer(DIMS, Activation::GeluErf, Placement::post, 1)?;
        for (batch, seq_len) in [(1, 64), (1, 16384), (64, 128)] {
            for members in [1, 2] {
                let bytes = layer.workspace(batch * seq_len, batch, members)?.bytes();
                assert!(
                    bytes <= bound(batch * seq_len, batch, members),
                    "{batch} {seq_len} {members} {bytes}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn doubles() {
        assert_eq!(doubling(64, 300), [64, 128, 256]);
    }
}
