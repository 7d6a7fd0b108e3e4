// Rotary embedding (Su et al., arXiv 2104.09864), the half-split form: element i turns with element i + head_dim / 2.
#pragma once
#include "common.cuh"

struct Rotation {
    float cos, sin;
};

// The angle is rounded to f32 as the reference rounds it; sine and cosine of it are exact to about 2 units in the last place at
// any position (no fast-math forms: at position 131072 they would be off by whole turns). `scale` is YaRN's attention factor.
__device__ __forceinline__ Rotation rotation(u32 position, float inv_freq, float scale) {
    float angle = static_cast<float>(position) * inv_freq;
    Rotation r;
    sincosf(angle, &r.sin, &r.cos);
    r.sin *= scale;
    r.cos *= scale;
    return r;
}

__device__ __forceinline__ void rotate(const Rotation& r, float& low, float& high) {
    float a = low, b = high;
    low = a * r.cos - b * r.sin;
    high = b * r.cos + a * r.sin;
}

// Where the head of a cached token begins: slot = block · KV_BLOCK + place in the block.
__device__ __forceinline__ u64 cache_row(u32 slot, int head, int n_kv_heads, int head_dim) {
    u64 block = slot / KV_BLOCK, place = slot % KV_BLOCK;
    return ((block * n_kv_heads + head) * KV_BLOCK + place) * head_dim;
}
