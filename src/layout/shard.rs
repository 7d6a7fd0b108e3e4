//! Which slice of every weight a rank holds: the rule of each weight, declared once, as data.
//!
//! A weight is `[out, in]`, and each of its two sides is an [`Axis`]. Query heads, KV heads, intermediate features and
//! vocabulary rows are divided among the ranks, everything else is whole everywhere. So a weight with a divided
//! `out` is column-parallel, one with a divided `in` is row-parallel and its product a partial sum that an all-reduce
//! completes (Megatron-LM, arXiv 1909.08053).

use crate::config::ModelConfig;
use crate::weights::{Dtype, LocalMatrix, Part};
use serde::Serialize;
use std::ops::Range;

/// Multiples in which intermediate features are handed out, so that no rank gets a ragged tile.
pub const INTERMEDIATE_UNIT: usize = 128;
/// Multiples in which vocabulary rows are handed out.
pub const VOCAB_UNIT: usize = 64;

/// One side of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// The residual stream; never divided.
    Hidden,
    /// Query heads × `head_dim`.
    Heads,
    /// Key/value heads × `head_dim`.
    KvHeads,
    /// MLP features.
    Intermediate,
    /// Vocabulary rows.
    Vocab,
    /// One head's width; never divided.
    HeadDim,
    /// The second side of a vector.
    One,
}

/// How a weight is divided among the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// Each rank computes some of the outputs.
    Column,
    /// Each rank multiplies some of the inputs; the results are summed over ranks.
    Row,
    /// Each rank holds some rows of the vocabulary.
    Vocab,
    /// Every rank holds all of it.
    Replicated,
}

/// A tensor of the checkpoint: its name (after the layer's prefix, for a layer's) and its two sides.
#[derive(Debug)]
pub struct Tensor {
    /// Name in the checkpoint.
    pub name: &'static str,
    /// Output side.
    pub out: Axis,
    /// Input side.
    pub input: Axis,
}

/// A local matrix: tensors whose slices lie one under the other, because one product serves them all.
#[derive(Debug)]
pub struct Weight {
    /// Local name (after the layer's prefix, for a layer's).
    pub name: &'static str,
    /// Its tensors, top to bottom.
    pub tensors: &'static [Tensor],
    /// Which models have it.
    pub when: fn(&ModelConfig) -> bool,
}

const fn tensor(name: &'static str, out: Axis, input: Axis) -> Tensor {
    Tensor { name, out, input }
}

const fn weight(
    name: &'static str,
    tensors: &'static [Tensor],
    when: fn(&ModelConfig) -> bool,
) -> Weight {
    Weight {
        name,
        tensors,
        when,
    }
}

const fn always(_: &ModelConfig) -> bool {
    true
}

/// The weights outside the layers.
#[rustfmt::skip]
pub const GLOBAL: &[Weight] = &[
    weight("embed", &[tensor("model.embed_tokens.weight", Axis::Vocab, Axis::Hidden)], always),
    weight("norm", &[tensor("model.norm.weight", Axis::Hidden, Axis::One)], always),
    weight("head", &[tensor("lm_head.weight", Axis::Vocab, Axis::Hidden)], |c| !c.tie_word_embeddings),
];

/// The weights of one layer; names follow `model.layers.N.` in the checkpoint and `layers.N.` here.
#[rustfmt::skip]
pub const LAYER: &[Weight] = &[
    weight("input_norm", &[tensor("input_layernorm.weight", Axis::Hidden, Axis::One)], always),
    weight("qkv", &[
        tensor("self_attn.q_proj.weight", Axis::Heads, Axis::Hidden),
        tensor("self_attn.k_proj.weight", Axis::KvHeads, Axis::Hidden),
        tensor("self_attn.v_proj.weight", Axis::KvHeads, Axis::Hidden),
    ], always),
    weight("qkv_bias", &[
        tensor("self_attn.q_proj.bias", Axis::Heads, Axis::One),
        tensor("self_attn.k_proj.bias", Axis::KvHeads, Axis::One),
        tensor("self_attn.v_proj.bias", Axis::KvHeads, Axis::One),
    ], |c| c.qkv_bias),
    weight("q_norm", &[tensor("self_attn.q_norm.weight", Axis::HeadDim, Axis::One)], |c| c.qk_norm),
    weight("k_norm", &[tensor("self_attn.k_norm.weight", Axis::HeadDim, Axis::One)], |c| c.qk_norm),
    weight("o", &[tensor("self_attn.o_proj.weight", Axis::Hidden, Axis::Heads)], always),
    weight("post_norm", &[tensor("post_attention_layernorm.weight", Axis::Hidden, Axis::One)], always),
    weight("gate_up", &[
        tensor("mlp.gate_proj.weight", Axis::Intermediate, Axis::Hidden),
        tensor("mlp.up_proj.weight", Axis::Intermediate, Axis::Hidden),
    ], always),
    weight("down", &[tensor("mlp.down_proj.weight", Axis::Hidden, Axis::Intermediate)], always),
];

