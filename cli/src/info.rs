//! `laneformer info`: the machine as the library sees it, and its measured peaks.

use std::io::{self, Write};

use anyhow::Result;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use laneformer::Isa;

use crate::bench::data::Buffer;
use crate::bench::roof::Roof;
use crate::runtime::RuntimeArgs;

/// Arguments of `info`.
#[derive(clap::Args)]
pub struct InfoArgs {
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// Bursts of which the best is shown.
const BURSTS: usize = 16;

/// Prints what there is, then measures.
pub fn run(args: InfoArgs) -> Result<()> {
    let runtime = args.runtime.build()?;
    let (isa, threads) = (runtime.context().isa(), runtime.context().members());
    let machine = Machine::detect();
    let mut out = io::stdout().lock();
    writeln!(out, "laneformer  {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "CPU         {}", machine.cpu)?;
    writeln!(out, "features    {}", features().join(" "))?;
    writeln!(out, "caches      {}", machine.caches())?;
    let available: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    writeln!(out, "ISA         {isa} of {}", available.join(", "))?;
    writeln!(out, "threads     {threads}")?;
    out.flush()?;
    let counts = thread_counts(threads);
    writeln!(out, "\nFMA peak, GFLOP/s\n{}", fma_table(&counts))?;
    writeln!(out, "\nread bandwidth with {isa}, GB/s\n{}", read_table(isa, &machine, &counts))?;
    Ok(())
}

fn fma_table(counts: &[usize]) -> Table {
    let mut table = table("ISA", counts);
    for isa in Isa::available() {
        let best = |&threads: &usize| best(|| Roof { isa, threads }.fma());
        table.add_row([isa.name().into()].into_iter().chain(counts.iter().map(best)));
    }
    table
}

fn read_table(isa: Isa, machine: &Machine, counts: &[usize]) -> Table {
    let mut table = table("level", counts);
    for level in machine.levels() {
        let best = |&threads: &usize| {
            let buffer = Buffer::filled(level.bytes(threads) / size_of::<f32>(), 1.0);
            let rate = best(|| Roof { isa, threads }.read(&buffer));
            format!("{rate} ({})", size(level.bytes(threads)))
        };
        table.add_row([level.name.clone()].into_iter().chain(counts.iter().map(best)));
    }
    table
}

fn table(first: &str, counts: &[usize]) -> Table {
    let mut table = Table::new();
    let threads = |n: &usize| format!("{n} thread{}", if *n == 1 { "" } else { "s" });
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([first.into()].into_iter().chain(counts.iter().map(threads)));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn best(burst: impl Fn() -> f64) -> String {
    format!("{:.1}", (0..BURSTS).map(|_| burst()).fold(0.0, f64::max))
}

/// 1, 2, 4, ... and `threads`.
fn thread_counts(threads: usize) -> Vec<usize> {
    let mut counts: Vec<usize> =
        std::iter::successors(Some(1_usize), |n| n.checked_mul(2)).take_while(|n| *n < threads).collect();
    counts.push(threads);
    counts
}

/// What the CPU says about itself.
struct Machine {
    cpu: String,
    caches: Vec<Cache>,
}

struct Cache {
    level: u8,
    bytes: usize,
    /// Threads of the machine that share it.
    shared: usize,
}

/// A level of the memory and the buffer that it is measured with.
struct Level {
    name: String,
    /// For each group of threads that share it.
    bytes: usize,
    shared: usize,
}

impl Level {
    fn bytes(&self, threads: usize) -> usize {
        self.bytes * threads.div_ceil(self.shared)
    }
}

impl Machine {
    #[cfg(target_arch = "x86_64")]
    fn detect() -> Machine {
        use raw_cpuid::{CacheType, CpuId};
        let cpuid = CpuId::new();
        let cpu = cpuid.get_processor_brand_string();
        let cpu = cpu.map_or_else(|| "unknown".into(), |brand| brand.as_str().trim().to_owned());
        let caches = cpuid.get_cache_parameters().into_iter().flatten();
        let data = caches.filter(|c| matches!(c.cache_type(), CacheType::Data | CacheType::Unified));
        let caches = data.map(|c| Cache {
            level: c.level(),
            bytes: c.sets() * c.associativity() * c.coherency_line_size() * c.physical_line_partitions(),
            shared: c.max_cores_for_cache().max(1),
        });
        Machine { cpu, caches: caches.collect() }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Machine {
        Machine { cpu: std::env::consts::ARCH.into(), caches: vec![] }
    }

    fn caches(&self) -> String {
        if self.caches.is_empty() {
            return "unknown".into();
        }
        let text = |c: &Cache| {
            let shared = if c.shared > 1 { format!(", shared by {}", c.shared) } else { String::new() };
            format!("L{} {}{shared}", c.level, size(c.bytes))
        };
        self.caches.iter().map(text).collect::<Vec<_>>().join("; ")
    }

    /// Half of each cache, so that it holds the buffer beside what else there is, and far more than the last.
    fn levels(&self) -> Vec<Level> {
        let half = |c: &Cache| Level { name: format!("L{}", c.level), bytes: c.bytes / 2, shared: c.shared };
        let last = self.caches.iter().map(|c| c.bytes).max().unwrap_or(MIN_DRAM / 4);
        let dram =
            Level { name: "DRAM".into(), bytes: (4 * last).clamp(MIN_DRAM, MAX_DRAM), shared: usize::MAX };
        self.caches.iter().map(half).chain([dram]).collect()
    }
}

const MIN_DRAM: usize = 128 << 20;
const MAX_DRAM: usize = 1 << 30;

fn size(bytes: usize) -> String {
    match bytes {
        0x10_0000.. => format!("{} MiB", bytes >> 20),
        _ => format!("{} KiB", bytes >> 10),
    }
}

/// Vector features that the library uses or will.
fn features() -> Vec<&'static str> {
    macro_rules! present {
        ($has:ident: $($name:tt)*) => {
            [$(($name, std::arch::$has!($name))),*].into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
        };
    }
    #[cfg(target_arch = "x86_64")]
    return present!(is_x86_feature_detected: "sse4.2" "avx" "f16c" "avx2" "fma" "avxvnni" "avx512f" "avx512bw" "avx512dq"
        "avx512vl" "avx512vnni" "avx512bf16" "avx512fp16");
    #[cfg(target_arch = "aarch64")]
    return present!(is_aarch64_feature_detected: "neon" "dotprod" "fp16" "bf16" "i8mm" "sve");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    vec![]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_double_and_end_with_all() {
        assert_eq!(thread_counts(1), [1]);
        assert_eq!(thread_counts(2), [1, 2]);
        assert_eq!(thread_counts(6), [1, 2, 4, 6]);
    }

    #[test]
    fn buffers_grow_with_the_groups_of_threads() {
        let cache = Cache { level: 2, bytes: 1 << 20, shared: 2 };
        let levels = Machine { cpu: String::new(), caches: vec![cache] }.levels();
        assert_eq!((levels[0].bytes(1), levels[0].bytes(3)), (512 << 10, 1 << 20));
        assert_eq!((levels[1].bytes(1), levels[1].bytes(64)), (MIN_DRAM, MIN_DRAM));
        assert_eq!((size(512 << 10), size(MIN_DRAM)), ("512 KiB".into(), "128 MiB".into()));
    }
}
