//! A packed linear map and its fused epilogue: product, bias, activation, residual, store.

use core::ops::Range;

use crate::activation::{Activation, WithActivation};
use crate::batchnorm::Affine;
use crate::context::Context;
use crate::error::{Error, check_size};
use crate::exec::{Crew, Team};
use crate::gemm::{PANEL, PackedMatrix, block_product, panel_product};
use crate::isa::dispatch;
use crate::reduce::four;
use crate::simd::{LANES, Simd, Vector};
use crate::split::{Columns, MAX_ROWS, Split};
use crate::view::{MatMut, MatRef};
use crate::workspace::AlignedBuffer;

/// `y = x W^T + b` with packed weights. Made once and shared by any number of threads.
///
/// ```
/// use laneformer::{Context, Epilogue, Linear, MatMut, MatRef, PackedMatrix};
/// let weight = PackedMatrix::from_out_in(MatRef::contiguous(&[1.0, 2.0, 3.0, 4.0], 2, 2)?)?;
/// let linear = Linear::new(weight, Some(&[0.5, 0.0]))?;
/// let mut y = [0.0; 2];
/// let x = MatRef::contiguous(&[1.0, 1.0], 1, 2)?;
/// linear.forward(Context::serial(), x, &Epilogue::NONE, MatMut::contiguous(&mut y, 1, 2)?)?;
/// assert_eq!(y, [3.5, 7.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Debug)]
pub struct Linear {
    weight: PackedMatrix,
    /// As long as the panels are wide, so that the epilogue reads whole vectors.
    bias: AlignedBuffer,
}

/// What happens to a product before it is stored: `activation(x W^T + b) + scale * residual`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// Applied after the bias.
    pub activation: Activation,
    /// Added last: a scale and a matrix of the output's shape.
    pub residual: Option<(f32, MatRef<'a>)>,
}

impl Epilogue<'static> {
    /// Bias only.
    pub const NONE: Epilogue<'static> = Epilogue { activation: Activation::None, residual: None };

    /// Bias, then `activation`.
    pub const fn activation(activation: Activation) -> Self {
        Epilogue { activation, residual: None }
    }
}

impl<'a> Epilogue<'a> {
    /// The same, then `scale * residual` is added.
    pub const fn with_residual(self, scale: f32, residual: MatRef<'a>) -> Self {
        Epilogue { residual: Some((scale, residual)), ..self }
    }

    /// The residual of a tile.
    #[inline(always)]
    fn tile(&self, rows: Range<usize>, cols: Range<usize>) -> Residual<'a> {
        match self.residual {
            None => Residual::None,
            Some((scale, r)) => Residual::Matrix(scale, r.block(rows, cols)),
        }
    }
}

/// Where a tile's residual is.
#[derive(Clone, Copy)]
pub(crate) enum Residual<'a> {
    None,
    /// Rows of the tile's own columns and rows.
    Matrix(f32, MatRef<'a>),
    /// What the output holds before it is written.
    Out(f32),
    /// The same, but as a factor: the gate of a gated FFN.
    Gate,
}

impl Linear {
    /// A linear map from packed weights `[in, out]` and a bias of `[out]`, zero if absent.
    ///
    /// # Errors
    /// [`Error::Size`] if the bias has another length than there are outputs.
    pub fn new(weight: PackedMatrix, bias: Option<&[f32]>) -> Result<Linear, Error> {
        let mut padded = AlignedBuffer::scratch(weight.panels() * PANEL);
        if let Some(bias) = bias {
            check_size("bias.len()", weight.n(), bias.len())?;
            padded[..bias.len()].copy_from_slice(bias);
        }
        Ok(Linear { weight, bias: padded })
    }

