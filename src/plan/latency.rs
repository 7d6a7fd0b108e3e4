//! The predicted speed: a roofline per step, of partners that work at once.
//!
//! A step of n tokens takes, on the slowest rank,
//!
//! ```text
//! step(n)    = max(own, host, file) + hand_over
//!
//! own        = max(read / device_read, flops / gemm) + all_reduce + n_layers · LAYER_S + STEP_S
//! host       = pinned / (link + cores) + file / link
//! file       = file / file_read
//! flops      = 2 n · matrix elements + 2 S · head elements + 4 n c · n_heads_local · head_dim · n_layers
//! all_reduce = (2 n_layers + 1) · (latency + 4 or 2 bytes · n · hidden / bandwidth), 0 on one rank
//! ```
//!
//! `read` is all that the step passes over: the weights but an embedding that is only looked up (it is the first to leave
//! the GPU), and the KV cache of the sequences; `c` is the tokens each token attends to, S the rows of logits. `pinned`
//! and `file` are the weights that lie in host memory and in the files. The link fetches ahead of their use, across
//! matrices and all-reduces, so only the longest of the three shows. `cores` is the rank's part of the node's cores in
//! steps of up to [`SHARE_ROWS`] tokens and 0 in longer ones, which stream everything; `hand_over` is paid where cores
//! take part. Together, links and cores do not pass [`MEMORY_OVER_CORES`].
//!
//! `read` counts weights that the cores multiply too. That overstates the GPU's work a little where it is nearly the
//! longest anyway, and keeps a weight on the GPU from looking slower than one on the host.
//!
//! On CPU ranks everything is read from host memory; cores and memory are divided by the ranks of a node, and `host`,
//! `file`, `hand_over` and the fixed costs are 0.
//!
//! - tpot: `step(max_seqs)` with every sequence at its full context.
//! - ttft: the steps of one prompt of [`PROMPT_TOKENS`] tokens, or of the context if that is less, in chunks of
//!   `max_step_tokens`.

use super::memory::WeightCount;
use super::placement::Placed;
use super::{DeviceKind, GpuRates, Rates, Request};
use crate::config::ModelConfig;
use crate::layout::SHARE_ROWS;
use crate::layout::Shard;
use serde::Serialize;

/// What a layer's kernels take on a GPU beyond reading and arithmetic: their starts and ends, and those too small to fill
/// it. Fitted, with [`STEP_S`], to the decode times in the tests below.
const LAYER_S: f64 = 19e-6;
/// The same of a step outside the layers: embedding, head, sampling.
const STEP_S: f64 = 20e-6;
/// What a product waits for besides memory where the cores have a part in it: they idle from one answer to the next
/// request: two trips over the bus, a pool of threads that wakes up and ends together, and the GPU's kernels in between.
/// Fitted to the offloaded steps in the tests below, of which seven of eight come out within 8%.
const HAND_OVER_S: f64 = 60e-6;
/// Products of an offloaded model that a step hands over in each layer: qkv, o, gate and up, down.
const PRODUCTS_OF_A_LAYER: f64 = 4.0;
/// What host memory gives to links and cores together, in terms of what the cores alone read in products. An assumption:
/// a server's cores seldom draw more than half of what its memory channels carry (131 GB/s by 32 cores of a socket whose
/// eight DDR5 channels carry about 300). Copies come first: the link asks deeper than the cores do.
const MEMORY_OVER_CORES: f64 = 2.0;

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
    /// Reading host memory, by the cores alone or by them and the link at once.
    HostMemory,
    /// Streaming over the link alone.
    Link,
    /// Reading the model's files.
    File,
    /// Arithmetic.
    Compute,
    /// Waiting for the other ranks.
    AllReduce,
    /// Starts and ends of kernels.
    Latency,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Bound::DeviceMemory => "GPU memory",
            Bound::HostMemory => "host memory",
            Bound::Link => "the link",
            Bound::File => "file reads",
            Bound::Compute => "arithmetic",
            Bound::AllReduce => "all-reduce",
            Bound::Latency => "starts of kernels",
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
    /// Time of a request whose prompt fills the context but for `ANSWER_TOKENS`, and of that answer: what the tokens of
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

