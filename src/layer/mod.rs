//! A Transformer layer: sub-layers in order, each with its norm, run in place as one parallel region.

mod workspace;

pub use workspace::Workspace;

use workspace::Buffers;

use crate::attention::{
    Call, Graph, Heads, KeyStore, KvCache, Places, QkvProjection, QueryRows, Rows, Stores, Terms,
    attend_phase,
};
use crate::context::Context;
use crate::error::{Error, check_dim, check_size};
use crate::exec::Crew;
use crate::ffn::Ffn;
use crate::linear::{Linear, padded_stride};
use crate::norm::Placement;
use crate::residual::close_phase;
use crate::simd::Simd;
use crate::split::Columns;
use crate::view::{MatMut, MatRef};

/// Self-attention with its projections: `out_proj(attention(qkv(x)))`.
#[derive(Debug)]
pub struct SelfAttention {
    qkv: QkvProjection,
    out: Linear,
}

impl SelfAttention {
    /// Attention from its projections; `out` is `[d_model, n_heads * value_dim]`.
    ///
    /// # Errors
    /// [`Error::Size`] if `out` does not fit.
    pub fn new(qkv: QkvProjection, out: Linear) -> Result<SelfAttention, Error> {
        check_size("out.in_features", qkv.heads().output_cols(), out.in_features())?;
        check_size("out.out_features", qkv.d_model(), out.out_features())?;
        Ok(SelfAttention { qkv, out })
    }

    /// The heads, of which its caches are.
    pub fn heads(&self) -> &Heads {
        self.qkv.heads()
    }
}

/// Attention of the rows over another sequence's keys and values, which are computed once: a decoder over its encoder.
#[derive(Debug)]
pub struct CrossAttention {
    qkv: QkvProjection,
    out: Linear,
}

impl CrossAttention {
    /// Attention from its projections; `out` is `[d_model, n_heads * value_dim]`. The source may have another width than the rows.
    ///
    /// # Errors
    /// [`Error::Size`] if the projections do not fit the heads or each other.
    pub fn new(q: Linear, k: Linear, v: Linear, out: Linear, heads: Heads) -> Result<CrossAttention, Error> {
        heads.check()?;
        check_size("out.in_features", heads.output_cols(), out.in_features())?;
        check_size("out.out_features", q.in_features(), out.out_features())?;
        Ok(CrossAttention { qkv: QkvProjection::cross(q, k, v, heads)?, out })
    }

    /// The keys and values of a source, to be attended to by any number of calls.
    ///
    /// # Shapes
    /// `source`: `[tokens, source width]`; `offsets`: `[0, end of sequence 0, ..., tokens]`.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::TooSmall`] without offsets, [`Error::NotAscending`], [`Error::Overflow`].
    pub fn keys(&self, ctx: Context<'_>, source: MatRef<'_>, offsets: &[usize]) -> Result<KeyStore, Error> {
        self.qkv.check_source(source, offsets)?;
        let mut keys = KeyStore::new(self.heads(), source.rows(), offsets.len() - 1)?;
        self.set_keys(ctx, source, offsets, &mut keys)?;
        Ok(keys)
    }

    /// [`keys`](CrossAttention::keys) in place of what a store of these heads has.
    ///
    /// # Errors
    /// As [`keys`](CrossAttention::keys), and [`Error::TooLarge`] if the batch is larger than the store. The store is unchanged then.
    pub fn set_keys(
        &self,
        ctx: Context<'_>,
        source: MatRef<'_>,
        offsets: &[usize],
        keys: &mut KeyStore,
    ) -> Result<(), Error> {
        self.qkv.set_keys(ctx, source, offsets, keys)
    }

    /// The heads, of which the stores of its keys are.
    pub fn heads(&self) -> &Heads {
        self.qkv.heads()
    }

    /// The maps to queries, `[n_heads * head_dim, d_model]`, keys, `[n_kv_heads * head_dim, source width]`, and values, `[n_kv_heads * value_dim,
    /// source width]`, for whoever projects some of the rows alone. A layer projects queries from its rows behind the norm of
    /// [`Placement::Pre`] and [`Placement::Sandwich`], keys and values from the source as it is.
    pub fn projections(&self) -> [&Linear; 3] {
        self.qkv.maps()
    }

