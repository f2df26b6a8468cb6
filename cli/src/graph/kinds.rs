//! The graphs that can be asked for by name.

use std::num::NonZeroUsize;

use anyhow::{Context as _, Result, bail, ensure};
use laneformer::{Bits, Graph};

/// The longest batch; a picture of more would show less.
const MOST_TOKENS: usize = 1 << 15;

/// Who sees whom.
#[derive(clap::Subcommand)]
pub enum Kind {
    /// Every token sees every token
    Full(Tokens),
    /// A token sees itself and what comes before it
    Causal {
        #[command(flatten)]
        tokens: Tokens,
        /// Keys before the first query: a cache or a memory
        #[arg(long, value_name = "N", default_value = "0")]
        offset: usize,
    },
    /// A token sees itself and its neighbours
    Window {
        #[command(flatten)]
        tokens: Tokens,
        #[command(flatten)]
        window: Window,
    },
    /// A token sees its neighbours and the first tokens, as in Longformer
    WindowGlobal {
        #[command(flatten)]
        tokens: Tokens,
        #[command(flatten)]
        window: Window,
        /// Leading tokens that all see
        #[arg(long, value_name = "N")]
        global: NonZeroUsize,
    },
    /// A prefix that all see, and what comes before a token (prefix-LM)
    Prefix {
        #[command(flatten)]
        tokens: Tokens,
        /// Leading tokens that all see
        #[arg(long, value_name = "N")]
        prefix: NonZeroUsize,
    },
    /// Sequences packed one behind the other; a token sees its own
    Ragged {
        /// Tokens of each sequence
        #[arg(long, value_name = "N,N,...", value_delimiter = ',', required = true)]
        lengths: Vec<NonZeroUsize>,
    },
    /// Groups of tokens, such as modalities, and which group sees which
    Groups {
        /// Runs of tokens and their groups, a name may come again: "text:40,image:64,text:20"
        #[arg(long, value_name = "RUNS")]
        groups: String,
        /// Which groups each group sees; one that is not named sees none: "text>text,image; image>image"
        #[arg(long, value_name = "TABLE")]
        table: String,
    },
    /// Padded sequences: real tokens are seen, padding is not
    Padding {
        #[command(flatten)]
        tokens: Tokens,
        /// Real tokens of each sequence; --seq-len is what each is padded to
        #[arg(long, value_name = "N,N,...", value_delimiter = ',', required = true)]
        lengths: Vec<NonZeroUsize>,
    },
}

#[derive(clap::Args, Clone, Copy)]
pub struct Tokens {
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value = "512")]
    seq_len: NonZeroUsize,
}

#[derive(clap::Args, Clone, Copy)]
pub struct Window {
    /// Tokens seen before a token
    #[arg(long, value_name = "N")]
    left: usize,
    /// Tokens seen after a token
    #[arg(long, value_name = "N")]
    right: usize,
}

/// A graph and the batch that it is for.
pub struct Mask {
    pub title: String,
    pub graph: Graph,
    /// Where the queries of each sequence begin, and the end.
    pub offsets: Vec<usize>,
    /// The same of the keys.
    pub key_offsets: Vec<usize>,
    /// Runs of tokens with names instead of numbers.
    pub names: Vec<(String, usize)>,
}

