// Causal attention of many query tokens a sequence over its paged cache, flash-style (Dao, arXiv 2307.08691), on tensor cores.
// Prefill chunks at any offset, decode tokens and fill-up rows may be mixed in one launch.
//
//   attention_prefill_D(q bf16 [·, n_heads · D], k_cache, v_cache bf16 [n_blocks, n_kv_heads, 16, D],
//                       block_tables u32 [·, max_blocks], seqs Seq [n_seqs], attn bf16 [·, n_heads · D],
//                       n_heads, n_kv_heads, max_blocks, scale)                       D = 64, 80, 96, 128
//     grid (ceil(longest len · n_heads / n_kv_heads / 128), n_kv_heads, n_seqs), block 256,
//     dynamic shared memory 512 · (D + 8) bytes. n_heads / n_kv_heads is whole. The queries of seqs[i] are rows start .. start + len; the last
//     of them sits at position context_len - 1 and sees all before it and itself. context_len ≥ len. len 0: nothing is done.
//
// How it works. The rows of a block are pairs (token, head of the group), 128 at a time, so that one K/V tile serves all heads of its KV head
// and short chunks still fill the tensor cores. Each of 8 warps owns 16 rows: scores, probabilities and outputs stay in its
// registers. K and V come in tiles of 64 tokens through shared memory, the next tile under way (cp.async) while this one is
// used; rows are padded by 16 bytes so that ldmatrix meets no bank twice. Tiles above the diagonal are never loaded; the blocks
// with the most tiles start first.
//
// Numerics: as in attention_decode.cu: f32 scores and sums, probabilities rounded to bf16 for P V.
//
// Measured on an H200 (driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py; counting the pairs below the diagonal. torch is its
// scaled_dot_product_attention on contiguous heads. 28 query and 4 KV heads of 128 unless said:
//     512 tokens             29 µs   65 TFLOP/s (torch 119)  |  512 at the end of 8192    304 µs  192 TFLOP/s
//     4096                  551     218         (502)        |  16 at the end of 4096     153       6
//     16384                7922     243         (666)        |  14/2 heads of 64, 4096    156     193 (torch 308)
// At 4096 tokens that is 15 ms of the 7B shape's prefill, beside about 70 for its products.
// Tried:
//   * 4 warps and 64 rows, table looked up for every 16 bytes: 132 TFLOP/s at 4096; 8 warps, same look-up: 198; now: 218. 4 warps now: 207.
//   * tiles of 32 tokens: 201.   3 blocks of 4 warps (168 registers, spilled): 155, from 132.
// Not tried: splitting a few rows' long context over blocks (16 of 4096 above). On Hopper attention_prefill_wgmma.cu is used instead, with the
// products that torch uses here.
#include "common.cuh"
#include "softmax.cuh"

#ifndef PREFILL_WARPS
#define PREFILL_WARPS 8
#endif
constexpr int WARPS = PREFILL_WARPS;
constexpr int ROWS = 16 * WARPS;
constexpr int TILE = 64;  // cached tokens at a time

// The KV blocks of one tile to shared memory, K or V of one head; zeros past the end, so that no NaN meets a probability of zero.
template <int D>
__device__ __forceinline__ void load_tile(SharedPtr<bf16> to, const bf16* cache, const u32 (&blocks)[TILE / KV_BLOCK], u64 block_stride, int n_tokens) {
    constexpr int PIECES = D / 8;
#pragma unroll
    for (int b = 0; b < TILE / KV_BLOCK; ++b) {
        const bf16* from = cache + blocks[b] * block_stride;
#pragma unroll
        for (int first = 0; first < KV_BLOCK * PIECES; first += WARPS * 32) {
            const int i = first + static_cast<int>(threadIdx.x), row = b * KV_BLOCK + i / PIECES;
            if (KV_BLOCK * PIECES % (WARPS * 32) == 0 || i < KV_BLOCK * PIECES)
                cp_async16(to + (row * (D + 8) + i % PIECES * 8), from + i * 8, row < n_tokens);
        }
    }
}

