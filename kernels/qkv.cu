// What follows the q/k/v product: bias, RMSNorm of each q and k head (Qwen3), rotation, and k and v into the paged cache.
// Decode batches of models without head norms have all of it inside the product: gemv_qkv_rope in gemv.cu.
//
//   qkv_rope(qkv f32 [n_tokens, (n_heads + 2 · n_kv_heads) · head_dim] (q heads, k heads, v heads),
//            bias bf16 of one row or null, q_norm, k_norm bf16 [head_dim] or null, inv_freq f32 [head_dim / 2],
//            rope_scale, eps, positions u32 [n_tokens], slots u32 [n_tokens],
//            q bf16 [n_tokens, n_heads · head_dim], k_cache, v_cache bf16 [n_blocks, n_kv_heads, 16, head_dim],
//            n_heads, n_kv_heads, head_dim)
//     grid (ceil((n_heads + 2 · n_kv_heads) / warps), n_tokens), block 32 · warps (4 warps): one warp a head.
//     head_dim % 4 == 0, ≤ 256. slots[t] = block · 16 + place; NO_SLOT (all ones) leaves the cache alone.
//
// Numerics: f32 from the product on, one rounding at the end. A product that came rounded to bf16 made a bias smaller than the rounding
// a constant error of every v, which does not average out over the tokens: at 700 tokens twice the error of all the rest (random weights).
//
// Measured on an H200 (driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py, 28 + 4 + 4 heads of 128 in a graph: 1 token 1.7 µs, 4096 tokens 46 µs
// (1.6 TB/s: 4-byte accesses and a sine for each pair; not tuned, 1.3 ms of a 4096-token prefill of the 7B shape). That was with the product in
// bf16; in f32 it is not timed yet.
#include "common.cuh"
#include "rope.cuh"

constexpr int MAX_PAIRS = 2;  // each lane holds up to two times two neighbouring elements of both halves

__device__ __forceinline__ void load_two(const bf16* p, float (&f)[2]) {
    u32 v = load(reinterpret_cast<const u32*>(p));
    f[0] = low_half(v);
    f[1] = high_half(v);
}

__device__ __forceinline__ void load_two(const float* p, float (&f)[2]) {
    u64 v = load(reinterpret_cast<const u64*>(p));
    f[0] = bits_to_float(static_cast<u32>(v));
    f[1] = bits_to_float(static_cast<u32>(v >> 32));
}

extern "C" __global__ void qkv_rope(const float* qkv, const bf16* bias, const bf16* q_norm, const bf16* k_norm, const float* inv_freq, float rope_scale,
                                    float eps, const u32* positions, const u32* slots, bf16* q, bf16* k_cache, bf16* v_cache, int n_heads,
                                    int n_kv_heads, int head_dim) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int n_all = n_heads + 2 * n_kv_heads, token = static_cast<int>(blockIdx.y), half = head_dim / 2;
    const int head = static_cast<int>(blockIdx.x * (blockDim.x / 32)) + warp_id();
    if (head >= n_all) return;
    const bool is_q = head < n_heads, is_v = head >= n_heads + n_kv_heads;
    const u64 column = static_cast<u64>(head) * head_dim;
    const float* row = qkv + static_cast<u64>(token) * n_all * head_dim + column;

    float low[MAX_PAIRS][2], high[MAX_PAIRS][2], squares = 0.0f;
#pragma unroll
    for (int p = 0; p < MAX_PAIRS; ++p) {
        int i = p * 64 + lane_id() * 2;
        if (i >= half) continue;
        load_two(row + i, low[p]);
        load_two(row + half + i, high[p]);
        if (bias) {
            float b[2];
            load_two(bias + column + i, b);
            low[p][0] += b[0], low[p][1] += b[1];
            load_two(bias + column + half + i, b);
            high[p][0] += b[0], high[p][1] += b[1];
        }
        squares += low[p][0] * low[p][0] + low[p][1] * low[p][1] + high[p][0] * high[p][0] + high[p][1] * high[p][1];
    }

    const bf16* norm = is_q ? q_norm : is_v ? nullptr : k_norm;
    float scale = norm ? rsqrtf(warp_sum(squares) / static_cast<float>(head_dim) + eps) : 1.0f;
    bf16* to = q + static_cast<u64>(token) * n_heads * head_dim + column;
    if (!is_q) {
        u32 slot = load(slots + token);
        if (slot == NO_SLOT) return;
        to = (is_v ? v_cache : k_cache) + cache_row(slot, (head - n_heads) % n_kv_heads, n_kv_heads, head_dim);
    }
    u32 position = load(positions + token);
#pragma unroll
    for (int p = 0; p < MAX_PAIRS; ++p) {
        int i = p * 64 + lane_id() * 2;
        if (i >= half) continue;
        if (norm) {
            float w[2];
            load_two(norm + i, w);
            low[p][0] *= scale * w[0], low[p][1] *= scale * w[1];
            load_two(norm + half + i, w);
            high[p][0] *= scale * w[0], high[p][1] *= scale * w[1];
        }
        if (!is_v)
            for (int j = 0; j < 2; ++j) rotate(rotation(position, load(inv_freq + i + j), rope_scale), low[p][j], high[p][j]);
        store(reinterpret_cast<u32*>(to + i), pack_bf16(low[p][0], low[p][1]));
        store(reinterpret_cast<u32*>(to + half + i), pack_bf16(high[p][0], high[p][1]));
    }
}

KERNELS(qkv_rope)
