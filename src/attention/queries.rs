//! The queries of a batch and where they stand among the keys.

use crate::attention::Heads;
use crate::attention::plan::{Block, Plan, check_offsets};
use crate::attention::terms::check_positions;
use crate::error::{Error, check_size};
use crate::view::{MatMut, MatRef};

/// Queries of a ragged batch and where they stand.
#[derive(Clone, Copy, Debug)]
pub struct QueryRows<'a> {
    pub(super) q: MatRef<'a>,
    offsets: &'a [usize],
    positions: Positions<'a>,
}

/// Where queries stand among the keys of their sequence.
#[derive(Clone, Copy, Debug)]
enum Positions<'a> {
    /// The last query at the last key.
    Last,
    /// The first query of each sequence.
    First(&'a [isize]),
    /// Every query.
    Each(&'a [isize]),
}

impl<'a> QueryRows<'a> {
    /// Queries `[tokens, n_heads * head_dim]` of the sequences that `offsets` cuts them into. The last query of a sequence stands at its last
    /// key: in self-attention row `i` at key `i`, with a cache the new rows at its end.
    pub fn new(q: MatRef<'a>, offsets: &'a [usize]) -> QueryRows<'a> {
        QueryRows { q, offsets, positions: Positions::Last }
    }

    /// The same, the first query of sequence `b` at position `first[b]`, which may be negative, and the others after it.
    pub fn starting_at(self, first: &'a [isize]) -> QueryRows<'a> {
        QueryRows { positions: Positions::First(first), ..self }
    }

    /// The same, row `i` of the batch at position `positions[i]`. Rows are taken together where their positions follow one another.
    pub fn at(self, positions: &'a [isize]) -> QueryRows<'a> {
        QueryRows { positions: Positions::Each(positions), ..self }
    }

    /// Whether they are of these heads and of so many sequences, and have room in `out`.
    pub(super) fn check(&self, heads: &Heads, segments: usize, out: &MatMut<'_>) -> Result<(), Error> {
        let rows = self.q.rows();
        check_offsets("offsets", self.offsets, rows)?;
        check_size("offsets.len() - 1", segments, self.offsets.len() - 1)?;
        check_size("q.cols", heads.query_cols(), self.q.cols())?;
        check_size("out.rows", rows, out.rows())?;
        check_size("out.cols", heads.output_cols(), out.cols())?;
        match self.positions {
            Positions::Last => Ok(()),
            Positions::First(first) => {
                check_size("first positions", segments, first.len())?;
                check_positions("first positions", first.iter().copied())
            }
            Positions::Each(each) => check_each("positions", rows, each),
        }
    }

    /// Their blocks.
    pub(super) fn plan(&self) -> Plan {
        Plan::of(self.offsets)
    }

    /// The position of row `row` of a block whose sequence has `keys` keys, and how many rows from it on stand one after another.
    #[inline(always)]
    pub(super) fn run(&self, plan: &Plan, block: usize, row: usize, keys: usize) -> (isize, usize) {
        let rows = plan.rows[block]..plan.rows[block + 1];
        let Block { segment, start } = plan.blocks[block];
        let first = match self.positions {
            Positions::Last => keys as isize - plan.segments[segment].len as isize,
            Positions::First(first) => first[segment],
            Positions::Each(each) => {
                let each = &each[rows.start + row..rows.end];
                return (each[0], 1 + each.windows(2).take_while(|pair| pair[1] == pair[0] + 1).count());
            }
        };
        (first + (start + row) as isize, rows.len() - row)
    }

    /// The least and the largest position of a block.
    pub(super) fn span(&self, plan: &Plan, block: usize, keys: usize) -> (isize, isize) {
        let rows = plan.rows[block + 1] - plan.rows[block];
        let (mut low, mut high, mut row) = (isize::MAX, isize::MIN, 0);
        while row < rows {
            let (position, n) = self.run(plan, block, row, keys);
            (low, high) = (low.min(position), high.max(position + n as isize - 1));
            row += n;
        }
        (low, high)
    }
}

/// Whether there are positions of so many rows, none too far from 0.
pub(crate) fn check_each(arg: &'static str, rows: usize, positions: &[isize]) -> Result<(), Error> {
    check_size(arg, rows, positions.len())?;
    check_positions(arg, positions.iter().copied())
}
