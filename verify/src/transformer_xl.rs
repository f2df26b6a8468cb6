//! Cases of Transformer-XL.

use laneformer::Context;
use laneformer_models::Scratch;
use laneformer_models::run::project;
use laneformer_models::transformer_xl::TransformerXl;

use crate::Result;
use crate::case::{Case, Outputs};

/// Feeds the segments one after another.
pub(crate) fn transformer_xl(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = TransformerXl::load(case.path(), case.json(), case.weights())?;
    let [sequences, seq_len] = case.shape("input_ids")?;
    let (ids, segments) = (case.indices("input_ids")?, &case.run().segments);
    if segments.iter().sum::<usize>() != seq_len {
        return Err(case.error(format!("run.segments: expected a sum of {seq_len}, got {segments:?}")));
    }
    let (mut memory, mut scratch) = (model.memory(sequences), Scratch::default());
    let (mut outputs, mut start) = (Outputs::new(), 0);
    for (s, len) in segments.iter().enumerate() {
        let segment: Vec<_> =
            ids.chunks(seq_len.max(1)).flat_map(|ids| &ids[start..start + len]).copied().collect();
        let hidden = model.forward(&mut scratch.with(ctx), &segment, &mut memory)?;
        outputs.insert(format!("segment{s}.logits"), project(ctx, &model.head, &hidden)?);
        outputs.insert(format!("segment{s}.last_hidden_state"), hidden);
        start += len;
    }
    for i in 0..model.config.n_layer {
        if let Some(inputs) = memory.inputs(i) {
            outputs.insert(format!("mems.{i}"), inputs.to_vec());
        }
    }
    Ok(outputs)
}
