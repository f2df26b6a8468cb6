//! `laneformer classify`: which of some labels fits an image best, by CLIP.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use laneformer::Context;
use laneformer_models::clip::Clip;
use laneformer_models::config::{self, model_type};
use laneformer_models::{Error, Scratch};
use laneformer_text::tokens::{Packed, TextTokenizer};
use serde::Serialize;

use crate::input;
use crate::pixels::Preprocessor;
use crate::runtime::RuntimeArgs;

/// Arguments of `classify`.
#[derive(clap::Args)]
pub struct ClassifyArgs {
    /// Directory with config.json, model.safetensors, tokenizer.json and preprocessor_config.json of a CLIP
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Images: PNG, JPEG or WebP
    #[arg(long = "image", value_name = "FILE", required = true, num_args = 1..)]
    images: Vec<PathBuf>,
    /// What may be on them, with commas between
    #[arg(long, value_name = "LABEL", required = true, value_delimiter = ',')]
    labels: Vec<String>,
    /// The text that describes a label, which stands for {}; "{}" is the label alone
    #[arg(long, value_name = "TEXT", default_value = "This is a photo of {}.")]
    template: String,
    /// JSON lines instead of tables
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// A line of `--json`.
#[derive(Serialize)]
struct Record<'a> {
    image: String,
    scores: Vec<Score<'a>>,
}

#[derive(Serialize)]
struct Score<'a> {
    label: &'a str,
    score: f32,
}

/// Prints the probabilities of the labels for every image, the largest first. Before a bad image stand the results of
/// those before it.
pub fn run(args: ClassifyArgs) -> anyhow::Result<()> {
    let runtime = args.runtime.build()?;
    let ctx = runtime.context();
    let labels: Vec<_> = args.labels.iter().map(|label| label.trim()).collect();
    ensure!(labels.iter().all(|label| !label.is_empty()), "--labels: a label is empty");
    ensure!(args.template.contains("{}"), "--template: no {{}} for the label in {:?}", args.template);
    for image in &args.images {
        // Better now than behind the results of others.
        input::open(image)?;
    }
    let model = open(&args.model)?;
    let preprocessor = Preprocessor::open(&args.model, model.config.vision_config.image_size)?;
    let texts = labels.iter().map(|label| args.template.replace("{}", label));
    let texts = embed_texts(ctx, &model, &TextTokenizer::open(&args.model)?, texts)?;

    let (mut scratch, mut out) = (Scratch::default(), io::stdout().lock());
    for image in &args.images {
        let pixels = preprocessor.load(image)?;
        let states = model.image_states(&mut scratch.with(ctx), &pixels)?;
        let logits = model.logits_per_image(ctx, &model.embed_images(ctx, &states)?, &texts)?;
        let probabilities = model.probabilities(ctx, logits, labels.len())?;
        let mut scores: Vec<_> =
            labels.iter().zip(probabilities).map(|(label, score)| Score { label, score }).collect();
        scores.sort_by(|a, b| b.score.total_cmp(&a.score));
        let record = Record { image: image.display().to_string(), scores };
        let text = if args.json { serde_json::to_string(&record)? } else { table(&record).to_string() };
        writeln!(out, "{text}").context("standard output")?;
    }
    Ok(())
}

fn open(dir: &Path) -> anyhow::Result<Clip> {
    match model_type(dir)? {
        Some(model_type) if model_type == "clip" => Ok(config::open(dir, Clip::load)?),
        other => {
            let (path, actual) = (dir.join("config.json"), other.unwrap_or("none".into()));
            Err(Error::Config { path, field: "model_type", expected: "\"clip\"".into(), actual }.into())
        }
    }
}

fn embed_texts(
    ctx: Context<'_>,
    model: &Clip,
    tokenizer: &TextTokenizer,
    texts: impl Iterator<Item = String>,
) -> anyhow::Result<Vec<f32>> {
    let positions = model.text.config.max_position_embeddings;
    let tokens = |text: &str| {
        let tokens = tokenizer.encode(text)?.within(positions)?;
        model.text.decoder.embeddings.check(&tokens.ids, &tokens.type_ids)?;
        anyhow::ensure!(!tokens.is_empty(), laneformer_text::Error::NoTokens);
        Ok(tokens)
    };
    let tokens = |text: String| tokens(&text).with_context(|| format!("{text:?}"));
    let mut packed = Packed::default();
    packed.set(&texts.map(tokens).collect::<anyhow::Result<Vec<_>>>()?);
    let states = model.text.states(&mut Scratch::default().with(ctx), packed.batch())?;
    Ok(model.text.embed(ctx, packed.batch(), &states)?)
}

fn table(record: &Record<'_>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([record.image.as_str(), "probability"]);
    for Score { label, score } in &record.scores {
        table.add_row([label.to_string(), format!("{score:.4}")]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
