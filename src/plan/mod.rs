//! What this rank will do, as a plain value: pure functions of the configuration, the world size and the budgets.
//!
//! [`Plan::new`] needs no GPU and touches no file; `tandem plan` prints what it returns.

pub mod bytes;
mod cut;
mod latency;
mod memory;
mod placement;
mod rates;
pub mod shards;
mod table;

pub use cut::{Cut, Placement, RING_SLOT_BYTES, RING_SLOTS};
pub use latency::{Bound, PROMPT_TOKENS, Prediction};
pub use memory::{Buffer, KV_BLOCK, RankBytes, kv_bytes_per_block, step_buffers};
pub use placement::{Budget, Tiers};
pub use rates::{A100_40GB, GpuRates, H200, Rate, Rates, SMALL_HOST};
pub use shards::Shard;

use crate::config::ModelConfig;
use crate::weights::Dtype;
use crate::{Error, Result};
use latency::RankLoad;
use memory::WeightCount;
use serde::Serialize;

/// Tokens of a prefill chunk unless asked otherwise.
pub const DEFAULT_STEP_TOKENS: usize = 512;
/// Tokens of a sequence unless asked otherwise, or the model's own limit if that is less.
pub const DEFAULT_CONTEXT: usize = 4096;
/// More ranks, sequences or step tokens than these are a typing error.
const MAX_RANKS: usize = 1024;
const MAX_SEQS: usize = 1 << 16;
const MAX_STEP_TOKENS: usize = 1 << 20;

/// What runs the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The cores of the host.
    Cpu,
    /// One NVIDIA GPU a rank.
    Cuda,
}

impl DeviceKind {
    /// Element type of the step buffers and the KV cache.
    pub fn activation_dtype(self) -> Dtype {
        match self {
            DeviceKind::Cpu => Dtype::F32,
            DeviceKind::Cuda => Dtype::Bf16,
        }
    }
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceKind::Cpu => "CPU",
            DeviceKind::Cuda => "CUDA",
        })
    }
}

/// What a plan is asked for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Request {
    /// What to call the model: the name of its shape or its folder.
    pub name: String,
    /// What runs the ranks.
    pub device: DeviceKind,
    /// Number of ranks.
    pub tp_size: usize,
    /// How many of them share a node's host memory, cores and disks; nodes are filled in rank order.
    pub ranks_per_node: usize,
    /// Element type of the weight matrices in memory.
    pub dtype: Dtype,
    /// Sequences at a time.
    pub max_seqs: usize,
    /// Tokens of a sequence, prompt and answer together.
    pub context: usize,
    /// Tokens of a prefill chunk.
    pub max_step_tokens: usize,
    /// Bytes of GPU memory that a rank may fill; `None` for no limit.
    pub gpu_memory: Option<u64>,
    /// Bytes of host memory that the ranks of one node may fill together; `None` for no limit.
    pub host_memory: Option<u64>,
    /// How fast the machine is.
    pub rates: Rates,
}

impl Request {
    /// One sequence on `tp_size` ranks of one node, no memory limit, assumed rates.
    pub fn new(name: &str, config: &ModelConfig, device: DeviceKind, tp_size: usize) -> Request {
        Request {
            name: name.to_owned(),
            device,
            tp_size,
            ranks_per_node: tp_size,
            dtype: config.dtype,
            max_seqs: 1,
            context: config.max_position_embeddings.min(DEFAULT_CONTEXT),
            max_step_tokens: DEFAULT_STEP_TOKENS,
            gpu_memory: None,
            host_memory: None,
            rates: Rates::assumed(device, None),
        }
    }

    fn validate(&self, config: &ModelConfig) -> Result<()> {
        let sizes = [
            ("ranks", self.tp_size, MAX_RANKS),
            ("ranks per node", self.ranks_per_node, MAX_RANKS),
            ("sequences", self.max_seqs, MAX_SEQS),
            ("tokens of a step", self.max_step_tokens, MAX_STEP_TOKENS),
        ];
        if let Some((what, value, max)) = sizes.iter().find(|(_, v, max)| *v == 0 || v > max) {
            return Err(Error::usage(format!("{value} {what}: must be 1 to {max}")));
        }
        let longest = config.max_position_embeddings;
        if self.context == 0 || self.context > longest {
            return Err(Error::usage(format!(
                "a context of {} tokens: {} takes 1 to {longest} (max_position_embeddings)",
                self.context, self.name
            )));
        }
        if self.device == DeviceKind::Cpu && self.gpu_memory.is_some() {
            return Err(Error::usage(
                "--gpu-memory limits GPU ranks; CPU ranks are limited by --host-memory",
            ));
        }
        self.rates.validate(self.device)
    }
}

/// One rank's part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankPlan {
    /// Its slice of every divided axis.
    pub shard: Shard,
    /// Matrices and vectors that it holds.
    pub matrices: usize,
    /// Its bytes by what they are for.
    pub bytes: RankBytes,
    /// What it may fill.
    pub budget: Budget,
    /// Its bytes by where they lie.
    pub tiers: Tiers,
    /// All its bytes lie in its own device's memory: the GPU's, or the host's for a CPU rank.
    pub fits: bool,
}

