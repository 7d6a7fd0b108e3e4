// Products of a weight matrix with 4 to 8 rows of x: what gemv.cu does, for steps of several sequences.
//
//   gemv_batch_bf16, gemv_batch_f32, gemv_batch_gate_up_silu, gemv_batch_qkv_rope
//     Arguments, preconditions and numerics of the kernels of gemv.cu without `_batch`; any 1 ≤ m ≤ 8 is right, and any grid ≥ 1 and
//     block of 1 to 16 warps.
//
// Launch rule: the most of 16, 8 and 4 warps a block that have more than one step each (k > 64 · warps), as many blocks as fit, 16 warps
// a multiprocessor, and no more than pairs of rows. tests/kernels/cases.py has it as code.
//
// How it works. Here x costs as much as w: for m = 8 a step of gemv.cu's loads 1 KB of it from the L1 for every 2 KB of w. So a step is two
// tiles, 32 rows of w for one piece of x. x is the tensor-core product's 16 rows (8 of them not there) and w its 8 columns, the
// other way around than in gemv.cu: then 16 bytes of a row of w are two products' operands as they were loaded, where gemv.cu moves
// registers about to bring two rows together, a quarter of its instructions. Loads are not predicated: a lane without a
// row of its own reads what its neighbour reads, and beyond k x is zero.
// Rows of w still come in pairs (gate and up, the halves of a head, row i and row i + n / 2), shared evenly by the blocks, in rounds of
// equal size.
//
// Measured on H200s (4.6 TB/s, driver 580, CUDA 13.0), 2026-11-25, tests/kernels/bench.py: microseconds for m = 4 and 8 beside gemv.cu's and cuBLAS's.
//     n × k          this          gemv.cu       cuBLAS        |  n × k          this          gemv.cu       cuBLAS
//     4608×3584     10.9, 11.3    10.9, 11.5    11.0, 11.0     |  5120×8192     22.0, 22.8    23.5, 24.8    25.9, 26.3
//     3584×3584      8.3,  8.4     8.3,  8.6    11.6, 11.8     |  8192×4096     17.0, 17.2    17.5, 18.2    19.1, 19.1
//     37888×3584    64.4, 65.6    65.9, 67.4    71.4, 71.6 *   |  29568×8192   111.9, 113.7  116.3, 119.6  114.1, 114.1 *
//     3584×18944    34.2, 34.5    34.2, 35.3    38.9, 38.5     |  8192×14784    58.9, 59.6    59.0, 61.3    60.9, 61.0
//     152064×3584  250.5, 251.2   248.8, 250.7 251.2, 252.8    |  76032×8192   283.5, 288.3  289.1, 295.8  281.1, 281.0
//     18944×3584    34.0, 34.3    34.2, 35.2    39.1, 38.4 *   |  9728×896       6.4,  6.5     7.3,  7.6     9.4,  9.5 *
// (* with the SiLU that must follow cuBLAS. gemv.cu's in other calls of the same day.) Decode steps at context 1024 with this kernel for all m
// (`tandem bench scaling --ranks 1 --prompt-tokens 1024 --batch 1,2,4,8`): 7B 3.66, 3.71, 3.77, 3.93 ms, with gemv.cu 3.62, 3.73, 3.84, 4.05;
// 32B 15.8 and, m = 8, 16.8, with gemv.cu 15.5 and 17.5; 0.5B 0.69 and 0.79, with gemv.cu 0.66 and 0.81. Hence from m = 4.
//
// Tried (more in gemv.cu's notebook, where this one comes from):
//   * TILES × STAGES 1 × 4 and 4 × 1 for m = 8: 29568×8192 122 and 113, 37888×3584 76 and 67, 3584×18944 41 and 36, 3584×1792 7.1 and 5.9 µs.
//   * x two steps ahead: within 2%, 29568×8192 2% slower.
#include "gemv_out.cuh"

constexpr int TILES = 2;   // of 8 pairs of rows each, in a step
constexpr int STAGES = 2;  // steps of w on their way
constexpr int STEP = 64;   // k of a warp's step
constexpr int MAX_WARPS = 16;

// The pairs of rows of a block: rounds of up to TILES · 8, all with as many as the others, but for the last.
struct Share {
    int from, to, per_round, n_rounds;

