// Products of a weight matrix with 1 to 8 rows: y = x · wᵀ, the work of a decode step. Bound by reading w once. (From 4 rows on gemv_batch.cu takes
// over, but for the tiled form.)
//
//   gemv_bf16(w bf16 [n, k], x bf16 [m, ldx], bias bf16 [n] or null, y bf16 [m, ldy], m, n, k, ldx, ldy)
//   gemv_f32 (…, y f32 [m, ldy], …)                       the vocabulary's head: logits
//   gemv_gate_up_silu(w bf16 [2 · inter, k] (gate rows, then up rows), x, y bf16 [m, ldy], m, inter, k, ldx, ldy)
//                                                         y = silu(x · gateᵀ) · (x · upᵀ)
//   gemv_gate_up_silu_tiled(w bf16 [2 · inter, k] (8 gate rows, their 8 up rows, and so on), …)
//                                                         the same for the order in which such rows lie in host memory; inter % 8 == 0
//   gemv_qkv_rope(w bf16 [(n_heads + 2 · n_kv_heads) · head_dim, k], x, bias of w's rows or null, inv_freq f32 [head_dim / 2],
//                 rope_scale, positions u32 [m], slots u32 [m], q bf16 [m, n_heads · head_dim],
//                 k_cache, v_cache bf16 [n_blocks, n_kv_heads, 16, head_dim], m, n_heads, n_kv_heads, head_dim, k, ldx)
//                                                         q and k rotated, k and v in the cache (models without head norms)
//     1 ≤ m ≤ 8; k % 8 == 0, ldx % 8 == 0; rows of w and x 16-byte aligned; head_dim % 16 == 0; n, inter any.
//     grid and block: `tiles` = ceil(n / 16), or ceil(inter / 8), or heads · head_dim / 16; see launch rule below. Any grid ≥ 1 and any
//     block of 1 to 16 warps is right; the blocks share the rows evenly, the warps of a block cut k among them.
//
// Launch rule: the kernel uses at most 128 registers a thread, so 16 warps share a multiprocessor, as 16 × 1, 8 × 2 or 4 × 4 (warps of
// a block × blocks). For each, grid = min(sms · blocks, 8 · tiles): every block has the same rows but for one pair, in as few tiles as hold
// them. Take the one whose fullest multiprocessor has the fewest tiles, those of a block · ceil(grid / sms); among equals 8 × 2,
// then 16 × 1, then 4 × 4, but 16 × 1 first where tiles ≤ sms or ≥ 32 · sms (heads). More warps than ceil(k / 256) have nothing to do: leave those out (4 × 4
// always stays in). tests/kernels/cases.py has it as code.
//
// How it works. A tensor-core product m16n8k16 takes 16 rows of w against 8 rows of x, so the arithmetic costs next to nothing for any
// m ≤ 8 and each warp is a machine for loading: per step it holds a 16 × 64 piece of w in registers, STAGES steps ahead. The
// sum over k does not care about the order of k, so a lane loads 16 consecutive bytes (8 k) of its row straight into what the
// product's fragments want: no shared memory on the way. Steps run on across tiles, so the loads never drain; the first ones
// leave before the kernel in front has ended (weights do not depend on it). Rows of a tile need not be neighbours: gate row i
// sits 8 rows above up row i, element i of a head above element i + head_dim / 2, so that the same lane ends up
// with both and SiLU and rotation happen in registers. Such a pair of rows is the unit in which blocks share the work: 3584 rows
// are 224 full tiles, which 132 multiprocessors take as long to read as 264, and 13.6 pairs for each of them, which is even.
//
// Numerics: products exact, sums in f32 (tensor core within a step, then the warps' sums in order), one rounding at the end. The order
// depends on k and the number of warps alone: not on m, not on the other rows.
//
// Measured on an H200 (132 multiprocessors, driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py: chains of launches in a graph over
// weights of 0.6 GB and more, overlap on, m = 1. Floor: bytes over 4.34 TB/s, the read rate of that day's first three measurements
// (two later ones gave 4.53). cuBLAS through torch.mm in the same run.
//     n × k, launch            MB   µs (of floor)  cuBLAS    |  n × k, launch             MB   µs (of floor)  cuBLAS
//     4608×3584    16 × 1    33.0   10.4   73%    12.8       |  5120×8192    16 × 1     83.9   23.4   83%    26.6
//     3584×3584     8 × 2    25.7    7.7   76%    11.6       |  8192×4096     8 × 2     67.1   17.8   87%    19.1
//     37888×3584    8 × 2   271.6   64.9   96%    76.5       |  29568×8192    8 × 2    484.4  116.3   96%   130.2
//     3584×18944    8 × 2   135.8   35.8   87%    38.9       |  8192×14784    8 × 2    242.2   59.1   95%    64.7
//     152064×3584   8 × 2  1090.0  251.0  100%   281.9       |  76032×8192    8 × 2   1245.7  289.0   99%   321.4
//     2304×3584     8 × 2    16.5    6.4   60%     9.3       |  9728×896      4 × 4     17.4    6.5   62%     7.3
//     3584×1792     8 × 2    12.8    4.7   63%     6.3       |  896×4864     16 × 1      8.7    4.6   44%     7.8
//     18944×3584   16 × 1   135.8   34.2   92%    37.8       |
//     3584×9472     8 × 2    67.9   17.9   87%    21.5       |
// (37888, 29568, 18944 and 9728 rows: gate·up with SiLU.) A whole decode step of the 7B shape at context 1024, 8 × 2 throughout: 3747 µs,
// 87% of its floor; half of it (two ranks, without all-reduce) 2072 µs, 79%; half of 72B 18.1 ms, 91%.
// On H100s, whole steps as `tandem bench` has them (2026-11-25, context 1024, read rate 3.08 TB/s): 7B 5.23 ms, 88% of the floor; half of 7B with its
// sums over two ranks 2.89 ms, 80%; half of 72B 26.2 ms, 88%.
//
// All of that with whole tiles handed to blocks. Pairs of rows instead were expected to take 8 of 100 off a 7B step (3584×18944 35.7 → 31 µs). On an
// H200 of 4.61 TB/s (2026-11-25): 3710 → 3642 µs, 2 of 100, 85% of the floor; 3584×18944 35.9 → 33.5 µs, 8192×14784 59.4 → 59.1; half of 7B 2041 →
// 2052 µs, half of 72B 17747 → 17310 µs, 90%. 4608×3584 (11.4 against 10.7 µs with whole tiles) got slower, 5120×8192 (21.6 against 23.4) faster.
// One by one the products of the 28 layers are above their floors by 162 µs (gate·up), 118 (q/k/v), 112 (down) and 79 (o), the head by 14; attention
// and norms come to some 230 alone. The step is 563 above its floor, so a part of that overlaps.
//
// Tried:
//   * L2 hint of the loads, with the first rule, expected nothing: 128B 87 to 99% of the floor at the shapes above 100 MB, 256B 84 to 96%,
//     none 79 to 88%.
//   * STAGES 2, 3, 4, with the first rule: within 4% at the large shapes, 4 up to 10% ahead at the smallest.
//   * 4 × 4 for everything above 264 tiles (the first rule): 5% slower than 8 × 2 from 2000 tiles on, up to 15% slower between 144 and 288,
//     even at 320, 5% faster at 512.
//   * half the registers left free for the next kernel (8 × 1, 4 × 2), expected a head start for it: 0 to 30% slower in chains, whole steps 12%
//     (7B), 24% (half of it) and 51% (half of 72B) slower; too few loads in flight explains the first; for the last only
//     a guess: blocks that start early gather on the multiprocessors that are free first, two on one and none on another.
//   * prefetch.global.L2 8 or 16 steps ahead of the registers, expected to cover the gaps between kernels: 10 to 55% slower. Counted
//     afterwards: 16 warps × 8 steps × 2 KiB × 132 are 35 MB, too much of the L2 to survive until it is used.
//   * once, ahead of the wait, prefetch.global.L2 of the 2, 4, 8 or 16 steps after the registers' (H200, 2026-11-25), expected to use the wait behind norms and
//     attention: a 7B step 0.7, 2.7, 5 and 9% slower, half of 72B 0.5 to 9%. There is no such wait: without its norms' kernels a 7B or 72B step is no shorter.
//   * overlap (programmatic launch) off: 3% slower for the 7B step and half of 72B, 11% for half of 7B (with the first rule).
// m = 2, 4, 8 here (H200s, 2026-11-25): within 8% of m = 1, 16% at the smallest shapes. cuBLAS is slower but for
//     4608×3584    m = 8: 11.1 µs against 11.5                 29568×8192   m = 2, 4, 8: 111 to 114 against 115, 116, 119; with the
//     152064×3584  m = 8: 252.8 against 250.7 since 16 × 1      SiLU that must follow it 114 to 115
//     76032×8192   m = 2, 4, 8: 280 to 283 against 284, 289, 296 to 300
// The cause is x: with none of it loaded at all (any numbers in its place) m = 8 takes 114.6 µs at 29568×8192 and 281 at 76032×8192. For m = 8 a step
// reads 1 KB of x from the L1 beside its 2 KB of w. Tried against it, all on one day, microseconds at 29568×8192 for m = 1 and 8 and then a whole step of
// half of 72B, of 7B and of half of 7B beside this kernel's 17.26, 3.60 and 2.02 ms in the same call:
//   * x under L1::evict_last: no change (114, 120).
//   * two tiles of w a step for one of x, 2 stages: 113.9, 117.4. 4608×3584 gets 11% faster (9.7 µs: 17.5 pairs are then one round, not three), what has
//     less than 8 pairs a block up to 20% slower. Chosen by the pairs of a block, in one kernel with the other: steps 17.47, 3.64, 2.05 ms.
//   * all of x in registers where a warp has at most 4 steps of it (k ≤ 4096 for 16 warps): 152064×3584 at m = 8 250 µs in one build and 266 in the next.
//   * x as the product's 16 rows and w as its 8 columns, so that a load is an operand as it is (no moves: 52 instructions a step of 16 rows, not 77), loads
//     clamped, not predicated, two tiles, 2 stages, x one step ahead: 112, 114.3 µs; m = 8 faster than here by 2 to 4% nearly everywhere. Steps
//     17.02, 3.63, 2.07 ms, 0.5B 0.69 against 0.65; of 8 sequences 3.93 against 4.05 ms (7B) and 16.8 against 17.5 (32B). A single sequence gains 1.4% on 72B and
//     loses 0.7, 2.5 and 5% on the others, so this became gemv_batch.cu, for 4 rows and more. Four tiles, one stage: 112.5, 114.5, small shapes up to 3 times slower.
//   * branches around loads that are beyond k: 7% slower.
//   * cp.async into a ring of each thread's own in shared memory, 2 to 4 stages of 32 to 64 KB: 115, 119, small shapes 10 to 30% slower. Half of it, so that the next
//     kernel's blocks would fit beside (8 × 1): no better.
//   * rounds of neighbouring tiles for all blocks together (a moving window of w instead of a stretch for each): 0 to 5% slower.
// Why moving things changes so much: ptxas gives every load whose use is in the next iteration the same scoreboard, so a wait for one of them is a wait for
// all, the youngest too. Within a warp nothing is pipelined; 16 warps beside each other are. What waits separately (cp.async) is no faster.
#include "gemv_out.cuh"

