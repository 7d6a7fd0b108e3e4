//! What a figure cannot do without: bytes that have to be read, operations that have to be done.

use super::ceilings::Ceilings;
use crate::config::ModelConfig;
use crate::layout::{KV_BLOCK, Shard};
use crate::plan::{DEFAULT_STEP_TOKENS, DeviceKind, GPU_STEP_TOKENS, kv_bytes_per_block};
use crate::weights::{Dtype, LocalMatrix};
use serde::Serialize;

/// More ranks, tokens or sequences are a slip of the keyboard; sums and products of two stay far from overflow.
pub const MOST: usize = 1 << 30;

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
    /// Operations up to the first token: of its prompt, and of the others that fill its steps; logits included.
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
        let flops = first_prompts(kind, size)
            .map(|tokens| prefill_flops(config, &shard, tokens))
            .sum::<f64>();
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

/// What a decode step reads on one GPU rank, and what it need not read.
pub struct DecodeBytes {
    /// As in [`Limits::decode_bytes`].
    pub bytes: u64,
    /// An embedding of which a token is one row.
    pub looked_up: u64,
}

/// The bytes of a GPU rank's decode step.
pub fn decode_bytes_of(config: &ModelConfig, shard: &Shard, size: &Size) -> DecodeBytes {
    let embed = |m: &LocalMatrix| m.name == "embed" && !config.tie_word_embeddings;
    let matrices = shard.matrices(config, Dtype::Bf16);
    DecodeBytes {
        bytes: decode_bytes(config, Dtype::Bf16, DeviceKind::Cuda, shard, size),
        looked_up: matrices
            .iter()
            .filter(|m| embed(m))
            .map(|m| m.bytes() as u64)
            .sum(),
    }
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

/// The tokens of each prompt that are computed before the first one has its answer's first token. (Weights outside the
/// GPU make steps larger: then these are the least.)
fn first_prompts(kind: DeviceKind, size: &Size) -> impl Iterator<Item = usize> + use<> {
    let step = match kind {
        DeviceKind::Cpu => DEFAULT_STEP_TOKENS,
        DeviceKind::Cuda => GPU_STEP_TOKENS,
    };
    let prompt = size.prompt_tokens.max(1);
    let tokens = (prompt.next_multiple_of(step)).min(size.batch.max(1) * prompt);
    let parts = (0..tokens).step_by(prompt);
    parts.map(move |start| prompt.min(tokens - start))
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

#[cfg(test)]
mod tests {
    use super::super::ceilings::tests::h200s;
    use super::*;
    use crate::config::named_shape;

    fn of(shape: &str, ranks: usize, prompt_tokens: usize, batch: usize) -> Limits {
        let size = Size {
            ranks,
            prompt_tokens,
            max_tokens: 128,
            batch,
        };
        let config = named_shape(shape).unwrap();
        limits(&config, config.dtype, &size, &h200s(ranks)).unwrap()
    }

    #[test]
    fn a_token_reads_all_weights_but_the_embedding_and_the_cache() {
        // 7.616 billion parameters less an embedding of 152064 × 3584, two bytes each, and 57344 bytes of cache a token.
        let l = of("qwen2.5-7b", 1, 1024, 1);
        let weights = 2.0 * (7_615_616_512.0 - 152_064.0 * 3584.0);
        let read = (l.decode_bytes - 57_344 * (1024 + 64)) as f64;
        // Norms and biases are f32 in memory.
        assert!((read / weights - 1.0).abs() < 1e-4, "{read} {weights}");
        assert!((l.decode_s / 3.27e-3 - 1.0).abs() < 0.01, "{l:?}");
        let eight = of("qwen2.5-7b", 1, 1024, 8);
        assert_eq!(eight.decode_bytes - l.decode_bytes, 7 * 57_344 * 1088);
        // 142.9 GB of 72B over two.
        let l = of("qwen2.5-72b", 2, 1024, 1);
        assert!((l.decode_s / 16.5e-3 - 1.0).abs() < 0.01, "{l:?}");
    }

    #[test]
    fn a_prompt_costs_two_operations_a_weight_and_token() {
        // 6.525 billion weights in layers, the last token's logits, and attention over half of 4096².
        let l = of("qwen2.5-7b", 1, 4096, 1);
        let attention = 4.0 * 3584.0 * 28.0 * 4096.0 * 4097.0 / 2.0;
        let head = 2.0 * 152_064.0 * 3584.0;
        let want = 2.0 * 4096.0 * 6_525_288_448.0 + attention + head;
        assert!(
            (l.prefill_flops / want - 1.0).abs() < 1e-3,
            "{} {want}",
            l.prefill_flops
        );
    }

    #[test]
    fn a_first_token_waits_for_the_prompts_in_its_steps() {
        let flops = |prompt, batch| of("qwen2.5-7b", 1, prompt, batch).prefill_flops;
        let one = flops(1024, 1);
        assert_eq!(flops(1024, 2), 2.0 * one);
        // A step has 2048 tokens.
        assert_eq!(flops(1024, 8), 2.0 * one);
        // Two steps: 1096 of their 4096 tokens are the next prompt's.
        let more = flops(3000, 8) - flops(3000, 1);
        assert!((more / flops(1096, 1) - 1.0).abs() < 1e-9, "{more}");
    }

    #[test]
    fn a_rank_without_ceilings_has_no_limit() {
        let config = named_shape("qwen2.5-7b").unwrap();
        let size = Size {
            ranks: 4,
            prompt_tokens: 1,
            max_tokens: 1,
            batch: 1,
        };
        assert_eq!(limits(&config, config.dtype, &size, &h200s(2)), None);
    }
}
