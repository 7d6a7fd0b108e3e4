//! The buffers of a step on the device: what the plan counts and the arena allocates is one list.

use super::cache::KV_BLOCK;
use super::geometry::Geometry;

/// What a backend's step buffers and cache are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a step.
    pub max_step_tokens: usize,
    /// Rows of logits of a step.
    pub max_logit_rows: usize,
    /// Blocks of the KV cache.
    pub n_kv_blocks: usize,
}

/// A device draws from this many of the most likely tokens.
pub const CANDIDATES: usize = 64;

/// Words of a draw in a step's description.
pub const DRAW_WORDS: usize = 8;

/// Keys that a block of `candidates.cu` looks through.
const CANDIDATES_BLOCK: usize = 1024;

/// Every buffer begins at a multiple of this.
const ALIGN: usize = 256;
/// cublasLt's scratch memory: what NVIDIA recommends for Hopper.
pub const WORKSPACE: usize = 32 << 20;

/// The step buffers of one rank, in bytes; `plan` counts with the same list that the arena is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepBuffers {
    list: Vec<(&'static str, usize)>,
}

impl StepBuffers {
    /// The list for a rank; `sm_count` and `workspace` are the device's.
    pub fn new(g: &Geometry, limits: &Limits, sm_count: usize, workspace: usize) -> StepBuffers {
        let (t, s) = (limits.max_step_tokens, limits.max_logit_rows);
        let (bf16, f32) = (2, 4);
        let logits = g.vocab.iter().sum::<usize>() * s * f32;
        let gathered = if g.vocab.len() > 1 { logits } else { 0 };
        let parts = attention_parts(g, t, sm_count) * g.n_heads;
        let [even, odd] = candidate_bytes(g.vocab_local(), s);
        let gathered_lists = if gathered > 0 {
            8 * CANDIDATES * s * g.vocab.len()
        } else {
            0
        };
        let list = vec![
            ("x", t * g.hidden * f32),
            ("h", t * g.hidden * bf16),
            ("q", t * g.q_width() * bf16),
            ("attn", t * g.q_width() * bf16),
            ("mlp", t * g.padded_inter * bf16),
            ("partial", t * g.hidden * bf16),
            ("logits", if gathered > 0 { gathered } else { logits }),
            (
                "logits_local",
                if gathered > 0 {
                    g.vocab_local() * s * f32
                } else {
                    0
                },
            ),
            // The q/k/v product and the gate and up products are never needed at the same time.
            (
                "product",
                t * (g.qkv_width() * f32).max(2 * g.padded_inter * bf16),
            ),
            ("wanted", s * g.q_width().max(2 * g.hidden) * bf16),
            ("part", parts * g.padded_head_dim * f32),
            ("part_ml", parts * 2 * f32),
            ("sample_parts", 3 * s * sample_parts(g.vocab_local()) * 4),
            ("sample_local", 3 * s * 4),
            ("sample_ranks", 3 * s * g.vocab.len() * 4),
            ("chosen", chosen_bytes(limits)),
            ("history", limits.n_kv_blocks * KV_BLOCK * 4),
            ("candidates_even", even),
            ("candidates_odd", odd),
            ("candidates_ranks", gathered_lists),
            ("batch", batch_words(limits) * 4),
            ("workspace", workspace),
        ];
        StepBuffers { list }
    }

    /// Bytes of all, with their padding.
    pub fn bytes(&self) -> usize {
        self.list
            .iter()
            .map(|(_, bytes)| bytes.next_multiple_of(ALIGN))
            .sum()
    }

    /// Name and first byte of each.
    pub fn offsets(&self) -> impl Iterator<Item = (&'static str, usize)> + '_ {
        self.list.iter().scan(0, |at, &(name, bytes)| {
            let begin = *at;
            *at += bytes.next_multiple_of(ALIGN);
            Some((name, begin))
        })
    }

    /// Name and bytes of each.
    pub fn list(&self) -> &[(&'static str, usize)] {
        &self.list
    }
}

/// Parts into which the cached tokens of one sequence are cut, at most, to fill the device in a decode step.
pub fn max_splits(g: &Geometry, sm_count: usize) -> usize {
    (sm_count / g.n_kv_heads.max(1)).max(1)
}

/// Parts in which `sample.cu` looks through a row of `n` logits.
pub fn sample_parts(n: usize) -> usize {
    n.div_ceil(1024)
}

/// Token, its logit, the largest logit and the sum of exp(logit - that one) of each row, as chosen: four arrays of 32-bit words.
pub fn chosen_bytes(limits: &Limits) -> usize {
    4 * limits.max_logit_rows * 4
}

/// Such parts of all sequences together that one decode step may have.
pub fn attention_parts(g: &Geometry, max_seqs: usize, sm_count: usize) -> usize {
    max_splits(g, sm_count) + max_seqs
}

/// 32-bit words of a step's description: tokens, positions, slots, sequences of four words each, wanted rows, the block
/// tables back to back, and behind a gap the draws.
pub fn batch_words(limits: &Limits) -> usize {
    let draws = 4 + DRAW_WORDS * limits.max_logit_rows;
    7 * limits.max_step_tokens + limits.max_logit_rows + limits.n_kv_blocks + draws
}

/// Lists that a row of `n` entries is cut into.
pub fn lists(n: usize) -> usize {
    n.div_ceil(CANDIDATES_BLOCK)
}

/// Bytes of the two buffers that take turns while one rank's row of `n` logits is looked through, for `rows` of them.
pub fn candidate_bytes(n: usize, rows: usize) -> [usize; 2] {
    let first = lists(n).max(1);
    [first, lists(first * CANDIDATES)].map(|lists| lists * CANDIDATES * 8 * rows)
}
