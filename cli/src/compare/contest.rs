//! Interleaved rounds: ours, a peer, ours, the next peer, and again; the medians of the rounds count.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use laneformer::Context;
use serde::Serialize;

use crate::bench::data::Buffer;
use crate::bench::roof::Roof;
use crate::bench::rows::Cost;
use crate::compare::ours;
use crate::compare::peers::{Handover, Worker};
use crate::compare::task::{Task, Tensor};
use crate::systems::Items;

/// An operation in this process.
pub trait Engine {
    /// What is timed: from the input, which stays as it is, to the output.
    fn run(&mut self) -> Result<()>;
    fn output(&self) -> &[f32];
}

/// Makes the engine of a task, or says why there is none.
pub type Maker<'a> = Box<dyn Fn(&Task, &[Tensor]) -> Result<Option<Box<dyn Engine + 'a>>> + 'a>;

/// Somebody who takes part.
pub enum Contestant<'a> {
    /// A library in this process.
    Native { name: String, make: Maker<'a> },
    /// A library in a process of its own.
    Worker(Worker),
    /// A column that says why it is empty.
    Absent { name: String, reason: String },
}

impl Contestant<'_> {
    /// Its column's title.
    pub fn name(&self) -> &str {
        match self {
            Contestant::Native { name, .. } | Contestant::Absent { name, .. } => name,
            Contestant::Worker(worker) => &worker.name,
        }
    }
}

/// Somebody who has prepared for a task.
enum Ready<'a, 'c> {
    Engine(Box<dyn Engine + 'c>),
    Worker(&'a mut Worker),
}

impl Ready<'_, '_> {
    /// The median of a turn's runs.
    fn round(&mut self, turn: Turn) -> Result<f64> {
        let Turn { runs, warm } = turn;
        let mut times = match self {
            Ready::Worker(worker) => worker.round(runs, warm)?,
            Ready::Engine(engine) => {
                if warm {
                    engine.run()?;
                }
                let mut times = Vec::with_capacity(runs);
                for _ in 0..runs {
                    let start = Instant::now();
                    engine.run()?;
                    times.push(start.elapsed().as_nanos() as f64);
                }
                times
            }
        };
        median(&mut times)
    }

    fn result(&mut self, handover: &Handover) -> Result<Vec<f32>> {
        match self {
            Ready::Worker(worker) => worker.result(handover),
            Ready::Engine(engine) => Ok(engine.output().to_vec()),
        }
    }
}

/// What a peer did with a task.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    Timed {
        ns: f64,
        /// Its time by ours: above 1 we are faster.
        ratio: f64,
        /// Largest difference to our result, as part of our largest value.
        difference: f64,
    },
    Absent {
        absent: String,
    },
}

/// A task's line.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub name: String,
    pub threads: usize,
    pub flops: u64,
    pub bytes: usize,
    pub elements: Option<usize>,
    #[serde(flatten)]
    pub items: Option<Items>,
    pub ns: f64,
    /// GFLOP/s of multiply-adds, measured between the rounds.
    pub peak_gflops: f64,
    /// GB/s of reads of as many bytes as the operands have, likewise.
    pub peak_gbps: f64,
    pub peers: Vec<(String, Outcome)>,
}

impl Line {
    /// What it must do at least.
    pub fn cost(&self) -> Cost {
        Cost { flops: self.flops, bytes: self.bytes, elements: self.elements }
    }

    /// GFLOP/s of a time.
    pub fn gflops(&self, ns: f64) -> f64 {
        self.flops as f64 / ns
    }
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    /// Rounds of each peer; there are more of ours.
    pub count: usize,
    /// Time of a round, unless a single run takes longer.
    pub length: Duration,
}

/// Rounds at most of what is long: systems and texts.
pub const ROUNDS_OF_LONG: usize = 3;

impl Rounds {
    fn of(self, task: &Task) -> usize {
        if task.items.is_some() { self.count.min(ROUNDS_OF_LONG) } else { self.count }
    }
}

/// A round has at most so many runs.
const MOST_RUNS: f64 = 400.0;

/// A run that takes longer needs no other to warm the caches.
const LONG: Duration = Duration::from_millis(300);

/// Between two turns: the threads of the one before stop spinning and leave the cores. Those of ONNX Runtime take more than 8 ms.
const SETTLE: Duration = Duration::from_millis(30);

/// Results may differ by this part of the largest value: the order of sums differs, and twelve layers add up. More means that somebody did
/// other work.
const TOLERANCE: f64 = 2e-3;

