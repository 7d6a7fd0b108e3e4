// attention_prefill.cu for Hopper (sm_90a): the same attention on its own tensor-core products, wgmma.
//
//   attention_prefill_wgmma_D(…)                        parameters, meaning and numerics as in attention_prefill.cu; D = 64, 128
//     grid (ceil(longest len · n_heads / n_kv_heads / ROWS), n_kv_heads, n_seqs), block 2 · ROWS,
//     dynamic shared memory 2 · D · (ROWS + 5 · 128) bytes. ROWS = 128 for D = 128, 192 for D = 64.
//
// How it works. As there, the rows of a block are pairs (token, head of the group) and the K/V tiles serve all of them. A warpgroup owns 64
// rows; a tile is 128 tokens. wgmma reads Q, K and V from shared memory itself (wgmma.cuh has the layout, which cp.async writes 16 bytes
// at a time: a warp copies half a KV block or a whole one, so that it needs one entry of the table a tile). Scores come in the layout
// of the accumulators and are probabilities in that of an operand in registers, so P V needs no exchange between lanes.
// The scores of a tile are started before P V of the tile in front of it, and while the tensor cores do the latter, the softmax of the former is
// computed. The one barrier of a tile lies there too: the tensor cores still have work, and a warpgroup that is through starts its next
// products without asking the other. (Nothing orders arithmetic and a barrier: ptxas puts it before the exponentials, see the variant
// "late" in bench.py.) At the barrier all have their scores, so K has two places; P V of the tile in front may be under way, so V has three:
//
//     products     S(j+1)  P V(j)                             S(j+2)  P V(j+1)
//     threads              softmax(j+1), copy V(j+2), K(j+3)  scale O, pack P …
//
// Numerics: as in attention_prefill.cu; one tile is 128 tokens instead of 64, so sums are rescaled at other places.
//
// Measured on an H100 (CUDA 13.0), 2026-11-25, tests/kernels/bench.py; counting the pairs below the diagonal, 28 query and 4 KV heads of 128 unless
// said. Worst error on the GPU 2.4e-3, as in the emulation. "mma" is attention_prefill.cu, torch its scaled_dot_product_attention:
//     512 tokens             26 µs   73 TFLOP/s (mma  61, torch  97)  |  512 at the end of 8192    167 µs  349 TFLOP/s (mma 210)
//     4096                  300     402         (mma 244, torch 501)  |  16 at the end of 4096      90      10         (mma   7)
//     16384                4041     476         (mma 265, torch 668)  |  14/2 heads of 64, 4096    107     280         (mma 206, torch 299)
// Tried (4096, 16384, 512 at the end of 8192, in TFLOP/s):
//   * 3 warpgroups, tiles of 96: 428, 524, 268; tiles of 64: 401, 483, 258. Faster on long chunks, by 2% of a prefill of 16384, and slower on
//     short ones, where blocks of 192 rows leave multiprocessors without work. 2 warpgroups, tiles of 64: 377, 437, 335.
//   * copies before the softmax ("early"): 408, 486, 338.   barrier behind the exponentials ("late"): 375, 438, 316.
//   * heads of 64: 2 warpgroups with tiles of 64 are 12% faster than what is here (95 µs), "early" 6%.
// Not tried: barriers between two warpgroups alone, so that one multiplies while the other exponentiates; leaving the outputs unscaled where no
// row's highest score has moved.
#include "softmax.cuh"
#include "wgmma.cuh"

// Both can be changed for trials: 2 warpgroups with tiles of 64 or 128, 3 with 64, 96 or (D = 64) 128.
#ifdef PREFILL_WARPGROUPS
__device__ constexpr int warpgroups(int) {
    return PREFILL_WARPGROUPS;
}
#else
// Outputs of 64 columns leave registers for a third.
__device__ constexpr int warpgroups(int d) {
    return d == 64 ? 3 : 2;
}
#endif
#ifndef PREFILL_TILE
#define PREFILL_TILE 128
#endif
constexpr int TILE = PREFILL_TILE;  // cached tokens at a time
constexpr int K_PLACES = 2, V_PLACES = 3;

