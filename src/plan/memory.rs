//! Bytes of a rank: its weights, its KV cache, and the buffers of one step.

use super::DeviceKind;
use crate::config::ModelConfig;
use crate::layout::{KV_BLOCK, Shard};
use crate::weights::{Dtype, LocalMatrix};
use serde::Serialize;

/// One buffer of the step arena: row-major, `rows` × `cols`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Buffer {
    /// What the forward pass calls it.
    pub name: &'static str,
    /// Tokens, or rows of logits.
    pub rows: usize,
    /// Features on this rank.
    pub cols: usize,
    /// Element type.
    pub dtype: Dtype,
}

impl Buffer {
    /// Bytes of the buffer; `u64::MAX` where they could not be counted.
    pub fn bytes(&self) -> u64 {
        (self.rows as u64)
            .saturating_mul(self.cols as u64)
            .saturating_mul(self.dtype.size() as u64)
    }
}

/// The arena of one step, as the engine allocates it: nothing else is allocated after start-up.
///
/// `max_step_tokens` is the T of the shapes, tokens of all sequences in one step; `max_logit_rows` the S, rows of which
/// the step computes logits. Logits are f32 on every device, because sampling is.
pub fn step_buffers(
    config: &ModelConfig,
    shard: &Shard,
    device: DeviceKind,
    max_step_tokens: usize,
    max_logit_rows: usize,
) -> Vec<Buffer> {
    let (hidden, d) = (config.hidden_size, config.head_dim);
    let (q, kv) = (shard.n_heads_local() * d, shard.n_kv_heads_local() * d);
    let of_tokens = |name, cols| Buffer {
        name,
        rows: max_step_tokens,
        cols,
        dtype: device.activation_dtype(),
    };
    let of_logits = |name, cols| Buffer {
        name,
        rows: max_logit_rows,
        cols,
        dtype: Dtype::F32,
    };
    vec![
        of_tokens("x", hidden),                       // [T, hidden] residual stream
        of_tokens("h", hidden),                       // [T, hidden] normalised
        of_tokens("qkv", q + 2 * kv), // [T, (n_heads_local + 2 n_kv_heads_local) · head_dim]
        of_tokens("q", q),            // [T, n_heads_local · head_dim] rotated
        of_tokens("attn", q),         // [T, n_heads_local · head_dim]
        of_tokens("partial", hidden), // [T, hidden] this rank's term of the all-reduce
        of_tokens("mlp", shard.intermediate.len()), // [T, intermediate_local]
        of_logits("logits", config.vocab_size), // [S, vocab_size] gathered
        of_logits("logits_local", shard.vocab.len()), // [S, vocab_local]
    ]
}

/// Bytes of one block of the KV cache over all layers: K and V, `[n_kv_heads_local][KV_BLOCK][head_dim]` each.
pub fn kv_bytes_per_block(config: &ModelConfig, shard: &Shard, device: DeviceKind) -> u64 {
    [
        config.n_layers,
        2,
        shard.n_kv_heads_local(),
        KV_BLOCK,
        config.head_dim,
        device.activation_dtype().size(),
    ]
    .iter()
    .fold(1, |product: u64, &n| product.saturating_mul(n as u64))
}

/// What a rank's weights weigh, and the part of them that a step reads and multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightCount {
    /// Matrices and vectors.
    pub matrices: usize,
    /// All bytes.
    pub bytes: u64,
    /// Bytes that a step does not read whole: an embedding that is not the head as well gives one row per token.
    pub lookup_bytes: u64,
    /// Matrix elements that every token of a step is multiplied with.
    pub layer_elements: u64,
    /// Matrix elements that every row of logits is multiplied with.
    pub head_elements: u64,
}

impl WeightCount {
    /// Counts from the declared rules ([`Shard::matrices`]); layers are alike, so one is counted for all.
    pub fn new(config: &ModelConfig, shard: &Shard, dtype: Dtype) -> WeightCount {
        let one_layer = ModelConfig {
            n_layers: 1,
            ..config.clone()
        };
        let (layer, global): (Vec<_>, Vec<_>) = shard
            .matrices(&one_layer, dtype)
            .into_iter()
            .partition(|m| m.name.starts_with("layers."));
        let elements = |m: &LocalMatrix| m.rows as u64 * m.cols as u64;
        let bytes = |all: &[LocalMatrix]| -> u64 {
            all.iter()
                .map(|m| elements(m) * m.dtype.size() as u64)
                .sum()
        };
        let embed_bytes = global
            .iter()
            .find(|m| m.name == "embed")
            .map_or(0, |m| bytes(std::slice::from_ref(m)));
        let n_layers = config.n_layers as u64;
        WeightCount {
            matrices: global.len() + config.n_layers * layer.len(),
            bytes: bytes(&global) + n_layers * bytes(&layer),
            lookup_bytes: if config.tie_word_embeddings {
                0
            } else {
                embed_bytes
            },
            layer_elements: n_layers
                * layer
                    .iter()
                    .filter(|m| m.cols > 1)
                    .map(elements)
                    .sum::<u64>(),
            head_elements: shard.vocab.len() as u64 * config.hidden_size as u64,
        }
    }
}

