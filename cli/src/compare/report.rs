//! `BENCHMARKS.md`: the machine, the tables, the pictures.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use crate::bench::rows::Bound;
use crate::compare::contest::{Line, Outcome, ROUNDS_OF_LONG, Rounds};
use crate::compare::host::Host;
use crate::compare::picture::{self, Point};
use crate::systems::Items;

/// Limits of the machine with so many threads.
#[derive(Clone, Copy, Debug)]
pub struct Roofs {
    pub threads: usize,
    pub gflops: f64,
    pub l2_gbps: f64,
    pub dram_gbps: f64,
}

/// All that was measured.
pub struct Report {
    host: Host,
    rounds: Rounds,
    parts: Vec<Part>,
    /// Lines about the build of the library, if they were asked for.
    pub build_cost: Option<String>,
    /// Rows that were not measured, and why.
    pub absent: Vec<(String, String)>,
}

/// What was measured with one thread budget.
struct Part {
    roofs: Roofs,
    columns: Vec<String>,
    lines: Vec<Line>,
}

/// A table: its title, and the tasks whose names begin so.
const GROUPS: [(&str, &[&str]); 6] = [
    ("Encoder layers and stacks", &["layer/", "stack"]),
    ("Products with constant weights", &["gemm/"]),
    ("Attention alone", &["attention/"]),
    ("Operations on rows", &["softmax/", "layernorm/", "gelu"]),
    ("Systems", &["systems/"]),
    ("Sentences to vectors", &["sentences/"]),
];

const OURS: &str = "laneformer";

impl Report {
    pub fn new(host: Host, rounds: Rounds) -> Report {
        Report { host, rounds, parts: vec![], build_cost: None, absent: vec![] }
    }

    /// The peak of multiply-adds becomes the best of all: while the machine gives a core to somebody else, bursts are slower, too.
    pub fn add(&mut self, mut roofs: Roofs, columns: Vec<String>, mut lines: Vec<Line>) {
        roofs.gflops = lines.iter().map(|line| line.peak_gflops).fold(roofs.gflops, f64::max);
        lines.iter_mut().for_each(|line| line.peak_gflops = roofs.gflops);
        self.parts.push(Part { roofs, columns, lines });
    }

