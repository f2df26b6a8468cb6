//! Bad input: each error, its message, and that nothing was written. Never a panic.

mod common;

use common::buffer::Guarded;
use common::data::Rng;
use common::model::{Map, Model, PlacementKind, Shape};
use laneformer::gemm::{Strided, StridedMut, matmul};
use laneformer::{
    Activation, Affine, BatchStats, Bias, Bits, Context, CrossAttention, Epilogue, Error, Executor, Ffn,
    Function, Graph, Heads, Inputs, Isa, KeyStore, KeyStream, KvCache, Layer, Linear, MatMut, MatRef, Norm,
    PackedMatrix, Placement, QkvProjection, QueryRows, Relative, RelativeTable, Rotary, RotaryPairs,
    SegmentTerm, SelfAttention, Stack, SubLayer, Terms, Ticket, Workspace, attention, batchnorm_train,
    elementwise_into, layernorm, layernorm_into, rmsnorm, rmsnorm_into, softmax, softmax_into,
};

/// The error that `result` must be, and what it says.
#[track_caller]
fn refused<T>(result: Result<T, Error>, expected: Error, message: &str) {
    let error = result.err().expect("should have been refused");
    assert_eq!(error, expected);
    assert_eq!(error.to_string(), message);
}

fn size(arg: &'static str, expected: usize, actual: usize) -> Error {
    Error::Size { arg, expected, actual }
}

/// `result` is [`Error::Size`] with its message.
#[track_caller]
fn wrong_size<T>(result: Result<T, Error>, arg: &'static str, expected: usize, actual: usize) {
    refused(result, size(arg, expected, actual), &format!("{arg}: expected {expected}, got {actual}"));
}

fn ctx() -> Context<'static> {
    Context::serial()
}

fn view(x: &[f32], rows: usize, cols: usize) -> MatRef<'_> {
    MatRef::contiguous(x, rows, cols).unwrap()
}

fn linear(n: usize, k: usize) -> Linear {
    Map::new(n, k, &mut Rng::new(1)).packed()
}

const MAX: usize = usize::MAX;

#[test]
fn views() {
    let mut x = [0.0; 10];
    let stride = Error::TooSmall { arg: "row_stride", min: 4, actual: 3 };
    refused(MatRef::new(&x, 2, 4, 3), stride, "row_stride: expected at least 4, got 3");
    refused(MatMut::new(&mut x, 2, 4, 3), stride, "row_stride: expected at least 4, got 3");
    let short = Error::TooSmall { arg: "data.len()", min: 11, actual: 10 };
    refused(MatRef::new(&x, 2, 4, 7), short, "data.len(): expected at least 11, got 10");
    refused(MatMut::new(&mut x, 2, 4, 7), short, "data.len(): expected at least 11, got 10");
    let short = Error::TooSmall { arg: "data.len()", min: 12, actual: 10 };
    refused(MatRef::contiguous(&x, 3, 4), short, "data.len(): expected at least 12, got 10");
    refused(MatMut::contiguous(&mut x, 3, 4), short, "data.len(): expected at least 12, got 10");
    for (rows, cols, stride) in [(3, 1, MAX), (MAX, 1, 2), (MAX, MAX, MAX), (2, MAX, MAX)] {
        let overflow = Error::Overflow { arg: "rows * row_stride" };
        let message = "rows * row_stride: the size does not fit into the address space";
        refused(MatRef::new(&x, rows, cols, stride), overflow, message);
        refused(MatMut::new(&mut x, rows, cols, stride), overflow, message);
    }
    // A last row without its padding is enough, and so is nothing for nothing.
    assert!(MatRef::new(&x, 2, 4, 6).is_ok() && MatRef::new(&[], 0, 4, 4).is_ok());
}

#[test]
fn isa_names() {
    let message = "isa: unknown name, expected one of scalar, portable, avx2, avx512";
    for name in ["", "AVX2", "avx", "avx512 ", "neon"] {
        refused(name.parse::<Isa>(), Error::UnknownIsa, message);
    }
    for name in Isa::NAMES {
        match name.parse::<Isa>() {
            Ok(isa) => assert_eq!(
                (isa.name(), isa.to_string(), format!("{isa:?}")),
                (name, name.into(), name.into())
            ),
            Err(error) => {
                assert_eq!(error, Error::UnsupportedIsa { name });
                assert_eq!(error.to_string(), format!("isa: this CPU or build does not have {name}"));
            }
        }
    }
    // What no CPU can show at once.
    let lacking = Error::UnsupportedIsa { name: "avx512" };
    assert_eq!(lacking.to_string(), "isa: this CPU or build does not have avx512");
}

#[test]
fn row_operations() {
    let x = [1.0; 6];
    let (gain, short) = ([1.0; 3], [1.0; 2]);
    let mut y = Guarded::unset(2, 3);
    let input = view(&x, 2, 3);
    wrong_size(layernorm(ctx(), y.view_mut(), &short, None, 1e-5), "gain.len()", 3, 2);
    wrong_size(layernorm(ctx(), y.view_mut(), &gain, Some(&short), 1e-5), "bias.len()", 3, 2);
    wrong_size(layernorm_into(ctx(), input, &short, None, 1e-5, y.view_mut()), "gain.len()", 3, 2);
    wrong_size(layernorm_into(ctx(), input, &gain, Some(&[]), 1e-5, y.view_mut()), "bias.len()", 3, 0);
    wrong_size(rmsnorm(ctx(), y.view_mut(), &short, 1e-5), "gain.len()", 3, 2);
    wrong_size(rmsnorm_into(ctx(), input, &short, 1e-5, y.view_mut()), "gain.len()", 3, 2);
    // Outputs of another shape.
    let (tall, wide) = (view(&x, 3, 2), view(&x, 1, 3));
    wrong_size(softmax_into(ctx(), tall, y.view_mut()), "out.rows", 3, 2);
    wrong_size(softmax_into(ctx(), wide, y.view_mut()), "out.rows", 1, 2);
    wrong_size(softmax_into(ctx(), view(&x, 2, 2), y.view_mut()), "out.cols", 2, 3);
    wrong_size(elementwise_into(ctx(), Function::Exp, wide, y.view_mut()), "out.rows", 1, 2);
    wrong_size(layernorm_into(ctx(), wide, &gain, None, 1e-5, y.view_mut()), "out.rows", 1, 2);
    wrong_size(rmsnorm_into(ctx(), view(&x, 2, 2), &short, 1e-5, y.view_mut()), "out.cols", 2, 3);
    y.assert_unset();
}

