//! Measured rows, as JSON and as lines of a table.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use laneformer::Context;
use serde::Serialize;

use crate::bench::measure::{Deviation, Timing};
use crate::bench::roof::Roof;
use crate::bench::rows::{Bound, Cost};
use crate::note;

/// What `--json` prints.
#[derive(Debug, Serialize)]
pub struct Record {
    pub name: String,
    pub isa: &'static str,
    pub threads: usize,
    pub median_ns: f64,
    pub min_ns: f64,
    pub flops: u64,
    pub bytes: usize,
    pub gflops: f64,
    pub gbps: f64,
    pub bound: Bound,
    pub peak_gflops: f64,
    pub peak_gbps: f64,
    /// The median's part of the bound's peak.
    pub of_peak: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ns_per_element: Option<f64>,
    pub max_err: f64,
}

impl Record {
    /// The figures of a row from its times.
    pub fn new(name: &str, cost: Cost, roof: Roof, timing: &Timing, max_err: f64) -> Record {
        let &Timing { median, min, peak_gflops, peak_gbps } = timing;
        let median_ns = nanoseconds(median);
        let (gflops, gbps) = (cost.flops as f64 / median_ns, cost.bytes as f64 / median_ns);
        let bound = cost.bound(peak_gflops, peak_gbps);
        let of_peak = match bound {
            Bound::Fma => gflops / peak_gflops,
            Bound::Read => gbps / peak_gbps,
        };
        Record {
            name: name.to_owned(),
            isa: roof.isa.name(),
            threads: roof.threads,
            median_ns,
            min_ns: nanoseconds(min),
            flops: cost.flops,
            bytes: cost.bytes,
            gflops,
            gbps,
            bound,
            peak_gflops,
            peak_gbps,
            of_peak,
            ns_per_element: cost.elements.map(|n| median_ns / n as f64),
            max_err,
        }
    }

    /// Name and times, `own` cells of a kind of row, then what every row ends with: rate, bound, peak, the part of it, the error.
    pub fn cells_around<const OWN: usize, const ALL: usize>(&self, own: [String; OWN]) -> [String; ALL] {
        const { assert!(ALL == OWN + 8) };
        let times = [self.name.clone(), time(self.median_ns), time(self.min_ns)];
        let mut cells = times.into_iter().chain(own).chain(self.rate_cells()).chain([self.error_cell()]);
        std::array::from_fn(|_| cells.next().unwrap_or_default())
    }

    /// Rate, bound, peak and the part of it.
    pub fn rate_cells(&self) -> [String; 4] {
        let (rate, peak, bound) = match self.bound {
            Bound::Fma => (self.gflops, self.peak_gflops, "fma, GFLOP/s"),
            Bound::Read => (self.gbps, self.peak_gbps, "read, GB/s"),
        };
        [format!("{rate:.1}"), bound.into(), format!("{peak:.1}"), format!("{:.1} %", 100.0 * self.of_peak)]
    }

    pub fn error_cell(&self) -> String {
        format!("{:.1e}", self.max_err)
    }

    fn cells(&self) -> [String; 9] {
        let [rate, bound, peak, of_peak] = self.rate_cells();
        [
            self.name.clone(),
            time(self.median_ns),
            time(self.min_ns),
            rate,
            bound,
            peak,
            of_peak,
            self.ns_per_element.map_or_else(String::new, |ns| format!("{ns:.3}")),
            self.error_cell(),
        ]
    }
}

/// The table of all rows.
pub fn table(records: &[Record]) -> Table {
    let header = ["name", "median", "min", "rate", "bound", "peak", "of peak", "ns/element", "max error"];
    aligned(header, records.iter().map(Record::cells))
}

/// A table of numbers; names and bounds are words.
pub fn aligned<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header);
    table.add_rows(rows);
    for (name, column) in header.iter().zip(table.column_iter_mut()) {
        let left = ["name", "bound"].contains(name);
        column.set_cell_alignment(if left { CellAlignment::Left } else { CellAlignment::Right });
    }
    table
}

/// Where rows go: JSON lines as they come, or a table of all. It counts those whose answer is wrong.
pub struct Output<R> {
    json: bool,
    progress: ProgressBar,
    records: Vec<R>,
    wrong: usize,
}

impl<R: Serialize> Output<R> {
    /// For so many rows.
    pub fn new(json: bool, rows: usize) -> Output<R> {
        Output { json, progress: progress_bar(rows as u64), records: vec![], wrong: 0 }
    }

    /// Shows what is being done.
    pub fn begin(&self, what: &str) {
        self.progress.set_message(what.to_owned());
    }

    /// Takes a row: its figures, or how wrong it is.
    pub fn add(&mut self, name: &str, row: Result<R, Deviation>) -> Result<()> {
        match row {
            Ok(record) if self.json => {
                let line = serde_json::to_string(&record)?;
                let mut out = io::stdout().lock();
                self.progress.suspend(|| writeln!(out, "{line}").and_then(|()| out.flush()))?;
            }
            Ok(record) => self.records.push(record),
            Err(Deviation { max_err, limit }) => {
                self.wrong += 1;
                self.progress.suspend(|| {
                    note(format_args!(
                        "laneformer: {name}: wrong: max error {max_err:.3e}, limit {limit:.3e}"
                    ));
                });
            }
        }
        self.progress.inc(1);
        Ok(())
    }

    /// Prints the table, if there is to be one; failure if an answer was wrong.
    pub fn finish(self, ctx: Context<'_>, table: impl FnOnce(&[R]) -> Table) -> Result<ExitCode> {
        self.progress.finish_and_clear();
        if !self.json {
            let table = table(&self.records);
            writeln!(io::stdout(), "isa {}, threads {}\n{table}", ctx.isa(), ctx.members())?;
        }
        Ok(if self.wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
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

fn nanoseconds(duration: Duration) -> f64 {
    duration.as_nanos() as f64
}

/// A time with its unit.
pub fn time(ns: f64) -> String {
    match ns {
        ..1e6 => format!("{:.1} us", ns / 1e3),
        _ => format!("{:.2} ms", ns / 1e6),
    }
}
