//! Cases of the attention operation.

use laneformer::{Bias, Bits, Context, Graph, Heads, KeyStore, MatMut, MatRef, QueryRows, Terms};
use serde::Deserialize;

use crate::Result;
use crate::case::{Case, Outputs};

#[derive(Deserialize)]
struct Config {
    scale: f32,
    #[serde(default)]
    softcap: f32,
    #[serde(default)]
    causal: bool,
    /// Keys before and after a query's position; negative is no limit.
    #[serde(default = "unlimited")]
    window: [i64; 2],
}

fn unlimited() -> [i64; 2] {
    [-1, -1]
}

pub(crate) fn attention(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let config: Config = case.config()?;
    let [batch, queries, n_heads, head_dim] = case.shape("q")?;
    let [_, new_keys, n_kv_heads, _] = case.shape("k")?;
    let [.., value_dim] = case.shape::<4>("v")?;
    let past = if case.has("past_k") { case.shape::<4>("past_k")?[1] } else { 0 };
    let heads = Heads::new(n_heads, head_dim)?
        .with_kv_heads(n_kv_heads)?
        .with_value_dim(value_dim)?
        .with_scale(config.scale)
        .with_softcap(config.softcap);
    let graph = graph(case, &config, past + new_keys)?;
    let bias = case.f32_if_there("bias")?;
    let bias = bias.as_ref().map(|bias| Bias::new(bias, case.shape("bias")?).map_err(crate::Error::from));
    let terms = Terms { bias: bias.transpose()?, ..Terms::default() };

    // Keys and values: those of the past, then the new ones.
    let (k, v) = (behind_past(case, "past_k", "k", batch)?, behind_past(case, "past_v", "v", batch)?);
    let tokens = batch * (past + new_keys);
    let offsets = |len: usize| (0..=batch).map(|b| b * len).collect::<Vec<_>>();
    let mut keys = KeyStore::new(&heads, tokens, batch)?;
    keys.set(
        ctx,
        MatRef::contiguous(&k, tokens, heads.key_cols())?,
        MatRef::contiguous(&v, tokens, heads.value_cols())?,
        &offsets(past + new_keys),
    )?;

    let first = if case.has("offset") {
        case.io().i64("in.offset")?.iter().map(|&offset| offset as isize).collect()
    } else {
        vec![0; batch]
    };
    let (q, rows, q_offsets) = (case.f32("q")?, batch * queries, offsets(queries));
    let q = MatRef::contiguous(&q, rows, heads.query_cols())?;
    let mut y = vec![0.0; rows * heads.output_cols()];
    let out = MatMut::contiguous(&mut y, rows, heads.output_cols())?;
    keys.attend(ctx, &heads, &QueryRows::new(q, &q_offsets).starting_at(&first), &graph, &terms, out)?;
    Ok(Outputs::from([("y".into(), y)]))
}

/// Causal, window, mask and lengths of keys, combined by AND.
fn graph(case: &Case, config: &Config, keys: usize) -> Result<Graph> {
    let [left, right] = config.window.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    let mut graph = Graph::window(left, if config.causal { 0 } else { right });
    if case.has("mask") {
        let [sequences, heads, queries, keys] = case.shape("mask")?;
        let mask = case.mask("mask")?;
        let at = |s, h, q, k| mask[((s * heads + h) * queries + q) * keys + k];
        graph = graph.with_bits(Bits::dense([sequences, heads, queries, keys], at)?);
    }
    if case.has("kv_len") {
        let lens = case.indices("kv_len")?;
        let is_key = |s: usize, _, _, key| key < lens[s] as usize;
        graph = graph.with_bits(Bits::dense([lens.len(), 1, 1, keys], is_key)?);
    }
    Ok(graph)
}

/// `name` [B, T, ...] with the rows of `past` [B, P, ...] before those of each sequence.
fn behind_past(case: &Case, past: &str, name: &str, batch: usize) -> Result<Vec<f32>> {
    let new = case.f32(name)?;
    let Some(past) = case.f32_if_there(past)? else { return Ok(new) };
    let sequence = |x: &[f32], b: usize| x[x.len() / batch * b..][..x.len() / batch].to_vec();
    Ok((0..batch).flat_map(|b| [sequence(&past, b), sequence(&new, b)].concat()).collect())
}
