//! The microkernel: a tile of MR rows by NV vectors whose accumulators stay in registers.
//!
//! Per step of K it loads NV vectors of the panel and broadcasts one element of each row. With 6 x 4 that is 24 fused
//! multiply-adds against 10 loads, so the multipliers are the bound as long as the panel streams from L2
//! (256 bytes in 24 cycles on Zen 4, in 12 on Zen 5). Rows of A are read in place: six of them cannot fill an 8-way L1 set
//! even when they are 4 KiB apart. A broadcast is used NV times, so folding it into the multiply-adds
//! (`{1to16}`) would only cost load slots. Where tiles are narrower than the panel (6 x 1 on AVX2: 12 multiply-adds against 8 loads in
//! six cycles), the rows of a tile pass through all of it before the next do, and stay in L1 meanwhile.

#![allow(
    unsafe_code,
    reason = "the microkernel reads panels and rows through pointers checked once per product"
)]

use crate::isa::waits_for_few_lines;
use crate::simd::{LANES, Simd, Vector};
use crate::view::{MatMut, MatRef};

/// How a product meets what is in C.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// `C = chain from +0`.
    Zero,
    /// The chain goes on from C: the same bits as one longer product.
    Continue,
    /// `C = C + chain from +0`: the next canonical block of K.
    Add,
}

/// `c (start) a * b`, the rows of `b` a stride apart. Columns come in whole vectors: `c.cols()` is a multiple of 16 and every row of `b` has
/// that many readable elements.
///
/// Meanwhile `next`, what is read after it, is brought closer, evenly over the steps of K and at most a line per step: a core drops
/// prefetches that it has no room for. Without them the first tile of a block waits for the last cache, or for memory, at every step.
///
/// No vector code of its own, so it needs no feature frame and is compiled once per instruction set.
pub(crate) fn product<S: Simd>(
    s: S,
    a: MatRef<'_>,
    (b, b_stride): (&[f32], usize),
    start: Start,
    c: &mut MatMut<'_>,
    next: [&[f32]; 2],
) {
    let (rows, k, cols) = (a.rows(), a.cols(), c.cols());
    assert!(c.rows() == rows && cols % LANES == 0 && cols <= b_stride);
    // Saturated it is longer than any slice.
    assert!(k > 0 && b.len() >= (k - 1).saturating_mul(b_stride).saturating_add(cols));
    let (a_stride, c_stride) = (a.row_stride(), c.row_stride());
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    let lines = (next[0].len() + next[1].len()) / LANES;
    // Divisors that the compiler knows: a product of scores takes but a few thousand cycles.
    let (row_tiles, col_tiles, nv) = if is_tall::<S>(rows, k, lines) {
        (rows.div_ceil(TALL.0), (cols / LANES).div_ceil(TALL.1), TALL.1)
    } else if is_wide::<S>(rows) {
        (rows.div_ceil(WIDE.0), (cols / LANES).div_ceil(WIDE.1), WIDE.1)
    } else {
        (rows.div_ceil(S::MR), (cols / LANES).div_ceil(S::NV), S::NV)
    };
    if rows <= S::MR && col_tiles == 1 {
        // Few rows and all columns: the lines stream past, and what is fetched, if anything, are the next of them. With loads of whole lines one row
        // asks for so many that L1 has no room left for what the hardware foresees. With halves it reads memory 4 to 5 % faster, and the caches as fast.
        let to_l2 = waits_for_few_lines();
        let reads_narrow = rows == 1 && to_l2;
        let (line, step, every) = if !reads_narrow && to_l2 && is_short(rows, nv) {
            (b.wrapping_add(STREAM_AHEAD), b_stride, 1)
        } else {
            (a, 0, GROUP)
        };
        let ahead = Ahead { line, step, every, to_l2 };
        let height = if is_wide::<S>(rows) { WIDE.0 } else { rows.max(1) };
        for row in (0..rows).step_by(height) {
            // SAFETY: the rows and all columns of the matrices, whose extents were checked above.
            unsafe {
                let (a, c) = (a.add(row * a_stride), c.add(row * c_stride));
                let tile = Tile { k, a, a_stride, b, b_stride, c, c_stride, start, ahead };
                if reads_narrow {
                    pick(s.narrow(), height, cols / LANES, &tile);
                } else {
                    pick(s, height, cols / LANES, &tile);
                }
            }
        }
        return;
    }
    // Spread evenly, but a line per step at most. Few lines wait for groups of steps: to ask for the same one again takes a load.
    let steps = row_tiles * col_tiles * k;
    let every = if GROUP * lines <= steps { GROUP } else { 1 };
    let next_step = if lines < steps { (every * lines * LANES).div_ceil(steps) } else { LANES };
    let to_l2 = waits_for_few_lines();
    let mut ahead = next.into_iter().flat_map(|lines| lines.chunks((k.div_ceil(every) * next_step).max(1)));
    let mut row = 0;
    // Balanced: 7 rows are 4 + 3, not 6 + 1, which would leave a tile bound by its loads.
    for tiles_left in (1..=row_tiles).rev() {
        let height = (rows - row).div_ceil(tiles_left);
        let mut col = 0;
        while col < cols {
            let vectors = ((cols - col) / LANES).min(nv);
            // SAFETY: the tile of `height` rows from `row` and `vectors` vectors from `col` is inside the matrices, whose
            // extents were checked above.
            let (a, b, c) = unsafe { (a.add(row * a_stride), b.add(col), c.add(row * c_stride + col)) };
            let (line, step, every) = match ahead.next() {
                Some(lines) => (lines.as_ptr(), next_step, every),
                // Nothing left to fetch: a line that is there. An unmapped address would cost a page walk at every step.
                None => (a, 0, GROUP),
            };
            let ahead = Ahead { line, step, every, to_l2 };
            let tile = Tile { k, a, a_stride, b, b_stride, c, c_stride, start, ahead };
            // SAFETY: as above.
            unsafe { pick(s, height, vectors, &tile) };
            col += vectors * LANES;
        }
        row += height;
    }
}