    /// The map of what the heads gather, `[d_model, n_heads * value_dim]`; the residual and the norm are the layer's.
    pub fn out(&self) -> &Linear {
        &self.out
    }
}

/// What a sub-layer computes.
#[derive(Debug)]
enum Kind {
    SelfAttention(SelfAttention),
    CrossAttention(CrossAttention),
    Ffn(Ffn),
}

/// A batch and all that its tokens may see.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// `[0, end of sequence 0, ..., tokens]`.
    pub offsets: &'a [usize],
    /// Who sees whom in self-attention. Bits, and a bias, go by the rows of the call, also where a cache holds what was before them.
    pub graph: &'a Graph,
    /// Terms of the scores of self-attention.
    pub terms: Terms<'a>,
    /// One cache per self-attention, or none: the new tokens are appended to their sequences and see the whole cache.
    pub caches: &'a mut [KvCache],
    /// One store per cross-attention, from [`CrossAttention::keys`] or filled with its [projections](CrossAttention::projections).
    pub sources: &'a [KeyStore],
    /// Who sees whom in cross-attention; bits go by the rows of the call.
    pub source_graph: &'a Graph,
    /// Terms of the scores of cross-attention, the same in every layer.
    pub source_terms: Terms<'a>,
    /// Where each row stands among the keys of its source, `[tokens]`; by default at its place in its sequence, behind what a cache holds of it.
    pub source_positions: Option<&'a [isize]>,
    /// Where each row stands for a [`Rotary`](crate::Rotary), `[tokens]`; by default at its place in its sequence, behind what a cache holds
    /// of it. The graph goes by places.
    pub positions: Option<&'a [usize]>,
    /// Added in self-attention to the rows, behind their norm, that queries and keys are projected from, `[tokens, d_model]`; values are
    /// projected from the rows without. So DETR tells pixels where they are, in every layer anew.
    pub position_embedding: Option<MatRef<'a>>,
}

/// What cross-attention sees unless told otherwise.
static FULL: Graph = Graph::full();

impl<'a> Inputs<'a> {
    /// A batch with self-attention only.
    pub fn new(offsets: &'a [usize], graph: &'a Graph) -> Inputs<'a> {
        Inputs {
            offsets,
            graph,
            terms: Terms::default(),
            caches: &mut [],
            sources: &[],
            source_graph: &FULL,
            source_terms: Terms::default(),
            source_positions: None,
            positions: None,
            position_embedding: None,
        }
    }
}

/// A part of a layer: what it computes, and where its norm stands.
#[derive(Debug)]
pub struct SubLayer {
    kind: Kind,
    placement: Placement,
}

impl SubLayer {
    /// Attention of the rows over themselves.
    ///
    /// # Errors
    /// [`Error::Size`] if the norm is of another width.
    pub fn self_attention(attention: SelfAttention, placement: Placement) -> Result<SubLayer, Error> {
        placement.check(attention.qkv.d_model())?;
        Ok(SubLayer { kind: Kind::SelfAttention(attention), placement })
    }

    /// Attention of the rows over a source.
    ///
    /// # Errors
    /// [`Error::Size`] if the norm is of another width.
    pub fn cross_attention(attention: CrossAttention, placement: Placement) -> Result<SubLayer, Error> {
        placement.check(attention.qkv.d_model())?;
        Ok(SubLayer { kind: Kind::CrossAttention(attention), placement })
    }

    /// The self-attention of this sub-layer, if it is one: it has the heads of its caches.
    pub fn as_self_attention(&self) -> Option<&SelfAttention> {
        match &self.kind {
            Kind::SelfAttention(attention) => Some(attention),
            _ => None,
        }
    }

    /// The cross-attention of this sub-layer, if it is one: it makes the keys of a source.
    pub fn as_cross_attention(&self) -> Option<&CrossAttention> {
        match &self.kind {
            Kind::CrossAttention(attention) => Some(attention),
            _ => None,
        }
    }

    /// A feed-forward network.
    ///
    /// # Errors
    /// [`Error::Size`] if the norm is of another width.
    pub fn ffn(ffn: Ffn, placement: Placement) -> Result<SubLayer, Error> {
        placement.check(ffn.d_model())?;
        Ok(SubLayer { kind: Kind::Ffn(ffn), placement })
    }

