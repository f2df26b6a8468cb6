//! Cases of attention along a graph.

use laneformer::{Bias, Bits, Context, Graph, Inputs, Terms};
use laneformer_models::encoder::{Config, ENCODER};
use laneformer_models::ragged::offsets;
use laneformer_models::{Scratch, Weights};

use crate::case::{Case, Outputs};
use crate::{Error, Result};

/// Edges, groups of tokens and key padding are combined by AND.
pub(crate) fn graph(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let config: Config = case.config()?;
    let layer = config.layers(case.path())?.single(&Weights::new(case.weights(), "layer"), ENCODER)?;
    let [sequences, seq_len, _] = case.shape("x")?;
    let (mut graph, offsets) = (Graph::full(), offsets(sequences, seq_len));
    if case.has("allowed") {
        let allowed = case.mask("allowed")?;
        let n = if allowed.len() == seq_len * seq_len { 1 } else { sequences };
        if allowed.len() != n * seq_len * seq_len {
            return Err(case.error(format!("in.allowed: expected edges of {seq_len} tokens")));
        }
        let sees = |sequence, _, query, key| allowed[(sequence * seq_len + query) * seq_len + key];
        graph = graph.with_bits(Bits::dense([n, 1, seq_len, seq_len], sees)?);
    }
    if case.has("group_table") {
        let (ids, table) = (case.indices("group_ids")?, case.mask("group_table")?);
        graph = graph.with_bits(Bits::groups(&ids, &ids, &offsets, table.len().isqrt(), &table)?);
    }
    if case.has("attention_mask") {
        let real = case.mask("attention_mask")?;
        graph = graph.with_bits(Bits::keys(&real.chunks(seq_len.max(1)).collect::<Vec<_>>())?);
    }
    let bias = case.f32_if_there("edge_bias")?;
    let bias = bias.as_ref().map(|bias| Bias::new(bias, [1, 1, seq_len, seq_len]).map_err(Error::from));
    let terms = Terms { bias: bias.transpose()?, ..Terms::default() };
    let mut y = case.f32("x")?;
    let mut inputs = Inputs { terms, ..Inputs::new(&offsets, &graph) };
    layer.forward(&mut Scratch::default().with(ctx), &mut y, &mut inputs)?;
    Ok(Outputs::from([("y".into(), y)]))
}
