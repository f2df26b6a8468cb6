//! `laneformer bench graph`: attention costs its edges, whatever the square.

use std::process::ExitCode;

use anyhow::Result;
use comfy_table::Table;
use laneformer::{Context, Graph};
use serde::Serialize;

use crate::bench::layer::{BERT_BASE, Dims};
use crate::bench::measure::Deviation;
use crate::bench::ops::Attention;
use crate::bench::report::{Output, Record, aligned, time};
use crate::bench::rows::Cost;
use crate::bench::{Item, measure, no_row};
use crate::graph::with_global;
use crate::runtime::RuntimeArgs;

/// Arguments of `bench graph`.
#[derive(clap::Args)]
pub struct GraphArgs {
    /// Only rows whose name contains this, and those that are measured in turns with them
    #[arg(value_name = "FILTER", default_value = "", hide_default_value = true)]
    filter: String,
    /// One JSON object per row instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

const DIMS: Dims = BERT_BASE;
/// Keys that a token of the windows sees at each side, and columns that all see.
const SIDE: usize = 256;
const GLOBAL: usize = 16;
const LENGTHS: [usize; 4] = [4096, 8192, 16384, 32768];
/// Tokens where a causal graph is held against a full one.
const COMPARED: usize = 2048;

/// A graph to be measured.
#[derive(Clone)]
struct Row {
    name: String,
    seq_len: usize,
    graph: Graph,
    keys: Keys,
    /// Pairs of a query and a key that it sees, and those whose scores are computed.
    edges: usize,
    scores: usize,
}

/// Which keys attention meets.
#[derive(Clone, Copy)]
enum Keys {
    /// Rows, which it stores by head where it reads them.
    Stream,
    /// Rows, all of which it stores first.
    StoredFirst,
    /// Those that are stored already: what a layer pays, whose projection stores them.
    Stored,
}

/// What `--json` prints: the fields of every row of `bench`, and those of a graph.
#[derive(Serialize)]
struct GraphRecord {
    #[serde(flatten)]
    record: Record,
    ns_per_token: f64,
    /// Of one head.
    edges: usize,
    /// Part of the computed scores that are edges.
    edges_computed: f64,
    /// Keys and values by head, and the scratch of all threads.
    workspace_bytes: usize,
    /// Time over that of the full graph, measured in turns.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_full: Option<f64>,
}

/// Measures the rows; failure if an answer is wrong.
pub fn run(args: &GraphArgs) -> Result<ExitCode> {
    let all = rows()?;
    let names = || all.iter().flatten().map(|row| &row.name);
    let wanted = |rows: &&Vec<Row>| rows.iter().any(|row| row.name.contains(&args.filter));
    let wanted: Vec<&Vec<Row>> = all.iter().filter(wanted).collect();
    if wanted.is_empty() {
        return no_row(&args.filter, names().cloned());
    }
    let runtime = args.runtime.build()?;
    let ctx = runtime.context();
    let mut output = Output::new(args.json, wanted.iter().map(|rows| rows.len()).sum());
    for rows in wanted {
        output.begin(&rows[0].name);
        for (name, record) in measure_rows(rows, ctx)? {
            output.add(&name, record)?;
        }
    }
    output.finish(ctx, table)
}

/// Rows that are measured in turns, the one that the others are held against first.
fn rows() -> Result<Vec<Vec<Row>>> {
    let name = format!("window{}+{GLOBAL}", 2 * SIDE);
    let window = |seq_len| Row::new(&name, seq_len, with_global(Graph::window(SIDE, SIDE), GLOBAL, seq_len)?);
    let mut rows = vec![vec![
        Row::new("full", COMPARED, Graph::full())?,
        Row::new("causal", COMPARED, Graph::causal())?,
    ]];
    for seq_len in LENGTHS {
        // Each alone: in turns they would take the last cache from one another.
        let row = window(seq_len)?;
        let kinds =
            [(Keys::Stream, ""), (Keys::StoredFirst, "/stored-first"), (Keys::Stored, "/stored-keys")];
        rows.extend(kinds.map(|(keys, suffix)| vec![row.over(keys, suffix)]));
    }
    Ok(rows)
}

impl Row {
    fn new(name: &str, seq_len: usize, graph: Graph) -> Result<Row> {
        let (mut edges, mut scores) = (0, 0);
        for tile in graph.tiles(0, &[0, seq_len], &[0, seq_len])? {
            edges += tile.edges();
            scores += tile.scores();
        }
        let name = format!("graph/f32/{}/{name}/b1s{seq_len}", DIMS.name);
        Ok(Row { name, seq_len, graph, keys: Keys::StoredFirst, edges, scores })
    }

