//! A ragged batch cut into blocks of 64 tokens, and the blocks grouped into tiles.

use crate::attention::layout::{BLOCK, CHUNK_BLOCKS};
use crate::error::Error;

/// A block: up to 64 tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) segment: usize,
    /// Tokens of the sequence before the block.
    pub(crate) start: usize,
}

/// A sequence: its first block and its tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) first_block: usize,
    pub(crate) len: usize,
}

/// The blocks of a batch. Its lists are allocated once, for the largest batch.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) blocks: Vec<Block>,
    pub(crate) segments: Vec<Segment>,
    /// Where each block's rows begin, and the end: one entry more than blocks.
    pub(crate) rows: Vec<usize>,
    /// The first block of each chunk, and the end.
    pub(crate) chunks: Vec<usize>,
    /// Blocks grouped into tiles: rows and blocks where each begins, and the end.
    pub(crate) tile_rows: Vec<usize>,
    pub(crate) tile_blocks: Vec<usize>,
    /// Tokens of the batch.
    pub(crate) tokens: usize,
}

/// Rows of a tile at least: a block, or several short segments.
pub(crate) const TILE_ROWS: usize = BLOCK;
/// Rows of a tile at most: one less than the least, and then a block.
pub(crate) const MAX_TILE_ROWS: usize = TILE_ROWS - 1 + BLOCK;

/// The most blocks that so many tokens in so many segments can have.
pub(crate) fn max_blocks(tokens: usize, segments: usize) -> usize {
    (tokens / BLOCK).saturating_add(segments).min(tokens)
}

/// The last entry of `offsets`, which begin at 0 and ascend.
pub(crate) fn check_offsets(arg: &'static str, offsets: &[usize], tokens: usize) -> Result<(), Error> {
    let Some((&first, &last)) = offsets.first().zip(offsets.last()) else {
        return Err(Error::TooSmall { arg, min: 1, actual: 0 });
    };
    if first != 0 {
        return Err(Error::Size { arg, expected: 0, actual: first });
    }
    if let Some(at) = offsets.windows(2).position(|w| w[1] < w[0]) {
        return Err(Error::NotAscending { arg, at: at + 1 });
    }
    if last != tokens {
        return Err(Error::Size { arg, expected: tokens, actual: last });
    }
    Ok(())
}

impl Plan {
    /// Room for so many blocks of so many sequences.
    pub(crate) fn with_capacity(blocks: usize, segments: usize) -> Plan {
        Plan {
            blocks: Vec::with_capacity(blocks),
            segments: Vec::with_capacity(segments),
            rows: Vec::with_capacity(blocks + 1),
            chunks: Vec::with_capacity(blocks + 1),
            tile_rows: Vec::with_capacity(blocks + 1),
            tile_blocks: Vec::with_capacity(blocks + 1),
            tokens: 0,
        }
    }

    /// The batch of valid `offsets`.
    pub(crate) fn of(offsets: &[usize]) -> Plan {
        let (tokens, segments) = (offsets.last().copied().unwrap_or(0), offsets.len().saturating_sub(1));
        let mut plan = Plan::with_capacity(max_blocks(tokens, segments), segments);
        plan.build(offsets);
        plan
    }

    /// The most blocks and sequences.
    pub(crate) fn capacity(&self) -> (usize, usize) {
        (self.blocks.capacity(), self.segments.capacity())
    }

    /// Tokens of the longest sequence.
    pub(crate) fn longest(&self) -> usize {
        self.segments.iter().map(|segment| segment.len).max().unwrap_or(0)
    }

    pub(crate) fn clear(&mut self) {
        self.blocks.clear();
        self.segments.clear();
        self.rows.clear();
        self.chunks.clear();
    }

    /// Adds a sequence of `len` tokens to segments and chunks, behind the blocks that are there.
    pub(crate) fn push_segment(&mut self, len: usize) {
        let first_block = self.end_of_blocks();
        self.segments.push(Segment { first_block, len });
        let blocks = first_block..first_block + len.div_ceil(BLOCK);
        self.chunks.extend(blocks.step_by(CHUNK_BLOCKS));
    }

    /// Blocks of all sequences so far.
    fn end_of_blocks(&self) -> usize {
        self.segments.last().map_or(0, |segment| segment.first_block + segment.len.div_ceil(BLOCK))
    }

    /// Ends the last sequence's last chunk.
    pub(crate) fn end_chunks(&mut self) {
        self.chunks.push(self.end_of_blocks());
    }

    /// Cuts the batch of valid `offsets`.
    pub(crate) fn build(&mut self, offsets: &[usize]) {
        self.clear();
        self.tokens = offsets.last().copied().unwrap_or(0);
        for (segment, bounds) in offsets.windows(2).enumerate() {
            let len = bounds[1] - bounds[0];
            self.push_segment(len);
            for start in (0..len).step_by(BLOCK) {
                self.blocks.push(Block { segment, start });
                self.rows.push(bounds[0] + start);
            }
        }
        self.rows.push(self.tokens);
        self.end_chunks();

        self.tile_rows.clear();
        self.tile_blocks.clear();
        let mut begin = None;
        for (block, &row) in self.rows.iter().enumerate() {
            let full = begin.is_none_or(|begin| row - begin >= TILE_ROWS);
            if full || block + 1 == self.rows.len() {
                self.tile_rows.push(row);
                self.tile_blocks.push(block);
                begin = Some(row);
            }
        }
    }

    /// `(block, token in it)` of a row of the tile that begins at block `first`.
    #[inline(always)]
    pub(crate) fn block_of(&self, first: usize, row: usize) -> (usize, usize) {
        let row = row + self.rows[first];
        let mut block = first;
        while row >= self.rows[block + 1] {
            block += 1;
        }
        (block, row - self.rows[block])
    }
}
