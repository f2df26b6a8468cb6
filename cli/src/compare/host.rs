//! The machine, as the report names it.

use std::process::Command;

use anyhow::{Context as _, Result};
use laneformer::Isa;

/// Where and when the figures were measured.
pub struct Host {
    pub date: String,
    pub cpu: String,
    pub cores: usize,
    pub memory_gib: Option<u64>,
    pub kernel: String,
    pub rustc: String,
    pub isa: &'static str,
}

impl Host {
    pub fn detect() -> Result<Host> {
        Ok(Host {
            date: output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])?,
            cpu: cpu(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_gib: memory_gib(),
            // What follows the numbers is the packager's.
            kernel: output("uname", &["-sr"])?.split('-').next().unwrap_or_default().to_owned(),
            rustc: output("rustc", &["--version"]).unwrap_or_else(|_| "unknown".to_owned()),
            isa: Isa::best().name(),
        })
    }
}

/// What a command prints.
pub fn output(command: &str, args: &[&str]) -> Result<String> {
    let output =
        Command::new(command).args(args).output().with_context(|| format!("cannot run {command}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The brand is often masked in a virtual machine; family and model tell the microarchitecture.
#[cfg(target_arch = "x86_64")]
fn cpu() -> String {
    let cpuid = raw_cpuid::CpuId::new();
    let brand = cpuid.get_processor_brand_string();
    let brand = brand.map_or_else(|| "unknown".to_owned(), |brand| brand.as_str().trim().to_owned());
    match cpuid.get_feature_info() {
        Some(info) => format!("{brand} (family {}, model {})", info.family_id(), info.model_id()),
        None => brand,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu() -> String {
    std::env::consts::ARCH.to_owned()
}

fn memory_gib() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 =
        info.lines().find(|l| l.starts_with("MemTotal:"))?.split_whitespace().nth(1)?.parse().ok()?;
    Some((kib + (1 << 19)) >> 20)
}
