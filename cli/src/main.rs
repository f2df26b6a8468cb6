//! `laneformer`: sentence embeddings, text, image classes, verification against golden cases, benchmarks, pictures of graphs.

mod bench;
mod classify;
mod compare;
mod drawing;
mod embed;
mod generate;
mod graph;
mod info;
mod input;
mod output;
mod pixels;
mod runtime;
mod systems;
mod verify;

use std::fmt::Display;
use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "laneformer", version, about = "Fast, reproducible Transformer layers on CPUs")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the CPU, its features and caches, and measure its peaks
    Info(info::InfoArgs),
    /// Check each operation against the f64 reference, then time it against the measured peak
    Bench(bench::BenchArgs),
    /// Run the same work here and in other libraries, in turns, and write BENCHMARKS.md
    Compare(compare::CompareArgs),
    /// Say which of some labels fits an image best (CLIP)
    Classify(classify::ClassifyArgs),
    /// Draw who sees whom and what attention computes of it
    Graph(graph::GraphArgs),
    /// Turn sentences, one per line, into embeddings (BERT, Longformer, CLIP)
    Embed(embed::EmbedArgs),
    /// Go on with a text (GPT, GPT-2), or write about it (BART)
    Generate(generate::GenerateArgs),
    /// Compare with golden cases computed by reference implementations
    Verify(verify::VerifyArgs),
}

/// Status of bad input or arguments, as clap's own errors have it.
const BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    silence_tokenizer();
    let result = match Cli::parse().command {
        Command::Info(args) => info::run(args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Graph(args) => graph::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Classify(args) => classify::run(args).map(|()| ExitCode::SUCCESS),
        Command::Embed(args) => embed::run(args).map(|()| ExitCode::SUCCESS),
        Command::Generate(args) => generate::run(args).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::run(args),
    };
    result.unwrap_or_else(|error| {
        if is_broken_pipe(&error) {
            return ExitCode::SUCCESS; // The reader has seen enough, as `head` does.
        }
        note(format_args!("laneformer: {}", message(&error)));
        ExitCode::from(BAD_INPUT)
    })
}

/// A line on standard error; if nobody can read it, it is lost, and nothing else.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The whole chain, without causes that the message before them has said already.
fn message(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| match cause.to_string() {
        cause if text.is_empty() => cause,
        cause if text.ends_with(&cause) => text,
        cause => format!("{text}: {cause}"),
    })
}

/// A panic of the tokenizer over a malformed file comes back as an error that names the file: one message is enough.
fn silence_tokenizer() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let is_tokenizer =
            |file: &str| ["tokenizers-", "spm_precompiled-"].iter().any(|name| file.contains(name));
        if !info.location().is_some_and(|place| is_tokenizer(place.file())) {
            print(info);
        }
    }));
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
