//! Cases of BART.

use laneformer::Context;
use laneformer_models::bart::Bart;
use laneformer_models::head::argmax;
use laneformer_models::run::project;
use laneformer_models::{Batch, Scratch};

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn bart(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = Bart::load(case.path(), case.json(), case.weights())?;
    let (d, run) = (model.config.d_model, case.run());
    let src = case.ragged("attention_mask")?;
    let src_ids = src.gather(&case.indices("input_ids")?, 1)?;
    let batch =
        Batch { ids: &src_ids, positions: src.positions(), offsets: src.offsets(), ..Batch::default() };
    let memory = model.encoder.encode(&mut Scratch::default().with(ctx), batch)?;
    let begin = |capacity| model.decoder.layers.begin(ctx, &memory, src.offsets(), capacity);

    let [sequences, seq_len] = case.shape("decoder_input_ids")?;
    let (ids, scratch) = (case.indices("decoder_input_ids")?, &mut Scratch::default());
    // The tokens go one by one through a cache, or all at once without.
    let (step, mut decoding) = if run.cached { (1, begin(seq_len)?) } else { (seq_len, begin(0)?) };
    let offsets = |step| (0..=sequences).map(|sequence| sequence * step).collect::<Vec<_>>();
    let (mut hidden, places) = (vec![0.0; ids.len() * d], (0..seq_len as u32).collect::<Vec<_>>());
    for start in (0..seq_len).step_by(step.max(1)) {
        let of_step = |sequence| sequence * seq_len + start..sequence * seq_len + start + step;
        let ids: Vec<u32> = (0..sequences).flat_map(|sequence| &ids[of_step(sequence)]).copied().collect();
        let positions = places[start..start + step].repeat(sequences);
        let batch = Batch { ids: &ids, positions: &positions, offsets: &offsets(step), ..Batch::default() };
        let x = model.decoder.decode(&mut scratch.with(ctx), batch, &mut decoding)?;
        for (sequence, x) in x.chunks(step * d).enumerate() {
            let range = of_step(sequence);
            hidden[range.start * d..range.end * d].copy_from_slice(x);
        }
    }
    let mut outputs = Outputs::from([
        ("encoder_last_hidden_state".into(), src.scatter(&memory, d)),
        ("logits".into(), project(ctx, &model.head, &hidden)?),
        ("last_hidden_state".into(), hidden),
    ]);
    if run.greedy_steps == 0 {
        return Ok(outputs);
    }

    let (steps, n) = (run.greedy_steps, model.config.vocab_size);
    let (mut all_ids, mut all_logits) = (vec![0.0; sequences * steps], vec![0.0; sequences * steps * n]);
    let (mut decoding, mut ids) = (begin(steps)?, vec![model.config.decoder_start_token_id; sequences]);
    for step in 0..steps {
        let positions = vec![step as u32; sequences];
        let batch = Batch { ids: &ids, positions: &positions, offsets: &offsets(1), ..Batch::default() };
        let x = model.decoder.decode(&mut scratch.with(ctx), batch, &mut decoding)?;
        for (sequence, logits) in project(ctx, &model.head, &x)?.chunks(n).enumerate() {
            let at = sequence * steps + step;
            ids[sequence] = argmax(logits) as u32;
            all_ids[at] = ids[sequence] as f32;
            all_logits[at * n..][..n].copy_from_slice(logits);
        }
    }
    outputs.extend([("greedy_ids".into(), all_ids), ("greedy_logits".into(), all_logits)]);
    Ok(outputs)
}
