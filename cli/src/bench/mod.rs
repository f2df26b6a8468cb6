//! `laneformer bench`: every operation checked, timed, and held against the peak measured in the same run.

mod check;
pub mod data;
pub mod layer;
mod measure;
pub mod ops;
mod report;
pub mod roof;
pub mod rows;
mod scaling;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use laneformer::Context;

use crate::bench::measure::{Deviation, time};
use crate::bench::report::{Record, table};
use crate::bench::roof::Roof;
use crate::bench::rows::Row;
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
}

/// Measures the rows; failure if an answer is wrong.
pub fn run(args: BenchArgs) -> Result<ExitCode> {
    if let Some(BenchCommand::Scaling(args)) = &args.command {
        scaling::run(args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<Row> = rows::all().into_iter().filter(|row| row.name.contains(&args.filter)).collect();
    if rows.is_empty() {
        let names: Vec<String> = rows::all().into_iter().map(|row| row.name).collect();
        bail!("no row contains {:?}; the rows are {}", args.filter, names.join(", "));
    }
    let runtime = args.runtime.build()?;
    let ctx = runtime.context();
    let mut out = io::stdout().lock();
    let progress = progress_bar(rows.len() as u64);
    let (mut records, mut wrong) = (vec![], 0);
    for row in &rows {
        progress.set_message(row.name.clone());
        match measure(row, ctx).with_context(|| row.name.clone())? {
            Ok(record) if args.json => {
                let line = serde_json::to_string(&record)?;
                progress.suspend(|| writeln!(out, "{line}").and_then(|()| out.flush()))?;
            }
            Ok(record) => records.push(record),
            Err(Deviation { max_err, limit }) => {
                wrong += 1;
                let name = &row.name;
                progress.suspend(|| {
                    eprintln!("laneformer: {name}: wrong: max error {max_err:.3e}, limit {limit:.3e}");
                });
            }
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    if !args.json {
        writeln!(out, "isa {}, threads {}\n{}", ctx.isa(), ctx.members(), table(&records))?;
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Checks a row, then times it; what is wrong is not timed.
fn measure(row: &Row, ctx: Context<'_>) -> Result<Result<Record, Deviation>> {
    let mut workload = row.workload(ctx.members())?;
    let deviation = workload.check(ctx)?;
    if !deviation.is_right() {
        return Ok(Err(deviation));
    }
    let timing = time(&mut *workload, ctx, row.cost.bytes)?;
    let roof = Roof { isa: ctx.isa(), threads: ctx.members() };
    Ok(Ok(Record::new(row, roof, &timing, deviation.max_err)))
}

/// Hidden unless standard error is a terminal.
fn progress_bar(rows: u64) -> ProgressBar {
    let target =
        if io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(rows), target);
    match ProgressStyle::with_template("{pos}/{len} {bar:30} {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