#[test]
fn batchnorm() {
    let (two, three) = ([1.0; 2], [1.0; 3]);
    wrong_size(Affine::new(vec![1.0; 2], vec![1.0; 3]), "shift.len()", 2, 3);
    let zero = "scale.len(): expected a dimension of at least 1, got 0";
    refused(Affine::new(vec![], vec![]), Error::ZeroDim { arg: "scale.len()" }, zero);
    assert!(matches!(Affine::from_running(&[], &[], &[], &[], 0.0), Err(Error::ZeroDim { .. })));
    wrong_size(Affine::from_running(&two, &three, &two, &two, 0.0), "bias.len()", 2, 3);
    wrong_size(Affine::from_running(&two, &two, &three, &two, 0.0), "running_mean.len()", 2, 3);
    wrong_size(Affine::from_running(&two, &two, &two, &three, 0.0), "running_var.len()", 2, 3);

    let (x, mut y) = ([1.0; 12], Guarded::unset(4, 3));
    let affine = Affine::new(vec![1.0; 2], vec![1.0; 2]).unwrap();
    wrong_size(affine.apply(ctx(), y.view_mut()), "x.cols", 2, 3);
    wrong_size(affine.apply_into(ctx(), view(&x, 4, 3), y.view_mut()), "x.cols", 2, 3);
    wrong_size(affine.apply_into(ctx(), view(&x, 6, 2), y.view_mut()), "out.rows", 6, 4);

    assert!(matches!(BatchStats::new(vec![], vec![], 0.1), Err(Error::ZeroDim { .. })));
    assert!(matches!(
        BatchStats::new(vec![0.0], vec![], 0.1),
        Err(Error::Size { expected: 1, actual: 0, .. })
    ));
    let mut stats = BatchStats::new(vec![0.0; 3], vec![1.0; 3], 0.1).unwrap();
    let before = stats.clone();
    let valid = [true; 3];
    let train = |y: &mut Guarded, valid, gain, bias, stats: &mut BatchStats| {
        batchnorm_train(ctx(), y.view_mut(), valid, gain, bias, 1e-5, stats)
    };
    wrong_size(train(&mut y, Some(&valid[..]), &three, &three, &mut stats), "valid.len()", 4, 3);
    wrong_size(train(&mut y, None, &two, &three, &mut stats), "gain.len()", 3, 2);
    wrong_size(train(&mut y, None, &three, &two, &mut stats), "bias.len()", 3, 2);
    assert_eq!(stats, before);
    for (arg, field) in [
        ("stats.batch_mean.len()", 0),
        ("stats.batch_var.len()", 1),
        ("stats.running_mean.len()", 2),
        ("stats.running_var.len()", 3),
    ] {
        let mut stats = before.clone();
        let fields =
            [&mut stats.batch_mean, &mut stats.batch_var, &mut stats.running_mean, &mut stats.running_var];
        fields.into_iter().nth(field).unwrap().push(0.0);
        wrong_size(train(&mut y, None, &three, &three, &mut stats), arg, 3, 4);
    }
    y.assert_unset();
}

#[test]
fn products() {
    let message = "weight inputs: expected a dimension of at least 1, got 0";
    let zero = Error::ZeroDim { arg: "weight inputs" };
    refused(PackedMatrix::from_out_in(view(&[], 3, 0)), zero, message);
    refused(PackedMatrix::from_in_out(view(&[], 0, 3)), zero, message);
    let message = "weight outputs: expected a dimension of at least 1, got 0";
    let zero = Error::ZeroDim { arg: "weight outputs" };
    refused(PackedMatrix::from_out_in(view(&[], 0, 3)), zero, message);
    refused(PackedMatrix::from_in_out(view(&[], 3, 0)), zero, message);
    assert!(PackedMatrix::from_out_in(MatRef::new(&[], 0, MAX, MAX).unwrap()).is_err());
    assert!(PackedMatrix::from_in_out(MatRef::new(&[], MAX, 0, 0).unwrap()).is_err());

    let weight = || PackedMatrix::from_out_in(view(&[1.0; 6], 2, 3)).unwrap();
    wrong_size(Linear::new(weight(), Some(&[0.0; 3])), "bias.len()", 2, 3);

    let linear = Linear::new(weight(), None).unwrap();
    let norm = |n| Affine::new(vec![1.0; n], vec![0.0; n]).unwrap();
    wrong_size(linear.with_affine_before(&norm(2)), "norm channels", 3, 2);
    wrong_size(linear.with_affine_after(&norm(3)), "norm channels", 2, 3);
    let x = [1.0; 12];
    let (mut y, mut wide) = (Guarded::unset(4, 2), Guarded::unset(4, 3));
    let none = Epilogue::NONE;
    wrong_size(linear.forward(ctx(), view(&x, 4, 2), &none, y.view_mut()), "x.cols", 3, 2);
    wrong_size(linear.forward(ctx(), view(&x, 3, 3), &none, y.view_mut()), "out.rows", 3, 4);
    wrong_size(linear.forward(ctx(), view(&x, 4, 3), &none, wide.view_mut()), "out.cols", 2, 3);
    let with = |rows, cols| none.with_residual(1.0, view(&x, rows, cols));
    let untouched = |_: std::ops::Range<usize>, _: MatMut<'_>| panic!("refused before");
    wrong_size(linear.forward_filled(ctx(), untouched, &none, wide.view_mut()), "out.cols", 2, 3);
    wrong_size(linear.forward_filled(ctx(), untouched, &with(4, 3), y.view_mut()), "residual.cols", 2, 3);
    wrong_size(linear.forward(ctx(), view(&x, 4, 3), &with(3, 2), y.view_mut()), "residual.rows", 4, 3);
    wrong_size(linear.forward(ctx(), view(&x, 4, 3), &with(4, 3), y.view_mut()), "residual.cols", 2, 3);
    y.assert_unset();
    wide.assert_unset();
}

#[test]
fn unpacked_products() {
    let x = [1.0; 6];
    let short = Error::TooSmall { arg: "data.len()", min: 7, actual: 6 };
    refused(Strided::new(&x, 3, 2, 2, 2), short, "data.len(): expected at least 7, got 6");
    let overflow = Error::Overflow { arg: "rows * row_stride + cols * col_stride" };
    let message = "rows * row_stride + cols * col_stride: the size does not fit into the address space";
    for (rows, cols, row, col) in
        [(MAX, 2, 2, 1), (2, MAX, 1, 2), (2, 2, MAX, 1), (MAX, MAX, 1, 1), (2, 2, MAX, MAX)]
    {
        refused(Strided::new(&x, rows, cols, row, col), overflow, message);
        refused(StridedMut::new(&mut [0.0; 6], rows, cols, row, col), overflow, message);
    }

    let mut y = [7.0; 6];
    let overlap = Error::TooSmall { arg: "row_stride", min: 2, actual: 1 };
    refused(StridedMut::new(&mut y, 2, 2, 1, 1), overlap, "row_stride: expected at least 2, got 1");
    let overlap = Error::TooSmall { arg: "strides", min: 1, actual: 0 };
    refused(StridedMut::new(&mut y, 2, 2, 2, 0), overlap, "strides: expected at least 1, got 0");
    assert!(StridedMut::new(&mut y, 2, 2, 0, 2).is_err() && StridedMut::new(&mut y, 2, 1, 0, 0).is_err());

    let a = Strided::new(&x, 2, 3, 3, 1).unwrap();
    let mut product = |b, rows, cols| matmul(a, b, StridedMut::new(&mut y, rows, cols, cols, 1).unwrap());
    let b = Strided::new(&x, 3, 2, 2, 1).unwrap();
    wrong_size(product(Strided::new(&x, 2, 2, 2, 1).unwrap(), 2, 2), "b.rows", 3, 2);
    wrong_size(product(b, 3, 2), "c.rows", 2, 3);
    wrong_size(product(b, 2, 3), "c.cols", 2, 3);
    assert_eq!(y, [7.0; 6]);
}

