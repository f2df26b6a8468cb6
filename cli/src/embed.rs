//! `laneformer embed`: sentences to embeddings, in order, as they come.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use laneformer::Context;
use laneformer_text::sentence::{Buffers, SentenceEncoder, Tokens};

use crate::input::Lines;
use crate::note;
use crate::output::Sink;
use crate::runtime::RuntimeArgs;

/// A batch is closed when it has as many tokens: enough rows to read the weights for many sentences at once, and few
/// enough for results to come soon.
const BATCH_TOKENS: usize = 1024;

/// Arguments of `embed`.
#[derive(clap::Args)]
pub struct EmbedArgs {
    /// Directory with config.json, model.safetensors and tokenizer.json of a BERT, Longformer or CLIP
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Sentences, one per line [default: standard input]
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// A safetensors file for the embeddings [default: JSON lines on standard output]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// Embeds every line. After a bad line the embeddings of the lines before it, if there are any, are still written.
pub fn run(args: EmbedArgs) -> anyhow::Result<()> {
    let runtime = args.runtime.build()?;
    let model = SentenceEncoder::open(&args.model)?;
    let mut lines = Lines::open(args.input.as_deref())?;
    if let Some(output) = &args.output {
        let is_read = is_read(output, &args.model, args.input.as_deref());
        ensure!(!is_read, "cannot write {}: it is read", output.display());
    }
    let mut sink = Sink::open(args.output.as_deref(), model.dim())?;
    let progress = progress_bar(lines.total_bytes);
    let (mut totals, mut buffers) = (Totals::default(), Buffers::default());
    let start = Instant::now();
    let end = loop {
        let first = lines.count + 1;
        let (batch, end) = next_batch(&model, &mut lines);
        let (embeddings, failed) = embed(&model, runtime.context(), &batch, &mut buffers);
        let done = embeddings.len() / model.dim().max(1);
        if done > 0 {
            progress.suspend(|| sink.write(&embeddings, model.dim()))?;
            totals.add(&batch[..done]);
            progress.set_position(if lines.total_bytes.is_some() { lines.bytes } else { lines.count as u64 });
        }
        if let Some(error) = failed {
            break Err(anyhow::Error::from(error).context(lines.place_of(first + done)));
        }
        if let Some(end) = end {
            break end;
        }
    };
    // Nothing at all is not worth the file that may be there.
    if end.is_ok() || totals.sentences > 0 {
        sink.finish()?;
    }
    progress.finish_and_clear();
    totals.report(&model, start.elapsed().as_secs_f64());
    end
}

/// The embeddings of a batch up to the first sentence that has none, and why it has none.
fn embed(
    model: &SentenceEncoder,
    ctx: Context<'_>,
    batch: &[Tokens],
    buffers: &mut Buffers,
) -> (Vec<f32>, Option<laneformer_text::Error>) {
    if batch.is_empty() {
        return (vec![], None);
    }
    if let Ok(embeddings) = model.embed(ctx, batch, buffers) {
        return (embeddings, None);
    }
    // One by one they are the same, and one of them fails.
    let mut embeddings = vec![];
    for sentence in batch.chunks(1) {
        match model.embed(ctx, sentence, buffers) {
            Ok(embedding) => embeddings.extend(embedding),
            Err(error) => return (embeddings, Some(error)),
        }
    }
    (embeddings, None)
}

/// Whether a file is the input, or one of the model's.
fn is_read(output: &Path, model: &Path, input: Option<&Path>) -> bool {
    let Ok(output) = fs::canonicalize(output) else { return false };
    let is = |path: &Path| fs::canonicalize(path).is_ok_and(|path| path == output);
    let is_config = output.extension().is_some_and(|extension| extension == "json");
    input.is_some_and(is)
        || is(&model.join("model.safetensors"))
        || is_config && fs::canonicalize(model).is_ok_and(|model| output.starts_with(model))
}

/// The next sentences, and how the input ended if it did. A batch is filled from what has been read already: a slow
/// source gets its answers without waiting for more lines.
pub fn next_batch(model: &SentenceEncoder, lines: &mut Lines) -> (Vec<Tokens>, Option<anyhow::Result<()>>) {
    let (mut batch, mut tokens) = (vec![], 0);
    while tokens < BATCH_TOKENS && (batch.is_empty() || lines.is_ready()) {
        match next_sentence(model, lines) {
            Ok(Some(sentence)) => {
                tokens += sentence.len();
                batch.push(sentence);
            }
            Ok(None) => return (batch, Some(Ok(()))),
            Err(error) => return (batch, Some(Err(error))),
        }
    }
    (batch, None)
}

fn next_sentence(model: &SentenceEncoder, lines: &mut Lines) -> anyhow::Result<Option<Tokens>> {
    let Some(line) = lines.next()? else { return Ok(None) };
    model.tokenize(&line).map(Some).with_context(|| lines.place())
}

/// Hidden unless standard error is a terminal. A file is measured in bytes, a stream only counted in lines.
fn progress_bar(total_bytes: Option<u64>) -> ProgressBar {
    let (bar, style) = match total_bytes {
        Some(total) => (ProgressBar::new(total), "{bar:40} {percent}% {bytes_per_sec} {eta}"),
        None => (ProgressBar::no_length(), "{spinner} {pos} sentences {per_sec}"),
    };
    let hidden = !std::io::stderr().is_terminal();
    bar.set_draw_target(if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() });
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[derive(Default)]
struct Totals {
    sentences: usize,
    tokens: usize,
    truncated: usize,
}

impl Totals {
    fn add(&mut self, batch: &[Tokens]) {
        self.sentences += batch.len();
        self.tokens += batch.iter().map(Tokens::len).sum::<usize>();
        self.truncated += batch.iter().filter(|sentence| sentence.truncated).count();
    }

    fn report(&self, model: &SentenceEncoder, seconds: f64) {
        let Totals { sentences, tokens, truncated } = *self;
        if let (1.., Some(max)) = (truncated, model.max_seq_length()) {
            note(format_args!("note: {truncated} of {sentences} sentences truncated at {max} tokens"));
        }
        let (sentences_rate, tokens_rate) = (sentences as f64 / seconds, tokens as f64 / seconds);
        note(format_args!(
            "{sentences} sentences, {tokens} tokens in {seconds:.2} s: {sentences_rate:.0} sentences/s, {tokens_rate:.0} tokens/s"
        ));
    }
}
