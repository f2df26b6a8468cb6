//! What a model runs with: a context, and memory that is used again.

use laneformer::{Context, Epilogue, Heads, Inputs, KeyStore, Linear, MatMut, MatRef, Stack, Workspace};

use crate::Result;

/// A workspace that grows with the batches and the stacks it meets, and the buffers that one layer leaves to the next: memory that
/// the system has cleared already.
#[derive(Debug, Default)]
pub struct Scratch {
    workspace: Workspace,
    rows: Vec<Vec<f32>>,
    stores: Vec<KeyStore>,
}

impl Scratch {
    /// `len` elements of any value.
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        let mut rows = self.take_long(len);
        rows.truncate(len);
        rows
    }

    /// `len` elements or more of any value: what is not cut off need not be written again for whoever takes it next.
    pub(crate) fn take_long(&mut self, len: usize) -> Vec<f32> {
        let capacity = |i: &usize| self.rows[*i].capacity();
        // The smallest that is large enough; if there is none, the smallest goes: the buffers do not become more.
        let best = (0..self.rows.len()).min_by_key(|i| (capacity(i) < len, capacity(i)));
        let kept = best.map(|i| self.rows.swap_remove(i)).filter(|rows| rows.capacity() >= len);
        let mut rows = kept.unwrap_or_else(|| vec![0.0; len]);
        rows.resize(rows.len().max(len), 0.0);
        rows
    }

    /// What [`take`](Self::take) gave, or any other rows that nobody needs.
    pub fn give(&mut self, rows: Vec<f32>) {
        self.rows.extend((rows.capacity() > 0).then_some(rows));
    }

    /// A store for the keys and values of a batch of so many tokens.
    pub fn take_store(&mut self, heads: &Heads, tokens: usize, offsets: &[usize]) -> Result<KeyStore> {
        let fits = self.stores.iter().position(|store| store.fits(heads, offsets));
        // If there is none, another goes: the stores do not become more.
        let kept = fits.or(self.stores.len().checked_sub(1)).map(|i| self.stores.swap_remove(i));
        // What the offsets say is not checked yet: it must not decide how much is allocated.
        let new = || Ok(KeyStore::new(heads, tokens, offsets.len().saturating_sub(1))?);
        kept.filter(|_| fits.is_some()).map_or_else(new, Ok)
    }

    /// What [`take_store`](Self::take_store) gave.
    pub fn give_stores(&mut self, stores: impl IntoIterator<Item = KeyStore>) {
        self.stores.extend(stores);
    }

    /// A run in this context.
    pub fn with<'a>(&'a mut self, ctx: Context<'a>) -> Run<'a> {
        Run { ctx, scratch: self }
    }
}

/// A context with its scratch.
#[derive(Debug)]
#[allow(missing_docs, reason = "see above")]
pub struct Run<'a> {
    pub ctx: Context<'a>,
    pub scratch: &'a mut Scratch,
}

impl Run<'_> {
    /// Layers over packed tokens, in place.
    pub fn stack(&mut self, stack: &Stack, x: &mut [f32], inputs: &mut Inputs<'_>) -> Result<()> {
        let (d, segments) = (stack.d_model(), inputs.offsets.len().saturating_sub(1));
        let (tokens, members) = (x.len() / d, self.ctx.members());
        let workspace = &mut self.scratch.workspace;
        workspace.reserve(stack.layers(), tokens, segments, members)?;
        Ok(stack.forward_with(self.ctx, MatMut::contiguous(x, tokens, d)?, inputs, workspace)?)
    }

    /// A linear layer over the rows of `x`, in rows of the scratch.
    pub fn project(&mut self, linear: &Linear, x: &[f32], epilogue: &Epilogue<'_>) -> Result<Vec<f32>> {
        let (x, n) = (rows(x, linear.in_features())?, linear.out_features());
        let mut y = self.scratch.take(x.rows() * n);
        linear.forward(self.ctx, x, epilogue, MatMut::contiguous(&mut y, x.rows(), n)?)?;
        Ok(y)
    }
}

/// A linear layer over the rows of `x`.
pub fn project(ctx: Context<'_>, linear: &Linear, x: &[f32]) -> Result<Vec<f32>> {
    Scratch::default().with(ctx).project(linear, x, &Epilogue::NONE)
}

/// The rows of `x`, of `d` columns.
pub(crate) fn rows(x: &[f32], d: usize) -> Result<MatRef<'_>> {
    Ok(MatRef::contiguous(x, x.len() / d.max(1), d)?)
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
            scratch.give_stores([store]);
            assert_eq!(scratch.stores.len(), 1);
        }
        assert!(scratch.take_store(&heads, 5, &[0, usize::MAX / 4096]).is_ok());
        Ok(())
    }
}
