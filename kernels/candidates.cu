// A token drawn from each row of f32 logits: the 64 most likely are found, exactly, and one of them is drawn, in the order of
// transformers' `generate`: penalty, temperature, top-k (of at most 64), top-p, min-p.
//
//   candidates(logits f32 [n_rows, ld], n_known, ld, first_id, draws Draw [n_rows], seqs Seq, tables u32 [.., 1], history u32 [n_blocks, 16],
//              out u64 [n_rows, n_parts, 64])
//     grid (n_parts, n_rows), block 512, n_parts = ceil(n_known / 1024). Tokens 0 .. n_known of each row, penalised where the row's
//     sequence has them already (history is what embed.cu kept); ids count from first_id. The logits stay as they are.
//   candidates_merge(in u64, n, group_stride, row_stride, out u64 [n_rows, n_parts, 64])
//     grid (n_parts, n_rows), block 512, n_parts = ceil(n / 1024). The n keys of row r are groups of 64: key e is element
//     (e / 64) · group_stride + r · row_stride + e % 64. (64, n) behind another launch; (64 · n_rows, 64) behind what the ranks
//     have gathered, [n_ranks][n_rows][64].
//   draw(keys u64 [n_rows, 64], draws Draw [n_rows], token u32 [n_rows], logit f32 [n_rows])
//     grid (n_rows), block 32. Rows without temperature and penalty are left alone: sample.cu's choice stands.
//
// How it works. A tournament: blocks sort 1024 entries each and keep 64, until one block is left. A key is the logit in its upper half,
// as an integer in the same order, and below it the id's complement, so that among equals the lowest id comes first; its last bit
// says whether the logit was penalised, from which `draw` finds the model's own. 0 is no token; lists are padded with it and NaN
// becomes it. Every list is sorted, best first. For the penalty each block marks which of its 1024 tokens the sequence has.
//
// Numerics: the lists are exact. Probabilities are f32 (exp2 to about 2 units in the last place) and summed in one order, the same on every
// rank. The logit of a penalised token is off by up to 2 units in the last place. Ties with the k-th token stay, as far as the 64 reach.
// On an H200 (2026-11-25), Qwen2.5-7B at context 1024, 256 tokens: 3.734 ms a token drawn (with and without penalty), 3.703 greedy. With the draw
// itself on the host, which then waited for the 64 keys at every step, it was 3.76 to 3.78.
#include "common.cuh"

constexpr int ENTRIES = 1024, KEPT = 64;

// How a row's token is drawn.
struct alignas(16) Draw {
    float temperature;  // 0: the most likely token
    u32 top_k;          // 1 .. 64
    float top_p, min_p, repetition_penalty;
    float uniform;  // in [0, 1): which one it is
    u32 seq;        // the row's sequence in `seqs`
    u32 unused;
};
__device__ __forceinline__ Draw load_draw(const Draw* p) {
    Vec16 a = load16(p), b = load16(reinterpret_cast<const Vec16*>(p) + 1);
    return Draw{bits_to_float(a.w[0]), a.w[1], bits_to_float(a.w[2]), bits_to_float(a.w[3]), bits_to_float(b.w[0]), bits_to_float(b.w[1]), b.w[2], 0};
}

__device__ __forceinline__ u64 key_of(float logit, u32 id, bool penalised) {
    if (!(logit == logit)) return 0;
    u32 bits = float_to_bits(logit);
    u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(ordered) << 32 | static_cast<u32>(~id << 1) | (penalised ? 1u : 0u);
}
__device__ __forceinline__ float logit_of(u64 key) {
    u32 ordered = static_cast<u32>(key >> 32);
    return bits_to_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ u32 id_of(u64 key) {
    return ~static_cast<u32>(key) >> 1;
}

// Sorts the block's keys, largest first (Batcher's bitonic network), and stores the first 64.
__device__ __forceinline__ void keep_largest(SharedPtr<u64> keys, u64* out) {
    const int t = static_cast<int>(threadIdx.x);
    for (int size = 2; size <= ENTRIES; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            int low = 2 * t - (t & (step - 1)), high = low + step;
            u64 a = keys[low], b = keys[high];
            bool descending = (low & size) == 0;
            if ((a < b) == descending) {
                keys[low] = b;
                keys[high] = a;
            }
        }
    }
    __syncthreads();
    if (t < KEPT) store(out + t, static_cast<u64>(keys[t]));
}