    /// The tables alone.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        for (title, prefixes) in GROUPS {
            let of_group = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
            let lines = |part: &'_ Part| part.lines.iter().filter(|line| of_group(&line.name)).count();
            let absent: Vec<_> = self.absent.iter().filter(|(name, _)| of_group(name)).collect();
            if self.parts.iter().all(|part| lines(part) == 0) && absent.is_empty() {
                continue;
            }
            let _ = writeln!(text, "## {title}\n"); // Writing to a string does not fail.
            for part in self.parts.iter().filter(|part| lines(part) > 0) {
                let lines = part.lines.iter().filter(|line| of_group(&line.name));
                part.table(&mut text, &lines.collect::<Vec<_>>());
            }
            for (name, reason) in absent {
                let _ = writeln!(text, "`{name}`: {reason}\n");
            }
        }
        text
    }

    /// The whole page.
    pub fn markdown(&self, images: &[String]) -> String {
        let Host { date, cpu, cores, memory_gib, kernel, rustc, isa } = &self.host;
        let mut text = format!(
            "# Benchmarks\n\nWritten by `laneformer compare`; do not edit. Measured {date} in one session.\n\n\
             | | |\n|---|---|\n\
             | CPU | {cpu}, {cores} cores given to this machine, instruction set {isa} |\n\
             | memory | {} |\n| system | {kernel} |\n| compiler | {rustc} |\n| laneformer | {} |\n",
            memory_gib.map_or_else(|| "unknown".to_owned(), |gib| format!("{gib} GiB")),
            env!("CARGO_PKG_VERSION"),
        );
        if let Some(part) = self.parts.first() {
            let _ = writeln!(text, "| peers | {} |", part.columns.join(", "));
        }
        for Part { roofs: Roofs { threads, gflops, l2_gbps, dram_gbps }, .. } in &self.parts {
            let _ = writeln!(
                text,
                "| limits, {threads} thread{} | {gflops:.0} GFLOP/s multiply-adds, {l2_gbps:.0} GB/s read from L2, {dram_gbps:.0} GB/s from memory |",
                if *threads == 1 { "" } else { "s" },
            );
        }
        let ms = self.rounds.length.as_millis();
        let _ = writeln!(
            text,
            "\n```sh\ncargo build --release -p laneformer-cli --features peers\nscripts/fetch-minilm.sh target/minilm\n\
             target/release/laneformer compare --model target/minilm    # makes target/peers-venv from benches/peers/requirements.txt\n```\n\n\
             Everybody gets the same random operands, weights prepared beforehand as the library offers it, and the same number of threads. The rounds \
             take turns: ours, a peer, ours, the next peer, {} rounds of each peer, {ms} ms each or one run, every round after a run that warms the caches. \
             A time is the median over the rounds of the median run. A peer's result is compared with ours before it is timed.\n\n\
             GFLOP/s count the products only, two for each multiply-add. \"of peak\" is the part of the best burst of multiply-adds of the run \
             with as many threads. \"of bound\" is the same, or the part of the best burst of reads of as many bytes as the operands have, between the rounds of \
             that task, where reading them once takes longer than the arithmetic. A peer's cell is its time and, in brackets, that time divided by ours: above 1 we are faster. Python peers \
             pay a few microseconds per call for Python, which shows in the smallest tasks. The input stays as it is for everybody: where laneformer \
             works in place, the copy is in its time. PyTorch runs eagerly.\n\n\
             Systems are whole models of the models crate, up to their last hidden states or logits, against those of transformers (its fused attention \
             where it has one) with the same random weights; what PyTorch has no model for any more, Transformer-XL, is its authors' formula, which \
             projects the memory and the positions anew for every segment. XLNet's positions are kept here too, and projected anew there. Sentences are 1024 lines made of those in `tests/golden/minilm`, 22 tokens in the mean, \
             from text to embeddings: laneformer in batches of about 1024 tokens as they come, the others in batches of 32 that are sorted by length and padded. Of \
             both there are at most {ROUNDS_OF_LONG} rounds. PyTorch decodes with the default cache of transformers, which copies keys and values to append to them.\n",
            self.rounds.count,
        );
        for image in images {
            let _ = writeln!(text, "![{}](docs/img/{image})\n", image.trim_end_matches(".svg"));
        }
        text += &self.tables();
        if let Some(cost) = &self.build_cost {
            let _ = writeln!(text, "## Build of the library\n\n```\n{cost}\n```");
        }
        text
    }

    /// Bars and rooflines in `dir`; the names of the files.
    pub fn pictures(&self, dir: &Path) -> Result<Vec<String>> {
        let mut names = vec![];
        for part in &self.parts {
            let threads = part.roofs.threads;
            let title =
                |what: &str| format!("{what}, {threads} thread{}", if threads == 1 { "" } else { "s" });
            let layers: Vec<&Line> = part
                .lines
                .iter()
                .filter(|l| l.name.starts_with("layer/") || l.name.starts_with("stack"))
                .collect();
            let mut series = vec![(OURS.to_owned(), layers.iter().map(|l| Some(l.gflops(l.ns))).collect())];
            for (i, column) in part.columns.iter().enumerate() {
                let rates: Vec<Option<f64>> = layers.iter().map(|line| line.peer_gflops(i)).collect();
                if rates.iter().any(Option::is_some) {
                    series.push((column.clone(), rates));
                }
            }
            let labels: Vec<String> = layers.iter().map(|line| line.name.replace("/f32/", "/")).collect();
            let name = format!("layers-{threads}.svg");
            let roof = part.roofs.gflops;
            picture::bars(&dir.join(&name), &title("f32 layers, GFLOP/s"), &labels, &series, roof)?;
            names.push(name);

            let points: Vec<Point> = part.lines.iter().map(Line::point).collect();
            let name = format!("roofline-{threads}.svg");
            picture::roofline(&dir.join(&name), &title("Roofline, f32"), &points, &part.roofs)?;
            names.push(name);
        }
        Ok(names)
    }
}