#[test]
fn views_of_nothing_with_huge_sides() {
    // No element, so no size can be wrong; and none of it is walked.
    for (rows, cols) in [(0, MAX), (0, 0)] {
        assert!(StridedMut::new(&mut [], rows, cols, cols, 1).is_ok(), "[{rows}, {cols}]");
        assert!(StridedMut::new(&mut [], rows, cols, 5, 5).is_ok(), "[{rows}, {cols}]");
        let empty = || MatMut::contiguous(&mut [], rows, cols).unwrap();
        softmax(ctx(), empty()).unwrap();
        softmax_into(ctx(), empty().as_ref(), empty()).unwrap();
        elementwise_into(ctx(), Function::Exp, empty().as_ref(), empty()).unwrap();
    }
    assert!(StridedMut::new(&mut [], 3, 0, 0, 1).is_ok(), "contiguous, without columns");
    softmax(ctx(), MatMut::contiguous(&mut [], MAX, 0).unwrap()).unwrap();
    // Keys without columns are of the wrong width, before there is memory for so many.
    let (rows, heads) = (1 << 44, Heads::new(1, 1).unwrap());
    let (nothing, out) = (view(&[], rows, 0), MatMut::contiguous(&mut [], rows, 0).unwrap());
    let result = attention(ctx(), &heads, nothing, nothing, nothing, &[0, rows], &Graph::full(), out);
    wrong_size(result, "k.cols", 1, 0);
}

#[test]
fn heads() {
    let zero = |arg: &'static str| {
        (Error::ZeroDim { arg }, format!("{arg}: expected a dimension of at least 1, got 0"))
    };
    let (error, message) = zero("n_heads");
    refused(Heads::new(0, 8), error, &message);
    let (error, message) = zero("head_dim");
    refused(Heads::new(8, 0), error, &message);
    let heads = Heads::new(4, 8).unwrap();
    let (error, message) = zero("n_kv_heads");
    refused(heads.with_kv_heads(0), error, &message);
    let (error, message) = zero("value_dim");
    refused(heads.with_value_dim(0), error, &message);
    let uneven = Error::NotDivisible { arg: "n_heads", actual: 4, by: 3 };
    refused(heads.with_kv_heads(3), uneven, "n_heads: expected a multiple of 3, got 4");
    assert!(matches!(heads.with_kv_heads(8), Err(Error::NotDivisible { .. })));
}

#[test]
fn heads_with_fields_set_to_zero() {
    // The fields are public: what the constructors refuse can still arrive.
    let x = [0.0; 8];
    for field in 0..4 {
        let mut heads = Heads::new(2, 2).unwrap();
        let fields = [&mut heads.n_heads, &mut heads.n_kv_heads, &mut heads.head_dim, &mut heads.value_dim];
        *fields.into_iter().nth(field).unwrap() = 0;
        let (q, k, v) =
            (view(&x, 2, heads.query_cols()), view(&x, 2, heads.key_cols()), view(&x, 2, heads.value_cols()));
        let mut out = Guarded::unset(2, heads.output_cols());
        let result = attention(ctx(), &heads, q, k, v, &[0, 2], &Graph::full(), out.view_mut());
        assert!(matches!(result, Err(Error::ZeroDim { .. })), "field {field}: {result:?}");
        out.assert_unset();
    }
}

#[test]
fn heads_of_any_size() {
    let message = "keys and values: the size does not fit into the address space";
    let overflow = Error::Overflow { arg: "keys and values" };
    for heads in [
        Heads::new(MAX / 2, 8).unwrap(),
        Heads::new(1, MAX).unwrap(),
        Heads::new(1, 8).unwrap().with_value_dim(MAX - 40).unwrap(),
        Heads::new(1, 8).unwrap().with_value_dim(MAX).unwrap(),
    ] {
        let message = "heads: the size does not fit into the address space";
        refused(KeyStore::new(&heads, 100, 1), Error::Overflow { arg: "heads" }, message);
    }
    let heads = Heads::new(1, 8).unwrap();
    refused(KeyStore::new(&heads, MAX, 1), overflow, message);
    refused(KeyStore::new(&heads, MAX, MAX), overflow, message);
    // A list of so many segments does not fit either.
    assert!(matches!(KeyStore::new(&heads, 2, MAX), Err(Error::Overflow { .. })));
}

/// What every function with offsets says of bad ones, for 10 tokens.
#[track_caller]
fn offsets_are_checked(call: &mut dyn FnMut(&[usize]) -> Result<(), Error>) {
    let empty = Error::TooSmall { arg: "offsets", min: 1, actual: 0 };
    refused(call(&[]), empty, "offsets: expected at least 1, got 0");
    wrong_size(call(&[1, 10]), "offsets", 0, 1);
    wrong_size(call(&[0, 9]), "offsets", 10, 9);
    wrong_size(call(&[0, 5, 11]), "offsets", 10, 11);
    wrong_size(call(&[0, MAX]), "offsets", 10, MAX);
    wrong_size(call(&[0]), "offsets", 10, 0);
    let falling = Error::NotAscending { arg: "offsets", at: 2 };
    refused(
        call(&[0, 6, 5, 10]),
        falling,
        "offsets: expected an ascending list, entry 2 is below its predecessor",
    );
    assert_eq!(call(&[0, MAX, 10]), Err(falling));
}

#[test]
fn attention_arguments() {
    let heads = Heads::new(2, 4).unwrap().with_value_dim(3).unwrap();
    let x = [1.0; 100];
    let (q, k, v) = (view(&x, 10, 8), view(&x, 10, 8), view(&x, 10, 6));
    let mut out = Guarded::unset(10, 6);
    let full = Graph::full();
    let mut run =
        |q, k, v, offsets: &[usize]| attention(ctx(), &heads, q, k, v, offsets, &full, out.view_mut());
    wrong_size(run(q, view(&x, 9, 8), v, &[0, 10]), "k.rows", 10, 9);
    wrong_size(run(q, view(&x, 10, 7), v, &[0, 10]), "k.cols", 8, 7);
    wrong_size(run(q, k, view(&x, 9, 6), &[0, 10]), "v.rows", 10, 9);
    wrong_size(run(q, k, view(&x, 10, 8), &[0, 10]), "v.cols", 6, 8);
    wrong_size(run(view(&x, 10, 9), k, v, &[0, 10]), "q.cols", 8, 9);
    offsets_are_checked(&mut |offsets| run(q, k, v, offsets));
    out.assert_unset();
    let mut other = Guarded::unset(9, 6);
    wrong_size(attention(ctx(), &heads, q, k, v, &[0, 10], &full, other.view_mut()), "out.rows", 10, 9);
    let mut other = Guarded::unset(10, 8);
    wrong_size(attention(ctx(), &heads, q, k, v, &[0, 10], &full, other.view_mut()), "out.cols", 6, 8);
    other.assert_unset();
}

