//! Attention of a tile of queries, flash style (Dao et al. 2022, arXiv:2205.14135): no score matrix beyond one chunk.
//!
//! The keys of a segment are taken in chunks of 256 from its first key. Each chunk gives its own maximum, sum and output,
//! and chunks are folded in ascending order, so a row's bits depend only on its allowed keys and their places: not on
//! the queries beside it, the threads, or whether it came alone (decode) or with others (prefill).

use core::ops::Range;

use crate::attention::Heads;
use crate::attention::bits::Query;
use crate::attention::keys::Keys;
use crate::attention::layout::{BLOCK, CHUNK, CHUNK_BLOCKS};
use crate::attention::terms::{Relative, SegmentTerm};
use crate::attention::tiles::{Call, Queries, ROWS, Seen, Tiles, Words, runs};
use crate::gemm::{Start, product};
use crate::linear::padded_stride;
use crate::math::{exp_nonpositive, tanh};
use crate::reduce::{fold, store_and_add};
use crate::simd::{LANES, Simd, Vector};
use crate::view::{MatMut, MatRef};

/// A row of scores, one line longer than the chunk, so that rows do not share L1 sets.
const SCORE_STRIDE: usize = CHUNK + LANES;
/// A row of relative scores: the places of a chunk for [`ROWS`] consecutive positions, begun at a panel, and room to read past
/// the last.
const RELATIVE_COLS: usize = CHUNK + ROWS + BLOCK;
const RELATIVE_STRIDE: usize = RELATIVE_COLS + LANES;
/// Rows whose scores (8 KiB) go through both passes of softmax together.
const SOFTMAX_ROWS: usize = 8;

/// Scratch of a tile, in elements, with or without relative positions.
pub(crate) fn scratch_len(heads: &Heads, has_relative: bool) -> usize {
    let relative = if has_relative { 2 * padded_stride(heads.head_dim) + RELATIVE_STRIDE } else { 0 };
    ROWS * (SCORE_STRIDE + 2 * heads.layout().value_stride() + 2 + relative)
}

