//! The predicted speed: a roofline per step.
//!
//! A step of n tokens takes, on the slowest rank,
//!
//! ```text
//! step(n) = max(read, flops / gemm) + all_reduce
//!
//! read       = device / device_read + host / host_path + file / file_read
//! flops      = 2 n · matrix elements + 2 S · head elements + 4 n c · n_heads_local · head_dim · n_layers
//! all_reduce = 2 n_layers · (latency + 4 or 2 bytes · n · hidden / bandwidth), 0 on one rank
//! ```
//!
//! `device`, `host` and `file` are the bytes that the step reads from each memory: all weights but an embedding that is
//! only looked up (it is the first to leave the GPU), and the KV cache of the sequences; `c` is the tokens each token
//! attends to, S the rows of logits. `host_path` is the link while prefill streams; a decode step uses the link and the
//! rank's share of the cores at once. On CPU ranks everything is `host`, and cores and host memory are divided by the
//! ranks of a node.
//!
//! - tpot: `step(max_seqs)` with every sequence at its full context.
//! - ttft: the steps of one prompt of [`PROMPT_TOKENS`] tokens, or of the context if that is less, in chunks of
//!   `max_step_tokens`.
//!
//! The memories are taken one after the other, which overstates the time when they work at once; launches, sampling and
//! the gather of the logits are left out, which understates it.

use super::memory::WeightCount;
use super::placement::Placed;
use super::{DeviceKind, Request, Shard};
use crate::config::ModelConfig;
use serde::Serialize;

/// Tokens of the answer in [`Prediction::request_s`].
pub const ANSWER_TOKENS: usize = 64;

/// Length of the prompt whose time to first token is predicted.
pub const PROMPT_TOKENS: usize = 1024;

/// The largest term of a step's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// Reading GPU memory.
    DeviceMemory,
    /// Reading host memory, by the cores or over the link.
    HostMemory,
    /// Reading the model's files.
    File,
    /// Arithmetic.
    Compute,
    /// Waiting for the other ranks.
    AllReduce,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Bound::DeviceMemory => "GPU memory",
            Bound::HostMemory => "host memory",
            Bound::File => "file reads",
            Bound::Compute => "arithmetic",
            Bound::AllReduce => "all-reduce",
        })
    }
}

/// What the model says of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// The prompt of `ttft_s`, in tokens.
    pub prompt_tokens: usize,
    /// Time to the first token of such a prompt, in seconds.
    pub ttft_s: f64,
    /// Time of a decode step with all sequences at full context, in seconds.
    pub tpot_s: f64,
    /// Tokens of all sequences per second at that pace.
    pub tokens_per_s: f64,
    /// Time of a request whose prompt fills the context but for [`ANSWER_TOKENS`], and of that answer: what the tokens of
    /// a step are chosen by.
    pub request_s: f64,
    /// What `ttft_s` mostly is.
    pub ttft_bound: Bound,
    /// What `tpot_s` mostly is.
    pub tpot_bound: Bound,
}

/// All that is known of one rank before its speed.
pub(super) struct RankLoad {
    pub shard: Shard,
    pub weights: WeightCount,
    pub placed: Placed,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Prefill,
    Decode,
}

struct Step {
    phase: Phase,
    tokens: usize,
    /// Tokens that each token attends to, on average.
    context: f64,
    logit_rows: usize,
    /// Part of the KV cache that is read.
    kv_read: f64,
}

/// Seconds of one step by what they are spent on.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    device: f64,
    host: f64,
    file: f64,
    compute: f64,
    all_reduce: f64,
}

impl Times {
    fn total(&self) -> f64 {
        (self.device + self.host + self.file).max(self.compute) + self.all_reduce
    }

    fn plus(self, other: Times) -> Times {
        Times {
            device: self.device + other.device,
            host: self.host + other.host,
            file: self.file + other.file,
            compute: self.compute + other.compute,
            all_reduce: self.all_reduce + other.all_reduce,
        }
    }

    fn bound(&self) -> Bound {
        [
            (self.device, Bound::DeviceMemory),
            (self.host, Bound::HostMemory),
            (self.file, Bound::File),
            (self.compute, Bound::Compute),
            (self.all_reduce, Bound::AllReduce),
        ]
        .into_iter()
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(Bound::Compute, |(_, bound)| bound)
    }
}