#[test]
fn key_stores_and_projections() {
    let heads = Heads::new(2, 4).unwrap();
    let x = [1.0; 800];
    let mut keys = KeyStore::new(&heads, 10, 1).unwrap();
    let mut out = Guarded::unset(10, 8);
    let full = Graph::full();
    keys.set(Context::serial(), view(&x, 10, 8), view(&x, 10, 8), &[0, 10]).unwrap();
    offsets_are_checked(&mut |offsets| {
        keys.set(Context::serial(), view(&x, 10, 8), view(&x, 10, 8), offsets)
    });
    let large = Error::TooLarge { arg: "blocks of 64 tokens in the batch", max: 1, actual: 2 };
    let message = "blocks of 64 tokens in the batch: expected at most 1, got 2";
    refused(keys.set(Context::serial(), view(&x, 80, 8), view(&x, 80, 8), &[0, 80]), large, message);
    let many = Error::TooLarge { arg: "sequences in the batch", max: 1, actual: 2 };
    let many_message = "sequences in the batch: expected at most 1, got 2";
    refused(keys.set(Context::serial(), view(&x, 10, 8), view(&x, 10, 8), &[0, 5, 10]), many, many_message);
    // What was in it still is.
    keys.attend(
        ctx(),
        &heads,
        &QueryRows::new(view(&x, 10, 8), &[0, 10]),
        &full,
        &Terms::default(),
        out.view_mut(),
    )
    .unwrap();

    let mut out = Guarded::unset(10, 8);
    wrong_size(
        keys.attend(
            ctx(),
            &heads,
            &QueryRows::new(view(&x, 9, 8), &[0, 10]),
            &full,
            &Terms::default(),
            out.view_mut(),
        ),
        "offsets",
        9,
        10,
    );
    let other = Heads::new(1, 4).unwrap();
    wrong_size(
        keys.attend(
            ctx(),
            &other,
            &QueryRows::new(view(&x, 10, 4), &[0, 10]),
            &full,
            &Terms::default(),
            out.view_mut(),
        ),
        "heads.n_kv_heads",
        2,
        1,
    );
    let other = Heads::new(2, 8).unwrap();
    wrong_size(
        keys.attend(
            ctx(),
            &other,
            &QueryRows::new(view(&x, 10, 16), &[0, 10]),
            &full,
            &Terms::default(),
            out.view_mut(),
        ),
        "heads.head_dim",
        4,
        8,
    );
    let other = heads.with_value_dim(5).unwrap();
    wrong_size(
        keys.attend(
            ctx(),
            &other,
            &QueryRows::new(view(&x, 10, 8), &[0, 10]),
            &full,
            &Terms::default(),
            out.view_mut(),
        ),
        "heads.value_dim",
        4,
        5,
    );
    out.assert_unset();

    let new = |q, k, v| QkvProjection::new(q, k, v, heads);
    wrong_size(new(linear(9, 5), linear(8, 5), linear(8, 5)), "q.out_features", 8, 9);
    wrong_size(new(linear(8, 5), linear(4, 5), linear(8, 5)), "k.out_features", 8, 4);
    wrong_size(new(linear(8, 5), linear(8, 5), linear(7, 5)), "v.out_features", 8, 7);
    wrong_size(new(linear(8, 5), linear(8, 6), linear(8, 5)), "k.in_features", 5, 6);
    wrong_size(new(linear(8, 5), linear(8, 5), linear(8, 4)), "v.in_features", 5, 4);

    let projection = new(linear(8, 5), linear(8, 5), linear(8, 5)).unwrap();
    let mut q = Guarded::unset(10, 8);
    let x = view(&x, 10, 5);
    let mut run =
        |x, offsets: &[usize], keys: &mut KeyStore| projection.forward(ctx(), x, offsets, q.view_mut(), keys);
    wrong_size(run(view(&[0.0; 40], 10, 4), &[0, 10], &mut keys), "x.cols", 5, 4);
    wrong_size(run(view(&[0.0; 45], 9, 5), &[0, 9], &mut keys), "q.rows", 9, 10);
    offsets_are_checked(&mut |offsets| run(x, offsets, &mut keys));
    refused(run(x, &[0, 5, 10], &mut keys), many, many_message);
    let mut other = KeyStore::new(&Heads::new(1, 4).unwrap(), 10, 1).unwrap();
    wrong_size(run(x, &[0, 10], &mut other), "heads.n_kv_heads", 1, 2);
    q.assert_unset();
    let mut q = Guarded::unset(10, 9);
    wrong_size(projection.forward(ctx(), x, &[0, 10], q.view_mut(), &mut keys), "q.cols", 8, 9);
    q.assert_unset();
}

#[test]
fn parts_of_a_layer_fit() {
    let heads = Heads::new(2, 4).unwrap();
    let qkv = || QkvProjection::new(linear(8, 8), linear(8, 8), linear(8, 8), heads).unwrap();
    wrong_size(SelfAttention::new(qkv(), linear(8, 9)), "out.in_features", 8, 9);
    wrong_size(SelfAttention::new(qkv(), linear(9, 8)), "out.out_features", 8, 9);
    let relu = Activation::Relu;
    wrong_size(Ffn::new(linear(16, 8), relu, linear(8, 15)), "w2.in_features", 16, 15);
    wrong_size(Ffn::new(linear(16, 8), relu, linear(9, 16)), "w2.out_features", 8, 9);
    let ffn = |d| Ffn::new(linear(16, d), relu, linear(d, 16)).unwrap();

    let norm = |d: usize, bias: usize| Norm::LayerNorm {
        gain: vec![1.0; d],
        bias: Some(vec![0.0; bias]),
        eps: 1e-5,
    };
    wrong_size(SubLayer::ffn(ffn(8), Placement::post(norm(9, 9))), "norm gain.len()", 8, 9);
    wrong_size(SubLayer::ffn(ffn(8), Placement::pre(norm(8, 7))), "norm bias.len()", 8, 7);
    for (before, after) in [(8, 0), (0, 8)] {
        let placement = Placement::Sandwich { before: norm(before, before), after: norm(after, after) };
        wrong_size(SubLayer::ffn(ffn(8), placement), "norm gain.len()", 8, 0);
    }
    let attention = SelfAttention::new(qkv(), linear(8, 8)).unwrap();
    let rms = Norm::RmsNorm { gain: vec![1.0; 7], eps: 1e-5 };
    wrong_size(SubLayer::self_attention(attention, Placement::post(rms)), "norm gain.len()", 8, 7);

    let zero = Error::ZeroDim { arg: "sub_layers.len()" };
    refused(Layer::new(vec![]), zero, "sub_layers.len(): expected a dimension of at least 1, got 0");
    let sub_layer = |d| SubLayer::ffn(ffn(d), Placement::post(norm(d, d))).unwrap();
    wrong_size(Layer::new(vec![sub_layer(8), sub_layer(6)]), "sub_layer.d_model", 8, 6);
    let zero = Error::ZeroDim { arg: "layers.len()" };
    refused(Stack::new(vec![]), zero, "layers.len(): expected a dimension of at least 1, got 0");
    let layer = |d| Layer::new(vec![sub_layer(d)]).unwrap();
    wrong_size(Stack::new(vec![layer(8), layer(6)]), "layer.d_model", 8, 6);

    let x = [0.0; 16];
    let mut y = Guarded::unset(2, 8);
    wrong_size(ffn(8).forward(ctx(), view(&x, 2, 7), y.view_mut()), "x.cols", 8, 7);
    wrong_size(ffn(8).forward(ctx(), view(&x, 1, 8), y.view_mut()), "out.rows", 1, 2);
    wrong_size(ffn(6).forward(ctx(), view(&x, 2, 6), y.view_mut()), "out.cols", 6, 8);
    y.assert_unset();
}

#[test]
fn layers_and_workspaces() {
    let layer = Model::new(Shape::new(2, 4, 20), &mut Rng::new(2)).layer();
    let full = Graph::full();
    let mut workspace = layer.workspace(10, 2, 1).unwrap();
    let mut y = Guarded::unset(10, 8);
    let mut narrow = Guarded::unset(10, 7);
    wrong_size(layer.forward(ctx(), narrow.view_mut(), &[0, 10], &full, &mut workspace), "x.cols", 8, 7);
    offsets_are_checked(&mut |offsets| layer.forward(ctx(), y.view_mut(), offsets, &full, &mut workspace));

    let mut small = layer.workspace(9, 2, 1).unwrap();
    let large = Error::TooLarge { arg: "x.rows", max: 9, actual: 10 };
    let result = layer.forward(ctx(), y.view_mut(), &[0, 10], &full, &mut small);
    refused(result, large, "x.rows: expected at most 9, got 10");
    let many = Error::TooLarge { arg: "sequences in the batch", max: 2, actual: 3 };
    let result = layer.forward(ctx(), y.view_mut(), &[0, 1, 2, 10], &full, &mut workspace);
    refused(result, many, "sequences in the batch: expected at most 2, got 3");

    // A workspace of another layer: of an FFN alone, of narrower heads, of another norm's place.
    let ffn = Model::new(Shape::new(2, 4, 20), &mut Rng::new(2)).ffn_layer();
    let mut others = vec![ffn.workspace(10, 2, 1).unwrap()];
    for shape in [Shape::new(1, 4, 20), Shape { placement: PlacementKind::Post, ..Shape::new(2, 2, 20) }] {
        others.push(Model::new(shape, &mut Rng::new(2)).layer().workspace(10, 2, 1).unwrap());
    }
    for mut other in others {
        let result = layer.forward(ctx(), y.view_mut(), &[0, 10], &full, &mut other);
        let Err(Error::TooSmall { arg, min, actual }) = result else { panic!("{result:?}") };
        assert!(arg.starts_with("workspace") && actual < min, "{result:?}");
    }
    y.assert_unset();
    // After all these refusals both work.
    let mut y = Guarded::new(10, 8, &[0.5; 80]);
    layer.forward(ctx(), y.view_mut(), &[0, 3, 10], &full, &mut workspace).unwrap();
    assert!(y.values().iter().all(|x| x.is_finite()));
}

