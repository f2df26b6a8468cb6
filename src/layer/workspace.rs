//! The memory of a layer's call, and the checks before it.

use crate::attention::{Heads, KeyStore, Places, Plan, check_each, check_offsets, check_terms, scratch_len};
use crate::context::Context;
use crate::error::{Error, check_dim, check_size, checked_product};
use crate::exec::Team;
use crate::isa::dispatch;
use crate::layer::{CrossAttention, Inputs, Kind, Layer, Remaining, SelfAttention, SubLayer};
use crate::linear::padded_stride;
use crate::residual::close_phase_scratch;
use crate::split::Split;
use crate::view::MatMut;
use crate::workspace::AlignedBuffer;

/// The memory of [`Layer::forward`]: made once, used by one call at a time. The default has none and can [grow](Workspace::reserve).
#[derive(Debug)]
pub struct Workspace {
    team: Team,
    buffers: Buffers,
    room: Room,
    needs: Needs,
    /// The heads whose keys need most.
    widest: Option<Heads>,
    /// Where the first rows of the sequences stand, for cross-attention.
    first: Vec<isize>,
}

/// What the phases hand to one another.
#[derive(Debug)]
pub(super) struct Buffers {
    pub(super) projected: AlignedBuffer,
    pub(super) attended: AlignedBuffer,
    pub(super) keys: Option<KeyStore>,
    pub(super) hidden: AlignedBuffer,
}

/// The largest batch, and who works on it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Room {
    tokens: usize,
    segments: usize,
    members: usize,
}

impl Room {
    fn max(self, other: Room) -> Room {
        Room {
            tokens: self.tokens.max(other.tokens),
            segments: self.segments.max(other.segments),
            members: self.members.max(other.members),
        }
    }

    /// The most rows whose hidden rows are shared.
    fn shared_rows(self) -> usize {
        Split::most_rows_by_cols(self.members).min(self.tokens)
    }
}

/// Elements: per token, per block of 64 tokens, per row whose hidden row is shared, and per member.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Needs {
    projected: usize,
    attended: usize,
    block: usize,
    hidden: usize,
    scratch: usize,
}

impl Needs {
    fn of_all(layers: &[Layer]) -> Needs {
        sub_layers(layers).map(Needs::of).fold(Needs::default(), Needs::max)
    }

    fn of(sub_layer: &SubLayer) -> Needs {
        let SubLayer { kind, placement } = sub_layer;
        match kind {
            Kind::SelfAttention(SelfAttention { qkv, .. })
            | Kind::CrossAttention(CrossAttention { qkv, .. }) => {
                let heads = qkv.heads();
                let is_self = matches!(kind, Kind::SelfAttention(_));
                // Rows with a norm, and with what is added to them.
                let copies = usize::from(placement.before().is_some()) + usize::from(is_self);
                Needs {
                    projected: qkv.projected_stride(if is_self { 3 } else { 1 }),
                    attended: padded_stride(heads.output_cols()),
                    block: heads.layout().block_len(),
                    hidden: 0,
                    scratch: scratch_len(heads, true)
                        .max(qkv.scratch_len(copies))
                        .max(close_phase_scratch(placement, sub_layer.d_model())),
                }
            }
            Kind::Ffn(ffn) => Needs {
                hidden: padded_stride(ffn.d_ff()),
                scratch: ffn.scratch_len(placement).max(close_phase_scratch(placement, sub_layer.d_model())),
                ..Needs::default()
            },
        }
    }

    fn max(self, other: Needs) -> Needs {
        Needs {
            projected: self.projected.max(other.projected),
            attended: self.attended.max(other.attended),
            block: self.block.max(other.block),
            hidden: self.hidden.max(other.hidden),
            scratch: self.scratch.max(other.scratch),
        }
    }
}

impl Default for Workspace {
    fn default() -> Workspace {
        let room = Room { tokens: 0, segments: 0, members: 1 };
        let none = || AlignedBuffer::scratch(0);
        let buffers = Buffers { projected: none(), attended: none(), keys: None, hidden: none() };
        let (team, needs) = (Team::new(1, 0), Needs::default());
        Workspace { team, buffers, room, needs, widest: None, first: vec![] }
    }
}

