//! What this rank will do, as a plain value: pure functions of the configuration, the world size and the budgets.
//!
//! [`Plan::new`] needs no GPU and touches no file; `tandem plan` prints what it returns.

mod gpu;
mod latency;
mod memory;
mod offload;
mod options;
mod placement;
mod rates;
mod table;

pub use gpu::{DEVICE_PAGE, GPU_CONTEXT_BYTES, GPU_RANKS_RUNTIME_BYTES, GPU_RUNTIME_BYTES};
pub use latency::{Bound, PROMPT_TOKENS, Prediction};
pub use memory::{Buffer, RankBytes, kv_bytes_per_block, step_buffers};
pub use options::{Choice, Fit, Options};
pub use placement::{Budget, Tiers};
pub use rates::{A100_40GB, GpuRates, H100_80GB, H200, Rate, Rates, SMALL_HOST};

use crate::config::ModelConfig;
use crate::layout::{KV_BLOCK, Limits, Placement, Shard};
use crate::weights::Dtype;
use crate::{Error, Result};
use gpu::GpuNeed;
use latency::RankLoad;
use memory::WeightCount;
use placement::Placed;
use serde::Serialize;

/// Tokens of a prefill chunk unless asked otherwise.
pub const DEFAULT_STEP_TOKENS: usize = 512;
/// Tokens of a GPU's prefill chunk: enough that the weights' traffic is hidden behind the products.
pub const GPU_STEP_TOKENS: usize = 2048;
/// The same where every step passes over weights that are not on the GPU.
pub const OFFLOAD_STEP_TOKENS: usize = 8192;
/// Steps of an offloaded plan are not made smaller than this, in tokens, for the sake of memory.
const LEAST_STEP_TOKENS: usize = 256;
/// Tokens of a sequence unless asked otherwise, or the model's own limit if that is less.
pub const DEFAULT_CONTEXT: usize = 4096;
/// Multiprocessors of an H100 or H200.
pub const DEFAULT_SM_COUNT: usize = 132;
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
    /// Tokens of a prefill chunk; a plan that must offload may take fewer (see [`Plan::new`]).
    pub max_step_tokens: usize,
    /// Bytes of GPU memory that a rank may fill, all that its process takes there included; `None` for no limit.
    pub gpu_memory: Option<u64>,
    /// Bytes of host memory that the ranks of one node may fill together with weights, caches, buffers and pinned
    /// staging; `None` for no limit.
    pub host_memory: Option<u64>,
    /// The weights come from files, from which a step may read again what no memory holds.
    pub files: bool,
    /// Multiprocessors of a GPU, by which some of its step buffers are sized.
    pub sm_count: usize,
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
            files: true,
            sm_count: DEFAULT_SM_COUNT,
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
    /// The rows of its matrices by where they lie; all resident on a CPU rank.
    pub placement: Placement,
    /// All its weights lie in its own device's memory: the GPU's, or the host's for a CPU rank.
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
    /// Tokens of the largest step: the chunk asked for or what was made of it (see [`Plan::new`]), no more than all
    /// sequences hold, and one for every sequence.
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
    /// On GPUs that cannot hold everything, the step buffers take memory from the weights. There the tokens of a step
    /// are halved, not below 256, where that makes a request of one prompt and a short answer faster
    /// ([`Prediction::request_s`]): few large steps pass over the offloaded weights less often, small ones leave fewer
    /// of them offloaded.
    ///
    /// # Errors
    /// [`Error::Usage`] for a request that no machine could serve (a context over the model's limit, zero or absurdly
    /// many of something), [`Error::Failed`] for one that the given memory cannot hold, with the numbers per rank.
    pub fn new(config: &ModelConfig, request: &Request) -> Result<Plan> {
        request.validate(config)?;
        let n_kv_blocks = request.max_seqs * request.context.div_ceil(KV_BLOCK);
        let mut tokens = request
            .max_step_tokens
            .min(request.max_seqs * request.context)
            .max(request.max_seqs);
        let with = |tokens| Plan::with_step_tokens(config, request, n_kv_blocks, tokens);
        let mut best = with(tokens);
        if request.device == DeviceKind::Cpu || best.as_ref().is_ok_and(Plan::fits) {
            return best;
        }
        while tokens / 2 >= LEAST_STEP_TOKENS.max(request.max_seqs) {
            tokens /= 2;
            let smaller = with(tokens);
            let better = match (&smaller, &best) {
                (Ok(new), Ok(old)) => new.predicted.request_s < old.predicted.request_s,
                (Err(_), Ok(_)) => false,
                _ => true,
            };
            if better {
                best = smaller;
            }
        }
        best
    }

    /// Plans with the steps that a run takes: on CPU ranks those of the request; on GPUs [`GPU_STEP_TOKENS`], and where not
    /// everything fits up to [`OFFLOAD_STEP_TOKENS`], because every step passes over all that is not on the GPU.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub fn for_run(config: &ModelConfig, request: &Request) -> Result<Plan> {
        if request.device == DeviceKind::Cpu {
            return Plan::new(config, request);
        }
        let with = |max_step_tokens| {
            let request = Request {
                max_step_tokens,
                ..request.clone()
            };
            Plan::new(config, &request)
        };
        let resident = with(GPU_STEP_TOKENS);
        if resident.as_ref().is_ok_and(Plan::fits) {
            return resident;
        }
        with(request.context.clamp(GPU_STEP_TOKENS, OFFLOAD_STEP_TOKENS))
    }

    /// How fast the same plan should be at other rates.
    ///
    /// # Errors
    /// Rates that are none.
    pub fn predicted_at(&self, rates: Rates) -> Result<Prediction> {
        let request = Request {
            rates,
            ..self.request.clone()
        };
        request.rates.validate(request.device)?;
        let (blocks, tokens) = (self.n_kv_blocks, self.max_step_tokens);
        Plan::with_step_tokens(&self.model, &request, blocks, tokens).map(|plan| plan.predicted)
    }

    /// All weights lie in the memory of what multiplies them.
    pub fn fits(&self) -> bool {
        self.ranks.iter().all(|r| r.fits)
    }

    fn with_step_tokens(
        config: &ModelConfig,
        request: &Request,
        n_kv_blocks: usize,
        max_step_tokens: usize,
    ) -> Result<Plan> {
        let limits = Limits {
            max_step_tokens,
            max_logit_rows: request.max_seqs,
            n_kv_blocks,
        };
        let shards: Vec<Shard> = (0..request.tp_size)
            .map(|rank| Shard::new(config, request.tp_size, rank))
            .collect();
        let placed = place(config, request, &shards, &limits)?;
        let ranks: Vec<RankLoad> = shards
            .into_iter()
            .zip(placed)
            .map(|(shard, placed)| RankLoad {
                weights: WeightCount::new(config, &shard, request.dtype),
                shard,
                placed,
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
            ranks: ranks.into_iter().map(rank_plan).collect(),
            predicted,
        })
    }
}