#ifndef GEMV_STAGES
#define GEMV_STAGES 4
#endif
constexpr int STAGES = GEMV_STAGES;
constexpr int STEP = 64;  // k of a warp's step
constexpr int MAX_WARPS = 16;

// Walks over (tile, step) in the order of the computation. A block's tiles are its pairs of rows `at` .. `end`, 8 at a time, the last one
// with what is left; `low` and `high` are this lane's two rows.
template <class Rows>
struct Cursor {
    const Rows& rows;
    int at, end, step;
    const bf16 *low, *high;

    __device__ __forceinline__ Cursor(const Rows& r, int first, int last) : rows(r), at(first), end(last), step(0) { enter(); }
    __device__ __forceinline__ void enter() {
        low = high = nullptr;
        const int pair = at + lane_id() / 4;
        if (pair < end) rows.pointers(pair / 8, pair % 8, low, high);
    }
    __device__ __forceinline__ void advance(int steps) {
        if (++step < steps) return;
        step = 0;
        at += 8;
        enter();
    }
};

struct Piece {
    Vec16 low[2], high[2];  // k 0-31 and 32-63 of the step
};
struct XPiece {
    Vec16 half[2];
};

template <class Rows>
__device__ __forceinline__ void gemv(const Rows& rows, const bf16* x, int m, int k, int ldx, int n_tiles) {
    SHARED(Vec16, sums, 2 * MAX_WARPS * 32);
    const int lane = lane_id(), warp = warp_id(), n_warps = static_cast<int>(blockDim.x) / 32;
    // Whole rounds of the stages, so that a tile ends where a round ends; steps beyond k load nothing and add zeros.
    const int steps = div_up(div_up(k, STEP), n_warps * STAGES) * STAGES;
    const int my_k = lane % 4 * 8, x_row = lane / 4;
    const bf16* my_x = x_row < m ? x + static_cast<u64>(x_row) * ldx : nullptr;

    Piece w[STAGES];
    XPiece xs[STAGES];
    // In 32 bits: 500 blocks may share 16 million rows.
    const u32 n_pairs = static_cast<u32>(n_tiles) * 8;
    const int first = static_cast<int>(n_pairs * blockIdx.x / gridDim.x), end = static_cast<int>(n_pairs * (blockIdx.x + 1) / gridDim.x);
    Cursor<Rows> ahead(rows, first, end);
    auto load_w = [&](Piece& piece) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int at = (ahead.step * n_warps + warp) * STEP + h * 32 + my_k;
            piece.low[h] = at < k && ahead.low ? load_stream(ahead.low + at) : zero16();
            piece.high[h] = at < k && ahead.high ? load_stream(ahead.high + at) : zero16();
        }
        ahead.advance(steps);
    };
    int x_step = 0;
    auto load_x = [&](XPiece& piece) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int at = (x_step * n_warps + warp) * STEP + h * 32 + my_k;
            piece.half[h] = at < k && my_x ? load16(my_x + at) : zero16();
        }
        if (++x_step == steps) x_step = 0;
    };

    let_next_kernel_start();
