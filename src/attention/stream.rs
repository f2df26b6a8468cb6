//! Attention over rows of keys that nobody has stored by head: each thread stores them where it reads them, a few blocks at a time, and
//! forgets what is behind its queries.

use core::ops::Range;

use crate::attention::graph::Graph;
use crate::attention::keys::Keys;
use crate::attention::layout::{BLOCK, CHUNK, CHUNK_BLOCKS, KeyLayout};
use crate::attention::plan::{Plan, check_offsets};
use crate::attention::tiles::Call;
use crate::attention::{Heads, QueryRows, Terms, attend_heads, check_terms, scratch_len};
use crate::context::Context;
use crate::error::{Error, checked_product};
use crate::exec::Team;
use crate::isa::dispatch;
use crate::simd::LANES;
use crate::view::{MatMut, MatRef};

/// The keys and values of a ragged batch as a projection leaves them.
#[derive(Clone, Copy, Debug)]
pub struct KeyRows<'a> {
    k: MatRef<'a>,
    v: MatRef<'a>,
    offsets: &'a [usize],
}

impl<'a> KeyRows<'a> {
    /// Keys `[tokens, n_kv_heads * head_dim]` and values `[tokens, n_kv_heads * value_dim]` of the sequences that `offsets` cuts them into.
    pub fn new(k: MatRef<'a>, v: MatRef<'a>, offsets: &'a [usize]) -> KeyRows<'a> {
        KeyRows { k, v, offsets }
    }
}

/// Attention over windows in memory that does not grow with the sequence.
///
/// [`KeyStore::set`](crate::KeyStore::set) writes all keys and values by head before the first query is answered, and attention reads them again. Here each
/// thread goes through the queries in order and stores a block of 64 keys when a window first reaches it, over one that no window reaches any
/// more: the same bits, and what is stored by head need not go to memory and back.
///
/// A thread takes all heads of 64 queries at a time.
///
/// ```
/// use laneformer::{Context, Graph, Heads, KeyRows, KeyStream, MatMut, MatRef, QueryRows, Terms};
/// let (heads, graph) = (Heads::new(1, 1)?, Graph::window(1, 0));
/// let col = |x| MatRef::contiguous(x, 3, 1);
/// let (rows, mut out) = (KeyRows::new(col(&[0.0; 3])?, col(&[2.0, 4.0, 8.0])?, &[0, 3]), [0.0; 3]);
/// let (queries, out_mat) = (QueryRows::new(col(&[1.0; 3])?, &[0, 3]), MatMut::contiguous(&mut out, 3, 1)?);
/// let mut stream = KeyStream::new(&heads, &graph, 1)?;
/// stream.attend(Context::serial(), &heads, &queries, &rows, &graph, &Terms::default(), out_mat)?;
/// assert_eq!(out, [2.0, 3.0, 6.0]);
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Debug)]
pub struct KeyStream {
    layout: KeyLayout,
    /// Blocks that each member keeps.
    blocks: usize,
    team: Team,
}

impl KeyStream {
    /// Room for what 64 queries see of `graph`, for each of `members` threads: their windows, and all keys up to the last global column, both in
    /// whole chunks of 256.
    ///
    /// # Errors
    /// [`Error::ZeroDim`], [`Error::NotDivisible`] for heads that cannot be; [`Error::Overflow`], also for a graph without a limit to both sides: [`KeyStore`](crate::KeyStore) is for those.
    pub fn new(heads: &Heads, graph: &Graph, members: usize) -> Result<KeyStream, Error> {
        heads.check()?;
        let layout = heads.layout();
        let blocks = blocks(graph);
        checked_product("keys and values", &[blocks, layout.block_len() + LANES])?;
        let [data_len, stored_len] = parts(layout, blocks);
        let each = data_len + stored_len + scratch_len(heads, true);
        checked_product("keys and values", &[each, members.max(1)])?;
        let team = Team::new(members, each);
        Ok(KeyStream { layout, blocks, team })
    }

