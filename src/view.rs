//! Matrices as borrowed slices with a row stride: the only code that turns slices into two dimensions.
//!
//! All sizes and strides are in elements. Padding between rows is neither read nor written.

#![allow(unsafe_code, reason = "a matrix is cut into disjoint blocks here, which slices cannot express")]

use core::marker::PhantomData;
use core::ops::Range;

use crate::error::Error;

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) -> Result<(), Error> {
    if row_stride < cols {
        return Err(Error::TooSmall { arg: "row_stride", min: cols, actual: row_stride });
    }
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let needed = (rows - 1).checked_mul(row_stride).and_then(|n| n.checked_add(cols));
    match needed {
        None => Err(Error::Overflow { arg: "rows * row_stride" }),
        Some(min) if len < min => Err(Error::TooSmall { arg: "data.len()", min, actual: len }),
        Some(_) => Ok(()),
    }
}

/// A read-only matrix: `rows` rows of `cols` elements, `row_stride` elements apart.
///
/// ```
/// let data = [1.0, 2.0, 0.0, 3.0, 4.0];
/// let m = laneformer::MatRef::new(&data, 2, 2, 3)?;
/// assert_eq!(m.row(1), [3.0, 4.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    // A pointer, not a slice, for the same reason as in `MatMut`.
    ptr: *const f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    life: PhantomData<&'a [f32]>,
}

// SAFETY: a `MatRef` is a shared borrow of its elements, like `&[f32]`, which is `Send`.
unsafe impl Send for MatRef<'_> {}
// SAFETY: as above; `&[f32]` is `Sync`.
unsafe impl Sync for MatRef<'_> {}

impl<'a> MatRef<'a> {
    /// A view of `data`, which holds at least `(rows - 1) * row_stride + cols` elements.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if `row_stride < cols` or `data` is too short, [`Error::Overflow`].
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Result<Self, Error> {
        check(data.len(), rows, cols, row_stride)?;
        Ok(MatRef { ptr: data.as_ptr(), rows, cols, row_stride, life: PhantomData })
    }

    /// A view of rows that follow one another without padding.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if `data` is too short, [`Error::Overflow`].
    pub fn contiguous(data: &'a [f32], rows: usize, cols: usize) -> Result<Self, Error> {
        Self::new(data, rows, cols, cols)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Distance of two rows in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If `i >= rows`, as indexing does.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.rows);
        if self.cols == 0 {
            return &[];
        }
        // SAFETY: row `i` is inside the borrow (checked by `new`, `i` above).
        unsafe { core::slice::from_raw_parts(self.ptr.add(i * self.row_stride), self.cols) }
    }

    /// The first element, for the microkernel.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *const f32 {
        self.ptr
    }

    /// The block of `rows` and `cols`.
    #[inline(always)]
    pub(crate) fn block(&self, rows: Range<usize>, cols: Range<usize>) -> MatRef<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        let empty = rows.is_empty() || cols.is_empty();
        let offset = if empty { 0 } else { rows.start * self.row_stride + cols.start };
        // SAFETY: a non-empty block starts inside the borrow; an empty one keeps the start.
        let ptr = unsafe { self.ptr.add(offset) };
        MatRef { ptr, rows: rows.len(), cols: cols.len(), row_stride: self.row_stride, life: PhantomData }
    }

    /// Its only row, cut into rows of `cols`.
    #[inline(always)]
    pub(crate) fn cut(&self, cols: usize) -> MatRef<'a> {
        assert!(self.rows == 1 && self.cols.is_multiple_of(cols));
        MatRef { rows: self.cols / cols, cols, row_stride: cols, ..*self }
    }
}

