// Greedy choice and what its probability needs over rows of f32 logits, in two launches: many blocks a row, then one warp. With the vocabulary
// in parts on several ranks each joins its own, the ranks gather those, and the last launch is theirs all the same.
//
//   sample_partial(logits f32 [n_rows, ld], n_known, ld, part_max f32, part_id u32, part_sum f32, each [n_rows, n_parts])
//     grid (n_parts, n_rows), block any number of warps (256). Only tokens 0 .. n_known take part (Qwen pads its vocabulary).
//     n_known ≥ 1; n_parts such that every part has a token: ceil(n_known / (4 · block)) is the choice.
//   sample_join(part_max, part_id, part_sum, n_parts, first_id, joined 32-bit [3][n_rows]: maxima, ids, sums)
//     grid (n_rows), block 32. One rank's parts, each [n_rows, n_parts], as one; ids count from first_id. n_parts ≥ 0.
//   sample_reduce(part_max, part_id, part_sum, n_parts, part_stride, row_stride, token u32 [n_rows], logit f32 [n_rows],
//                 max_logit f32 [n_rows], sum f32 [n_rows]: of exp(logit - max_logit))
//     grid (n_rows), block 32. `logit` is the token's, and so the maximum too, until candidates.cu draws another one. Part p of row r is element p · part_stride + r · row_stride of each array: (1, n_parts) behind
//     sample_partial, (3 · n_rows, 1) behind the gathered [n_ranks][3][n_rows] of sample_join.
//
// Numerics: the logarithm of the sum is left to the host, where adding the maximum costs no bits. Ties go to the lowest id. NaN logits are passed over; a row of nothing but NaN gives token 0. f32 sums in an order
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

// The best of the parts that begin at element `first`, in every lane.
__device__ __forceinline__ Best merge_parts(const float* part_max, const u32* part_id, const float* part_sum, u64 first, int n_parts, int stride) {
    Best b = nothing();
    for (int p = lane_id(); p < n_parts; p += 32) {
        u64 i = first + static_cast<u64>(p) * stride;
        b = merge(b, Best{load(part_max + i), load(part_id + i), load(part_sum + i)});
    }
    return merge_warp(b);
}

extern "C" __global__ void sample_join(const float* part_max, const u32* part_id, const float* part_sum, int n_parts, u32 first_id, u32* joined) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    Best b = merge_parts(part_max, part_id, part_sum, static_cast<u64>(blockIdx.x) * n_parts, n_parts, 1);
    if (lane_id() != 0) return;
    store(joined + blockIdx.x, float_to_bits(b.max));
    store(joined + gridDim.x + blockIdx.x, b.id == 0xffffffffu ? b.id : first_id + b.id);
    store(joined + 2 * gridDim.x + blockIdx.x, float_to_bits(b.sum));
}

extern "C" __global__ void sample_reduce(const float* part_max, const u32* part_id, const float* part_sum, int n_parts, int part_stride, int row_stride,
                                         u32* token, float* logit, float* max_logit, float* sum) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    Best b = merge_parts(part_max, part_id, part_sum, static_cast<u64>(blockIdx.x) * row_stride, n_parts, part_stride);
    if (lane_id() != 0) return;
    store(token + blockIdx.x, b.id == 0xffffffffu ? 0u : b.id);
    store(logit + blockIdx.x, b.max);
    store(max_logit + blockIdx.x, b.max);
    store(sum + blockIdx.x, b.sum);
}

KERNELS(sample_partial, sample_join, sample_reduce)