// Marks in a bit each which of the tokens first .. first + ENTRIES the sequence has.
__device__ __forceinline__ void mark_seen(SharedPtr<u32> seen, u32 first, const Seq& seq, const u32* tables, const u32* history) {
    const u32 t = threadIdx.x;
    if (t < ENTRIES / 32) seen[t] = 0;
    __syncthreads();
    for (u32 at = 4 * t; at < seq.context_len; at += 4 * 512) {
        u32 block = load(tables + seq.table_row + at / KV_BLOCK);
        Vec16 tokens = load16(history + static_cast<u64>(block) * KV_BLOCK + at % KV_BLOCK);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u32 entry = tokens.w[i] - first;
            if (at + i < seq.context_len && entry < ENTRIES) or_shared(seen + static_cast<int>(entry / 32), 1u << (entry % 32));
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(512) candidates(const float* logits, int n_known, int ld, u32 first_id, const Draw* draws, const Seq* seqs,
                                                             const u32* tables, const u32* history, u64* out) {
    SHARED(u64, keys, ENTRIES);
    SHARED(u32, seen, ENTRIES / 32);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Draw draw = load_draw(draws + blockIdx.y);
    const float penalty = draw.repetition_penalty;
    const int begin = static_cast<int>(blockIdx.x) * ENTRIES;
    if (penalty != 1.0f) mark_seen(seen, first_id + static_cast<u32>(begin), load(seqs + draw.seq), tables, history);
    const float* row = logits + static_cast<u64>(blockIdx.y) * ld + begin;
    for (int i = static_cast<int>(threadIdx.x); i < ENTRIES; i += 512) {
        if (begin + i >= n_known) {
            keys[i] = 0;
            continue;
        }
        float logit = load(row + i);
        bool penalised = penalty != 1.0f && (seen[i / 32] >> (i % 32) & 1u) != 0;
        if (penalised) logit = logit > 0.0f ? logit / penalty : logit * penalty;
        keys[i] = key_of(logit, first_id + static_cast<u32>(begin + i), penalised);
    }
    keep_largest(keys, out + (static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x) * KEPT);
}

extern "C" __global__ void __launch_bounds__(512) candidates_merge(const u64* in, int n, int group_stride, int row_stride, u64* out) {
    SHARED(u64, keys, ENTRIES);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const u64* row = in + static_cast<u64>(blockIdx.y) * row_stride;
    for (int i = static_cast<int>(threadIdx.x); i < ENTRIES; i += 512) {
        int e = static_cast<int>(blockIdx.x) * ENTRIES + i;
        keys[i] = e < n ? load(row + static_cast<u64>(e / KEPT) * group_stride + e % KEPT) : 0;
    }
    keep_largest(keys, out + (static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x) * KEPT);
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, shuffle_xor(v, mask));
    return v;
}
__device__ __forceinline__ u32 warp_min(u32 v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        u32 other = shuffle_xor(v, mask);
        v = other < v ? other : v;
    }
    return v;
}
// The sum over the lanes before this one.
__device__ __forceinline__ float sum_before(float v) {
    float before = 0.0f, total = v;
#pragma unroll
    for (int mask = 1; mask < 32; mask <<= 1) {
        float other = shuffle_xor(total, mask);
        if (lane_id() & mask) before += other;
        total += other;
    }
    return before;
}

// Which of the 64 sorted logits is drawn; a lane holds two neighbours, -infinity where there is none.
__device__ __forceinline__ u32 drawn_index(const float (&logits)[2], const Draw& draw) {
    const u32 first = 2 * static_cast<u32>(lane_id());
    float scaled[2], kth = NEG_INFINITY, p[2];
    const float best = warp_max(logits[0]);
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        // From the largest down, so that no temperature is too small for the quotients.
        scaled[i] = (logits[i] - best) / draw.temperature;
        if (first + i + 1 >= draw.top_k) kth = fmaxf(kth, scaled[i]);
    }
    kth = warp_max(kth);
#pragma unroll
    for (int i = 0; i < 2; ++i) p[i] = scaled[i] >= kth && scaled[i] > NEG_INFINITY ? exp2_fast(scaled[i] * LOG2_E) : 0.0f;

    // What top-p and min-p drop are the last ones: sums before what stays do not change.
    const float top_k_sum = warp_sum(p[0] + p[1]);
    float before[2] = {sum_before(p[0] + p[1]), 0.0f};
    before[1] = before[0] + p[0];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        bool inside = (draw.top_p >= 1.0f || before[i] < draw.top_p * top_k_sum) && p[i] >= draw.min_p;
        if (first + i > 0 && !inside) p[i] = 0.0f;
    }
    const float target = draw.uniform * warp_sum(p[0] + p[1]);
    u32 drawn = KEPT, last = 0;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        if (p[i] == 0.0f) continue;
        last = first + i;
        if (drawn == KEPT && target < before[i] + p[i]) drawn = first + i;
    }
    // Rounding may leave the sums a hair under the target: the draw then belongs to the last one.
    drawn = warp_min(drawn);
    last = KEPT - warp_min(KEPT - last);
    return drawn < KEPT ? drawn : last;
}

extern "C" __global__ void draw(const u64* keys, const Draw* draws, u32* token, float* logit) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Draw draw = load_draw(draws + blockIdx.x);
    const u64* row = keys + static_cast<u64>(blockIdx.x) * KEPT + 2 * lane_id();
    const u64 mine[2] = {load(row), load(row + 1)};
    const bool greedy = draw.temperature == 0.0f;
    if (greedy && draw.repetition_penalty == 1.0f) return;
    float logits[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) logits[i] = mine[i] == 0 ? NEG_INFINITY : logit_of(mine[i]);
    const u32 index = greedy ? 0 : drawn_index(logits, draw);
    if (index / 2 != static_cast<u32>(lane_id())) return;
    const u64 key = mine[index % 2];
    // A row of nothing but NaN has no list.
    if (key == 0) return;
    float own = logits[index % 2];
    if (key & 1u) own = own > 0.0f ? own * draw.repetition_penalty : own / draw.repetition_penalty;
    store(token + blockIdx.x, id_of(key));
    store(logit + blockIdx.x, own);
}

KERNELS(candidates, candidates_merge, draw)
