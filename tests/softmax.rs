//! Softmax against the f64 reference, at its edges and with special values.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_within, slack, ulp};
use common::data::Rng;
use common::sizes::{COLS, ROWS};
use common::{on_every_isa, serial};
use laneformer::reference as r;
use laneformer::{Isa, MatMut, softmax, softmax_into};

/// Runs both forms on guarded buffers; they agree in bits.
fn run(isa: Isa, cols: usize, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / cols;
    let mut y = Guarded::new(rows, cols, x);
    softmax(serial(isa), y.view_mut()).unwrap();
    let (input, mut out) = (Guarded::new(rows, cols, x), Guarded::unset(rows, cols));
    softmax_into(serial(isa), input.view(), out.view_mut()).unwrap();
    assert_bits(&out.values(), &y.values(), "softmax_into");
    assert_bits(&input.values(), x, "the input of softmax_into");
    y.values()
}

fn check(isa: Isa, cols: usize, x: &[f32]) {
    let expected = r::softmax(&r::to_f64(x), cols);
    let base = 4e-7 + 1e-7 * (cols as f64).log2();
    let limit = |i: usize, e: f64| {
        // `x - max` is rounded before its exponential is taken: a relative error of half a unit of the difference.
        let row = &x[i / cols * cols..][..cols];
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let difference = ulp(f64::from(max) - f64::from(x[i])) / 2.0;
        // What is more than 87.3 below the maximum becomes 0.
        (base + difference) * slack(isa) * e + 1.2e-38
    };
    assert_within(&run(isa, cols, x), &expected, limit, &format!("{} columns", cols));
}

on_every_isa! {
    fn edge_sizes(isa) {
        let mut rng = Rng::new(1);
        for &cols in COLS {
            for &rows in ROWS {
                check(isa, cols, &rng.vec(rows * cols, 8.0));
            }
        }
    }

    fn wide_range(isa) {
        let mut rng = Rng::new(2);
        for scale in [1e-30, 1e-3, 43.0, 60.0, 1e4, 3e38] {
            check(isa, 131, &rng.vec(3 * 131, scale));
        }
    }

    fn far_below_the_maximum_is_zero(isa) {
        let y = run(isa, 5, &[0.0, -87.0, -87.5, -104.0, f32::MIN]);
        assert!(y[0] == 1.0 && y[1] > 0.0, "{y:?}");
        assert_eq!(y[2..].iter().map(|x| x.to_bits()).collect::<Vec<_>>(), [0; 3]);
    }

    fn special_values(isa) {
        const INF: f32 = f32::INFINITY;
        // The place of the special value in vectors, slot groups and tails.
        for cols in [1, 2, 16, 17, 64, 65, 100, 129] {
            for at in [0, cols / 2, cols - 1] {
                let with = |value: f32, other: f32| {
                    let mut row = vec![other; cols];
                    row[at] = value;
                    run(isa, cols, &row)
                };
                let all_nan = |y: Vec<f32>| y.iter().all(|x| x.is_nan());
                assert!(all_nan(with(f32::NAN, 0.5)), "NaN at {at} of {cols}");
                assert!(all_nan(with(-f32::NAN, 0.5)), "-NaN at {at} of {cols}");
                assert!(all_nan(with(INF, 0.5)), "inf at {at} of {cols}");
                assert!(all_nan(with(f32::NAN, -INF)), "NaN at {at} of {cols} among -inf");
                assert!(all_nan(with(INF, -INF)), "inf at {at} of {cols} among -inf");
                assert_bits(&with(-INF, -INF), &vec![0.0; cols], "a row of -inf");
                let y = with(-INF, 0.5);
                assert!(cols == 1 || y[at].to_bits() == 0, "-inf at {at} of {cols}");
                let y = with(0.5, -INF);
                assert!(y[at] == 1.0 && y.iter().sum::<f32>() == 1.0, "one value at {at} of {cols}");
            }
        }
    }

    fn rows_do_not_meet(isa) {
        // The rows that follow are looked at beside those before: whatever stands in them, a row is what it is alone.
        for cols in [1, 70, 128, 1500] {
            let mut x = Rng::new(3).vec(11 * cols, 5.0);
            for (row, special) in [(1, f32::NAN), (2, f32::NEG_INFINITY), (6, f32::INFINITY), (8, f32::NAN)] {
                x[row * cols + cols / 2] = special;
            }
            for row in [3, 4, 9] {
                x[row * cols..][..cols].fill(f32::NEG_INFINITY);
            }
            x[5 * cols..][..cols].fill(f32::NEG_INFINITY);
            x[5 * cols] = f32::NAN;
            let together = run(isa, cols, &x);
            for (row, alone) in x.chunks(cols).enumerate() {
                assert_bits(&together[row * cols..][..cols], &run(isa, cols, alone), &format!("row {row} of {cols}"));
            }
        }
    }

    fn nothing_to_do(isa) {
        for (rows, cols) in [(0, 0), (0, 7), (7, 0)] {
            softmax(serial(isa), MatMut::contiguous(&mut [], rows, cols).unwrap()).unwrap();
        }
    }

    fn the_exponential_alone(isa) {
        // Beside a 0 whose exponential takes the whole sum, an element is its exponential: the documented 4.7 ULP.
        if !isa.keeps_bits() { return }
        let mut worst: f64 = 0.0;
        for i in 0..100_000 {
            let x = -17.5 - (87.33 - 17.5) * i as f32 / 1e5;
            let mut row = [0.0, x];
            softmax(serial(isa), MatMut::contiguous(&mut row, 1, 2).unwrap()).unwrap();
            worst = worst.max(common::compare::ulps(row[1], f64::from(x).exp()));
        }
        assert!(worst <= 4.7, "{worst:.2} ULP");
    }
}
