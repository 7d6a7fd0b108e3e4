//! What was measured, as a table for a person and as bars.

use super::ceilings::{Ceilings, GpuCeilings};
use super::compare::{Comparison, Way};
use super::limits::Limits;
use super::plot::{self, Curve, Panel, Shape};
use super::sweep::{Probed, Row, Sweep};
use crate::Result;
use crate::bytes;
use crate::plan::{DeviceKind, Prediction, Tiers};
use std::fmt::Write;

/// The whole sweep as text, at most 100 columns wide: each figure beside its limit, then the ceilings that the limits are of.
pub fn text(sweep: &Sweep) -> String {
    let title = format!("{} (tandem {})\n\n", sweep.model, sweep.version);
    title + &rows_text(&sweep.rows) + &probed_text(&sweep.ceilings)
}

fn probed_text(all: &[Probed]) -> String {
    let mut out = String::new();
    for probed in all {
        let _ = writeln!(out, "\nceilings of {}", ranks(probed.ranks));
        match (&probed.ceilings, &probed.error) {
            (Some(ceilings), _) => out += &ceilings_text(ceilings),
            (None, error) => {
                let _ = writeln!(out, "not measured: {}", error.as_deref().unwrap_or(""));
            }
        }
    }
    out
}

/// A figure of a GPU and what a table calls it, in two lines.
type Column = ([&'static str; 2], fn(&GpuCeilings) -> f64);

/// The ceilings of one number of ranks.
pub fn ceilings_text(ceilings: &Ceilings) -> String {
    // The columns of a GPU are left out where there is none.
    let on_gpu: &[Column] = match ceilings.device() {
        DeviceKind::Cuda => &[
            (["read", "GB/s"], |g| g.read_gbs),
            (["products", "TFLOP/s"], |g| g.gemm_tflops),
            (["link", "GB/s"], |g| g.link_gbs),
            (["all links", "GB/s"], |g| g.link_all_gbs),
            (["link beside", "cores GB/s"], |g| g.link_beside_cores_gbs),
            (["cores beside", "link GB/s"], |g| g.cores_beside_link_gbs),
        ],
        DeviceKind::Cpu => &[],
    };
    let header = |line: usize| {
        let ours = [["", "rank"][line]];
        let last = [["cores", "cores"], ["GB/s", "GFLOP/s"]][line];
        let gpu = on_gpu.iter().map(|(name, _)| name[line]);
        let all = ours.into_iter().chain(gpu).chain(last);
        all.map(str::to_owned).collect()
    };
    let mut rows: Vec<Vec<String>> = vec![header(0), header(1)];
    for (r, rank) in ceilings.ranks.iter().enumerate() {
        let gpu = |(_, of): &Column| rank.gpu.as_ref().map_or("-".to_owned(), |g| figure(of(g)));
        let mut line = vec![r.to_string()];
        line.extend(on_gpu.iter().map(gpu));
        line.extend([figure(rank.host_read_gbs), figure(rank.host_gflops)]);
        rows.push(line);
    }
    let mut out = align(&rows);
    for (r, rank) in ceilings.ranks.iter().enumerate() {
        let _ = writeln!(out, "rank {r}: {} on {}", rank.device, rank.host);
    }
    if ceilings.all_reduce.is_empty() {
        return out;
    }
    let _ = writeln!(
        out,
        "sums over the ranks by {}, rows of {}",
        ceilings.collective, ceilings.hidden
    );
    let mut rows = vec![words(&[
        "message",
        "rows",
        "fused µs",
        "library µs",
        "at start: fused",
        "library + norm",
        "taken",
    ])];
    for sum in &ceilings.all_reduce {
        rows.push(vec![
            bytes::format(sum.bytes as u64),
            sum.rows.map_or("-".to_owned(), |n| n.to_string()),
            sum.fused_us.map_or("-".to_owned(), figure),
            figure(sum.library_us),
        ]);
        let chosen = sum.at_start.map(|s| {
            let taken = if s.is_fused { "fused" } else { "library" };
            [figure(s.fused_us), figure(s.library_us), taken.to_owned()]
        });
        let line = rows.len() - 1;
        rows[line].extend(chosen.unwrap_or(["-"; 3].map(str::to_owned)));
    }
    out + &align(&rows)
}

fn rows_text(rows: &[Row]) -> String {
    let several = rows.iter().any(|r| r.size.ranks != rows[0].size.ranks);
    let mut header = [
        words(&["", "", "", "ready", "first", "of", "a", "", "of", "tokens"]),
        words(&[
            "ranks", "prompt", "batch", "s", "token ms", "limit", "token ms", "p99", "limit",
            "a second",
        ]),
    ];
    if several {
        header[0].extend(words(&["speed-", "effi-"]));
        header[1].extend(words(&["up", "ciency"]));
    }
    let mut table = header.to_vec();
    for row in rows {
        let Some(m) = &row.measured else { continue };
        let ms = |s: f64| figure(1e3 * s);
        let limit = |of: fn(&Limits) -> f64| row.limits.as_ref().map(of);
        let mut line = vec![
            row.size.ranks.to_string(),
            row.size.prompt_tokens.to_string(),
            row.size.batch.to_string(),
            figure(m.ready_s),
            ms(m.ttft_s),
            reached(limit(|l| l.prefill_s), m.ttft_s),
            ms(m.tpot_p50_s),
            ms(m.tpot_p99_s),
            reached(limit(|l| l.decode_s), m.tpot_p50_s),
            figure(m.tokens_per_s),
        ];
        if several {
            line.extend(match speed_up(rows, row) {
                Some((speed_up, efficiency)) => {
                    [figure(speed_up), format!("{:.0}%", 100.0 * efficiency)]
                }
                None => ["-".to_owned(), "-".to_owned()],
            });
        }
        table.push(line);
    }
    let mut out = match rows.iter().any(|r| r.measured.is_some()) {
        true => align(&table),
        false => String::new(),
    };
    for row in rows {
        if let Some(error) = &row.error {
            let _ = writeln!(out, "{}: failed: {error}", label(row));
        }
    }
    out
}

/// The part of a limit that a figure reaches.
fn reached(limit: Option<f64>, measured: f64) -> String {
    match limit {
        Some(limit) if measured > 0.0 => format!("{:.0}%", 100.0 * limit / measured),
        _ => "-".to_owned(),
    }
}

/// A comparison as text, at most 100 columns wide: each way beside its limit and the plan's prediction, where its bytes lie,
/// then the ceilings.
pub fn comparison_text(c: &Comparison) -> String {
    let mut speeds = vec![
        words(&[
            "", "ready", "first", "pre-", "a", "", "pre-", "of", "tokens", "J a",
        ]),
        words(&[
            "", "s", "token ms", "dicted", "token ms", "p99", "dicted", "limit", "a second",
            "token",
        ]),
    ];
    let mut places = vec![words(&["", "budget", "on GPU", "on host", "in files"])];
    let maybe = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let ms = |s: f64| figure(1e3 * s);
    for way in &c.ways {
        let Some(m) = &way.measured else { continue };
        // A prediction of the first token is that of a prompt of one length.
        let ttft = way
            .predicted
            .filter(|p| p.prompt_tokens == way.size.prompt_tokens);
        speeds.push(vec![
            way.name.clone(),
            figure(m.ready_s),
            ms(m.ttft_s),
            maybe(ttft.map(|p| ms(p.ttft_s))),
            ms(m.tpot_p50_s),
            ms(m.tpot_p99_s),
            maybe(way.predicted.map(|p| ms(p.tpot_s))),
            reached(way.decode_limit_s, m.tpot_p50_s),
            figure(m.tokens_per_s),
            maybe(way.joules_per_token.map(figure)),
        ]);
        let tier = |of: fn(&Tiers) -> u64| maybe(way.tiers.as_ref().map(|t| bytes::format(of(t))));
        places.push(vec![
            way.name.clone(),
            maybe(way.gpu_memory.map(bytes::format)),
            tier(|t| t.device),
            tier(|t| t.host),
            tier(|t| t.file),
        ]);
    }
    let mut out = format!("{} (tandem {})\n\n", c.model, c.version);
    if places.len() > 1 {
        out += &(align(&speeds) + "\n" + &align(&places));
    }
    for way in &c.ways {
        if let Some(error) = &way.error {
            let _ = writeln!(out, "{}: failed: {error}", way.name);
        }
    }
    out + &probed_text(&c.ceilings)
}

/// A comparison as a plot: each way's figures, what the plan predicted, and the limit.
///
/// # Errors
/// Those of the drawing library.
pub fn comparison_plot(c: &Comparison) -> Result<String> {
    let bars = |title: &str, of: fn(&Way) -> [Option<f64>; 3]| Panel {
        title: title.to_owned(),
        shape: Shape::Bars {
            kinds: vec!["measured", "predicted", "limit"],
            groups: c
                .ways
                .iter()
                .map(|way| {
                    (
                        way.name.clone(),
                        of(way).map(|s| s.map(|s| 1e3 * s)).to_vec(),
                    )
                })
                .collect(),
        },
    };
    let panels = [
        bars("a token, ms (p50)", |way| {
            [
                way.measured.as_ref().map(|m| m.tpot_p50_s),
                way.predicted.map(|p| p.tpot_s),
                way.decode_limit_s,
            ]
        }),
        bars("first token, ms", |way| {
            let alike = |p: &Prediction| p.prompt_tokens == way.size.prompt_tokens;
            let predicted = way.predicted.filter(alike);
            [
                way.measured.as_ref().map(|m| m.ttft_s),
                predicted.map(|p| p.ttft_s),
                None,
            ]
        }),
    ];
    plot::draw(&plot_title(&c.model, &c.ceilings), &panels)
}

/// How many times as fast as the fewest ranks a decode step of the same size is, and that over the number of times as
/// many ranks.
pub fn speed_up(rows: &[Row], row: &Row) -> Option<(f64, f64)> {
    let alike = |r: &&Row| {
        let (a, b) = (r.size, row.size);
        (a.prompt_tokens, a.batch, a.max_tokens) == (b.prompt_tokens, b.batch, b.max_tokens)
    };
    let base = rows
        .iter()
        .filter(alike)
        .filter(|r| r.measured.is_some())
        .min_by_key(|r| r.size.ranks)?;
    let (before, now) = (base.measured.as_ref()?, row.measured.as_ref()?);
    if now.tpot_p50_s <= 0.0 {
        return None;
    }
    let speed_up = before.tpot_p50_s / now.tpot_p50_s;
    Some((
        speed_up,
        speed_up * base.size.ranks as f64 / row.size.ranks as f64,
    ))
}

/// The sweep as a plot: curves over the number of ranks where there are several, else bars.
///
/// # Errors
/// Those of the drawing library.
pub fn plot(sweep: &Sweep) -> Result<String> {
    let rows = &sweep.rows;
    let several = rows.iter().any(|r| r.size.ranks != rows[0].size.ranks);
    let panels = match several {
        true => curves(rows),
        false => bars(rows),
    };
    plot::draw(&plot_title(&sweep.model, &sweep.ceilings), &panels)
}

/// A figure of a row, if it has it.
type Figure = fn(&Row) -> Option<f64>;

const TOKEN_MS: Figure = |r| Some(1e3 * r.measured.as_ref()?.tpot_p50_s);
const TOKEN_LIMIT_MS: Figure = |r| Some(1e3 * r.limits.as_ref()?.decode_s);
const FIRST_MS: Figure = |r| Some(1e3 * r.measured.as_ref()?.ttft_s);
const FIRST_LIMIT_MS: Figure = |r| Some(1e3 * r.limits.as_ref()?.prefill_s);
const TOKENS: Figure = |r| Some(r.measured.as_ref()?.tokens_per_s);
const TOKENS_LIMIT: Figure = |r| Some(r.size.batch as f64 / r.limits.as_ref()?.decode_s);

fn bars(rows: &[Row]) -> Vec<Panel> {
    let panel = |title: &str, measured: Figure, limit: Figure| Panel {
        title: title.to_owned(),
        shape: Shape::Bars {
            kinds: vec!["measured", "limit"],
            groups: rows
                .iter()
                .map(|r| (size_label(r, rows), vec![measured(r), limit(r)]))
                .collect(),
        },
    };
    vec![
        panel("a token, ms (p50)", TOKEN_MS, TOKEN_LIMIT_MS),
        panel("tokens/s of all sequences", TOKENS, TOKENS_LIMIT),
        panel("first token, ms", FIRST_MS, FIRST_LIMIT_MS),
    ]
}

/// A curve for each length of prompt and size of batch, dashed its limit.
fn curves(rows: &[Row]) -> Vec<Panel> {
    let mut labels: Vec<String> = Vec::new();
    for row in rows {
        let label = size_label(row, rows);
        if !labels.contains(&label) {
            labels.push(label);
        }
    }
    let curve = |label: &String, is_bound, of: &dyn Fn(&Row) -> Option<f64>| {
        let alike = rows.iter().filter(|r| size_label(r, rows) == *label);
        let mut points: Vec<(f64, f64)> = alike
            .filter_map(|r| Some((r.size.ranks as f64, of(r)?)))
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Curve {
            label: label.clone(),
            points,
            is_bound,
        }
    };
    let beside = |title: &str, measured: Figure, limit: Figure| {
        let both = |l| [curve(l, false, &measured), curve(l, true, &limit)];
        Panel {
            title: title.to_owned(),
            shape: Shape::Curves(labels.iter().flat_map(both).collect()),
        }
    };
    let speed = |r: &Row| Some(speed_up(rows, r)?.0);
    let mut speeds: Vec<Curve> = labels.iter().map(|l| curve(l, false, &speed)).collect();
    let counts = || rows.iter().map(|r| r.size.ranks as f64);
    let (fewest, most) = (
        counts().fold(f64::MAX, f64::min),
        counts().fold(0.0, f64::max),
    );
    speeds.push(Curve {
        label: "ideal".to_owned(),
        points: vec![(fewest, 1.0), (most, most / fewest)],
        is_bound: true,
    });
    vec![
        beside("a token, ms (p50; dashed: limit)", TOKEN_MS, TOKEN_LIMIT_MS),
        beside("tokens/s of all sequences", TOKENS, TOKENS_LIMIT),
        Panel {
            title: "speed-up of a token (dashed: ideal)".to_owned(),
            shape: Shape::Curves(speeds),
        },
        beside("first token, ms", FIRST_MS, FIRST_LIMIT_MS),
    ]
}

/// What tells a size from the others of a sweep, besides the number of ranks.
fn size_label(row: &Row, rows: &[Row]) -> String {
    let batch = match row.size.batch {
        1 => "1 sequence".to_owned(),
        n => format!("{n} sequences"),
    };
    let prompts_differ = rows
        .iter()
        .any(|r| r.size.prompt_tokens != row.size.prompt_tokens);
    match prompts_differ {
        true => format!("prompt {}, {batch}", row.size.prompt_tokens),
        false => batch,
    }
}

fn plot_title(model: &str, ceilings: &[Probed]) -> String {
    let device = |p: &Probed| Some(p.ceilings.as_ref()?.ranks.first()?.device.clone());
    match ceilings.iter().find_map(device) {
        Some(device) => format!("{model}, {device}"),
        None => model.to_owned(),
    }
}

fn label(row: &Row) -> String {
    let s = &row.size;
    let batch = if s.batch == 1 {
        String::new()
    } else {
        format!(", batch {}", s.batch)
    };
    format!("{}, prompt {}{batch}", ranks(s.ranks), s.prompt_tokens)
}

fn ranks(n: usize) -> String {
    format!("{n} rank{}", if n == 1 { "" } else { "s" })
}

fn words(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|c| (*c).to_owned()).collect()
}

/// Columns to the right, two spaces apart.
fn align(rows: &[Vec<String>]) -> String {
    let n = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|r| r.get(column));
        cells.map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..n).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:>width$}"))
            .collect();
        let _ = writeln!(out, "{}", cells.join("  "));
    }
    out
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

