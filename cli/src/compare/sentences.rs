//! Sentences to vectors: lines of text, and `embed`'s way from them to embeddings.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use laneformer::Context;
use laneformer_models::bert::Config;
use laneformer_models::config::read_json;
use laneformer_text::sentence::{Buffers, SentenceEncoder};
use serde::Serialize;

use crate::bench::layer::Dims;
use crate::bench::rows::Cost;
use crate::compare::contest::Engine;
use crate::compare::task::{Spec, Task};
use crate::embed::next_batch;
use crate::input::Lines;
use crate::systems::Items;

/// A directory with a BERT, and what it is to read.
#[derive(Clone, Debug, Serialize)]
pub struct Sentences {
    model: PathBuf,
    sentences: Vec<String>,
}

/// As rows are called, whatever the model.
pub const NAME: &str = "sentences/f32";

/// Lines of the text; of a small one.
const LINES: [usize; 2] = [1024, 64];

/// The task for the model in a directory. Its cost is that of the tokens: padding is the peers' own.
pub fn task(model: &Path, small: bool) -> Result<Task> {
    let path = model.join("config.json");
    let config = Config::from_json(&path, &read_json(&path)?)?;
    let lines = lines(LINES[usize::from(small)]);
    let encoder = SentenceEncoder::open(model)?;
    let dims = Dims {
        name: "",
        d_model: config.hidden_size,
        n_heads: config.num_attention_heads,
        d_ff: config.intermediate_size,
    };
    let layers = config.num_hidden_layers;
    let mut flops = 0;
    for line in &lines {
        flops += layers as u64 * dims.flops(1, encoder.tokenize(line)?.len());
    }
    let name = model.file_name().unwrap_or(model.as_os_str()).to_string_lossy();
    Ok(Task {
        name: format!("{NAME}/{name}/n{}", lines.len()),
        cost: Cost { flops, bytes: layers * dims.parameters() * size_of::<f32>(), elements: None },
        items: Some(Items { count: lines.len(), unit: "sentences" }),
        spec: Spec::Sentences(Sentences { model: model.to_owned(), sentences: lines }),
    })
}

/// Passages of the golden cases' English sentences, the same in every run. Their lengths are spread as those of sentences are:
/// with MiniLM's tokenizer 22 tokens in the mean, few long ones.
fn lines(n: usize) -> Vec<String> {
    let text = include_str!("../../../tests/golden/minilm/sentences.txt");
    let words: Vec<&str> =
        text.lines().filter(|line| line.is_ascii()).flat_map(str::split_whitespace).collect();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut draw = |below: usize| {
        // xorshift64; the high bits are the good ones.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    let line = |_| {
        // Three waits for an event: a length that has no upper limit, and one most frequent value.
        let mut len = SHORTEST;
        for _ in 0..3 {
            while draw(ONE_IN) != 0 {
                len += 1;
            }
        }
        let start = draw(words.len());
        words.iter().cycle().skip(start).take(len).copied().collect::<Vec<_>>().join(" ")
    };
    (0..n).map(line).collect()
}

/// Words of the shortest line.
const SHORTEST: usize = 3;
/// The mean of each wait is one less.
const ONE_IN: usize = 5;

/// The library's way: batches as `embed` makes them, one after another, tokenization included.
pub struct Encoder<'a> {
    ctx: Context<'a>,
    encoder: SentenceEncoder,
    text: Vec<u8>,
    buffers: Buffers,
    embeddings: Vec<f32>,
}

impl<'a> Encoder<'a> {
    pub fn open(ctx: Context<'a>, Sentences { model, sentences }: &Sentences) -> Result<Encoder<'a>> {
        let encoder = SentenceEncoder::open(model)?;
        let text = sentences.join("\n").into_bytes();
        Ok(Encoder { ctx, encoder, text, buffers: Buffers::default(), embeddings: vec![] })
    }
}

impl Engine for Encoder<'_> {
    fn run(&mut self) -> Result<()> {
        self.embeddings.clear();
        let mut lines = Lines::of("sentences", Box::new(Cursor::new(self.text.clone())));
        loop {
            let (batch, end) = next_batch(&self.encoder, &mut lines);
            if !batch.is_empty() {
                self.embeddings.extend(self.encoder.embed(self.ctx, &batch, &mut self.buffers)?);
            }
            if let Some(end) = end {
                return end.context("sentences");
            }
        }
    }

    fn output(&self) -> &[f32] {
        &self.embeddings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_long_as_sentences() {
        let lines = lines(1024);
        assert_eq!(lines, super::lines(1024));
        let mut lengths: Vec<usize> = lines.iter().map(|line| line.split(' ').count()).collect();
        lengths.sort_unstable();
        let mean = lengths.iter().sum::<usize>() as f64 / 1024.0;
        assert!((14.0..16.0).contains(&mean), "{mean}");
        assert!((11..=16).contains(&lengths[512]), "{}", lengths[512]);
        assert!(lengths[0] >= SHORTEST && lengths[1023] > 40, "{} {}", lengths[0], lengths[1023]);
    }
}