impl Workspace {
    pub(super) fn new(
        layers: &[Layer],
        max_tokens: usize,
        max_segments: usize,
        members: usize,
    ) -> Result<Workspace, Error> {
        let mut workspace = Workspace::default();
        workspace.reserve(layers, max_tokens, max_segments, members)?;
        Ok(workspace)
    }

    /// Grows to also have room for `max_tokens` tokens in `max_segments` segments of these layers with `members` threads, if it is too small for
    /// them: for whoever meets batches, or stacks, one after another. It grows to what is asked and no further, and what was in it goes first.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] without members, [`Error::Overflow`]. The workspace is unchanged then.
    pub fn reserve(
        &mut self,
        layers: &[Layer],
        max_tokens: usize,
        max_segments: usize,
        members: usize,
    ) -> Result<(), Error> {
        check_dim("members", members)?;
        let room = Room { tokens: max_tokens, segments: max_segments, members }.max(self.room);
        let needs = Needs::of_all(layers).max(self.needs);
        if (room, needs) == (self.room, self.needs) {
            return Ok(());
        }
        let heads = sub_layers(layers).filter_map(SubLayer::heads).copied().chain(self.widest);
        let widest = heads.max_by_key(|heads| heads.layout().block_len());
        let len = |per: usize, n: usize| checked_product("workspace", &[per, n]);
        let [projected, attended] = [len(needs.projected, room.tokens)?, len(needs.attended, room.tokens)?];
        let hidden = len(needs.hidden, room.shared_rows())?;
        len(needs.scratch, room.members)?;
        // Each sequence has an entry in a few lists.
        checked_product("max_segments", &[room.segments, 8])?;
        widest.map_or(Ok(()), |heads| KeyStore::check_len(&heads, room.tokens, room.segments))?;

        *self = Workspace::default();
        let keys = widest.map(|heads| KeyStore::new(&heads, room.tokens, room.segments)).transpose()?;
        let [projected, attended, hidden] = [projected, attended, hidden].map(AlignedBuffer::scratch);
        let buffers = Buffers { projected, attended, keys, hidden };
        let team = Team::new(room.members, needs.scratch);
        *self = Workspace { team, buffers, room, needs, widest, first: Vec::with_capacity(room.segments) };
        Ok(())
    }

    /// Bytes of all of its buffers.
    pub fn bytes(&self) -> usize {
        let Buffers { projected, attended, keys, hidden } = &self.buffers;
        let elements = projected.len() + attended.len() + hidden.len();
        elements * size_of::<f32>() + keys.as_ref().map_or(0, KeyStore::bytes) + self.team.bytes()
    }

    /// Checks everything, then runs: an error has written nothing.
    pub(super) fn run(
        &mut self,
        ctx: Context<'_>,
        layers: &[Layer],
        mut x: MatMut<'_>,
        inputs: &mut Inputs<'_>,
    ) -> Result<(), Error> {
        check_size("x.cols", layers[0].d_model(), x.cols())?;
        check_offsets("offsets", inputs.offsets, x.rows())?;
        self.check(layers, x.rows())?;
        check_counts(layers, inputs, x.rows())?;
        if let Some(keys) = &mut self.buffers.keys {
            keys.check_batch(inputs.offsets)?;
            keys.build_plan(inputs.offsets);
            check_inputs(layers, inputs, &keys.plan)?;
        }
        if x.rows() == 0 {
            return Ok(());
        }
        let Workspace { team, buffers, first, .. } = self;
        // Behind what a cache holds of them, before anything is appended.
        let before = |sequence| inputs.caches.first().map_or(0, |cache| cache.len(sequence) as isize);
        first.clear();
        first.extend((0..first.capacity().min(inputs.offsets.len() - 1)).map(before));
        let Inputs {
            offsets,
            graph,
            terms,
            ref mut caches,
            sources,
            source_graph,
            source_terms,
            source_positions,
            positions,
            position_embedding,
        } = *inputs;
        let mut remaining = Remaining {
            offsets,
            graph,
            terms,
            caches,
            sources,
            source_graph,
            source_terms,
            source_positions,
            positions,
            position_embedding,
            first,
        };
        dispatch!(ctx.isa(), |s| team.region(ctx.executor(), |crew| {
            let mut sub_layers = sub_layers(layers).peekable();
            while let Some(sub_layer) = sub_layers.next() {
                let next = sub_layers.peek().copied();
                sub_layer.run(s, crew, &mut x, &mut remaining, buffers, next);
            }
        }));
        Ok(())
    }

