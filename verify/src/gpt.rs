//! Cases of GPT and GPT-2.

use laneformer::Context;
use laneformer_models::encoder::Decoding;
use laneformer_models::gpt::Gpt;
use laneformer_models::ragged::Ragged;
use laneformer_models::run::project;
use laneformer_models::{Batch, Scratch};

use crate::Result;
use crate::case::{Case, Outputs};

/// Feeds the tokens in the pieces that the case lists, with a cache, or all at once without.
pub(crate) fn gpt(ctx: Context<'_>, case: &Case, model_type: &str) -> Result<Outputs> {
    let mut json = case.json().clone();
    if let Some(fields) = json.as_object_mut() {
        fields.insert("model_type".into(), model_type.into());
    }
    let model = Gpt::load(case.path(), &json, case.weights())?;
    let [sequences, seq_len] = case.shape("attention_mask")?;
    let (mask, ids) = (case.mask("attention_mask")?, case.indices("input_ids")?);
    let whole = [seq_len];
    let chunks = if case.run().chunks.is_empty() { &whole[..] } else { &case.run().chunks };
    if chunks.iter().sum::<usize>() != seq_len {
        return Err(case.error(format!("run.chunks: expected a sum of {seq_len}, got {chunks:?}")));
    }
    let layers = &model.decoder.layers;
    let caches = if chunks.len() > 1 { layers.caches(sequences, seq_len)? } else { vec![] };
    let mut state = Decoding { caches, ..Decoding::default() };

    let (d, vocab_size) = (model.config.n_embd, model.config.vocab_size);
    let mut hidden = vec![0.0; mask.len() * d];
    let mut logits = vec![0.0; mask.len() * vocab_size];
    let (mut scratch, mut start) = (Scratch::default(), 0);
    for chunk in chunks {
        let end = start + chunk;
        let in_chunk = |(i, &real): (usize, &bool)| real && (start..end).contains(&(i % seq_len));
        let tokens = Ragged::from_mask(&mask.iter().enumerate().map(in_chunk).collect::<Vec<_>>(), seq_len);
        let ids = tokens.gather(&ids, 1)?;
        let positions = if case.has("position_ids") {
            tokens.gather(&case.indices("position_ids")?, 1)?
        } else {
            tokens.positions().to_vec()
        };
        let batch = Batch { ids: &ids, positions: &positions, offsets: tokens.offsets(), ..Batch::default() };
        let x = model.decoder.decode(&mut scratch.with(ctx), batch, &mut state)?;
        tokens.scatter_into(&project(ctx, &model.head, &x)?, vocab_size, &mut logits);
        tokens.scatter_into(&x, d, &mut hidden);
        start = end;
    }
    Ok(Outputs::from([("last_hidden_state".into(), hidden), ("logits".into(), logits)]))
}
