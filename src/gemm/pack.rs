//! Weights, packed once: panels of 64 columns, `[N / 64][K][64]`, on cache lines. The layout belongs to no instruction
//! set: AVX-512 reads four vectors of a row, the others one cache line per step of K.

use core::ops::Range;

use crate::error::{Error, check_dim};
use crate::gemm::{K_BLOCK, PANEL};
use crate::view::MatRef;
use crate::workspace::AlignedBuffer;

/// A weight matrix of `k` inputs and `n` outputs in the layout that the kernels read. It is immutable: any number of threads
/// share it.
///
/// Matrices that are packed one after another stand together in memory, in slabs of 64 MiB, and a slab goes back to the system when all of its
/// matrices are dropped.
#[derive(Debug)]
pub struct PackedMatrix {
    data: AlignedBuffer,
    k: usize,
    n: usize,
}

impl PackedMatrix {
    /// Packs a weight of `[n, k]`, rows are outputs: `torch.nn.Linear`.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] if a dimension is zero, [`Error::Overflow`].
    pub fn from_out_in(weight: MatRef<'_>) -> Result<Self, Error> {
        let mut packed = Self::zeroed(weight.cols(), weight.rows())?;
        for out in 0..packed.n {
            let (panel, col) = (packed.panel_start(out / PANEL), out % PANEL);
            for (step, &x) in packed.data[panel..].chunks_exact_mut(PANEL).zip(weight.row(out)) {
                step[col] = x;
            }
        }
        Ok(packed)
    }

    /// Packs a weight of `[k, n]`, rows are inputs: GPT-2's `Conv1D`.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] if a dimension is zero, [`Error::Overflow`].
    pub fn from_in_out(weight: MatRef<'_>) -> Result<Self, Error> {
        let mut packed = Self::zeroed(weight.rows(), weight.cols())?;
        for k in 0..packed.k {
            for (panel, cols) in weight.row(k).chunks(PANEL).enumerate() {
                let start = packed.panel_start(panel) + k * PANEL;
                packed.data[start..start + cols.len()].copy_from_slice(cols);
            }
        }
        Ok(packed)
    }

    /// The same weights again.
    pub(crate) fn copy(&self) -> Self {
        let mut data = AlignedBuffer::in_slab(self.data.len());
        data.copy_from_slice(&self.data);
        PackedMatrix { data, ..*self }
    }

    /// The same shape, with `f(input, output, weight)` in place of each weight.
    pub(crate) fn map(mut self, mut f: impl FnMut(usize, usize, f32) -> f32) -> Self {
        let PackedMatrix { k, n, .. } = self;
        for (step, weights) in self.data.chunks_exact_mut(PANEL).enumerate() {
            let (panel, input) = (step / k, step % k);
            for (col, w) in weights.iter_mut().enumerate().take(n - panel * PANEL) {
                *w = f(input, panel * PANEL + col, *w);
            }
        }
        self
    }

    fn zeroed(k: usize, n: usize) -> Result<Self, Error> {
        check_dim("weight inputs", k)?;
        check_dim("weight outputs", n)?;
        let len = n.checked_next_multiple_of(PANEL).and_then(|n| n.checked_mul(k));
        match len {
            Some(len) if len <= isize::MAX as usize / 4 => {
                Ok(PackedMatrix { data: AlignedBuffer::in_slab(len), k, n })
            }
            _ => Err(Error::Overflow { arg: "weight inputs * outputs" }),
        }
    }

    /// Inputs: the length of a row that is multiplied.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Outputs: the length of a row of the result.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Bytes of the packed data.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// The canonical block of K from `start` of a panel, `[K_BLOCK][64]` or shorter; empty past the last panel.
    #[inline(always)]
    pub(crate) fn block(&self, panel: usize, start: usize) -> &[f32] {
        if panel >= self.panels() {
            return &[];
        }
        let first = self.panel_start(panel);
        &self.data[first + start * PANEL..first + self.k.min(start + K_BLOCK) * PANEL]
    }

    /// What is `distance` rows of a panel farther than its rows `steps`, in the order of the panels to `end`, and behind that of `then`.
    #[inline(always)]
    pub(crate) fn ahead<'a>(
        &'a self,
        panel: usize,
        steps: Range<usize>,
        distance: usize,
        end: usize,
        then: &'a [f32],
    ) -> [&'a [f32]; 2] {
        let [first, last] =
            [steps.start, steps.end].map(|k| self.panel_start(panel) + (k + distance) * PANEL);
        let end = self.panel_start(end);
        let behind = |place: usize| place.saturating_sub(end).min(then.len());
        [&self.data[first.min(end)..last.min(end)], &then[behind(first)..behind(last)]]
    }

    /// From the begin of a panel on.
    #[inline(always)]
    pub(crate) fn from(&self, panel: usize) -> &[f32] {
        self.data.get(self.panel_start(panel)..).unwrap_or(&[])
    }

    #[inline(always)]
    fn panel_start(&self, panel: usize) -> usize {
        panel * self.k * PANEL
    }
}
