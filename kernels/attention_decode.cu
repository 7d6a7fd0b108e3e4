// Attention of one query token a sequence over its paged cache, split over the cached tokens (flash-decoding).
//
//   attention_decode_D(q bf16 [·, n_heads · D], k_cache, v_cache bf16 [n_blocks, n_kv_heads, 16, D],
//                      block_tables u32 [·, max_blocks], seqs Seq [n_seqs], part f32 [n_seqs, n_heads, n_splits, D],
//                      part_ml f32 [n_seqs, n_heads, n_splits, 2], attn bf16 [·, n_heads · D],
//                      n_heads, n_kv_heads, max_blocks, n_splits, scale)        D = 64, 80, 96, 128
//     grid (n_splits, n_kv_heads · ceil(n_heads / n_kv_heads / 8), n_seqs), block 256. n_heads / n_kv_heads is whole. The query of seqs[i] is
//     row seqs[i].start; `len` is 1 (or 0 with context_len 0). Cached tokens: context_len, in the blocks that row table_row of the
//     tables names. context_len 0 (a row that only fills the batch up) gives zeros.
//     With n_splits = 1 attn is written; otherwise part and part_ml, and then
//   attention_combine_D(part, part_ml, seqs, attn, n_heads, n_splits)
//     grid (n_heads, n_seqs), block 256, writes attn. Splits beyond a short context are neither written nor read.
//
//   n_splits: see the launch rule below. Fixed for a graph: the partition follows context_len on the device.
//   Ahead of the wait for the kernel in front, seqs, block_tables and all but the newest token's block of the cache are read.
//
// How it works. A block serves up to 8 query heads of one KV head, so K and V are read once (from memory; twice from the L2 where a
// group is larger). A warp takes a KV block of 16 tokens at a time; K Qᵀ and Vᵀ Pᵀ are tensor-core products with the heads as the 8 columns. Both
// sums run over an order of our choosing, so every lane loads 16 consecutive bytes straight into fragments: for K those are
// elements along the head of one token, for V pairs of tokens are woven together in registers. Nothing goes through shared
// memory until the warps' results are merged. The next K is under way during the softmax, the next V during the following
// scores, and the two KV blocks after that on their way to the L2.
//
// Numerics: scores and sums in f32, probabilities rounded to bf16 for P V (as flash attention does). The result depends on
// context_len, n_splits and nothing else: not on the other sequences, not on the order of blocks.
//
// Launch rule: with all = sms / (n_kv_heads · n_seqs), n_splits = min(all, max(min(all / 2, ceil(context / 128)), ceil(context / 256))), at
// least 1, for the longest context of the batch: half of the multiprocessors until their parts are 256 tokens long.
//
// Measured on an H200 (driver 580, CUDA 13.0, 4.62 TB/s read), 2026-11-25, tests/kernels/bench.py: in a graph, caches of 0.6 GB in turn, with the
// combining kernel; in brackets the floor, K and V over the read rate. 28 query and 4 KV heads of 128 unless said:
//     context 1024, 8 splits    4.5 µs (0.5)  |  16384, 33 splits  14.0 (7.3)   |  8 × 4096, 4 splits  22.8 (14.5)
//     4096, 16 splits           6.7    (1.8)  |  32768, 33 splits  23.4 (14.5)  |  64 × 1024, 1 split  42.0 (29.1)
//     14/2 heads of 64, 4096, 32 splits  4.2 (0.5)
// Whole steps of the 7B shape, `tandem bench scaling`, the same run: 3.62 ms at context 1024, 3.75 at 4096, 3.91 at 16384; batches of 8 and 64 at 1024 4.05 and
// 5.59. With 4 warps a block, 3 blocks a multiprocessor and up to 32 splits, until then: 3.70, 3.77, 4.05, 4.10 and 5.62.
// Tried:
//   * 4 warps a block: 16.8 µs at 16384, 47 at 64 × 1024. A part then holds 64 tokens a round instead of 128, so that contexts just above 1024 took
//     two rounds of 16 splits. 12 warps: even; 16, which leaves 128 registers and spills: steps 1 to 2% slower; 8 warps with 128 registers: the same.
//   * heads as the 16 rows of the products, half of them empty; 224 registers; no loads ahead of the wait; a serial combine: 8.8 µs
//     at 1024, 20.8 at 16384, 31.2 at 32768. Heads as the 8 columns leave no register of a product unused: 160 of them.
//   * 64 and more splits: no faster at any length, and slower where the combine has more to read.
//   * the last block of a head group combines, by a counter, instead of a second kernel (7B, 4 warps): 2% slower, one block reads the parts of 7 heads.
//   * let_next_kernel_start at the end instead: 1.5% slower.
//   * this kernel brings part of the output product's weights into the L2, which memory has time for (cp.async.bulk.prefetch.L2): a tenth to a quarter of
//     them changes nothing, all of them make a 7B step 3% slower, half of 7B 6%: as if they were read twice.
// Without either kernel a 7B step is 130 µs shorter, without one of them 30 to 40 µs (4 warps).
// The rest over the floor at short contexts is latency: tables, first loads, merge, second launch.
#include "common.cuh"