    /// The map behind a batch norm with the norm in its weights: `y = (W scale) x + (b + W shift)`, in f64 and rounded once.
    ///
    /// # Errors
    /// [`Error::Size`] if the channels are not the inputs.
    ///
    /// ```
    /// use laneformer::{Affine, Context, Epilogue, Linear, MatMut, MatRef, PackedMatrix};
    /// let weight = PackedMatrix::from_out_in(MatRef::contiguous(&[1.0, 2.0], 1, 2)?)?;
    /// let norm = Affine::new(vec![2.0, 3.0], vec![0.5, 1.0])?;
    /// let linear = Linear::new(weight, Some(&[10.0]))?.with_affine_before(&norm)?;
    /// let (x, mut y) = ([1.0, 1.0], [0.0]);
    /// let x = MatRef::contiguous(&x, 1, 2)?;
    /// linear.forward(Context::serial(), x, &Epilogue::NONE, MatMut::contiguous(&mut y, 1, 1)?)?;
    /// assert_eq!(y, [2.5 + 2.0 * 4.0 + 10.0]);
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn with_affine_before(&self, norm: &Affine) -> Result<Linear, Error> {
        self.copy()?.before(norm)
    }

    fn before(self, norm: &Affine) -> Result<Linear, Error> {
        check_size("norm channels", self.in_features(), norm.channels())?;
        let outputs = self.out_features();
        let mut bias: Vec<f64> = self.bias.iter().map(|&b| f64::from(b)).collect();
        let weight = self.weight.map(|input, output, w| {
            let w = f64::from(w);
            bias[output] += w * f64::from(norm.shift[input]);
            (w * f64::from(norm.scale[input])) as f32
        });
        let bias: Vec<f32> = bias.iter().map(|&b| b as f32).collect();
        Linear::new(weight, bias.get(..outputs))
    }

    /// The map before a batch norm with the norm in its weights: `y = (scale W) x + (scale b + shift)`, in f64 and rounded once.
    ///
    /// # Errors
    /// [`Error::Size`] if the channels are not the outputs.
    pub fn with_affine_after(&self, norm: &Affine) -> Result<Linear, Error> {
        self.copy()?.after(norm)
    }

    fn after(self, norm: &Affine) -> Result<Linear, Error> {
        check_size("norm channels", self.out_features(), norm.channels())?;
        let weight = self.weight.map(|_, output, w| (f64::from(w) * f64::from(norm.scale[output])) as f32);
        let bias = self.bias.iter().zip(&norm.scale).zip(&norm.shift);
        let fold = |((&b, &scale), &shift)| (f64::from(b) * f64::from(scale) + f64::from(shift)) as f32;
        Linear::new(weight, Some(&bias.map(fold).collect::<Vec<f32>>()))
    }

    /// The map between two batch norms, where there are any.
    pub(crate) fn between(self, before: Option<&Affine>, after: Option<&Affine>) -> Result<Linear, Error> {
        let linear = match before {
            Some(norm) => self.before(norm)?,
            None => self,
        };
        match after {
            Some(norm) => linear.after(norm),
            None => Ok(linear),
        }
    }

    fn copy(&self) -> Result<Linear, Error> {
        Linear::new(self.weight.copy(), self.bias.get(..self.out_features()))
    }

    /// Inputs: columns of `x`.
    pub fn in_features(&self) -> usize {
        self.weight.k()
    }

    /// Outputs: columns of `y`.
    pub fn out_features(&self) -> usize {
        self.weight.n()
    }

