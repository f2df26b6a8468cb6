//! Batch normalisation of columns (Ioffe and Szegedy 2015, arXiv:1502.03167): at inference one multiply-add per element,
//! in training the statistics of the valid rows.

use core::ops::Range;

use crate::context::Context;
use crate::error::{Error, check_dim, check_size};
use crate::isa::dispatch;
use crate::layernorm::scale_rows;
use crate::rows::{check_shape, for_tiles, together};
use crate::simd::{LANES, Simd, Vector};
use crate::view::{MatMut, MatRef};

/// A scale and a shift per channel: `y = x * scale + shift`. What batch normalisation is at inference.
#[derive(Clone, Debug, PartialEq)]
pub struct Affine {
    pub(crate) scale: Vec<f32>,
    pub(crate) shift: Vec<f32>,
}

impl Affine {
    /// A scale and a shift of the same length.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::Size`].
    pub fn new(scale: Vec<f32>, shift: Vec<f32>) -> Result<Affine, Error> {
        check_dim("scale.len()", scale.len())?;
        check_size("shift.len()", scale.len(), shift.len())?;
        Ok(Affine { scale, shift })
    }

    /// Folds running statistics: `scale = gain / sqrt(var + eps)`, `shift = bias - mean * scale`, in f64 and rounded once.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::Size`] if the lengths differ.
    ///
    /// ```
    /// use laneformer::{Affine, Context, MatMut};
    /// let norm = Affine::from_running(&[2.0], &[1.0], &[3.0], &[4.0], 0.0)?;
    /// let mut x = [3.0, 5.0];
    /// norm.apply(Context::serial(), MatMut::contiguous(&mut x, 2, 1)?)?;
    /// assert_eq!(x, [1.0, 3.0]);
    /// # Ok::<(), laneformer::Error>(())
    /// ```
    pub fn from_running(
        gain: &[f32],
        bias: &[f32],
        running_mean: &[f32],
        running_var: &[f32],
        eps: f32,
    ) -> Result<Affine, Error> {
        check_size("bias.len()", gain.len(), bias.len())?;
        check_size("running_mean.len()", gain.len(), running_mean.len())?;
        check_size("running_var.len()", gain.len(), running_var.len())?;
        let scales = gain
            .iter()
            .zip(running_var)
            .map(|(&g, &v)| f64::from(g) / (f64::from(v) + f64::from(eps)).sqrt());
        let shifts =
            scales.clone().zip(bias).zip(running_mean).map(|((s, &b), &m)| f64::from(b) - f64::from(m) * s);
        Affine::new(scales.clone().map(|s| s as f32).collect(), shifts.map(|s| s as f32).collect())
    }

    /// Channels.
    pub fn channels(&self) -> usize {
        self.scale.len()
    }

    /// `y = x * scale + shift` on each row, in place.
    ///
    /// # Shapes
    /// `x`: `[rows, channels]`, any row stride.
    ///
    /// # Special values
    /// As IEEE 754 has them: NaN stays NaN.
    ///
    /// # Errors
    /// [`Error::Size`] if a row has another length than there are channels.
    pub fn apply(&self, ctx: Context<'_>, x: MatMut<'_>) -> Result<(), Error> {
        self.rows(ctx, None, x)
    }

    /// [`apply`](Affine::apply) from `x` into `out`.
    ///
    /// # Errors
    /// [`Error::Size`] if the shapes differ, or as [`apply`](Affine::apply).
    pub fn apply_into(&self, ctx: Context<'_>, x: MatRef<'_>, out: MatMut<'_>) -> Result<(), Error> {
        check_shape(x, &out)?;
        self.rows(ctx, Some(x), out)
    }

    fn rows(&self, ctx: Context<'_>, source: Option<MatRef<'_>>, x: MatMut<'_>) -> Result<(), Error> {
        check_size("x.cols", self.channels(), x.cols())?;
        dispatch!(ctx.isa(), |s| for_tiles(
            ctx,
            s,
            source,
            x,
            #[inline(always)]
            |source, rows| self.apply_rows(s, source, rows)
        ));
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn apply_rows<S: Simd>(&self, s: S, source: Option<MatRef<'_>>, x: &mut MatMut<'_>) {
        let (rows, step) = (x.rows(), together(x.cols()));
        for begin in (0..rows).step_by(step) {
            scale_rows(
                s,
                source,
                x,
                begin..rows.min(begin + step),
                &self.scale,
                Some(&self.shift),
                #[inline(always)]
                |_| {
                    #[inline(always)]
                    |x| x
                },
            );
        }
    }
}

/// The statistics that training keeps: those of the last batch, and the running ones that inference uses.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchStats {
    /// Mean of the last batch, per channel.
    pub batch_mean: Vec<f32>,
    /// Biased variance of the last batch, per channel.
    pub batch_var: Vec<f32>,
    /// Running mean, per channel.
    pub running_mean: Vec<f32>,
    /// Running variance, per channel, of unbiased variances.
    pub running_var: Vec<f32>,
    /// Share of a new batch in the running statistics.
    pub momentum: f32,
}

