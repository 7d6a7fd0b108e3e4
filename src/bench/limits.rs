//! What a figure cannot do without: bytes that have to be read, operations that have to be done.

use super::ceilings::Ceilings;
use crate::config::ModelConfig;
use crate::plan::{DeviceKind, KV_BLOCK, Shard, kv_bytes_per_block};
use crate::weights::Dtype;
use serde::Serialize;

/// A run's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Ranks.
    pub ranks: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens of each answer.
    pub max_tokens: usize,
    /// Sequences at a time.
    pub batch: usize,
}

/// What the slowest rank has to do, and how long that takes at least by the ceilings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Limits {
    /// Bytes that a decode step reads: all weights but an embedding that is only looked up, and the KV cache of all
    /// sequences at half of their answers.
    pub decode_bytes: u64,
    /// Seconds of that at the measured read rate.
    pub decode_s: f64,
    /// Operations of one prompt, logits of its last token included.
    pub prefill_flops: f64,
    /// Seconds of that at the measured product rate.
    pub prefill_s: f64,
}

/// The limits of a run; `None` where the ceilings lack a rank.
pub fn limits(
    config: &ModelConfig,
    dtype: Dtype,
    size: &Size,
    ceilings: &Ceilings,
) -> Option<Limits> {
    let kind = ceilings.device();
    let mut slowest = Limits {
        decode_bytes: 0,
        decode_s: 0.0,
        prefill_flops: 0.0,
        prefill_s: 0.0,
    };
    for rank in 0..size.ranks {
        let (read_gbs, tflops) = ceilings.of_rank(rank)?;
        let shard = Shard::new(config, size.ranks, rank);
        let bytes = decode_bytes(config, dtype, kind, &shard, size);
        let flops = prefill_flops(config, &shard, size.prompt_tokens);
        let (decode_s, prefill_s) = (bytes as f64 / read_gbs / 1e9, flops / tflops / 1e12);
        if decode_s > slowest.decode_s {
            (slowest.decode_bytes, slowest.decode_s) = (bytes, decode_s);
        }
        if prefill_s > slowest.prefill_s {
            (slowest.prefill_flops, slowest.prefill_s) = (flops, prefill_s);
        }
    }
    Some(slowest)
}

fn decode_bytes(
    config: &ModelConfig,
    dtype: Dtype,
    kind: DeviceKind,
    shard: &Shard,
    size: &Size,
) -> u64 {
    // The GPU's weights are bf16 whatever the checkpoint's are.
    let dtype = match kind {
        DeviceKind::Cuda => Dtype::Bf16,
        DeviceKind::Cpu => dtype,
    };
    let weights: usize = shard
        .matrices(config, dtype)
        .iter()
        .filter(|m| m.name != "embed" || config.tie_word_embeddings)
        .map(|m| m.bytes())
        .sum();
    let context = size.prompt_tokens + size.max_tokens / 2;
    let kv = kv_bytes_per_block(config, shard, kind) / KV_BLOCK as u64;
    weights as u64 + kv * (size.batch * context) as u64
}

fn prefill_flops(config: &ModelConfig, shard: &Shard, tokens: usize) -> f64 {
    let one_layer = ModelConfig {
        n_layers: 1,
        ..config.clone()
    };
    let elements: f64 = shard
        .matrices(&one_layer, Dtype::Bf16)
        .iter()
        .filter(|m| m.name.starts_with("layers.") && m.cols > 1)
        .map(|m| m.rows as f64 * m.cols as f64)
        .sum();
    let (n, layers) = (tokens as f64, config.n_layers as f64);
    let width = (shard.n_heads_local() * config.head_dim) as f64;
    let head = 2.0 * shard.vocab.len() as f64 * config.hidden_size as f64;
    // A token attends to itself and those before it: scores and weighted sum, two operations each.
    let attention = 4.0 * width * n * (n + 1.0) / 2.0;
    layers * (2.0 * n * elements + attention) + head
}