    __device__ __forceinline__ explicit Share(int n_pairs) {
        // In 32 bits: 500 blocks may share 16 million rows.
        from = static_cast<int>(static_cast<u32>(n_pairs) * blockIdx.x / gridDim.x);
        to = static_cast<int>(static_cast<u32>(n_pairs) * (blockIdx.x + 1) / gridDim.x);
        n_rounds = div_up(to - from, TILES * 8);
        per_round = n_rounds ? div_up(to - from, n_rounds) : 0;
    }
    __device__ __forceinline__ int first(int round) const { return from + round * per_round; }
    __device__ __forceinline__ int end(int round) const { return min(to, first(round) + per_round); }
};

// Walks over (round, step) in the order of the computation; `low` is the first of this lane's two rows of each tile.
template <class Rows>
struct Cursor {
    const Rows& rows;
    const Share& share;
    int round, step;
    const bf16* low[TILES];

    __device__ __forceinline__ Cursor(const Rows& r, const Share& s) : rows(r), share(s), round(0), step(0) { enter(); }
    __device__ __forceinline__ void enter() {
        // A lane without a pair of its own reads what another one reads: nothing more comes, and nothing needs to be filled in.
#pragma unroll
        for (int t = 0; t < TILES; ++t) low[t] = rows.low(min(share.first(round) + t * 8 + lane_id() / 4, share.end(round) - 1));
    }
    __device__ __forceinline__ bool at_end() const { return round >= share.n_rounds; }
    __device__ __forceinline__ void advance(int steps) {
        if (++step < steps) return;
        step = 0;
        ++round;
        enter();
    }
};

struct Piece {
    Vec16 low[TILES][2], high[TILES][2];  // k 0-31 and 32-63 of the step
};
// Of a tile's low and high rows, the sums of this lane: token lane / 4 (and 8 tokens that are not there), pairs 2 · (lane % 4) and the next.
struct Sums {
    float low[4], high[4];
};

// One warp adds up all warps' sums of a tile. Two buffers and one barrier a round: the others need not wait for it.
template <class Rows, class Buffer>
__device__ __forceinline__ void finish(const Rows& rows, const Share& share, int round, const Sums (&acc)[TILES], Buffer buffer, int m) {
    const int lane = lane_id(), warp = warp_id(), n_warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        buffer[(t * MAX_WARPS + warp) * 32 + lane] =
            Vec16{{float_to_bits(acc[t].low[0]), float_to_bits(acc[t].low[1]), float_to_bits(acc[t].high[0]), float_to_bits(acc[t].high[1])}};
    __syncthreads();
    const int t = (warp - round * TILES % n_warps + n_warps) % n_warps;
    if (t >= TILES) return;
    float sum[4] = {};
    for (int other = 0; other < n_warps; ++other) {
        Vec16 v = buffer[(t * MAX_WARPS + other) * 32 + lane];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += bits_to_float(v.w[i]);
    }
    if (lane / 4 >= m) return;
    const int pair = share.first(round) + t * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j)
        if (pair + j < share.end(round)) rows.finish(pair + j, lane / 4, sum[j], sum[2 + j]);
}

template <class Rows>
__device__ __forceinline__ void gemv(const Rows& rows, const bf16* x, int m, int k, int ldx, int n_pairs) {
    SHARED(Vec16, sums, 2 * TILES * MAX_WARPS * 32);
    const int lane = lane_id(), warp = warp_id(), n_warps = static_cast<int>(blockDim.x) / 32;
    // A round of rows ends where a round of stages ends. Beyond k x is zero, and any weights do.
    const int steps = div_up(div_up(k, STEP), n_warps * STAGES) * STAGES;
    const int my_k = lane % 4 * 8, token = lane / 4;
    const bf16* my_x = token < m ? x + static_cast<u64>(token) * ldx : nullptr;
    const Share share(n_pairs);
    Cursor<Rows> ahead(rows, share);

    Piece w[STAGES];
    Vec16 now[2];  // x of the step
    auto load_w = [&](Piece& piece) {
        if (ahead.at_end()) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = min((ahead.step * n_warps + warp) * STEP + h * 32 + my_k, k - 8);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                piece.low[t][h] = load_stream(ahead.low[t] + at);
                piece.high[t][h] = load_stream(ahead.low[t] + rows.to_high() + at);
            }
        }
        ahead.advance(steps);
    };
    int x_step = 0;
    auto load_x = [&] {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = (x_step * n_warps + warp) * STEP + h * 32 + my_k;
            now[h] = at < k && my_x ? load16(my_x + at) : zero16();
        }
        if (++x_step == steps) x_step = 0;
    };

    let_next_kernel_start();
