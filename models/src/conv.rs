//! Images, and the convolutions of the models: patches as the rows of a matrix (im2col), made a tile at a time, times a packed linear layer.

use std::ops::Range;

use laneformer::{Activation, Epilogue, Linear, MatMut, MatRef};

use crate::error::check_size;
use crate::weights::linear;
use crate::{Result, Run, Weights};

/// Images or feature maps of one size, channels last: a pixel is a row of a linear layer, and a token of a Transformer.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the field's own terms")]
pub struct Images {
    /// May be longer than they are: see [`pixels`](Images::pixels).
    pub(crate) pixels: Vec<f32>,
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

impl Images {
    /// Images from planes `[batch, channels, height, width]`.
    pub fn from_planes(planes: &[f32], [batch, channels, height, width]: [usize; 4]) -> Result<Images> {
        let sizes = [batch, channels, height, width];
        let len = sizes.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
        check_size("pixels", len.ok_or(laneformer::Error::Overflow { arg: "pixels" })?, planes.len())?;
        let pixels = transposed(planes, channels, height * width);
        Ok(Images { pixels, batch, height, width, channels })
    }

    /// The planes `[batch, channels, height, width]`.
    pub fn to_planes(&self) -> Vec<f32> {
        transposed(self.pixels(), self.height * self.width, self.channels)
    }

    /// `[batch, height, width, channels]`.
    pub(crate) fn pixels(&self) -> &[f32] {
        &self.pixels[..self.batch * self.height * self.width * self.channels]
    }

    /// The channels of a pixel.
    fn pixel(&self, image: usize, y: usize, x: usize) -> &[f32] {
        &self.pixels[((image * self.height + y) * self.width + x) * self.channels..][..self.channels]
    }

    /// The largest of each channel over windows; what lies outside of the image does not count.
    pub(crate) fn max_pool(&self, run: &mut Run<'_>, window: Window) -> Images {
        let [height, width] = [window.places(self.height), window.places(self.width)];
        let len = self.batch * height * width * self.channels;
        let mut pixels = run.scratch.take_long(len);
        for (i, largest) in pixels[..len].chunks_exact_mut(self.channels.max(1)).enumerate() {
            largest.fill(f32::NEG_INFINITY);
            let (row, x) = (i / width, i % width);
            for y in window.inside(row % height, self.height) {
                for x in window.inside(x, self.width) {
                    for (largest, &value) in largest.iter_mut().zip(self.pixel(row / height, y, x)) {
                        // Unlike `max`, this keeps a NaN.
                        *largest = if value <= *largest { *largest } else { value };
                    }
                }
            }
        }
        Images { pixels, batch: self.batch, height, width, channels: self.channels }
    }
}

/// Every matrix [rows, columns] of `x`, transposed.
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for matrix in x.chunks_exact((rows * cols).max(1)) {
        for c in 0..cols {
            out.extend((0..rows).map(|r| matrix[r * cols + c]));
        }
    }
    out
}

/// A square that slides over an image with zeros around it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
}

impl Window {
    /// Windows along `len` pixels.
    fn places(self, len: usize) -> usize {
        let steps = (len + 2 * self.padding).checked_sub(self.kernel);
        steps.map_or(0, |steps| steps / self.stride.max(1) + 1)
    }

    /// The pixels of `0..len` under the window at `place`.
    fn inside(self, place: usize, len: usize) -> Range<usize> {
        let start = place * self.stride;
        let end = (start + self.kernel).saturating_sub(self.padding).min(len);
        start.saturating_sub(self.padding).min(end)..end
    }
}

/// A convolution, with its batch norm if it has one.
#[derive(Debug)]
pub(crate) struct Conv {
    pub linear: Linear,
    channels: usize,
    window: Window,
}

impl Conv {
    /// The convolution here: `weight` [out, in, kernel, kernel], without a bias.
    pub fn load(w: &Weights<'_>, [channels, out]: [usize; 2], window: Window) -> Result<Conv> {
        let weight = w.tensor("weight", &[out, channels, window.kernel, window.kernel])?;
        let area = window.kernel * window.kernel;
        // Patches have their channels last, and so have the packed weights.
        let weight = transposed(&weight, channels, area);
        Ok(Conv { linear: linear(&weight, area * channels, out, None)?, channels, window })
    }

    /// `activation(convolution + bias) + residual`, in rows of the scratch.
    pub fn forward(
        &self,
        run: &mut Run<'_>,
        x: &Images,
        activation: Activation,
        residual: Option<&Images>,
    ) -> Result<Images> {
        check_size("channels", self.channels, x.channels)?;
        let n = self.linear.out_features();
        let size = [x.height, x.width].map(|len| self.window.places(len));
        let rows = x.batch * size[0] * size[1];
        let mut pixels = run.scratch.take_long(rows * n);
        let mut epilogue = Epilogue::activation(activation);
        if let Some(residual) = residual {
            epilogue = epilogue.with_residual(1.0, MatRef::contiguous(&residual.pixels, rows, n)?);
        }
        let out = MatMut::contiguous(&mut pixels, rows, n)?;
        if matches!(self.window, Window { kernel: 1, stride: 1, padding: 0 }) {
            self.linear.forward(run.ctx, MatRef::contiguous(&x.pixels, rows, x.channels)?, &epilogue, out)?;
        } else {
            let fill = |pixels: Range<usize>, mut patches: MatMut<'_>| {
                for (i, pixel) in pixels.enumerate() {
                    self.patch(x, size, pixel, patches.row_mut(i));
                }
            };
            self.linear.forward_filled(run.ctx, fill, &epilogue, out)?;
        }
        Ok(Images { pixels, batch: x.batch, height: size[0], width: size[1], channels: n })
    }

    /// What the window sees at an output pixel: its rows one behind the other.
    fn patch(&self, x: &Images, [height, width]: [usize; 2], pixel: usize, patch: &mut [f32]) {
        let Window { kernel, stride, padding } = self.window;
        let (row, column) = (pixel / width, pixel % width);
        let (image, top) = (row / height, row % height * stride);
        let inside = self.window.inside(column, x.width);
        let before = (inside.start + padding).saturating_sub(column * stride) * x.channels;
        let len = inside.len() * x.channels;
        if inside.len() < kernel {
            patch.fill(0.0);
        }
        for (y, line) in (top..).zip(patch.chunks_exact_mut((kernel * x.channels).max(1))) {
            if (padding..x.height + padding).contains(&y) {
                let start = ((image * x.height + y - padding) * x.width + inside.start) * x.channels;
                line[before..before + len].copy_from_slice(&x.pixels[start..start + len]);
            } else {
                line.fill(0.0);
            }
        }
    }
}
