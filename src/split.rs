//! How an output is cut into tiles, and who takes which.

use std::ops::Range;

use crate::exec::own_tiles;
use crate::gemm::PANEL;
use crate::linear::Linear;

/// Rows of a tile at most: its sums (24 KiB) and a block of the panel (128 KiB) stay in L2 beside the rows of A.
pub(crate) const MAX_ROWS: usize = 96;

/// Rows that products take together with AVX-512 and AVX2. Tiles are cut behind a multiple of them: with one row fewer AVX2 needs 2 to 3 % longer per row.
const UNIT: usize = 6;

/// Rows of a tile, at most, from which on tiles are cut so. To stay below the most they become up to five rows lower, and each reads all weights.
const HIGH: usize = 8 * UNIT;

/// How an output is cut into tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Split {
    /// All rows.
    rows: usize,
    /// Runs of rows that are cut each by itself, as even as can be: one for each member, or one.
    runs: usize,
    tiles_per_run: usize,
    unit: usize,
    /// Columns of a tile.
    cols: usize,
}

impl Split {
    /// Rows per member below which the columns are split: fewer would stream the weights faster than the last cache
    /// delivers them.
    const FEW: usize = 24;

    /// Rows first: a tile of whole rows reads its part of A once and can be followed by a norm. With too few rows for
    /// everybody the columns are split, so that each core keeps its slice of the weights in its L2.
    pub(crate) fn new(rows: usize, cols: usize, max_rows: usize, members: usize) -> Split {
        let whole = Self::even(rows, cols, max_rows, members);
        if rows.div_ceil(whole.down()) >= Self::FEW || rows > Self::most_rows_by_cols(members) {
            return whole;
        }
        // One row waits for memory, which no two cores get alike: more tiles let the faster one take more of them.
        let tiles = if rows == 1 && members > 1 { 8 } else { TILES };
        let width = per_tile(cols.div_ceil(PANEL), 1, |block| block, members, tiles) * PANEL;
        if width >= cols { whole } else { Self::even(rows, width, max_rows, 1) }
    }

    /// Tiles of at most `max_rows` and of `cols` columns, as many rows for each member, but for no more of them than there are units of rows: each
    /// reads all weights.
    pub(crate) fn even(rows: usize, cols: usize, max_rows: usize, members: usize) -> Split {
        let unit = if max_rows >= HIGH { UNIT } else { 1 };
        let runs = members.min(rows.div_ceil(UNIT)).max(1);
        let tiles_per_run = rows.div_ceil(runs).div_ceil(max_rows / unit * unit).max(1);
        Split { rows, runs, tiles_per_run, unit, cols }
    }

    /// Tiles of `n` whole rows, but for the last.
    pub(crate) fn every(rows: usize, cols: usize, n: usize) -> Split {
        let unit = n.max(1);
        Split { rows, runs: 1, tiles_per_run: rows.div_ceil(unit), unit, cols }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn tile_cols(&self) -> usize {
        self.cols
    }

    /// How many tiles the rows make.
    pub(crate) fn down(&self) -> usize {
        self.runs * self.tiles_per_run
    }

    /// The rows of tile `i`, behind those of the tile before: unsafe code relies on that. There may be none, if a run is a row shorter than the longest.
    pub(crate) fn tile_rows(&self, i: usize) -> Range<usize> {
        let run = own_tiles(i / self.tiles_per_run, self.rows, self.runs);
        let (low, rest) = (run.len() / self.tiles_per_run, run.len() % self.tiles_per_run);
        let cut = |tile: usize| {
            let even = tile * low + tile.min(rest);
            run.end.min(run.start + even.next_multiple_of(self.unit))
        };
        let tile = i % self.tiles_per_run;
        cut(tile)..cut(tile + 1)
    }

    /// The most rows of a tile.
    pub(crate) fn height(&self) -> usize {
        let longest = self.rows.div_ceil(self.runs);
        longest.min(longest.div_ceil(self.tiles_per_run.max(1)).next_multiple_of(self.unit))
    }

    /// The most rows whose columns are split.
    pub(crate) fn most_rows_by_cols(members: usize) -> usize {
        members.saturating_mul(Self::FEW)
    }

    /// Whether a tile holds whole rows.
    pub(crate) fn is_by_rows(&self, cols: usize) -> bool {
        self.cols >= cols
    }
}

/// Tiles for each member, so that a late helper still finds work.
pub(crate) const TILES: usize = 2;

/// How many of `units`, panels or heads, make a tile of each of some blocks of rows, of which block `i` begins at row `start(i)`: so many that
/// there are `tiles` for each member, or more if that deals them out more evenly. Six panels in tiles of two are four for one of two members, tile
/// by tile three. A sixteenth is even enough.
pub(crate) fn per_tile(
    units: usize,
    blocks: usize,
    start: impl Fn(usize) -> usize,
    members: usize,
    tiles: usize,
) -> usize {
    let rows = start(blocks);
    let largest_share = |per_tile: usize| {
        let tiles = blocks * units.div_ceil(per_tile);
        // Rows of units of the tiles before one: all blocks' first, then all blocks' next.
        let before = |tile: usize| {
            let done = tile / blocks * per_tile;
            done.min(units) * rows + start(tile % blocks) * per_tile.min(units.saturating_sub(done))
        };
        let share = |member| {
            let own = own_tiles(member, tiles, members);
            before(own.end) - before(own.start)
        };
        (0..members).map(share).max().unwrap_or(0)
    };
    let most = (units * blocks).div_ceil(members.saturating_mul(tiles)).clamp(1, units.max(1));
    let mut best = (most, usize::MAX);
    for per_tile in (1..=most).rev() {
        let share = largest_share(per_tile);
        if share < best.1 {
            best = (per_tile, share);
        }
        if 16 * members * share <= 17 * units * rows {
            break;
        }
    }
    best.0
}

/// The columns of a map, tile by tile: each member begins with a range of its own.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) per_tile: usize,
    pub(crate) members: usize,
}

