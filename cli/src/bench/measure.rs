//! Timing: rounds of runs, with bursts of the roofs between them.

use std::time::{Duration, Instant};

use anyhow::Result;
use laneformer::Context;

use crate::bench::data::Buffer;
use crate::bench::roof::Roof;

/// Something that can be run again and again.
pub trait Workload {
    /// Compares sampled rows of a fresh result with the f64 reference.
    fn check(&mut self, ctx: Context<'_>) -> Result<Deviation>;

    /// Puts the operands back as they were. Not timed.
    fn reset(&mut self) {}

    /// Runs after which the operands must be put back; `None` if a run leaves them as they are.
    fn runs_per_reset(&self) -> Option<usize> {
        None
    }

    /// What is timed.
    fn run(&mut self, ctx: Context<'_>) -> Result<()>;
}

/// How far a result is from the reference.
#[derive(Clone, Copy, Debug)]
pub struct Deviation {
    /// Largest absolute error; infinite where one of both is no number.
    pub max_err: f64,
    /// The largest that is right.
    pub limit: f64,
}

impl Deviation {
    /// Whether the result is close enough.
    pub fn is_right(self) -> bool {
        self.max_err <= self.limit
    }
}

/// Timed runs and the roofs between them.
pub struct Timing {
    pub median: Duration,
    pub min: Duration,
    /// GFLOP/s, the best burst.
    pub peak_gflops: f64,
    /// GB/s, the best burst.
    pub peak_gbps: f64,
}

/// Time in timed runs that a row gets.
const TIMED: Duration = Duration::from_millis(800);
/// Rounds at least: a core that is taken away for a moment must not spoil the roofs or the median.
const ROUNDS: usize = 4;
/// Timed runs of a round last as long, and are as many.
const ROUND: Duration = Duration::from_millis(60);
const ROUND_RUNS: usize = 3;
/// Rows that take longer, on a slow instruction set, end with the runs that they have.
const LIMIT: Duration = Duration::from_secs(5);

/// A workload and how often it was timed.
struct Turn<'a> {
    workload: &'a mut dyn Workload,
    /// As large as its operands, to be read over and over as they are.
    buffer: Buffer,
    runs: Vec<Duration>,
    peak_gflops: f64,
    peak_gbps: f64,
}

/// Times workloads and the bytes of their operands, a round of each in turn: what slows the machine for a while slows all of them.
pub fn time(workloads: Vec<(&mut dyn Workload, usize)>, ctx: Context<'_>) -> Result<Vec<Timing>> {
    let roof = Roof { isa: ctx.isa(), threads: ctx.members() };
    let mut turns: Vec<Turn<'_>> = workloads
        .into_iter()
        .map(|(workload, bytes)| {
            let buffer = Buffer::filled(bytes / size_of::<f32>(), 1.0);
            Turn { workload, buffer, runs: vec![], peak_gflops: 0.0, peak_gbps: 0.0 }
        })
        .collect();
    let end = Instant::now() + LIMIT * turns.len() as u32;
    let mut rounds = 0;
    while (rounds < ROUNDS || turns.iter().any(|turn| turn.timed() < TIMED)) && Instant::now() < end {
        for turn in &mut turns {
            turn.peak_gflops = turn.peak_gflops.max(roof.fma());
            turn.peak_gbps = turn.peak_gbps.max(roof.read(&turn.buffer));
            round(turn.workload, ctx, end, &mut turn.runs)?;
        }
        rounds += 1;
    }
    Ok(turns.into_iter().map(Turn::timing).collect())
}

impl Turn<'_> {
    fn timed(&self) -> Duration {
        self.runs.iter().sum()
    }

    fn timing(mut self) -> Timing {
        let (median, min) = median_and_min(&mut self.runs);
        Timing { median, min, peak_gflops: self.peak_gflops, peak_gbps: self.peak_gbps }
    }
}

/// One run that warms the caches again, then the timed ones.
fn round(
    workload: &mut dyn Workload,
    ctx: Context<'_>,
    end: Instant,
    runs: &mut Vec<Duration>,
) -> Result<()> {
    workload.reset();
    workload.run(ctx)?;
    let (mut timed, mut since_reset) = (Duration::ZERO, 1);
    for n in 0.. {
        if (n >= ROUND_RUNS && timed >= ROUND) || (n > 0 && Instant::now() >= end) {
            break;
        }
        if workload.runs_per_reset().is_some_and(|most| since_reset >= most) {
            workload.reset();
            since_reset = 0;
            if workload.runs_per_reset() > Some(1) {
                // Cheap operations in place: what was written by another thread comes back to the cores that work on it.
                workload.run(ctx)?;
                since_reset = 1;
            }
        }
        let start = Instant::now();
        workload.run(ctx)?;
        let run = start.elapsed();
        runs.push(run);
        timed += run;
        since_reset += 1;
    }
    Ok(())
}

fn median_and_min(runs: &mut [Duration]) -> (Duration, Duration) {
    runs.sort_unstable();
    let middle = runs.len() / 2;
    let median =
        if runs.len().is_multiple_of(2) { (runs[middle - 1] + runs[middle]) / 2 } else { runs[middle] };
    (median, runs[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let ms = Duration::from_millis;
        assert_eq!(median_and_min(&mut [ms(5)]), (ms(5), ms(5)));
        assert_eq!(median_and_min(&mut [ms(5), ms(1), ms(2)]), (ms(2), ms(1)));
        assert_eq!(median_and_min(&mut [ms(9), ms(1), ms(2), ms(4)]), (ms(3), ms(1)));
    }
}
