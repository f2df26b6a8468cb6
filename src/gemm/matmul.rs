//! The product of two unpacked matrices with any strides, on `matrixmultiply`.

#![allow(unsafe_code, reason = "matrixmultiply takes pointers")]

use crate::error::{Error, check_size};

/// A read-only matrix with any strides, which may be zero (a row repeated) but not negative.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A matrix with any strides that is written. No two of its elements may share a place.
#[derive(Debug)]
pub struct StridedMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Result<(), Error> {
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let last = (rows - 1)
        .checked_mul(row_stride)
        .zip((cols - 1).checked_mul(col_stride))
        .and_then(|(r, c)| r.checked_add(c)?.checked_add(1))
        .filter(|&n| n <= isize::MAX as usize);
    match last {
        None => Err(Error::Overflow { arg: "rows * row_stride + cols * col_stride" }),
        Some(min) if len < min => Err(Error::TooSmall { arg: "data.len()", min, actual: len }),
        Some(_) => Ok(()),
    }
}

impl<'a> Strided<'a> {
    /// Element `(i, j)` is `data[i * row_stride + j * col_stride]`; `Strided::new(d, k, n, 1, k)` is a transpose.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if `data` is too short, [`Error::Overflow`].
    pub fn new(
        data: &'a [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self, Error> {
        check(data.len(), rows, cols, row_stride, col_stride)?;
        Ok(Strided { data, rows, cols, row_stride, col_stride })
    }
}

impl<'a> StridedMut<'a> {
    /// Element `(i, j)` is `data[i * row_stride + j * col_stride]`.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if `data` is too short or the strides make elements share a place, [`Error::Overflow`].
    pub fn new(
        data: &'a mut [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self, Error> {
        check(data.len(), rows, cols, row_stride, col_stride)?;
        if rows == 0 || cols == 0 {
            return Ok(StridedMut { data, rows, cols, row_stride, col_stride });
        }
        // Apart if one dimension's steps are longer than the whole of the other.
        let (inner, n, outer, m, arg) = if row_stride >= col_stride {
            (col_stride, cols, row_stride, rows, "row_stride")
        } else {
            (row_stride, rows, col_stride, cols, "col_stride")
        };
        if n > 1 && inner == 0 {
            return Err(Error::TooSmall { arg: "strides", min: 1, actual: 0 });
        }
        let min = (n - 1) * inner + 1;
        if m > 1 && outer < min {
            return Err(Error::TooSmall { arg, min, actual: outer });
        }
        Ok(StridedMut { data, rows, cols, row_stride, col_stride })
    }
}

/// `c = a * b` for operands that are not packed: `a` is `[m, k]`, `b` is `[k, n]`, `c` is `[m, n]`, with any strides.
///
/// For weights that are used more than once, [`Linear`](crate::Linear) on a [`PackedMatrix`](crate::PackedMatrix)
/// is faster. This product runs on the calling thread and is outside the promise of equal bits; its error is that of
/// a sum of `k` products in f32. NaN and infinities follow IEEE 754; with `k == 0` the result is zero.
///
/// # Errors
/// [`Error::Size`] if the shapes disagree.
///
/// ```
/// use laneformer::gemm::{Strided, StridedMut, matmul};
/// let (a, mut c) = ([1.0, 2.0, 3.0, 4.0], [0.0; 4]);
/// let transposed = Strided::new(&a, 2, 2, 1, 2)?;
/// matmul(Strided::new(&a, 2, 2, 2, 1)?, transposed, StridedMut::new(&mut c, 2, 2, 2, 1)?)?;
/// assert_eq!(c, [5.0, 11.0, 11.0, 25.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
pub fn matmul(a: Strided<'_>, b: Strided<'_>, c: StridedMut<'_>) -> Result<(), Error> {
    check_size("b.rows", a.cols, b.rows)?;
    check_size("c.rows", a.rows, c.rows)?;
    check_size("c.cols", b.cols, c.cols)?;
    let stride = |s: usize| s as isize;
    // SAFETY: `check` proved every element of the three matrices inside its slice and every stride in use within `isize`;
    // `c` is borrowed exclusively and its elements are apart (`StridedMut::new`).
    unsafe {
        matrixmultiply::sgemm(
            a.rows,
            a.cols,
            b.cols,
            1.0,
            a.data.as_ptr(),
            stride(a.row_stride),
            stride(a.col_stride),
            b.data.as_ptr(),
            stride(b.row_stride),
            stride(b.col_stride),
            0.0,
            c.data.as_mut_ptr(),
            stride(c.row_stride),
            stride(c.col_stride),
        );
    }
    Ok(())
}