impl Tensor {
    /// The rule that follows from the two sides.
    pub fn rule(&self) -> Rule {
        match (self.out, self.input) {
            (Axis::Vocab, _) => Rule::Vocab,
            (Axis::Heads | Axis::KvHeads | Axis::Intermediate, _) => Rule::Column,
            (_, Axis::Heads | Axis::KvHeads | Axis::Intermediate) => Rule::Row,
            _ => Rule::Replicated,
        }
    }
}

/// What one rank holds of every divided axis; ranges count heads, features and rows of the full model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shard {
    /// This rank.
    pub tp_rank: usize,
    /// All ranks.
    pub tp_size: usize,
    /// Query heads.
    pub heads: Range<usize>,
    /// Key/value heads; several ranks hold the same one when there are more ranks than heads.
    pub kv_heads: Range<usize>,
    /// MLP features.
    pub intermediate: Range<usize>,
    /// Vocabulary rows.
    pub vocab: Range<usize>,
}

impl Shard {
    /// The shard of `tp_rank` out of `tp_size`, for any size: a rank may also hold no head or no feature at all.
    ///
    /// Heads go out by KV group, so that on every rank each local KV head serves equally many local query heads
    /// (`n_heads_local / n_kv_heads_local`), whole groups while there are enough, then parts of one group.
    pub fn new(config: &ModelConfig, tp_size: usize, tp_rank: usize) -> Shard {
        assert!(tp_rank < tp_size, "rank {tp_rank} of {tp_size}");
        let (heads, kv_heads) = heads(config, tp_size, tp_rank);
        Shard {
            tp_rank,
            tp_size,
            heads,
            kv_heads,
            intermediate: in_units(
                config.intermediate_size,
                INTERMEDIATE_UNIT,
                tp_size,
                tp_rank,
            ),
            vocab: in_units(config.vocab_size, VOCAB_UNIT, tp_size, tp_rank),
        }
    }

    /// Query heads on this rank.
    pub fn n_heads_local(&self) -> usize {
        self.heads.len()
    }

    /// Key/value heads on this rank.
    pub fn n_kv_heads_local(&self) -> usize {
        self.kv_heads.len()
    }

    /// Elements of `axis` in the full model and the part of them on this rank.
    pub fn extent(&self, config: &ModelConfig, axis: Axis) -> (usize, Range<usize>) {
        let scaled = |r: &Range<usize>, unit: usize| r.start * unit..r.end * unit;
        let d = config.head_dim;
        match axis {
            Axis::Hidden => (config.hidden_size, 0..config.hidden_size),
            Axis::Heads => (config.n_heads * d, scaled(&self.heads, d)),
            Axis::KvHeads => (config.n_kv_heads * d, scaled(&self.kv_heads, d)),
            Axis::Intermediate => (config.intermediate_size, self.intermediate.clone()),
            Axis::Vocab => (config.vocab_size, self.vocab.clone()),
            Axis::HeadDim => (d, 0..d),
            Axis::One => (1, 0..1),
        }
    }