/// A matrix that is written: `rows` rows of `cols` elements, `row_stride` elements apart.
#[derive(Debug)]
pub struct MatMut<'a> {
    // A pointer, not a slice: blocks of one matrix interleave in memory, so two of them that are
    // alive at once may only cover their own elements.
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatMut` is the exclusive borrow of its elements, like `&mut [f32]`, which is `Send`.
unsafe impl Send for MatMut<'_> {}
// SAFETY: a shared `MatMut` only lends shared borrows of its elements, like `&&mut [f32]`, which is `Sync`.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// A view of `data`, which holds at least `(rows - 1) * row_stride + cols` elements.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if `row_stride < cols` or `data` is too short, [`Error::Overflow`].
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Result<Self, Error> {
        check(data.len(), rows, cols, row_stride)?;
        Ok(MatMut { ptr: data.as_mut_ptr(), rows, cols, row_stride, life: PhantomData })
    }

    /// A view of rows that follow one another without padding.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if `data` is too short, [`Error::Overflow`].
    pub fn contiguous(data: &'a mut [f32], rows: usize, cols: usize) -> Result<Self, Error> {
        Self::new(data, rows, cols, cols)
    }

    /// A view of scratch that the caller has sized.
    #[inline(always)]
    pub(crate) fn scratch(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(row_stride >= cols && data.len() >= rows.saturating_mul(row_stride));
        MatMut { ptr: data.as_mut_ptr(), rows, cols, row_stride, life: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Distance of two rows in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If `i >= rows`, as indexing does.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &[f32] {
        assert!(i < self.rows);
        if self.cols == 0 {
            return &[];
        }
        // SAFETY: row `i` is inside the borrow (checked by `new`, `i` above), which `self` lends shared.
        unsafe { core::slice::from_raw_parts(self.ptr.add(i * self.row_stride), self.cols) }
    }

    /// Row `i`, to be written.
    ///
    /// # Panics
    /// If `i >= rows`, as indexing does.
    #[inline(always)]
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows);
        if self.cols == 0 {
            return &mut [];
        }
        // SAFETY: row `i` is inside the borrow (checked by `new`, `i` above), which `self` lends exclusively.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.add(i * self.row_stride), self.cols) }
    }

    /// Different rows, to be written; of `None` an empty one.
    ///
    /// # Panics
    /// If two are the same, or one is not here.
    #[inline(always)]
    pub(crate) fn rows_mut(&mut self, rows: [Option<usize>; 3]) -> [&mut [f32]; 3] {
        let [a, b, c] = rows;
        assert!((a.is_none() || (a != b && a != c)) && (b.is_none() || b != c));
        rows.map(
            #[inline(always)]
            |row| {
                let Some(i) = row else { return &mut [][..] };
                assert!(i < self.rows);
                if self.cols == 0 {
                    return &mut [][..];
                }
                // SAFETY: the rows are inside the borrow, which `self` lends exclusively; different rows do not overlap, as the stride is at
                // least the columns.
                unsafe { core::slice::from_raw_parts_mut(self.ptr.add(i * self.row_stride), self.cols) }
            },
        )
    }

    /// The same matrix for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { life: PhantomData, ..*self }
    }

    /// The block of `rows` and `cols`, borrowed from this matrix.
    #[inline(always)]
    pub(crate) fn block(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        // SAFETY: `self` is borrowed exclusively for as long as the block lives, so there is no other.
        unsafe { self.block_unchecked(rows, cols) }
    }

    /// The block of `rows` and `cols`, its borrow not tied to this one's.
    ///
    /// # Safety
    /// Blocks that are alive at the same time must not overlap, nor may this matrix be used otherwise.
    #[inline(always)]
    pub(crate) unsafe fn block_unchecked<'b>(&self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'b>
    where
        'a: 'b,
    {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        let empty = rows.is_empty() || cols.is_empty();
        let offset = if empty { 0 } else { rows.start * self.row_stride + cols.start };
        // SAFETY: a non-empty block starts inside the borrow; an empty one keeps the start.
        let ptr = unsafe { self.ptr.add(offset) };
        MatMut { ptr, rows: rows.len(), cols: cols.len(), row_stride: self.row_stride, life: PhantomData }
    }

    /// This matrix, read-only for a shorter time.
    #[inline(always)]
    pub fn as_ref(&self) -> MatRef<'_> {
        let MatMut { ptr, rows, cols, row_stride, .. } = *self;
        MatRef { ptr, rows, cols, row_stride, life: PhantomData }
    }

    /// The first element, for the microkernel.
    #[inline(always)]
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.ptr
    }

    /// This matrix, read-only for the rest of its borrow.
    pub(crate) fn into_ref(self) -> MatRef<'a> {
        let MatMut { ptr, rows, cols, row_stride, .. } = self;
        MatRef { ptr, rows, cols, row_stride, life: PhantomData }
    }
}

/// Blocks of two matrices each, which have a row for each of some heads. Blocks follow one another in groups, and in a group all of its first
/// matrices stand before the second ones, row by row: `[first or second][row][block]`.
///
/// Like a matrix it is cut into disjoint parts, by blocks and by rows.
#[derive(Debug)]
pub(crate) struct BlocksMut<'a> {
    ptr: *mut f32,
    /// The first block of each group, and the end.
    groups: &'a [usize],
    /// Rows of every block.
    all_rows: usize,
    /// Columns of its two matrices.
    cols: [usize; 2],
    /// What this part has of the blocks and of their rows.
    blocks: Range<usize>,
    rows: Range<usize>,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: as a `MatMut`, it is the exclusive borrow of its elements.
unsafe impl Send for BlocksMut<'_> {}
// SAFETY: nothing is read through a shared one.
unsafe impl Sync for BlocksMut<'_> {}

impl<'a> BlocksMut<'a> {
    /// All blocks of `data`, which begins with the first: `groups` are the first blocks of each group, ascending from 0, and the end.
    pub(crate) fn new(data: &'a mut [f32], groups: &'a [usize], rows: usize, cols: [usize; 2]) -> Self {
        let end = groups.last().copied().unwrap_or(0);
        assert!(groups.is_sorted() && groups.first() == Some(&0) && rows > 0);
        assert!(end.saturating_mul(rows).saturating_mul(cols[0] + cols[1]) <= data.len());
        let ptr = data.as_mut_ptr();
        BlocksMut { ptr, groups, all_rows: rows, cols, blocks: 0..end, rows: 0..rows, life: PhantomData }
    }

    /// Number of blocks.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The two matrices of block `i`.
    #[inline(always)]
    pub(crate) fn block(&mut self, i: usize) -> [MatMut<'_>; 2] {
        assert!(i < self.blocks.len());
        let block = self.blocks.start + i;
        let group = self.groups.partition_point(|&first| first <= block);
        let (first, end) = (self.groups[group - 1], self.groups[group]);
        let ([a, b], n) = (self.cols, end - first);
        let start = first * self.all_rows * (a + b);
        let matrix = |start: usize, cols: usize| {
            let row_stride = n * cols;
            // SAFETY: the group is inside the borrow (checked by `new`), and in it this part's rows of the first matrices or of the second. Nothing
            // else has them: other rows are a stride away, other groups stand elsewhere, and in a row each block has its place.
            let ptr = unsafe { self.ptr.add(start + self.rows.start * row_stride + (block - first) * cols) };
            MatMut { ptr, rows: self.rows.len(), cols, row_stride, life: PhantomData }
        };
        [matrix(start, a), matrix(start + self.all_rows * n * a, b)]
    }

    /// Some of the blocks and of their rows, the borrow not tied to this one's.
    ///
    /// # Safety
    /// Parts that are alive at the same time must not overlap, nor may this one be used otherwise.
    #[inline(always)]
    pub(crate) unsafe fn part_unchecked<'b>(&self, blocks: Range<usize>, rows: Range<usize>) -> BlocksMut<'b>
    where
        'a: 'b,
    {
        assert!(blocks.start <= blocks.end && blocks.end <= self.blocks.len());
        assert!(rows.start < rows.end && rows.end <= self.rows.len());
        let (first, row) = (self.blocks.start, self.rows.start);
        let (blocks, rows) = (first + blocks.start..first + blocks.end, row + rows.start..row + rows.end);
        let BlocksMut { ptr, groups, all_rows, cols, .. } = *self;
        BlocksMut { ptr, groups, all_rows, cols, blocks, rows, life: PhantomData }
    }
}
