//! Products: packed with every epilogue, and unpacked with any strides, against the f64 reference.

mod common;

use common::buffer::Guarded;
use common::compare::{assert_bits, assert_close, assert_within, slack};
use common::data::Rng;
use common::model::{ACTIVATIONS, Map, activation};
use common::sizes::{GEMM_K, GEMM_M, GEMM_N};
use common::{on_every_isa, serial};
use laneformer::gemm::{Strided, StridedMut, matmul};
use laneformer::reference as r;
use laneformer::{Activation, Affine, Epilogue, Isa, Linear, MatRef, PackedMatrix, elementwise};

fn run(isa: Isa, linear: &Linear, x: &[f32], rows: usize, epilogue: &Epilogue<'_>) -> Vec<f32> {
    let x = Guarded::new(rows, linear.in_features(), x);
    let mut y = Guarded::unset(rows, linear.out_features());
    linear.forward(serial(isa), x.view(), epilogue, y.view_mut()).unwrap();
    y.values()
}

/// The worst case of blocked chains: one rounding of a partial sum per step of a block and per block.
fn limit(k: usize, size: f64) -> f64 {
    let steps = k.min(512) + k / 512 + 3;
    // Roundings are random in sign, so their sum grows with the square root; 8 times that is never met.
    8.0 * (steps as f64).sqrt() * f64::from(f32::EPSILON) * size
}

