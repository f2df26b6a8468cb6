//! What the hardware gives: short bursts of multiply-adds or of reads, on all threads at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use laneformer::{Isa, peak};

/// A sprint is long enough for its ragged end to vanish, and short enough to fall between two moments in which the system
/// takes one of the cores away.
const SPRINT: Duration = Duration::from_millis(2);

/// Sprints of a burst; the best counts.
const SPRINTS: usize = 3;

/// Iterations between two looks at the clock: some 30 us, beside which the look is nothing (with 500 of them it cost 4 %).
const ITERATIONS: usize = 4000;

/// Bytes between two looks at the clock.
const PIECE: usize = 1 << 20;

/// An instruction set on a number of threads.
#[derive(Clone, Copy)]
pub struct Roof {
    pub isa: Isa,
    pub threads: usize,
}

impl Roof {
    /// GFLOP/s of one burst of fused multiply-adds in registers.
    pub fn fma(self) -> f64 {
        self.together(|_| (), |_| peak::fma(self.isa, ITERATIONS) as f64)
    }

    /// GB/s of one burst of reads of `x`, whose parts have been read before by the threads that read them; with the loads of the instruction set or
    /// with AVX2's, whichever get more. From memory that may be the narrower.
    pub fn read(self, x: &[f32]) -> f64 {
        let of_avx2 =
            Isa::available().into_iter().find(|isa| isa.name() == "avx2" && self.isa.name() == "avx512");
        let roofs = [Some(self.isa), of_avx2].into_iter().flatten().map(|isa| Roof { isa, ..self });
        roofs.map(|roof| roof.read_with(x)).fold(0.0, f64::max)
    }

    fn read_with(self, x: &[f32]) -> f64 {
        let line = 16;
        let part = x.len().div_ceil(self.threads).next_multiple_of(line);
        let part = |thread: usize| &x[(thread * part).min(x.len())..((thread + 1) * part).min(x.len())];
        self.together(
            |thread| {
                peak::read(self.isa, part(thread), 1);
            },
            |thread| self.read_piece(part(thread.index), thread.step),
        )
    }

    /// The next piece of `x`, or a short `x` several times; the bytes of it.
    fn read_piece(self, x: &[f32], step: usize) -> f64 {
        let mut pieces = x.chunks(PIECE / size_of::<f32>());
        let Some(piece) = pieces.len().checked_sub(1).and_then(|last| pieces.nth(step % (last + 1))) else {
            return 0.0;
        };
        let passes = if size_of_val(x) < PIECE { PIECE / size_of_val(x) } else { 1 };
        peak::read(self.isa, piece, passes);
        (passes * size_of_val(piece)) as f64
    }

    /// Units per nanosecond of `step` on all threads, from the start of the first to the end of the last.
    fn together(self, warm: impl Fn(usize) + Sync, step: impl Fn(Step) -> f64 + Sync) -> f64 {
        let ready = AtomicUsize::new(0);
        let burst = |index: usize| {
            warm(index);
            let mut steps = 0;
            std::array::from_fn::<Sprint, SPRINTS, _>(|i| {
                self.meet(&ready, i + 1);
                let start = Instant::now();
                let (mut units, first) = (0.0, steps);
                while steps == first || start.elapsed() < SPRINT {
                    units += step(Step { index, step: steps });
                    steps += 1;
                }
                Sprint { units, start, end: Instant::now() }
            })
        };
        let burst = &burst;
        let bursts: Vec<_> = thread::scope(|scope| {
            let helpers: Vec<_> = (1..self.threads).map(|i| scope.spawn(move || burst(i))).collect();
            let own = burst(0);
            helpers.into_iter().filter_map(|helper| helper.join().ok()).chain([own]).collect()
        });
        (0..SPRINTS).map(|i| rate(bursts.iter().map(|burst| burst[i]))).fold(0.0, f64::max)
    }

    /// Waits until all threads have come for the `n`-th time. It spins: a blocking barrier would wake them one by one.
    fn meet(self, ready: &AtomicUsize, n: usize) {
        ready.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0_u32;
        while ready.load(Ordering::Acquire) < n * self.threads {
            spins += 1;
            if spins < 1 << 14 { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

/// What one thread did in a sprint.
#[derive(Clone, Copy)]
struct Sprint {
    units: f64,
    start: Instant,
    end: Instant,
}

fn rate(sprints: impl Iterator<Item = Sprint>) -> f64 {
    let whole = sprints.reduce(|a, b| Sprint {
        units: a.units + b.units,
        start: a.start.min(b.start),
        end: a.end.max(b.end),
    });
    whole.map_or(0.0, |s| s.units / (s.end - s.start).as_nanos().max(1) as f64)
}

/// Which thread, and how many steps it has done.
#[derive(Clone, Copy)]
struct Step {
    index: usize,
    step: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_roof_is_above_zero() {
        for threads in [1, 3] {
            for isa in Isa::available() {
                let roof = Roof { isa, threads };
                assert!(roof.fma() > 0.0);
                for len in [1, 1000, 1 << 18] {
                    assert!(roof.read(&vec![1.0; len]) > 0.0, "{isa} {threads} {len}");
                }
            }
        }
    }
}
