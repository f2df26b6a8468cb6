//! The matrix of a graph, its tiles, and its figures as a picture.

use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use laneformer::{Cover, Tile};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::drawing::{self, Area, FONT, failed};
use crate::graph::Figures;
use crate::graph::kinds::Mask;

/// Pixels of the longer side of the matrix at most, of a token at most, and of a side at least.
const MOST: usize = 720;
const MOST_PER_TOKEN: usize = 32;
const LEAST: usize = 64;
/// Pixels beside the matrix.
const LEFT: i32 = 84;
const TOP: i32 = 112;
const BOTTOM: i32 = 28;
const GAP: i32 = 32;
const PANEL: i32 = 304;
const PANEL_HEIGHT: i32 = 400;
/// Height of a tile below which its outline would hide it.
const OUTLINED: usize = 6;
/// Pixels between two numbers of an axis at least.
const TICK: usize = 56;

/// What a cell shows, told apart in grey and by eyes that see few colours as well.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Full,
    Edge,
    Masked,
    Skipped,
}

const CLASSES: [(Class, RGBColor, &str); 4] = [
    (Class::Full, RGBColor(0, 68, 136), "full tile: nothing to mask"),
    (Class::Edge, RGBColor(86, 160, 220), "partial tile: edges"),
    (Class::Masked, RGBColor(240, 150, 60), "partial tile: computed, then masked"),
    (Class::Skipped, RGBColor(232, 232, 232), "skipped"),
];

/// The matrix as cells of one or more tokens.
pub struct Grid {
    /// Tokens of a cell.
    tokens: usize,
    /// Columns and rows.
    size: [usize; 2],
    /// Pixels of a cell.
    pixels: [usize; 2],
    /// Pairs in each cell: of full tiles, edges of partial ones, masked, skipped.
    pairs: Vec<[u32; 4]>,
    outlines: bool,
    /// Outlines of tiles: the line, and where it begins and ends, in cells.
    across: Vec<(usize, Range<usize>)>,
    down: Vec<(usize, Range<usize>)>,
}

impl Grid {
    pub fn new(keys: usize, queries: usize) -> Grid {
        let longest = keys.max(queries).max(1);
        let tokens = longest.div_ceil(MOST);
        let size = [keys.div_ceil(tokens), queries.div_ceil(tokens)];
        let scale = (MOST / longest).clamp(1, MOST_PER_TOKEN);
        let pixels = size.map(|n| scale.max(LEAST.div_ceil(n.max(1))));
        Grid {
            tokens,
            size,
            pixels,
            pairs: vec![[0; 4]; size[0] * size[1]],
            outlines: 16 * pixels[1] / tokens >= OUTLINED,
            across: vec![],
            down: vec![],
        }
    }

    /// Counts a tile's pairs into the cells that it touches.
    pub fn add(&mut self, tile: &Tile) {
        for query in tile.queries.clone() {
            let row = query / self.tokens * self.size[0];
            let (mut key, seen) = (tile.keys.start, tile.seen(query));
            while key < tile.keys.end {
                let cell = key / self.tokens;
                let end = tile.keys.end.min((cell + 1) * self.tokens);
                let part = |r: &Range<usize>| r.end.min(end).saturating_sub(r.start.max(key));
                let computed = part(&tile.computed);
                let bits = u64::MAX >> (64 - (end - key)) << (key - tile.keys.start);
                let edges = (seen & bits).count_ones() as usize;
                let pairs = match tile.cover {
                    Cover::Full => [edges, 0, 0, 0],
                    _ => [0, edges, computed - edges, end - key - computed],
                };
                for (sum, n) in self.pairs[row + cell].iter_mut().zip(pairs) {
                    *sum += n as u32;
                }
                key = end;
            }
        }
        if self.outlines {
            let cells = |r: &Range<usize>| r.start / self.tokens..r.end.div_ceil(self.tokens);
            let (rows, cols) = (cells(&tile.queries), cells(&tile.keys));
            self.across.extend([(rows.start, cols.clone()), (rows.end, cols.clone())]);
            self.down.extend([(cols.start, rows.clone()), (cols.end, rows)]);
        }
    }

