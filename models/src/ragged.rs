//! Padded batches as packed ones: the tokens that are real, one sequence behind the other.

use laneformer::{Context, Heads, Inputs, KeyStore, MatMut, Stack, Workspace};

use crate::Result;
use crate::error::check_size;

/// Which entries of a padded batch [B, T] are real. Padding may be left, right or in the middle.
#[derive(Clone, Debug)]
pub struct Ragged {
    /// Where each packed token stands in the padded batch, as `sequence * T + place`.
    places: Vec<usize>,
    /// The place in its sequence of each packed token: its position, where positions count the padding.
    positions: Vec<u32>,
    /// Where each sequence begins among the packed tokens, and the end.
    offsets: Vec<usize>,
    padded_tokens: usize,
}

impl Ragged {
    /// A batch of `mask.len() / seq_len` sequences; `true` is a real token.
    pub fn from_mask(mask: &[bool], seq_len: usize) -> Ragged {
        let mut ragged =
            Ragged { places: vec![], positions: vec![], offsets: vec![0], padded_tokens: mask.len() };
        for (b, sequence) in mask.chunks(seq_len.max(1)).enumerate() {
            for place in (0..sequence.len()).filter(|&place| sequence[place]) {
                ragged.places.push(b * seq_len + place);
                ragged.positions.push(place as u32);
            }
            ragged.offsets.push(ragged.places.len());
        }
        ragged
    }

    /// As [`from_mask`](Ragged::from_mask), but padding between real tokens stays, for models whose distances count it.
    pub fn from_spans(mask: &[bool], seq_len: usize) -> Ragged {
        let mut spans = mask.to_vec();
        for sequence in spans.chunks_mut(seq_len.max(1)) {
            let ends = sequence.iter().position(|&real| real).zip(sequence.iter().rposition(|&real| real));
            if let Some((first, last)) = ends {
                sequence[first..=last].fill(true);
            }
        }
        Ragged::from_mask(&spans, seq_len)
    }

    /// Where each sequence begins among the packed tokens, and the end.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The place of each packed token in its padded sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The rows of `padded` [B * T, d] that are real.
    pub fn gather<T: Copy>(&self, padded: &[T], d: usize) -> Result<Vec<T>> {
        check_size("padded", self.padded_tokens * d, padded.len())?;
        Ok(self.places.iter().flat_map(|&place| &padded[place * d..][..d]).copied().collect())
    }

    /// The packed rows at their places in [B * T, d], zeros elsewhere.
    pub fn scatter(&self, packed: &[f32], d: usize) -> Vec<f32> {
        let mut padded = vec![0.0; self.padded_tokens * d];
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

/// A workspace that grows with the batches it meets, for one model, and the buffers that one layer leaves to the next: memory that
/// the system has cleared already.
#[derive(Debug, Default)]
pub struct Scratch {
    workspace: Option<Workspace>,
    rows: Vec<Vec<f32>>,
    stores: Vec<KeyStore>,
    tokens: usize,
    segments: usize,
    members: usize,
}

impl Scratch {
    /// `len` elements of any value.
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        let fits = (0..self.rows.len()).filter(|&i| self.rows[i].capacity() >= len);
        let fits = fits.min_by_key(|&i| self.rows[i].capacity());
        // If none is large enough, a smaller one goes: the buffers do not become more.
        let kept = fits.or(self.rows.len().checked_sub(1)).map(|i| self.rows.swap_remove(i));
        let mut rows = kept.filter(|_| fits.is_some()).unwrap_or_default();
        rows.resize(len, 0.0);
        rows
    }

    /// What [`take`](Self::take) gave, or any other rows that nobody needs.
    pub fn give(&mut self, rows: Vec<f32>) {
        self.rows.push(rows);
    }

    /// A store for the keys and values of a batch of so many tokens.
    pub fn take_store(&mut self, heads: &Heads, tokens: usize, offsets: &[usize]) -> Result<KeyStore> {
        let fits = self.stores.iter().position(|store| store.fits(heads, offsets));
        let kept = fits.or(self.stores.len().checked_sub(1)).map(|i| self.stores.swap_remove(i));
        if let Some(store) = kept.filter(|_| fits.is_some()) {
            return Ok(store);
        }
        // What the offsets say is not checked yet: it must not decide how much is allocated.
        Ok(KeyStore::new(heads, tokens, offsets.len().saturating_sub(1))?)
    }

    /// What [`take_store`](Self::take_store) gave.
    pub fn give_store(&mut self, store: KeyStore) {
        self.stores.push(store);
    }

    /// Runs the layers over packed tokens, in place.
    pub fn run(
        &mut self,
        ctx: Context<'_>,
        stack: &Stack,
        x: &mut [f32],
        inputs: &mut Inputs<'_>,
    ) -> Result<()> {
        let (d, segments) = (stack.d_model(), inputs.offsets.len().saturating_sub(1));
        let (tokens, members) = (x.len() / d, ctx.members());
        if tokens > self.tokens || segments > self.segments || members > self.members {
            self.workspace = None;
        }
        self.tokens = self.tokens.max(tokens);
        self.segments = self.segments.max(segments);
        self.members = self.members.max(members);
        let workspace = match &mut self.workspace {
            Some(workspace) => workspace,
            empty => empty.insert(stack.workspace(self.tokens, self.segments, self.members)?),
        };
        Ok(stack.forward_with(ctx, MatMut::contiguous(x, tokens, d)?, inputs, workspace)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_do_not_become_more() -> Result<()> {
        let mut scratch = Scratch::default();
        for len in [10, 1000, 100, 5000, 20, 0] {
            let (a, b) = (scratch.take(len), scratch.take(len / 2));
            assert_eq!((a.len(), b.len()), (len, len / 2));
            scratch.give(a);
            scratch.give(b);
            assert!(scratch.rows.len() <= 2, "{len}");
        }
        assert!(scratch.take(5000).capacity() < 10_000 && scratch.rows.len() == 1);

        let heads = Heads::new(2, 3)?;
        for (heads, offsets) in
            [(heads, &[0, 5][..]), (heads, &[0, 3, 4]), (heads, &[0, 70]), (Heads::new(1, 4)?, &[0])]
        {
            let store = scratch.take_store(&heads, offsets[offsets.len() - 1], offsets)?;
            assert!(store.fits(&heads, offsets), "{offsets:?}");
            scratch.give_store(store);
            assert_eq!(scratch.stores.len(), 1);
        }
        assert!(scratch.take_store(&heads, 5, &[0, usize::MAX / 4096]).is_ok());
        Ok(())
    }
}
