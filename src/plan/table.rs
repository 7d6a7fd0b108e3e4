//! A plan as aligned text for a person.

use super::{DeviceKind, Plan, RankBytes, RankPlan, Rate, Tiers, count, fold, runs};
use std::fmt::{self, Write};
use std::ops::Range;

/// Up to this many ranks have a line each, with the ranges they hold; beyond, equal ranks share one.
const MAX_LINES: usize = 8;

/// Columns of the table of ranks that say which part of the model a rank holds, its number first.
const SHARD_COLUMNS: usize = 5;
/// Columns of a terminal that every line fits.
pub(super) const WIDTH: usize = 100;

pub(super) type Row = Vec<String>;

/// What ranks must have in common to share a line.
type Alike = ([usize; 4], RankBytes, Tiers);

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}\n{}\n",
            fold_line(&self.model_line()),
            fold_line(&self.request_line())
        )?;
        let mut rows = vec![self.header()];
        if self.ranks.len() <= MAX_LINES {
            rows.extend(
                self.ranks
                    .iter()
                    .map(|r| self.row(r, runs(&[r.shard.tp_rank]), range)),
            );
        } else {
            let groups = fold(&self.ranks, alike);
            rows.extend(groups.iter().map(|(_, members)| {
                self.row(&self.ranks[members[0]], runs(members), |r| {
                    r.len().to_string()
                })
            }));
        }
        // What a rank holds of the model, then what that takes: the whole would be wider than a terminal.
        let [shards, bytes] = [0..SHARD_COLUMNS, SHARD_COLUMNS..rows[0].len()].map(|columns| {
            let part = |row: &Row| [&row[..1], &row[columns.start.max(1)..columns.end]].concat();
            rows.iter().map(part).collect::<Vec<_>>()
        });
        writeln!(f, "{}\n{}", align(&shards), align(&bytes))?;
        for line in [self.fit_line(), self.speed_line()] {
            writeln!(f, "{}", fold_line(&line))?;
        }
        for line in self.rate_lines().lines() {
            writeln!(f, "{}", fold_line(line))?;
        }
        Ok(())
    }
}

impl Plan {
    fn model_line(&self) -> String {
        let m = &self.model;
        let name: String = self
            .request
            .name
            .chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect();
        format!(
            "{name}: {:.2} billion parameters in {}; {} of hidden {}, {} over {} of {}, intermediate {}, vocabulary {}{}",
            self.parameters as f64 / 1e9,
            self.request.dtype,
            count(m.n_layers, "layer"),
            m.hidden_size,
            count(m.n_heads, "head"),
            count(m.n_kv_heads, "KV head"),
            m.head_dim,
            m.intermediate_size,
            m.vocab_size,
            if m.tie_word_embeddings { " (tied)" } else { "" },
        )
    }

    fn request_line(&self) -> String {
        let r = &self.request;
        let nodes = r.tp_size.div_ceil(r.ranks_per_node);
        format!(
            "{} on {}; {} of {}: {} of {}; steps of up to {}; sizes in GiB",
            count(r.tp_size, &format!("{} rank", r.device)),
            count(nodes, "node"),
            count(r.max_seqs, "sequence"),
            count(r.context, "token"),
            count(self.n_kv_blocks, "KV block"),
            self.kv_block_tokens,
            count(self.max_step_tokens, "token"),
        )
    }

    fn header(&self) -> Row {
        let shard = ["rank", "heads", "KV heads", "intermediate", "vocabulary"];
        let bytes = ["weights", "KV", "buffers"];
        let places: &[&str] = match self.request.device {
            DeviceKind::Cpu => &["total", "budget"],
            DeviceKind::Cuda => &[
                "runtime", "total", "budget", "on GPU", "on host", "in files",
            ],
        };
        let all = shard.iter().chain(&bytes).chain(places).chain(&["fits"]);
        all.map(|s| s.to_string()).collect()
    }