    /// What most of a cell's computed pairs are, so that nothing computed vanishes in a picture of many tokens; none where the
    /// sequences differ.
    fn class(&self, col: usize, row: usize) -> Option<Class> {
        let [full, edges, masked, skipped] = self.pairs[row * self.size[0] + col];
        match (full, edges, masked) {
            (0, 0, 0) => (skipped > 0).then_some(Class::Skipped),
            _ if full >= edges.max(masked) => Some(Class::Full),
            _ if edges >= masked => Some(Class::Edge),
            _ => Some(Class::Masked),
        }
    }

    /// Runs of cells of one class in a row.
    fn runs(&self, row: usize) -> Vec<(Class, Range<usize>)> {
        let mut runs: Vec<(Class, Range<usize>)> = vec![];
        for col in 0..self.size[0] {
            let Some(class) = self.class(col, row) else { continue };
            match runs.last_mut() {
                Some((last, run)) if *last == class && run.end == col => run.end += 1,
                _ => runs.push((class, col..col + 1)),
            }
        }
        runs
    }

    /// The cells of each class as few shapes: a run of a row joins one that it touches in the row before, be it at a corner.
    fn shapes(&self) -> Vec<Shape> {
        let mut shapes: Vec<Shape> = vec![];
        let mut open = vec![];
        for row in 0..self.size[1] {
            let mut next = vec![];
            for (class, run) in self.runs(row) {
                let touches = |i: &usize| {
                    let above = &shapes[*i].runs[row - 1 - shapes[*i].row];
                    shapes[*i].class == class && above.start <= run.end && run.start <= above.end
                };
                match open.iter().position(touches) {
                    Some(at) => {
                        let i = open.swap_remove(at);
                        shapes[i].runs.push(run);
                        next.push(i);
                    }
                    None => {
                        next.push(shapes.len());
                        shapes.push(Shape { class, row, runs: vec![run] });
                    }
                }
            }
            open = next;
        }
        shapes
    }

    /// Width and height in pixels.
    fn extent(&self) -> [i32; 2] {
        [0, 1].map(|i| (self.size[i] * self.pixels[i]) as i32)
    }

    fn x(&self, col: usize) -> i32 {
        LEFT + (col * self.pixels[0]) as i32
    }

    fn y(&self, row: usize) -> i32 {
        TOP + (row * self.pixels[1]) as i32
    }

    fn draw(&self, area: &Area<'_>) -> Result<()> {
        for shape in self.shapes() {
            let color = CLASSES.iter().find(|(class, ..)| *class == shape.class).map_or(BLACK, |c| c.1);
            let points: Vec<_> =
                shape.outline().into_iter().map(|(col, row)| (self.x(col), self.y(row))).collect();
            area.draw(&Polygon::new(points, color.filled())).map_err(failed)?;
        }
        let style = BLACK.mix(0.2).filled();
        for (row, cols) in joined(&self.across) {
            let from = (self.x(cols.start), self.y(row));
            area.draw(&Rectangle::new([from, (self.x(cols.end), from.1 + 1)], style)).map_err(failed)?;
        }
        for (col, rows) in joined(&self.down) {
            let from = (self.x(col), self.y(rows.start));
            area.draw(&Rectangle::new([from, (from.0 + 1, self.y(rows.end))], style)).map_err(failed)?;
        }
        Ok(())
    }
}

/// Runs of one class in rows that follow one another.
struct Shape {
    class: Class,
    row: usize,
    runs: Vec<Range<usize>>,
}

impl Shape {
    /// The corners as columns and rows: down the right ends, up the left ones.
    fn outline(&self) -> Vec<(usize, usize)> {
        let rows = || self.runs.iter().zip(self.row..self.row + self.runs.len());
        let right = rows().flat_map(|(run, row)| [(run.end, row), (run.end, row + 1)]);
        let left = rows().rev().flat_map(|(run, row)| [(run.start, row + 1), (run.start, row)]);
        let mut points: Vec<(usize, usize)> = vec![];
        for point in right.chain(left) {
            // Of three points on a vertical line the middle one is none.
            if let [.., a, b] = points[..]
                && a.0 == b.0
                && b.0 == point.0
            {
                points.pop();
            }
            if points.last() != Some(&point) {
                points.push(point);
            }
        }
        points
    }
}

