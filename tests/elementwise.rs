//! Elementwise functions: shapes and special values. Their accuracy is in `math.rs`.

mod common;

use common::buffer::Guarded;
use common::compare::assert_bits;
use common::data::Rng;
use common::sizes::{COLS, ROWS};
use common::{on_every_isa, serial};
use laneformer::{Function, Isa, MatMut, elementwise, elementwise_into};

const FUNCTIONS: [Function; 8] = [
    Function::Exp,
    Function::Tanh,
    Function::Erf,
    Function::Relu,
    Function::GeluErf,
    Function::GeluTanh,
    Function::QuickGelu,
    Function::Silu,
];

/// Runs both forms on guarded buffers; they agree in bits.
fn run(isa: Isa, function: Function, cols: usize, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / cols;
    let mut y = Guarded::new(rows, cols, x);
    elementwise(serial(isa), function, y.view_mut()).unwrap();
    let (input, mut out) = (Guarded::new(rows, cols, x), Guarded::unset(rows, cols));
    elementwise_into(serial(isa), function, input.view(), out.view_mut()).unwrap();
    assert_bits(&out.values(), &y.values(), "elementwise_into");
    assert_bits(&input.values(), x, "the input of elementwise_into");
    y.values()
}

const INF: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;

on_every_isa! {
    fn places_do_not_matter(isa) {
        let mut rng = Rng::new(1);
        for function in FUNCTIONS {
            for &cols in COLS {
                for &rows in ROWS {
                    let x = rng.vec(rows * cols, 4.0);
                    let y = run(isa, function, cols, &x);
                    // Alone, in the first lane of a tail.
                    for i in (0..x.len()).step_by(7) {
                        assert_bits(&y[i..=i], &run(isa, function, 1, &x[i..=i]), &format!("{function:?} at {i}"));
                    }
                }
            }
        }
    }

    fn special_values(isa) {
        let x = [NAN, INF, -INF, 0.0, -0.0];
        for (function, expected) in [
            (Function::Exp, [NAN, INF, 0.0, 1.0, 1.0]),
            (Function::Tanh, [NAN, 1.0, -1.0, 0.0, -0.0]),
            (Function::Erf, [NAN, 1.0, -1.0, 0.0, -0.0]),
            (Function::Relu, [NAN, INF, 0.0, 0.0, -0.0]),
            (Function::GeluErf, [NAN, INF, NAN, 0.0, 0.0]),
            (Function::GeluTanh, [NAN, INF, NAN, 0.0, 0.0]),
            (Function::QuickGelu, [NAN, INF, NAN, 0.0, -0.0]),
            (Function::Silu, [NAN, INF, NAN, 0.0, -0.0]),
        ] {
            // In whole vectors, and in a tail.
            for repeat in [1, 13] {
                let (x, expected) = (x.repeat(repeat), expected.repeat(repeat));
                let y = run(isa, function, x.len(), &x);
                for (i, (y, e)) in y.iter().zip(&expected).enumerate() {
                    // The sign of a gelu's zero is not promised.
                    let zero = matches!(function, Function::GeluErf | Function::GeluTanh) && *y == 0.0 && *e == 0.0;
                    assert!(zero || y.to_bits() == e.to_bits() || (y.is_nan() && e.is_nan()),
                        "{function:?}({}) is {y}, not {e}", x[i]);
                }
            }
        }
    }

    fn the_ends_of_the_range(isa) {
        // Large, subnormal and smallest arguments: finite in, and finite out where the function is.
        for x in [f32::MAX, 1e30, 104.0, 89.0, 1e-38, 1e-45] {
            for function in FUNCTIONS {
                let y = run(isa, function, 2, &[x, -x]);
                assert!(y.iter().all(|y| !y.is_nan()), "{function:?}({x:e}) is {y:?}");
                assert!(function == Function::Exp || y[0] <= x.max(1.0), "{function:?}({x:e}) is {y:?}");
            }
        }
        let y = run(isa, Function::Exp, 4, &[-103.0, -104.5, 88.7, 89.0]);
        assert!(y[0] > 0.0 && y[1] == 0.0 && y[2].is_finite() && y[3] == INF, "{y:?}");
    }

    fn nothing_to_do(isa) {
        for (rows, cols) in [(0, 0), (0, 7), (7, 0)] {
            elementwise(serial(isa), Function::Exp, MatMut::contiguous(&mut [], rows, cols).unwrap()).unwrap();
        }
    }
}