#[test]
fn workspaces_of_any_size() {
    let layer = Model::new(Shape::new(2, 4, 20), &mut Rng::new(3)).layer();
    let message = "members: expected a dimension of at least 1, got 0";
    refused(layer.workspace(10, 1, 0), Error::ZeroDim { arg: "members" }, message);
    for (tokens, segments, members) in
        [(MAX, 1, 1), (MAX, MAX, 1), (MAX, MAX, MAX), (10, 1, MAX), (MAX / 8, 1, 1), (10, MAX, 1)]
    {
        let result = layer.workspace(tokens, segments, members);
        assert!(matches!(result, Err(Error::Overflow { .. })), "{tokens} {segments} {members}");
    }
}

#[test]
fn sizes_that_no_memory_has() {
    let overflows =
        |result: Result<(), Error>| assert!(matches!(result, Err(Error::Overflow { .. })), "{result:?}");
    overflows(Rotary::frequencies(MAX - 1, 1e4).map(drop));
    overflows(Rotary::new(RotaryPairs::Halves, MAX - 1, 1e4, 4).map(drop));
    overflows(Bits::dense([1 << 60, 1, 1, 1], |_, _, _, _| true).map(drop));
    let heads = Heads::new(1, (MAX >> 1) / 512).unwrap();
    overflows(KeyStore::new(&heads, 1, 1).map(drop));
    let heads = Heads::new(1, (1 << 52) - 4096).unwrap();
    overflows(KeyStream::new(&heads, &Graph::window(0, 0), 1).map(drop));
    assert_eq!(Heads::new(MAX, 2).unwrap().query_cols(), MAX);
    for (offsets, key_offsets) in [([0, 1 << 62], [0, 1 << 62]), ([0, 1], [0, 1 << 63])] {
        let tiles = Graph::full().tiles(0, &offsets, &key_offsets).map(drop);
        assert!(matches!(tiles, Err(Error::TooLarge { .. })), "{tiles:?}");
    }
}

#[test]
fn an_executor_with_any_number_of_helpers() {
    /// Promises helpers of whom none comes.
    struct Boast(usize);
    impl Executor for Boast {
        fn helpers(&self) -> usize {
            self.0
        }
        fn invite(&self, _: usize, _: &Ticket) {}
    }
    let mut rng = Rng::new(4);
    let (shape, x) = (Shape::new(2, 4, 20), rng.vec(80, 1.0));
    let model = Model::new(shape, &mut rng);
    let (layer, ffn) = (model.layer(), model.ffn());
    let run = |ctx: Context<'_>| {
        let mut y = x.clone();
        let mut workspace = layer.workspace(10, 1, 2).unwrap();
        let view = MatMut::contiguous(&mut y, 10, 8).unwrap();
        layer.forward(ctx, view, &[0, 10], &Graph::full(), &mut workspace).unwrap();
        let mut z = vec![0.0; 80];
        let input = MatRef::contiguous(&y, 10, 8).unwrap();
        ffn.forward(ctx, input, MatMut::contiguous(&mut z, 10, 8).unwrap()).unwrap();
        z
    };
    let expected = run(ctx());
    for helpers in [1, 100, MAX - 1, MAX] {
        let boast = Boast(helpers);
        common::compare::assert_bits(&run(Context::new(Isa::best(), &boast)), &expected, "helpers");
    }
}

#[test]
fn every_message_names_its_argument() {
    let what = Error::Mismatch { arg: "k_offsets", expected: "as many segments as q_offsets" };
    assert_eq!(what.to_string(), "k_offsets: expected as many segments as q_offsets");
    // It is an error like any other, small enough to be returned by every call.
    let boxed: Box<dyn std::error::Error + Send + Sync> = Box::new(what);
    assert!(boxed.source().is_none() && size_of::<Error>() <= 40);
}

/// What a graph and terms are refused with by attention over 5, 2 and 1 tokens of two heads of width 8; nothing is written.
fn attend_error(graph: &Graph, terms: &Terms<'_>, place: impl Fn(QueryRows<'_>) -> QueryRows<'_>) -> String {
    let heads = Heads::new(2, 8).unwrap();
    let (x, ends) = ([1.0; 8 * 16], [0, 5, 7, 8]);
    let rows = view(&x, 8, 16);
    let mut keys = KeyStore::new(&heads, 8, 3).unwrap();
    keys.set(Context::serial(), rows, rows, &ends).unwrap();
    let mut out = Guarded::unset(8, 16);
    let queries = place(QueryRows::new(rows, &ends));
    let error = keys.attend(ctx(), &heads, &queries, graph, terms, out.view_mut()).unwrap_err();
    out.assert_unset();
    error.to_string()
}

