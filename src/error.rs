//! The one error type: it names the argument, what was expected and what came.

use core::fmt;

/// Why a call was refused. Every variant carries the argument and the values; nothing was computed or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A size differs from the one that the other arguments imply.
    Size {
        /// The argument, and the dimension where it has several: `"gain.len()"`, `"x.cols"`.
        arg: &'static str,
        /// The size that fits.
        expected: usize,
        /// The size that came.
        actual: usize,
    },
    /// A size, stride, index or count is below the smallest that works.
    TooSmall {
        /// The argument.
        arg: &'static str,
        /// The smallest value that works.
        min: usize,
        /// The value that came.
        actual: usize,
    },
    /// A size, index or count is above the largest that works.
    TooLarge {
        /// The argument.
        arg: &'static str,
        /// The largest value that works.
        max: usize,
        /// The value that came.
        actual: usize,
    },
    /// A model dimension is zero.
    ZeroDim {
        /// The dimension.
        arg: &'static str,
    },
    /// One size must be a multiple of another.
    NotDivisible {
        /// The size that was to be divided.
        arg: &'static str,
        /// Its value.
        actual: usize,
        /// The divisor.
        by: usize,
    },
    /// A list that must not decrease does so.
    NotAscending {
        /// The list.
        arg: &'static str,
        /// The index of the first entry that is below its predecessor.
        at: usize,
    },
    /// An argument that this call needs is missing, or one is given that it cannot use.
    Mismatch {
        /// The argument.
        arg: &'static str,
        /// What was expected of it.
        expected: &'static str,
    },
    /// A size in elements or bytes does not fit into `usize`.
    Overflow {
        /// The argument.
        arg: &'static str,
    },
    /// The CPU, or this build, lacks the instruction set.
    UnsupportedIsa {
        /// Its name.
        name: &'static str,
    },
    /// No instruction set has this name; the known ones are in [`Isa::NAMES`](crate::Isa::NAMES).
    UnknownIsa,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Size { arg, expected, actual } => write!(f, "{arg}: expected {expected}, got {actual}"),
            Self::TooSmall { arg, min, actual } => write!(f, "{arg}: expected at least {min}, got {actual}"),
            Self::TooLarge { arg, max, actual } => write!(f, "{arg}: expected at most {max}, got {actual}"),
            Self::ZeroDim { arg } => write!(f, "{arg}: expected a dimension of at least 1, got 0"),
            Self::NotDivisible { arg, actual, by } => {
                write!(f, "{arg}: expected a multiple of {by}, got {actual}")
            }
            Self::NotAscending { arg, at } => {
                write!(f, "{arg}: expected an ascending list, entry {at} is below its predecessor")
            }
            Self::Mismatch { arg, expected } => write!(f, "{arg}: expected {expected}"),
            Self::Overflow { arg } => write!(f, "{arg}: the size does not fit into the address space"),
            Self::UnsupportedIsa { name } => write!(f, "isa: this CPU or build does not have {name}"),
            Self::UnknownIsa => {
                write!(f, "isa: unknown name, expected one of {}", crate::Isa::NAMES.join(", "))
            }
        }
    }
}

impl core::error::Error for Error {}

/// `actual == expected`, or the [`Error::Size`] that says so.
pub(crate) fn check_size(arg: &'static str, expected: usize, actual: usize) -> Result<(), Error> {
    if actual == expected { Ok(()) } else { Err(Error::Size { arg, expected, actual }) }
}

/// `actual > 0`, or [`Error::ZeroDim`].
pub(crate) fn check_dim(arg: &'static str, actual: usize) -> Result<(), Error> {
    if actual > 0 { Ok(()) } else { Err(Error::ZeroDim { arg }) }
}

/// The largest allocation that the language has, less what huge pages need at its begin and end.
const MAX_BYTES: usize = isize::MAX as usize - (4 << 20);

/// The product of sizes, in `f32` elements that can be allocated.
pub(crate) fn checked_product(arg: &'static str, sizes: &[usize]) -> Result<usize, Error> {
    sizes
        .iter()
        .try_fold(1_usize, |n, &size| n.checked_mul(size))
        .filter(|&n| n <= MAX_BYTES / size_of::<f32>())
        .ok_or(Error::Overflow { arg })
}