#ifndef DECODE_WARPS
#define DECODE_WARPS 8
#endif
constexpr int WARPS = DECODE_WARPS;
constexpr int HEADS = 8;  // of a block

// KV blocks of a split, whole rounds of the warps.
__device__ __forceinline__ int blocks_per_split(int n_blocks, int n_splits) {
    return div_up(div_up(n_blocks, n_splits), WARPS) * WARPS;
}

// A KV block in registers; with g = lane / 4 and t = lane % 4:
template <int D>
struct Fragments {
    static constexpr int K_CHUNKS = (D + 31) / 32, V_CHUNKS = (D + 63) / 64;
    Vec16 k[2][K_CHUNKS];  // tokens g, g + 8; elements 32 c + 8 t and on
    Vec16 v[4][V_CHUNKS];  // tokens 2t, 2t + 1, 2t + 8, 2t + 9; elements 64 c + 8 g and on

    __device__ __forceinline__ void load_k(const bf16* block, int n_tokens) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        block += g * D + 8 * t;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < K_CHUNKS; ++c)
                k[i][c] = g + 8 * i < n_tokens && 32 * c + 8 * t < D ? load16(block + (8 * i * D + 32 * c)) : zero16();
    }
    // Tokens past the end are zeros: a probability of zero does not silence a NaN.
    __device__ __forceinline__ void load_v(const bf16* block, int n_tokens) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        block += 2 * t * D + 8 * g;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < V_CHUNKS; ++c) {
                const int token = i % 2 + i / 2 * 8;
                v[i][c] = 2 * t + token < n_tokens && 64 * c + 8 * g < D ? load16(block + (token * D + 64 * c)) : zero16();
            }
    }
};