// The tile's part that this warp copies: pieces of 16 bytes, a lane each, in steps of 32.
template <int D>
struct Part {
    static constexpr int WARPS = 4 * warpgroups(D), PIECES = D / 8, STEPS = TILE * PIECES / 32, STEPS_OF_BLOCK = KV_BLOCK * PIECES / 32;
    static constexpr int COPIERS = STEPS % WARPS == 0 ? WARPS : 8, N = STEPS / COPIERS;
    static constexpr int ROWS = 32 / PIECES;  // of a step
    static_assert(STEPS % COPIERS == 0 && STEPS_OF_BLOCK % N == 0 && N * ROWS % 8 == 0, "a warp copies a part of one KV block, eight rows or more");

    static __device__ __forceinline__ int first() { return warp_id() * N; }
    // The KV block of the tile that it is in, and where this lane begins in it.
    static __device__ __forceinline__ int block() { return first() / STEPS_OF_BLOCK; }
    static __device__ __forceinline__ int source() { return first() % STEPS_OF_BLOCK * 256 + lane_id() * 8; }

    // Zeros past the end, so that no NaN meets a probability of zero.
    static __device__ __forceinline__ void copy(SharedPtr<bf16> tile, const bf16* from, int n_tokens) {
        if (COPIERS < WARPS && warp_id() >= COPIERS) return;
        const int row = first() * ROWS + lane_id() / PIECES, at = swizzled<TILE>(row, lane_id() % PIECES);
#pragma unroll
        for (int i = 0; i < N; ++i)  // the row of a step and the rows between steps are in different bits of the swizzle
            cp_async16(tile + (at ^ i * ROWS % 8 * 8) + i * ROWS * 64, from + i * 256, row + i * ROWS < n_tokens);
    }
};

