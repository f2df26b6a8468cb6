//! Elementwise functions: as operations of their own, and as the activation of a GEMM's epilogue.

use crate::context::Context;
use crate::error::Error;
use crate::isa::dispatch;
use crate::math;
use crate::reduce;
use crate::rows::{check_shape, for_tiles};
use crate::simd::Simd;
use crate::view::{MatMut, MatRef};

/// An elementwise function; the formulas, accuracy and special values are on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Function {
    /// `e^x`, with gradual underflow.
    Exp,
    /// The hyperbolic tangent.
    Tanh,
    /// The error function.
    Erf,
    /// `max(0, x)`: NaN stays NaN and -0 stays -0.
    Relu,
    /// `x / 2 * (1 + erf(x / sqrt 2))`: BERT, BART, ViT.
    GeluErf,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`: GPT-1, GPT-2.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`: CLIP.
    QuickGelu,
    /// `x * sigmoid(x)`: Llama's gated FFN.
    Silu,
}

/// What a GEMM's epilogue does to each element before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// [`Function::Relu`].
    Relu,
    /// [`Function::GeluErf`].
    GeluErf,
    /// [`Function::GeluTanh`].
    GeluTanh,
    /// [`Function::QuickGelu`].
    QuickGelu,
    /// [`Function::Silu`].
    Silu,
    /// [`Function::Tanh`].
    Tanh,
}

/// Applies `function` to each element, in place.
///
/// # Shapes
/// `x`: any, with any row stride.
///
/// # Special values
/// NaN stays NaN. The gelus and silu of `-inf` are NaN, as their formulas are (`-inf * 0`); of `+inf`, `+inf`.
///
/// # Accuracy
/// The table in the [crate documentation](crate#accuracy). The same bits on every instruction set that [keeps
/// them](crate::Isa::keeps_bits).
///
/// # Errors
/// None today; the signature leaves room.
///
/// ```
/// use laneformer::{Context, Function, MatMut, elementwise};
/// let mut x = [-1.0, 2.0];
/// elementwise(Context::serial(), Function::Relu, MatMut::contiguous(&mut x, 1, 2)?)?;
/// assert_eq!(x, [0.0, 2.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
pub fn elementwise(ctx: Context<'_>, function: Function, x: MatMut<'_>) -> Result<(), Error> {
    dispatch!(ctx.isa(), |s| apply(ctx, s, function, None, x));
    Ok(())
}

/// [`elementwise`] from `x` into `out`.
///
/// # Errors
/// [`Error::Size`] if the shapes differ.
pub fn elementwise_into(
    ctx: Context<'_>,
    function: Function,
    x: MatRef<'_>,
    out: MatMut<'_>,
) -> Result<(), Error> {
    check_shape(x, &out)?;
    dispatch!(ctx.isa(), |s| apply(ctx, s, function, Some(x), out));
    Ok(())
}

#[inline(always)]
fn apply<S: Simd>(ctx: Context<'_>, s: S, function: Function, source: Option<MatRef<'_>>, out: MatMut<'_>) {
    macro_rules! rows {
        ($f:path) => {
            for_tiles(
                ctx,
                s,
                source,
                out,
                #[inline(always)]
                |source, out| {
                    for i in 0..out.rows() {
                        reduce::map(
                            s,
                            source.map(|source| source.row(i)),
                            out.row_mut(i),
                            #[inline(always)]
                            |v| $f(s, v),
                        );
                    }
                },
            )
        };
    }
    match function {
        Function::Exp => rows!(math::exp),
        Function::Tanh => rows!(math::tanh),
        Function::Erf => rows!(math::erf),
        Function::Relu => rows!(math::relu),
        Function::GeluErf => rows!(math::gelu_erf),
        Function::GeluTanh => rows!(math::gelu_tanh),
        Function::QuickGelu => rows!(math::quick_gelu),
        Function::Silu => rows!(math::silu),
    }
}

/// Something to run with an activation's function chosen: a loop that is compiled once for each.
pub(crate) trait WithActivation<S: Simd> {
    /// Runs with the function.
    fn run(&mut self, f: impl Fn(S::V) -> S::V);
}

impl Activation {
    /// The same as an operation of its own; `None` for nothing.
    pub fn function(self) -> Option<Function> {
        Some(match self {
            Activation::None => return None,
            Activation::Relu => Function::Relu,
            Activation::GeluErf => Function::GeluErf,
            Activation::GeluTanh => Function::GeluTanh,
            Activation::QuickGelu => Function::QuickGelu,
            Activation::Silu => Function::Silu,
            Activation::Tanh => Function::Tanh,
        })
    }

    /// Chooses the function once, outside the loop.
    #[inline(always)]
    pub(crate) fn choose<S: Simd>(self, s: S, body: &mut impl WithActivation<S>) {
        macro_rules! run {
            ($f:path) => {
                body.run(
                    #[inline(always)]
                    |v| $f(s, v),
                )
            };
        }
        match self {
            Activation::None => body.run(
                #[inline(always)]
                |v| v,
            ),
            Activation::Relu => run!(math::relu),
            Activation::GeluErf => run!(math::gelu_erf),
            Activation::GeluTanh => run!(math::gelu_tanh),
            Activation::QuickGelu => run!(math::quick_gelu),
            Activation::Silu => run!(math::silu),
            Activation::Tanh => run!(math::tanh),
        }
    }
}
