//! `laneformer generate`: text from a prompt, printed as it comes.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use laneformer_text::generate::{Generator, Sampler};

use crate::note;
use crate::runtime::RuntimeArgs;

const NOTES: &str = "\
Only what is new is printed: what follows the prompt of a GPT or GPT-2, or what BART's decoder writes about it. The text ends \
at the model's end token, after --max-tokens, or where the model has no more positions. generation_config.json, or else \
config.json, names the tokens to begin and end with; a forced_bos_token_id comes first, as `generate` of Hugging Face has \
it. Nothing else of these files is used: no beams, penalties or lengths.";

/// Arguments of `generate`.
#[derive(clap::Args)]
#[command(after_help = NOTES)]
pub struct GenerateArgs {
    /// Directory with config.json, model.safetensors and tokenizer.json of a GPT-2 or BART
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The text to start from
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// The largest number of new tokens
    #[arg(long, value_name = "N", default_value = "128")]
    max_tokens: NonZeroUsize,
    /// Draw from the K most probable tokens instead of taking the first
    #[arg(long, value_name = "K")]
    top_k: Option<NonZeroUsize>,
    /// For --top-k: a seed draws the same text on every machine (not with the portable instruction set)
    #[arg(long, value_name = "S", default_value_t = 0, requires = "top_k")]
    seed: u64,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// Generates and prints; the rates follow on standard error.
pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let runtime = args.runtime.build()?;
    let generator = Generator::open(&args.model)?;
    let prompt = generator.prompt(&args.prompt).context("--prompt")?;
    let mut sampler = args.top_k.map_or_else(Sampler::greedy, |k| Sampler::top_k(k, args.seed));
    let (mut decoder, mut out) = (generator.decoder(), io::stdout().lock());

    let start = Instant::now();
    let mut generation = generator.begin(runtime.context(), &prompt, args.max_tokens.get())?;
    let mut next = generation.next(runtime.context(), &mut sampler)?;
    let (prefill, start) = (start.elapsed().as_secs_f64(), Instant::now());
    let mut tokens = 0;
    while let Some(id) = next {
        tokens += 1;
        if let Some(text) = decoder(id)? {
            write!(out, "{text}").and_then(|()| out.flush()).context("standard output")?;
        }
        next = generation.next(runtime.context(), &mut sampler)?;
    }
    let decode = start.elapsed().as_secs_f64();
    writeln!(out).context("standard output")?;

    if generation.is_full() {
        note(format_args!("note: the model has no more than {} positions", generator.positions()));
    }
    report("prefill", prompt.len(), prefill);
    // The first came with the prompt.
    report("decode", tokens - tokens.min(1), decode);
    Ok(())
}

fn report(what: &str, tokens: usize, seconds: f64) {
    note(format_args!("{what}: {tokens} tokens in {seconds:.2} s: {:.1} tokens/s", tokens as f64 / seconds));
}
