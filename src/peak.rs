//! The roofs of this machine, measured: bursts of fused multiply-adds and of reads.
//!
//! A kernel's speed means little beside a figure from a data sheet: clocks move and cores are shared. A harness runs
//! these bursts between the timed runs, on the same instruction set and threads, and gives speed as a part of the best.
//! They run on the calling thread; the caller takes the time.
//!
//! ```
//! use laneformer::{Isa, peak};
//! let flops = peak::fma(Isa::best(), 1000);
//! assert!(flops >= 1000 * 2 * 16);
//! assert_eq!(peak::read(Isa::best(), &[1.0; 100], 2), 200.0);
//! ```

use core::hint::black_box;

use crate::isa::{Isa, dispatch};
use crate::simd::{LANES, Simd, Vector};

/// Runs `iterations` rounds of independent chains of [`mul_add`](f32::mul_add) in registers, as many chains as the widest GEMM tile of `isa` has
/// accumulators, and returns the number of floating-point operations, two for each lane and step.
pub fn fma(isa: Isa, iterations: usize) -> u64 {
    dispatch!(isa, |s| fma_burst(s, iterations))
}

/// Reads `x` `passes` times with loads as wide as `isa` has them, and returns the sum of what was read. It is fastest
/// where `x` begins on a cache line.
pub fn read(isa: Isa, x: &[f32], passes: usize) -> f32 {
    dispatch!(isa, |s| read_burst(s, x, passes))
}

fn fma_burst<S: Simd>(s: S, iterations: usize) -> u64 {
    // The latency of an accumulator is hidden behind the others.
    match S::MR * S::NV {
        24.. => chains::<S, 24>(s, iterations),
        6..24 => chains::<S, 6>(s, iterations),
        _ => chains::<S, 3>(s, iterations),
    }
}

fn chains<S: Simd, const N: usize>(s: S, iterations: usize) -> u64 {
    // Opaque and different: equal or known chains would be folded into one, or into none.
    let seeds: [f32; N] = black_box(core::array::from_fn(|i| 1.0 + i as f32));
    // x = a x + b tends to 1 from any seed: no overflow, no denormals. The product is of the accumulator, so that without a fused
    // multiply-add it cannot move out of the loop.
    let (a, b) = black_box((0.875_f32, 0.125_f32));
    let sum = s.vectorize(
        #[inline(always)]
        || {
            let (a, b) = (s.splat(a), s.splat(b));
            let mut x = [a; N];
            for (x, seed) in x.iter_mut().zip(seeds) {
                *x = s.splat(seed);
            }
            for _ in 0..iterations {
                for x in &mut x {
                    *x = x.mul_add(a, b);
                }
            }
            x.into_iter().fold(0.0, |sum, x| sum + x.sum())
        },
    );
    black_box(sum);
    (iterations * N * LANES * 2) as u64
}

fn read_burst<S: Simd>(s: S, x: &[f32], passes: usize) -> f32 {
    let sum = s.vectorize(
        #[inline(always)]
        || {
            // One accumulator of sixteen lanes is one register of AVX-512 or two of AVX2: eight registers either way.
            if S::MR * S::NV >= 24 {
                sum_passes::<S, 8>(s, x, passes)
            } else {
                sum_passes::<S, 4>(s, x, passes)
            }
        },
    );
    black_box(sum)
}

#[inline(always)]
fn sum_passes<S: Simd, const N: usize>(s: S, x: &[f32], passes: usize) -> f32 {
    let zero = s.splat(0.0);
    let mut sums = [zero; N];
    for _ in 0..passes {
        let (lines, tail) = x.as_chunks::<LANES>();
        let (steps, rest) = lines.as_chunks::<N>();
        for step in steps {
            for (sum, line) in sums.iter_mut().zip(step) {
                *sum = *sum + s.load(line);
            }
        }
        for (sum, line) in sums.iter_mut().zip(rest) {
            *sum = *sum + s.load(line);
        }
        sums[0] = sums[0] + s.load_partial(tail, zero);
    }
    sums.into_iter().fold(0.0, |total, sum| total + sum.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_read() {
        for isa in Isa::available() {
            for len in [0_usize, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000] {
                let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
                let sum = (len * len.saturating_sub(1) / 2) as f32;
                assert_eq!(read(isa, &x, 3), 3.0 * sum, "{isa} {len}");
            }
        }
    }

    #[test]
    fn flops_are_those_of_the_iterations() {
        for isa in Isa::available() {
            assert_eq!(fma(isa, 0), 0);
            assert_eq!(fma(isa, 10), 10 * fma(isa, 1), "{isa}");
        }
    }
}