    /// Every matrix and vector of this rank, in the order of the forward pass. Vectors are kept in f32.
    pub fn matrices(&self, config: &ModelConfig, dtype: Dtype) -> Vec<LocalMatrix> {
        let of = |weights: &'static [Weight], theirs: String, ours: String| {
            weights
                .iter()
                .filter(|w| (w.when)(config))
                .map(move |w| self.local_matrix(config, dtype, w, &theirs, &ours))
        };
        let layers = (0..config.n_layers)
            .flat_map(|l| of(LAYER, format!("model.layers.{l}."), format!("layers.{l}.")));
        let (embed, rest) = GLOBAL.split_at(1);
        of(embed, String::new(), String::new())
            .chain(layers)
            .chain(of(rest, String::new(), String::new()))
            .collect()
    }

    fn local_matrix(
        &self,
        c: &ModelConfig,
        dtype: Dtype,
        w: &Weight,
        theirs: &str,
        ours: &str,
    ) -> LocalMatrix {
        let mut rows = 0;
        let parts: Vec<Part> = w
            .tensors
            .iter()
            .map(|t| {
                let (full_rows, row_range) = self.extent(c, t.out);
                let (full_cols, col_range) = self.extent(c, t.input);
                let dst_row = rows;
                rows += row_range.len();
                let tensor = format!("{theirs}{}", t.name);
                Part {
                    tensor,
                    shape: [full_rows, full_cols],
                    rows: row_range,
                    cols: col_range,
                    dst_row,
                }
            })
            .collect();
        let cols = parts[0].cols.len();
        let is_vector = w.tensors[0].input == Axis::One;
        let dtype = if is_vector { Dtype::F32 } else { dtype };
        LocalMatrix {
            name: format!("{ours}{}", w.name),
            rows,
            cols,
            dtype,
            parts,
        }
    }
}

/// The `index`-th of `of` parts of `n` things, sizes differing by at most one.
pub fn even(n: usize, of: usize, index: usize) -> Range<usize> {
    n * index / of..n * (index + 1) / of
}

fn heads(config: &ModelConfig, tp_size: usize, tp_rank: usize) -> (Range<usize>, Range<usize>) {
    let (n_kv, group) = (config.n_kv_heads, config.group_size());
    if tp_size <= n_kv {
        let kv = even(n_kv, tp_size, tp_rank);
        return (kv.start * group..kv.end * group, kv);
    }
    let kv_of = |rank: usize| rank * n_kv / tp_size;
    let kv = kv_of(tp_rank);
    let sharers = (0..tp_size).filter(|&r| kv_of(r) == kv);
    let (count, index) = sharers.fold((0, 0), |(n, i), r| {
        (n + 1, if r < tp_rank { i + 1 } else { i })
    });
    let part = even(group, count, index);
    if part.is_empty() {
        return (0..0, 0..0);
    }
    (kv * group + part.start..kv * group + part.end, kv..kv + 1)
}