/// `out = softmax(scores of the queries and keys) * values`, the heads side by side in `out`; rows without an allowed key are 0.
///
/// A chunk of all heads before the next: that is the order in which they stand in memory.
#[inline(always)]
pub(crate) fn attend<S: Simd>(
    s: S,
    call: &Call<'_>,
    queries: &Queries<'_>,
    keys: &Keys<'_>,
    out: &mut MatMut<'_>,
    scratch: &mut [f32],
) {
    let Queries { q, first, heads, .. } = *queries;
    let (n, rows, stride, value_dim) =
        (q.rows(), queries.rows(), keys.layout.value_stride(), call.heads.value_dim);
    let (score, rest) = scratch.split_at_mut(ROWS * SCORE_STRIDE);
    let (part, rest) = rest.split_at_mut(ROWS * stride);
    let (total, rest) = rest.split_at_mut(ROWS * stride);
    let (max, rest) = rest.split_at_mut(ROWS);
    let (sum, rest) = rest.split_at_mut(ROWS);
    // Short rows far apart are nothing that the hardware foresees.
    for row in 0..n {
        for line in q.row(row).chunks(LANES) {
            s.prefetch(line.as_ptr());
        }
    }
    for row in 0..out.rows() {
        for line in out.row(row).chunks(LANES) {
            s.prefetch(line.as_ptr());
        }
    }
    let mut score = MatMut::scratch(score, rows, CHUNK, SCORE_STRIDE);
    let mut part = MatMut::scratch(part, rows, stride, stride);
    let mut total = MatMut::scratch(total, rows, stride, stride);
    let (max, sum) = (&mut max[..rows], &mut sum[..rows]);

    // With relative positions the queries, of one head then, meet keys as q + u and positions as q + w.
    let mut relative = None;
    if let Some(Relative { u, w, .. }) = &call.terms.relative {
        let (with_u, rest) = rest.split_at_mut(ROWS * padded_stride(q.cols()));
        let (with_w, rest) = rest.split_at_mut(ROWS * padded_stride(q.cols()));
        let (with_u, with_w) = (shifted(s, queries, u, with_u), shifted(s, queries, w, with_w));
        relative = Some((with_u, with_w, MatMut::scratch(rest, n, RELATIVE_COLS, RELATIVE_STRIDE)));
    }

    let (mut tiles, mut ahead) = (&mut { Tiles::NONE }, &mut { Tiles::NONE });
    for is_careful in [false, true] {
        max.fill(f32::NEG_INFINITY);
        let mut is_masked = false;
        let chunks = call.graph.runs(queries.span(), keys.len, CHUNK);
        let mut chunks = chunks.skip_while(|chunk| chunk * CHUNK_BLOCKS < keys.first_block());
        let mut is_found = tiles.find_next(call, queries, keys.len, &mut chunks);
        // What is read at the end: the first chunk of the next head.
        let end = tiles
            .block_from(0)
            .map_or([&[][..]; 2], |block| keys.both(block, call.kv_head(first.head + heads)));
        while is_found {
            is_found = ahead.find_next(call, queries, keys.len, &mut chunks);
            let next = if is_found { ahead.block_from(0) } else { None };
            let next = next.map_or(end, |block| keys.both(block, call.kv_head(first.head)));
            is_masked |= tiles.is_masked;
            let rows = Rows { score: &mut score, part: &mut part, total: &mut total, max, sum };
            attend_chunk(s, call, queries, keys, tiles, rows, &mut relative, next, is_careful);
            core::mem::swap(&mut tiles, &mut ahead);
        }
        // A NaN or infinity behind the mask may have come in as 0 * NaN: one that was allowed costs a tile its second run as well.
        let mut is_finite = true;
        for head in 0..heads {
            let rows = head * n..(head + 1) * n;
            let mut out = out.block(0..n, head * value_dim..(head + 1) * value_dim);
            let total = total.as_ref().block(rows.clone(), 0..stride);
            is_finite &= write(s, total, (&max[rows.clone()], &sum[rows]), &mut out);
        }
        if is_finite || !is_masked {
            break;
        }
    }
}

/// What becomes of the rows of a tile.
struct Rows<'a, 'b> {
    score: &'a mut MatMut<'b>,
    /// The chunk's output; like `total` it means nothing for rows that have seen no key, whose maximum says so.
    part: &'a mut MatMut<'b>,
    /// The output so far.
    total: &'a mut MatMut<'b>,
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

/// Queries that meet keys, and such that meet positions, with room for the scores of these.
type Shifted<'a> = (MatRef<'a>, MatRef<'a>, MatMut<'a>);

/// Writes what the rows have gathered, over their sums; whether all of it is finite.
#[inline(always)]
fn write<S: Simd>(s: S, total: MatRef<'_>, (max, sum): (&[f32], &[f32]), out: &mut MatMut<'_>) -> bool {
    let zero = s.splat(0.0);
    let mut zeros = zero;
    for (row, (&max, &sum)) in max.iter().zip(sum).enumerate() {
        let out = out.row_mut(row);
        if max == f32::NEG_INFINITY {
            out.fill(0.0);
            continue;
        }
        // Plus zero: masked keys that are computed and those that are skipped differ in the sign of a zero, so it is always positive.
        let inv = s.splat(1.0 / sum);
        let (total, (whole, tail)) = (total.row(row), out.as_chunks_mut::<LANES>());
        let mut total = total.as_chunks::<LANES>().0.iter();
        // 0 times what is not finite is a NaN.
        let mut zeros_of_row = zero;
        for (out, total) in whole.iter_mut().zip(&mut total) {
            let x = s.load(total).mul_add(inv, zero);
            zeros_of_row = x.mul_add(zero, zeros_of_row);
            x.store(out);
        }
        // Of the padding of the last vector of values nothing is known.
        for total in total {
            let x = s.load_partial(&total[..tail.len()], zero).mul_add(inv, zero);
            zeros_of_row = x.mul_add(zero, zeros_of_row);
            x.store_partial(tail);
        }
        zeros = zeros + zeros_of_row;
    }
    zeros.sum() == 0.0
}

