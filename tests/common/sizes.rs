//! Edge sizes, each with its reason.

/// Columns of row operations: one, whole vectors of 16 lanes, whole groups of 64 slots, and both with a lane more or less; primes.
pub const COLS: &[usize] = &[1, 2, 3, 7, 15, 16, 17, 31, 47, 63, 64, 65, 127, 128, 129, 193, 1031];

/// Rows: none, one, a few; a group of four that go through a pass together, one more, and a third group.
pub const ROWS: &[usize] = &[0, 1, 3, 4, 5, 9];

/// Rows of a product: microkernels have 3, 4 or 6 rows, tiles 96.
pub const GEMM_M: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7, 13, 97];

/// Outputs: vectors of 16 and panels of 64 columns.
pub const GEMM_N: &[usize] = &[1, 15, 16, 17, 63, 64, 65, 131];

/// Inputs: nearly none, and the canonical block of 512, which is where partial sums are added.
pub const GEMM_K: &[usize] = &[1, 2, 31, 511, 512, 513, 1031];

/// Tokens of a segment: blocks of 64 keys, chunks of 256, and a vector's tail.
pub const SEGMENTS: &[usize] = &[1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256, 257];

/// Widths of a head: less than a vector, a vector and its neighbours, the usual 64 and what is not a multiple of anything.
pub const HEAD_DIMS: &[usize] = &[1, 8, 15, 16, 17, 41, 64, 65];