impl<'a> Columns<'a> {
    fn tiles(&self) -> usize {
        self.linear.out_features().div_ceil(self.per_tile)
    }

    /// The weights that are read after the tile that begins at `col`: those of the next one, or behind the last of a member's range those that
    /// it begins the next phase with.
    pub(crate) fn after(&self, col: usize, next: Option<Columns<'a>>) -> &'a [f32] {
        let (done, tiles) = (col / self.per_tile + 1, self.tiles());
        let member = (0..self.members).find(|member| own_tiles(*member, tiles, self.members).end == done);
        match member.zip(next) {
            Some((member, next)) => {
                let first = own_tiles(member, next.tiles(), next.members).start;
                next.linear.from(first * next.per_tile)
            }
            None => self.linear.from(done % tiles * self.per_tile),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::gemm::PackedMatrix;
    use crate::view::MatRef;

    #[test]
    fn few_panels_are_dealt_out_evenly() {
        let blocks = |n: usize| (0..=n).map(|block| 64 * block).collect::<Vec<_>>();
        for (units, starts, members, expected) in [
            (12, blocks(1), 1, 6),
            (12, blocks(1), 2, 3),
            (48, blocks(1), 2, 12),
            (6, blocks(1), 2, 1),
            (13, blocks(1), 2, 3),
            (1, blocks(1), 2, 1),
            (6, blocks(1), 64, 1),
            (0, blocks(1), 2, 1),
            // Four tiles of six for two; for eight members twelve of two would be two for some, twenty-four of one are three.
            (12, blocks(2), 2, 6),
            (12, blocks(2), 8, 1),
            (12, blocks(100), 2, 12),
            // Five blocks of rows for two members, or four of which one is short.
            (12, blocks(5), 2, 6),
            (12, vec![0, 64, 128, 192, 200], 2, 6),
            (12, vec![0, 64, 128, 192, 250], 2, 12),
        ] {
            let actual = per_tile(units, starts.len() - 1, |block| starts[block], members, TILES);
            assert_eq!(actual, expected, "{units} of {starts:?} for {members}");
        }
    }

    #[test]
    fn one_row_is_dealt_out_in_more_tiles() {
        for (rows, panels, members, expected) in
            [(1, 48, 2, 3), (1, 36, 2, 3), (1, 18, 2, 1), (1, 12, 2, 1), (1, 48, 1, 24), (2, 48, 2, 12)]
        {
            let split = Split::new(rows, panels * PANEL, MAX_ROWS, members);
            assert_eq!((split.down(), split.tile_rows(0)), (1, 0..rows));
            assert_eq!(split.tile_cols(), expected * PANEL, "{panels} for {members}");
        }
    }

    /// Each row is in one tile, none is higher than asked, and runs differ by a row at most.
    #[test]
    fn tiles_of_rows_are_all_rows_once_and_even() {
        for rows in (0..300).chain([511, 512, 1000, 1024]) {
            for members in [1, 2, 3, 7, 16, 64] {
                for max_rows in [6, 11, 42, 48, 79, MAX_ROWS] {
                    let split = Split::even(rows, 64, max_rows, members);
                    assert!(split.height() <= max_rows, "{split:?}");
                    let (mut end, runs) = (0, members.min(rows.div_ceil(6)).max(1));
                    for run in 0..runs {
                        let start = end;
                        for tile in own_tiles(run, split.down(), runs) {
                            let rows = split.tile_rows(tile);
                            assert!(
                                rows.start == end && rows.len() <= split.height(),
                                "{split:?}, tile {tile}"
                            );
                            end = rows.end;
                        }
                        let own = end - start;
                        assert!(own.abs_diff(rows / runs) <= 1, "{split:?}, run {run}: {own} rows");
                    }
                    assert_eq!(end, rows, "{split:?}");
                }
            }
        }
    }

    #[test]
    fn rows_are_cut_behind_whole_register_tiles() {
        let tiles = |split: Split| (0..split.down()).map(|i| split.tile_rows(i).len()).collect::<Vec<_>>();
        assert_eq!(tiles(Split::new(512, 64, 79, 2)), [66, 66, 60, 64, 66, 66, 60, 64]);
        assert_eq!(tiles(Split::new(128, 64, MAX_ROWS, 1)), [66, 62]);
        assert_eq!(tiles(Split::new(128, 64, MAX_ROWS, 2)), [64, 64]);
        assert_eq!(tiles(Split::new(25, 64, MAX_ROWS, 1)), [25]);
        // Where few rows of a tile fit, all of them count.
        assert_eq!(tiles(Split::new(100, 64, 10, 1)), [10; 10]);
        assert_eq!(tiles(Split::new(100, 64, 16, 2)), [13, 13, 12, 12, 13, 13, 12, 12]);
        // One panel of columns cannot be split.
        assert_eq!(tiles(Split::new(16, 64, MAX_ROWS, 2)), [8, 8]);
        assert_eq!(tiles(Split::new(16, 64, MAX_ROWS, 16)), [5, 5, 6]);
        // Few rows go to everybody, a part of the columns each.
        assert_eq!(tiles(Split::new(25, 640, MAX_ROWS, 2)), [25]);
        assert_eq!(tiles(Split::every(10, 64, 4)), [4, 4, 2]);
        assert_eq!(tiles(Split::every(3, 64, 0)), [1, 1, 1]);
        assert_eq!(tiles(Split::every(0, 64, 4)), [0; 0]);
        // As many rows as a slice can have.
        let rows = isize::MAX as usize / size_of::<f32>();
        let all = Split::every(rows, 1, 6);
        assert_eq!(all.tile_rows(all.down() - 1), rows / 6 * 6..rows);
    }

    #[test]
    fn behind_the_last_tile_of_a_member_come_the_weights_that_it_begins_the_next_phase_with()
    -> Result<(), Error> {
        let linear = |panels: usize| {
            let n = panels * PANEL;
            Linear::new(PackedMatrix::from_out_in(MatRef::contiguous(&vec![0.0; n], n, 1)?)?, None)
        };
        // Of two members each begins with half of the tiles: three panels each of the first map, twelve of the next.
        let (map, next) = (linear(12)?, linear(48)?);
        let [columns, next] = [&map, &next].map(|map| map.columns(16, 2));
        assert_eq!((columns.per_tile, next.per_tile), (3 * PANEL, 12 * PANEL));
        let place = |panel: usize| columns.after(panel * PANEL, Some(next)).as_ptr();
        assert_eq!(place(0), map.from(3 * PANEL).as_ptr());
        assert_eq!(place(3), next.linear.from(0).as_ptr());
        assert_eq!(place(6), map.from(9 * PANEL).as_ptr());
        assert_eq!(place(9), next.linear.from(24 * PANEL).as_ptr());
        // With nothing after it the phase may come again with other rows.
        assert_eq!(columns.after(9 * PANEL, None).as_ptr(), map.from(0).as_ptr());
        Ok(())
    }
}
