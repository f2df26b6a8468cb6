//! Golden cases: inputs, weights and float64 outputs of an independent implementation, run through the models.
//!
//! A case is a directory with `case.json`, `weights.safetensors` and `io.safetensors` (tensors `in.*` and `out.*`); `tests/golden` has some, and a
//! generator of more.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use laneformer::Context;
//!
//! for verdict in laneformer_verify::verify(Context::serial(), Path::new("tests/golden/bert-right-pad"))? {
//!     println!("{}: {:?}, limit {:e}", verdict.output, verdict.outcome, verdict.limit);
//! }
//! # Ok::<(), laneformer_verify::Error>(())
//! ```

#![forbid(unsafe_code)]

mod attention;
mod bart;
mod case;
mod clip;
mod compare;
mod detr;
mod fusion;
mod gpt;
mod graph;
mod lavit;
mod longformer;
mod op;
mod systems;
mod transformer_xl;
mod videobert;
mod xlnet;

use std::path::{Path, PathBuf};

use laneformer::Context;

pub use case::Case;
pub use compare::{Outcome, Verdict};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a case cannot be read, or an output not be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the variants and their fields are")]
pub enum Error {
    /// The case contradicts itself.
    #[error("{}: {message}", path.display())]
    Case { path: PathBuf, message: String },
    /// A part of the format that this version does not have.
    #[error("not built yet: {0}")]
    NotBuilt(String),
    /// The file, or the model of the case.
    #[error(transparent)]
    Model(#[from] laneformer_models::Error),
    /// The library refused a call.
    #[error(transparent)]
    Kernel(#[from] laneformer::Error),
}

/// Runs the case in `dir` and compares every output. What keeps a case or one of its outputs from being computed is
/// an outcome of that output.
///
/// # Errors
/// Only if the case itself cannot be read.
pub fn verify(ctx: Context<'_>, dir: &Path) -> Result<Vec<Verdict>> {
    let case = Case::open(dir)?;
    if case.outputs().next().is_none() {
        return Err(case.error("outputs: expected at least one".into()));
    }
    let computed = run(ctx, &case);
    case.outputs()
        .map(|(name, spec)| match &computed {
            Err(error) => Ok(Verdict::without_result(&case, name, spec, error.to_string())),
            Ok(outputs) => match outputs.get(name) {
                Some(values) => compare::compare(&case, name, spec, values),
                None => {
                    let error = Error::NotBuilt(format!("output {name} of system {}", case.system()));
                    Ok(Verdict::without_result(&case, name, spec, error.to_string()))
                }
            },
        })
        .collect()
}

fn run(ctx: Context<'_>, case: &Case) -> Result<case::Outputs> {
    match case.system() {
        "bert" => systems::bert(ctx, case),
        "transformer-xl" => transformer_xl::transformer_xl(ctx, case),
        "vanilla" => systems::vanilla(ctx, case),
        "norms" => systems::norms(ctx, case),
        "graph" => graph::graph(ctx, case),
        "fusion" => fusion::fusion(ctx, case),
        "bart" => bart::bart(ctx, case),
        "gpt1" => gpt::gpt(ctx, case, "openai-gpt"),
        "gpt2" => gpt::gpt(ctx, case, "gpt2"),
        "clip" => clip::clip(ctx, case),
        "videobert" => videobert::videobert(ctx, case),
        "lavit" => lavit::lavit(ctx, case),
        "longformer" => longformer::longformer(ctx, case),
        "detr" => detr::detr(ctx, case),
        "op" => op::run(ctx, case),
        "xlnet" => xlnet::xlnet(ctx, case),
        other => Err(Error::NotBuilt(format!("system {other}"))),
    }
}
