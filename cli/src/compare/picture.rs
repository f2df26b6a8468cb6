//! The pictures: bars, a roofline, curves.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::compare::report::Roofs;
use crate::drawing::{self, Area, FONT, failed};

/// A kernel under the roof.
pub struct Point {
    pub name: String,
    /// FLOP per byte of the operands.
    pub intensity: f64,
    pub gflops: f64,
}

const SIZE: (u32, u32) = (960, 540);
/// Told apart in grey and by eyes that see few colours as well.
const COLORS: [RGBColor; 9] = [
    RGBColor(0, 90, 181),
    RGBColor(238, 119, 51),
    RGBColor(120, 120, 120),
    RGBColor(0, 153, 136),
    RGBColor(204, 51, 17),
    RGBColor(170, 130, 200),
    RGBColor(150, 110, 0),
    RGBColor(80, 180, 230),
    RGBColor(220, 90, 160),
];

fn draw(path: &Path, picture: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<()> {
    drawing::draw(path, SIZE, picture)
}

/// Groups of bars, one group per label, and the limit as a line.
pub fn bars(
    path: &Path,
    title: &str,
    labels: &[String],
    series: &[(String, Vec<Option<f64>>)],
    limit: f64,
) -> Result<()> {
    let most = series.iter().flat_map(|(_, values)| values.iter().flatten()).fold(limit, |a, b| a.max(*b));
    draw(path, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption(title, (FONT, 26))
            .margin(12)
            .x_label_area_size(56)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..labels.len() as f64, 0.0..most * 1.45)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .light_line_style(WHITE)
            .label_style((FONT, 16))
            .draw()
            .map_err(failed)?;
        let width = 0.8 / series.len().max(1) as f64;
        for (i, (name, values)) in series.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let bar = |(group, value): (usize, &Option<f64>)| {
                let left = group as f64 + 0.1 + i as f64 * width;
                value.map(|v| Rectangle::new([(left, 0.0), (left + width * 0.92, v)], color.filled()))
            };
            chart
                .draw_series(values.iter().enumerate().filter_map(bar))
                .map_err(failed)?
                .label(name)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
        }
        chart
            .draw_series(LineSeries::new([(0.0, limit), (labels.len() as f64, limit)], BLACK.stroke_width(1)))
            .map_err(failed)?
            .label("peak of multiply-adds")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 12, y)], BLACK));
        let style = (FONT, 15).into_font().into_text_style(area).pos(Pos::new(HPos::Center, VPos::Top));
        for (group, label) in labels.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(group as f64 + 0.5, 0.0));
            // A line of the label per part of the name.
            for (line, part) in label.split('/').enumerate() {
                area.draw(&Text::new(part.to_owned(), (x, y + 4 + 16 * line as i32), style.clone()))
                    .map_err(failed)?;
            }
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    })
}

/// Every kernel as a point under what the machine can do.
pub fn roofline(path: &Path, title: &str, points: &[Point], roofs: &Roofs) -> Result<()> {
    let intensities = points.iter().map(|p| p.intensity);
    let left = intensities.clone().fold(f64::INFINITY, f64::min).min(0.5) / 1.5;
    let right = intensities.fold(1.0, f64::max) * 2.0;
    let low = points.iter().map(|p| p.gflops).fold(roofs.gflops, f64::min) / 2.0;
    draw(path, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption(title, (FONT, 26))
            .margin(12)
            .x_label_area_size(50)
            .y_label_area_size(70)
            .build_cartesian_2d((left..right).log_scale(), (low..roofs.gflops * 2.5).log_scale())
            .map_err(failed)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .label_style((FONT, 16))
            .x_desc("FLOP per byte of operands")
            .y_desc("GFLOP/s")
            .x_label_formatter(&|x| format!("{x}"))
            .y_label_formatter(&|y| format!("{y}"))
            .draw()
            .map_err(failed)?;
        for (name, gbps, color) in [
            ("L2", roofs.l2_gbps, RGBColor(150, 150, 150)),
            ("memory", roofs.dram_gbps, RGBColor(60, 60, 60)),
        ] {
            let ridge = (roofs.gflops / gbps).clamp(left, right);
            let start = (low / gbps).max(left);
            let line = [(start, start * gbps), (ridge, ridge * gbps), (right, roofs.gflops)];
            chart
                .draw_series(LineSeries::new(line, color.stroke_width(2)))
                .map_err(failed)?
                .label(format!("operands read from {name}, {gbps:.0} GB/s"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 12, y)], color));
        }
        for (i, (kind, shown)) in kinds(points).into_iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            chart
                .draw_series(
                    shown.into_iter().map(|p| Circle::new((p.intensity, p.gflops), 4, color.filled())),
                )
                .map_err(failed)?
                .label(kind)
                .legend(move |(x, y)| Circle::new((x + 6, y), 4, color.filled()));
        }
        legend(&mut chart, SeriesLabelPosition::LowerRight)
    })
}