/// Takes one chunk of keys into the rows; careful of what is behind the mask, if something there may not be finite.
#[inline(always)]
fn attend_chunk<S: Simd>(
    s: S,
    call: &Call<'_>,
    queries: &Queries<'_>,
    keys: &Keys<'_>,
    tiles: &Tiles,
    rows: Rows<'_, '_>,
    relative: &mut Option<Shifted<'_>>,
    next: [&[f32]; 2],
    is_careful: bool,
) {
    let Rows { score, part, total, max, sum } = rows;
    let (n, stride) = (queries.rows(), keys.layout.value_stride());
    let kv_head = |head: usize| call.kv_head(queries.first.head + head);
    let first_seen = tiles.block_from(0).unwrap_or(tiles.first_block);
    for (head, of_group, q) in queries.groups() {
        let q = relative.as_ref().map_or(q, |(with_u, _, _)| *with_u);
        let behind = head + queries.sharing;
        let next = if behind < queries.heads { keys.both(first_seen, kv_head(behind)) } else { next };
        for i in 0..CHUNK_BLOCKS {
            let block = tiles.first_block + i;
            let next = tiles.block_from(i + 1).map_or(next, |block| keys.both(block, kv_head(head)));
            for (rows, seen) in tiles.parts(i).filter(|(_, seen)| !seen.is_empty()) {
                let Some((rows, of_q)) = common(&rows, &of_group) else { continue };
                let cols = i * BLOCK + seen.start..i * BLOCK + seen.end.next_multiple_of(LANES);
                let panel = (&keys.keys(block, kv_head(head))[seen.start..], BLOCK);
                let q = q.block(of_q, 0..q.cols());
                product(s, q, panel, Start::Zero, &mut score.block(rows, cols), next);
            }
        }
    }
    if let (Some(term), Some((_, w, buffer))) = (&call.terms.relative, relative) {
        let chunk = tiles.first_block / CHUNK_BLOCKS;
        add_relative(s, term, *w, queries.first.head, queries.position, chunk, buffer, score);
    }
    let mut chunk_max = [f32::NEG_INFINITY; ROWS];
    let mut chunk_sum = [0.0; ROWS];
    // A score that only a positive scale finishes is scaled on its way through the passes.
    let is_plain = call.is_plain();
    let scale = if is_plain { call.heads.scale } else { 1.0 };
    // Some rows at a time, which stay in L1 between their two passes: a row's maximum is ready by the time it is needed.
    for first in (0..n).step_by(SOFTMAX_ROWS) {
        let group = first..n.min(first + SOFTMAX_ROWS);
        for row in group.clone() {
            let scores = score.row_mut(row);
            if let Some(term) = &call.terms.segment {
                let (query, _) = queries.query(row);
                add_segment(s, term, queries.row(row), query, tiles.blocks(row), scores);
            }
            if !is_plain {
                finish(s, scores, tiles.blocks(row), call, queries.query(row).0);
            }
            // Rounding keeps the order of products with a positive scale, so the largest can be scaled alone.
            chunk_max[row] = largest(s, scores, tiles.words(row)) * scale;
            if chunk_max[row] == f32::NEG_INFINITY && has_nan(scores, tiles.words(row)) {
                chunk_max[row] = f32::NAN;
            }
        }
        for row in group {
            let (seen, words) = (tiles.seen(row), tiles.words(row));
            chunk_sum[row] = exponentials(s, score.row_mut(row), seen, words, scale, chunk_max[row]);
        }
    }
    // The first chunk that any of the rows sees is the output so far, and needs no fold.
    let is_first = max.iter().all(|&max| max == f32::NEG_INFINITY);
    let mut out = if is_first { total.block(0..n, 0..stride) } else { part.block(0..n, 0..stride) };
    for (head, of_group, _) in queries.groups() {
        for (rows, seen) in tiles.bands() {
            let Some((rows, _)) = common(&rows, &of_group) else { continue };
            let mut start = Start::Zero;
            for keys_seen in runs(seen) {
                let values = keys.values_from(tiles.first_block + keys_seen.start / BLOCK, kv_head(head));
                let values = (&values[keys_seen.start % BLOCK * stride..], stride);
                let p = score.as_ref().block(rows.clone(), keys_seen);
                product(s, p, values, start, &mut out.block(rows.clone(), 0..stride), next);
                start = Start::Continue;
            }
        }
    }
    if is_careful && tiles.is_masked {
        for (row, &max) in chunk_max[..n].iter().enumerate() {
            let values = &out.row(row)[..keys.layout.value_dim];
            if max != f32::NEG_INFINITY && values.iter().any(|x| !x.is_finite()) {
                let (query, _) = queries.query(row);
                only_allowed(s, score.row(row), tiles, row, keys, call.kv_head(query.head), out.row_mut(row));
            }
        }
    }
    if is_first {
        max.copy_from_slice(&chunk_max[..n]);
        sum.copy_from_slice(&chunk_sum[..n]);
    } else {
        fold_chunk(s, (max, sum), total, (&chunk_max[..n], &chunk_sum[..n]), part);
    }
}

