// A row of the residual stream, held by a block: shared by norm.cu and all_reduce.cu.
#pragma once
#include "common.cuh"

constexpr int MAX_VECTORS = 2;  // vectors of 8 a thread

// The block's sum, in every thread.
__device__ __forceinline__ float block_sum(float v) {
    SHARED(float, sums, 32);
    v = warp_sum(v);
    if (lane_id() == 0) sums[warp_id()] = v;
    __syncthreads();
    int n_warps = static_cast<int>(blockDim.x) / 32;
    return warp_sum(lane_id() < n_warps ? static_cast<float>(sums[lane_id()]) : 0.0f);
}

__device__ __forceinline__ void load_floats(const float* p, float (&f)[8]) {
    Vec16 a = load16(p), b = load16(p + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        f[i] = bits_to_float(a.w[i]);
        f[i + 4] = bits_to_float(b.w[i]);
    }
}

__device__ __forceinline__ void store_floats(float* p, const float (&f)[8]) {
#pragma unroll
    for (int half = 0; half < 8; half += 4)
        store16(p + half, Vec16{{float_to_bits(f[half]), float_to_bits(f[half + 1]), float_to_bits(f[half + 2]), float_to_bits(f[half + 3])}});
}

// This thread's vectors begin at element(v) of the row.
__device__ __forceinline__ int element(int v) {
    return (static_cast<int>(threadIdx.x) + v * static_cast<int>(blockDim.x)) * 8;
}

// h = values / sqrt(mean(values²) + eps) · weight, for one row held by the block.
__device__ __forceinline__ void write_norm(float (&values)[MAX_VECTORS][8], const Vec16 (&weight)[MAX_VECTORS], bf16* h, int hidden, float eps) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; ++v)
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (element(v) < hidden) sum += values[v][j] * values[v][j];
    const float scale = rsqrtf(block_sum(sum) / static_cast<float>(hidden) + eps);
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; ++v) {
        if (element(v) >= hidden) continue;
        float by[8];
        unpack8(weight[v], by);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[v][j] *= scale * by[j];
        store16(h + element(v), pack8(values[v]));
    }
}