#pragma unroll
    for (int s = 0; s < STAGES; ++s) load_w(w[s]);
    wait_for_previous_kernel();
#pragma unroll
    for (int s = 0; s < STAGES; ++s) load_x(xs[s]);

    for (int at = first; at < end; at += 8) {
        float acc[4] = {};
        for (int step = 0; step < steps; step += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; ++s) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int i = 0; i < 4; i += 2)
                        mma_bf16(acc, w[s].low[h].w[i], w[s].high[h].w[i], w[s].low[h].w[i + 1], w[s].high[h].w[i + 1], xs[s].half[h].w[i],
                                 xs[s].half[h].w[i + 1]);
                load_w(w[s]);
                load_x(xs[s]);
            }
        }
        // One warp adds up all warps' sums. Two buffers and one barrier a tile: the others need not wait for it.
        auto buffer = sums + at / 8 % 2 * MAX_WARPS * 32;
        buffer[warp * 32 + lane] = Vec16{{float_to_bits(acc[0]), float_to_bits(acc[1]), float_to_bits(acc[2]), float_to_bits(acc[3])}};
        __syncthreads();
        if (warp != at / 8 % n_warps) continue;
        float sum[4] = {};
        for (int other = 0; other < n_warps; ++other) {
            Vec16 v = buffer[other * 32 + lane];
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += bits_to_float(v.w[i]);
        }
        const int pair = at + lane / 4;
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (pair < end && lane % 4 * 2 + j < m) rows.finish(pair / 8, pair % 8, lane % 4 * 2 + j, sum[j], sum[2 + j]);
    }
}