#pragma unroll
    for (int s = 0; s < STAGES; ++s) load_w(w[s]);
    wait_for_previous_kernel();
    load_x();

    for (int round = 0; round < share.n_rounds; ++round) {
        Sums acc[TILES] = {};
        for (int step = 0; step < steps; step += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; ++s) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int i = 0; i < 4; i += 2)
#pragma unroll
                        for (int t = 0; t < TILES; ++t) {
                            const Vec16 &low = w[s].low[t][h], &high = w[s].high[t][h];
                            mma_bf16(acc[t].low, now[h].w[i], 0, now[h].w[i + 1], 0, low.w[i], low.w[i + 1]);
                            mma_bf16(acc[t].high, now[h].w[i], 0, now[h].w[i + 1], 0, high.w[i], high.w[i + 1]);
                        }
                load_w(w[s]);
                load_x();
            }
        }
        finish(rows, share, round, acc, sums + round % 2 * TILES * MAX_WARPS * 32, m);
    }
}

// Row i over row i + n / 2. Where n is odd, the one in the middle is computed twice, with the same result.
template <class Out>
struct PlainRows {
    const bf16 *w, *bias;
    Out* y;
    int n, k, ldy;

    __device__ __forceinline__ const bf16* low(int pair) const { return w + static_cast<u64>(pair) * k; }
    __device__ __forceinline__ u64 to_high() const { return static_cast<u64>(n / 2) * k; }
    __device__ __forceinline__ void finish(int pair, int token, float low, float high) const {
        Out* to = y + static_cast<u64>(token) * ldy + pair;
        put(to, bias ? low + to_float(load(bias + pair)) : low);
        put(to + n / 2, bias ? high + to_float(load(bias + pair + n / 2)) : high);
    }
};

// A gate row over its up row.
struct GateUpRows {
    const bf16* w;
    bf16* y;
    int inter, k, ldy;

    __device__ __forceinline__ const bf16* low(int pair) const { return w + static_cast<u64>(pair) * k; }
    __device__ __forceinline__ u64 to_high() const { return static_cast<u64>(inter) * k; }
    __device__ __forceinline__ void finish(int pair, int token, float gate, float up) const {
        put(y + static_cast<u64>(token) * ldy + pair, silu(gate) * up);
    }
};

// An element of a head's first half over its partner in the second.
struct QkvRows {
    const bf16* w;
    QkvOut out;
    int k;

    __device__ __forceinline__ int first_row(int pair) const {
        const int half = out.head_dim / 2;
        return pair / half * out.head_dim + pair % half;
    }
    __device__ __forceinline__ const bf16* low(int pair) const { return w + static_cast<u64>(first_row(pair)) * k; }
    __device__ __forceinline__ u64 to_high() const { return static_cast<u64>(out.head_dim / 2) * k; }
    __device__ __forceinline__ void finish(int pair, int token, float low, float high) const {
        out.put_pair(first_row(pair), token, low, high);
    }
};

#define GEMV_KERNEL extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, 1)

GEMV_KERNEL gemv_batch_bf16(const bf16* w, const bf16* x, const bf16* bias, bf16* y, int m, int n, int k, int ldx, int ldy) {
    gemv(PlainRows<bf16>{w, bias, y, n, k, ldy}, x, m, k, ldx, div_up(n, 2));
}

GEMV_KERNEL gemv_batch_f32(const bf16* w, const bf16* x, const bf16* bias, float* y, int m, int n, int k, int ldx, int ldy) {
    gemv(PlainRows<float>{w, bias, y, n, k, ldy}, x, m, k, ldx, div_up(n, 2));
}

GEMV_KERNEL gemv_batch_gate_up_silu(const bf16* w, const bf16* x, bf16* y, int m, int inter, int k, int ldx, int ldy) {
    gemv(GateUpRows{w, y, inter, k, ldy}, x, m, k, ldx, inter);
}

GEMV_KERNEL gemv_batch_qkv_rope(const bf16* w, const bf16* x, const bf16* bias, const float* inv_freq, float rope_scale, const u32* positions,
                                const u32* slots, bf16* q, bf16* k_cache, bf16* v_cache, int m, int n_heads, int n_kv_heads, int head_dim, int k, int ldx) {
    QkvRows rows{w, {bias, inv_freq, rope_scale, positions, slots, q, k_cache, v_cache, n_heads, n_kv_heads, head_dim}, k};
    gemv(rows, x, m, k, ldx, (n_heads + 2 * n_kv_heads) * (head_dim / 2));
}

KERNELS(gemv_batch_bf16, gemv_batch_f32, gemv_batch_gate_up_silu, gemv_batch_qkv_rope)
