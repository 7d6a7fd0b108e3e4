//! The published dense Qwen shapes by name, for `tandem plan` and benchmarks without files.

use super::{Family, ModelConfig, Rope};
use crate::weights::Dtype;

/// One row of the table: name, hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, tied, positions.
type Row = (
    &'static str,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    bool,
    usize,
);

/// From the `config.json` of each published checkpoint.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("qwen2.5-0.5b",  896,  4864, 24, 14,  2,  64, 151936, true,  32768),
    ("qwen2.5-1.5b", 1536,  8960, 28, 12,  2, 128, 151936, true,  32768),
    ("qwen2.5-3b",   2048, 11008, 36, 16,  2, 128, 151936, true,  32768),
    ("qwen2.5-7b",   3584, 18944, 28, 28,  4, 128, 152064, false, 32768),
    ("qwen2.5-14b",  5120, 13824, 48, 40,  8, 128, 152064, false, 32768),
    ("qwen2.5-32b",  5120, 27648, 64, 40,  8, 128, 152064, false, 32768),
    ("qwen2.5-72b",  8192, 29568, 80, 64,  8, 128, 152064, false, 32768),
    ("qwen3-0.6b",   1024,  3072, 28, 16,  8, 128, 151936, true,  40960),
    ("qwen3-1.7b",   2048,  6144, 28, 16,  8, 128, 151936, true,  40960),
    ("qwen3-4b",     2560,  9728, 36, 32,  8, 128, 151936, true,  40960),
    ("qwen3-8b",     4096, 12288, 36, 32,  8, 128, 151936, false, 40960),
    ("qwen3-14b",    5120, 17408, 40, 40,  8, 128, 151936, false, 40960),
    ("qwen3-32b",    5120, 25600, 64, 64,  8, 128, 151936, false, 40960),
    ("smollm2-135m",  576,  1536, 30,  9,  3,  64,  49152, true,   8192),
];

/// The names that [`named_shape`] knows.
pub const SHAPES: [&str; TABLE.len()] = {
    let mut names = [""; TABLE.len()];
    let mut i = 0;
    while i < TABLE.len() {
        names[i] = TABLE[i].0;
        i += 1;
    }
    names
};

/// The configuration of a published model, by its name in lower case (`qwen2.5-72b`).
pub fn named_shape(name: &str) -> Option<ModelConfig> {
    let &(
        name,
        hidden_size,
        intermediate_size,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim,
        vocab_size,
        tied,
        positions,
    ) = TABLE.iter().find(|row| row.0 == name)?;
    let family = if name.starts_with("qwen3") {
        Family::Qwen3
    } else {
        Family::Qwen2
    };
    let theta = if name.starts_with("smollm2") {
        100_000.0
    } else {
        1_000_000.0
    };
    Some(ModelConfig {
        family,
        hidden_size,
        intermediate_size,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim,
        vocab_size,
        max_position_embeddings: positions,
        rms_norm_eps: if theta == 100_000.0 { 1e-5 } else { 1e-6 },
        tie_word_embeddings: tied,
        qkv_bias: family == Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        rope: Rope { theta, yarn: None },
        dtype: Dtype::Bf16,
        eos_token_ids: Vec::new(),
    })
}
