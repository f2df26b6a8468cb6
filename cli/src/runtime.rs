//! `--threads` and `--isa`, and the [`Context`] that they ask for.

use std::num::NonZeroUsize;

use anyhow::{Context as _, ensure};
use laneformer::{Context, Executor, Isa, Serial};

/// Thousands of threads that wait for one another would take minutes.
const MAX_THREADS: usize = 1024;

/// What a command runs on.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct RuntimeArgs {
    /// Number of threads [default: all that the system gives this process]
    #[arg(long, value_name = "N", value_parser = thread_count)]
    pub threads: Option<NonZeroUsize>,
    /// Instruction set: scalar, portable, avx2 or avx512 [default: the widest of this CPU]
    #[arg(long, value_name = "NAME")]
    pub isa: Option<Isa>,
}

impl RuntimeArgs {
    /// The threads, started, and the instruction set.
    pub fn build(self) -> anyhow::Result<Runtime> {
        let threads = self.threads.map_or_else(all_threads, NonZeroUsize::get);
        Runtime::new(self.isa.unwrap_or_else(Isa::best), threads)
    }
}

/// What the system gives this process.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_THREADS)
}

/// An argument of `--threads`.
pub fn thread_count(text: &str) -> anyhow::Result<NonZeroUsize> {
    let n: NonZeroUsize = text.parse()?;
    ensure!(n.get() <= MAX_THREADS, "expected at most {MAX_THREADS}");
    Ok(n)
}

/// An instruction set and a pool of threads; one thread needs no pool.
pub struct Runtime {
    isa: Isa,
    pool: Option<rayon::ThreadPool>,
}

impl Runtime {
    /// `threads` counts the calling thread too.
    pub fn new(isa: Isa, threads: usize) -> anyhow::Result<Runtime> {
        let pool = if threads > 1 {
            let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
            Some(builder.build().with_context(|| format!("cannot start {threads} threads"))?)
        } else {
            None
        };
        Ok(Runtime { isa, pool })
    }

    /// The context that library calls take.
    pub fn context(&self) -> Context<'_> {
        let executor: &dyn Executor = match &self.pool {
            Some(pool) => pool,
            None => &Serial,
        };
        Context::new(self.isa, executor)
    }
}