/// What every rank holds and where.
fn place(
    config: &ModelConfig,
    request: &Request,
    shards: &[Shard],
    limits: &Limits,
) -> Result<Vec<Placed>> {
    if request.device == DeviceKind::Cpu {
        let need = |shard| cpu_need(config, request, shard, limits);
        let needs: Vec<_> = shards.iter().map(need).collect::<Result<_>>()?;
        return placement::on_cpu(request, &needs);
    }
    let need = |shard| GpuNeed::new(config, request, shard, limits);
    let needs: Vec<_> = shards.iter().map(need).collect::<Result<_>>()?;
    placement::on_gpu(request, &needs)
}

/// What a CPU rank holds, all of it in host memory.
fn cpu_need(
    config: &ModelConfig,
    request: &Request,
    shard: &Shard,
    limits: &Limits,
) -> Result<(RankBytes, Placement)> {
    let device = request.device;
    let weights = WeightCount::new(config, shard, request.dtype);
    let kv = kv_bytes_per_block(config, shard, device).saturating_mul(limits.n_kv_blocks as u64);
    let (tokens, rows) = (limits.max_step_tokens, limits.max_logit_rows);
    let arena = step_buffers(config, shard, device, tokens, rows)
        .iter()
        .fold(0u64, |sum, buffer| sum.saturating_add(buffer.bytes()));
    let bytes = RankBytes::new(weights.bytes, kv, arena);
    if bytes.total >= 1 << 63 {
        return Err(Error::usage(format!(
            "rank {} would need 8 EiB or more: lower the context, the sequences or the tokens of a step",
            shard.tp_rank
        )));
    }
    Ok((bytes, Placement::all_resident(config, shard)))
}

fn rank_plan(load: RankLoad) -> RankPlan {
    let Placed {
        placement,
        bytes,
        budget,
        tiers,
    } = load.placed;
    RankPlan {
        shard: load.shard,
        matrices: load.weights.matrices,
        bytes,
        budget,
        tiers,
        placement,
        fits: !placement.is_offloaded(),
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
mod properties;
#[cfg(test)]
mod tests;
