//! `laneformer graph`: who sees whom, and which tiles of it attention computes, masks and skips.

mod kinds;
mod picture;

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use laneformer::{Cover, Tile};

pub use crate::graph::kinds::with_global;
use crate::graph::kinds::{Kind, Mask};
use crate::graph::picture::Grid;

/// Arguments of `graph`.
#[derive(clap::Args)]
pub struct GraphArgs {
    #[command(subcommand)]
    kind: Kind,
    /// Where the picture goes
    #[arg(long, global = true, value_name = "FILE.svg")]
    output: Option<PathBuf>,
    /// What stands above the picture [default: what the graph is]
    #[arg(long, global = true, value_name = "TEXT")]
    title: Option<String>,
}

/// Draws the picture and prints its figures.
pub fn run(args: &GraphArgs) -> Result<()> {
    let path = args.output.as_deref().context("--output FILE.svg is missing")?;
    let mask = args.kind.mask()?;
    let mut figures = Figures::new(&mask);
    let mut grid = Grid::new(figures.keys, figures.queries);
    for tile in mask.graph.tiles(0, &mask.offsets, &mask.key_offsets)? {
        figures.add(&tile);
        grid.add(&tile);
    }
    picture::draw(path, args.title.as_deref().unwrap_or(&mask.title), &mask, &figures, &grid)?;
    let mut text = format!("{}: {} queries, {} keys\n", mask.title, figures.queries, figures.keys);
    for [name, value, share] in figures.lines() {
        text += &format!("{name:16}{value:>14}  {share}\n");
    }
    io::stdout().write_all(text.as_bytes()).context("standard output")
}

/// What a mask costs.
struct Figures {
    queries: usize,
    keys: usize,
    edges: usize,
    scores: usize,
    full: Tally,
    partial: Tally,
    empty: Tally,
}

/// Tiles of one kind.
#[derive(Default)]
struct Tally {
    tiles: usize,
    /// Pairs of queries and keys in them.
    area: usize,
    /// Queries of the tallest.
    rows: usize,
}

impl Figures {
    fn new(mask: &Mask) -> Figures {
        let last = |offsets: &[usize]| offsets.last().copied().unwrap_or(0);
        Figures {
            queries: last(&mask.offsets),
            keys: last(&mask.key_offsets),
            edges: 0,
            scores: 0,
            full: Tally::default(),
            partial: Tally::default(),
            empty: Tally::default(),
        }
    }

    fn add(&mut self, tile: &Tile) {
        self.edges += tile.edges();
        self.scores += tile.scores();
        let tally = match tile.cover {
            Cover::Full => &mut self.full,
            Cover::Partial => &mut self.partial,
            Cover::Empty => &mut self.empty,
        };
        tally.tiles += 1;
        tally.area += tile.queries.len() * tile.keys.len();
        tally.rows = tally.rows.max(tile.queries.len());
    }

    /// Name, number and share of each figure.
    fn lines(&self) -> [[String; 3]; 5] {
        let square = self.queries * self.keys;
        let line = |name: &str, n: usize, share: String| [name.into(), thousands(n), share];
        let tiles = |name: &str, tally: &Tally| {
            line(name, tally.tiles, format!("{} of the square", percent(tally.area, square)))
        };
        [
            line("edges", self.edges, format!("{} of the square", percent(self.edges, square))),
            line("computed scores", self.scores, format!("{} are edges", percent(self.edges, self.scores))),
            tiles("full tiles", &self.full),
            tiles("partial tiles", &self.partial),
            tiles("empty tiles", &self.empty),
        ]
    }
}

fn percent(part: usize, whole: usize) -> String {
    if whole == 0 { "none".into() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
}

/// `1234567` as `1,234,567`.
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(thousands(n), text);
        }
        assert_eq!((percent(1, 8), percent(0, 0)), ("12.5 %".into(), "none".into()));
    }
}
