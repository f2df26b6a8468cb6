//! The position-wise feed-forward network: `activation(x W1^T + b1) W2^T + b2`, with the hidden rows kept in L2.

use crate::activation::Activation;
use crate::batchnorm::Affine;
use crate::context::Context;
use crate::error::{Error, check_size};
use crate::exec::{Crew, Team};
use crate::gemm::{K_BLOCK, PANEL};
use crate::isa::dispatch;
use crate::linear::{Epilogue, Linear, Residual, padded_stride};
use crate::norm::{Norm, Placement, normalised};
use crate::residual::{close_phase, close_rows, close_scratch};
use crate::simd::Simd;
use crate::split::{Columns, MAX_ROWS, Split};
use crate::view::{MatMut, MatRef};
use crate::workspace::AlignedBuffer;

/// A feed-forward network with packed weights.
///
/// ```
/// use laneformer::{Activation, Context, Ffn, Linear, MatMut, MatRef, PackedMatrix};
/// let linear = |w: &[f32; 4]| Linear::new(PackedMatrix::from_out_in(MatRef::contiguous(w, 2, 2)?)?, None);
/// let ffn = Ffn::new(linear(&[1.0, 0.0, 0.0, 1.0])?, Activation::Relu, linear(&[1.0, 1.0, 1.0, -1.0])?)?;
/// let mut y = [0.0; 2];
/// let x = MatRef::contiguous(&[2.0, -1.0], 1, 2)?;
/// ffn.forward(Context::serial(), x, MatMut::contiguous(&mut y, 1, 2)?)?;
/// assert_eq!(y, [2.0, 2.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Debug)]
pub struct Ffn {
    w1: Linear,
    activation: Activation,
    /// Multiplies the activated hidden columns, if there is one.
    up: Option<Linear>,
    w2: Linear,
}

/// Elements of a tile's rows, hidden rows and sums together: 704 KiB, which leaves a third of a 1 MiB L2 to the block
/// of the panel (128 KiB) and to what streams through.
const TILE: usize = 704 * 1024 / size_of::<f32>();

/// Hidden columns that are computed and consumed before the next: a canonical block of the second product's K, so that
/// cutting there changes no bit, and the hidden rows take little of L2 however wide the layer is.
const CHUNK: usize = K_BLOCK;

impl Ffn {
    /// A network from its two linear maps, `[d_ff, d_model]` and `[d_model, d_ff]`.
    ///
    /// # Errors
    /// [`Error::Size`] if they do not fit each other.
    pub fn new(w1: Linear, activation: Activation, w2: Linear) -> Result<Ffn, Error> {
        check_size("w2.in_features", w1.out_features(), w2.in_features())?;
        check_size("w2.out_features", w1.in_features(), w2.out_features())?;
        Ok(Ffn { w1, activation, up: None, w2 })
    }

    /// A gated network, `(activation(x Wg^T + bg) * (x Wu^T + bu)) W2^T + b2`: SwiGLU with silu, GeGLU with a gelu (Shazeer 2020,
    /// arXiv:2002.05202).
    ///
    /// # Errors
    /// [`Error::Size`] if the maps do not fit each other.
    pub fn gated(gate: Linear, activation: Activation, up: Linear, w2: Linear) -> Result<Ffn, Error> {
        check_size("up.in_features", gate.in_features(), up.in_features())?;
        check_size("up.out_features", gate.out_features(), up.out_features())?;
        Ok(Ffn { up: Some(up), ..Ffn::new(gate, activation, w2)? })
    }

    /// The same between batch norms, which go into the weights.
    pub(crate) fn between(self, before: Option<&Affine>, after: Option<&Affine>) -> Result<Ffn, Error> {
        let up = self.up.map(|up| up.between(before, None)).transpose()?;
        let (w1, w2) = (self.w1.between(before, None)?, self.w2.between(None, after)?);
        Ok(Ffn { w1, up, w2, ..self })
    }

    /// Columns of the input and of the output.
    pub fn d_model(&self) -> usize {
        self.w1.in_features()
    }