// 16 neighbouring rows a tile.
template <class Out>
struct PlainRows {
    const bf16 *w, *bias;
    Out* y;
    int n, k, ldy;

    __device__ __forceinline__ void pointers(int tile, int g, const bf16*& low, const bf16*& high) const {
        int row = tile * 16 + g;
        if (row < n) low = w + static_cast<u64>(row) * k;
        if (row + 8 < n) high = w + static_cast<u64>(row + 8) * k;
    }
    __device__ __forceinline__ void finish(int tile, int g, int token, float low, float high) const {
        int row = tile * 16 + g;
        Out* to = y + static_cast<u64>(token) * ldy + row;
        if (row < n) put(to, bias ? low + to_float(load(bias + row)) : low);
        if (row + 8 < n) put(to + 8, bias ? high + to_float(load(bias + row + 8)) : high);
    }
};

// 8 gate rows over their 8 up rows.
struct GateUpRows {
    const bf16* w;
    bf16* y;
    int inter, k, ldy;

    __device__ __forceinline__ void pointers(int tile, int g, const bf16*& low, const bf16*& high) const {
        int row = tile * 8 + g;
        if (row >= inter) return;
        low = w + static_cast<u64>(row) * k;
        high = w + static_cast<u64>(inter + row) * k;
    }
    __device__ __forceinline__ void finish(int tile, int g, int token, float gate, float up) const {
        int row = tile * 8 + g;
        if (row < inter) put(y + static_cast<u64>(token) * ldy + row, silu(gate) * up);
    }
};