    fn fold_batchnorm(self) -> Result<SubLayer, Error> {
        let (before, after, placement) = self.placement.fold_batchnorm();
        let (before, after) = (before.as_ref(), after.as_ref());
        let kind = match self.kind {
            Kind::SelfAttention(SelfAttention { qkv, out }) => Kind::SelfAttention(SelfAttention {
                qkv: qkv.behind(before, false)?,
                out: out.between(None, after)?,
            }),
            Kind::CrossAttention(CrossAttention { qkv, out }) => Kind::CrossAttention(CrossAttention {
                qkv: qkv.behind(before, true)?,
                out: out.between(None, after)?,
            }),
            Kind::Ffn(ffn) => Kind::Ffn(ffn.between(before, after)?),
        };
        Ok(SubLayer { kind, placement })
    }

    fn d_model(&self) -> usize {
        match &self.kind {
            Kind::SelfAttention(SelfAttention { qkv, .. })
            | Kind::CrossAttention(CrossAttention { qkv, .. }) => qkv.d_model(),
            Kind::Ffn(ffn) => ffn.d_model(),
        }
    }

    fn heads(&self) -> Option<&Heads> {
        match &self.kind {
            Kind::SelfAttention(SelfAttention { qkv, .. })
            | Kind::CrossAttention(CrossAttention { qkv, .. }) => Some(qkv.heads()),
            Kind::Ffn(_) => None,
        }
    }

    fn bytes(&self) -> usize {
        match &self.kind {
            Kind::SelfAttention(SelfAttention { qkv, out })
            | Kind::CrossAttention(CrossAttention { qkv, out }) => qkv.bytes() + out.bytes(),
            Kind::Ffn(ffn) => ffn.bytes(),
        }
    }

    /// What it begins with.
    fn first_columns(&self, rows: usize, members: usize) -> Columns<'_> {
        match &self.kind {
            Kind::SelfAttention(SelfAttention { qkv, .. })
            | Kind::CrossAttention(CrossAttention { qkv, .. }) => qkv.first_columns(rows, members),
            Kind::Ffn(ffn) => ffn.first_columns(rows, members),
        }
    }

    fn run<S: Simd>(
        &self,
        s: S,
        crew: &mut Crew<'_>,
        x: &mut MatMut<'_>,
        inputs: &mut Remaining<'_, '_>,
        buffers: &mut Buffers,
        next: Option<&SubLayer>,
    ) {
        let next = next.map(|next| next.first_columns(x.rows(), crew.members()));
        let (qkv, out) = match &self.kind {
            Kind::Ffn(ffn) => {
                return ffn.sub_layer(s, crew, x, &self.placement, &mut buffers.hidden, next);
            }
            Kind::SelfAttention(SelfAttention { qkv, out }) => (qkv, out),
            Kind::CrossAttention(CrossAttention { qkv, out }) => (qkv, out),
        };
        let heads = qkv.heads();
        let Buffers { projected, attended, keys, .. } = buffers;
        let Some(keys) = keys else { return };
        let attended_stride = padded_stride(heads.output_cols());
        let mut attended = MatMut::scratch(attended, x.rows(), heads.output_cols(), attended_stride);
        let norm = self.placement.before();
        let (each, added) = (inputs.positions, inputs.position_embedding);
        let call = Call { heads, graph: inputs.graph, terms: &inputs.terms };
        match (&self.kind, inputs.caches.first_mut()) {
            (Kind::CrossAttention(_), _) => {
                let rows = Rows { x: x.as_ref(), norm, added: None, places: Places::default() };
                let q = qkv.project_rows(s, crew, &rows, &keys.plan, projected, 1);
                let (source, rest) = inputs.sources.split_at(1);
                inputs.sources = rest;
                let call = Call { graph: inputs.source_graph, terms: &inputs.source_terms, ..call };
                let queries = QueryRows::new(q, inputs.offsets);
                let queries = match inputs.source_positions {
                    Some(positions) => queries.at(positions),
                    None => queries.starting_at(inputs.first),
                };
                let source = Stores::alone(&source[0]);
                attend_phase(s, crew, &call, &queries, &keys.plan, source, &mut attended);
            }
            (_, Some(cache)) => {
                let places = Places { each, cache: Some(&*cache) };
                let rows = Rows { x: x.as_ref(), norm, added, places };
                let [q, k, v] = qkv.split(qkv.project_rows(s, crew, &rows, &keys.plan, projected, 3));
                cache.push_phase(s, crew, k, v, inputs.offsets);
                let queries = QueryRows::new(q, inputs.offsets);
                let cached = Stores::alone(cache.keys());
                attend_phase(s, crew, &call, &queries, &keys.plan, cached, &mut attended);
                let caches = core::mem::take(&mut inputs.caches);
                inputs.caches = &mut caches[1..];
            }
            (_, None) => {
                keys.layout = heads.layout();
                let q_cols = heads.query_cols();
                let mut q = MatMut::scratch(projected, x.rows(), q_cols, padded_stride(q_cols));
                let rows = Rows { x: x.as_ref(), norm, added, places: Places { each, cache: None } };
                qkv.phase(s, crew, &rows, &mut q, keys, Some(out.columns(x.rows(), crew.members())));
                let queries = QueryRows::new(q.as_ref(), inputs.offsets);
                let own = Stores::alone(keys);
                attend_phase(s, crew, &call, &queries, &keys.plan, own, &mut attended);
            }
        }
        close_phase(s, crew, attended.as_ref(), out, &self.placement, x, next);
    }
}