impl Part {
    fn table(&self, text: &mut String, lines: &[&Line]) {
        let elementwise = lines.iter().any(|line| line.elements.is_some());
        // A column without a single figure or reason is left out.
        let shown: Vec<usize> = (0..self.columns.len())
            .filter(|&i| lines.iter().any(|line| !line.peers.get(i).is_none_or(|(_, o)| o.is_none())))
            .collect();
        let (rate, rule) = match (elementwise, lines.iter().any(|line| line.items.is_some())) {
            (true, _) => ("ns/element", "---:"),
            (false, false) => ("GFLOP/s | of peak | of bound", "---:|---:|---:"),
            (false, true) => ("per second | GFLOP/s | of peak | of bound", "---:|---:|---:|---:"),
        };
        let _ = write!(text, "| task | threads | {OURS} | {rate} |");
        shown.iter().for_each(|&i| {
            let _ = write!(text, " {} |", self.columns[i]);
        });
        let _ = writeln!(text, "\n|---|---:|---:|{rule}|{}", "---:|".repeat(shown.len()));
        for line in lines {
            let rate = match line.elements {
                Some(elements) => format!("{:.3}", line.ns / elements as f64),
                None => {
                    let rate = line.gflops(line.ns);
                    let items = |items: Items| format!("{:.1} {} | ", items.per_second(line.ns), items.unit);
                    let items = line.items.map_or_else(String::new, items);
                    let of_peak = 100.0 * rate / line.peak_gflops;
                    let of_bound = match line.cost().bound(line.peak_gflops, line.peak_gbps) {
                        Bound::Fma => format!("{of_peak:.1} %"),
                        Bound::Read => {
                            let rate = line.bytes as f64 / line.ns;
                            format!("{:.1} % of {:.0} GB/s", 100.0 * rate / line.peak_gbps, line.peak_gbps)
                        }
                    };
                    format!("{items}{rate:.1} | {of_peak:.1} % | {of_bound}")
                }
            };
            let _ = write!(text, "| {} | {} | {} | {rate} |", line.name, line.threads, time(line.ns));
            for &i in &shown {
                let cell = line.peers.get(i).map_or_else(String::new, |(_, outcome)| outcome.cell());
                let _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
        text.push('\n');
    }
}

impl Line {
    fn peer_gflops(&self, i: usize) -> Option<f64> {
        match self.peers.get(i) {
            Some((_, Outcome::Timed { ns, .. })) => Some(self.gflops(*ns)),
            _ => None,
        }
    }

    fn point(&self) -> Point {
        Point {
            name: self.name.clone(),
            intensity: self.flops as f64 / self.bytes as f64,
            gflops: self.gflops(self.ns),
        }
    }
}

impl Outcome {
    /// Whether the peer does not do this operation at all.
    fn is_none(&self) -> bool {
        matches!(self, Outcome::Absent { absent } if absent == "-")
    }

    fn cell(&self) -> String {
        match self {
            Outcome::Timed { ns, ratio, .. } => format!("{} ({ratio:.2})", time(*ns)),
            Outcome::Absent { absent } => absent.replace(['|', '\n'], " "),
        }
    }
}

/// A time with a fitting unit.
pub fn time(ns: f64) -> String {
    match ns {
        ..1e4 => format!("{:.2} us", ns / 1e3),
        ..1e6 => format!("{:.1} us", ns / 1e3),
        _ => format!("{:.2} ms", ns / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn tables_name_the_threads_and_the_absent() {
        let host = Host {
            date: "today".into(),
            cpu: "cpu".into(),
            cores: 2,
            memory_gib: Some(4),
            kernel: "k".into(),
            rustc: "r".into(),
            isa: "avx2",
        };
        let mut report = Report::new(host, Rounds { count: 7, length: Duration::from_millis(30) });
        let timed = Outcome::Timed { ns: 3000.0, ratio: 1.5, difference: 0.0 };
        let absent = Outcome::Absent { absent: "not installed".into() };
        let line = Line {
            name: "gemm/f32/m1n1k1".into(),
            threads: 2,
            flops: 100_000,
            bytes: 100,
            elements: None,
            items: None,
            ns: 2000.0,
            // Disturbed: the other has the peak.
            peak_gflops: 40.0,
            peak_gbps: 1000.0,
            peers: vec![("A".into(), timed), ("B".into(), absent)],
        };
        let items = Some(Items { count: 3, unit: "tokens" });
        let name = "systems/f32/x".into();
        let system = Line { name, bytes: 1_500_000, items, peak_gflops: 100.0, ..line.clone() };
        let roofs = Roofs { threads: 2, gflops: 90.0, l2_gbps: 10.0, dram_gbps: 1.0 };
        report.add(roofs, vec!["A".into(), "B".into()], vec![line, system]);
        report.absent.push(("sentences/f32".into(), "not measured".into()));
        let page = report.markdown(&["x.svg".to_owned()]);
        assert!(
            page.contains("| task | threads | laneformer | GFLOP/s | of peak | of bound | A | B |"),
            "{page}"
        );
        let row =
            "| gemm/f32/m1n1k1 | 2 | 2.00 us | 50.0 | 50.0 % | 50.0 % | 3.00 us (1.50) | not installed |";
        assert!(page.contains(row), "{page}");
        assert!(!page.contains("Attention alone"));
        let row = "| systems/f32/x | 2 | 2.00 us | 1500000.0 tokens | 50.0 | 50.0 % | 75.0 % of 1000 GB/s | 3.00 us (1.50) |";
        assert!(page.contains(row) && page.contains("| per second | GFLOP/s |"), "{page}");
        assert!(page.contains("## Sentences to vectors\n\n`sentences/f32`: not measured\n"), "{page}");
    }
}
