//! Packed batches: the tokens that are real, one sequence behind the other, and padded ones as such.

use laneformer::{Bits, Graph};

use crate::Result;
use crate::error::check_size;

/// Packed tokens of a batch; sequence `i` is tokens `offsets[i]..offsets[i + 1]`. Models without types do not look at them.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "one entry per token each")]
pub struct Batch<'a> {
    pub ids: &'a [u32],
    pub type_ids: &'a [u32],
    pub positions: &'a [u32],
    pub offsets: &'a [usize],
    /// Which tokens are seen; all if absent. Padding that keeps its place sees the others and is not seen.
    pub is_real: Option<&'a [bool]>,
}

impl Batch<'_> {
    /// What of `graph` leads to tokens that are real.
    pub(crate) fn real(&self, graph: Graph) -> Result<Graph> {
        let Some(is_real) = self.is_real else { return Ok(graph) };
        check_size("is_real", self.offsets.last().copied().unwrap_or(0), is_real.len())?;
        Ok(if is_real.contains(&false) { graph.with_bits(keys(self.offsets, is_real)?) } else { graph })
    }
}

/// Some entries of a batch as a batch of their own: as a rule those of a padded batch [B, T] that are real. Padding may be left, right or in
/// the middle.
#[derive(Clone, Debug)]
pub struct Ragged {
    /// Where each packed token stands in the batch.
    places: Vec<usize>,
    /// The place in its sequence of each packed token: its position, where positions count the padding.
    positions: Vec<u32>,
    /// Where each sequence begins among the packed tokens, and the end.
    offsets: Vec<usize>,
    all_tokens: usize,
}

impl Ragged {
    /// A batch of `mask.len() / seq_len` sequences; `true` is a real token.
    pub fn from_mask(mask: &[bool], seq_len: usize) -> Ragged {
        let seq_len = seq_len.max(1);
        let ends = (0..=mask.len().div_ceil(seq_len)).map(|b| (b * seq_len).min(mask.len()));
        Ragged::choose(&ends.collect::<Vec<_>>(), |_, place| mask[place])
    }

    /// The tokens of a packed batch that `is_chosen`, given the sequence and the token.
    pub(crate) fn choose(offsets: &[usize], is_chosen: impl Fn(usize, usize) -> bool) -> Ragged {
        let all_tokens = offsets.last().copied().unwrap_or(0);
        let mut ragged = Ragged { places: vec![], positions: vec![], offsets: vec![0], all_tokens };
        for (b, ends) in offsets.windows(2).enumerate() {
            for place in (ends[0]..ends[1]).filter(|&place| is_chosen(b, place)) {
                ragged.places.push(place);
                ragged.positions.push((place - ends[0]) as u32);
            }
            ragged.offsets.push(ragged.places.len());
        }
        ragged
    }

    /// Where each sequence begins among the packed tokens, and the end.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The place of each packed token in its padded sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Whether there is no packed token.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The chosen rows of `padded` [B * T, d].
    pub fn gather<T: Copy>(&self, padded: &[T], d: usize) -> Result<Vec<T>> {
        check_size("padded", self.all_tokens * d, padded.len())?;
        Ok(self.places.iter().flat_map(|&place| &padded[place * d..][..d]).copied().collect())
    }

    /// The packed rows at their places in [B * T, d], zeros elsewhere.
    pub fn scatter(&self, packed: &[f32], d: usize) -> Vec<f32> {
        let mut padded = vec![0.0; self.all_tokens * d];
        self.scatter_into(packed, d, &mut padded);
        padded
    }

    /// Writes the packed rows to their places in `padded` [B * T, d] and leaves the others alone.
    ///
    /// # Panics
    /// If `padded` is shorter.
    pub fn scatter_into(&self, packed: &[f32], d: usize, padded: &mut [f32]) {
        for (row, &place) in packed.chunks_exact(d.max(1)).zip(&self.places) {
            padded[place * d..][..d].copy_from_slice(row);
        }
    }
}

/// The chosen tokens of each sequence as keys.
pub(crate) fn keys(offsets: &[usize], chosen: &[bool]) -> Result<Bits> {
    let sequences: Option<Vec<_>> = offsets.windows(2).map(|ends| chosen.get(ends[0]..ends[1])).collect();
    let sequences = sequences.ok_or(laneformer::Error::NotAscending { arg: "offsets", at: 0 })?;
    Ok(Bits::keys(&sequences)?)
}

/// Where each of `n` sequences of the same length begins, and the end.
pub fn offsets(n: usize, len: usize) -> Vec<usize> {
    (0..=n).map(|sequence| sequence.saturating_mul(len)).collect()
}

/// The length of each of `n` sequences of the same length, with `total` tokens.
pub(crate) fn len_of_each(arg: &'static str, total: usize, n: usize) -> Result<usize> {
    if total == 0 || n == 0 {
        return Err(laneformer::Error::ZeroDim { arg }.into());
    }
    if !total.is_multiple_of(n) {
        return Err(laneformer::Error::NotDivisible { arg, actual: total, by: n }.into());
    }
    Ok(total / n)
}
