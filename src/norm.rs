//! The norms of a layer and where they stand around a sub-layer.

use crate::batchnorm::Affine;
use crate::context::Context;
use crate::error::{Error, check_dim, check_size};
use crate::layernorm::{layernorm, layernorm_rows};
use crate::linear::padded_stride;
use crate::rmsnorm::{rmsnorm, rmsnorm_rows};
use crate::simd::Simd;
use crate::view::{MatMut, MatRef};

/// A norm with its weights.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Norm {
    /// [`layernorm`](crate::layernorm()).
    LayerNorm {
        /// `[d_model]`.
        gain: Vec<f32>,
        /// `[d_model]`, or none.
        bias: Option<Vec<f32>>,
        /// Added to the variance.
        eps: f32,
    },
    /// [`rmsnorm`](crate::rmsnorm()).
    RmsNorm {
        /// `[d_model]`.
        gain: Vec<f32>,
        /// Added to the mean square.
        eps: f32,
    },
    /// Batch normalisation at inference.
    BatchNorm(Affine),
}

impl Norm {
    /// Columns that it normalises.
    pub fn channels(&self) -> usize {
        match self {
            Norm::LayerNorm { gain, .. } | Norm::RmsNorm { gain, .. } => gain.len(),
            Norm::BatchNorm(affine) => affine.channels(),
        }
    }

    /// Normalises rows in place, as [`layernorm`](crate::layernorm()), [`rmsnorm`](crate::rmsnorm()) or [`Affine::apply`] does: the norm behind the
    /// embeddings, or the one that closes a pre-norm stack.
    ///
    /// # Shapes
    /// `x`: `[rows, channels]`, any row stride.
    ///
    /// # Errors
    /// [`Error::Size`] if a row, or the bias, has another length than there are channels.
    ///
    /// ```
    /// use laneformer::{Context, MatMut, Norm};
    /// let norm = Norm::RmsNorm { gain: vec![1.0, 2.0], eps: 0.0 };
    /// let mut x = [3.0, -3.0];
    /// norm.apply(Context::serial(), MatMut::contiguous(&mut x, 1, 2)?)?;
    /// assert_eq!(x, [1.0, -2.0]);
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn apply(&self, ctx: Context<'_>, x: MatMut<'_>) -> Result<(), Error> {
        match self {
            Norm::LayerNorm { gain, bias, eps } => layernorm(ctx, x, gain, bias.as_deref(), *eps),
            Norm::RmsNorm { gain, eps } => rmsnorm(ctx, x, gain, *eps),
            Norm::BatchNorm(affine) => affine.apply(ctx, x),
        }
    }

    pub(crate) fn check(&self, d_model: usize) -> Result<(), Error> {
        check_dim("d_model", d_model)?;
        check_size("norm gain.len()", d_model, self.channels())?;
        match self {
            Norm::LayerNorm { bias: Some(bias), .. } => check_size("norm bias.len()", d_model, bias.len()),
            _ => Ok(()),
        }
    }

    /// Normalises each row in place.
    pub(crate) fn normalise<S: Simd>(&self, s: S, x: &mut MatMut<'_>) {
        s.vectorize(
            #[inline(always)]
            || self.rows(s, None, x),
        );
    }

    /// Writes the normalised rows of `source` to `x`.
    fn normalise_into<S: Simd>(&self, s: S, source: MatRef<'_>, x: &mut MatMut<'_>) {
        s.vectorize(
            #[inline(always)]
            || self.rows(s, Some(source), x),
        );
    }

    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, source: Option<MatRef<'_>>, x: &mut MatMut<'_>) {
        match self {
            Norm::LayerNorm { gain, bias, eps } => {
                layernorm_rows(s, source, x, gain, bias.as_deref(), *eps);
            }
            Norm::RmsNorm { gain, eps } => rmsnorm_rows(s, source, x, gain, *eps),
            Norm::BatchNorm(affine) => affine.apply_rows(s, source, x),
        }
    }
}

/// Where the norm stands around a sub-layer `f`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Placement {
    /// `x = norm(alpha x + f(x))`: the original Transformer and BERT with `alpha` 1, DeepNorm (arXiv:2203.00555) with its own.
    Post {
        /// After the residual.
        norm: Norm,
        /// Scale of the residual.
        alpha: f32,
    },
    /// `x = x + f(norm(x))`: GPT-2 and most since.
    Pre {
        /// Before the sub-layer.
        norm: Norm,
    },
    /// `x = x + after(f(before(x)))`.
    Sandwich {
        /// Before the sub-layer.
        before: Norm,
        /// Before the residual is added.
        after: Norm,
    },
    /// `x = x + f(x)`: no norm, or one that is in the weights, see [`Layer::fold_batchnorm`](crate::Layer::fold_batchnorm).
    Plain,
}

impl Placement {
    /// Post-norm with a plain residual.
    pub fn post(norm: Norm) -> Placement {
        Placement::Post { norm, alpha: 1.0 }
    }

    /// Pre-norm.
    pub fn pre(norm: Norm) -> Placement {
        Placement::Pre { norm }
    }

    /// The norm that the sub-layer's input passes.
    pub(crate) fn before(&self) -> Option<&Norm> {
        match self {
            Placement::Post { .. } | Placement::Plain => None,
            Placement::Pre { norm } | Placement::Sandwich { before: norm, .. } => Some(norm),
        }
    }

    /// What a sub-layer whose first and last maps take in these norms has instead.
    pub(crate) fn fold_batchnorm(self) -> (Option<Affine>, Option<Affine>, Placement) {
        match self {
            Placement::Pre { norm: Norm::BatchNorm(before) } => (Some(before), None, Placement::Plain),
            Placement::Sandwich { before: Norm::BatchNorm(before), after: Norm::BatchNorm(after) } => {
                (Some(before), Some(after), Placement::Plain)
            }
            Placement::Sandwich { before: norm, after: Norm::BatchNorm(after) } => {
                (None, Some(after), Placement::Pre { norm })
            }
            other => (None, None, other),
        }
    }

    pub(crate) fn check(&self, d_model: usize) -> Result<(), Error> {
        match self {
            Placement::Post { norm, .. } | Placement::Pre { norm } => norm.check(d_model),
            Placement::Sandwich { before, after } => {
                before.check(d_model).and_then(|()| after.check(d_model))
            }
            Placement::Plain => Ok(()),
        }
    }
}

/// `x`, or its rows normalised into `scratch`.
pub(crate) fn normalised<'a, S: Simd>(
    s: S,
    x: MatRef<'a>,
    norm: Option<&Norm>,
    scratch: &'a mut [f32],
) -> MatRef<'a> {
    let Some(norm) = norm else { return x };
    let stride = padded_stride(x.cols());
    let mut rows = MatMut::scratch(scratch, x.rows(), x.cols(), stride);
    norm.normalise_into(s, x, &mut rows);
    rows.into_ref()
}