    /// [`KeyStore::attend`](crate::KeyStore::attend) over keys and values that are rows.
    ///
    /// # Shapes
    /// As there; the queries have as many sequences as the keys.
    ///
    /// # Errors
    /// As there, and [`Error::TooLarge`] if 64 queries see more blocks of keys than there is room for. Nothing is written then.
    pub fn attend(
        &mut self,
        ctx: Context<'_>,
        heads: &Heads,
        queries: &QueryRows<'_>,
        rows: &KeyRows<'_>,
        graph: &Graph,
        terms: &Terms<'_>,
        mut out: MatMut<'_>,
    ) -> Result<(), Error> {
        heads.check()?;
        let (layout, KeyRows { k, v, offsets }) = (self.layout, *rows);
        layout.check_heads(heads)?;
        layout.check_rows(k, v)?;
        queries.check(heads, offsets.len().saturating_sub(1), &out)?;
        check_offsets("key offsets", offsets, k.rows())?;
        let (keys, plan) = (Plan::of(offsets), queries.plan());
        check_terms(heads, graph, terms, &plan, keys.longest())?;

        // Blocks of the sequence of a block of queries, and those that its windows reach.
        let reached = |block: usize| {
            let len = keys.segments[plan.blocks[block].segment].len;
            let seen = graph.keys_of(queries.span(&plan, block, len), len);
            (len, seen.start / BLOCK..seen.end.div_ceil(BLOCK))
        };
        let prefix = prefix(graph);
        let ring = self.blocks.saturating_sub(prefix) / CHUNK_BLOCKS * CHUNK_BLOCKS;
        let behind_prefix = |seen: Range<usize>| seen.start.max(prefix)..seen.end;
        let needed = (0..plan.blocks.len()).map(|block| behind_prefix(reached(block).1).len()).max();
        let needed = needed.unwrap_or(0).max(1);
        if ring < needed {
            let (max, actual) = (self.blocks, prefix.saturating_add(needed));
            return Err(Error::TooLarge { arg: "blocks of 64 keys that 64 queries see", max, actual });
        }

        let [data_len, stored_len] = parts(layout, self.blocks);
        let chunks: Vec<usize> = (0..=self.blocks).step_by(CHUNK_BLOCKS).collect();
        // The last call's keys are not this one's.
        self.team.scratch().for_each(|scratch| scratch[data_len..data_len + stored_len].fill(0.0));
        let call = Call { heads, graph, terms };
        let cols = out.cols();
        dispatch!(ctx.isa(), |s| self.team.region(ctx.executor(), |crew| {
            crew.ragged_blocks(
                s,
                &mut out,
                &plan.rows,
                cols,
                #[inline(always)]
                |block, _, mut out, scratch| {
                    let (data, rest) = scratch.split_at_mut(data_len);
                    let (stored, scratch) = rest.split_at_mut(stored_len);
                    let (len, seen) = reached(block);
                    let first = keys.segments[plan.blocks[block].segment].first_block;
                    let mut blocks = layout.blocks(data, &chunks);
                    for i in (0..prefix.min(len.div_ceil(BLOCK))).chain(behind_prefix(seen)) {
                        let place = if i < prefix { i } else { prefix + (i - prefix) % ring };
                        if is_new(first + i, &mut stored[place]) {
                            let rows = keys.rows[first + i]..keys.rows[first + i + 1];
                            layout.store_in_block(s, blocks.block(place), 0, k, v, rows);
                        }
                    }
                    let keys = Keys::rolling(layout, data, (prefix, ring), len);
                    attend_heads(
                        s,
                        &call,
                        queries,
                        (&plan, block),
                        0..heads.n_heads,
                        &keys,
                        &mut out,
                        scratch,
                    );
                },
            );
        }));
        Ok(())
    }

    /// Bytes of all threads' keys, values and scratch.
    pub fn bytes(&self) -> usize {
        self.team.bytes()
    }
}

/// Blocks that a member keeps for a graph.
pub(super) fn blocks(graph: &Graph) -> usize {
    // A window begins and ends inside of blocks.
    let ring = graph.reach(BLOCK).div_ceil(BLOCK) + 1;
    ring.next_multiple_of(CHUNK_BLOCKS).saturating_add(prefix(graph))
}

/// Blocks that are kept whatever the windows reach: whole chunks up to the last global column.
fn prefix(graph: &Graph) -> usize {
    graph.columns_end().div_ceil(CHUNK) * CHUNK_BLOCKS
}

/// Elements of a member's keys and values, and of what says which they are.
fn parts(layout: KeyLayout, blocks: usize) -> [usize; 2] {
    [blocks * layout.block_len(), blocks.next_multiple_of(LANES)]
}

/// Whether block `number` of the batch is not in its place yet; from now on it is. `stored` is the bits of the number of the block that is,
/// counted from 1.
fn is_new(number: usize, stored: &mut f32) -> bool {
    let number = number as u32 + 1;
    let is_new = stored.to_bits() != number;
    *stored = f32::from_bits(number);
    is_new
}
