//! What leaves the program: the answer on stdout, everything else on stderr.

mod lines;

pub use lines::Lines;

use crate::bytes;
use crate::engine::FinishReason;
use crate::plan::{Prediction, RankBytes, Tiers};
use crate::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// One rank in the report.
#[derive(Debug, Clone, Serialize)]
pub struct RankReport {
    /// Which rank.
    pub rank: usize,
    /// Its host's name.
    pub host: String,
    /// What it runs on, e.g. `cpu (2 threads, avx512bf16)`.
    pub device: String,
    /// What it holds, in bytes.
    pub bytes: RankBytes,
    /// Where it holds it.
    pub tiers: Tiers,
}

/// How long things took, in seconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Timings {
    /// From process start until the weights were in place on rank 0.
    pub load_s: f64,
    /// From the request to its first token.
    pub ttft_s: f64,
    /// Mean time of a further token; 0 where there was none.
    pub tpot_s: f64,
    /// Half of the further tokens took no longer than this.
    pub tpot_p50_s: f64,
    /// 99 in 100 of them took no longer than this.
    pub tpot_p99_s: f64,
}

/// One answer, as `--json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// Which prompt of a batch, from 0; answers leave as they finish.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// The answer's text, special tokens left out.
    pub text: String,
    /// The answer's tokens, a stop token included.
    pub token_ids: Vec<u32>,
    /// The prompt's tokens.
    pub prompt_token_ids: Vec<u32>,
    /// Log-probability of each token of the answer under the model, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<f32>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timings: Timings,
    /// What the plan predicted.
    pub predicted: Prediction,
    /// Link and cores of rank 0 together, in GB/s, where they were measured for an offload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_gbs: Option<f64>,
    /// Who took part.
    pub ranks: Vec<RankReport>,
    /// Keys of the request that are handed through.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Writes to stdout at once.
///
/// # Errors
/// A closed pipe or a full disk: one line that says so.
pub fn write_stdout(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(unwritable)
}

fn unwritable(e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::BrokenPipe => {
            Error::failed("stdout: closed before the answer was complete")
        }
        _ => Error::failed(format!("stdout: {e}")),
    }
}

/// Writes one JSON value and a line break to stdout.
///
/// # Errors
/// Those of [`write_stdout`].
pub fn write_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::failed(format!("JSON: {e}")))?;
    write_stdout(&(text + "\n"))
}

/// Writes rows of logits as a safetensors file with one f32 tensor, `logits`, `[tokens, vocab_size]`.
///
/// # Errors
/// A file that cannot be written.
pub fn write_logits(path: &Path, rows: &[f32], vocab_size: usize) -> Result<()> {
    let shape = [rows.len() / vocab_size.max(1), vocab_size];
    let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [0, size_of_val(rows)]});
    let mut header = json!({ "logits": entry }).to_string();
    // The format wants its data on a multiple of eight bytes.
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let bytes = [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        bytemuck::cast_slice(rows),
    ];
    std::fs::write(path, bytes.concat())
        .map_err(|e| Error::file(path, format!("cannot be written: {e}")))
}

/// The summary that ends a run on stderr.
pub fn summary(timings: &Timings, n_tokens: usize, ranks: &[RankReport]) -> String {
    let mut text = format!(
        "load {:.2} s, first token {:.0} ms",
        timings.load_s,
        timings.ttft_s * 1e3
    );
    if timings.tpot_s > 0.0 {
        text += &format!(
            ", {n_tokens} tokens at {:.1} tokens/s",
            1.0 / timings.tpot_s
        );
    }
    for r in ranks {
        let parts = r.bytes.parts();
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, n)| *n > 0)
            .map(|(what, n)| format!("{what} {}", bytes::format(*n)))
            .collect();
        let t = &r.tiers;
        let places: Vec<String> = [("GPU", t.device), ("host", t.host), ("files", t.file)]
            .iter()
            .filter(|(_, n)| *n > 0)
            .map(|(place, n)| format!("{} {place}", bytes::format(*n)))
            .collect();
        text += &format!(
            "\nrank {} on {}, {}: {} ({})",
            r.rank,
            r.host,
            r.device,
            places.join(" + "),
            parts.join(", ")
        );
    }
    text
}