impl Kind {
    /// The graph; an error names the option that does not fit.
    pub fn mask(&self) -> Result<Mask> {
        let mask = match self {
            Kind::Full(tokens) => single("full".into(), tokens.len()?, 0, Graph::full()),
            Kind::Causal { tokens, offset } => {
                let title =
                    if *offset == 0 { "causal".into() } else { format!("causal after {offset} keys") };
                single(title, tokens.len()?, *offset, Graph::causal())
            }
            Kind::Window { tokens, window } => {
                let len = tokens.len()?;
                single(window.title(), len, 0, window.graph(len)?)
            }
            Kind::WindowGlobal { tokens, window, global } => {
                let len = tokens.len()?;
                let global = at_most("--global", *global, len)?;
                let title = format!("{} and {global} global columns", window.title());
                single(title, len, 0, with_global(window.graph(len)?, global, len)?)
            }
            Kind::Prefix { tokens, prefix } => {
                let len = tokens.len()?;
                let prefix = at_most("--prefix", *prefix, len)?;
                let title = format!("causal after a prefix of {prefix}");
                single(title, len, 0, with_global(Graph::causal(), prefix, len)?)
            }
            Kind::Ragged { lengths } => {
                let title = format!("{} packed sequences", lengths.len());
                batch(title, Graph::full(), ends(lengths.iter().map(|n| n.get())))
            }
            Kind::Groups { groups, table } => by_group(groups, table)?,
            Kind::Padding { tokens, lengths } => padded(tokens.len()?, lengths)?,
        };
        for (what, offsets) in [("queries", &mask.offsets), ("keys", &mask.key_offsets)] {
            let n = offsets.last().copied().unwrap_or(0);
            ensure!(n <= MOST_TOKENS, "{n} {what}: expected at most {MOST_TOKENS}");
        }
        Ok(mask)
    }
}

impl Tokens {
    fn len(self) -> Result<usize> {
        let n = self.seq_len.get();
        ensure!(n <= MOST_TOKENS, "--seq-len {n}: expected at most {MOST_TOKENS}");
        Ok(n)
    }
}

impl Window {
    fn graph(self, len: usize) -> Result<Graph> {
        for (name, n) in [("--left", self.left), ("--right", self.right)] {
            ensure!(n < len, "{name} {n}: expected less than the {len} tokens of the sequence");
        }
        Ok(Graph::window(self.left, self.right))
    }

    fn title(self) -> String {
        format!("window of {} before and {} after", self.left, self.right)
    }
}

/// The same graph on `len` tokens, the first of which all see.
pub fn with_global(graph: Graph, global: usize, len: usize) -> Result<Graph> {
    let columns: Vec<bool> = (0..len).map(|key| key < global).collect();
    Ok(graph.with_columns(Bits::keys(&[&columns])?))
}

fn at_most(name: &str, n: NonZeroUsize, len: usize) -> Result<usize> {
    ensure!(n.get() <= len, "{name} {n}: expected at most the {len} tokens of the sequence");
    Ok(n.get())
}

/// `[0, first, first + second, ...]`; saturates, to be refused.
fn ends(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let sums = lengths.scan(0_usize, |end, n| {
        *end = end.saturating_add(n);
        Some(*end)
    });
    [0].into_iter().chain(sums).collect()
}

/// One sequence, its queries at the end of its keys.
fn single(title: String, len: usize, offset: usize, graph: Graph) -> Mask {
    let key_offsets = vec![0, len.saturating_add(offset)];
    Mask { title, graph, offsets: vec![0, len], key_offsets, names: vec![] }
}

fn batch(title: String, graph: Graph, offsets: Vec<usize>) -> Mask {
    Mask { title, graph, key_offsets: offsets.clone(), offsets, names: vec![] }
}

fn padded(len: usize, lengths: &[NonZeroUsize]) -> Result<Mask> {
    let lengths: Vec<usize> = lengths.iter().map(|n| at_most("--lengths", *n, len)).collect::<Result<_>>()?;
    let offsets = ends(lengths.iter().map(|_| len));
    let total = offsets[lengths.len()];
    ensure!(total <= MOST_TOKENS, "{total} tokens: expected at most {MOST_TOKENS}");
    let keys: Vec<Vec<bool>> = lengths.iter().map(|&n| (0..len).map(|key| key < n).collect()).collect();
    let keys: Vec<&[bool]> = keys.iter().map(Vec::as_slice).collect();
    let real: usize = lengths.iter().sum();
    let title = format!("padding: {real} real tokens of {total}");
    Ok(batch(title, Graph::full().with_bits(Bits::keys(&keys)?), offsets))
}