template <int D>
__device__ __forceinline__ void attention_decode(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* block_tables, const Seq* seqs,
                                                 float* part, float* part_ml, bf16* attn, int n_heads, int n_kv_heads, int max_blocks, int n_splits,
                                                 float scale) {
    using F = Fragments<D>;
    SHARED(float, maxima, WARPS * HEADS);
    SHARED(float, totals, WARPS * HEADS);
    SHARED(float, outs, WARPS * HEADS * (D + 1));  // one more a row: fewer bank conflicts
    let_next_kernel_start();
    const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
    const int group = n_heads / n_kv_heads, parts = div_up(group, HEADS), kv_head = static_cast<int>(blockIdx.y) / parts;
    const int first_head = kv_head * group + static_cast<int>(blockIdx.y) % parts * HEADS, heads = min(HEADS, (kv_head + 1) * group - first_head);
    const Seq seq = load(seqs + blockIdx.z);
    const int context = static_cast<int>(seq.context_len), n_blocks = div_up(context, KV_BLOCK), split = static_cast<int>(blockIdx.x);
    const int per_split = blocks_per_split(n_blocks, n_splits), first = split * per_split, last = min(first + per_split, n_blocks);
    const u64 row = static_cast<u64>(seq.start) * n_heads + first_head;
    if (first >= n_blocks) {
        // Nothing cached here. With a single split nobody else writes the zeros of an empty sequence.
        wait_for_previous_kernel();
        if (n_splits > 1) return;
        for (int i = static_cast<int>(threadIdx.x); i < heads * D; i += WARPS * 32) store(attn + row * D + i, bf16{0});
        return;
    }

    const u32* table = block_tables + static_cast<u64>(seq.table_row) * max_blocks;
    const u64 block_stride = static_cast<u64>(n_kv_heads) * KV_BLOCK * D;
    k_cache += static_cast<u64>(kv_head) * KV_BLOCK * D;
    v_cache += static_cast<u64>(kv_head) * KV_BLOCK * D;
    auto entry = [&](int block) { return block < last ? load(table + block) : 0; };
    auto prefetch = [&](int block, u32 at) {
        if (block >= last || lane * 64 >= KV_BLOCK * D) return;
        prefetch_l2(k_cache + at * block_stride + lane * 64);
        prefetch_l2(v_cache + at * block_stride + lane * 64);
    };

    int block = first + warp;
    u32 entries[4] = {entry(block), entry(block + WARPS), entry(block + 2 * WARPS), entry(block + 3 * WARPS)};
    F kv;
    auto load_first = [&] {
        if (block < last) {
            kv.load_k(k_cache + entries[0] * block_stride, context - block * KV_BLOCK);
            kv.load_v(v_cache + entries[0] * block_stride, context - block * KV_BLOCK);
        }
    };
    // The newest token is the work of the kernel in front.
    const bool has_newest = block == n_blocks - 1;
    if (!has_newest) load_first();
    prefetch(block + WARPS, entries[1]);
    prefetch(block + 2 * WARPS, entries[2]);
    wait_for_previous_kernel();
    if (has_newest) load_first();

    Vec16 queries[F::K_CHUNKS];
#pragma unroll
    for (int c = 0; c < F::K_CHUNKS; ++c) {
        int element = 32 * c + 8 * t;
        queries[c] = g < heads && element < D ? load16(q + (row + g) * D + element) : zero16();
    }

    // Running softmax of heads 2t and 2t + 1; `sum` is of this lane's tokens only. out[c][j][2 i + h] is element 64 c + 8 g + 2 j + i of
    // head 2t + h.
    float max[2] = {NEG_INFINITY, NEG_INFINITY}, sum[2] = {}, out[F::V_CHUNKS][4][4] = {};
    for (; block < last; block += WARPS) {
        const int n_tokens = context - block * KV_BLOCK, next = block + WARPS;
        float p[4] = {};  // token g of heads 2t, 2t + 1, then token g + 8
#pragma unroll
        for (int c = 0; c < F::K_CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                mma_bf16(p, kv.k[0][c].w[i], kv.k[1][c].w[i], kv.k[0][c].w[i + 1], kv.k[1][c].w[i + 1], queries[c].w[i], queries[c].w[i + 1]);
        if (next < last) kv.load_k(k_cache + entries[1] * block_stride, context - next * KV_BLOCK);

        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            // In powers of two. A block has at least one token, so the maximum is finite.
#pragma unroll
            for (int i = 0; i < 2; ++i) p[2 * i + h] = g + 8 * i < n_tokens ? p[2 * i + h] * scale * LOG2_E : NEG_INFINITY;
            float high = fmaxf(p[h], p[2 + h]);
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) high = fmaxf(high, shuffle_xor(high, mask));
            high = fmaxf(high, max[h]);
            shrink[h] = exp2_fast(max[h] - high);
            max[h] = high;
#pragma unroll
            for (int i = 0; i < 2; ++i) p[2 * i + h] = exp2_fast(p[2 * i + h] - high);
            sum[h] = sum[h] * shrink[h] + p[h] + p[2 + h];
        }
        const u32 p_low = transpose_8x8(pack_bf16(p[0], p[1])), p_high = transpose_8x8(pack_bf16(p[2], p[3]));
#pragma unroll
        for (int c = 0; c < F::V_CHUNKS; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 a0 = permute_bytes(kv.v[0][c].w[j], kv.v[1][c].w[j], 0x5410), a1 = permute_bytes(kv.v[0][c].w[j], kv.v[1][c].w[j], 0x7632);
                const u32 a2 = permute_bytes(kv.v[2][c].w[j], kv.v[3][c].w[j], 0x5410), a3 = permute_bytes(kv.v[2][c].w[j], kv.v[3][c].w[j], 0x7632);
#pragma unroll
                for (int i = 0; i < 4; ++i) out[c][j][i] *= shrink[i % 2];
                mma_bf16(out[c][j], a0, a1, a2, a3, p_low, p_high);
            }
        if (next < last) kv.load_v(v_cache + entries[1] * block_stride, context - next * KV_BLOCK);
        prefetch(block + 3 * WARPS, entries[3]);
#pragma unroll
        for (int i = 0; i < 3; ++i) entries[i] = entries[i + 1];
        entries[3] = entry(block + 4 * WARPS);
    }

    // The warps' results meet in shared memory.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) sum[h] += shuffle_xor(sum[h], mask);
        if (g == 0) {
            maxima[warp * HEADS + 2 * t + h] = max[h];
            totals[warp * HEADS + 2 * t + h] = sum[h];
        }
