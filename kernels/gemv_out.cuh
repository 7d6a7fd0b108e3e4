// Where the sums of gemv.cu and gemv_batch.cu go.
#pragma once
#include "common.cuh"
#include "rope.cuh"

__device__ __forceinline__ void put(bf16* p, float v) {
    store(p, to_bf16(v));
}
__device__ __forceinline__ void put(float* p, float v) {
    store(p, v);
}

// Of a q, k and v product: bias, rotation, and q to its buffer, k and v to the cache.
struct QkvOut {
    const bf16* bias;
    const float* inv_freq;
    float rope_scale;
    const u32 *positions, *slots;
    bf16 *q, *k_cache, *v_cache;
    int n_heads, n_kv_heads, head_dim;

    // `low` is that of row `row`, in the first half of its head, `high` that of its partner in the second.
    __device__ __forceinline__ void put_pair(int row, int token, float low, float high) const {
        const int head = row / head_dim, i = row % head_dim, half = head_dim / 2;
        if (bias) {
            low += to_float(load(bias + row));
            high += to_float(load(bias + row + half));
        }
        const bool is_q = head < n_heads, is_v = head >= n_heads + n_kv_heads;
        if (!is_v) rotate(rotation(load(positions + token), load(inv_freq + i), rope_scale), low, high);
        bf16* to = q + (static_cast<u64>(token) * n_heads + head) * head_dim;
        if (!is_q) {
            u32 slot = load(slots + token);
            if (slot == NO_SLOT) return;
            to = (is_v ? v_cache : k_cache) + cache_row(slot, (head - n_heads) % n_kv_heads, n_kv_heads, head_dim);
        }
        put(to + i, low);
        put(to + half + i, high);
    }
};