/// What two ranges of rows have in common, and where that is in the second; nothing if that is nothing.
#[inline(always)]
fn common(a: &Range<usize>, b: &Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
    let (start, end) = (a.start.max(b.start), a.end.min(b.end));
    (start < end).then(|| (start..end, start - b.start..end - b.start))
}

/// The queries, of one head, with what belongs to it of `shift` added to each row.
#[inline(always)]
fn shifted<'a, S: Simd>(s: S, queries: &Queries<'_>, shift: &[f32], scratch: &'a mut [f32]) -> MatRef<'a> {
    let Queries { q, first, .. } = *queries;
    let mut out = MatMut::scratch(scratch, q.rows(), q.cols(), padded_stride(q.cols()));
    let zero = s.splat(0.0);
    let shift = &shift[first.head * q.cols()..(first.head + 1) * q.cols()];
    for row in 0..q.rows() {
        let parts = q.row(row).chunks(LANES).zip(shift.chunks(LANES));
        for (out, (q, shift)) in out.row_mut(row).chunks_mut(LANES).zip(parts) {
            (s.load_partial(q, zero) + s.load_partial(shift, zero)).store_partial(out);
        }
    }
    out.into_ref()
}

/// Adds `(q + w) . R[p - j]`: a product with the panels of the distances that the tile meets, read along its diagonals.
#[inline(always)]
fn add_relative<S: Simd>(
    s: S,
    relative: &Relative<'_>,
    w: MatRef<'_>,
    head: usize,
    position: isize,
    chunk: usize,
    buffer: &mut MatMut<'_>,
    score: &mut MatMut<'_>,
) {
    let rows = w.rows();
    let place = |row: usize| relative.table.place(position + row as isize) + (chunk * CHUNK) as isize;
    // Later queries read from earlier places.
    let first = place(rows - 1).div_euclid(BLOCK as isize);
    let panels = (place(0) + CHUNK as isize).div_euclid(BLOCK as isize) - first + 1;
    for i in 0..(panels as usize).min(RELATIVE_COLS / BLOCK) {
        let mut tile = buffer.block(0..rows, i * BLOCK..(i + 1) * BLOCK);
        match relative.table.panel(head, first + i as isize) {
            Some(panel) => product(s, w, (panel, BLOCK), Start::Zero, &mut tile, [&[]; 2]),
            None => {
                for row in 0..rows {
                    tile.row_mut(row).fill(0.0);
                }
            }
        }
    }
    for row in 0..rows {
        let from = (place(row) - first * BLOCK as isize) as usize;
        let terms = &buffer.row(row)[from..from + CHUNK];
        for (x, term) in score.row_mut(row).chunks_exact_mut(LANES).zip(terms.chunks_exact(LANES)) {
            (s.load(x) + s.load(term)).store(x);
        }
    }
}

