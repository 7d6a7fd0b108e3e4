// Greedy choice and log-sum-exp over rows of f32 logits, in two launches: many blocks a row, then one warp.
//
//   sample_partial(logits f32 [n_rows, ld], n_known, ld, part_max f32, part_id u32, part_sum f32, each [n_rows, n_parts])
//     grid (n_parts, n_rows), block any number of warps (256). Only tokens 0 .. n_known take part (Qwen pads its vocabulary).
//     n_known ≥ 1; n_parts such that every part has a token: ceil(n_known / (4 · block)) is the choice.
//   sample_reduce(part_max, part_id, part_sum, n_parts, token u32 [n_rows], max_logit f32 [n_rows], log_sum_exp f32 [n_rows])
//     grid (n_rows), block 32.
//
// Numerics: ties go to the lowest id. NaN logits are passed over; a row of nothing but NaN gives token 0. f32 sums in an order
// that depends on the launch shape alone.
//
// Measured on an H200 (driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py, both launches in a graph over 152064 logits: one row 5.7 µs, 8
// rows 10.6 µs; with 16 logits a thread instead of 4: 7.4 and 9.8 µs.
#include "common.cuh"

struct Best {
    float max;
    u32 id;
    float sum;  // of exp(logit - max)
};

__device__ __forceinline__ Best merge(const Best& a, const Best& b) {
    bool first = a.max > b.max || (a.max == b.max && a.id < b.id);
    const Best &high = first ? a : b, &low = first ? b : a;
    // Where both are -infinity there is nothing to scale.
    float scale = low.max == high.max ? 1.0f : exp2_fast((low.max - high.max) * LOG2_E);
    return Best{high.max, high.id, high.sum + low.sum * scale};
}

__device__ __forceinline__ Best merge_warp(Best b) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        Best other;
        other.max = shuffle_xor(b.max, mask);
        other.id = shuffle_xor(b.id, mask);
        other.sum = shuffle_xor(b.sum, mask);
        b = merge(b, other);
    }
    return b;
}

__device__ __forceinline__ Best nothing() {
    return Best{NEG_INFINITY, 0xffffffffu, 0.0f};
}

extern "C" __global__ void sample_partial(const float* logits, int n_known, int ld, float* part_max, u32* part_id, float* part_sum) {
    SHARED(float, maxima, 32);
    SHARED(u32, ids, 32);
    SHARED(float, sums, 32);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const float* row = logits + static_cast<u64>(blockIdx.y) * ld;
    int threads = static_cast<int>(gridDim.x * blockDim.x);
    Best mine = nothing();
    for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n_known; i += threads) {
        float v = load(row + i);
        if (v > mine.max) {
            mine.sum = mine.sum * exp2_fast((mine.max - v) * LOG2_E) + 1.0f;
            mine.max = v;
            mine.id = static_cast<u32>(i);
        } else if (v > NEG_INFINITY) {
            mine.sum += exp2_fast((v - mine.max) * LOG2_E);
        }
    }
    mine = merge_warp(mine);
    if (lane_id() == 0) {
        maxima[warp_id()] = mine.max;
        ids[warp_id()] = mine.id;
        sums[warp_id()] = mine.sum;
    }
    __syncthreads();
    if (warp_id() != 0) return;
    Best b = nothing();
    if (lane_id() < static_cast<int>(blockDim.x) / 32) b = Best{maxima[lane_id()], ids[lane_id()], sums[lane_id()]};
    b = merge_warp(b);
    if (lane_id() != 0) return;
    u64 part = static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x;
    store(part_max + part, b.max);
    store(part_id + part, b.id);
    store(part_sum + part, b.sum);
}

extern "C" __global__ void sample_reduce(const float* part_max, const u32* part_id, const float* part_sum, int n_parts, u32* token, float* max_logit,
                                         float* log_sum_exp) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    u64 row = static_cast<u64>(blockIdx.x) * n_parts;
    Best b = nothing();
    for (int i = lane_id(); i < n_parts; i += 32) b = merge(b, Best{load(part_max + row + i), load(part_id + row + i), load(part_sum + row + i)});
    b = merge_warp(b);
    if (lane_id() != 0) return;
    store(token + blockIdx.x, b.id == 0xffffffffu ? 0u : b.id);
    store(max_logit + blockIdx.x, b.max);
    store(log_sum_exp + blockIdx.x, b.max + logf(b.sum));
}

KERNELS(sample_partial, sample_reduce)