fn by_group(groups: &str, table: &str) -> Result<Mask> {
    let runs: Vec<(String, usize)> = groups.split(',').map(parse_run).collect::<Result<_>>()?;
    let mut names: Vec<&str> = vec![];
    let offsets = ends(runs.iter().map(|(_, n)| *n));
    let total = offsets[runs.len()];
    ensure!(total <= MOST_TOKENS, "{total} tokens: expected at most {MOST_TOKENS}");
    let mut ids = vec![];
    for (name, n) in &runs {
        let id = names.iter().position(|known| known == name).unwrap_or(names.len());
        if id == names.len() {
            names.push(name);
        }
        ids.extend(std::iter::repeat_n(id as u32, *n));
    }
    let sees = parse_table(table, &names)?;
    let bits = Bits::groups(&ids, &ids, &[0, total], names.len(), &sees)?;
    let title = format!("{} groups of tokens", names.len());
    let mask = batch(title, Graph::full().with_bits(bits), vec![0, total]);
    Ok(Mask { names: runs, ..mask })
}

/// `name:tokens`.
fn parse_run(run: &str) -> Result<(String, usize)> {
    let (name, n) =
        run.split_once(':').with_context(|| format!("--groups: expected name:tokens, got {run:?}"))?;
    let (name, n) = (name.trim(), n.trim());
    ensure!(!name.is_empty(), "--groups: expected a name before the colon of {run:?}");
    let n: NonZeroUsize = n.parse().with_context(|| format!("--groups: tokens of {name}: {n:?}"))?;
    Ok((name.into(), n.get()))
}

/// `query group > key group, key group; ...` as `[query group * groups + key group]`.
fn parse_table(table: &str, names: &[&str]) -> Result<Vec<bool>> {
    let find = |name: &str| {
        let name = name.trim();
        match names.iter().position(|known| *known == name) {
            Some(id) => Ok(id),
            None => bail!("--table: no group {name:?}; the groups are {}", names.join(", ")),
        }
    };
    let mut sees = vec![false; names.len() * names.len()];
    for entry in table.split(';').filter(|entry| !entry.trim().is_empty()) {
        let (query, keys) = entry
            .split_once('>')
            .with_context(|| format!("--table: expected group>group,group, got {:?}", entry.trim()))?;
        let query = find(query)?;
        for key in keys.split(',') {
            sees[query * names.len() + find(key)?] = true;
        }
    }
    Ok(sees)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read() -> Result<()> {
        let mask = by_group("a:2, b:1,a:1", "a>a,b; b > b;")?;
        assert_eq!(mask.names, [("a".into(), 2), ("b".into(), 1), ("a".into(), 1)]);
        let seen = |tile: laneformer::Tile| (0..4).map(|query| tile.seen(query)).collect::<Vec<_>>();
        let tiles: Vec<_> = mask.graph.tiles(0, &mask.offsets, &mask.key_offsets)?.map(seen).collect();
        assert_eq!(tiles, [[0b1111, 0b1111, 0b0100, 0b1111]]);
        for (groups, table, message) in [
            ("a", "a>a", "name:tokens"),
            (":3", "a>a", "a name"),
            ("a:0", "a>a", "tokens of a"),
            ("a:x", "a>a", "tokens of a"),
            ("a:99999", "a>a", "at most"),
            ("a:3", "a", "group>group"),
            ("a:3", "a>", "no group \"\""),
            ("a:3,c:4", "a>b", "no group \"b\"; the groups are a, c"),
        ] {
            let error = format!("{:#}", by_group(groups, table).map(|_| ()).unwrap_err());
            assert!(error.contains(message), "{groups} {table}: {error}");
        }
        Ok(())
    }

    #[test]
    fn sums_saturate() {
        assert_eq!(ends([3, 4].into_iter()), [0, 3, 7]);
        assert_eq!(ends([usize::MAX, 4].into_iter()), [0, usize::MAX, usize::MAX]);
    }
}