    /// The same over other keys.
    fn over(&self, keys: Keys, suffix: &str) -> Row {
        Row { name: format!("{}{suffix}", self.name), keys, ..self.clone() }
    }

    /// Two products per edge, and the operands once.
    fn cost(&self) -> Cost {
        let flops = 4 * (self.edges * DIMS.d_model) as u64;
        let bytes = 4 * self.seq_len * DIMS.d_model * size_of::<f32>();
        Cost { flops, bytes, elements: None }
    }
}

type Outcome = (String, Result<GraphRecord, Deviation>);

fn measure_rows(rows: &[Row], ctx: Context<'_>) -> Result<Vec<Outcome>> {
    let (mut items, mut workspaces) = (vec![], vec![]);
    for row in rows {
        let head_dim = DIMS.d_model / DIMS.n_heads;
        let attention = Attention::new(DIMS.n_heads, head_dim, 1, row.seq_len, row.graph.clone())?;
        let attention = match row.keys {
            Keys::Stream => attention.over_a_stream(ctx.members())?,
            Keys::StoredFirst => attention,
            Keys::Stored => attention.over_stored_keys(),
        };
        workspaces.push(attention.workspace_bytes(ctx.members())?);
        items.push(Item { name: row.name.clone(), cost: row.cost(), workload: Box::new(attention) });
    }
    let measured = measure(items, ctx)?;
    let full = rows.iter().zip(&measured).find(|(row, _)| row.graph == Graph::full());
    let full_ns = full.and_then(|(_, (_, record))| record.as_ref().ok()).map(|record| record.median_ns);
    let outcome = |(((name, record), row), workspace_bytes): ((_, &Row), usize)| {
        let (name, record): (String, Result<Record, Deviation>) = (name, record);
        let record = record.map(|record| GraphRecord {
            ns_per_token: record.median_ns / row.seq_len as f64,
            edges: row.edges,
            edges_computed: row.edges as f64 / row.scores as f64,
            workspace_bytes,
            of_full: full_ns.map(|full| record.median_ns / full),
            record,
        });
        (name, record)
    };
    Ok(measured.into_iter().zip(rows).zip(workspaces).map(outcome).collect())
}

fn table(records: &[GraphRecord]) -> Table {
    let header = [
        "name",
        "median",
        "us/token",
        "of full",
        "edges",
        "computed",
        "rate",
        "bound",
        "peak",
        "of peak",
        "workspace",
        "max error",
    ];
    aligned(
        header,
        records.iter().map(|r| {
            let [rate, bound, peak, of_peak] = r.record.rate_cells();
            [
                r.record.name.clone(),
                time(r.record.median_ns),
                format!("{:.2}", r.ns_per_token / 1e3),
                r.of_full.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
                format!("{:.1} M", r.edges as f64 / 1e6),
                format!("{:.1} %", 100.0 * r.edges_computed),
                rate,
                bound,
                peak,
                of_peak,
                format!("{:.1} MiB", r.workspace_bytes as f64 / f64::from(1 << 20)),
                r.record.error_cell(),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_counted() -> Result<()> {
        let rows = rows()?;
        let edges = |i: usize, j: usize| (rows[i][j].name.as_str(), rows[i][j].edges);
        assert_eq!(edges(0, 0), ("graph/f32/bert-base/full/b1s2048", 2048 * 2048));
        assert_eq!(edges(0, 1), ("graph/f32/bert-base/causal/b1s2048", 2048 * 2049 / 2));
        for (i, n) in LENGTHS.into_iter().enumerate() {
            // 513 keys but at the ends, and the columns where they are not in the window.
            let window = 513 * n - 256 * 257;
            let columns: usize = (0..16).map(|key| n - (key + 257)).sum();
            for row in rows[3 * i + 1..][..3].iter().flatten() {
                assert_eq!(row.edges, window + columns, "{n}");
                assert!(row.scores >= row.edges);
            }
        }
        Ok(())
    }
}