template <int D>
__device__ __forceinline__ void attention_prefill(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* block_tables, const Seq* seqs,
                                                  bf16* attn, int n_heads, int n_kv_heads, int max_blocks, float scale) {
    DYNAMIC_SHARED(bf16, shared);
    constexpr int STRIDE = D + 8, HALF = TILE * STRIDE;  // K tile, V tile, and both again
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Seq seq = load(seqs + blockIdx.z);
    const int group = n_heads / n_kv_heads, kv_head = static_cast<int>(blockIdx.y), n_rows = static_cast<int>(seq.len) * group;
    const int row_tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    if (row_tile * ROWS >= n_rows) return;

    const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
    const int context = static_cast<int>(seq.context_len), offset = context - static_cast<int>(seq.len);
    const u32* table = block_tables + static_cast<u64>(seq.table_row) * max_blocks;
    const u64 block_stride = static_cast<u64>(n_kv_heads) * KV_BLOCK * D;
    k_cache += static_cast<u64>(kv_head) * KV_BLOCK * D;
    v_cache += static_cast<u64>(kv_head) * KV_BLOCK * D;

    // This lane's rows g and g + 8 of its warp: where they are and the last token each may see.
    u64 at[2];
    int sees[2];
    bool here[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = row_tile * ROWS + warp * 16 + g + 8 * r;
        here[r] = row < n_rows;
        int token = here[r] ? row / group : 0, head = kv_head * group + (here[r] ? row % group : 0);
        sees[r] = here[r] ? offset + token : -1;
        at[r] = ((static_cast<u64>(seq.start) + token) * n_heads + head) * D;
    }
    u32 queries[D / 16][4];
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            queries[c][i] = here[i % 2] ? load(reinterpret_cast<const u32*>(q + at[i % 2] + c * 16 + i / 2 * 8 + t * 2)) : 0;

    const int last_row = min(row_tile * ROWS + ROWS, n_rows) - 1;
    const int n_tokens = offset + last_row / group + 1, n_tiles = div_up(n_tokens, TILE);
    // From this tile on some row of the block does not see all tokens.
    const int first_masked = (offset + row_tile * ROWS / group + 1) / TILE;
    // The table's entries are read one tile ahead of the copies that need them.
    u32 blocks[TILE / KV_BLOCK];
    auto look_up = [&](int tile) {
#pragma unroll
        for (int b = 0; b < TILE / KV_BLOCK; ++b) {
            int block = tile * (TILE / KV_BLOCK) + b;
            blocks[b] = block * KV_BLOCK < n_tokens ? load(table + block) : 0;
        }
    };
    auto fetch = [&](int tile) {
        SharedPtr<bf16> to = shared + tile % 2 * 2 * HALF;
        load_tile<D>(to, k_cache, blocks, block_stride, n_tokens - tile * TILE);
        load_tile<D>(to + HALF, v_cache, blocks, block_stride, n_tokens - tile * TILE);
        cp_async_commit();
        look_up(tile + 1);
    };

    float out[D / 8][4] = {}, high[2] = {NEG_INFINITY, NEG_INFINITY}, sum[2] = {};
    look_up(0);
    fetch(0);
    for (int tile = 0; tile < n_tiles; ++tile) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there for all, and all are done with the one before it, whose place the next one takes
        if (tile + 1 < n_tiles) fetch(tile + 1);
        SharedPtr<bf16> k = shared + tile % 2 * 2 * HALF, v = k + HALF;

        float scores[TILE / 8][4] = {};
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
#pragma unroll
            for (int n = 0; n < TILE / 16; ++n) {
                u32 b[4];
                ldmatrix_x4(b, k + ((n * 16 + lane / 16 * 8 + lane % 8) * STRIDE + c * 16 + lane / 8 % 2 * 8));
                mma_bf16(scores[2 * n], queries[c][0], queries[c][1], queries[c][2], queries[c][3], b[0], b[1]);
                mma_bf16(scores[2 * n + 1], queries[c][0], queries[c][1], queries[c][2], queries[c][3], b[2], b[3]);
            }

        const float to_log2 = scale * LOG2_E;
        if (tile >= first_masked) {
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (tile * TILE + n * 8 + t * 2 + i % 2 > sees[i / 2]) scores[n][i] = NEG_INFINITY;
        }
        float shrink[2];
        soften(scores, high, sum, shrink, to_log2);
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
#pragma unroll
        for (int c = 0; c < TILE / 16; ++c) {
            u32 p[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = pack_bf16(scores[2 * c + i / 2][i % 2 * 2], scores[2 * c + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                u32 b[4];
                ldmatrix_x4_trans(b, v + ((c * 16 + lane % 16) * STRIDE + n * 16 + lane / 16 * 8));
                mma_bf16(out[2 * n], p[0], p[1], p[2], p[3], b[0], b[1]);
                mma_bf16(out[2 * n + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float inverse = 1.0f / quad_sum(sum[r]);
        if (!here[r]) continue;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            store(reinterpret_cast<u32*>(attn + at[r] + n * 8 + t * 2), pack_bf16(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse));
    }
}

// With heads of 64 two blocks fit a multiprocessor's registers.
#define ATTENTION_PREFILL(D)                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, D <= 64 ? 16 / WARPS : 1)                                                              \
        attention_prefill_##D(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* block_tables, const Seq* seqs, bf16* attn,       \
                              int n_heads, int n_kv_heads, int max_blocks, float scale) {                                                          \
        attention_prefill<D>(q, k_cache, v_cache, block_tables, seqs, attn, n_heads, n_kv_heads, max_blocks, scale);                               \
    }
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(80)
ATTENTION_PREFILL(96)
ATTENTION_PREFILL(128)

KERNELS(attention_prefill_64, attention_prefill_80, attention_prefill_96, attention_prefill_128)