/// Adds `(q + s) . E[0 or 1]` by whether query and key are of the same segment.
#[inline(always)]
fn add_segment<S: Simd>(
    s: S,
    term: &SegmentTerm<'_>,
    q: &[f32],
    query: Query,
    blocks: impl Iterator<Item = (usize, usize, Range<usize>)>,
    row: &mut [f32],
) {
    let dims = query.head * q.len()..(query.head + 1) * q.len();
    let (same, other) = term.e.split_at(term.e.len() / 2);
    let shift = &term.s[dims.clone()];
    let dot =
        |e: &[f32]| q.iter().zip(shift).zip(e).fold(0.0_f32, |sum, ((q, s), e)| (q + s).mul_add(*e, sum));
    let (same, other) = (s.splat(dot(&same[dims.clone()])), s.splat(dot(&other[dims])));
    for (i, block, seen) in blocks {
        let word = term.same.word(query, block) >> seen.start;
        let scores = &mut row[i * BLOCK + seen.start..i * BLOCK + seen.end.next_multiple_of(LANES)];
        for (j, x) in scores.chunks_exact_mut(LANES).enumerate() {
            let v = s.load(x);
            (v + same.select(v.mask((word >> (j * LANES)) as u16), other)).store(x);
        }
    }
}

/// Finishes a row of scores: scale, soft cap, bias. The mask comes with the passes of softmax.
#[inline(always)]
fn finish<S: Simd>(
    s: S,
    scores: &mut [f32],
    blocks: impl Iterator<Item = (usize, usize, Range<usize>)>,
    call: &Call<'_>,
    query: Query,
) {
    let least = s.splat(f32::NEG_INFINITY);
    let (scale, cap) = (s.splat(call.heads.scale), s.splat(call.heads.softcap));
    let bias = call.terms.bias.map(|bias| bias.row(query));
    for (i, block, seen) in blocks {
        for j in seen.start / LANES..seen.end.div_ceil(LANES) {
            let x = &mut scores[i * BLOCK + j * LANES..][..LANES];
            let mut v = s.load(x) * scale;
            if call.heads.softcap > 0.0 {
                v = tanh(s, v / cap) * cap;
            }
            if let Some(bias) = bias {
                let first = block * BLOCK + j * LANES;
                v = v + s.load_partial(&bias[first..bias.len().min(first + LANES)], least);
            }
            v.store(x);
        }
    }
}

/// The largest score that a row is allowed: `-inf` if there is none. A NaN among others may be passed over.
#[inline(always)]
fn largest<S: Simd>(s: S, scores: &[f32], words: &Words) -> f32 {
    let least = s.splat(f32::NEG_INFINITY);
    let blocks = scores.as_chunks::<BLOCK>().0;
    let mut slots = [least; 4];
    for (block, &word) in blocks.iter().zip(words) {
        let block = block.as_chunks::<LANES>().0;
        if word == u64::MAX {
            for (slot, x) in slots.iter_mut().zip(block) {
                *slot = s.load(x).max(*slot);
            }
        } else if word != 0 {
            for (j, (slot, x)) in slots.iter_mut().zip(block).enumerate() {
                let v = s.load(x);
                *slot = v.select(v.mask((word >> (j * LANES)) as u16), least).max(*slot);
            }
        }
    }
    (slots[0].max(slots[1])).max(slots[2].max(slots[3])).max_lane()
}

/// Replaces the scores of a row by `exp(score * scale - max)`, by 0 where of what its band sees it does not see a key itself, and returns
/// their canonical sum. The rest of the row stays as it is and is not read.
#[inline(always)]
fn exponentials<S: Simd>(s: S, scores: &mut [f32], seen: &Seen, words: &Words, scale: f32, max: f32) -> f32 {
    let blocks = scores.as_chunks_mut::<BLOCK>().0;
    if max == f32::NEG_INFINITY {
        blocks.as_flattened_mut().fill(0.0);
        return 0.0;
    }
    let (zero, m, scale) = (s.splat(0.0), s.splat(max), s.splat(scale));
    let mut slots = [zero; 4];
    for ((block, &word), seen) in blocks.iter_mut().zip(words).zip(seen) {
        if word == u64::MAX {
            store_and_add::<S>(
                block,
                &mut slots,
                #[inline(always)]
                |block, j| exp_nonpositive(s, s.load(&block[j * LANES..]) * scale - m),
            );
        } else if !seen.is_empty() {
            let block = block.as_chunks_mut::<LANES>().0;
            // A block at an edge is seldom seen to its other end.
            for (j, (slot, x)) in slots.iter_mut().zip(block).enumerate() {
                if seen.start <= j * LANES && j * LANES < seen.end {
                    let p = exp_nonpositive(s, s.load(x) * scale - m);
                    let p = p.select(p.mask((word >> (j * LANES)) as u16), zero);
                    p.store(x);
                    *slot = *slot + p;
                }
            }
        }
    }
    fold(slots)
}

