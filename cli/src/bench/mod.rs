//! `laneformer bench`: every operation checked, timed, and held against the peak measured in the same run.

mod check;
pub mod data;
mod decode;
mod graph;
pub mod layer;
mod measure;
pub mod ops;
mod report;
pub mod roof;
pub mod rows;
mod scaling;
mod systems;

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand as _;
use laneformer::Context;

use crate::bench::measure::{Deviation, Workload, time};
use crate::bench::report::{Output, Record, table};
use crate::bench::roof::Roof;
use crate::bench::rows::{Cost, Row};
use crate::runtime::RuntimeArgs;

/// Arguments of `bench`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    /// Only rows whose name contains this
    #[arg(value_name = "FILTER", default_value = "", hide_default_value = true)]
    filter: String,
    /// One JSON object per row instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

#[derive(clap::Subcommand)]
enum BenchCommand {
    /// Time per token and workspace of a layer over the length of a sequence and over the batch
    Scaling(scaling::ScalingArgs),
    /// Attention over windows with global columns, over a causal graph and over a full one
    Graph(graph::GraphArgs),
    /// One more token of GPT-2 small, with its keys and values in a cache
    Decode(decode::DecodeArgs),
    /// Whole models of the survey at their usual sizes, with random weights
    Systems(systems::SystemsArgs),
}

/// Measures the rows; failure if an answer is wrong.
pub fn run(args: BenchArgs) -> Result<ExitCode> {
    match &args.command {
        Some(BenchCommand::Scaling(args)) => return scaling::run(args).map(|()| ExitCode::SUCCESS),
        Some(BenchCommand::Graph(args)) => return graph::run(args),
        Some(BenchCommand::Decode(args)) => return decode::run(args),
        Some(BenchCommand::Systems(args)) => return systems::run(args),
        None => {}
    }
    let rows: Vec<Row> = rows::all().into_iter().filter(|row| row.name.contains(&args.filter)).collect();
    if rows.is_empty() {
        if BenchCommand::has_subcommand(&args.filter) {
            bail!("options stand behind the subcommand: bench {} [OPTIONS]", args.filter);
        }
        return no_row(&args.filter, rows::all().into_iter().map(|row| row.name));
    }
    let runtime = args.runtime.build()?;
    let ctx = runtime.context();
    let mut output = Output::new(args.json, rows.len());
    for row in rows {
        output.begin(&row.name);
        let workload = row.workload(ctx.members())?;
        for (name, record) in measure(vec![Item { name: row.name, cost: row.cost, workload }], ctx)? {
            output.add(&name, record)?;
        }
    }
    output.finish(ctx, table)
}

fn no_row<T>(filter: &str, names: impl Iterator<Item = String>) -> Result<T> {
    bail!("no row contains {filter:?}; the rows are {}", names.collect::<Vec<_>>().join(", "))
}

/// Something to be checked and timed.
struct Item<'a> {
    name: String,
    cost: Cost,
    workload: Box<dyn Workload + 'a>,
}

/// Checks all, then times them in turns; what is wrong is not timed.
fn measure(mut items: Vec<Item<'_>>, ctx: Context<'_>) -> Result<Vec<(String, Result<Record, Deviation>)>> {
    let mut deviations = vec![];
    for item in &mut items {
        deviations.push(item.workload.check(ctx).with_context(|| item.name.clone())?);
    }
    let right = items.iter_mut().zip(&deviations).filter(|(_, deviation)| deviation.is_right());
    let right = right.map(|(item, _)| (&mut *item.workload as &mut dyn Workload, item.cost.bytes));
    let mut timings = time(right.collect(), ctx)?.into_iter();
    let roof = Roof { isa: ctx.isa(), threads: ctx.members() };
    let outcome = |(Item { name, cost, .. }, deviation): (Item<'_>, Deviation)| {
        let timing = if deviation.is_right() { timings.next() } else { None };
        let record = timing.map(|timing| Record::new(&name, cost, roof, &timing, deviation.max_err));
        (name, record.ok_or(deviation))
    };
    Ok(items.into_iter().zip(deviations).map(outcome).collect())
}
