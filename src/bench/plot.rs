//! Figures beside their limits as an SVG: curves over the number of ranks, or bars side by side.

use super::report::figure;
use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// One quantity.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// What it is, with its unit.
    pub title: String,
    /// How it is drawn.
    pub shape: Shape,
}

/// How a quantity is drawn.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// Over the number of ranks.
    Curves(Vec<Curve>),
    /// A group a configuration.
    Bars {
        /// What the bars of every group are, e.g. `measured`.
        kinds: Vec<&'static str>,
        /// A configuration's name and its bars, in the order of `kinds`; `None` where there is no figure.
        groups: Vec<(String, Vec<Option<f64>>)>,
    },
}

/// A line through figures, or through what bounds them.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// What it is; the same for a curve and its bound, which then share a colour.
    pub label: String,
    /// Number of ranks and figure, by rising number.
    pub points: Vec<(f64, f64)>,
    /// Dashed: what could be at best.
    pub is_bound: bool,
}

const WIDTH: u32 = 960;
const PANEL: u32 = 340;
const TITLE: u32 = 40;
/// Colours that differ for colour-blind readers too (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// The panels as an SVG document: curves two to a row, bars over the whole width.
///
/// # Errors
/// Those of the drawing library.
pub fn draw(title: &str, panels: &[Panel]) -> Result<String> {
    let failed = |e: &dyn std::fmt::Display| Error::failed(format!("the plot: {e}"));
    let curves = |p: &Panel| matches!(p.shape, Shape::Curves(_));
    let columns = if panels.iter().all(curves) { 2 } else { 1 };
    let rows = panels.len().div_ceil(columns);
    let mut svg = String::new();
    {
        let size = (WIDTH, TITLE + PANEL * rows as u32);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = || -> std::result::Result<(), Box<dyn std::error::Error + '_>> {
            root.fill(&WHITE)?;
            let below = root.titled(title, ("sans-serif", 20))?;
            for (area, panel) in below.split_evenly((rows, columns)).iter().zip(panels) {
                match &panel.shape {
                    Shape::Curves(curves) => draw_curves(area, &panel.title, curves)?,
                    Shape::Bars { kinds, groups } => draw_bars(area, &panel.title, kinds, groups)?,
                }
            }
            Ok(root.present()?)
        };
        drawn().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

/// Where an axis ends: above what it shows, so that a legend has room.
fn end(values: impl Iterator<Item = f64>) -> f64 {
    let largest = values.filter(|v| v.is_finite()).fold(0.0, f64::max);
    if largest > 0.0 { largest * 1.3 } else { 1.0 }
}

fn draw_curves<'a>(
    area: &Area<'a>,
    title: &str,
    curves: &[Curve],
) -> std::result::Result<(), Box<dyn std::error::Error + 'a>> {
    let points = || curves.iter().flat_map(|c| &c.points);
    let most = points().map(|p| p.0).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(14)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.5..most + 0.5, 0.0..end(points().map(|p| p.1)))?;
    let whole = |x: &f64| match (x - x.round()).abs() < 1e-6 {
        true => format!("{x:.0}"),
        false => String::new(),
    };
    chart
        .configure_mesh()
        .x_desc("ranks")
        .x_labels(most as usize + 2)
        .x_label_formatter(&whole)
        .y_label_formatter(&|y| figure(*y))
        .light_line_style(WHITE)
        .draw()?;
    let mut labels: Vec<&str> = Vec::new();
    for curve in curves {
        let number = match labels.iter().position(|l| *l == curve.label) {
            Some(number) => number,
            None => {
                labels.push(&curve.label);
                labels.len() - 1
            }
        };
        let colour = COLOURS[number % COLOURS.len()];
        let points = curve.points.iter().copied();
        if curve.is_bound {
            let dashes = DashedLineSeries::new(points, 6, 4, colour.stroke_width(1));
            chart.draw_series(dashes)?;
            continue;
        }
        let line = LineSeries::new(points, colour.stroke_width(2)).point_size(3);
        chart
            .draw_series(line)?
            .label(&curve.label)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
    }
    if labels.len() > 1 {
        legend(&mut chart)?;
    }
    Ok(())
}

