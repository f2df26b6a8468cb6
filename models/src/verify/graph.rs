//! Cases of attention along a graph.

use laneformer::Context;

use super::case::{Case, Outputs};
use crate::Result;
use crate::graph::{Edges, GraphLayer};

pub(super) fn graph(ctx: Context<'_>, case: &Case) -> Result<Outputs> {
    let layer = GraphLayer::load(case.path(), &case.config()?, case.weights())?;
    let mask = |name| if case.has(name) { case.mask(name).map(Some) } else { Ok(None) };
    let (allowed, table, real) = (mask("allowed")?, mask("group_table")?, mask("attention_mask")?);
    let ids = if table.is_some() { case.indices("group_ids")? } else { vec![] };
    let edges = Edges {
        allowed: allowed.as_deref(),
        groups: table.as_deref().map(|table| (&ids[..], table)),
        real: real.as_deref(),
    };
    let [sequences, ..] = case.shape::<3>("x")?;
    let mut y = case.f32("x")?;
    layer.forward(ctx, &mut y, sequences, &edges, case.f32_if_there("edge_bias")?.as_deref())?;
    Ok(Outputs::from([("y".into(), y)]))
}