#pragma unroll
        for (int c = 0; c < F::V_CHUNKS; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int element = 64 * c + 8 * g + 2 * j + i;
                    if (element < D) outs[(warp * HEADS + 2 * t + h) * (D + 1) + element] = out[c][j][2 * i + h];
                }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < heads * D; i += WARPS * 32) {
        const int head = i / D, element = i % D;
        float high = NEG_INFINITY, total = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) high = fmaxf(high, maxima[w * HEADS + head]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            float weight = exp2_fast(maxima[w * HEADS + head] - high);
            total += totals[w * HEADS + head] * weight;
            value += outs[(w * HEADS + head) * (D + 1) + element] * weight;
        }
        if (n_splits == 1) {
            store(attn + row * D + i, to_bf16(value / total));
            continue;
        }
        u64 at = (static_cast<u64>(blockIdx.z) * n_heads + first_head + head) * n_splits + split;
        store(part + at * D + element, value);
        if (element == 0) {
            store(part_ml + at * 2, high);
            store(part_ml + at * 2 + 1, total);
        }
    }
}

template <int D>
__device__ __forceinline__ void attention_combine(const float* part, const float* part_ml, const Seq* seqs, bf16* attn, int n_heads, int n_splits) {
    SHARED(float, outs, WARPS * D);
    SHARED(float, totals, WARPS);
    let_next_kernel_start();
    const Seq seq = load(seqs + blockIdx.y);
    const int head = static_cast<int>(blockIdx.x), n_blocks = div_up(static_cast<int>(seq.context_len), KV_BLOCK);
    const int used = n_blocks == 0 ? 0 : div_up(n_blocks, blocks_per_split(n_blocks, n_splits));
    const u64 at = (static_cast<u64>(blockIdx.y) * n_heads + head) * n_splits;
    part += at * D;
    part_ml += at * 2;
    wait_for_previous_kernel();

    float high = NEG_INFINITY;
    for (int s = lane_id(); s < used; s += 32) high = fmaxf(high, load(part_ml + s * 2));
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) high = fmaxf(high, shuffle_xor(high, mask));

    // Splits in turn to the warps, four elements to a lane.
    const int element = lane_id() * 4;
    float total = 0.0f, out[4] = {};
#pragma unroll 4
    for (int s = warp_id(); s < used; s += WARPS) {
        const float weight = exp2_fast(load(part_ml + s * 2) - high);
        const Vec16 v = element < D ? load16(part + static_cast<u64>(s) * D + element) : zero16();
        total += load(part_ml + s * 2 + 1) * weight;
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] += bits_to_float(v.w[i]) * weight;
    }
    if (lane_id() == 0) totals[warp_id()] = total;
    for (int i = 0; i < 4; ++i)
        if (element < D) outs[warp_id() * D + element + i] = out[i];
    __syncthreads();
    const int mine = static_cast<int>(threadIdx.x);
    if (mine >= D) return;
    float sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        sum += totals[w];
        value += outs[w * D + mine];
    }
    store(attn + (static_cast<u64>(seq.start) * n_heads + head) * D + mine, to_bf16(used == 0 ? 0.0f : value / sum));
}

#ifndef DECODE_BLOCKS
#define DECODE_BLOCKS 1  // a multiprocessor
#endif
#define ATTENTION_DECODE(D)                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, DECODE_BLOCKS)                                                                         \
        attention_decode_##D(const bf16* q, const bf16* k_cache, const bf16* v_cache, const u32* block_tables, const Seq* seqs, float* part,       \
                             float* part_ml, bf16* attn, int n_heads, int n_kv_heads, int max_blocks, int n_splits, float scale) {                 \
        attention_decode<D>(q, k_cache, v_cache, block_tables, seqs, part, part_ml, attn, n_heads, n_kv_heads, max_blocks, n_splits, scale);       \
    }                                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                                                        \
        attention_combine_##D(const float* part, const float* part_ml, const Seq* seqs, bf16* attn, int n_heads, int n_splits) {                   \
        attention_combine<D>(part, part_ml, seqs, attn, n_heads, n_splits);                                                                         \
    }
ATTENTION_DECODE(64)
ATTENTION_DECODE(80)
ATTENTION_DECODE(96)
ATTENTION_DECODE(128)

KERNELS(attention_decode_64, attention_combine_64, attention_decode_80, attention_combine_80, attention_decode_96, attention_combine_96, attention_decode_128,
        attention_combine_128)