/// Lines that touch or overlap, as one.
fn joined(lines: &[(usize, Range<usize>)]) -> Vec<(usize, Range<usize>)> {
    let mut lines = lines.to_vec();
    lines.sort_unstable_by_key(|(at, line)| (*at, line.start, line.end));
    let mut out: Vec<(usize, Range<usize>)> = vec![];
    for (at, line) in lines {
        match out.last_mut() {
            Some((last, all)) if *last == at && line.start <= all.end => all.end = all.end.max(line.end),
            _ => out.push((at, line)),
        }
    }
    out
}

/// Draws the graph of `mask` to `path`.
pub fn draw(path: &Path, title: &str, mask: &Mask, figures: &Figures, grid: &Grid) -> Result<()> {
    let [width, height] = grid.extent();
    let size = (LEFT + width + GAP + PANEL, TOP + height.max(PANEL_HEIGHT) + BOTTOM);
    drawing::draw(path, (size.0 as u32, size.1 as u32), |area| {
        // Long titles in smaller letters.
        let letters = title.chars().count().max(1) as i32;
        let font = (2 * (size.0 - 48) / letters).clamp(10, 26);
        text(area, title, (24, 24), font, Pos::new(HPos::Left, VPos::Top))?;
        grid.draw(area)?;
        axes(area, mask, figures, grid)?;
        panel(area, mask, figures, (LEFT + width + GAP, TOP))
    })
}

fn text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, pos: Pos) -> Result<()> {
    let style = (FONT, size).into_font().into_text_style(area).pos(pos);
    area.draw(&Text::new(text.to_owned(), at, style)).map_err(failed)
}

/// Keys above, queries at the left: numbers of tokens, or names of groups.
fn axes(area: &Area<'_>, mask: &Mask, figures: &Figures, grid: &Grid) -> Result<()> {
    let [width, height] = grid.extent();
    let (above, left) = (Pos::new(HPos::Center, VPos::Bottom), Pos::new(HPos::Right, VPos::Center));
    text(area, "key", (LEFT + width / 2, TOP - 28), 17, above)?;
    let turned = (FONT, 17).into_font().transform(FontTransform::Rotate270).into_text_style(area);
    let at = (LEFT - 62, TOP + height / 2);
    area.draw(&Text::new("query", at, turned.pos(Pos::new(HPos::Center, VPos::Center)))).map_err(failed)?;
    let (x, y) = (|key: f64| LEFT + grid.at(0, key), |query: f64| TOP + grid.at(1, query));
    for (label, key) in labels(mask, figures.keys, grid, 0) {
        text(area, &label, (x(key), TOP - 7), 14, above)?;
    }
    for (label, query) in labels(mask, figures.queries, grid, 1) {
        text(area, &label, (LEFT - 8, y(query)), 14, left)?;
    }
    let frame = Rectangle::new([(LEFT, TOP), (LEFT + width, TOP + height)], BLACK.mix(0.6));
    area.draw(&frame).map_err(failed)?;
    // Where groups meet.
    let ends = mask.names.iter().scan(0, |end, (_, n)| {
        *end += n;
        Some(*end as f64)
    });
    for end in ends {
        for line in
            [[(x(end), TOP - 8), (x(end), TOP + height)], [(LEFT - 8, y(end)), (LEFT + width, y(end))]]
        {
            area.draw(&PathElement::new(line, BLACK.mix(0.6))).map_err(failed)?;
        }
    }
    Ok(())
}

/// What stands beside which token of an axis.
fn labels(mask: &Mask, tokens: usize, grid: &Grid, axis: usize) -> Vec<(String, f64)> {
    if !mask.names.is_empty() {
        let middle = |start: &mut usize, (name, n): &(String, usize)| {
            *start += n;
            Some((name.clone(), *start as f64 - *n as f64 / 2.0))
        };
        return mask.names.iter().scan(0, middle).collect();
    }
    let step = std::iter::successors(Some(1), |n| Some(2 * n));
    let wide = |n: &usize| n * grid.pixels[axis] >= TICK * grid.tokens;
    let step = step.take(32).find(wide).unwrap_or(tokens.max(1));
    (0..=tokens).step_by(step).map(|n| (n.to_string(), n as f64)).collect()
}