/// Bytes of one rank by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RankBytes {
    /// Weights, the replicated vectors included.
    pub weights: u64,
    /// KV cache.
    pub kv: u64,
    /// Step arena.
    pub activations: u64,
    /// Device memory that offloaded weights stream through.
    pub ring: u64,
    /// Device memory that other ranks write into, and small tables.
    pub peer: u64,
    /// Device memory that the driver and the libraries take.
    pub runtime: u64,
    /// Pinned host memory on the way to and from the GPU.
    pub staging: u64,
    /// Their sum.
    pub total: u64,
}

impl RankBytes {
    /// A CPU rank's; a sum that 64 bits cannot hold stays at `u64::MAX`.
    pub fn new(weights: u64, kv: u64, activations: u64) -> RankBytes {
        let bytes = RankBytes {
            weights,
            kv,
            activations,
            ..RankBytes::default()
        };
        bytes.summed()
    }

    /// The same with its sum.
    pub(super) fn summed(self) -> RankBytes {
        let total = self
            .parts()
            .iter()
            .fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        RankBytes { total, ..self }
    }

    /// What the bytes are for, in words.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights),
            ("KV cache", self.kv),
            ("buffers", self.activations),
            ("ring", self.ring),
            ("peer memory", self.peer),
            ("runtime", self.runtime),
            ("staging", self.staging),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SHAPES, named_shape};

    #[test]
    fn one_layer_counted_for_all_equals_every_matrix_counted() {
        for name in SHAPES {
            let c = named_shape(name).unwrap();
            for tp_size in [1, 3, 8] {
                let shard = Shard::new(&c, tp_size, tp_size - 1);
                let all = shard.matrices(&c, Dtype::Bf16);
                let count = WeightCount::new(&c, &shard, Dtype::Bf16);
                assert_eq!(count.matrices, all.len(), "{name}");
                assert_eq!(
                    count.bytes,
                    all.iter().map(|m| m.bytes() as u64).sum::<u64>(),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn the_72b_model_weighs_what_its_parameter_count_says() {
        let c = named_shape("qwen2.5-72b").unwrap();
        // By hand: 72 706 203 648 parameters at 2 bytes, and the vectors (norms 2 × 80 + 1 of 8192, biases 80 of
        // 10240) at 4 instead.
        let vectors = 161 * 8192 + 80 * 10240;
        let whole = 2 * 72_706_203_648 + 2 * vectors;
        assert_eq!(
            WeightCount::new(&c, &Shard::new(&c, 1, 0), Dtype::Bf16).bytes,
            whole
        );
        // Two ranks halve everything but the norms, which both hold. 231 units of 128 features cannot be halved: 116
        // and 115, a difference of one unit in 80 layers × 3 matrices; 2376 units of vocabulary can.
        let unit = 80 * 3 * 128 * 8192 * 2;
        let rank = |r| WeightCount::new(&c, &Shard::new(&c, 2, r), Dtype::Bf16).bytes;
        let norms = 161 * 8192 * 4;
        assert_eq!(rank(0) + rank(1), whole + norms);
        assert_eq!(rank(0).abs_diff(rank(1)), unit);
        assert!(
            rank(0).abs_diff(72_700_000_000) < 400_000_000
                && rank(1).abs_diff(72_700_000_000) < 400_000_000
        );
        // A token reads all but the embedding: 142.9 GB.
        let count = WeightCount::new(&c, &Shard::new(&c, 1, 0), Dtype::Bf16);
        assert_eq!(count.lookup_bytes, 152_064 * 8192 * 2);
        assert_eq!((count.bytes - count.lookup_bytes) / 100_000_000, 1429);
        // With the head, the matrices are all parameters but the vectors and the embedding.
        assert_eq!(
            count.layer_elements + 2 * count.head_elements,
            72_706_203_648 - vectors
        );
    }

    #[test]
    fn kv_blocks_weigh_what_the_shape_says() {
        let c = named_shape("qwen2.5-7b").unwrap();
        let shard = Shard::new(&c, 2, 1);
        // 28 layers × K and V × 2 local heads × 16 tokens × 128 × 2 bytes
        assert_eq!(kv_bytes_per_block(&c, &shard, DeviceKind::Cuda), 458_752);
        assert_eq!(kv_bytes_per_block(&c, &shard, DeviceKind::Cpu), 917_504);
    }

    #[test]
    fn the_arena_has_the_shapes_of_the_forward_pass() {
        let c = named_shape("qwen3-0.6b").unwrap();
        let buffers = step_buffers(&c, &Shard::new(&c, 2, 0), DeviceKind::Cpu, 512, 4);
        let shapes: Vec<_> = buffers.iter().map(|b| (b.name, b.rows, b.cols)).collect();
        let expected = [
            ("x", 512, 1024),
            ("h", 512, 1024),
            ("qkv", 512, (8 + 2 * 4) * 128),
            ("q", 512, 1024),
            ("attn", 512, 1024),
            ("partial", 512, 1024),
            ("mlp", 512, 1536),
            ("logits", 4, 151_936),
            ("logits_local", 4, 75_968),
        ];
        assert_eq!(shapes, expected);
        assert_eq!(buffers[0].bytes(), 512 * 1024 * 4);
        let on_gpu = step_buffers(&c, &Shard::new(&c, 2, 0), DeviceKind::Cuda, 512, 4);
        assert_eq!(on_gpu[0].bytes(), 512 * 1024 * 2);
        assert_eq!(on_gpu[7].bytes(), 4 * 151_936 * 4);
    }
}