fn same(queries: QueryRows<'_>) -> QueryRows<'_> {
    queries
}

#[test]
fn bits_that_do_not_fit_the_batch() {
    let ends = [0, 5, 7, 8];
    let dense = |dims| Bits::dense(dims, |_, _, _, _| true).unwrap();
    let groups = |queries: usize, key_offsets: &[usize]| {
        let keys = vec![0; *key_offsets.last().unwrap()];
        Bits::groups(&vec![0; queries], &keys, key_offsets, 1, &[true]).unwrap()
    };
    for (bits, message) in [
        (dense([2, 1, 5, 5]), "sequences: expected at least 3, got 2"),
        (dense([3, 1, 4, 5]), "queries: expected at least 5, got 4"),
        (dense([1, 1, 4, 5]), "queries: expected at least 5, got 4"),
        (dense([3, 2, 5, 4]), "keys: expected at least 5, got 4"),
        (dense([1, 1, 1, 0]), "keys: expected at least 5, got 0"),
        (Bits::keys(&[&[true; 5][..]; 2]).unwrap(), "sequences: expected at least 3, got 2"),
        (Bits::keys(&[&[true; 4][..]; 3]).unwrap(), "keys: expected at least 5, got 4"),
        (Bits::keys(&[]).unwrap(), "keys: expected at least 5, got 0"),
        (groups(7, &ends), "queries: expected 8, got 7"),
        (groups(8, &[0, 5]), "sequences: expected at least 3, got 1"),
        (groups(8, &[0, 4, 4, 4]), "keys: expected at least 5, got 4"),
    ] {
        let graph = Graph::full().with_bits(bits.clone());
        assert_eq!(attend_error(&graph, &Terms::default(), same), format!("graph bits {message}"));
        let graph = Graph::causal().with_columns(bits.clone());
        assert_eq!(attend_error(&graph, &Terms::default(), same), format!("graph columns {message}"));
        let term = SegmentTerm { s: &[0.0; 16], e: &[0.0; 32], same: &bits };
        let terms = Terms { segment: Some(term), ..Terms::default() };
        assert_eq!(attend_error(&Graph::full(), &terms, same), format!("segment bits {message}"));
    }
    let of_queries = "graph columns: expected the same keys for all queries of a sequence";
    for bits in [dense([1, 1, 5, 5]), dense([3, 1, 5, 5]), groups(8, &ends)] {
        let graph = Graph::window(1, 1).with_columns(bits);
        assert_eq!(attend_error(&graph, &Terms::default(), same), of_queries);
    }
    let zero = |arg| Error::ZeroDim { arg };
    let new = |dims| Bits::dense(dims, |_, _, _, _| true).unwrap_err();
    assert_eq!(new([0, 1, 5, 5]), zero("sequences"));
    assert_eq!(new([1, 0, 5, 5]), zero("heads"));
    assert_eq!(new([1, 1, 0, 5]), zero("queries"));
    assert_eq!(new([MAX, 2, 1, 1]), Error::Overflow { arg: "bits" });
    assert_eq!(new([1, 1, MAX / 64, 128]), Error::Overflow { arg: "bits" });

    let groups = |queries: &[u32], keys: &[u32], offsets: &[usize], n, table: &[bool]| {
        Bits::groups(queries, keys, offsets, n, table).unwrap_err()
    };
    assert_eq!(
        groups(&[0], &[2], &[0, 1], 2, &[true; 4]),
        Error::TooLarge { arg: "group id", max: 1, actual: 2 }
    );
    assert_eq!(
        groups(&[9], &[0], &[0, 1], 2, &[true; 4]),
        Error::TooLarge { arg: "group id", max: 1, actual: 9 }
    );
    assert_eq!(groups(&[0], &[0], &[0, 1], 0, &[]), Error::TooSmall { arg: "groups", min: 1, actual: 0 });
    assert_eq!(groups(&[0], &[0], &[0, 1], 2, &[true; 3]), size("table.len()", 4, 3));
    assert_eq!(groups(&[], &[], &[0], MAX, &[]), Error::Overflow { arg: "groups" });
    assert_eq!(groups(&[0], &[0, 0], &[0, 1], 1, &[true]), size("key_offsets", 2, 1));
    assert_eq!(groups(&[0], &[0, 0], &[1, 2], 1, &[true]), size("key_offsets", 0, 1));
    assert_eq!(
        groups(&[0], &[0, 0], &[], 1, &[true]),
        Error::TooSmall { arg: "key_offsets", min: 1, actual: 0 }
    );
    let falling = Error::NotAscending { arg: "key_offsets", at: 2 };
    assert_eq!(groups(&[0], &[0, 0], &[0, 2, 1, 2], 1, &[true]), falling);
}

#[test]
fn graphs_of_any_reach() {
    // Every window is a graph, however far it goes and wherever queries stand.
    let heads = Heads::new(1, 1).unwrap();
    let x = [1.0; 70];
    let rows = view(&x, 70, 1);
    let mut keys = KeyStore::new(&heads, 70, 1).unwrap();
    keys.set(Context::serial(), rows, rows, &[0, 70]).unwrap();
    let far = isize::MAX / 8;
    for (left, right) in [(0, 0), (MAX, 0), (0, MAX), (MAX, MAX), (MAX / 2, MAX / 2 + 1), (1 << 62, 1)] {
        for position in [-far, -1, 0, 69, 70, far] {
            let mut out = Guarded::unset(70, 1);
            let positions = [position; 70];
            let queries = QueryRows::new(rows, &[0, 70]).at(&positions);
            let graph = Graph::window(left, right);
            keys.attend(ctx(), &heads, &queries, &graph, &Terms::default(), out.view_mut()).unwrap();
            let low = position.saturating_sub_unsigned(left.min(MAX / 2)).max(0);
            let high = position.saturating_add_unsigned(right.min(MAX / 2)).min(69);
            let expected = if low <= high { 1.0 } else { 0.0 };
            assert_eq!(out.values(), [expected; 70], "{left} {right} from {position}");
        }
    }
    let full = (Graph::full(), Terms::default());
    for position in [isize::MAX, isize::MIN, far + 1] {
        let message = format!("expected at most {far}, got {}", position.unsigned_abs());
        let (first, each) = ([0, position, 0], [position; 8]);
        let error = attend_error(&full.0, &full.1, |queries| QueryRows::starting_at(queries, leak(&first)));
        assert_eq!(error, format!("first positions: {message}"));
        let error = attend_error(&full.0, &full.1, |queries| queries.at(leak(&each)));
        assert_eq!(error, format!("positions: {message}"));
    }
    let error = attend_error(&full.0, &full.1, |queries| queries.starting_at(&[0, 1]));
    assert_eq!(error, "first positions: expected 3, got 2");
    let error = attend_error(&full.0, &full.1, |queries| queries.at(&[0; 7]));
    assert_eq!(error, "positions: expected 8, got 7");
}

/// For as long as the test runs.
fn leak(x: &[isize]) -> &'static [isize] {
    x.to_vec().leak()
}

#[test]
fn terms_that_do_not_fit() {
    let full = Graph::full();
    let x = vec![0.0; 4000];
    let bias = |dims: [usize; 4]| {
        let terms =
            Terms { bias: Some(Bias::new(&x[..dims.iter().product()], dims).unwrap()), ..Terms::default() };
        attend_error(&full, &terms, same)
    };
    assert_eq!(bias([2, 2, 5, 5]), "bias sequences: expected at least 3, got 2");
    assert_eq!(bias([3, 2, 4, 5]), "bias queries: expected at least 5, got 4");
    assert_eq!(bias([1, 1, 1, 4]), "bias keys: expected at least 5, got 4");
    assert_eq!(bias([3, 2, 5, 0]), "bias keys: expected at least 5, got 0");
    let new = |dims, len: usize| Bias::new(&x[..len], dims).unwrap_err();
    assert_eq!(new([0, 1, 1, 1], 0), Error::ZeroDim { arg: "bias sequences" });
    assert_eq!(new([1, 0, 1, 1], 0), Error::ZeroDim { arg: "bias heads" });
    assert_eq!(new([1, 1, 0, 1], 0), Error::ZeroDim { arg: "bias queries" });
    assert_eq!(new([2, 2, 5, 5], 99), size("bias.len()", 100, 99));
    assert_eq!(new([MAX, MAX, 1, 1], 1), Error::Overflow { arg: "bias" });

    let table = |rows, n_heads, cols| RelativeTable::new(view(&x, rows, cols), -4, n_heads).unwrap();
    let right = table(10, 2, 16);
    let relative = |u: usize, w: usize, table: &RelativeTable| {
        let relative = Relative { u: &x[..u], w: &x[..w], table };
        attend_error(&full, &Terms { relative: Some(relative), ..Terms::default() }, same)
    };
    assert_eq!(relative(15, 16, &right), "relative u.len(): expected 16, got 15");
    assert_eq!(relative(16, 17, &right), "relative w.len(): expected 16, got 17");
    assert_eq!(relative(16, 16, &table(10, 4, 16)), "relative table heads: expected 2, got 4");
    assert_eq!(relative(16, 16, &table(10, 2, 18)), "relative table head_dim: expected 8, got 9");
    let new =
        |rows, cols, first, n_heads| RelativeTable::new(view(&x, rows, cols), first, n_heads).unwrap_err();
    assert_eq!(new(10, 16, 0, 0), Error::ZeroDim { arg: "n_heads" });
    assert_eq!(new(10, 0, 0, 2), Error::ZeroDim { arg: "r.cols" });
    assert_eq!(new(0, 16, 0, 2), Error::ZeroDim { arg: "r.rows" });
    assert_eq!(new(10, 16, 0, 3), Error::NotDivisible { arg: "r.cols", actual: 16, by: 3 });
    for first in [isize::MIN, isize::MAX, isize::MAX - 5] {
        assert!(
            matches!(new(10, 16, first, 2), Error::TooLarge { arg: "first", actual, .. } if actual > 1 << 59)
        );
    }

    let bits = Bits::keys(&[&[true; 5][..]; 3]).unwrap();
    let segment = |s: usize, e: usize| {
        let term = SegmentTerm { s: &x[..s], e: &x[..e], same: &bits };
        attend_error(&full, &Terms { segment: Some(term), ..Terms::default() }, same)
    };
    assert_eq!(segment(15, 32), "segment s.len(): expected 16, got 15");
    assert_eq!(segment(16, 31), "segment e.len(): expected 32, got 31");
}

