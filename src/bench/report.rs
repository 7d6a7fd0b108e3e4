//! What was measured, as a table for a person and as bars.

use super::ceilings::{Ceilings, GpuCeilings};
use super::compare::{Comparison, Way};
use super::plot::{self, Curve, Panel, Shape};
use super::sweep::{Probed, Row, Sweep};
use crate::Result;
use crate::bytes;
use crate::plan::{DeviceKind, Prediction, Tiers};
use std::fmt::Write;

/// The whole sweep as text: ceilings first, then each figure beside its limit.
pub fn text(sweep: &Sweep) -> String {
    let mut out = format!("{} (tandem {})\n", sweep.model, sweep.version);
    out += &probed_text(&sweep.ceilings);
    out + "\n" + &rows_text(&sweep.rows)
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

/// A figure of a GPU and what a table calls it.
type Column = (&'static str, fn(&GpuCeilings) -> f64);

/// The ceilings of one number of ranks.
pub fn ceilings_text(ceilings: &Ceilings) -> String {
    // The columns of a GPU are left out where there is none.
    let on_gpu: &[Column] = match ceilings.device() {
        DeviceKind::Cuda => &[
            ("read GB/s", |g| g.read_gbs),
            ("products TFLOP/s", |g| g.gemm_tflops),
            ("link GB/s", |g| g.link_gbs),
            ("all links", |g| g.link_all_gbs),
            ("beside cores", |g| g.link_beside_cores_gbs),
            ("cores beside link", |g| g.cores_beside_link_gbs),
        ],
        DeviceKind::Cpu => &[],
    };
    let mut header = words(&["rank"]);
    header.extend(on_gpu.iter().map(|(name, _)| (*name).to_owned()));
    header.extend(words(&["cores GB/s", "cores GFLOP/s"]));
    let mut rows = vec![header];
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
    let mut header = words(&[
        "ranks",
        "prompt",
        "batch",
        "ready s",
        "first token ms",
        "limit",
        "reached",
        "a token ms",
        "p99",
        "limit",
        "reached",
        "tokens/s",
        "a rank holds",
    ]);
    if several {
        header.extend(words(&["speed-up", "efficiency"]));
    }
    let mut table = vec![header];
    for row in rows.iter() {
        let Some(m) = &row.measured else { continue };
        let ms = |s: f64| figure(1e3 * s);
        let limit = |of: fn(&super::limits::Limits) -> f64| row.limits.as_ref().map(of);
        let beside = |limit: Option<f64>, measured: f64| match limit {
            Some(limit) if measured > 0.0 => {
                [ms(limit), format!("{:.0}%", 100.0 * limit / measured)]
            }
            _ => ["-".to_owned(), "-".to_owned()],
        };
        let mut line = words(&[]);
        line.extend([
            row.size.ranks.to_string(),
            row.size.prompt_tokens.to_string(),
            row.size.batch.to_string(),
            figure(m.ready_s),
            ms(m.ttft_s),
        ]);
        line.extend(beside(limit(|l| l.prefill_s), m.ttft_s));
        line.extend([ms(m.tpot_p50_s), ms(m.tpot_p99_s)]);
        line.extend(beside(limit(|l| l.decode_s), m.tpot_p50_s));
        line.push(figure(m.tokens_per_s));
        line.push(largest_total(row).map_or("-".to_owned(), bytes::format));
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
    let mut out = if table.len() > 1 {
        align(&table)
    } else {
        String::new()
    };
    for row in rows {
        if let Some(error) = &row.error {
            let _ = writeln!(out, "{}: failed: {error}", label(row));
        }
    }
    out
}

/// A comparison as text: ceilings first, then each way beside its limit and the plan's prediction.
pub fn comparison_text(c: &Comparison) -> String {
    let mut out = format!("{} (tandem {})\n", c.model, c.version) + &probed_text(&c.ceilings);
    let mut table = vec![words(&[
        "",
        "budget",
        "ready s",
        "first token ms",
        "predicted",
        "a token ms",
        "p99",
        "predicted",
        "limit",
        "reached",
        "tokens/s",
        "J/token",
        "on GPU",
        "on host",
        "in files",
    ])];
    for way in &c.ways {
        let Some(m) = &way.measured else { continue };
        let ms = |s: f64| figure(1e3 * s);
        let maybe = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        // A prediction of the first token is that of a prompt of one length.
        let ttft = way
            .predicted
            .filter(|p| p.prompt_tokens == way.size.prompt_tokens);
        let tier = |of: fn(&Tiers) -> u64| maybe(way.tiers.as_ref().map(|t| bytes::format(of(t))));
        let reached = way.decode_limit_s.filter(|_| m.tpot_p50_s > 0.0);
        table.push(vec![
            way.name.clone(),
            maybe(way.gpu_memory.map(bytes::format)),
            figure(m.ready_s),
            ms(m.ttft_s),
            maybe(ttft.map(|p| ms(p.ttft_s))),
            ms(m.tpot_p50_s),
            ms(m.tpot_p99_s),
            maybe(way.predicted.map(|p| ms(p.tpot_s))),
            maybe(way.decode_limit_s.map(ms)),
            maybe(reached.map(|s| format!("{:.0}%", 100.0 * s / m.tpot_p50_s))),
            figure(m.tokens_per_s),
            maybe(way.joules_per_token.map(figure)),
            tier(|t| t.device),
            tier(|t| t.host),
            tier(|t| t.file),
        ]);
    }
    out.push('\n');
    if table.len() > 1 {
        out += &align(&table);
    }
    for way in &c.ways {
        if let Some(error) = &way.error {
            let _ = writeln!(out, "{}: failed: {error}", way.name);
        }
    }
    out
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

/// What the fullest rank holds, in bytes.
fn largest_total(row: &Row) -> Option<u64> {
    let ranks = row.measured.as_ref()?.ranks.as_array()?;
    let totals = ranks.iter().filter_map(|r| r["bytes"]["total"].as_u64());
    totals.max()
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