    /// Bytes of the packed weights and the bias.
    pub fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.len() * size_of::<f32>()
    }

    /// `out = activation(x W^T + b) + scale * residual`.
    ///
    /// # Shapes
    /// `x`: `[rows, in]`; `out` and the residual: `[rows, out]`; any row strides. Without rows there is nothing to do.
    ///
    /// # Special values
    /// NaN and infinities follow IEEE 754; `0 * inf` is NaN.
    ///
    /// # Accuracy
    /// That of a sum of `in` products in f32, added in blocks of [`K_BLOCK`](crate::gemm::K_BLOCK). An element depends only on its own
    /// row: the same bits for any number of rows and threads, and on every instruction set that [keeps them](crate::Isa::keeps_bits).
    ///
    /// # Errors
    /// [`Error::Size`] if the shapes disagree.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: MatRef<'_>,
        epilogue: &Epilogue<'_>,
        out: MatMut<'_>,
    ) -> Result<(), Error> {
        check_size("x.cols", self.in_features(), x.cols())?;
        check_size("out.rows", x.rows(), out.rows())?;
        self.check(epilogue, &out)?;
        dispatch!(ctx.isa(), |s| self.run(ctx, s, x, epilogue, out));
        Ok(())
    }

    /// [`forward`](Self::forward) of rows that are made where they are multiplied: `fill(rows, x)` writes some rows to `x`, `[rows, in]`, and the
    /// core that called it takes them while they are in its cache. A convolution's patches need no matrix of their own then.
    ///
    /// # Shapes
    /// There are as many rows as `out` has; each is asked for once, on any of the context's threads. `x` holds any values at first.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    ///
    /// ```
    /// use laneformer::{Context, Epilogue, Linear, MatMut, MatRef, PackedMatrix};
    /// let linear = Linear::new(PackedMatrix::from_out_in(MatRef::contiguous(&[1.0, 10.0], 1, 2)?)?, None)?;
    /// let (signal, mut y) = ([1.0, 2.0, 3.0, 4.0], [0.0; 3]);
    /// let pairs = |rows: std::ops::Range<usize>, mut x: MatMut<'_>| {
    ///     for (i, row) in rows.enumerate() {
    ///         x.row_mut(i).copy_from_slice(&signal[row..row + 2]);
    ///     }
    /// };
    /// linear.forward_filled(Context::serial(), pairs, &Epilogue::NONE, MatMut::contiguous(&mut y, 3, 1)?)?;
    /// assert_eq!(y, [21.0, 32.0, 43.0]);
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn forward_filled(
        &self,
        ctx: Context<'_>,
        fill: impl Fn(Range<usize>, MatMut<'_>) + Sync,
        epilogue: &Epilogue<'_>,
        out: MatMut<'_>,
    ) -> Result<(), Error> {
        self.check(epilogue, &out)?;
        dispatch!(ctx.isa(), |s| self.run_filled(ctx, s, &fill, epilogue, out));
        Ok(())
    }

    fn check(&self, epilogue: &Epilogue<'_>, out: &MatMut<'_>) -> Result<(), Error> {
        check_size("out.cols", self.out_features(), out.cols())?;
        if let Some((_, residual)) = epilogue.residual {
            check_size("residual.rows", out.rows(), residual.rows())?;
            check_size("residual.cols", out.cols(), residual.cols())?;
        }
        Ok(())
    }

    /// Tiles of whole rows, no more than stay in L2 beside a block of the panel.
    fn run_filled<S: Simd>(
        &self,
        ctx: Context<'_>,
        s: S,
        fill: &(impl Fn(Range<usize>, MatMut<'_>) + Sync),
        epilogue: &Epilogue<'_>,
        mut out: MatMut<'_>,
    ) {
        if out.rows() == 0 {
            return;
        }
        let (k, stride) = (self.in_features(), padded_stride(self.in_features()));
        let max_rows = (FILLED / stride).clamp(S::MR, MAX_ROWS);
        let members = self.members(ctx, out.rows());
        let split = Split::even(out.rows(), out.cols(), max_rows, members);
        let most = split.height();
        Team::new(members, most * (PANEL + stride)).region(ctx.executor(), |crew| {
            crew.blocks(
                s,
                &mut out,
                &split,
                #[inline(always)]
                |row, _, mut block, scratch| {
                    let (scratch, x) = scratch.split_at_mut(most * PANEL);
                    let rows = row..row + block.rows();
                    fill(rows.clone(), MatMut::scratch(&mut *x, rows.len(), k, stride));
                    let x = MatMut::scratch(x, rows.len(), k, stride).into_ref();
                    let residual = epilogue.tile(rows, 0..block.cols());
                    self.tile(s, x, 0, epilogue.activation, residual, &mut block, scratch, self.from(0));
                },
            );
        });
    }

    /// Threads that are worth inviting for so many rows.
    pub(crate) fn members(&self, ctx: Context<'_>, rows: usize) -> usize {
        // One row takes as long as some four: it waits for the weights, not for the multipliers.
        let flops = 2 * rows.max(4) * self.in_features() * self.out_features();
        ctx.members_for(flops, usize::MAX)
    }

    fn run<S: Simd>(
        &self,
        ctx: Context<'_>,
        s: S,
        x: MatRef<'_>,
        epilogue: &Epilogue<'_>,
        mut out: MatMut<'_>,
    ) {
        if x.rows() == 0 {
            return;
        }
        let scratch_len = x.rows().min(MAX_ROWS) * PANEL;
        Team::new(self.members(ctx, x.rows()), scratch_len).region(ctx.executor(), |crew| {
            self.phase(s, crew, x, epilogue, &mut out);
        });
    }

    /// One phase, with scratch for [`PANEL`] columns of the rows of a tile, at most [`MAX_ROWS`].
    pub(crate) fn phase<S: Simd>(
        &self,
        s: S,
        crew: &mut Crew<'_>,
        x: MatRef<'_>,
        epilogue: &Epilogue<'_>,
        out: &mut MatMut<'_>,
    ) {
        let split = Split::new(x.rows(), self.out_features(), MAX_ROWS, crew.members());
        crew.blocks(
            s,
            out,
            &split,
            #[inline(always)]
            |row, col, mut block, scratch| {
                let rows = row..row + block.rows();
                let residual = epilogue.tile(rows.clone(), col..col + block.cols());
                let x = x.block(rows, 0..x.cols());
                let then = self.from((col + block.cols()) % self.out_features());
                self.tile(s, x, col, epilogue.activation, residual, &mut block, scratch, then);
            },
        );
    }

    /// `out = epilogue(x W^T + b)` for the columns from `col`, a multiple of [`PANEL`].
    /// `scratch` holds [`PANEL`] elements per row; `then` are the weights that are read next.
    pub(crate) fn tile<S: Simd>(
        &self,
        s: S,
        x: MatRef<'_>,
        col: usize,
        activation: Activation,
        residual: Residual<'_>,
        out: &mut MatMut<'_>,
        scratch: &mut [f32],
        then: &[f32],
    ) {
        let panels = col / PANEL..(col + out.cols()).div_ceil(PANEL);
        let sums = MatMut::scratch(scratch, x.rows(), PANEL, PANEL);
        let mut epilogue = self.epilogue(
            s,
            sums,
            #[inline(always)]
            |row, first, v, width| store_row(s, residual, out, row, first - col..first - col + width, v),
        );
        for panel in panels.clone() {
            panel_product(s, x, &self.weight, panel, &mut epilogue.sums, (&panels, then));
            epilogue.first = panel * PANEL;
            epilogue.write(activation);
        }
    }

    /// Takes one canonical block of K, from `start`, into `sums`, which has whole panels: the first begins the sums. `then` are the
    /// weights that are read next.
    pub(crate) fn accumulate<S: Simd>(
        &self,
        s: S,
        a: MatRef<'_>,
        start: usize,
        sums: &mut MatMut<'_>,
        then: &[f32],
    ) {
        let panels = self.weight.panels();
        for panel in 0..panels {
            let mut sums = sums.block(0..a.rows(), panel * PANEL..(panel + 1) * PANEL);
            let next = if panel + 1 < panels { self.weight.block(panel + 1, start) } else { then };
            block_product(s, a, &self.weight, panel, start, &mut sums, [next, &[]]);
        }
    }

    /// The columns as a phase of so many rows deals them out to the members.
    pub(crate) fn columns(&self, rows: usize, members: usize) -> Columns<'_> {
        let split = Split::new(rows, self.out_features(), MAX_ROWS, members);
        Columns { linear: self, per_tile: split.tile_cols(), members }
    }

    /// The weights of the columns from `col`, a multiple of [`PANEL`], on.
    pub(crate) fn from(&self, col: usize) -> &[f32] {
        self.weight.from(col.div_ceil(PANEL))
    }

    /// Those of all columns for a canonical block of inputs, from `start`, as [`accumulate`](Linear::accumulate) begins.
    pub(crate) fn block(&self, start: usize) -> &[f32] {
        self.weight.block(0, start)
    }

    /// `out = sums + b + residual`, the end of [`Linear::accumulate`].
    pub(crate) fn finish<S: Simd>(
        &self,
        s: S,
        sums: MatMut<'_>,
        residual: Residual<'_>,
        out: &mut MatMut<'_>,
    ) {
        let mut epilogue = self.epilogue(
            s,
            sums,
            #[inline(always)]
            |row, first, v, width| {
                store_row(s, residual, out, row, first..first + width, v);
            },
        );
        for panel in 0..self.weight.panels() {
            epilogue.first = panel * PANEL;
            epilogue.write(Activation::None);
        }
    }

    fn epilogue<'a, S: Simd, F: FnMut(usize, usize, [S::V; 4], usize)>(
        &'a self,
        s: S,
        sums: MatMut<'a>,
        store: F,
    ) -> Panels<'a, S, F> {
        Panels { s, linear: self, sums, first: 0, store }
    }
}