#[test]
fn caches_and_sources_that_do_not_fit_the_layer() {
    let mut rng = Rng::new(5);
    let heads = Heads::new(2, 4).unwrap();
    let model = Model::new(Shape::new(2, 4, 20), &mut rng);
    let cross = || {
        let attention =
            CrossAttention::new(linear(8, 8), linear(8, 8), linear(8, 8), linear(8, 8), heads).unwrap();
        let norm = Norm::RmsNorm { gain: vec![1.0; 8], eps: 1e-5 };
        Layer::new(vec![SubLayer::cross_attention(attention, Placement::post(norm)).unwrap()]).unwrap()
    };
    let stack = Stack::new(vec![model.layer(), cross(), model.layer()]).unwrap();
    let cache = |heads: &Heads, sequences, capacity| KvCache::new(heads, sequences, capacity).unwrap();
    let x = [0.5; 10 * 8];
    let source = |heads: &Heads, lens: &[usize]| {
        let mut keys = KeyStore::new(heads, 10, 3).unwrap();
        let tokens = lens.iter().sum();
        let (k, v) = (view(&x, tokens, heads.key_cols()), view(&x, tokens, heads.value_cols()));
        keys.set(Context::serial(), k, v, &common::model::offsets(lens)).unwrap();
        keys
    };
    let graph = Graph::causal();
    let fits = || (vec![cache(&heads, 2, 10), cache(&heads, 2, 10)], vec![source(&heads, &[3, 1])]);
    let mut workspace = stack.workspace(10, 2, 1).unwrap();
    let mut run = |(mut caches, sources): (Vec<KvCache>, Vec<KeyStore>), source_graph: &Graph| {
        let before: Vec<_> = caches.iter().map(|cache| (cache.len(0), cache.len(1))).collect();
        let ends = [0, 4, 10];
        let mut inputs =
            Inputs { caches: &mut caches, sources: &sources, source_graph, ..Inputs::new(&ends, &graph) };
        let mut y = Guarded::new(10, 8, &x);
        let result = stack.forward_with(ctx(), y.view_mut(), &mut inputs, &mut workspace);
        if result.is_err() {
            assert_eq!(y.values(), x);
            let after: Vec<_> = caches.iter().map(|cache| (cache.len(0), cache.len(1))).collect();
            assert_eq!(after, before);
        }
        result.map_err(|error| error.to_string()).err()
    };
    let full = Graph::full();
    assert_eq!(run(fits(), &full), None);
    let refused = |inputs, message: &str, run: &mut dyn FnMut(_, &Graph) -> Option<String>| {
        assert_eq!(run(inputs, &Graph::full()).as_deref(), Some(message));
    };
    type Change<'a> = &'a dyn Fn(&mut Vec<KvCache>, &mut Vec<KeyStore>);
    let other = |f: Change<'_>| {
        let (mut caches, mut sources) = fits();
        f(&mut caches, &mut sources);
        (caches, sources)
    };
    let one_head = Heads::new(1, 4).unwrap();
    let wide = Heads::new(2, 5).unwrap();
    let values = heads.with_value_dim(3).unwrap();
    let cases: [(Change<'_>, &str); 13] = [
        (&|c, _| c.truncate(1), "caches.len(): expected 2, got 1"),
        (&|c, _| c.push(cache(&heads, 2, 10)), "caches.len(): expected 2, got 3"),
        (&|c, _| c[1] = cache(&one_head, 2, 10), "cache n_kv_heads: expected 2, got 1"),
        (&|c, _| c[0] = cache(&wide, 2, 10), "cache head_dim: expected 4, got 5"),
        (&|c, _| c[1] = cache(&values, 2, 10), "cache value_dim: expected 4, got 3"),
        (&|c, _| c[1] = cache(&heads, 3, 10), "cache sequences: expected 2, got 3"),
        (&|c, _| c[1] = cache(&heads, 2, 5), "tokens appended to the cache: expected at most 5, got 6"),
        (
            &|c, _| {
                let (mut ring, x) = (KvCache::ring(&heads, 2, 1).unwrap(), [0.5; 256 * 8]);
                (0..3).for_each(|_| ring.append(1, view(&x, 256, 8), view(&x, 256, 8)).unwrap());
                c[1] = ring;
            },
            "keys that the graph sees and a ring has dropped: expected at most 0, got 512",
        ),
        (&|_, s| s.clear(), "sources.len(): expected 1, got 0"),
        (&|_, s| s.push(source(&heads, &[1, 1])), "sources.len(): expected 1, got 2"),
        (&|_, s| s[0] = source(&one_head, &[1, 1]), "source n_kv_heads: expected 2, got 1"),
        (&|_, s| s[0] = source(&heads, &[1]), "source sequences: expected 2, got 1"),
        (
            &|_, s| {
                let (past, rows) = (source(&heads, &[1, 1]), view(&x, 2, 8));
                s[0].set_after(&past, rows, rows, &[0, 1, 2]).unwrap();
            },
            "source: expected a store that does not stand behind another",
        ),
    ];
    for (f, message) in cases {
        refused(other(f), message, &mut run);
    }
    // The source's graph is checked too, and its terms and positions.
    let short = Graph::full().with_bits(Bits::keys(&[&[true; 2][..]; 2]).unwrap());
    assert_eq!(run(fits(), &short).as_deref(), Some("graph bits keys: expected at least 3, got 2"));
    assert_eq!(run(fits(), &full), None);
}