/// What of the inputs the sub-layers to come have not used.
struct Remaining<'a, 'i> {
    offsets: &'a [usize],
    graph: &'a Graph,
    terms: Terms<'a>,
    caches: &'i mut [KvCache],
    sources: &'a [KeyStore],
    source_graph: &'a Graph,
    source_terms: Terms<'a>,
    source_positions: Option<&'a [isize]>,
    positions: Option<&'a [usize]>,
    position_embedding: Option<MatRef<'a>>,
    first: &'i [isize],
}

/// A layer: BERT's is `[self-attention, ffn]` with post-norms, GPT-2's the same with pre-norms.
///
/// ```
/// use laneformer::*;
/// let linear = |n: usize, k: usize| {
///     Linear::new(PackedMatrix::from_out_in(MatRef::contiguous(&vec![0.01; n * k], n, k)?)?, None)
/// };
/// let norm = || Placement::post(Norm::LayerNorm { gain: vec![1.0; 8], bias: None, eps: 1e-5 });
/// let qkv = QkvProjection::new(linear(8, 8)?, linear(8, 8)?, linear(8, 8)?, Heads::new(2, 4)?)?;
/// let attention = SelfAttention::new(qkv, linear(8, 8)?)?;
/// let ffn = Ffn::new(linear(32, 8)?, Activation::GeluErf, linear(8, 32)?)?;
/// let layer = Layer::new(vec![SubLayer::self_attention(attention, norm())?, SubLayer::ffn(ffn, norm())?])?;
///
/// // Two sequences, of 3 and 2 tokens.
/// let mut x: Vec<f32> = (0..40).map(|i| (i % 7) as f32).collect();
/// let ctx = Context::serial();
/// let mut workspace = layer.workspace(5, 2, ctx.members())?;
/// layer.forward(ctx, MatMut::contiguous(&mut x, 5, 8)?, &[0, 3, 5], &Graph::full(), &mut workspace)?;
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Debug)]
pub struct Layer {
    sub_layers: Vec<SubLayer>,
}

impl Layer {
    /// A layer of sub-layers of the same width.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] if there is none, [`Error::Size`] if the widths differ.
    pub fn new(sub_layers: Vec<SubLayer>) -> Result<Layer, Error> {
        check_dim("sub_layers.len()", sub_layers.len())?;
        for sub_layer in &sub_layers {
            check_size("sub_layer.d_model", sub_layers[0].d_model(), sub_layer.d_model())?;
        }
        Ok(Layer { sub_layers })
    }