pub(super) fn predict(
    config: &ModelConfig,
    request: &Request,
    max_step_tokens: usize,
    ranks: &[RankLoad],
) -> Prediction {
    // The ranks meet in every layer, so the slowest sets the pace of each step.
    let slowest = |step: &Step| {
        ranks
            .iter()
            .map(|rank| times(config, request, rank, step))
            .max_by(|a, b| a.total().total_cmp(&b.total()))
            .unwrap_or_default()
    };
    let decode = slowest(&Step {
        phase: Phase::Decode,
        tokens: request.max_seqs,
        context: request.context as f64,
        logit_rows: request.max_seqs,
        kv_read: 1.0,
    });
    let prefill = |prompt_tokens: usize| {
        let one_sequence = (request.max_seqs * request.context) as f64;
        let (mut seconds, mut sum) = (0.0, Times::default());
        for start in (0..prompt_tokens).step_by(max_step_tokens) {
            let tokens = max_step_tokens.min(prompt_tokens - start);
            let chunk = slowest(&Step {
                phase: Phase::Prefill,
                tokens,
                context: start as f64 + (tokens as f64 + 1.0) / 2.0,
                logit_rows: usize::from(start + tokens == prompt_tokens),
                kv_read: (start + tokens) as f64 / one_sequence,
            });
            seconds += chunk.total();
            sum = sum.plus(chunk);
        }
        (seconds, sum)
    };
    let prompt_tokens = request.context.min(PROMPT_TOKENS);
    let (ttft_s, first) = prefill(prompt_tokens);
    let answer = ANSWER_TOKENS.min(request.context - 1);
    let request_s = prefill(request.context - answer).0 + answer as f64 * decode.total();
    Prediction {
        prompt_tokens,
        ttft_s,
        tpot_s: decode.total(),
        tokens_per_s: request.max_seqs as f64 / decode.total(),
        request_s,
        ttft_bound: first.bound(),
        tpot_bound: decode.bound(),
    }
}

fn times(config: &ModelConfig, request: &Request, rank: &RankLoad, step: &Step) -> Times {
    let rates = &request.rates;
    let sharers = request.ranks_per_node.min(request.tp_size) as f64;
    let cores = 1e9 * rates.host_read_gbs.value / sharers;
    let gpu = rates.gpu.filter(|_| request.device == DeviceKind::Cuda);
    let (device_read, host_path, gemm) = match gpu {
        None => (f64::INFINITY, cores, rates.host_gemm_tflops.value / sharers),
        Some(gpu) => {
            let link = 1e9 * gpu.link_gbs.value;
            let helpers = if step.phase == Phase::Decode {
                cores
            } else {
                0.0
            };
            (
                1e9 * gpu.read_gbs.value,
                link + helpers,
                gpu.gemm_tflops.value,
            )
        }
    };
    let [device, host, file] = bytes_read(rank, step);
    Times {
        device: device / device_read,
        host: host / host_path,
        file: file * sharers / (1e9 * rates.file_read_gbs.value),
        compute: flops(config, rank, step) / (1e12 * gemm),
        all_reduce: all_reduce(config, request, step),
    }
}

/// Bytes that a step reads from device, host and file.
fn bytes_read(rank: &RankLoad, step: &Step) -> [f64; 3] {
    let (bytes, tiers) = (&rank.placed.bytes, &rank.placed.tiers);
    let kv = bytes.kv as f64 * step.kv_read;
    let lookup = rank.weights.lookup_bytes;
    if tiers.device == 0 {
        return [0.0, bytes.weights.saturating_sub(lookup) as f64 + kv, 0.0];
    }
    let (on_device, pinned) = match rank.placed.placement.embed.is_offloaded() {
        true => (0, lookup),
        false => (lookup, 0),
    };
    [
        tiers.weights_on_device.saturating_sub(on_device) as f64 + kv,
        tiers.weights_pinned.saturating_sub(pinned) as f64,
        tiers.file as f64,
    ]
}

fn flops(config: &ModelConfig, rank: &RankLoad, step: &Step) -> f64 {
    let (tokens, rows) = (step.tokens as f64, step.logit_rows as f64);
    let matrices = 2.0 * tokens * rank.weights.layer_elements as f64;
    let head = 2.0 * rows * rank.weights.head_elements as f64;
    let width = (rank.shard.n_heads_local() * config.head_dim) as f64;
    matrices + head + 4.0 * tokens * step.context * width * config.n_layers as f64
}

fn all_reduce(config: &ModelConfig, request: &Request, step: &Step) -> f64 {
    if request.tp_size == 1 {
        return 0.0;
    }
    let message = step.tokens as f64
        * config.hidden_size as f64
        * request.device.activation_dtype().size() as f64;
    let rates = &request.rates;
    let one = 1e-6 * rates.all_reduce_us.value + message / (1e9 * rates.all_reduce_gbs.value);
    2.0 * config.n_layers as f64 * one
}
