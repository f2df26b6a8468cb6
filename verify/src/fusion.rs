//! Cases of two fused streams.

use laneformer::Context;
use laneformer_models::Scratch;
use laneformer_models::fusion::{Fusion, Stream};

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn fusion(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let fusion = Fusion::load(case.path(), case.json(), case.weights())?;
    let d = fusion.layer_config.d_model;
    let is_sum = fusion.config.fusion == "early_sum";
    // A sum is of tokens at the same places: those that are real in `a`.
    let (tokens_a, tokens_b) =
        (case.ragged("mask_a")?, case.ragged(if is_sum { "mask_a" } else { "mask_b" })?);
    let mut a = Stream { x: tokens_a.gather(&case.f32("a")?, d)?, offsets: tokens_a.offsets().to_vec() };
    let mut b = Stream { x: tokens_b.gather(&case.f32("b")?, d)?, offsets: tokens_b.offsets().to_vec() };
    let bottleneck = fusion.forward(&mut Scratch::default().with(ctx), &mut a, &mut b)?;
    let (a, b) = (tokens_a.scatter(&a.x, d), tokens_b.scatter(&b.x, d));
    let mut outputs = Outputs::from([(if is_sum { "z" } else { "a" }.into(), a), ("b".into(), b)]);
    outputs.extend(bottleneck.map(|x| ("bottleneck".into(), x)));
    Ok(outputs)
}