    /// Columns of the hidden rows.
    pub fn d_ff(&self) -> usize {
        self.w1.out_features()
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.w1.bytes() + self.up.as_ref().map_or(0, Linear::bytes) + self.w2.bytes()
    }

    /// `out = activation(x W1^T + b1) W2^T + b2`.
    ///
    /// # Shapes
    /// `x` and `out`: `[rows, d_model]`, any row strides. Without rows there is nothing to do.
    ///
    /// # Special values
    /// As [`Linear::forward`] and the activation have them.
    ///
    /// # Accuracy
    /// That of its two products, see [`Linear::forward`]. A row depends only on itself: the same bits for any rows beside it, any threads,
    /// and on every instruction set that [keeps them](crate::Isa::keeps_bits).
    ///
    /// # Errors
    /// [`Error::Size`] if the shapes disagree.
    pub fn forward(&self, ctx: Context<'_>, x: MatRef<'_>, mut out: MatMut<'_>) -> Result<(), Error> {
        check_size("x.cols", self.d_model(), x.cols())?;
        check_size("out.rows", x.rows(), out.rows())?;
        check_size("out.cols", self.d_model(), out.cols())?;
        if x.rows() == 0 {
            return Ok(());
        }
        let members = self.w1.members(ctx, x.rows());
        let split = Split::new(x.rows(), self.d_model(), self.tile_rows(), members);
        if !split.is_by_rows(self.d_model()) {
            // All hidden rows at once, and each product a phase of columns: every core reads its own slice of the weights.
            let stride = padded_stride(self.d_ff());
            let mut hidden = AlignedBuffer::scratch(x.rows() * stride);
            let mut hidden = MatMut::scratch(&mut hidden, x.rows(), self.d_ff(), stride);
            dispatch!(ctx.isa(), |s| Team::new(members, MAX_ROWS * PANEL).region(ctx.executor(), |crew| {
                self.hidden_phase(s, crew, x, None, &mut hidden);
                self.w2.phase(s, crew, hidden.as_ref(), &Epilogue::NONE, &mut out);
            }));
            return Ok(());
        }
        let mut team = Team::new(members, split.height() * self.row_scratch());
        dispatch!(ctx.isa(), |s| team.region(ctx.executor(), |crew| crew.blocks(
            s,
            &mut out,
            &split,
            #[inline(always)]
            |row, _, mut out, scratch| {
                let x = x.block(row..row + out.rows(), 0..x.cols());
                let sums = self.sums(s, x, scratch);
                self.w2.finish(s, sums, Residual::None, &mut out);
            },
        )));
        Ok(())
    }

    /// Rows of a tile at most.
    fn tile_rows(&self) -> usize {
        (TILE / (self.d_model() + self.row_scratch())).clamp(6, MAX_ROWS)
    }

    /// Scratch per row of a tile of whole rows, beside what its norms take.
    fn row_scratch(&self) -> usize {
        PANEL + padded_stride(CHUNK.min(self.d_ff())) + padded_stride(self.d_model().next_multiple_of(PANEL))
    }

