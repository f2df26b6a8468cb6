//! Cases of XLNet.

use laneformer::Context;
use laneformer_models::Scratch;
use laneformer_models::memory::Rows;
use laneformer_models::run::project;
use laneformer_models::xlnet::{Batch, Config, XlNet};

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn xlnet(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = XlNet::load(case.path(), case.json(), case.weights())?;
    let [sequences, _] = case.shape("input_ids")?;
    let ids = case.indices("input_ids")?;
    let Config { n_layer, mem_len, .. } = model.config;
    let mask = |name| case.has(name).then(|| case.mask(name)).transpose();
    let (is_real, is_hidden) = (mask("attention_mask")?, mask("perm_mask")?);
    let segments = case.has("token_type_ids").then(|| case.indices("token_type_ids")).transpose()?;
    let targets = case.has("target_mapping").then(|| targets(case)).transpose()?;
    let layers = if case.has("mems.0") { n_layer } else { 0 };
    let mems = (0..layers).map(|i| case.f32(&format!("mems.{i}"))).collect::<Result<Vec<_>>>()?;
    // Not from their shapes: one with a 0 in it may have any number beside it.
    let of_each = |len: usize, cols: usize| len.checked_div(sequences.saturating_mul(cols)).unwrap_or(0);
    let memory = of_each(mems.first().map_or(0, Vec::len), model.config.d_model);
    let batch = Batch {
        sequences,
        ids: &ids,
        is_real: is_real.as_deref(),
        segments: segments.as_deref(),
        is_hidden: is_hidden.as_deref(),
        targets: targets.as_deref(),
        mems: &mems,
    };
    let mut scratch = Scratch::default();
    let run = &mut scratch.with(ctx);
    let positions = model.positions(run, of_each(ids.len(), 1), memory)?;
    let output = model.forward(run, &batch, &positions)?;

    let mut outputs = Outputs::new();
    let mut last = output.content;
    if let Some(queries) = output.queries {
        outputs.insert("content_hidden_state".into(), last);
        last = queries;
    }
    outputs.insert("logits".into(), project(ctx, &model.head, &last)?);
    outputs.insert("last_hidden_state".into(), last);
    for (i, mems) in output.mems.into_iter().enumerate() {
        outputs.insert(format!("mems.{i}"), mems);
    }
    if let Some(is_real) = is_real {
        let is_real: Vec<_> = is_real.iter().map(|&real| f32::from(u8::from(real))).collect();
        let mut mask = Rows::new(sequences);
        mask.push(&vec![1.0; sequences * memory]);
        mask.push(&is_real);
        let mem_len = mem_len.filter(|&len| len > 0).unwrap_or(usize::MAX);
        mask.keep_last(mem_len, 1);
        outputs.insert("mems_mask".into(), mask.packed(&mut vec![]).to_vec());
    }
    Ok(outputs)
}

/// The places that a one-hot mapping [sequences, targets, T] points at.
fn targets(case: &Case) -> Result<Vec<usize>> {
    let [.., seq_len] = case.shape::<3>("target_mapping")?;
    let mapping = case.mask("target_mapping")?;
    let place = |row: &[bool]| {
        let place = row.iter().position(|&here| here);
        place.ok_or_else(|| case.error("in.target_mapping: a target without a place".into()))
    };
    mapping.chunks(seq_len.max(1)).map(place).collect()
}