/// One task by everybody.
pub fn contest(
    ctx: Context<'_>,
    task: &Task,
    contestants: &mut [Contestant<'_>],
    handover: &Handover,
    rounds: Rounds,
) -> Result<Line> {
    let (ours, tensors) = ours::prepare(ctx, task)?;
    let mut ours = Ready::Engine(ours);
    let our_turn = Turn::plan(&mut ours, rounds)?;
    let want = ours.result(handover)?;
    let _files = handover.write(&tensors)?;

    let names: Vec<String> = contestants.iter().map(|c| c.name().to_owned()).collect();
    let mut entries: Vec<Result<Entry<'_, '_>, String>> = contestants
        .iter_mut()
        .map(|contestant| match contestant {
            Contestant::Absent { reason, .. } => Err(reason.clone()),
            Contestant::Native { make, .. } => match make(task, &tensors) {
                Ok(Some(engine)) => Entry::new(Ready::Engine(engine), &want, handover, rounds),
                Ok(None) => Err("-".to_owned()),
                Err(error) => Err(format!("{error:#}")),
            },
            Contestant::Worker(worker) => match worker.setup(task, &tensors, handover) {
                Ok(()) => Entry::new(Ready::Worker(worker), &want, handover, rounds),
                Err(error) => Err(format!("{error:#}")),
            },
        })
        .collect();
    drop(tensors);

    let roof = Roof { isa: ctx.isa(), threads: ctx.members() };
    let operands = Buffer::filled(task.cost.bytes / size_of::<f32>(), 1.0);
    let (mut our_times, mut peak_gflops, mut peak_gbps) = (vec![], 0.0_f64, 0.0_f64);
    for _ in 0..rounds.of(task) {
        peak_gflops = peak_gflops.max(roof.fma());
        peak_gbps = peak_gbps.max(roof.read(&operands));
        if !entries.iter().any(Result::is_ok) {
            our_times.push(our_turn.take(&mut ours)?);
        }
        for entry in &mut entries {
            let Ok(present) = entry else { continue };
            our_times.push(our_turn.take(&mut ours)?);
            match present.turn.take(&mut present.ready) {
                Ok(ns) => present.times.push(ns),
                Err(error) => *entry = Err(format!("{error:#}")),
            }
        }
    }
    let ns = median(&mut our_times)?;
    let outcome = |entry: Result<Entry<'_, '_>, String>| match entry {
        Err(absent) => Outcome::Absent { absent },
        Ok(mut entry) => match median(&mut entry.times) {
            Ok(time) => Outcome::Timed { ns: time, ratio: time / ns, difference: entry.difference },
            Err(error) => Outcome::Absent { absent: error.to_string() },
        },
    };
    let peers = names.into_iter().zip(entries.into_iter().map(outcome)).collect();
    let (name, cost) = (task.name.clone(), task.cost);
    let threads = ctx.members();
    Ok(Line {
        name,
        threads,
        flops: cost.flops,
        bytes: cost.bytes,
        elements: cost.elements,
        items: task.items,
        ns,
        peak_gflops,
        peak_gbps,
        peers,
    })
}

struct Entry<'a, 'c> {
    ready: Ready<'a, 'c>,
    turn: Turn,
    difference: f64,
    times: Vec<f64>,
}

impl<'a, 'c> Entry<'a, 'c> {
    /// Checks the result: the time of other work says nothing.
    fn new(
        mut ready: Ready<'a, 'c>,
        want: &[f32],
        handover: &Handover,
        rounds: Rounds,
    ) -> Result<Self, String> {
        let mut check = || -> Result<(Turn, f64)> {
            let turn = Turn::plan(&mut ready, rounds)?;
            let difference = difference(&ready.result(handover)?, want)?;
            if difference > TOLERANCE {
                bail!("other result, off by {difference:.1e}");
            }
            Ok((turn, difference))
        };
        let (turn, difference) = check().map_err(|error| format!("{error:#}"))?;
        Ok(Entry { ready, turn, difference, times: vec![] })
    }
}

/// What somebody does when it is their turn.
#[derive(Clone, Copy)]
struct Turn {
    /// Timed runs.
    runs: usize,
    /// Whether a run before them warms the caches.
    warm: bool,
}

impl Turn {
    fn plan(ready: &mut Ready<'_, '_>, rounds: Rounds) -> Result<Turn> {
        let once = Turn { runs: 1, warm: false };
        // The first run also finds its memory; if it is far longer than that, another would say the same.
        if ready.round(once)? > 4.0 * LONG.as_nanos() as f64 {
            return Ok(once);
        }
        let ns = ready.round(once)?;
        let runs = (rounds.length.as_nanos() as f64 / ns).clamp(1.0, MOST_RUNS) as usize;
        Ok(Turn { runs, warm: ns < LONG.as_nanos() as f64 })
    }

    fn take(self, ready: &mut Ready<'_, '_>) -> Result<f64> {
        thread::sleep(SETTLE);
        ready.round(self)
    }
}

/// The largest difference as part of the largest wanted value.
fn difference(got: &[f32], want: &[f32]) -> Result<f64> {
    if got.len() != want.len() {
        bail!("{} elements instead of {}", got.len(), want.len());
    }
    let error = got.iter().zip(want).map(|(g, w)| f64::from((g - w).abs()));
    let error = error.fold(0.0, |max: f64, e| if e.is_nan() { f64::INFINITY } else { max.max(e) });
    let largest = want.iter().fold(f32::MIN_POSITIVE, |max, w| max.max(w.abs()));
    Ok(error / f64::from(largest))
}

fn median(times: &mut [f64]) -> Result<f64> {
    if times.is_empty() {
        bail!("no times");
    }
    times.sort_unstable_by(f64::total_cmp);
    let middle = times.len() / 2;
    Ok(if times.len().is_multiple_of(2) { (times[middle - 1] + times[middle]) / 2.0 } else { times[middle] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_differences() -> Result<()> {
        assert_eq!(median(&mut [3.0, 1.0, 2.0])?, 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0])?, 2.5);
        assert!(median(&mut []).is_err());
        assert_eq!(difference(&[1.0, -3.5], &[1.0, -4.0])?, 0.125);
        assert_eq!(difference(&[f32::NAN], &[1.0])?, f64::INFINITY);
        assert!(difference(&[1.0], &[]).is_err());
        Ok(())
    }
}
