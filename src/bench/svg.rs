//! A plot of figures beside their limits: horizontal bars, one panel a quantity, nothing but text.

use std::fmt::Write;

/// One configuration's figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What was run.
    pub label: String,
    /// The figure; `None` for a run that failed.
    pub measured: Option<f64>,
    /// What it could be at best, in the same unit.
    pub limit: Option<f64>,
}

/// One quantity over all configurations.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// What it is, with its unit.
    pub title: String,
    /// From top to bottom.
    pub bars: Vec<Bar>,
}

const WIDTH: f64 = 860.0;
/// Where the axis begins and ends.
const LEFT: f64 = 250.0;
const RIGHT: f64 = 770.0;
const ROW: f64 = 34.0;
const HEAD: f64 = 64.0;
const PANEL_HEAD: f64 = 34.0;
const PANEL_FOOT: f64 = 30.0;

/// The plot as an SVG document.
pub fn draw(title: &str, panels: &[Panel]) -> String {
    let height = HEAD
        + panels
            .iter()
            .map(|p| PANEL_HEAD + p.bars.len() as f64 * ROW + PANEL_FOOT)
            .sum::<f64>();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut svg, 20.0, 28.0, "start", "font-size=\"17\"", title);
    rect(&mut svg, 20.0, 42.0, 14.0, 10.0, MEASURED);
    text(&mut svg, 40.0, 52.0, "start", "", "measured");
    rect(&mut svg, 120.0, 42.0, 14.0, 10.0, LIMIT);
    text(
        &mut svg,
        140.0,
        52.0,
        "start",
        "",
        "limit by the measured ceilings",
    );
    let mut top = HEAD;
    for panel in panels {
        draw_panel(&mut svg, panel, top);
        top += PANEL_HEAD + panel.bars.len() as f64 * ROW + PANEL_FOOT;
    }
    svg += "</svg>\n";
    svg
}

const MEASURED: &str = "#2a6fbb";
const LIMIT: &str = "#f0a33a";

fn draw_panel(svg: &mut String, panel: &Panel, top: f64) {
    text(
        svg,
        20.0,
        top + 20.0,
        "start",
        "font-weight=\"bold\"",
        &panel.title,
    );
    let values = panel.bars.iter().flat_map(|b| [b.measured, b.limit]);
    let largest = values
        .flatten()
        .filter(|v| v.is_finite())
        .fold(0.0, f64::max);
    let step = tick_step(largest);
    let end = (largest / step).ceil().max(1.0) * step;
    let x = |value: f64| LEFT + (value / end).clamp(0.0, 1.0) * (RIGHT - LEFT);
    let (first, last) = (
        top + PANEL_HEAD,
        top + PANEL_HEAD + panel.bars.len() as f64 * ROW,
    );
    for i in 0..=(end / step).round() as usize {
        let value = i as f64 * step;
        let at = x(value);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{first:.1}\" x2=\"{at:.1}\" y2=\"{last:.1}\" stroke=\"#ddd\"/>"
        );
        text(
            svg,
            at,
            last + 16.0,
            "middle",
            "fill=\"#555\"",
            &figure(value),
        );
    }
    for (i, bar) in panel.bars.iter().enumerate() {
        let y = first + i as f64 * ROW;
        text(svg, LEFT - 10.0, y + 20.0, "end", "", &bar.label);
        match bar.measured {
            Some(value) => {
                rect(svg, LEFT, y + 4.0, x(value) - LEFT, 15.0, MEASURED);
                let reached = bar.limit.filter(|_| value > 0.0).map(|limit| limit / value);
                let share = reached.map_or(String::new(), |r| format!(" ({:.0}%)", 100.0 * r));
                let label = figure(value) + &share;
                text(svg, x(value) + 6.0, y + 16.0, "start", "", &label);
            }
            None => text(
                svg,
                LEFT + 6.0,
                y + 16.0,
                "start",
                "fill=\"#a00\"",
                "failed",
            ),
        }
        if let Some(limit) = bar.limit {
            rect(svg, LEFT, y + 20.0, x(limit) - LEFT, 7.0, LIMIT);
        }
    }
}

/// A step of 1, 2 or 5 times a power of ten that makes four to ten ticks up to `largest`.
fn tick_step(largest: f64) -> f64 {
    if !(largest > 0.0 && largest.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf((largest / 5.0).log10().floor());
    let factor = largest / 5.0 / power;
    let nice = [1.0, 2.0, 5.0].into_iter().find(|n| factor <= *n);
    nice.unwrap_or(10.0) * power
}

/// Three significant digits.
pub fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn rect(svg: &mut String, x: f64, y: f64, width: f64, height: f64, fill: &str) {
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>",
        width.max(1.0)
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, style: &str, what: &str) {
    let mut escaped = String::new();
    for c in what.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            c if c.is_control() => escaped += "?",
            c => escaped.push(c),
        }
    }
    let space = if style.is_empty() { "" } else { " " };
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{space}{style}>{escaped}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_largest() {
        for (largest, step) in [
            (4.0, 1.0),
            (0.37, 0.1),
            (1900.0, 500.0),
            (7.2, 2.0),
            (10.0, 2.0),
        ] {
            assert!(
                (tick_step(largest) / step - 1.0).abs() < 1e-9,
                "{largest}: {}",
                tick_step(largest)
            );
        }
        assert_eq!(tick_step(0.0), 1.0);
        assert_eq!(tick_step(f64::NAN), 1.0);
    }

    #[test]
    fn a_plot_looks_as_it_did() {
        let bar = |label: &str, measured, limit| Bar {
            label: label.to_owned(),
            measured,
            limit,
        };
        let bars = vec![
            bar("1 rank, prompt 1024", Some(3.88), Some(3.25)),
            bar("2 ranks <&>", Some(2.1), None),
            bar("4 ranks", None, Some(0.9)),
        ];
        let panel = Panel {
            title: "a token, ms".to_owned(),
            bars,
        };
        insta::assert_snapshot!(draw("qwen2.5-7b", &[panel]));
    }
}