// Probabilities as operands in registers, 16 tokens each.
__device__ __forceinline__ void pack(u32 (&p)[TILE / 16][4], const float (&scores)[TILE / 8][4]) {
#pragma unroll
    for (int c = 0; c < TILE / 16; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[c][i] = pack_bf16(scores[2 * c + i / 2][i % 2 * 2], scores[2 * c + i / 2][i % 2 * 2 + 1]);
}

template <int D>
__device__ __forceinline__ void attention_prefill(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* block_tables, const Seq* seqs,
                                                  bf16* attn, int n_heads, int n_kv_heads, int max_blocks, float scale) {
    constexpr int WARPGROUPS = warpgroups(D), ROWS = 64 * WARPGROUPS, PIECES = D / 8;
    SWIZZLED_SHARED(bf16, shared);
    const SharedPtr<bf16> queries = shared, k_tiles = queries + ROWS * D, v_tiles = k_tiles + K_PLACES * TILE * D;
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Seq seq = load(seqs + blockIdx.z);
    const int group = n_heads / n_kv_heads, kv_head = static_cast<int>(blockIdx.y), n_rows = static_cast<int>(seq.len) * group;
    const int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * ROWS;
    if (first_row >= n_rows) return;

    const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
    const int context = static_cast<int>(seq.context_len), offset = context - static_cast<int>(seq.len);
    const u32* table = block_tables + static_cast<u64>(seq.table_row) * max_blocks;
    const u64 block_stride = static_cast<u64>(n_kv_heads) * KV_BLOCK * D;
    const u64 source = static_cast<u64>(kv_head) * KV_BLOCK * D + Part<D>::source();
    k_cache += source;
    v_cache += source;
    const int last_row = min(first_row + ROWS, n_rows) - 1;
    const int n_tokens = offset + last_row / group + 1, n_tiles = div_up(n_tokens, TILE);
    // From this tile on some row of the block does not see all tokens.
    const int first_masked = (offset + first_row / group + 1) / TILE;

    // The table's entries are read one tile ahead of the copies that need them; V comes a tile after K.
    auto look_up = [&](int tile) {
        const int block = tile * (TILE / KV_BLOCK) + Part<D>::block();
        return block * KV_BLOCK < n_tokens ? load(table + block) : 0;
    };
    u32 k_block = look_up(0), v_block = 0;
    // Where a row's head begins in q and attn.
    auto place = [&](int row) { return ((static_cast<u64>(seq.start) + row / group) * n_heads + kv_head * group + row % group) * D; };
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * PIECES; i += 128 * WARPGROUPS) {
        const int row = first_row + i / PIECES;
        const bool here = row < n_rows;
        cp_async16(queries + swizzled<ROWS>(i / PIECES, i % PIECES), q + place(here ? row : 0) + i % PIECES * 8, here);
    }
    auto fetch_k = [&](int tile) {
        if (tile < n_tiles) Part<D>::copy(k_tiles + tile % K_PLACES * (TILE * D), k_cache + k_block * block_stride, n_tokens - tile * TILE);
        v_block = k_block;
        k_block = look_up(tile + 1);
    };
    auto fetch_v = [&](int tile) {
        if (tile < n_tiles) Part<D>::copy(v_tiles + tile % V_PLACES * (TILE * D), v_cache + v_block * block_stride, n_tokens - tile * TILE);
    };
    // V of tile `tile` and K of the next are there for all, and all have the scores of `tile`: its K and the V before make room.
    auto meet = [&](int tile) {
        cp_async_wait<0>();
        fence_async_proxy();
        __syncthreads();
        fetch_v(tile + 1);
        fetch_k(tile + 2);
        cp_async_commit();
    };

    float scores[TILE / 8][4], out[D / 8][4] = {}, high[2] = {NEG_INFINITY, NEG_INFINITY}, sum[2] = {}, shrink[2];
    u32 p[TILE / 16][4];
    const u64 q_operand = operand(queries + warp / 4 * (64 * 64));
    auto start_scores = [&](int tile) {
        const u64 k_operand = operand(k_tiles + tile % K_PLACES * (TILE * D));
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
            wgmma_start(scores, advance(q_operand, c / 4 * (ROWS * 128) + c % 4 * 32), advance(k_operand, c / 4 * (TILE * 128) + c % 4 * 32), c > 0);
        wgmma_commit();
    };
    auto start_out = [&](int tile) {
        const u64 v_operand = operand(v_tiles + tile % V_PLACES * (TILE * D), TILE * 128);
#pragma unroll
        for (int c = 0; c < TILE / 16; ++c) wgmma_add(out, p[c], advance(v_operand, c * 16 * 128));
        wgmma_commit();
    };
    auto mask = [&](int tile) {
        if (tile < first_masked) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + warp * 16 + g + 8 * r, sees = row < n_rows ? offset + row / group : -1;
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (tile * TILE + n * 8 + t * 2 + i > sees) scores[n][2 * r + i] = NEG_INFINITY;
        }
    };

    const float to_log2 = scale * LOG2_E;
    fetch_k(0);
    cp_async_commit();
    fetch_v(0);
    fetch_k(1);
    cp_async_commit();
    cp_async_wait<1>();
    fence_async_proxy();
    __syncthreads();  // queries and the first K
    wgmma_fence();
    start_scores(0);
    wgmma_wait<0>();
    pin(scores);
    mask(0);
    soften(scores, high, sum, shrink, to_log2);
    pack(p, scores);
    meet(0);
    for (int tile = 1; tile < n_tiles; ++tile) {
        wgmma_fence();
        start_scores(tile);
        start_out(tile - 1);
        wgmma_wait<1>();
        pin(scores);
        mask(tile);
        soften(scores, high, sum, shrink, to_log2);
        meet(tile);
        wgmma_wait<0>();
        pin(scores);
        pin(out);
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
        pack(p, scores);
    }
    wgmma_fence();
    start_out(n_tiles - 1);
    wgmma_wait<0>();
    pin(out);

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float inverse = 1.0f / quad_sum(sum[r]);
        const int row = first_row + warp * 16 + g + 8 * r;
        if (row >= n_rows) continue;
        bf16* to = attn + place(row) + t * 2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) store(reinterpret_cast<u32*>(to + n * 8), pack_bf16(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse));
    }
}

#define ATTENTION_PREFILL(D)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128 * warpgroups(D), 1)                                                                      \
        attention_prefill_wgmma_##D(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* block_tables, const Seq* seqs,       \
                                    bf16* attn, int n_heads, int n_kv_heads, int max_blocks, float scale) {                                  \
        attention_prefill<D>(q, k_cache, v_cache, block_tables, seqs, attn, n_heads, n_kv_heads, max_blocks, scale);                         \
    }
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(128)

KERNELS(attention_prefill_wgmma_64, attention_prefill_wgmma_128)