/// Divides `n` features evenly in multiples of `unit`, or of the largest half, quarter … of it that leaves no rank
/// without; the last rank takes what is left over.
fn in_units(n: usize, unit: usize, tp_size: usize, tp_rank: usize) -> Range<usize> {
    let mut unit = unit;
    while unit > 1 && n.div_ceil(unit) < tp_size {
        unit /= 2;
    }
    let units = even(n.div_ceil(unit), tp_size, tp_rank);
    (units.start * unit).min(n)..(units.end * unit).min(n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SHAPES, named_shape};
    use proptest::prelude::*;

    /// Counts how often each (row, column) cell of a tensor is held, by the corner points that matter.
    fn coverage(shards: &[Shard], config: &ModelConfig, axis: Axis) -> Vec<usize> {
        let (full, _) = shards[0].extent(config, axis);
        let mut held = vec![0; full];
        for shard in shards {
            shard.extent(config, axis).1.for_each(|i| held[i] += 1);
        }
        held
    }

    fn any_config() -> impl Strategy<Value = ModelConfig> {
        (1usize..10, 1usize..9, 1usize..5, 1usize..700, 1usize..900).prop_map(
            |(kv, group, d, inter, vocab)| ModelConfig {
                n_kv_heads: kv,
                n_heads: kv * group,
                head_dim: 2 * d,
                intermediate_size: inter,
                vocab_size: vocab,
                hidden_size: 24,
                n_layers: 2,
                ..named_shape("qwen3-0.6b").unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn every_divided_element_is_held_once(config in any_config(), tp_size in 1usize..20) {
            let shards: Vec<_> = (0..tp_size).map(|r| Shard::new(&config, tp_size, r)).collect();
            for axis in [Axis::Heads, Axis::Intermediate, Axis::Vocab] {
                prop_assert!(coverage(&shards, &config, axis).iter().all(|&n| n == 1), "{axis:?}");
            }
            let held = coverage(&shards, &config, Axis::KvHeads);
            prop_assert!(held.iter().all(|&n| n >= 1));
            if tp_size <= config.n_kv_heads {
                prop_assert!(held.iter().all(|&n| n == 1));
            }
        }

        #[test]
        fn each_local_query_head_finds_its_kv_head(config in any_config(), tp_size in 1usize..20) {
            for rank in 0..tp_size {
                let s = Shard::new(&config, tp_size, rank);
                if s.heads.is_empty() {
                    prop_assert!(s.kv_heads.is_empty());
                    continue;
                }
                prop_assert_eq!(s.n_heads_local() % s.n_kv_heads_local(), 0);
                let local_group = s.n_heads_local() / s.n_kv_heads_local();
                for (local, head) in s.heads.clone().enumerate() {
                    prop_assert_eq!(s.kv_heads.start + local / local_group, head / config.group_size());
                }
            }
        }

        #[test]
        fn matrices_are_filled_by_their_parts(config in any_config(), tp_size in 1usize..9) {
            for rank in 0..tp_size {
                for m in Shard::new(&config, tp_size, rank).matrices(&config, Dtype::Bf16) {
                    let mut next = 0;
                    for p in &m.parts {
                        prop_assert_eq!(p.dst_row, next);
                        prop_assert_eq!(p.cols.len(), m.cols);
                        prop_assert!(p.rows.end <= p.shape[0] && p.cols.end <= p.shape[1]);
                        next += p.rows.len();
                    }
                    prop_assert_eq!(next, m.rows);
                }
            }
        }
    }

    #[test]
    fn the_published_shapes_divide_as_meant() {
        let sizes = |name: &str, tp: usize| -> Vec<(usize, usize, usize)> {
            let c = named_shape(name).unwrap();
            (0..tp)
                .map(|r| Shard::new(&c, tp, r))
                .map(|s| {
                    (
                        s.n_heads_local(),
                        s.n_kv_heads_local(),
                        s.intermediate.len(),
                    )
                })
                .collect()
        };
        // 29568 = 231 × 128 goes to 8 ranks as 28 or 29 units each.
        assert!(
            sizes("qwen2.5-72b", 8)
                .iter()
                .all(|s| s.0 == 8 && s.1 == 1 && s.2 % 128 == 0 && s.2 / 128 >= 28)
        );
        // 28 heads in 4 groups on 8 ranks: each KV head on two ranks, 3 + 4 query heads.
        assert_eq!(
            sizes("qwen2.5-7b", 8)
                .iter()
                .map(|s| s.0)
                .collect::<Vec<_>>(),
            [3, 4, 3, 4, 3, 4, 3, 4]
        );
        // 9 heads in 3 groups: uneven on 2 ranks, replicated on 4.
        assert_eq!(sizes("smollm2-135m", 2), [(3, 1, 768), (6, 2, 768)]);
        assert_eq!(
            sizes("smollm2-135m", 4)
                .iter()
                .map(|s| (s.0, s.1))
                .collect::<Vec<_>>(),
            [(1, 1), (2, 1), (3, 1), (3, 1)]
        );
    }

    #[test]
    fn one_rank_holds_exactly_the_model() {
        for name in SHAPES {
            let c = named_shape(name).unwrap();
            let held: u128 = Shard::new(&c, 1, 0)
                .matrices(&c, Dtype::Bf16)
                .iter()
                .map(|m| (m.rows * m.cols) as u128)
                .sum();
            assert_eq!(held, c.parameters(), "{name}");
        }
    }

    #[test]
    fn rules_follow_from_the_sides() {
        let rule = |name: &str| {
            let found = GLOBAL
                .iter()
                .chain(LAYER)
                .flat_map(|w| w.tensors)
                .find(|t| t.name == name);
            found.map(Tensor::rule)
        };
        assert_eq!(rule("self_attn.k_proj.bias"), Some(Rule::Column));
        assert_eq!(rule("self_attn.o_proj.weight"), Some(Rule::Row));
        assert_eq!(rule("mlp.down_proj.weight"), Some(Rule::Row));
        assert_eq!(rule("lm_head.weight"), Some(Rule::Vocab));
        assert_eq!(rule("input_layernorm.weight"), Some(Rule::Replicated));
    }
}
