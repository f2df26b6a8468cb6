//! SVG pictures: how they are begun and how they come into their place.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::output::write_whole;

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub const FONT: &str = "sans-serif";

/// Draws to a file of `size` pixels, which is there when it is whole.
pub fn draw(path: &Path, size: (u32, u32), picture: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<()> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        picture(&area)?;
        area.present().map_err(failed)?;
    }
    // XML has no place for them, not even escaped.
    svg.retain(|c| !c.is_control() || c == '\n');
    write_whole(path, svg.as_bytes())
}

/// Errors of plotters borrow from the picture.
pub fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}