// The same where every tile's rows lie together.
struct TiledGateUpRows {
    const bf16* w;
    bf16* y;
    int k, ldy;

    __device__ __forceinline__ void pointers(int tile, int g, const bf16*& low, const bf16*& high) const {
        low = w + static_cast<u64>(tile * 16 + g) * k;
        high = low + static_cast<u64>(8) * k;
    }
    __device__ __forceinline__ void finish(int tile, int g, int token, float gate, float up) const {
        put(y + static_cast<u64>(token) * ldy + tile * 8 + g, silu(gate) * up);
    }
};

// 8 elements of a head's first half over their partners in the second.
struct QkvRows {
    const bf16* w;
    QkvOut out;
    int k;

    __device__ __forceinline__ int first_row(int tile, int g) const {
        int per_head = out.head_dim / 16;
        return tile / per_head * out.head_dim + tile % per_head * 8 + g;
    }
    __device__ __forceinline__ void pointers(int tile, int g, const bf16*& low, const bf16*& high) const {
        low = w + static_cast<u64>(first_row(tile, g)) * k;
        high = low + static_cast<u64>(out.head_dim / 2) * k;
    }
    __device__ __forceinline__ void finish(int tile, int g, int token, float low, float high) const {
        out.put_pair(first_row(tile, g), token, low, high);
    }
};

#define GEMV_KERNEL extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, 1)

GEMV_KERNEL gemv_bf16(const bf16* w, const bf16* x, const bf16* bias, bf16* y, int m, int n, int k, int ldx, int ldy) {
    gemv(PlainRows<bf16>{w, bias, y, n, k, ldy}, x, m, k, ldx, div_up(n, 16));
}

GEMV_KERNEL gemv_f32(const bf16* w, const bf16* x, const bf16* bias, float* y, int m, int n, int k, int ldx, int ldy) {
    gemv(PlainRows<float>{w, bias, y, n, k, ldy}, x, m, k, ldx, div_up(n, 16));
}

GEMV_KERNEL gemv_gate_up_silu(const bf16* w, const bf16* x, bf16* y, int m, int inter, int k, int ldx, int ldy) {
    gemv(GateUpRows{w, y, inter, k, ldy}, x, m, k, ldx, div_up(inter, 8));
}

GEMV_KERNEL gemv_gate_up_silu_tiled(const bf16* w, const bf16* x, bf16* y, int m, int inter, int k, int ldx, int ldy) {
    gemv(TiledGateUpRows{w, y, k, ldy}, x, m, k, ldx, inter / 8);
}

GEMV_KERNEL gemv_qkv_rope(const bf16* w, const bf16* x, const bf16* bias, const float* inv_freq, float rope_scale, const u32* positions,
                          const u32* slots, bf16* q, bf16* k_cache, bf16* v_cache, int m, int n_heads, int n_kv_heads, int head_dim, int k, int ldx) {
    QkvRows rows{w, {bias, inv_freq, rope_scale, positions, slots, q, k_cache, v_cache, n_heads, n_kv_heads, head_dim}, k};
    gemv(rows, x, m, k, ldx, (n_heads + 2 * n_kv_heads) * (head_dim / 16));
}

KERNELS(gemv_bf16, gemv_f32, gemv_gate_up_silu, gemv_gate_up_silu_tiled, gemv_qkv_rope)