    /// Whether the workspace is large enough for these layers and so many tokens.
    fn check(&self, layers: &[Layer], tokens: usize) -> Result<(), Error> {
        if tokens > self.room.tokens {
            return Err(Error::TooLarge { arg: "x.rows", max: self.room.tokens, actual: tokens });
        }
        let needed = Needs::of_all(layers);
        let has = &self.needs;
        for (arg, min, actual) in [
            ("workspace queries", needed.projected, has.projected),
            ("workspace attention", needed.attended, has.attended),
            ("workspace keys", needed.block, has.block),
            ("workspace hidden", needed.hidden, has.hidden),
            ("workspace scratch", needed.scratch, has.scratch),
        ] {
            if actual < min {
                return Err(Error::TooSmall { arg, min, actual });
            }
        }
        Ok(())
    }
}

fn sub_layers(layers: &[Layer]) -> impl Iterator<Item = &SubLayer> {
    layers.iter().flat_map(|layer| &layer.sub_layers)
}

/// Whether there are as many caches, sources and positions as the layers and the batch have use for.
fn check_counts(layers: &[Layer], inputs: &Inputs<'_>, tokens: usize) -> Result<(), Error> {
    let count = |f: fn(&Kind) -> bool| sub_layers(layers).filter(|sub_layer| f(&sub_layer.kind)).count();
    let own = count(|kind| matches!(kind, Kind::SelfAttention(_)));
    check_size("sources.len()", count(|kind| matches!(kind, Kind::CrossAttention(_))), inputs.sources.len())?;
    if !inputs.caches.is_empty() {
        check_size("caches.len()", own, inputs.caches.len())?;
    }
    if let Some(positions) = inputs.positions {
        check_size("positions.len()", tokens, positions.len())?;
    }
    inputs.source_positions.map_or(Ok(()), |positions| check_each("source_positions", tokens, positions))
}

/// Whether caches, sources, graphs and terms, of which there are enough, fit the layers and the batch.
fn check_inputs(layers: &[Layer], inputs: &Inputs<'_>, plan: &Plan) -> Result<(), Error> {
    let (mut caches, mut sources) = (inputs.caches.iter(), inputs.sources.iter());
    for sub_layer in sub_layers(layers) {
        match &sub_layer.kind {
            Kind::Ffn(_) => {}
            Kind::SelfAttention(attention) => {
                let heads = attention.heads();
                let mut longest = plan.longest();
                let cache = caches.next();
                let places = Places { each: inputs.positions, cache };
                if let Some(cache) = cache {
                    let args = ["cache n_kv_heads", "cache head_dim", "cache value_dim"];
                    cache.keys().layout.check(args, heads.layout())?;
                    check_size("cache sequences", plan.segments.len(), cache.sequences())?;
                    for (sequence, segment) in plan.segments.iter().enumerate() {
                        cache.check_room(sequence, segment.len)?;
                        cache.check_kept(sequence, segment.len, inputs.graph)?;
                        longest = longest.max(cache.len(sequence) + segment.len);
                    }
                }
                attention.qkv.check_position(places.last(plan))?;
                if let Some(added) = inputs.position_embedding {
                    attention.qkv.check_added(added, plan.tokens)?;
                }
                check_terms(heads, inputs.graph, &inputs.terms, plan, longest)?;
            }
            Kind::CrossAttention(CrossAttention { qkv, .. }) => {
                if let Some(source) = sources.next() {
                    let args = ["source n_kv_heads", "source head_dim", "source value_dim"];
                    source.layout.check(args, qkv.heads().layout())?;
                    source.check_alone("source")?;
                    source.check_whole()?;
                    check_size("source sequences", plan.segments.len(), source.plan.segments.len())?;
                    let (graph, longest) = (inputs.source_graph, source.plan.longest());
                    check_terms(qkv.heads(), graph, &inputs.source_terms, plan, longest)?;
                }
            }
        }
    }
    Ok(())
}