    /// What the sub-layer begins with.
    pub(crate) fn first_columns(&self, rows: usize, members: usize) -> Columns<'_> {
        self.w1.columns(rows, members)
    }

    /// Scratch of a tile.
    pub(crate) fn scratch_len(&self, placement: &Placement) -> usize {
        let normed = placement.before().map_or(0, |_| padded_stride(self.d_model()));
        let by_rows = self.row_scratch() + normed + close_scratch(placement, self.d_model());
        let by_cols = MAX_ROWS * (PANEL + normed);
        (self.tile_rows() * by_rows).max(by_cols)
    }

    /// Hidden columns from `start`, a multiple of [`PANEL`]; `then` are the weights that are read next.
    fn hidden<S: Simd>(
        &self,
        s: S,
        x: MatRef<'_>,
        start: usize,
        out: &mut MatMut<'_>,
        scratch: &mut [f32],
        then: &[f32],
    ) {
        let after_w1 = self.up.as_ref().map_or(then, |up| up.from(start));
        self.w1.tile(s, x, start, self.activation, Residual::None, out, scratch, after_w1);
        if let Some(up) = &self.up {
            up.tile(s, x, start, Activation::None, Residual::Gate, out, scratch, then);
        }
    }

    /// The sums of the second product, before its bias: hidden columns by chunks, each consumed while it is in L2.
    fn sums<'a, S: Simd>(&self, s: S, x: MatRef<'_>, scratch: &'a mut [f32]) -> MatMut<'a> {
        let rows = x.rows();
        let (scratch, rest) = scratch.split_at_mut(rows * PANEL);
        let stride = padded_stride(CHUNK.min(self.d_ff()));
        let (hidden, rest) = rest.split_at_mut(rows * stride);
        let cols = self.d_model().next_multiple_of(PANEL);
        let mut sums = MatMut::scratch(rest, rows, cols, padded_stride(cols));
        for start in (0..self.d_ff()).step_by(CHUNK) {
            let len = CHUNK.min(self.d_ff() - start);
            let mut hidden = MatMut::scratch(hidden, rows, len, stride);
            self.hidden(s, x, start, &mut hidden, scratch, self.w2.block(start));
            let then = self.w1.from((start + len) % self.d_ff());
            self.w2.accumulate(s, hidden.as_ref(), start, &mut sums, then);
        }
        sums
    }

    /// The sub-layer in place: one phase of whole rows, or with few rows two phases of columns.
    pub(crate) fn sub_layer<S: Simd>(
        &self,
        s: S,
        crew: &mut Crew<'_>,
        x: &mut MatMut<'_>,
        placement: &Placement,
        shared: &mut [f32],
        next: Option<Columns<'_>>,
    ) {
        let split = Split::new(x.rows(), self.d_model(), self.tile_rows(), crew.members());
        if split.is_by_rows(self.d_model()) {
            let rows = self.tile_rows();
            crew.blocks(
                s,
                x,
                &split,
                #[inline(always)]
                |_, _, mut x, scratch| {
                    let (scratch, rest) = scratch.split_at_mut(rows * self.row_scratch());
                    let input = normalised(s, x.as_ref(), placement.before(), rest);
                    let sums = self.sums(s, input, scratch);
                    close_rows(
                        s,
                        placement,
                        &mut x,
                        rest,
                        #[inline(always)]
                        |residual, out| {
                            self.w2.finish(s, sums, residual, out);
                        },
                    );
                },
            );
            return;
        }
        let mut hidden = MatMut::scratch(shared, x.rows(), self.d_ff(), padded_stride(self.d_ff()));
        self.hidden_phase(s, crew, x.as_ref(), placement.before(), &mut hidden);
        close_phase(s, crew, hidden.as_ref(), &self.w2, placement, x, next);
    }

    /// The hidden columns of all rows, behind their norm, dealt out to the members.
    fn hidden_phase<S: Simd>(
        &self,
        s: S,
        crew: &mut Crew<'_>,
        x: MatRef<'_>,
        norm: Option<&Norm>,
        hidden: &mut MatMut<'_>,
    ) {
        let split = Split::new(x.rows(), self.d_ff(), MAX_ROWS, crew.members());
        let [columns, after] = [&self.w1, &self.w2].map(|linear| linear.columns(x.rows(), crew.members()));
        crew.blocks(
            s,
            hidden,
            &split,
            #[inline(always)]
            |row, col, mut hidden, scratch| {
                let (scratch, rest) = scratch.split_at_mut(MAX_ROWS * PANEL);
                let x = x.block(row..row + hidden.rows(), 0..x.cols());
                // Each tile normalises the few rows again: cheaper than a phase of its own.
                let x = normalised(s, x, norm, rest);
                let then = columns.after(col, Some(after));
                self.hidden(s, x, col, &mut hidden, scratch, then);
            },
        );
    }
}