struct Step {
    tokens: usize,
    /// Tokens that each token attends to, on average.
    context: f64,
    logit_rows: usize,
    /// Part of the KV cache that is read.
    kv_read: f64,
}

/// Chunks of a prompt that are looked at one by one; what a plan costs must not grow with the context.
const MOST_CHUNKS: usize = 512;

/// Seconds of one step by what they are spent on.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    read: f64,
    compute: f64,
    all_reduce: f64,
    latency: f64,
    /// Streamed while the cores multiply their share.
    shared: f64,
    /// Streamed without them.
    streamed: f64,
    file: f64,
    hand_over: f64,
}

impl Times {
    /// Of the device that multiplies.
    fn own(&self) -> f64 {
        self.read.max(self.compute) + self.all_reduce + self.latency
    }

    fn total(&self) -> f64 {
        let host = self.shared.max(self.streamed);
        self.own().max(host).max(self.file) + self.hand_over
    }

    fn plus(self, other: Times) -> Times {
        Times {
            read: self.read + other.read,
            compute: self.compute + other.compute,
            all_reduce: self.all_reduce + other.all_reduce,
            latency: self.latency + other.latency,
            shared: self.shared + other.shared,
            streamed: self.streamed + other.streamed,
            file: self.file + other.file,
            hand_over: self.hand_over + other.hand_over,
        }
    }

    fn times(self, n: f64) -> Times {
        Times {
            read: self.read * n,
            compute: self.compute * n,
            all_reduce: self.all_reduce * n,
            latency: self.latency * n,
            shared: self.shared * n,
            streamed: self.streamed * n,
            file: self.file * n,
            hand_over: self.hand_over * n,
        }
    }

    fn bound(&self, device: DeviceKind) -> Bound {
        let memory = match device {
            DeviceKind::Cpu => Bound::HostMemory,
            DeviceKind::Cuda => Bound::DeviceMemory,
        };
        let own = [
            (self.read, memory),
            (self.compute, Bound::Compute),
            (self.all_reduce, Bound::AllReduce),
            (self.latency + self.hand_over, Bound::Latency),
        ];
        let partners = [
            (self.own(), longest(&own)),
            (self.shared, Bound::HostMemory),
            (self.streamed, Bound::Link),
            (self.file, Bound::File),
        ];
        longest(&partners)
    }
}

fn longest(terms: &[(f64, Bound)]) -> Bound {
    let most = terms.iter().max_by(|a, b| a.0.total_cmp(&b.0));
    most.map_or(Bound::Compute, |(_, bound)| *bound)
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
        tokens: request.max_seqs,
        context: request.context as f64,
        logit_rows: request.max_seqs,
        kv_read: 1.0,
    });
    let prefill = |prompt_tokens: usize| {
        let one_sequence = (request.max_seqs * request.context) as f64;
        let (mut seconds, mut sum) = (0.0, Times::default());
        let mut add = |first: usize, n: usize, tokens: usize| {
            // The middle of n chunks.
            let start = max_step_tokens as f64 * (first as f64 + (n as f64 - 1.0) / 2.0);
            let chunk = slowest(&Step {
                tokens,
                context: start + (tokens as f64 + 1.0) / 2.0,
                logit_rows: usize::from(first + n == prompt_tokens.div_ceil(max_step_tokens)),
                kv_read: (start + tokens as f64) / one_sequence,
            });
            seconds += n as f64 * chunk.total();
            sum = sum.plus(chunk.times(n as f64));
        };
        // All but the last are alike except for what lies before them: of very many, neighbours count as one.
        let before = prompt_tokens.div_ceil(max_step_tokens).saturating_sub(1);
        let together = before.div_ceil(MOST_CHUNKS).max(1);
        for first in (0..before).step_by(together) {
            add(first, together.min(before - first), max_step_tokens);
        }
        if prompt_tokens > 0 {
            add(before, 1, prompt_tokens - before * max_step_tokens);
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
        ttft_bound: first.bound(request.device),
        tpot_bound: decode.bound(request.device),
    }
}

