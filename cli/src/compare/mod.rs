//! `laneformer compare`: the same work by laneformer and by its peers, in one session, in turns.

mod contest;
mod host;
mod ours;
mod peers;
pub mod picture;
mod report;
mod rust_peers;
mod sentences;
mod task;

use std::fs;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use laneformer::Isa;
use serde_json::json;

use crate::bench::data::Buffer;
use crate::bench::roof::Roof;
use crate::compare::contest::{Line, Rounds, contest};
use crate::compare::peers::Handover;
use crate::compare::report::{Report, Roofs};
use crate::note;
use crate::output::{check_writable, write_whole};
use crate::runtime::{Runtime, all_threads, thread_count};

/// Arguments of `compare`.
#[derive(clap::Args)]
pub struct CompareArgs {
    /// Only tasks whose name contains this; no report is written then
    #[arg(value_name = "FILTER", default_value = "", hide_default_value = true)]
    filter: String,
    /// Thread budgets of everybody [default: one, and all that the system gives this process]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = thread_count)]
    threads: Vec<NonZeroUsize>,
    /// One JSON object per task instead of the tables
    #[arg(long)]
    json: bool,
    /// Rounds of each peer
    #[arg(long, value_name = "N", default_value = "7")]
    rounds: NonZeroUsize,
    /// Milliseconds of a round
    #[arg(long, value_name = "MS", default_value = "30")]
    round_ms: u64,
    /// Directory with a MiniLM, for the row of sentences
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Systems of one layer and few sentences: a look whether everything runs; no report is written then
    #[arg(long)]
    small: bool,
    /// Measure what the library costs to build, too
    #[arg(long)]
    build_cost: bool,
    /// Directory for BENCHMARKS.md and docs/img
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

impl CompareArgs {
    /// Whether a page is written.
    fn is_whole(&self) -> bool {
        self.filter.is_empty() && !self.small
    }

    fn page(&self) -> PathBuf {
        self.out.join("BENCHMARKS.md")
    }

    fn images(&self) -> PathBuf {
        self.out.join("docs/img")
    }
}

/// Runs everybody, prints, and writes the report of a whole run.
pub fn run(args: CompareArgs) -> Result<ExitCode> {
    let mut tasks = task::all(args.small)?;
    if let Some(model) = &args.model {
        tasks.push(sentences::task(model, args.small)?);
    }
    let mut absent: Vec<(String, String)> = vec![];
    if args.model.is_none() {
        absent.push((sentences::NAME.to_owned(), NO_MODEL.to_owned()));
    }
    let names: Vec<&str> =
        tasks.iter().map(|task| &task.name[..]).chain(absent.iter().map(|(name, _)| &name[..])).collect();
    if !names.iter().any(|name| name.contains(&args.filter)) {
        bail!("no task contains {:?}; the tasks are {}", args.filter, names.join(", "));
    }
    tasks.retain(|task| task.name.contains(&args.filter));
    absent.retain(|(name, _)| name.contains(&args.filter));
    let budgets: Vec<usize> = if args.threads.is_empty() {
        default_budgets()
    } else {
        args.threads.iter().map(|n| n.get()).collect()
    };
    if args.is_whole() {
        let images = args.images();
        fs::create_dir_all(&images).with_context(|| images.display().to_string())?;
        check_writable(&images.join("layers-1.svg"))?;
        check_writable(&args.page())?;
    }
    let rounds = Rounds { count: args.rounds.get(), length: Duration::from_millis(args.round_ms) };
    let mut report = Report::new(host::Host::detect()?, rounds);
    for (name, reason) in &absent {
        announce_absent(name, reason, args.json)?;
    }
    report.absent = absent;
    if tasks.is_empty() {
        return finish(&report, &args);
    }
    let python = peers::install();
    if let Err(error) = &python {
        note(format_args!("laneformer: no Python peers: {error:#}"));
    }
    let handover = Handover::new()?;
    if args.build_cost {
        report.build_cost = Some(host::output("sh", &["benches/peers/build_cost.sh"])?);
    }
    for threads in budgets {
        let runtime = Runtime::new(Isa::best(), threads)?;
        let mut contestants = match &python {
            Ok(python) => peers::start(python, threads),
            Err(_) => peers::absent("not installed"),
        };
        contestants.extend(rust_peers::start(threads));
        let mut lines = vec![];
        for task in &tasks {
            let line = contest(runtime.context(), task, &mut contestants, &handover, rounds)
                .with_context(|| task.name.clone())?;
            announce(&line, args.json)?;
            lines.push(line);
        }
        let columns = contestants.iter().map(|c| c.name().to_owned()).collect();
        report.add(Roofs::measure(threads), columns, lines);
    }
    finish(&report, &args)
}

/// What is said in the place of the row of sentences.
const NO_MODEL: &str = "not measured: --model names no directory with a MiniLM";

/// Writes the page of a whole run, and prints the tables.
fn finish(report: &Report, args: &CompareArgs) -> Result<ExitCode> {
    if args.is_whole() {
        let page = args.page();
        let images: Vec<String> = report.pictures(&args.images())?;
        write_whole(&page, report.markdown(&images).as_bytes())?;
        note(format_args!("laneformer: wrote {}", page.display()));
    }
    if !args.json {
        io::stdout().write_all(report.tables().as_bytes()).context("standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn default_budgets() -> Vec<usize> {
    let all = all_threads();
    if all == 1 { vec![1] } else { vec![1, all] }
}

/// A line as soon as it is known: JSON on standard output, or a sign of life on standard error.
fn announce(line: &Line, json: bool) -> Result<()> {
    if json {
        let mut out = io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(line)?)?;
        return Ok(out.flush()?);
    }
    note(format_args!("{} threads {}: {}", line.name, line.threads, report::time(line.ns)));
    Ok(())
}

/// The same of a row that is not measured.
fn announce_absent(name: &str, reason: &str, json: bool) -> Result<()> {
    if json {
        writeln!(io::stdout(), "{}", json!({ "name": name, "absent": reason }))?;
    } else {
        note(format_args!("{name}: {reason}"));
    }
    Ok(())
}

impl Roofs {
    /// The limits of this machine with so many threads: the best of several bursts.
    fn measure(threads: usize) -> Roofs {
        let roof = Roof { isa: Isa::best(), threads };
        let best = |burst: &dyn Fn() -> f64| (0..8).map(|_| burst()).fold(0.0, f64::max);
        let read = |bytes: usize| {
            let buffer = Buffer::filled(bytes / size_of::<f32>(), 1.0);
            best(&|| roof.read(&buffer))
        };
        Roofs {
            threads,
            gflops: best(&|| roof.fma()),
            l2_gbps: read(threads << 19),
            dram_gbps: read(256 << 20),
        }
    }
}
