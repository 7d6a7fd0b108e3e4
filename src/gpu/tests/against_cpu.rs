//! The GPU path against the CPU ranks, whose kernels are other code and which keep activations in f32, on random models
//! with the published shapes' heads and widths; and how fast a GPU runs one of them.

use super::super::cache::Cache;
use super::super::cuda::Cuda;
use super::*;
use crate::config::{SHAPES, named_shape};
use crate::cpu::Pool;
use crate::session::{Place, load_rank as load_cpu_rank};
use crate::weights::Dtype;
use std::time::Instant;

/// Logits of at most this many rows of a step are compared.
const ROWS: usize = 16;

/// How far all rows may be from the CPU ranks' (which are within 3e-6 of float32): no further than transformers' own bf16
/// run of the same weights is from its float32 run. That is 0.0070 to 0.0078 of models with one layer and 0.0102 to
/// 0.0165 with four (transformers 5.17 on a CPU; the shapes below 7B, 1 to 700 tokens), growing with the width: 0.033 of
/// 72B's, cut alike, with weights of transformers' own (tests/numerics.py).
const ONE_LAYER: f64 = 0.0075;
const FOUR_LAYERS: f64 = 0.018;
const FOUR_WIDE_LAYERS: f64 = 0.03;

/// A single row may be somewhat further off than all together.
fn is_within((worst, all): (f64, f64), limit: f64) -> bool {
    worst < 1.5 * limit && all < limit
}

/// Tokens `from..to` of a made-up sequence whose blocks lie backwards in a cache of `n_blocks`.
pub(super) fn piece(config: &ModelConfig, from: usize, to: usize, n_blocks: usize) -> Batch {
    let id = |p: u32| p.wrapping_mul(2_654_435_761) % config.vocab_size as u32;
    let len = to - from;
    Batch {
        tokens: (from as u32..to as u32).map(id).collect(),
        positions: (from as u32..to as u32).collect(),
        seqs: vec![BatchSeq {
            start: 0,
            len,
            context_len: to,
            blocks: (0..to.div_ceil(KV_BLOCK))
                .map(|i| (n_blocks - 1 - i) as u32)
                .collect(),
        }],
        logit_rows: (len.saturating_sub(ROWS)..len).map(|r| r as u32).collect(),
        draws: Vec::new(),
    }
}

/// A prompt in one chunk and then `decoded` tokens, on both; the worst row and all rows, as [`distance`] has them.
fn against_cpu(config: &ModelConfig, parts: Parts, prompt: usize, decoded: usize) -> (f64, f64) {
    let n_blocks = (prompt + decoded).div_ceil(KV_BLOCK);
    let shard = Shard::new(config, 1, 0);
    let limits = Limits {
        max_step_tokens: prompt,
        max_logit_rows: ROWS,
        n_kv_blocks: n_blocks,
    };
    let source = Source::Random { seed: 1 };
    let place = Place {
        shard: &shard,
        limits: Limits {
            max_step_tokens: prompt,
            max_logit_rows: ROWS,
            n_kv_blocks: n_blocks,
        },
        pool: Pool::sharing(&crate::cpu::physical_cores(&crate::cpu::affinity_cpus())).unwrap(),
        comm: Box::new(crate::comm::Solo),
    };
    let mut cpu = load_cpu_rank(config, source, Dtype::Bf16, place, config.vocab_size).unwrap();
    let gpu = load_rank(
        config,
        source,
        Dtype::Bf16,
        &shard,
        limits,
        parts,
        Host::default(),
        4,
        &|_| {},
    );
    let mut gpu = Rank::of(gpu.unwrap());
    let (mut got, mut want) = (Vec::new(), Vec::new());
    let mut from = 0;
    for to in std::iter::once(prompt).chain(prompt + 1..=prompt + decoded) {
        let batch = piece(config, from, to, n_blocks);
        got.extend(gpu.step(&batch).unwrap());
        want.extend_from_slice(cpu.forward(&batch).unwrap());
        from = to;
    }
    distance(&got, &want, config.vocab_size)
}

