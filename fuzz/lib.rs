//! What the fuzz targets share: values with many special ones, guarded matrices, comparisons.
//!
//! Each target runs one operation on every instruction set of the CPU, compares it with the f64 reference, and those inside the
//! promise with one another in bits. An error is an answer; a panic, a wrong value or a write outside the matrix is a find.

use arbitrary::{Arbitrary, Result, Unstructured};
use laneformer::{Context, Isa, Rayon, Serial};

#[path = "../tests/common/buffer.rs"]
mod buffer;
#[path = "../tests/common/data.rs"]
pub mod data;
#[path = "../tests/common/model.rs"]
pub mod model;

pub use buffer::Guarded;

/// Values of a size that operations do not overflow on, and now and then one that is special.
#[derive(Debug)]
pub struct Values {
    state: u64,
    size: f32,
    /// One value in so many is special; none if 0.
    specials: u64,
}

impl<'a> Arbitrary<'a> for Values {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Values> {
        let size = *u.choose(&[1.0, 1e-3, 30.0, 1e4])?;
        let specials = *u.choose(&[0, 0, 3, 40, 1000])?;
        Ok(Values { state: u.arbitrary::<u64>()? | 1, size, specials })
    }
}

const SPECIAL: [f32; 10] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NEG_INFINITY,
    0.0,
    -0.0,
    f32::MIN_POSITIVE,
    -1e-45,
    f32::EPSILON,
    1.0,
];

impl Values {
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    /// The next values.
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        let mut value = || {
            let bits = self.next();
            if self.specials > 0 && bits % self.specials == 0 {
                return SPECIAL[(bits >> 32) as usize % SPECIAL.len()];
            }
            ((bits >> 40) as f32 / (1_u64 << 23) as f32 - 1.0) * self.size
        };
        (0..len).map(|_| value()).collect()
    }

    /// The largest finite magnitude that [`take`](Self::take) gives.
    pub fn size(&self) -> f64 {
        f64::from(self.size.max(1.0))
    }
}

/// A matrix of `values` whose rows are `padding` elements apart, with canaries around and between them.
pub fn guarded(rows: usize, cols: usize, padding: u8, values: &[f32]) -> Guarded {
    Guarded::with_stride(rows, cols, cols + usize::from(padding % 20), values)
}

/// Runs `f` on every instruction set, on this thread and with helpers; those inside the promise give the same bits, and all are within
/// `limit(index, expected)` of the reference, the others within four times that.
pub fn everywhere(expected: &[f64], limit: impl Fn(usize, f64) -> f64, f: impl Fn(Context<'_>) -> Vec<f32>) {
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        let actual = f(Context::new(isa, &Serial));
        assert_eq!(actual.len(), expected.len());
        for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
            let slack = if isa.keeps_bits() { 1.0 } else { 4.0 };
            let wide = f64::from(a);
            let same = (a.is_nan() && e.is_nan()) || wide == e;
            assert!(
                same || (wide - e).abs() <= limit(i, e) * slack,
                "{isa}: element {i} is {a:e}, not {e:e}"
            );
        }
        let together = f(Context::new(isa, &Rayon));
        assert_same(&together, &actual, isa.name());
        if isa.keeps_bits() {
            assert_same(&actual, first.get_or_insert_with(|| actual.clone()), isa.name());
        }
    }
}

/// The same bits, or both NaN.
pub fn assert_same(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, b)) in actual.iter().zip(expected).enumerate() {
        let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(same, "{what}: element {i} is {a:e}, and {b:e} elsewhere");
    }
}