/// The loop of an epilogue, compiled once per activation.
struct Panels<'a, S: Simd, F> {
    s: S,
    linear: &'a Linear,
    /// Sums of one panel, or of all.
    sums: MatMut<'a>,
    first: usize,
    /// `store(row, first column, activation(x W^T + b), columns)`: vectors past `columns` mean nothing.
    store: F,
}

impl<S: Simd, F: FnMut(usize, usize, [S::V; 4], usize)> Panels<'_, S, F> {
    /// A frame of its own: what calls it is compiled once per instruction set, not once per use.
    fn write(&mut self, activation: Activation) {
        let s = self.s;
        s.vectorize(
            #[inline(always)]
            || activation.choose(s, self),
        );
    }
}

impl<S: Simd, F: FnMut(usize, usize, [S::V; 4], usize)> WithActivation<S> for Panels<'_, S, F> {
    #[inline(always)]
    fn run(&mut self, f: impl Fn(S::V) -> S::V) {
        let (s, first) = (self.s, self.first);
        let width = PANEL.min(self.linear.out_features() - first);
        let bias = four(
            #[inline(always)]
            |j| s.load(&self.linear.bias[first + j * LANES..]),
        );
        let place = if self.sums.cols() == PANEL { 0 } else { first };
        for row in 0..self.sums.rows() {
            let sums = &self.sums.row(row)[place..place + PANEL];
            let v = four(
                #[inline(always)]
                |j| f(s.load(&sums[j * LANES..]) + bias[j]),
            );
            (self.store)(row, first, v, width);
        }
    }
}

