//! Matrices whose surroundings are watched.

use laneformer::{MatMut, MatRef};

/// A NaN that no operation makes: a read of the padding poisons the result, a write to it is seen.
const CANARY: u32 = 0x7FC5_A5A5;
/// Canaries before and after the matrix: a prime, so that its rows start at odd places, and wider than any vector.
const MARGIN: usize = 67;

/// A matrix with canaries around and between its rows; if not told otherwise, its row stride is a prime above its width.
pub struct Guarded {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Guarded {
    /// The rows of `values`, which follow one another there.
    pub fn new(rows: usize, cols: usize, values: &[f32]) -> Guarded {
        Guarded::with_stride(rows, cols, prime_above(cols), values)
    }

    /// The same with another row stride.
    pub fn with_stride(rows: usize, cols: usize, stride: usize, values: &[f32]) -> Guarded {
        assert_eq!(values.len(), rows * cols);
        let mut data = vec![f32::from_bits(CANARY); 2 * MARGIN + rows * stride];
        for i in 0..rows {
            data[MARGIN + i * stride..][..cols].copy_from_slice(&values[i * cols..][..cols]);
        }
        Guarded { data, rows, cols, stride }
    }

    /// A matrix for results: whatever is not written stays a canary.
    pub fn unset(rows: usize, cols: usize) -> Guarded {
        Guarded::new(rows, cols, &vec![f32::from_bits(CANARY); rows * cols])
    }

    /// The view ends with the last row's last element.
    fn span(&self) -> std::ops::Range<usize> {
        let len = if self.rows == 0 { 0 } else { (self.rows - 1) * self.stride + self.cols };
        MARGIN..MARGIN + len
    }

    pub fn view(&self) -> MatRef<'_> {
        MatRef::new(&self.data[self.span()], self.rows, self.cols, self.stride).unwrap()
    }

    pub fn view_mut(&mut self) -> MatMut<'_> {
        let span = self.span();
        MatMut::new(&mut self.data[span], self.rows, self.cols, self.stride).unwrap()
    }

    /// The rows, one after another, once the canaries have been counted.
    #[track_caller]
    pub fn values(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.rows * self.cols);
        for (i, x) in self.data.iter().enumerate() {
            let place = i.wrapping_sub(MARGIN);
            if place < self.rows * self.stride && place % self.stride < self.cols {
                values.push(*x);
            } else {
                assert_eq!(x.to_bits(), CANARY, "element {i} outside the matrix was written");
            }
        }
        values
    }

    /// Nothing was written at all: neither around the matrix nor inside it.
    #[track_caller]
    pub fn assert_unset(&self) {
        for (i, x) in self.data.iter().enumerate() {
            assert_eq!(x.to_bits(), CANARY, "element {i} was written");
        }
    }
}

fn prime_above(n: usize) -> usize {
    let is_prime = |n: &usize| *n > 1 && (2..).take_while(|d| d * d <= *n).all(|d| !n.is_multiple_of(d));
    (n + 1..).find(is_prime).unwrap()
}