/// How far ahead one line of each step is fetched to L2 where lines stream past: two pages. The hardware foresees the others, but stops at the
/// end of a page, and while nothing is read, as between two chunks of attention.
const STREAM_AHEAD: usize = 8192 / size_of::<f32>();

/// Whether the steps of a tile are so short that lines fetched at each of them are more than L1 waits for at a time.
const fn is_short(mr: usize, nv: usize) -> bool {
    mr * nv <= 16
}

/// Rows and vectors of a tall tile.
const TALL: (usize, usize) = (8, 2);

/// Whether tiles are tall instead of wide.
///
/// Three tiles of 5 or 6 rows have steps for three quarters of the lines that follow, four of 8 rows and half the width for all of them: with 16
/// rows and weights from memory a quarter faster, from L2 as fast. Short chains (scores) would pay for one more begin and end.
#[inline(always)]
fn is_tall<S: Simd>(rows: usize, k: usize, lines: usize) -> bool {
    has_tall::<S>() && rows > 2 * S::MR && rows <= 2 * TALL.0 && k >= 256 && lines > 3 * k
}

/// Rows and vectors of a wide tile.
const WIDE: (usize, usize) = (1, 4);

/// Whether tiles are wide, where others have less than the width of a panel: fewer than four rows by one vector have too few accumulators to
/// hide the latency of a multiply-add, and walk through the panel in quarters. A row from end to end is three times as fast, from memory and from
/// the caches.
#[inline(always)]
fn is_wide<S: Simd>(rows: usize) -> bool {
    has_wide::<S>() && rows < 4
}

/// Whether there are registers for a tall tile.
const fn has_tall<S: Simd>() -> bool {
    TALL.0 * TALL.1 <= S::MR * S::NV
}

/// Whether there are registers for a wide tile, and use.
const fn has_wide<S: Simd>() -> bool {
    S::NV < WIDE.1 && WIDE.0 * WIDE.1 <= S::MR * S::NV
}

/// Whether a tile of this size is ever asked for.
const fn has_instance<S: Simd>(mr: usize, nv: usize) -> bool {
    (mr <= S::MR && nv <= S::NV)
        || (has_tall::<S>() && mr <= TALL.0 && nv <= TALL.1)
        || (has_wide::<S>() && mr <= WIDE.0 && nv <= WIDE.1)
}

/// The operands of one tile.
struct Tile {
    k: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    start: Start,
    ahead: Ahead,
}

/// What a tile fetches for those after it: `step` elements further each time, nothing new if that is 0.
#[derive(Clone, Copy)]
struct Ahead {
    line: *const f32,
    step: usize,
    /// Steps of K from one time to the next: 1 or [`GROUP`].
    every: usize,
    /// If steps are short: the lines are more than L1 waits for at a time.
    to_l2: bool,
}

impl Ahead {
    #[inline(always)]
    fn fetch<S: Simd>(&mut self, s: S, to_l2: bool) {
        if to_l2 {
            s.prefetch_to_l2(self.line);
        } else {
            s.prefetch(self.line);
        }
        self.line = self.line.wrapping_add(self.step);
    }
}

