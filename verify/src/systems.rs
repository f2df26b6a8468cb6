//! Cases of whole models: inputs to calls, results to outputs.

use laneformer::{BatchStats, Context, Graph, Inputs, MatMut, batchnorm_train};
use laneformer_models::bert::Bert;
use laneformer_models::embedding::Embeddings;
use laneformer_models::ragged::Ragged;
use laneformer_models::run::project;
use laneformer_models::vanilla::{self, Vanilla};
use laneformer_models::{Batch, Scratch, Weights, encoder};
use serde::Deserialize;

use crate::Result;
use crate::case::{Case, Outputs};

pub(crate) fn bert(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let model = Bert::load(case.path(), case.json(), case.weights())?;
    let d = model.config.hidden_size;
    let tokens = case.ragged("attention_mask")?;
    let ids = tokens.gather(&case.indices("input_ids")?, 1)?;
    let type_ids = tokens.gather(&case.indices("token_type_ids")?, 1)?;
    let (positions, offsets) = (tokens.positions(), tokens.offsets());
    let batch = Batch { ids: &ids, type_ids: &type_ids, positions, offsets, is_real: None };

    let mut outputs = Outputs::new();
    let hidden = model.forward(&mut Scratch::default().with(ctx), batch)?;
    outputs.insert("last_hidden_state".into(), tokens.scatter(&hidden, d));
    if !case.run().no_pooler
        && let Some(pooled) = model.pool(ctx, &hidden, offsets)?
    {
        outputs.insert("pooler_output".into(), pooled);
    }
    if case.run().hidden_states {
        for (i, x) in model.hidden_states(ctx, batch)?.iter().enumerate() {
            outputs.insert(format!("hidden_states.{i}"), tokens.scatter(x, d));
        }
    }
    Ok(outputs)
}

pub(crate) fn vanilla(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let config: vanilla::Config = case.config()?;
    let d = config.d_model;
    let model = Vanilla::load(case.path(), &config, case.weights())?;
    // Tokens of a model with a vocabulary, features of one without.
    let input = |name: &str, embeddings: Option<&Embeddings>, tokens: &Ragged| -> Result<_> {
        let Some(embeddings) = embeddings else { return Ok(tokens.gather(&case.f32(name)?, d)?) };
        let ids = tokens.gather(&case.indices(&format!("{name}_ids"))?, 1)?;
        let (positions, offsets) = (tokens.positions(), tokens.offsets());
        Ok(embeddings.forward(ctx, Batch { ids: &ids, positions, offsets, ..Batch::default() })?)
    };
    let src = case.ragged("src_mask")?;
    let mut memory = input("src", model.source.as_ref(), &src)?;
    model.encoder.encode(&mut Scratch::default().with(ctx), &mut memory, src.offsets())?;
    let mut outputs = Outputs::from([("memory".into(), src.scatter(&memory, d))]);

    let Some(decoder) = &model.decoder else { return Ok(outputs) };
    let tgt = case.ragged("tgt_mask")?;
    let mut x = input("tgt", model.target.as_ref().map(|(embeddings, _)| embeddings), &tgt)?;
    let mut scratch = Scratch::default();
    let run = &mut scratch.with(ctx);
    let (sources, graph) = (decoder.sources(run, &memory, src.offsets())?, Graph::causal());
    let mut inputs = Inputs { sources: &sources, ..Inputs::new(tgt.offsets(), &graph) };
    decoder.forward(run, &mut x, &mut inputs)?;
    if let Some((_, head)) = &model.target {
        let logits = project(ctx, head, &x)?;
        outputs.insert("logits".into(), tgt.scatter(&logits, config.vocab_size));
    }
    outputs.insert("last_hidden_state".into(), tgt.scatter(&x, d));
    Ok(outputs)
}

pub(crate) fn norms(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    if case.run().train {
        return batchnorm_training(ctx, case);
    }
    let config: encoder::Config = case.config()?;
    let encoder = config.load(case.path(), case.weights())?;
    let tokens = case.ragged("attention_mask")?;
    let mut x = tokens.gather(&case.f32("x")?, config.d_model)?;
    encoder.encode(&mut Scratch::default().with(ctx), &mut x, tokens.offsets())?;
    Ok(Outputs::from([("y".into(), tokens.scatter(&x, config.d_model))]))
}

fn batchnorm_training(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    #[derive(Deserialize)]
    struct Config {
        d_model: usize,
        eps: f32,
        momentum: f32,
    }
    let Config { d_model, eps, momentum } = case.config()?;
    let w = Weights::new(case.weights(), "norm");
    let of = |name| w.tensor(name, &[d_model]);
    let (gain, bias) = (of("weight")?, of("bias")?);
    let mut stats =
        BatchStats::new(of("running_mean")?.into_owned(), of("running_var")?.into_owned(), momentum)?;
    let mut y = case.f32("x")?;
    let valid = case.mask("attention_mask")?;
    let x = MatMut::contiguous(&mut y, valid.len(), d_model)?;
    batchnorm_train(ctx, x, Some(&valid), &gain, &bias, eps, &mut stats)?;
    Ok(Outputs::from([
        ("y".into(), y),
        ("batch_mean".into(), stats.batch_mean),
        ("batch_var".into(), stats.batch_var),
        ("running_mean".into(), stats.running_mean),
        ("running_var".into(), stats.running_var),
    ]))
}