impl BatchStats {
    /// Statistics that begin with the given running ones.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::Size`] if the lengths differ.
    pub fn new(running_mean: Vec<f32>, running_var: Vec<f32>, momentum: f32) -> Result<BatchStats, Error> {
        let channels = running_mean.len();
        check_dim("running_mean.len()", channels)?;
        check_size("running_var.len()", channels, running_var.len())?;
        let zeros = vec![0.0; channels];
        Ok(BatchStats { batch_mean: zeros.clone(), batch_var: zeros, running_mean, running_var, momentum })
    }
}

/// Batch normalisation in training, in place: `y = gain * (x - mean) / sqrt(var + eps) + bias` with the mean and the biased variance of each
/// channel over the valid rows, and `running = (1 - momentum) * running + momentum * batch` with the unbiased variance
/// `n / (n - 1)` (the biased one for a single row).
///
/// # Shapes
/// `x`: `[rows, channels]`; `valid`: `[rows]`, all rows if absent; `gain`, `bias` and all of `stats`: `[channels]`. Invalid rows are neither
/// read nor written. Without a valid row nothing changes.
///
/// # Special values
/// A NaN or an infinity in a channel makes its valid rows and its statistics NaN.
///
/// # Accuracy
/// Rows are added in ascending order, and the variance is centred twice as in [`layernorm`](crate::layernorm()): the relative error grows
/// with the square root of the rows. Runs on the calling thread; the same bits on every instruction set that [keeps
/// them](crate::Isa::keeps_bits).
///
/// # Errors
/// [`Error::Size`] if a length differs.
pub fn batchnorm_train(
    ctx: Context<'_>,
    x: MatMut<'_>,
    valid: Option<&[bool]>,
    gain: &[f32],
    bias: &[f32],
    eps: f32,
    stats: &mut BatchStats,
) -> Result<(), Error> {
    let channels = x.cols();
    if let Some(valid) = valid {
        check_size("valid.len()", x.rows(), valid.len())?;
    }
    for (arg, len) in [
        ("gain.len()", gain.len()),
        ("bias.len()", bias.len()),
        ("stats.batch_mean.len()", stats.batch_mean.len()),
        ("stats.batch_var.len()", stats.batch_var.len()),
        ("stats.running_mean.len()", stats.running_mean.len()),
        ("stats.running_var.len()", stats.running_var.len()),
    ] {
        check_size(arg, channels, len)?;
    }
    dispatch!(ctx.isa(), |s| s.vectorize(
        #[inline(always)]
        || train(s, x, valid, gain, bias, eps, stats)
    ));
    Ok(())
}

#[inline(always)]
fn train<S: Simd>(
    s: S,
    mut x: MatMut<'_>,
    valid: Option<&[bool]>,
    gain: &[f32],
    bias: &[f32],
    eps: f32,
    stats: &mut BatchStats,
) {
    let is_valid = |i: usize| valid.is_none_or(|v| v[i]);
    let count = (0..x.rows()).filter(|&i| is_valid(i)).count();
    if count == 0 {
        return;
    }
    let n = s.splat(count as f32);
    let unbiased = if count > 1 { count as f32 / (count - 1) as f32 } else { 1.0 };
    let zero = s.splat(0.0);
    for start in (0..x.cols()).step_by(LANES) {
        let cols = start..x.cols().min(start + LANES);

        let mut sum = zero;
        for i in (0..x.rows()).filter(|&i| is_valid(i)) {
            sum = sum + lanes(s, x.row(i), &cols);
        }
        let mean = sum / n;
        let (mut rest, mut squares) = (zero, zero);
        for i in (0..x.rows()).filter(|&i| is_valid(i)) {
            let d = lanes(s, x.row(i), &cols) - mean;
            rest = rest + d;
            squares = d.mul_add(d, squares);
        }
        let centre = rest / n;
        // Rounding may leave less than nothing of a constant channel.
        let var = zero.max(squares / n - centre * centre);
        let inv = s.splat(1.0) / (var + s.splat(eps)).sqrt();
        let (g, b) = (lanes(s, gain, &cols), lanes(s, bias, &cols));
        for i in (0..x.rows()).filter(|&i| is_valid(i)) {
            let y = (((lanes(s, x.row(i), &cols) - mean) - centre) * inv).mul_add(g, b);
            y.store_partial(&mut x.row_mut(i)[cols.clone()]);
        }

        let (keep, take) = (s.splat(1.0 - stats.momentum), s.splat(stats.momentum));
        let mean = mean + centre;
        mean.store_partial(&mut stats.batch_mean[cols.clone()]);
        var.store_partial(&mut stats.batch_var[cols.clone()]);
        let running = lanes(s, &stats.running_mean, &cols) * keep + mean * take;
        running.store_partial(&mut stats.running_mean[cols.clone()]);
        let running = lanes(s, &stats.running_var, &cols) * keep + var * s.splat(unbiased) * take;
        running.store_partial(&mut stats.running_var[cols.clone()]);
    }
}

/// The columns `cols` of a row, zeros behind them.
#[inline(always)]
fn lanes<S: Simd>(s: S, row: &[f32], cols: &Range<usize>) -> S::V {
    s.load_partial(&row[cols.clone()], s.splat(0.0))
}
