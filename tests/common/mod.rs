//! What the tests share: instruction sets by name, deterministic inputs, guarded buffers, sizes with reasons, comparisons.

#![allow(dead_code, reason = "every test binary uses its own part of this")]
#![allow(missing_docs, reason = "for the tests beside it only")]
#![allow(unused_macros, unused_imports, reason = "every test binary uses its own part of this")]

pub mod buffer;
pub mod compare;
pub mod data;
pub mod executors;
pub mod model;
pub mod sizes;

use laneformer::{Context, Isa, Serial};

/// One test per instruction set: `fn edge_sizes(isa) { .. }` becomes `edge_sizes::scalar`, `edge_sizes::avx512` and so on.
///
/// One that the CPU lacks is skipped with a line on standard error, or fails if `REQUIRE_ISA` names it.
macro_rules! on_every_isa {
    ($($(#[$meta:meta])* fn $name:ident($isa:ident) $body:block)*) => { $(
        mod $name {
            use super::*;
            fn test_on($isa: laneformer::Isa) $body
            $(#[$meta])* #[test] fn scalar() { $crate::common::on_isa("scalar", test_on) }
            $(#[$meta])* #[test] fn portable() { $crate::common::on_isa("portable", test_on) }
            $(#[$meta])* #[test] fn avx2() { $crate::common::on_isa("avx2", test_on) }
            $(#[$meta])* #[test] fn avx512() { $crate::common::on_isa("avx512", test_on) }
        }
    )* };
}
pub(crate) use on_every_isa;

/// Runs `test` on the instruction set of this name, see [`on_every_isa`].
pub fn on_isa(name: &str, test: fn(Isa)) {
    let required = std::env::var("REQUIRE_ISA").unwrap_or_default();
    match name.parse::<Isa>() {
        Ok(isa) => test(isa),
        Err(error) if required.split(',').any(|r| r.trim() == name) => panic!("REQUIRE_ISA: {error}"),
        Err(error) => eprintln!("skipped: {error}"),
    }
}

/// The instruction sets of this CPU inside the promise of equal bits.
pub fn bit_keeping() -> Vec<Isa> {
    Isa::available().into_iter().filter(|isa| isa.keeps_bits()).collect()
}

/// `isa` on the calling thread.
pub fn serial(isa: Isa) -> Context<'static> {
    Context::new(isa, &Serial)
}