#[test]
fn terms_positions_and_stores_that_do_not_fit_the_source() {
    let heads = Heads::new(2, 4).unwrap();
    let attention =
        CrossAttention::new(linear(8, 8), linear(8, 6), linear(8, 6), linear(8, 8), heads).unwrap();
    let sub_layer = SubLayer::cross_attention(attention, Placement::Plain).unwrap();
    let layer = Layer::new(vec![sub_layer]).unwrap();
    let cross = layer.sub_layers()[0].as_cross_attention().unwrap();
    let x = [0.5; 8 * 8];
    let sources = [cross.keys(ctx(), view(&x, 5, 6), &[0, 5]).unwrap()];
    let (graph, mut workspace) = (Graph::full(), layer.workspace(3, 1, 1).unwrap());
    let mut run = |terms: Terms<'_>, positions: Option<&[isize]>| {
        let mut y = Guarded::new(3, 8, &x[..24]);
        let inputs = Inputs { sources: &sources, source_terms: terms, ..Inputs::new(&[0, 3], &graph) };
        let mut inputs = Inputs { source_positions: positions, ..inputs };
        let result = layer.forward_with(ctx(), y.view_mut(), &mut inputs, &mut workspace);
        assert_eq!(result.is_err(), y.values() == x[..24]);
        result.map_or_else(|error| error.to_string(), |()| "done".into())
    };
    let none = Terms::default();
    assert_eq!(run(none, Some(&[4, -9, 0])), "done");
    assert_eq!(run(none, Some(&[0, 1])), "source_positions: expected 3, got 2");
    let far = run(none, Some(&[0, isize::MIN, 0]));
    assert!(far.starts_with("source_positions: expected at most"), "{far}");
    let table = RelativeTable::new(view(&x, 3, 8), 0, 2).unwrap();
    let relative = Some(Relative { u: &x[..8], w: &x[..7], table: &table });
    assert_eq!(run(Terms { relative, ..none }, None), "relative w.len(): expected 8, got 7");
    let relative = Some(Relative { u: &x[..8], w: &x[..8], table: &table });
    assert_eq!(run(Terms { relative, ..none }, None), "done");
    let bias = Some(Bias::new(&x[..4], [1, 1, 1, 4]).unwrap());
    assert_eq!(run(Terms { bias, ..none }, None), "bias keys: expected at least 5, got 4");

    // Before there is memory for so many keys.
    wrong_size(cross.keys(ctx(), view(&[], 1 << 44, 0), &[0, 1 << 44]).map(drop), "source.cols", 6, 0);
    assert!(matches!(cross.keys(ctx(), view(&x, 5, 6), &[]), Err(Error::TooSmall { .. })));
    let mut keys = KeyStore::new(&heads, 64, 1).unwrap();
    let mut set = |x: MatRef<'_>, offsets: &[usize]| {
        cross.set_keys(ctx(), x, offsets, &mut keys).map_err(|error| error.to_string()).err()
    };
    assert_eq!(set(view(&x, 5, 6), &[0, 5]), None);
    assert_eq!(set(view(&x, 5, 8), &[0, 5]).as_deref(), Some("source.cols: expected 6, got 8"));
    assert_eq!(set(view(&x, 5, 6), &[0, 6]).as_deref(), Some("offsets: expected 5, got 6"));
    let two = "sequences in the batch: expected at most 1, got 2";
    assert_eq!(set(view(&x, 5, 6), &[0, 3, 5]).as_deref(), Some(two));
    let mut other = KeyStore::new(&Heads::new(1, 8).unwrap(), 64, 1).unwrap();
    let error = cross.set_keys(ctx(), view(&x, 5, 6), &[0, 5], &mut other).unwrap_err();
    assert_eq!(error.to_string(), "heads.n_kv_heads: expected 1, got 2");
    // What was refused has changed nothing.
    let attend = |keys: &KeyStore| {
        let (queries, mut y) = (QueryRows::new(view(&x, 1, 8), &[0, 1]), Guarded::new(1, 8, &x[..8]));
        keys.attend(ctx(), &heads, &queries, &graph, &none, y.view_mut()).unwrap();
        y.values()
    };
    assert_eq!(attend(&keys), attend(&sources[0]));
}

#[test]
fn a_workspace_that_cannot_grow() {
    let layer = Model::new(Shape::new(2, 4, 20), &mut Rng::new(7)).layer();
    let layers = std::slice::from_ref(&layer);
    let mut y = Guarded::new(3, 8, &[0.5; 24]);
    let result = layer.forward(ctx(), y.view_mut(), &[0, 3], &Graph::full(), &mut Workspace::default());
    refused(
        result,
        Error::TooLarge { arg: "x.rows", max: 0, actual: 3 },
        "x.rows: expected at most 0, got 3",
    );
    assert_eq!(y.values(), [0.5; 24]);
    let mut none = Guarded::new(0, 8, &[]);
    let result = layer.forward(ctx(), none.view_mut(), &[0], &Graph::full(), &mut Workspace::default());
    assert!(matches!(result, Err(Error::TooSmall { .. })));
    let mut workspace = layer.workspace(3, 1, 1).unwrap();
    let bytes = workspace.bytes();
    let result = workspace.reserve(layers, 3, 1, 0);
    refused(result, Error::ZeroDim { arg: "members" }, "members: expected a dimension of at least 1, got 0");
    for [tokens, segments, members] in [[usize::MAX, 1, 1], [3, usize::MAX, 1], [3, 1, usize::MAX]] {
        assert!(matches!(workspace.reserve(layers, tokens, segments, members), Err(Error::Overflow { .. })));
    }
    assert_eq!(workspace.bytes(), bytes);
    layer.forward(ctx(), y.view_mut(), &[0, 3], &Graph::full(), &mut workspace).unwrap();
}

#[test]
fn a_source_that_has_dropped_keys() {
    let heads = Heads::new(2, 4).unwrap();
    let attention =
        CrossAttention::new(linear(8, 8), linear(8, 8), linear(8, 8), linear(8, 8), heads).unwrap();
    let sub_layer = SubLayer::cross_attention(attention, Placement::Plain).unwrap();
    let layer = Layer::new(vec![sub_layer]).unwrap();
    let (mut ring, keys, x) = (KvCache::ring(&heads, 1, 1).unwrap(), [0.5; 256 * 8], [0.5; 8]);
    let mut workspace = layer.workspace(1, 1, 1).unwrap();
    for dropped in [None, None, Some(256)] {
        ring.append(0, view(&keys, 256, 8), view(&keys, 256, 8)).unwrap();
        let (graph, mut y) = (Graph::full(), Guarded::new(1, 8, &x));
        let mut inputs =
            Inputs { sources: std::slice::from_ref(ring.keys()), ..Inputs::new(&[0, 1], &graph) };
        let result = layer.forward_with(ctx(), y.view_mut(), &mut inputs, &mut workspace);
        match dropped {
            None => result.unwrap(),
            Some(actual) => {
                let arg = "keys that the graph sees and a ring has dropped";
                let message = format!("{arg}: expected at most 0, got {actual}");
                refused(result, Error::TooLarge { arg, max: 0, actual }, &message);
                assert_eq!(y.values(), x);
            }
        }
    }
}

#[test]
fn what_an_ffn_has_no_use_for() {
    let mut rng = Rng::new(6);
    let model = Model::new(Shape::new(2, 4, 20), &mut rng);
    let norm = Norm::RmsNorm { gain: vec![1.0; 8], eps: 1e-5 };
    let layer = Layer::new(vec![SubLayer::ffn(model.ffn(), Placement::post(norm)).unwrap()]).unwrap();
    let heads = Heads::new(2, 4).unwrap();
    let (graph, sources) = (Graph::full(), [KeyStore::new(&heads, 2, 1).unwrap()]);
    let mut caches = [KvCache::new(&heads, 1, 256).unwrap()];
    let forward = |inputs: &mut Inputs<'_>| {
        let (mut y, mut workspace) = (Guarded::unset(2, 8), layer.workspace(2, 1, 1).unwrap());
        let result = layer.forward_with(ctx(), y.view_mut(), inputs, &mut workspace);
        y.assert_unset();
        result
    };
    let inputs = || Inputs::new(&[0, 2], &graph);
    wrong_size(forward(&mut Inputs { sources: &sources, ..inputs() }), "sources.len()", 0, 1);
    wrong_size(forward(&mut Inputs { caches: &mut caches, ..inputs() }), "caches.len()", 0, 1);
    wrong_size(forward(&mut Inputs { positions: Some(&[0; 5]), ..inputs() }), "positions.len()", 2, 5);
}