    fn row(&self, rank: &RankPlan, ranks: String, extent: impl Fn(&Range<usize>) -> String) -> Row {
        let (s, b, t) = (&rank.shard, &rank.bytes, &rank.tiers);
        let mut row = vec![ranks];
        row.extend([&s.heads, &s.kv_heads, &s.intermediate, &s.vocab].map(extent));
        row.extend([b.weights, b.kv, b.activations].map(gib));
        match self.request.device {
            DeviceKind::Cpu => row.extend([gib(b.total), limit(rank.budget.host)]),
            DeviceKind::Cuda => {
                let runtime = b.ring + b.peer + b.runtime + b.staging;
                row.extend([runtime, b.total].map(gib));
                row.push(limit(rank.budget.device));
                row.extend([t.device, t.host, t.file].map(gib));
            }
        }
        row.push(if rank.fits { "yes" } else { "no" }.to_owned());
        row
    }

    fn fit_line(&self) -> String {
        let sum = |of: fn(&Tiers) -> u64| -> f64 {
            self.ranks.iter().map(|r| of(&r.tiers) as f64).sum::<f64>() / GIB
        };
        let (place, held) = match self.request.device {
            DeviceKind::Cpu => ("host memory", sum(|t| t.host)),
            DeviceKind::Cuda => ("GPU memory", sum(|t| t.device)),
        };
        if self.fits() {
            return format!("all weights in {place}: {held:.2} GiB over all ranks");
        }
        let mut line = format!(
            "not all weights in {place}: {:.2} GiB of them lie in host memory",
            sum(|t| t.weights_pinned)
        );
        if let Some(host) = self.request.host_memory {
            let _ = write!(line, " (budget {} a node)", crate::bytes::format(host));
        }
        if sum(|t| t.file) > 0.0 {
            let _ = write!(
                line,
                ", {:.2} GiB are read from files in every step",
                sum(|t| t.file)
            );
        }
        line
    }

    /// What a log says of the plan.
    pub fn in_a_line(&self) -> String {
        format!("{}; {}", self.fit_line(), self.speed_line())
    }

    fn speed_line(&self) -> String {
        let p = &self.predicted;
        format!(
            "predicted: first token of a {}-token prompt after {} (mostly {}), then {} a step, {} tokens/s (mostly {})",
            p.prompt_tokens,
            seconds(p.ttft_s),
            p.ttft_bound,
            seconds(p.tpot_s),
            significant(p.tokens_per_s),
            p.tpot_bound,
        )
    }

    fn rate_lines(&self) -> String {
        let rates = self.request.rates.of(self.request.device);
        let list = |measured: bool| {
            let rates = rates.iter().filter(|(_, r, _)| r.measured == measured);
            let text = |(name, Rate { value, .. }, unit): &(&str, Rate, &str)| {
                format!("{name} {} {unit}", significant(*value))
            };
            rates.map(text).collect::<Vec<_>>().join(", ")
        };
        let mut lines = String::new();
        let (assumed, measured) = (list(false), list(true));
        if !assumed.is_empty() {
            let _ = writeln!(
                lines,
                "assumed, not measured ({}): {assumed}",
                self.request.rates.assumed_for
            );
        }
        if !measured.is_empty() {
            let _ = writeln!(lines, "measured: {measured}");
        }
        lines
    }
}

/// A line that goes on below itself where it is too long.
fn fold_line(line: &str) -> String {
    textwrap::fill(line, textwrap::Options::new(WIDTH).subsequent_indent("  "))
}

fn alike(rank: &RankPlan) -> Alike {
    let s = &rank.shard;
    let sizes = [&s.heads, &s.kv_heads, &s.intermediate, &s.vocab].map(|r| r.len());
    (sizes, rank.bytes, rank.tiers)
}

fn range(r: &Range<usize>) -> String {
    if r.is_empty() {
        return "none".to_owned();
    }
    format!("{}..{}", r.start, r.end)
}

const GIB: f64 = (1u64 << 30) as f64;

pub(super) fn gib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / GIB)
}

fn limit(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "none".to_owned(), gib)
}

pub(super) fn seconds(s: f64) -> String {
    if s < 1.0 {
        format!("{} ms", significant(s * 1e3))
    } else {
        format!("{} s", significant(s))
    }
}

/// Three digits of a prediction are more than it is worth.
pub(super) fn significant(x: f64) -> String {
    match x {
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

/// Right-aligned columns two spaces apart; the first is left-aligned.
pub(super) fn align(rows: &[Row]) -> String {
    let n_columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..n_columns)
        .map(|c| {
            rows.iter()
                .map(|row| row[c].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let _ = match c {
                0 => write!(line, "{cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
