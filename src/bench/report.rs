//! What was measured, as a table for a person and as bars.

use super::ceilings::Ceilings;
use super::svg::{self, Bar, Panel, figure};
use super::sweep::{Probed, Row, Sweep};
use crate::plan::bytes;
use std::fmt::Write;

/// The whole sweep as text: ceilings first, then each figure beside its limit.
pub fn text(sweep: &Sweep) -> String {
    let mut out = format!("{} (tandem {})\n", sweep.model, sweep.version);
    for probed in &sweep.ceilings {
        let _ = writeln!(out, "\nceilings of {}", ranks(probed.ranks));
        match (&probed.ceilings, &probed.error) {
            (Some(ceilings), _) => out += &ceilings_text(ceilings),
            (None, error) => {
                let _ = writeln!(out, "not measured: {}", error.as_deref().unwrap_or(""));
            }
        }
    }
    out + "\n" + &rows_text(&sweep.rows)
}

/// The ceilings of one number of ranks.
pub fn ceilings_text(ceilings: &Ceilings) -> String {
    let mut rows = vec![words(&[
        "rank",
        "read GB/s",
        "products TFLOP/s",
        "link GB/s",
        "all links",
        "beside cores",
        "cores beside link",
        "cores GB/s",
        "cores GFLOP/s",
    ])];
    for (r, rank) in ceilings.ranks.iter().enumerate() {
        let gpu = |of: fn(&super::ceilings::GpuCeilings) -> f64| {
            rank.gpu.as_ref().map_or("-".to_owned(), |g| figure(of(g)))
        };
        rows.push(vec![
            r.to_string(),
            gpu(|g| g.read_gbs),
            gpu(|g| g.gemm_tflops),
            gpu(|g| g.link_gbs),
            gpu(|g| g.link_all_gbs),
            gpu(|g| g.link_beside_cores_gbs),
            gpu(|g| g.cores_beside_link_gbs),
            figure(rank.host_read_gbs),
            figure(rank.host_gflops),
        ]);
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
    let mut rows = vec![words(&["message", "rows", "fused µs", "library µs"])];
    for sum in &ceilings.all_reduce {
        rows.push(vec![
            bytes::format(sum.bytes as u64),
            sum.rows.map_or("-".to_owned(), |n| n.to_string()),
            sum.fused_us.map_or("-".to_owned(), figure),
            figure(sum.library_us),
        ]);
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

/// The sweep as a plot.
pub fn plot(sweep: &Sweep) -> String {
    let panel = |title: &str, measured: fn(&Row) -> Option<f64>, limit: fn(&Row) -> Option<f64>| {
        let bar = |row: &Row| Bar {
            label: label(row),
            measured: measured(row).map(|s| 1e3 * s),
            limit: limit(row).map(|s| 1e3 * s),
        };
        Panel {
            title: title.to_owned(),
            bars: sweep.rows.iter().map(bar).collect(),
        }
    };
    let panels = [
        panel(
            "a further token, ms (p50)",
            |r| r.measured.as_ref().map(|m| m.tpot_p50_s),
            |r| r.limits.as_ref().map(|l| l.decode_s),
        ),
        panel(
            "first token, ms",
            |r| r.measured.as_ref().map(|m| m.ttft_s),
            |r| r.limits.as_ref().map(|l| l.prefill_s),
        ),
    ];
    let device = |p: &Probed| Some(p.ceilings.as_ref()?.ranks.first()?.device.clone());
    let device = sweep.ceilings.iter().find_map(device);
    let title = match device {
        Some(device) => format!("{}, {device}", sweep.model),
        None => sweep.model.clone(),
    };
    svg::draw(&title, &panels)
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
