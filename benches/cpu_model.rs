//! A whole model on the CPU: decode beside the memory's read bandwidth, prefill beside the multiply-add rate.
//!
//! ```text
//! cargo bench --bench cpu_model -- MODEL_DIR     (after launch/demo_model.sh models/smollm2: models/smollm2)
//! ```
//!
//! Prints one JSON object. `benches/peer_transformers.py MODEL_DIR` prints the same figures of transformers, and
//! `benches/compare_cpu.sh MODEL_DIR` runs both in turn and prints the ratios.

use serde_json::json;
use std::path::Path;
use std::time::Instant;
use tandem::comm::Solo;
use tandem::config::ModelConfig;
use tandem::cpu::{Pool, affinity_cpus, measure_fma_rate, measure_read_bandwidth, physical_cores};
use tandem::engine::{Entry, NewSequence, Replica, SamplingParams, StepPlan};
use tandem::layout::{Limits, Shard};
use tandem::model::{BlockPool, check_tensors};
use tandem::session::{Place, load_rank};
use tandem::weights::{Checkpoint, LocalMatrix, Source};

const PREFILL_TOKENS: usize = 512;
const DECODE_PROMPT: usize = 32;
const DECODE_TOKENS: usize = 64;
const REPEATS: usize = 5;
/// Much larger than any cache.
const READ_BYTES: usize = 1 << 30;

type Cpu = Replica<tandem::cpu::CpuBackend>;

fn main() -> tandem::Result<()> {
    let Some(dir) = std::env::args().skip(1).find(|a| !a.starts_with("--")) else {
        eprintln!("usage: cargo bench --bench cpu_model -- MODEL_DIR");
        return Ok(());
    };
    let dir = Path::new(&dir);
    let mut config = ModelConfig::from_dir(dir)?;
    let mut checkpoint = Checkpoint::open(dir)?;
    let dtype = check_tensors(&mut config, &mut checkpoint)?;
    let shard = Shard::new(&config, 1, 0);
    let cores = physical_cores(&affinity_cpus());
    let limits = Limits {
        max_step_tokens: PREFILL_TOKENS,
        max_logit_rows: 1,
        n_kv_blocks: 64,
    };

    let ceilings = Pool::new(&cores)?;
    let place = Place {
        shard: &shard,
        limits,
        pool: Pool::new(&cores)?,
        comm: Box::new(Solo),
    };
    let mut rank = load_rank(
        &config,
        Source::Checkpoint(&checkpoint),
        dtype,
        place,
        config.vocab_size,
    )?;
    let weight_bytes = step_bytes(&shard.matrices(&config, dtype), config.tie_word_embeddings);
    let operations = prefill_operations(&config);

    prefill(&mut rank, PREFILL_TOKENS)?;
    // A shared machine's speed drifts: each figure is held against the ceiling measured just before it.
    let mut rounds = Vec::with_capacity(REPEATS);
    for _ in 0..REPEATS {
        let read_gbs = measure_read_bandwidth(&ceilings, READ_BYTES);
        let decode_s = decode(&mut rank)?;
        let fma_gflops = measure_fma_rate(&ceilings);
        let prefill_s = prefill(&mut rank, PREFILL_TOKENS)?;
        rounds.push(Round {
            read_gbs,
            decode_s,
            fma_gflops,
            prefill_s,
        });
    }
    let decode_gbs = |r: &Round| weight_bytes as f64 / r.decode_s / 1e9;
    let prefill_gflops = |r: &Round| operations / r.prefill_s / 1e9;
    let report = json!({
        "threads": cores.len(),
        "read_gbs": median(&rounds, |r| r.read_gbs),
        "decode_tpot_ms": median(&rounds, |r| r.decode_s * 1e3),
        "decode_gbs": median(&rounds, decode_gbs),
        "decode_of_read_bandwidth": median(&rounds, |r| decode_gbs(r) / r.read_gbs),
        "fma_gflops": median(&rounds, |r| r.fma_gflops),
        "prefill_ttft_ms": median(&rounds, |r| r.prefill_s * 1e3),
        "prefill_gflops": median(&rounds, prefill_gflops),
        "prefill_of_fma_rate": median(&rounds, |r| prefill_gflops(r) / r.fma_gflops),
    });
    println!("{report:#}");
    Ok(())
}

/// Weight bytes that one decode step reads: all but the rows of an untied embedding.
fn step_bytes(matrices: &[LocalMatrix], tied: bool) -> usize {
    matrices
        .iter()
        .filter(|m| tied || m.name != "embed")
        .map(LocalMatrix::bytes)
        .sum()
}

/// Multiplications and additions of a prefill whose last token alone meets the head.
fn prefill_operations(c: &ModelConfig) -> f64 {
    let (h, q, kv) = (
        c.hidden_size,
        c.n_heads * c.head_dim,
        c.n_kv_heads * c.head_dim,
    );
    let layer = h * (2 * q + 2 * kv) + 3 * h * c.intermediate_size;
    // Causal: half of the square, for scores and for values.
    let attention = PREFILL_TOKENS * PREFILL_TOKENS * q;
    2.0 * (c.n_layers * (PREFILL_TOKENS * layer + attention) + c.vocab_size * h) as f64
}

/// What one round measured.
struct Round {
    read_gbs: f64,
    decode_s: f64,
    fma_gflops: f64,
    prefill_s: f64,
}

fn median(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> f64 {
    let mut figures: Vec<f64> = rounds.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn begin(rank: &mut Cpu, n_tokens: usize) -> tandem::Result<()> {
    let prompt = (0..n_tokens as u32).map(|i| i * 7919 % 40_000).collect();
    let blocks = (0..BlockPool::blocks_for(n_tokens + DECODE_TOKENS) as u32).collect();
    let new = NewSequence {
        id: 0,
        prompt,
        sampling: SamplingParams::greedy(),
        blocks,
    };
    let entries = vec![Entry {
        id: 0,
        n_tokens: n_tokens as u32,
    }];
    rank.step(&StepPlan {
        dropped: vec![0],
        admitted: vec![new],
        entries,
    })
    .map(drop)
}

/// Seconds from a prompt to its next token.
fn prefill(rank: &mut Cpu, n_tokens: usize) -> tandem::Result<f64> {
    let start = Instant::now();
    begin(rank, n_tokens)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Median seconds of a token after a short prompt.
fn decode(rank: &mut Cpu) -> tandem::Result<f64> {
    begin(rank, DECODE_PROMPT)?;
    let step = StepPlan {
        entries: vec![Entry { id: 0, n_tokens: 1 }],
        ..StepPlan::default()
    };
    let mut times = Vec::with_capacity(DECODE_TOKENS);
    for _ in 0..DECODE_TOKENS {
        let start = Instant::now();
        rank.step(&step)?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
