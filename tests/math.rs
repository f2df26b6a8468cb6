//! The accuracy of each function, as its documentation has it: by a sweep over f32 with a step, and over all of f32.

mod common;

use common::compare::{slack, ulps};
use common::on_every_isa;
use laneformer::reference as r;
use laneformer::{Function, Isa, MatMut, elementwise};

/// What is promised of a result that should be `exact`, given x.
#[derive(Clone, Copy)]
enum Bound {
    /// Units in the last place.
    Ulp(f64),
    /// `limit * max(1, |x|)`.
    Absolute(f64),
}

struct Row {
    function: Function,
    reference: fn(f64) -> f64,
    /// Finite arguments from here to there.
    range: (f32, f32),
    bound: Bound,
}

const ALL: (f32, f32) = (f32::MIN, f32::MAX);

/// The table of `src/math.rs`.
const TABLE: [Row; 12] = [
    Row { function: Function::Exp, reference: r::exp, range: ALL, bound: Bound::Ulp(0.91) },
    Row { function: Function::Tanh, reference: r::tanh, range: ALL, bound: Bound::Ulp(2.5) },
    Row { function: Function::Erf, reference: r::erf, range: (8.4e-38, f32::MAX), bound: Bound::Ulp(3.5) },
    Row { function: Function::Erf, reference: r::erf, range: (f32::MIN, -8.4e-38), bound: Bound::Ulp(3.5) },
    // 0.141 x is subnormal here, and its rounding is doubled three times.
    Row { function: Function::Erf, reference: r::erf, range: (-8.4e-38, 8.4e-38), bound: Bound::Ulp(5.0) },
    Row { function: Function::Relu, reference: r::relu, range: ALL, bound: Bound::Ulp(0.0) },
    Row {
        function: Function::GeluErf,
        reference: r::gelu_erf,
        range: (-5.25, f32::MAX),
        bound: Bound::Absolute(1.6e-7),
    },
    Row {
        function: Function::GeluErf,
        reference: r::gelu_erf,
        range: (f32::MIN, -5.25),
        bound: Bound::Absolute(4e-7),
    },
    Row {
        function: Function::GeluTanh,
        reference: r::gelu_tanh,
        range: (-5.0, f32::MAX),
        bound: Bound::Absolute(1.6e-7),
    },
    Row {
        function: Function::GeluTanh,
        reference: r::gelu_tanh,
        range: (f32::MIN, -5.0),
        bound: Bound::Absolute(3e-7),
    },
    Row { function: Function::QuickGelu, reference: r::quick_gelu, range: ALL, bound: Bound::Absolute(2e-7) },
    Row { function: Function::Silu, reference: r::silu, range: ALL, bound: Bound::Absolute(2e-7) },
];

impl Bound {
    /// The error in the bound's unit, and the bound.
    fn error(self, x: f32, actual: f32, exact: f64) -> (f64, f64) {
        let absolute = || (f64::from(actual) - exact).abs();
        match self {
            Bound::Ulp(limit) => (ulps(actual, exact), limit),
            // Far out 0 * x may be NaN in the reference too; NaN never meets the limit.
            Bound::Absolute(limit) => (absolute() / f64::from(x.abs()).max(1.0), limit),
        }
    }
}

/// Checks the table on every `step`-th f32, in rows of `CHUNK`.
fn sweep(isa: Isa, bits: std::ops::Range<u64>, step: usize) {
    const CHUNK: usize = 4096;
    for row in &TABLE {
        let inside = |x: &f32| x.is_finite() && row.range.0 <= *x && *x <= row.range.1;
        let mut all =
            bits.clone().step_by(step).map(|bits| f32::from_bits(bits as u32)).filter(inside).peekable();
        let mut worst = (0.0, 0.0, 0.0_f32);
        while all.peek().is_some() {
            let x: Vec<f32> = all.by_ref().take(CHUNK).collect();
            let mut y = x.clone();
            let view = MatMut::contiguous(&mut y, 1, x.len()).unwrap();
            elementwise(common::serial(isa), row.function, view).unwrap();
            for (&x, &y) in x.iter().zip(&y) {
                let exact = (row.reference)(f64::from(x));
                let (error, limit) = row.bound.error(x, y, exact);
                let met = error <= limit * slack(isa);
                assert!(
                    met,
                    "{:?}({x:e}) on {isa} is {y:e}, not {exact:e}: {error:.3e} > {limit:e}",
                    row.function
                );
                if error > worst.0 {
                    worst = (error, limit, x);
                }
            }
        }
        println!("{isa:8} {:9?} at most {:.3e} of {:e}, at {:e}", row.function, worst.0, worst.1, worst.2);
    }
}

on_every_isa! {
    /// A prime step, so that all low bits occur.
    fn bounds_hold_on_a_sample(isa) {
        sweep(isa, 0..1 << 32, 16_411);
    }

    #[ignore = "all 2^32 arguments of eight functions take about an hour on an instruction set; run before a release, or when src/math.rs changes"]
    fn bounds_hold_on_all_arguments(isa) {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
        let part = (1_u64 << 32).div_ceil(threads);
        std::thread::scope(|scope| {
            for i in 0..threads {
                scope.spawn(move || sweep(isa, i * part..(1_u64 << 32).min((i + 1) * part), 1));
            }
        });
    }
}
