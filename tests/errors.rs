//! Bad input: each error, its message, and that nothing was written. Never a panic.

mod common;

use common::buffer::Guarded;
use common::data::Rng;
use common::model::{Map, Model, PlacementKind, Shape};
use laneformer::gemm::{Strided, StridedMut, matmul};
use laneformer::{
    Activation, Affine, BatchStats, Context, Epilogue, Error, Executor, Ffn, Graph, Heads, Isa, KeyStore,
    Layer, Linear, MatMut, MatRef, Norm, PackedMatrix, Placement, QkvProjection, QueryRows, SelfAttention,
    Stack, SubLayer, Terms, Ticket, attention, batchnorm_train, layernorm, layernorm_into, rmsnorm,
    rmsnorm_into, softmax, softmax_into,
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

    let mut y = Guarded::unset(4, 3);
    let affine = Affine::new(vec![1.0; 2], vec![1.0; 2]).unwrap();
    wrong_size(affine.apply(ctx(), y.view_mut()), "x.cols", 2, 3);

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
    }
    assert!(StridedMut::new(&mut [], 3, 0, 0, 1).is_ok(), "contiguous, without columns");
    softmax(ctx(), MatMut::contiguous(&mut [], MAX, 0).unwrap()).unwrap();
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
    keys.set(view(&x, 10, 8), view(&x, 10, 8), &[0, 10]).unwrap();
    offsets_are_checked(&mut |offsets| keys.set(view(&x, 10, 8), view(&x, 10, 8), offsets));
    let large = Error::TooLarge { arg: "blocks of 64 tokens in the batch", max: 1, actual: 2 };
    let message = "blocks of 64 tokens in the batch: expected at most 1, got 2";
    refused(keys.set(view(&x, 80, 8), view(&x, 80, 8), &[0, 80]), large, message);
    let many = Error::TooLarge { arg: "sequences in the batch", max: 1, actual: 2 };
    let many_message = "sequences in the batch: expected at most 1, got 2";
    refused(keys.set(view(&x, 10, 8), view(&x, 10, 8), &[0, 5, 10]), many, many_message);
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