fn times(config: &ModelConfig, request: &Request, rank: &RankLoad, step: &Step) -> Times {
    let rates = &request.rates;
    let flops = flops(config, rank, step);
    let all_reduce = all_reduce(config, request, step);
    let passed_over = rank.weights.bytes - rank.weights.lookup_bytes;
    let read = passed_over as f64 + rank.placed.bytes.kv as f64 * step.kv_read;
    let sharers = request.ranks_per_node.min(request.tp_size) as f64;
    let gpu = rates.gpu.filter(|_| request.device == DeviceKind::Cuda);
    let Some(gpu) = gpu else {
        return Times {
            read: read * sharers / (1e9 * rates.host_read_gbs.value),
            compute: flops * sharers / (1e12 * rates.host_gemm_tflops.value),
            all_reduce,
            ..Times::default()
        };
    };
    let on_gpu = Times {
        read: read / (1e9 * gpu.read_gbs.value),
        compute: flops / (1e12 * gpu.gemm_tflops.value),
        all_reduce,
        latency: config.n_layers as f64 * LAYER_S + STEP_S,
        ..Times::default()
    };
    with_host(config, request, &gpu, rank, step, on_gpu)
}

/// Adds the time of what is not on the GPU.
fn with_host(
    config: &ModelConfig,
    request: &Request,
    gpu: &GpuRates,
    rank: &RankLoad,
    step: &Step,
    on_gpu: Times,
) -> Times {
    let sharers = request.ranks_per_node.min(request.tp_size) as f64;
    let (pinned, file) = offloaded(rank);
    if pinned + file == 0.0 {
        return on_gpu;
    }
    let (link, cores) = host_rates(&request.rates, gpu, sharers, step.tokens);
    let host = pinned / (link + cores) + file / link;
    let cores_take_part = step.tokens <= SHARE_ROWS;
    let products = PRODUCTS_OF_A_LAYER * config.n_layers as f64 + 1.0;
    Times {
        shared: if cores_take_part { host } else { 0.0 },
        streamed: if cores_take_part { 0.0 } else { host },
        file: file * sharers / (1e9 * request.rates.file_read_gbs.value),
        hand_over: if cores_take_part {
            products * HAND_OVER_S
        } else {
            0.0
        },
        ..on_gpu
    }
}

/// Bytes a second of one rank's link and of its part of the cores in a step of so many tokens.
fn host_rates(rates: &Rates, gpu: &GpuRates, sharers: f64, tokens: usize) -> (f64, f64) {
    let cores = 1e9 * rates.host_read_gbs.value;
    let together = rates.together_gbs.map(|rate| 1e9 * rate.value);
    let memory = together.unwrap_or(MEMORY_OVER_CORES * cores) / sharers;
    let link = (1e9 * gpu.link_gbs.value).min(memory);
    if tokens > SHARE_ROWS {
        return (link, 0.0);
    }
    // An element has two bytes and takes two operations a token.
    let by_arithmetic = 1e12 * rates.host_gemm_tflops.value / tokens as f64;
    let cores = cores.min(by_arithmetic) / sharers;
    (link, cores.min((memory - link).max(0.0)))
}

/// Bytes of weights that a step fetches from host memory, and from the files.
fn offloaded(rank: &RankLoad) -> (f64, f64) {
    let (tiers, placement) = (&rank.placed.tiers, &rank.placed.placement);
    let looked_up = if placement.embed.is_offloaded() {
        rank.weights.lookup_bytes
    } else {
        0
    };
    let pinned = tiers.weights_pinned.saturating_sub(looked_up);
    (pinned as f64, tiers.file as f64)
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
    // One after the embedding, two a layer.
    (2.0 * config.n_layers as f64 + 1.0) * one
}
