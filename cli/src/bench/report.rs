//! A measured row, as JSON and as a line of the table.

use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use crate::bench::measure::Timing;
use crate::bench::roof::Roof;
use crate::bench::rows::Row;

/// Which roof a row stands under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// The multiply-adds.
    Fma,
    /// Reading the operands once.
    Read,
}

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
    pub fn new(row: &Row, roof: Roof, timing: &Timing, max_err: f64) -> Record {
        let cost = row.cost;
        let &Timing { median, min, peak_gflops, peak_gbps } = timing;
        let median_ns = nanoseconds(median);
        let (gflops, gbps) = (cost.flops as f64 / median_ns, cost.bytes as f64 / median_ns);
        let reads_longer = cost.bytes as f64 / peak_gbps > cost.flops as f64 / peak_gflops;
        let bound = if cost.elements.is_some() || reads_longer { Bound::Read } else { Bound::Fma };
        let of_peak = match bound {
            Bound::Fma => gflops / peak_gflops,
            Bound::Read => gbps / peak_gbps,
        };
        Record {
            name: row.name.clone(),
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

    fn cells(&self) -> [String; 9] {
        let (rate, peak, bound) = match self.bound {
            Bound::Fma => (self.gflops, self.peak_gflops, "fma, GFLOP/s"),
            Bound::Read => (self.gbps, self.peak_gbps, "read, GB/s"),
        };
        [
            self.name.clone(),
            time(self.median_ns),
            time(self.min_ns),
            format!("{rate:.1}"),
            bound.into(),
            format!("{peak:.1}"),
            format!("{:.1} %", 100.0 * self.of_peak),
            self.ns_per_element.map_or_else(String::new, |ns| format!("{ns:.3}")),
            format!("{:.1e}", self.max_err),
        ]
    }
}

/// The table of all rows.
pub fn table(records: &[Record]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "name",
        "median",
        "min",
        "rate",
        "bound",
        "peak",
        "of peak",
        "ns/element",
        "max error",
    ]);
    table.add_rows(records.iter().map(Record::cells));
    for (i, column) in table.column_iter_mut().enumerate() {
        let left = i == 0 || i == 4;
        column.set_cell_alignment(if left { CellAlignment::Left } else { CellAlignment::Right });
    }
    table
}

fn nanoseconds(duration: Duration) -> f64 {
    duration.as_nanos() as f64
}

fn time(ns: f64) -> String {
    match ns {
        ..1e6 => format!("{:.1} us", ns / 1e3),
        _ => format!("{:.2} ms", ns / 1e6),
    }
}
