//! The CPU kernels beside what the machine can do: memory read bandwidth for the streaming ones, the rate of fused
//! multiply-adds for the others, both measured in the same run.
//!
//! `cargo bench --bench cpu_kernels [FILTER]`; `TANDEM_ISA=avx2` takes another instruction set than the best one.

use criterion::{BenchmarkId, Criterion, Throughput};
use std::hint::black_box;
use std::time::Duration;
use tandem::cpu::{
    AttentionShape, Isa, Kernels, Matrix, Pool, SeqView, affinity_cpus, measure_fma_rate,
    measure_read_bandwidth, physical_cores,
};
use tandem::engine::sampler::{Sampler, SamplingParams, argmax, log_sum_exp};
use tandem::layout::KV_BLOCK;
use tandem::weights::Dtype;

/// (name, rows, cols): SmolLM2-135M's products, and one of Qwen2.5-7B's.
const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 960, 576),
    ("o", 576, 576),
    ("gate_up", 3072, 576),
    ("down", 576, 1536),
    ("7b_down", 3584, 18944),
];

fn pool() -> Pool {
    let isa = std::env::var("TANDEM_ISA").map_or(Isa::detect(), |s| s.parse().expect("TANDEM_ISA"));
    let pool = Pool::new(&physical_cores(&affinity_cpus())).and_then(|pool| pool.with_isa(isa));
    pool.expect("a pool on this machine")
}

/// bf16 numbers around one, 64-byte aligned.
fn weights(n: usize) -> Vec<[u64; 8]> {
    let mut lines = vec![[0u64; 8]; (n * 2).div_ceil(64)];
    let words: &mut [u16] = bytemuck::cast_slice_mut(&mut lines);
    for (i, w) in words.iter_mut().enumerate() {
        *w = 0x3f00 + (i as u16).wrapping_mul(31) % 256;
    }
    lines
}

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect()
}

/// A stream of 256 MiB of weights, as decoding sees it: no matrix is in a cache when its turn comes.
fn gemv(c: &mut Criterion, pool: &Pool) {
    let gb_s = measure_read_bandwidth(pool, 1 << 28);
    println!(
        "memory read bandwidth: {gb_s:.1} GB/s on {} threads",
        pool.threads()
    );
    let mut group = c.benchmark_group("gemv");
    let mut kernels = Kernels::new(pool);
    let data = weights(128 << 20);
    let bytes: &[u8] = bytemuck::cast_slice(&data);
    for (name, rows, cols) in SHAPES {
        for m in [1, 4, 8] {
            let size = rows * cols * 2;
            let count = bytes.len() / size;
            let (x, mut y) = (floats(m * cols), vec![0.0; m * rows]);
            group.throughput(Throughput::Bytes((count * size) as u64));
            group.bench_function(BenchmarkId::new(name, m), |b| {
                b.iter(|| {
                    for data in bytes.chunks_exact(size) {
                        let w = Matrix {
                            data,
                            dtype: Dtype::Bf16,
                            rows,
                            cols,
                        };
                        kernels.matmul(pool, black_box(&x), m, w, None, &mut y);
                    }
                });
            });
        }
    }
    group.finish();
}

/// 512 tokens; an element of throughput is a floating-point operation.
fn gemm(c: &mut Criterion, pool: &Pool) {
    let rate = measure_fma_rate(pool);
    println!(
        "f32 multiply-adds: {rate:.1} GFLOP/s on {} threads",
        pool.threads()
    );
    let mut group = c.benchmark_group("gemm");
    let mut kernels = Kernels::new(pool);
    let m = 512;
    for (name, rows, cols) in SHAPES {
        let data = weights(rows * cols);
        let w = Matrix {
            data: bytemuck::cast_slice(&data),
            dtype: Dtype::Bf16,
            rows,
            cols,
        };
        let (x, mut y) = (floats(m * cols), vec![0.0; m * rows]);
        group.throughput(Throughput::Elements((2 * m * rows * cols) as u64));
        group.bench_function(name, |b| {
            b.iter(|| kernels.matmul(pool, black_box(&x), m, w, None, &mut y));
        });
        if name == "gate_up" {
            group.bench_function("gate_up_silu", |b| {
                let y = &mut y[..m * rows / 2];
                b.iter(|| kernels.gate_up_silu(pool, black_box(&x), m, w, y));
            });
        }
    }
    group.finish();
}

/// SmolLM2's heads: a prefill of 512 tokens, and one token after 512 and 4096.
fn attention(c: &mut Criterion, pool: &Pool) {
    let shape = AttentionShape {
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
    };
    let mut group = c.benchmark_group("attention");
    let mut kernels = Kernels::new(pool);
    for (q_len, context_len) in [(512, 512), (1, 512), (1, 4096)] {
        let blocks = context_len / KV_BLOCK;
        let cache = floats(blocks * shape.n_kv_heads * KV_BLOCK * shape.head_dim);
        let block_table: &[u32] = &(0..blocks as u32).rev().collect::<Vec<_>>();
        let q = floats(q_len * shape.n_heads * shape.head_dim);
        let mut out = vec![0.0; q.len()];
        let seqs = [SeqView {
            q_start: 0,
            q_len,
            context_len,
            block_table,
        }];
        // Pairs of query and position that causality leaves, two products each.
        let pairs = q_len * (2 * context_len - q_len + 1) / 2;
        let operations = pairs * shape.n_heads * shape.head_dim * 4;
        group.throughput(Throughput::Elements(operations as u64));
        group.bench_function(format!("{q_len}_of_{context_len}"), |b| {
            b.iter(|| {
                kernels.attention(pool, shape, black_box(&q), &cache, &cache, &seqs, &mut out)
            });
        });
    }
    group.finish();
}

/// A token of Qwen2.5's vocabulary by every kind of filter.
fn sampler(c: &mut Criterion) {
    let mut group = c.benchmark_group("sampler");
    // Some thousand likely tokens, as after an open question.
    let logits: Vec<f32> = (0..152_064u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32)
        .map(|u| -2.5 * (u + 1e-7).ln())
        .collect();
    group.bench_function("log_sum_exp", |b| {
        b.iter(|| log_sum_exp(black_box(&logits)))
    });
    group.bench_function("argmax", |b| b.iter(|| argmax(black_box(&logits))));
    for (top_k, top_p, min_p) in [
        (0, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.05),
        (20, 0.8, 0.0),
        (1000, 1.0, 0.0),
    ] {
        let params = SamplingParams {
            temperature: 0.7,
            top_k,
            top_p,
            min_p,
            ..SamplingParams::greedy()
        };
        let mut sampler = Sampler::default();
        let name = format!("top_k {top_k}, top_p {top_p}, min_p {min_p}");
        let mut position = 0;
        group.bench_function(name, |b| {
            b.iter(|| {
                position += 1;
                sampler.sample(black_box(&logits), &[], &params, position)
            });
        });
    }
    group.finish();
}

fn main() {
    let mut c = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let pool = pool();
    println!("instruction set: {}", pool.isa());
    gemv(&mut c, &pool);
    gemm(&mut c, &pool);
    attention(&mut c, &pool);
    sampler(&mut c);
    c.final_summary();
}
