#![no_main]
//! The product of unpacked matrices with any sizes, strides and lengths of their slices: refused, or right.

use laneformer::gemm::{Strided, StridedMut, matmul};
use laneformer::reference as r;
use laneformer_fuzz::Values;
use libfuzzer_sys::fuzz_target;

/// Strides and lengths that are nearly right, or anything.
type Layout = ([u8; 2], Option<[u64; 3]>);

fuzz_target!(|input: ([u8; 3], [Layout; 3], Values)| {
    let ([m, n, k], layouts, mut values) = input;
    let [m, n, k] = [m, n, k].map(|size| usize::from(size % 40));
    let shapes = [(m, k), (k, n), (m, n)];
    // Row stride, column stride, elements.
    let mut layout = |i: usize| -> ([usize; 2], Vec<f32>) {
        let ((rows, cols), ([pad, kind], wild)) = (shapes[i], layouts[i]);
        let gap = usize::from(pad % 5);
        let strides = match kind % 4 {
            0 => [cols + gap, 1],
            1 => [1, rows + gap],
            2 => [(cols + gap) * 2, 2],
            // Rows or columns that are one.
            _ => [usize::from(pad % 2), 1 - usize::from(pad % 2)],
        };
        let extent = |n: usize, stride: usize| n.saturating_sub(1) * stride;
        let needed =
            if rows * cols == 0 { 0 } else { extent(rows, strides[0]) + extent(cols, strides[1]) + 1 };
        match wild {
            Some([row, col, len]) if kind > 200 => {
                ([row as usize, col as usize], values.take(len as usize % 3000))
            }
            _ => (
                strides,
                values.take((needed + usize::from(kind / 64)).saturating_sub(usize::from(pad > 250))),
            ),
        }
    };
    let [(a_strides, a), (b_strides, b), (c_strides, mut c)] = std::array::from_fn(&mut layout);
    let before = c.clone();
    let Ok(of_a) = Strided::new(&a, m, k, a_strides[0], a_strides[1]) else { return };
    let Ok(of_b) = Strided::new(&b, k, n, b_strides[0], b_strides[1]) else { return };
    let Ok(of_c) = StridedMut::new(&mut c, m, n, c_strides[0], c_strides[1]) else { return };
    matmul(of_a, of_b, of_c).unwrap();

    let wide = |x: &[f32], rows: usize, cols: usize, [row, col]: [usize; 2]| -> Vec<f64> {
        (0..rows * cols).map(|i| f64::from(x[i / cols * row + i % cols * col])).collect()
    };
    let expected = r::matmul(&wide(&a, m, k, a_strides), &wide(&b, k, n, b_strides), m, k, n);
    let limit = 6e-8 * values.size() * values.size() * (k * k + 1) as f64;
    let mut is_written = vec![false; c.len()];
    for (i, &e) in expected.iter().enumerate() {
        let at = i / n * c_strides[0] + i % n * c_strides[1];
        let x = f64::from(c[at]);
        is_written[at] = true;
        assert!(
            (x.is_nan() && e.is_nan()) || x == e || (x - e).abs() <= limit,
            "element {i} is {x:e}, not {e:e}"
        );
    }
    for (i, (x, y)) in c.iter().zip(&before).enumerate().filter(|(i, _)| !is_written[*i]) {
        assert!(x.to_bits() == y.to_bits(), "element {i} outside of the matrix was written");
    }
});