fn draw_bars<'a>(
    area: &Area<'a>,
    title: &str,
    kinds: &[&'static str],
    groups: &[(String, Vec<Option<f64>>)],
) -> std::result::Result<(), Box<dyn std::error::Error + 'a>> {
    let values = groups.iter().flat_map(|g| g.1.iter().flatten().copied());
    let n = groups.len().max(1);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(14)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d((0.0..n as f64).step(0.5), 0.0..end(values))?;
    // A label in the middle of each group.
    let name = |x: &f64| match (x - x.floor() - 0.5).abs() < 1e-6 {
        true => groups
            .get(*x as usize)
            .map_or_else(String::new, |g| g.0.clone()),
        false => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(2 * n + 1)
        .x_label_formatter(&name)
        .y_label_formatter(&|y| figure(*y))
        .light_line_style(WHITE)
        .draw()?;
    // Nine tenths of a group are bars.
    let width = 0.9 / kinds.len().max(1) as f64;
    for (k, kind) in kinds.iter().enumerate() {
        let colour = COLOURS[k % COLOURS.len()];
        let bars = || {
            let of = move |(g, group): (usize, &(String, Vec<Option<f64>>))| {
                let left = g as f64 + 0.05 + k as f64 * width;
                Some((left, group.1.get(k).copied().flatten()?))
            };
            groups.iter().enumerate().filter_map(of)
        };
        chart
            .draw_series(bars().map(|(left, value)| {
                Rectangle::new([(left, 0.0), (left + width, value)], colour.filled())
            }))?
            .label(*kind)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
        chart.draw_series(bars().map(|(left, value)| {
            EmptyElement::at((left, value)) + Text::new(figure(value), (2, -14), ("sans-serif", 12))
        }))?;
    }
    legend(&mut chart)
}

type Chart<'a, 'b, X> =
    ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, plotters::coord::types::RangedCoordf64>>;

fn legend<'a, 'b, X>(
    chart: &mut Chart<'a, 'b, X>,
) -> std::result::Result<(), Box<dyn std::error::Error + 'b>>
where
    X: Ranged<ValueType = f64>,
    'b: 'a,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(svg: &str) -> Vec<String> {
        let lines = svg.split("<text").skip(1);
        let text = |part: &str| {
            part.split(['>', '<'])
                .nth(1)
                .unwrap_or("")
                .trim()
                .to_owned()
        };
        lines.map(text).collect()
    }

    #[test]
    fn curves_share_a_colour_with_their_bounds_and_a_legend_names_them() {
        let curve = |label: &str, is_bound, y: [f64; 3]| Curve {
            label: label.to_owned(),
            points: vec![(1.0, y[0]), (2.0, y[1]), (4.0, y[2])],
            is_bound,
        };
        let curves = vec![
            curve("1 sequence", false, [3.6, 2.2, 1.5]),
            curve("1 sequence", true, [3.1, 1.5, 0.8]),
            curve("8 <&> more", false, [3.9, 2.4, 1.8]),
        ];
        let panel = Panel {
            title: "a token, ms".to_owned(),
            shape: Shape::Curves(curves),
        };
        let svg = draw("qwen2.5-7b", &[panel.clone(), panel]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        let texts = texts(&svg);
        for want in [
            "qwen2.5-7b",
            "a token, ms",
            "ranks",
            "1",
            "4",
            "1 sequence",
            "8 &lt;&amp;&gt; more",
        ] {
            assert!(texts.iter().any(|t| t == want), "{want}: {texts:?}");
        }
        // The line, its three points and the square of the legend, and the dashes of the bound; in both panels.
        assert!(svg.matches("#0072B2").count() > 2 * 5, "{svg}");
        assert_eq!(svg.matches("#E69F00").count(), 2 * 5, "{svg}");
    }

    #[test]
    fn bars_are_named_and_what_is_missing_is_left_out() {
        let group = |name: &str, bars: [Option<f64>; 2]| (name.to_owned(), bars.to_vec());
        let panel = Panel {
            title: "first token, ms".to_owned(),
            shape: Shape::Bars {
                kinds: vec!["measured", "limit"],
                groups: vec![
                    group("split over 2", [Some(15.2), Some(12.0)]),
                    group("offload on 1", [None, Some(100.0)]),
                    group("both", [None, None]),
                ],
            },
        };
        let texts = texts(&draw("a model", &[panel]).unwrap());
        for want in [
            "split over 2",
            "offload on 1",
            "both",
            "15.2",
            "12.0",
            "100",
            "measured",
            "limit",
        ] {
            assert!(texts.iter().any(|t| t == want), "{want}: {texts:?}");
        }
        assert!(draw("nothing", &[]).is_ok());
    }
}