impl Grid {
    /// Pixels from the first token to this one.
    fn at(&self, axis: usize, token: f64) -> i32 {
        (token * self.pixels[axis] as f64 / self.tokens as f64).round() as i32
    }
}

/// The legend and the figures.
fn panel(area: &Area<'_>, mask: &Mask, figures: &Figures, (x, y): (i32, i32)) -> Result<()> {
    let line = |at: i32, pos: HPos, right: i32, what: &str, size: i32| {
        text(area, what, (x + right, y + at), size, Pos::new(pos, VPos::Center))
    };
    let others = (mask.offsets.len() > 2).then_some((WHITE, "another sequence: no tile"));
    for (i, (color, name)) in CLASSES.iter().map(|c| (c.1, c.2)).chain(others).enumerate() {
        let at = 10 + 26 * i as i32;
        let square = [(x, y + at - 8), (x + 16, y + at + 8)];
        area.draw(&Rectangle::new(square, color.filled())).map_err(failed)?;
        if color == WHITE {
            area.draw(&Rectangle::new(square, BLACK.mix(0.6))).map_err(failed)?;
        }
        line(at, HPos::Left, 26, name, 15)?;
    }
    for (i, [name, value, share]) in figures.lines().iter().enumerate() {
        let at = 160 + 40 * i as i32;
        line(at, HPos::Left, 0, name, 15)?;
        line(at, HPos::Right, 240, value, 15)?;
        line(at + 17, HPos::Right, 240, share, 13)?;
    }
    let (whole, part) = (figures.full.rows.max(figures.empty.rows), figures.partial.rows);
    let queries = match whole.max(part) {
        most if part == 0 || part == most => format!("{most} queries."),
        most => format!("{most} queries, {part} where some see less."),
    };
    let notes = ["A tile is up to 64 keys of up to".to_owned(), queries];
    for (i, note) in notes.iter().enumerate() {
        line(374 + 18 * i as i32, HPos::Left, 0, note, 13)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use laneformer::Graph;

    /// The grid of a causal graph.
    fn causal(n: usize) -> Grid {
        let mut grid = Grid::new(n, n);
        for tile in Graph::causal().tiles(0, &[0, n], &[0, n]).expect("offsets") {
            grid.add(&tile);
        }
        grid
    }

    #[test]
    fn cells_are_edges_where_tokens_see() {
        let grid = causal(300);
        assert_eq!((grid.tokens, grid.size, grid.pixels), (1, [300, 300], [2, 2]));
        for row in 0..300 {
            for col in 0..300 {
                let edge = matches!(grid.class(col, row), Some(Class::Full | Class::Edge));
                assert_eq!(edge, col <= row, "{col} {row}");
            }
        }
    }

    #[test]
    fn shapes_hold_every_cell_once() {
        for n in [1, 17, 300, 2000] {
            let grid = causal(n);
            let cells = grid.size[0] * grid.size[1];
            let mut met = vec![0; cells];
            for shape in grid.shapes() {
                for (run, row) in shape.runs.iter().zip(shape.row..) {
                    for col in run.clone() {
                        assert!(grid.class(col, row) == Some(shape.class));
                        met[row * grid.size[0] + col] += 1;
                    }
                }
            }
            assert_eq!(met, vec![1; cells]);
            let pairs: u64 = grid.pairs.iter().flatten().map(|n| u64::from(*n)).sum();
            assert_eq!(pairs, (n * n) as u64);
        }
    }

    #[test]
    fn outlines_turn_where_runs_do() {
        let shape = Shape { class: Class::Edge, row: 2, runs: vec![0..2, 0..2, 1..3] };
        assert_eq!(shape.outline(), [(2, 2), (2, 4), (3, 4), (3, 5), (1, 5), (1, 4), (0, 4), (0, 2)]);
        assert_eq!(
            joined(&[(1, 4..6), (0, 0..2), (1, 6..7), (1, 9..10)]),
            [(0, 0..2), (1, 4..7), (1, 9..10)]
        );
    }
}