#[cfg(test)]
mod tests {
    use super::super::limits::Size;
    use super::super::sweep::Measured;
    use super::*;

    fn row(ranks: usize) -> Row {
        let size = Size {
            ranks,
            prompt_tokens: 131_072,
            max_tokens: 128,
            batch: 256,
        };
        let measured = Measured {
            load_s: 179.0,
            ready_s: 181.0,
            ttft_s: 12.345,
            tpot_p50_s: 1.2345,
            tpot_p99_s: 12.345,
            tokens_per_s: 123_456.0,
            decode_s: 100.0,
            predicted_tpot_s: None,
            host_gbs: None,
            ranks: serde_json::Value::Null,
        };
        Row {
            size,
            measured: Some(measured),
            error: None,
            limits: None,
        }
    }

    #[test]
    fn tables_fit_a_terminal() {
        let sweep = Sweep {
            model: "qwen2.5-72b".to_owned(),
            version: "0.1.0",
            ceilings: Vec::new(),
            rows: vec![row(1), row(8)],
        };
        let text = text(&sweep);
        assert!(text.lines().all(|l| l.chars().count() <= 100), "{text}");
        // A figure stands below its own heading.
        let lines: Vec<&str> = text.lines().collect();
        let at = lines[3].find("a second").unwrap() + "a second".len();
        assert!(lines[4][..at].ends_with("123456"), "{text}");
        assert!(lines[5].ends_with("1.00     12%"), "{text}");
    }
}
