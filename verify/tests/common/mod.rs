//! What the tests of golden cases and of MiniLM share.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::path::PathBuf;

use laneformer::Isa;
use libtest_mimic::{Failed, Trial};

/// A file or directory of the golden cases.
pub fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(name)
}

/// One trial per instruction set, its name in front. One that this machine lacks is shown as ignored, or fails if
/// `REQUIRE_ISA` (names with commas between them) has it.
pub fn on_every_isa(
    name: &str,
    test: impl Fn(Isa) -> Result<(), Failed> + Clone + Send + 'static,
) -> Vec<Trial> {
    let trial = |isa: &'static str| {
        let test = test.clone();
        let parsed = isa.parse::<Isa>();
        let skipped = parsed.is_err() && !is_required(isa);
        Trial::test(format!("{isa}::{name}"), move || test(parsed?)).with_ignored_flag(skipped)
    };
    Isa::NAMES.into_iter().map(trial).collect()
}

fn is_required(isa: &str) -> bool {
    std::env::var("REQUIRE_ISA").is_ok_and(|required| required.split(',').any(|name| name.trim() == isa))
}