/// Steps of K that are one turn of the loop, where lines are few. A step of AVX2 is 12 multiply-adds and 8 loads in six cycles, which leaves little room
/// to walk and to fetch: once for four steps, products of 24 rows and more are 2 to 3 % faster. Those of AVX-512 are as fast as they were.
const GROUP: usize = 4;

/// Runs the instance for `height` rows and `vectors` vectors.
///
/// # Safety
/// The tile's extents are inside its operands.
unsafe fn pick<S: Simd>(s: S, height: usize, vectors: usize, tile: &Tile) {
    macro_rules! instances {
        ($(($mr:literal, $nv:literal))*) => {
            match (height, vectors) {
                // An instance that this instruction set never asks for is not compiled.
                $(($mr, $nv) if const { has_instance::<S>($mr, $nv) } => {
                    // A call of its own, so that the tile has the registers for itself.
                    // SAFETY: the caller's promise.
                    s.vectorize(#[inline(always)] || unsafe { run::<S, $mr, $nv>(s, tile) })
                })*
                _ => unreachable!("a tile of {height} rows and {vectors} vectors"),
            }
        };
    }
    instances! {
        (6, 4) (5, 4) (4, 4) (3, 4) (2, 4) (1, 4)
        (6, 3) (5, 3) (4, 3) (3, 3) (2, 3) (1, 3)
        (8, 2) (7, 2) (6, 2) (5, 2) (4, 2) (3, 2) (2, 2) (1, 2)
        (8, 1) (7, 1) (6, 1) (5, 1) (4, 1) (3, 1) (2, 1) (1, 1)
    }
}

/// # Safety
/// `MR` rows of `k` elements at `a`, `k` rows of `NV` vectors at `b`, and `MR` rows of `NV` vectors at `c` are valid.
#[inline(always)]
unsafe fn run<S: Simd, const MR: usize, const NV: usize>(s: S, tile: &Tile) {
    let Tile { k, mut a, a_stride, mut b, b_stride, c, c_stride, start, mut ahead } = *tile;
    let to_l2 = is_short(MR, NV) && ahead.to_l2;
    let mut acc = [[s.splat(0.0); NV]; MR];
    // SAFETY: the caller's promise covers every access below.
    unsafe {
        if start == Start::Continue {
            for (i, row) in acc.iter_mut().enumerate() {
                for (j, v) in row.iter_mut().enumerate() {
                    *v = s.load_ptr(c.add(i * c_stride + j * LANES));
                }
            }
        }
        let groups = if ahead.every == GROUP { k / GROUP } else { 0 };
        for _ in 0..groups {
            // Not a loop: the compiler must not keep one, which would keep the accumulators in memory.
            step(s, &mut acc, (&mut a, a_stride), (&mut b, b_stride));
            step(s, &mut acc, (&mut a, a_stride), (&mut b, b_stride));
            step(s, &mut acc, (&mut a, a_stride), (&mut b, b_stride));
            step(s, &mut acc, (&mut a, a_stride), (&mut b, b_stride));
            ahead.fetch(s, to_l2);
        }
        for _ in groups * GROUP..k {
            step(s, &mut acc, (&mut a, a_stride), (&mut b, b_stride));
            ahead.fetch(s, to_l2);
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, &v) in row.iter().enumerate() {
                let out = c.add(i * c_stride + j * LANES);
                let v = if start == Start::Add { s.load_ptr(out) + v } else { v };
                v.store_ptr(out);
            }
        }
    }
}

/// One step of K, from `a` and `b` to the next.
///
/// # Safety
/// `MR` elements at `a`, a stride apart, and `NV` vectors at `b` are valid.
#[inline(always)]
unsafe fn step<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    acc: &mut [[S::V; NV]; MR],
    (a, a_stride): (&mut *const f32, usize),
    (b, b_stride): (&mut *const f32, usize),
) {
    let mut panel = [s.splat(0.0); NV];
    // SAFETY: the caller's promise.
    unsafe {
        for (j, v) in panel.iter_mut().enumerate() {
            *v = s.load_ptr(b.add(j * LANES));
        }
        for (i, row) in acc.iter_mut().enumerate() {
            let x = s.splat(*a.add(i * a_stride));
            for (v, y) in row.iter_mut().zip(panel) {
                *v = x.mul_add(y, *v);
            }
        }
        *a = a.add(1);
    }
    *b = b.wrapping_add(b_stride);
}
