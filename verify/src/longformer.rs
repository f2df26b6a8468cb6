//! Cases of Longformer.

use laneformer::Context;
use laneformer_models::longformer::Longformer;
use laneformer_models::ragged::Ragged;
use laneformer_models::{Batch, Scratch};

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn longformer(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = Longformer::load(case.path(), case.json(), case.weights())?;
    let [_, seq_len] = case.shape("input_ids")?;
    let mask = case.mask("attention_mask")?;
    // Padding between real tokens stays: windows count it.
    let mut kept = mask.clone();
    for sequence in kept.chunks_mut(seq_len.max(1)) {
        let ends = sequence.iter().position(|&real| real).zip(sequence.iter().rposition(|&real| real));
        if let Some((first, last)) = ends {
            sequence[first..=last].fill(true);
        }
    }
    let tokens = Ragged::from_mask(&kept, seq_len);
    let ids = case.indices("input_ids")?;
    let positions: Vec<_> = ids.chunks(seq_len.max(1)).flat_map(|ids| model.positions(ids)).collect();
    let (ids, positions) = (tokens.gather(&ids, 1)?, tokens.gather(&positions, 1)?);
    let type_ids = tokens.gather(&case.indices("token_type_ids")?, 1)?;
    let is_real = tokens.gather(&mask, 1)?;
    let is_global = tokens.gather(&case.mask("global_attention_mask")?, 1)?;
    let is_global: Vec<_> = is_global.iter().zip(&is_real).map(|(&global, &real)| global && real).collect();

    let offsets = tokens.offsets();
    let (positions, is_real) = (&positions[..], Some(&is_real[..]));
    let batch = Batch { ids: &ids, type_ids: &type_ids, positions, offsets, is_real };
    let hidden = model.forward(&mut Scratch::default().with(ctx), batch, &is_global)?;
    let padded = tokens.scatter(&hidden, model.config.hidden_size);
    let mut outputs = Outputs::from([("last_hidden_state".into(), padded)]);
    if !case.run().no_pooler
        && let Some(pooled) = model.pool(ctx, &hidden, offsets)?
    {
        outputs.insert("pooler_output".into(), pooled);
    }
    Ok(outputs)
}