/// Whether a key that a row sees has no number as its score.
#[cold]
fn has_nan(scores: &[f32], words: &Words) -> bool {
    let sees = |key: usize| words[key / BLOCK] >> (key % BLOCK) & 1 == 1;
    scores.iter().enumerate().any(|(key, x)| x.is_nan() && sees(key))
}

/// Takes a chunk's maxima, sums and outputs into those of the rows.
#[inline(always)]
fn fold_chunk<S: Simd>(
    s: S,
    (max, sum): (&mut [f32], &mut [f32]),
    total: &mut MatMut<'_>,
    (chunk_max, chunk_sum): (&[f32], &[f32]),
    part: &MatMut<'_>,
) {
    let least = s.splat(f32::NEG_INFINITY);
    // The weights of sixteen rows at once: exponentials of one row's alone would use one lane of a vector each.
    for first in (0..max.len()).step_by(LANES) {
        let group = first..max.len().min(first + LANES);
        let (max, sum) = (&mut max[group.clone()], &mut sum[group.clone()]);
        let (new_max, new_sum) = (&chunk_max[group.clone()], &chunk_sum[group.clone()]);
        let (m, c) = (s.load_partial(max, least), s.load_partial(new_max, least));
        let both = m.max(c);
        let (old_weight, new_weight) = (exp_nonpositive(s, m - both), exp_nonpositive(s, c - both));
        let sums =
            s.load_partial(sum, least).mul_add(old_weight, s.load_partial(new_sum, least) * new_weight);
        let [mut maxima, mut folded, mut old_weights, mut new_weights] = [[0.0; LANES]; 4];
        both.store(&mut maxima);
        sums.store(&mut folded);
        old_weight.store(&mut old_weights);
        new_weight.store(&mut new_weights);
        for (i, row) in group.enumerate() {
            if new_max[i] == f32::NEG_INFINITY {
                continue;
            }
            let (total, part) = (total.row_mut(row), part.row(row));
            if max[i] == f32::NEG_INFINITY {
                (max[i], sum[i]) = (new_max[i], new_sum[i]);
                total.copy_from_slice(part);
                continue;
            }
            (max[i], sum[i]) = (maxima[i], folded[i]);
            let (old, new) = (s.splat(old_weights[i]), s.splat(new_weights[i]));
            for (total, part) in total.as_chunks_mut::<LANES>().0.iter_mut().zip(part.as_chunks::<LANES>().0)
            {
                s.load(total).mul_add(old, s.load(part) * new).store(total);
            }
        }
    }
}

/// The chunk's output of one row over its allowed keys only: the same chain without the masked zeros.
#[inline(always)]
fn only_allowed<S: Simd>(
    s: S,
    p: &[f32],
    tiles: &Tiles,
    row: usize,
    keys: &Keys<'_>,
    head: usize,
    out: &mut [f32],
) {
    out.fill(0.0);
    for (i, block, seen) in tiles.blocks(row) {
        let (values, stride) = (keys.values(block, head), keys.layout.value_stride());
        for key in seen {
            if tiles.words(row)[i] >> key & 1 == 0 {
                continue;
            }
            let p = s.splat(p[i * BLOCK + key]);
            let value = &values[key * stride..][..stride];
            for (out, value) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(value.as_chunks::<LANES>().0) {
                p.mul_add(s.load(value), s.load(out)).store(out);
            }
        }
    }
}
