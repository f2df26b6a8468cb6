//! A layer whose self-attention runs along the edges of a graph over the tokens.

use std::path::Path;

use laneformer::{Bias, Bits, Context, Graph, Inputs, Terms};

use crate::Result;
use crate::attend::offsets;
use crate::checkpoint::Checkpoint;
use crate::encoder::{Config, ENCODER, Layers};
use crate::error::check_size;
use crate::ragged::Scratch;
use crate::weights::Weights;

/// Who sees whom among `seq_len` tokens of each sequence; what is given is combined by AND.
#[derive(Clone, Copy, Debug, Default)]
pub struct Edges<'a> {
    /// `[sequences or 1, queries, keys]`; `true` where the query sees the key.
    pub allowed: Option<&'a [bool]>,
    /// A group per token and the table [query's group, key's group] of who sees whom.
    pub groups: Option<(&'a [u32], &'a [bool])>,
    /// `[sequences, keys]`; `true` is a real token.
    pub real: Option<&'a [bool]>,
}

impl Edges<'_> {
    /// The graph of a batch of sequences of the same length.
    pub fn graph(&self, sequences: usize, seq_len: usize) -> Result<Graph> {
        let mut graph = Graph::full();
        let edges = seq_len * seq_len;
        if let Some(allowed) = self.allowed {
            let of_allowed = if allowed.len() == edges { 1 } else { sequences };
            check_size("allowed", of_allowed * edges, allowed.len())?;
            let sees = |sequence, _, query, key| allowed[(sequence * seq_len + query) * seq_len + key];
            graph = graph.with_bits(Bits::dense([of_allowed, 1, seq_len, seq_len], sees)?);
        }
        if let Some((ids, table)) = self.groups {
            let n_groups = table.len().isqrt();
            graph = graph.with_bits(Bits::groups(ids, ids, &offsets(sequences, seq_len), n_groups, table)?);
        }
        if let Some(real) = self.real {
            check_size("real", sequences * seq_len, real.len())?;
            graph = graph.with_bits(Bits::keys(&real.chunks(seq_len.max(1)).collect::<Vec<_>>())?);
        }
        Ok(graph)
    }
}

/// The layer.
#[derive(Debug)]
pub struct GraphLayer {
    layer: Layers,
    d_model: usize,
}

impl GraphLayer {
    /// Packs the weights below `layer`; `path` is for messages.
    pub fn load(path: &Path, config: &Config, checkpoint: &Checkpoint) -> Result<GraphLayer> {
        let layer = config.layers(path)?.single(&Weights::new(checkpoint, "layer"), ENCODER)?;
        Ok(GraphLayer { layer, d_model: config.d_model })
    }

    /// Runs over `x`, [sequences, seq_len, d_model], in place; `edge_bias`, [seq_len, seq_len], is added to the scores of
    /// every head.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: &mut [f32],
        sequences: usize,
        edges: &Edges<'_>,
        edge_bias: Option<&[f32]>,
    ) -> Result<()> {
        let seq_len = x.len() / self.d_model / sequences.max(1);
        let (offsets, graph) = (offsets(sequences, seq_len), edges.graph(sequences, seq_len)?);
        let bias = edge_bias.map(|bias| Bias::new(bias, [1, 1, seq_len, seq_len])).transpose()?;
        let terms = Terms { bias, ..Terms::default() };
        let mut inputs = Inputs { terms, ..Inputs::new(&offsets, &graph) };
        self.layer.forward(ctx, x, &mut inputs, &mut Scratch::default())
    }
}