on_every_isa! {
    fn edge_sizes(isa) {
        let mut rng = Rng::new(1);
        let slow = matches!(isa.name(), "scalar" | "portable");
        for &k in GEMM_K {
            for &n in GEMM_N {
                let map = Map::new(n, k, &mut rng);
                let linear = map.packed();
                for &m in GEMM_M {
                    // The products of the longest sides cost the slow instruction sets seconds and show nothing more.
                    if slow && m * n * k > 300_000 {
                        continue;
                    }
                    let x = rng.vec(m * k, 1.0);
                    let expected = r::linear(&r::to_f64(&x), &map.reference(), |x| x, None);
                    let actual = run(isa, &linear, &x, m, &Epilogue::NONE);
                    // Weights of variance 1/k and inputs of 1/3: sums of size 1.
                    assert_close(&actual, &expected, limit(k, slack(isa)), &format!("m{m} n{n} k{k}"));
                }
            }
        }
    }

    fn batch_norms_in_the_weights(isa) {
        let mut rng = Rng::new(3);
        for (n, k) in [(1, 1), (17, 9), (64, 33), (65, 600), (130, 3)] {
            let map = Map::new(n, k, &mut rng);
            let (before, after) = (rng.vec(2 * k, 1.0), rng.vec(2 * n, 1.0));
            let affine = |x: &[f32]| {
                let (scale, shift) = x.split_at(x.len() / 2);
                Affine::new(scale.to_vec(), shift.to_vec()).unwrap()
            };
            let norm = |x: &[f64], norm: &[f32]| -> Vec<f64> {
                let (scale, shift) = norm.split_at(norm.len() / 2);
                let channel = |i: usize| (f64::from(scale[i % scale.len()]), f64::from(shift[i % shift.len()]));
                x.iter().enumerate().map(|(i, x)| x * channel(i).0 + channel(i).1).collect()
            };
            let x = rng.vec(5 * k, 1.0);
            let wide = r::to_f64(&x);
            let linear = map.packed().with_affine_before(&affine(&before)).unwrap();
            let expected = r::linear(&norm(&wide, &before), &map.reference(), |x| x, None);
            let limit = limit(k, 2.0 * slack(isa));
            assert_close(&run(isa, &linear, &x, 5, &Epilogue::NONE), &expected, limit, "before");
            let linear = linear.with_affine_after(&affine(&after)).unwrap();
            assert_close(&run(isa, &linear, &x, 5, &Epilogue::NONE), &norm(&expected, &after), limit, "both");
        }
    }

    fn every_epilogue(isa) {
        let mut rng = Rng::new(2);
        for (m, n, k) in [(1, 1, 1), (5, 17, 9), (7, 64, 16), (8, 65, 33), (3, 130, 513)] {
            let map = Map::new(n, k, &mut rng);
            let linear = map.packed();
            let x = rng.vec(m * k, 3.0);
            let residual = Guarded::new(m, n, &rng.vec(m * n, 1.0));
            for function in ACTIVATIONS {
                for scale in [None, Some(1.0), Some(-0.5)] {
                    let values = r::to_f64(&residual.values());
                    let reference = scale.map(|s| (f64::from(s), &values[..]));
                    let expected =
                        r::linear(&r::to_f64(&x), &map.reference(), activation(function), reference);
                    let mut epilogue = Epilogue::activation(function);
                    if let Some(scale) = scale {
                        epilogue = epilogue.with_residual(scale, residual.view());
                    }
                    let actual = run(isa, &linear, &x, m, &epilogue);
                    let what = format!("m{m} n{n} k{k} {function:?} {scale:?}");
                    assert_close(&actual, &expected, limit(k, 6.0 * slack(isa)), &what);
                }
            }
        }
    }

    fn both_packings_are_one_layout(isa) {
        let mut rng = Rng::new(3);
        for (n, k) in [(1, 1), (17, 5), (64, 64), (65, 513), (131, 3)] {
            let weight = rng.vec(n * k, 1.0);
            let transposed: Vec<f32> = (0..n * k).map(|i| weight[i % n * k + i / n]).collect();
            // Packing reads rows with a stride.
            let (out_in, in_out) = (Guarded::new(n, k, &weight), Guarded::new(k, n, &transposed));
            let from_out_in = Linear::new(PackedMatrix::from_out_in(out_in.view()).unwrap(), None).unwrap();
            let from_in_out = Linear::new(PackedMatrix::from_in_out(in_out.view()).unwrap(), None).unwrap();
            assert_eq!((from_in_out.in_features(), from_in_out.out_features()), (k, n));
            let x = rng.vec(3 * k, 1.0);
            let y = run(isa, &from_out_in, &x, 3, &Epilogue::NONE);
            assert_bits(&run(isa, &from_in_out, &x, 3, &Epilogue::NONE), &y, &format!("n{n} k{k}"));
        }
    }

    fn activations_are_functions(isa) {
        let identity: Vec<f32> = (0..100).map(|i| f32::from(i % 11 == 0)).collect();
        let weight = PackedMatrix::from_out_in(MatRef::contiguous(&identity, 10, 10).unwrap()).unwrap();
        let (linear, x) = (Linear::new(weight, None).unwrap(), Rng::new(5).vec(70, 4.0));
        for activation in ACTIVATIONS {
            let mut expected = Guarded::new(7, 10, &x);
            if let Some(function) = activation.function() {
                elementwise(serial(isa), function, expected.view_mut()).unwrap();
            }
            let actual = run(isa, &linear, &x, 7, &Epilogue::activation(activation));
            assert_bits(&actual, &expected.values(), &format!("{activation:?}"));
        }
    }

    fn special_values(isa) {
        const INF: f32 = f32::INFINITY;
        // Weights: identity, a row of zeros, a row with an infinity; K of more than a vector.
        for k in [3, 20, 600] {
            let mut weight = vec![0.0; 3 * k];
            weight[0] = 1.0;
            weight[2 * k + 1] = INF;
            let weight = MatRef::contiguous(&weight, 3, k).unwrap();
            let linear = Linear::new(PackedMatrix::from_out_in(weight).unwrap(), Some(&[0.0, 5.0, 0.0])).unwrap();
            let with = |first: f32, second: f32, function: Activation| {
                let mut x = vec![0.0; k];
                (x[0], x[1]) = (first, second);
                run(isa, &linear, &x, 1, &Epilogue::activation(function))
            };
            assert_bits(&with(2.0, 1.0, Activation::None), &[2.0, 5.0, INF], "an infinity");
            assert_bits(&with(2.0, 0.0, Activation::None), &[2.0, 5.0, f32::NAN], "0 * inf");
            assert_bits(&with(f32::NAN, 1.0, Activation::None), &[f32::NAN; 3], "NaN");
            assert_bits(&with(f32::NAN, 1.0, Activation::Relu), &[f32::NAN; 3], "relu(NaN)");
            assert_bits(&with(-INF, -1.0, Activation::Relu), &[0.0, f32::NAN, f32::NAN], "relu(-inf)");
            assert_bits(&with(-1.0, -1.0, Activation::GeluErf)[2..], &[f32::NAN], "gelu(-inf)");
            // A product that leaves the range becomes infinite.
            assert_bits(&with(-1.0, -f32::MAX, Activation::None)[2..], &[-INF], "-inf");
        }
    }

    fn nan_stays_in_its_row(isa) {
        let mut rng = Rng::new(4);
        let linear = Map::new(70, 40, &mut rng).packed();
        let mut x = rng.vec(14 * 40, 1.0);
        let clean = run(isa, &linear, &x, 14, &Epilogue::NONE);
        x[5 * 40 + 3] = f32::NAN;
        let y = run(isa, &linear, &x, 14, &Epilogue::NONE);
        assert_bits(&y[..5 * 70], &clean[..5 * 70], "rows before");
        assert_bits(&y[5 * 70..6 * 70], &[f32::NAN; 70], "its row");
        assert_bits(&y[6 * 70..], &clean[6 * 70..], "rows after");
    }

    fn blocks_of_512_add_in_order(isa) {
        // 1 is lost beside 2^24 inside one chain, but not if it is a block of its own that another -2^24 meets first.
        if !isa.keeps_bits() { return }
        let big = 16_777_216.0;
        let mut weight = vec![0.0; 1100];
        (weight[0], weight[511], weight[512]) = (big, 1.0, -big);
        let one = |weight: &[f32]| {
            let weight = MatRef::contiguous(weight, 1, 1100).unwrap();
            Linear::new(PackedMatrix::from_out_in(weight).unwrap(), None).unwrap()
        };
        assert_eq!(run(isa, &one(&weight), &[1.0; 1100], 1, &Epilogue::NONE), [0.0]);
        (weight[511], weight[1024]) = (0.0, 1.0);
        assert_eq!(run(isa, &one(&weight), &[1.0; 1100], 1, &Epilogue::NONE), [1.0]);
        (weight[512], weight[513]) = (1.0, -big);
        assert_eq!(run(isa, &one(&weight), &[1.0; 1100], 1, &Epilogue::NONE), [2.0]);
    }
}