/// Points by the first part of their names.
fn kinds(points: &[Point]) -> Vec<(String, Vec<&Point>)> {
    let mut kinds: Vec<(String, Vec<&Point>)> = vec![];
    for point in points {
        let kind = point.name.split(['/', '_']).next().unwrap_or_default();
        match kinds.iter_mut().find(|(name, _)| name == kind) {
            Some((_, points)) => points.push(point),
            None => kinds.push((kind.to_owned(), vec![point])),
        }
    }
    kinds
}

/// Curves over a logarithmic axis.
pub fn curves(path: &Path, title: &str, axes: [&str; 2], series: &[(String, Vec<(f64, f64)>)]) -> Result<()> {
    let all = || series.iter().flat_map(|(_, points)| points.iter());
    let (left, right) = all().fold((f64::INFINITY, 1.0_f64), |(l, r), p| (l.min(p.0), r.max(p.0)));
    let top = all().fold(0.0_f64, |top, p| top.max(p.1));
    draw(path, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption(title, (FONT, 26))
            .margin(12)
            .x_label_area_size(50)
            .y_label_area_size(70)
            .build_cartesian_2d((left..right * 1.1).log_scale().base(2.0), 0.0..top * 1.1)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .label_style((FONT, 16))
            .x_desc(axes[0])
            .y_desc(axes[1])
            .x_label_formatter(&|x| format!("{x}"))
            .draw()
            .map_err(failed)?;
        for (i, (name, points)) in series.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            chart
                .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3))
                .map_err(failed)?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 12, y)], color));
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    })
}

fn legend<'a, C: CoordTranslate>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, C>,
    position: SeriesLabelPosition,
) -> Result<()> {
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .label_font((FONT, 17))
        .draw()
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_drawn() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("x.svg");
        let drawn = |what: &str| std::fs::read_to_string(&path).is_ok_and(|svg| svg.contains(what));
        let series = [("ours".to_owned(), vec![Some(1.0), None]), ("peer".to_owned(), vec![None, Some(0.5)])];
        bars(&path, "Bars", &["a/b".to_owned(), "c".to_owned()], &series, 2.0)?;
        assert!(drawn("ours") && drawn("Bars"));
        let point = |name: &str, intensity: f64| Point { name: name.to_owned(), intensity, gflops: 10.0 };
        let roofs = Roofs { threads: 1, gflops: 100.0, l2_gbps: 100.0, dram_gbps: 10.0 };
        roofline(&path, "Roof", &[point("gemm/x", 100.0), point("gelu_erf/x", 1.0)], &roofs)?;
        assert!(drawn("gemm") && drawn("gelu"));
        curves(&path, "Curves", ["x", "y"], &[("one".to_owned(), vec![(64.0, 1.0), (128.0, 2.0)])])?;
        assert!(drawn("Curves") && drawn("one"));
        Ok(())
    }
}