/// Everything that follows from a [`Request`] for a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The model.
    pub model: ModelConfig,
    /// Its parameters.
    pub parameters: u64,
    /// What was asked for.
    pub request: Request,
    /// Tokens of the largest step: the chunk asked for, no more than all sequences hold, and one for every sequence.
    pub max_step_tokens: usize,
    /// Tokens in a KV block.
    pub kv_block_tokens: usize,
    /// Blocks of the KV cache, the same on every rank: room for all sequences at full context.
    pub n_kv_blocks: usize,
    /// The ranks in order.
    pub ranks: Vec<RankPlan>,
    /// How fast it should be, by the rates of the request.
    pub predicted: Prediction,
}

impl Plan {
    /// Plans every rank.
    ///
    /// # Errors
    /// [`Error::Usage`] for a request that no machine could serve (a context over the model's limit, zero or absurdly
    /// many of something), [`Error::Failed`] for one that the given memory cannot hold, with the numbers per rank.
    pub fn new(config: &ModelConfig, request: &Request) -> Result<Plan> {
        request.validate(config)?;
        let n_kv_blocks = request.max_seqs * request.context.div_ceil(KV_BLOCK);
        let max_step_tokens = request
            .max_step_tokens
            .min(request.max_seqs * request.context)
            .max(request.max_seqs);
        let shards: Vec<Shard> = (0..request.tp_size)
            .map(|rank| Shard::new(config, request.tp_size, rank))
            .collect();
        let needs: Vec<(WeightCount, RankBytes)> = shards
            .iter()
            .map(|shard| need(config, request, shard, n_kv_blocks, max_step_tokens))
            .collect::<Result<_>>()?;
        let bytes: Vec<RankBytes> = needs.iter().map(|(_, bytes)| *bytes).collect();
        let placed = placement::place(request, &bytes)?;
        let ranks: Vec<RankLoad> = shards
            .into_iter()
            .zip(needs)
            .zip(placed)
            .map(|((shard, (weights, bytes)), (budget, tiers))| RankLoad {
                shard,
                weights,
                bytes,
                budget,
                tiers,
            })
            .collect();
        let predicted = latency::predict(config, request, max_step_tokens, &ranks);
        Ok(Plan {
            model: config.clone(),
            parameters: u64::try_from(config.parameters()).unwrap_or(u64::MAX),
            request: request.clone(),
            max_step_tokens,
            kv_block_tokens: KV_BLOCK,
            n_kv_blocks,
            ranks: ranks
                .into_iter()
                .map(|load| rank_plan(request.device, load))
                .collect(),
            predicted,
        })
    }
}

/// What one rank holds, wherever it will lie.
fn need(
    config: &ModelConfig,
    request: &Request,
    shard: &Shard,
    n_kv_blocks: usize,
    max_step_tokens: usize,
) -> Result<(WeightCount, RankBytes)> {
    let device = request.device;
    let weights = WeightCount::new(config, shard, request.dtype);
    let kv = kv_bytes_per_block(config, shard, device).saturating_mul(n_kv_blocks as u64);
    let arena = step_buffers(config, shard, device, max_step_tokens, request.max_seqs)
        .iter()
        .fold(0u64, |sum, buffer| sum.saturating_add(buffer.bytes()));
    let bytes = RankBytes::new(weights.bytes, kv, arena);
    if bytes.total >= 1 << 63 {
        return Err(Error::usage(format!(
            "rank {} would need 8 EiB or more: lower the context, the sequences or the tokens of a step",
            shard.tp_rank
        )));
    }
    Ok((weights, bytes))
}

fn rank_plan(device: DeviceKind, load: RankLoad) -> RankPlan {
    let own = match device {
        DeviceKind::Cpu => load.tiers.host,
        DeviceKind::Cuda => load.tiers.device,
    };
    RankPlan {
        shard: load.shard,
        matrices: load.weights.matrices,
        bytes: load.bytes,
        budget: load.budget,
        tiers: load.tiers,
        fits: own == load.bytes.total,
    }
}

/// `1 rank`, `2 ranks`.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Puts the indices of equal things together, in the order in which they first appear.
fn fold<T, K: PartialEq>(things: &[T], key: impl Fn(&T) -> K) -> Vec<(K, Vec<usize>)> {
    let mut groups: Vec<(K, Vec<usize>)> = Vec::new();
    for (index, thing) in things.iter().enumerate() {
        let key = key(thing);
        match groups.iter_mut().find(|(k, _)| *k == key) {
            Some((_, members)) => members.push(index),
            None => groups.push((key, vec![index])),
        }
    }
    groups
}

/// `rank 3`, `ranks 0-2,5`, `ranks 0,2,4,… (32)`.
fn rank_list(ranks: &[usize]) -> String {
    let word = if ranks.len() == 1 { "rank" } else { "ranks" };
    format!("{word} {}", runs(ranks))
}

/// `3`, `0-2,5`, `0,2,4,… (32)`: ascending numbers as runs, cut short after the third.
fn runs(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == n => *end = n,
            _ => runs.push((n, n)),
        }
    }
    let text = |&(start, end): &(usize, usize)| match start == end {
        true => start.to_string(),
        false => format!("{start}-{end}"),
    };
    let shown: Vec<String> = runs.iter().take(3).map(text).collect();
    match runs.len() {
        0..=3 => shown.join(","),
        _ => format!("{},… ({})", shown.join(","), numbers.len()),
    }
}

#[cfg(test)]
mod tests;