    /// The same layer with its batch norms in the weights of the maps beside them: that of [`Placement::Pre`], both of
    /// [`Placement::Sandwich`] or its second alone. One pass over the rows less for each; weights are folded in f64 and rounded once, so
    /// results differ by roundings. Others stay, and so does that of [`Placement::Post`], which stands behind the residual.
    ///
    /// # Errors
    /// None of a layer that was made by [`Layer::new`].
    pub fn fold_batchnorm(self) -> Result<Layer, Error> {
        Ok(Layer {
            sub_layers: self
                .sub_layers
                .into_iter()
                .map(SubLayer::fold_batchnorm)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Columns of the rows.
    pub fn d_model(&self) -> usize {
        self.sub_layers[0].d_model()
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.sub_layers.iter().map(SubLayer::bytes).sum()
    }

    /// Memory for [`forward`](Layer::forward) on at most `max_tokens` tokens in `max_segments` segments with `members` threads.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] without members, [`Error::Overflow`].
    pub fn workspace(
        &self,
        max_tokens: usize,
        max_segments: usize,
        members: usize,
    ) -> Result<Workspace, Error> {
        Workspace::new(core::slice::from_ref(self), max_tokens, max_segments, members)
    }

    /// Runs the layer on a ragged batch, in place: one parallel region and no allocation.
    ///
    /// # Shapes
    /// `x`: `[tokens, d_model]`, any row stride; `offsets`: `[0, end of segment 0, ..., tokens]`. Tokens see what `graph` allows of their own segment.
    /// Without tokens there is nothing to do.
    ///
    /// # Special values
    /// As the operations have them: NaN and infinities reach what depends on them, and nothing behind a mask does.
    ///
    /// # Accuracy
    /// A token's result depends only on its own segment: the same bits alone and in any batch, for any number of threads, and on
    /// every instruction set that [keeps them](crate::Isa::keeps_bits).
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::NotAscending`]; [`Error::TooLarge`] or [`Error::TooSmall`] if the workspace is for a smaller batch or
    /// another layer. Nothing is written then.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: MatMut<'_>,
        offsets: &[usize],
        graph: &Graph,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        self.forward_with(ctx, x, &mut Inputs::new(offsets, graph), workspace)
    }

    /// [`forward`](Layer::forward) with terms in the scores, caches and sources.
    ///
    /// # Errors
    /// As [`forward`](Layer::forward), and [`Error::Size`] if there are other than one cache (or none) per self-attention and one source per
    /// cross-attention; [`Error::TooLarge`] if a cache is full or, a ring, drops what the graph sees, or if a position is far beyond the length of
    /// any sequence; [`Error::Size`], [`Error::TooSmall`] if terms, graphs or positions do not fit. Nothing is written or appended then.
    pub fn forward_with(
        &self,
        ctx: Context<'_>,
        x: MatMut<'_>,
        inputs: &mut Inputs<'_>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        workspace.run(ctx, core::slice::from_ref(self), x, inputs)
    }

    /// The sub-layers.
    pub fn sub_layers(&self) -> &[SubLayer] {
        &self.sub_layers
    }
}

/// Layers one after another, in one parallel region.
#[derive(Debug)]
pub struct Stack {
    layers: Vec<Layer>,
}

impl Stack {
    /// A stack of layers of the same width.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] if there is none, [`Error::Size`] if the widths differ.
    pub fn new(layers: Vec<Layer>) -> Result<Stack, Error> {
        check_dim("layers.len()", layers.len())?;
        for layer in &layers {
            check_size("layer.d_model", layers[0].d_model(), layer.d_model())?;
        }
        Ok(Stack { layers })
    }

    /// Columns of the rows.
    pub fn d_model(&self) -> usize {
        self.layers[0].d_model()
    }

    /// The layers.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum()
    }

    /// Memory for [`forward`](Stack::forward), also of each layer alone; see [`Layer::workspace`].
    ///
    /// # Errors
    /// [`Error::ZeroDim`] without members, [`Error::Overflow`].
    pub fn workspace(
        &self,
        max_tokens: usize,
        max_segments: usize,
        members: usize,
    ) -> Result<Workspace, Error> {
        Workspace::new(&self.layers, max_tokens, max_segments, members)
    }

    /// Runs all layers on a ragged batch, in place; see [`Layer::forward`].
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: MatMut<'_>,
        offsets: &[usize],
        graph: &Graph,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        self.forward_with(ctx, x, &mut Inputs::new(offsets, graph), workspace)
    }

    /// [`forward`](Stack::forward) with terms in the scores, caches and sources, those of the first layer first; see
    /// [`Layer::forward_with`].
    ///
    /// # Errors
    /// As [`Layer::forward_with`].
    pub fn forward_with(
        &self,
        ctx: Context<'_>,
        x: MatMut<'_>,
        inputs: &mut Inputs<'_>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        workspace.run(ctx, &self.layers, x, inputs)
    }
}