/// Adds the residual of columns `cols` and writes them to the row of `out`.
#[inline(always)]
fn store_row<S: Simd>(
    s: S,
    residual: Residual<'_>,
    out: &mut MatMut<'_>,
    row: usize,
    cols: Range<usize>,
    v: [S::V; 4],
) {
    let out = &mut out.row_mut(row)[cols.clone()];
    match residual {
        Residual::None => store(
            v,
            out,
            #[inline(always)]
            |v, _| v,
        ),
        Residual::Out(scale) => {
            let scale = s.splat(scale);
            store(
                v,
                out,
                #[inline(always)]
                |v, out| scale.mul_add(s.load_partial(out, scale), v),
            );
        }
        Residual::Gate => store(
            v,
            out,
            #[inline(always)]
            |v, out| v * s.load_partial(out, v),
        ),
        Residual::Matrix(scale, rows) => {
            let scale = s.splat(scale);
            let mut parts = rows.row(row)[cols].chunks(LANES);
            store(
                v,
                out,
                #[inline(always)]
                |v, _| scale.mul_add(s.load_partial(parts.next().unwrap_or(&[]), scale), v),
            );
        }
    }
}

/// Writes the vectors to `out`, whole ones without a mask.
#[inline(always)]
fn store<V: Vector>(v: [V; 4], out: &mut [f32], mut f: impl FnMut(V, &[f32]) -> V) {
    if let Ok(out) = <&mut [f32; PANEL]>::try_from(&mut *out) {
        for (v, out) in v.into_iter().zip(out.as_chunks_mut::<LANES>().0) {
            f(v, out).store(out);
        }
    } else {
        for (v, out) in v.into_iter().zip(out.chunks_mut(LANES)) {
            f(v, out).store_partial(out);
        }
    }
}

/// Elements of rows that are made for a tile: half of a 1 MiB L2.
const FILLED: usize = 512 * 1024 / size_of::<f32>();

/// The stride of rows of scratch: a line longer than the row, so that rows of 4 KiB do not share L1 sets.
pub(crate) fn padded_stride(cols: usize) -> usize {
    cols.next_multiple_of(LANES) + LANES
}