#[test]
fn unpacked_products_of_any_strides() {
    let mut rng = Rng::new(5);
    for (m, k, n) in [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (7, 5, 9), (65, 17, 33), (4, 600, 3)] {
        let (a, b) = (rng.vec(m * k, 1.0), rng.vec(k * n, 1.0));
        let expected = r::matmul(&r::to_f64(&a), &r::to_f64(&b), m, k, n);
        // Row-major, then a transpose with steps between its columns.
        let (row, col) = (2, 2 * m + 1);
        let mut transposed = vec![f32::NAN; (k * col).max(1)];
        for i in 0..m * k {
            transposed[i / k * row + i % k * col] = a[i];
        }
        for a in [Strided::new(&a, m, k, k, 1).unwrap(), Strided::new(&transposed, m, k, row, col).unwrap()] {
            let mut plain = vec![f32::NAN; m * n];
            let b = Strided::new(&b, k, n, n, 1).unwrap();
            matmul(a, b, StridedMut::new(&mut plain, m, n, n, 1).unwrap()).unwrap();
            assert_close(&plain, &expected, limit(k, 2.0 + (k as f64).sqrt()), &format!("m{m} n{n} k{k}"));
            // Into a matrix with a stride, whose padding stays.
            let stride = n + 3;
            let mut wide = vec![7.0; m * stride];
            matmul(a, b, StridedMut::new(&mut wide, m, n, stride, 1).unwrap()).unwrap();
            for i in 0..m * stride {
                let expected = if i % stride < n { plain[i / stride * n + i % stride] } else { 7.0 };
                assert_bits(&[wide[i]], &[expected], "strided");
            }
        }
    }
}

#[test]
fn an_unpacked_product_repeats_rows_of_stride_zero() {
    let mut c = [0.0; 4];
    let row = Strided::new(&[1.0, 2.0], 2, 2, 0, 1).unwrap();
    let b = Strided::new(&[1.0, 10.0, 100.0, 1000.0], 2, 2, 2, 1).unwrap();
    matmul(row, b, StridedMut::new(&mut c, 2, 2, 2, 1).unwrap()).unwrap();
    assert_eq!(c, [201.0, 2010.0, 201.0, 2010.0]);
}

#[test]
fn an_unpacked_product_keeps_special_values() {
    let mut c = [0.0; 4];
    let a = Strided::new(&[f32::NAN, 0.0, 1.0, 0.0], 2, 2, 2, 1).unwrap();
    let b = Strided::new(&[1.0, 2.0, 0.0, f32::INFINITY], 2, 2, 2, 1).unwrap();
    matmul(a, b, StridedMut::new(&mut c, 2, 2, 2, 1).unwrap()).unwrap();
    assert_bits(&c, &[f32::NAN, f32::NAN, 1.0, f32::NAN], "0 * inf is NaN");
    let zeros = r::matmul(&[], &[], 2, 0, 2);
    let empty = Strided::new(&[], 2, 0, 0, 1).unwrap();
    let tall = Strided::new(&[], 0, 2, 2, 1).unwrap();
    matmul(empty, tall, StridedMut::new(&mut c, 2, 2, 2, 1).unwrap()).unwrap();
    assert_within(&c, &zeros, |_, _| 0.0, "a sum of nothing");
}