pub(super) fn cut(shape: &str, n_layers: usize, vocab_size: usize) -> ModelConfig {
    ModelConfig {
        n_layers,
        vocab_size,
        ..named_shape(shape).unwrap()
    }
}

#[test]
fn published_heads_and_widths_agree_with_the_cpu_ranks() {
    // At 200 tokens attention's average over values is so small that any error common to all of them would show.
    for (shape, prompt) in [
        ("smollm2-135m", 200),
        ("qwen2.5-0.5b", 70),
        ("qwen3-0.6b", 20),
    ] {
        let config = cut(shape, 1, 512);
        let parts = Parts::standin(&Arc::new(Standin::new(Options::default())), None, 0).unwrap();
        let (worst, all) = against_cpu(&config, parts, prompt, 3);
        println!("{shape}: worst row {worst:.4}, all rows {all:.4}");
        assert!(
            is_within((worst, all), ONE_LAYER),
            "{shape}: {worst:.4} {all:.4}"
        );
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_agrees_with_the_cpu_ranks() {
    let mut failed = Vec::new();
    for shape in SHAPES {
        let config = cut(shape, 4, 4096);
        for (prompt, decoded) in [(1, 8), (17, 8), (700, 8)] {
            let parts = Parts::cuda(Cuda::open(0, Cache::of_user()).unwrap(), None, 0).unwrap();
            let (worst, all) = against_cpu(&config, parts, prompt, decoded);
            let line =
                format!("{shape} {prompt} + {decoded}: worst row {worst:.4}, all rows {all:.4}");
            println!("{line}");
            let limit = match config.hidden_size {
                ..=2048 => FOUR_LAYERS,
                _ => FOUR_WIDE_LAYERS,
            };
            if !is_within((worst, all), limit) {
                failed.push(line);
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Prints rather than judges: what a step takes from `begin` to the logits on the host.
#[test]
#[ignore = "needs a GPU"]
fn gpu_speed_of_the_7b_shape() {
    let config = named_shape("qwen2.5-7b").unwrap();
    let n_blocks = (4096 + 256) / KV_BLOCK;
    let limits = Limits {
        max_step_tokens: 4096,
        max_logit_rows: ROWS,
        n_kv_blocks: n_blocks,
    };
    let parts = Parts::cuda(Cuda::open(0, Cache::of_user()).unwrap(), None, 0).unwrap();
    let shard = Shard::new(&config, 1, 0);
    let source = Source::Random { seed: 1 };
    let loaded = load_rank(
        &config,
        source,
        Dtype::Bf16,
        &shard,
        limits,
        parts,
        Host::default(),
        16,
        &|_| {},
    )
    .unwrap();
    println!(
        "loaded {:.1} GB in {:.1} s",
        loaded.stats.bytes_placed as f64 / 1e9,
        loaded.stats.seconds
    );
    let bytes =
        loaded.stats.bytes_placed as f64 - (config.vocab_size * config.hidden_size * 2) as f64;
    let mut rank = Rank::of(loaded);
    let mut timed = |from: usize, to: usize| {
        let mut batch = piece(&config, from, to, n_blocks);
        batch.logit_rows = vec![(to - from) as u32 - 1];
        let start = Instant::now();
        rank.step(&batch).unwrap();
        start.elapsed().as_secs_f64() * 1e3
    };
    for n in [1024, 4096] {
        timed(0, n);
        println!(
            "prefill of {n}: {:.2} ms",
            (0..3).map(|_| timed(0, n)).fold(f64::MAX, f64::min)
        );
    }
    for context in [1024, 4096] {
        let mut steps: Vec<f64> = (0..128)
            .map(|i| timed(context + i, context + i + 1))
            .skip(8)
            .collect();
        steps.sort_by(f64::total_cmp);
        let median = steps[steps.len() / 2];
        println!(
            "decode at context {context}: {median:.3} ms a token, {:.0} GB/s of weights",
            bytes / median / 1e6
        );
    }
}
