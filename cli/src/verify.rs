//! `laneformer verify`: golden cases through the models, one line per output.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use laneformer_verify::{Outcome, Verdict, verify};
use walkdir::WalkDir;

use crate::note;
use crate::runtime::RuntimeArgs;

/// Where the lines go, for messages.
const OUT: &str = "standard output";

/// Arguments of `verify`.
#[derive(clap::Args)]
pub struct VerifyArgs {
    /// Cases, or directories to be walked for cases
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// Runs the cases; failure if any output fails or there was no case.
pub fn run(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let cases = find_cases(&args.dirs)?;
    let runtime = args.runtime.build()?;
    let mut out = io::stdout().lock();
    let (mut passed, mut failed) = (0, 0);
    for case in &cases {
        let verdicts = match verify(runtime.context(), case) {
            Ok(verdicts) => verdicts,
            Err(error) => {
                failed += 1;
                writeln!(out, "FAIL  {}  -  {error}", name(case)).context(OUT)?;
                continue;
            }
        };
        for verdict in verdicts {
            *if verdict.passed() { &mut passed } else { &mut failed } += 1;
            print(&mut out, &verdict).context(OUT)?;
        }
    }
    if cases.is_empty() {
        note("laneformer: no case.json found");
    }
    writeln!(out, "{passed} passed, {failed} failed").context(OUT)?;
    Ok(if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(out: &mut impl Write, verdict: &Verdict) -> io::Result<()> {
    let Verdict { case, output, limit, outcome } = verdict;
    let word = if verdict.passed() { "PASS" } else { "FAIL" };
    match outcome {
        Outcome::Computed { max_abs_error } => {
            writeln!(out, "{word}  {case}  {output}  {max_abs_error:.3e}  limit {limit:.3e}")
        }
        Outcome::Missing(why) => writeln!(out, "{word}  {case}  {output}  -  limit {limit:.3e}  {why}"),
    }
}

/// Every directory with a `case.json`, in the order of their names.
fn find_cases(dirs: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut cases = vec![];
    for dir in dirs {
        for entry in WalkDir::new(dir).follow_links(true).sort_by_file_name() {
            // The error names the path, and its source says the same again.
            let entry = entry.map_err(|error| anyhow!("cannot walk {}: {error}", dir.display()))?;
            if entry.file_name() == "case.json" {
                cases.extend(entry.path().parent().map(Path::to_path_buf));
            }
        }
    }
    Ok(cases)
}

fn name(case: &Path) -> String {
    case.file_name().unwrap_or(case.as_os_str()).to_string_lossy().into_owned()
}
