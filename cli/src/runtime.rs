//! `--threads` and `--isa`, and the [`Context`] that they ask for.

use std::num::NonZeroUsize;

use anyhow::{Context as _, ensure};
use laneformer::{Context, Executor, Isa, Serial};

/// More than machines have CPUs: thousands that wait for one another would take minutes.
const MAX_THREADS: usize = 1024;

/// What a command runs on.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct RuntimeArgs {
    /// Number of threads [default: all that the system gives this process]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Instruction set: scalar, portable, avx2 or avx512 [default: the widest of this CPU]
    #[arg(long, value_name = "NAME")]
    pub isa: Option<Isa>,
}

impl RuntimeArgs {
    /// The threads, started, and the instruction set.
    pub fn build(self) -> anyhow::Result<Runtime> {
        let threads = match self.threads {
            Some(n) => n.get(),
            None => std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        };
        Runtime::new(self.isa.unwrap_or_else(Isa::best), threads)
    }
}

/// An instruction set and a pool of threads; one thread needs no pool.
pub struct Runtime {
    isa: Isa,
    pool: Option<rayon::ThreadPool>,
}

impl Runtime {
    /// `threads` counts the calling thread too.
    pub fn new(isa: Isa, threads: usize) -> anyhow::Result<Runtime> {
        ensure!(threads <= MAX_THREADS, "--threads: expected at most {MAX_THREADS}, got {threads}");
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
