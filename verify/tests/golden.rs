//! The golden cases on every instruction set, with one thread and with two.

mod common;

use std::path::Path;

use common::{golden, on_every_isa};
use laneformer::{Context, Executor, Isa, Serial};
use laneformer_verify::{Verdict, verify};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let arguments = Arguments::from_args();
    libtest_mimic::run(&arguments, trials()).exit();
}

fn trials() -> Vec<Trial> {
    let mut cases: Vec<_> = std::fs::read_dir(golden(""))
        .expect("the golden cases are there")
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.join("case.json").exists())
        .collect();
    cases.sort();
    assert!(!cases.is_empty());
    let trials_of = |case: std::path::PathBuf| {
        let name = case.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        on_every_isa(&name, move |isa| run(isa, &case))
    };
    cases.into_iter().flat_map(trials_of).collect()
}

fn run(isa: Isa, case: &Path) -> Result<(), Failed> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    let executors: [&dyn Executor; 2] = [&Serial, &pool];
    for executor in executors {
        let verdicts = verify(Context::new(isa, executor), case)?;
        if verdicts.is_empty() {
            return Err("no output".into());
        }
        verdicts.iter().try_for_each(check)?;
    }
    Ok(())
}

fn check(verdict: &Verdict) -> Result<(), Failed> {
    if verdict.passed() {
        return Ok(());
    }
    Err(format!("{verdict:?}").into())
}
