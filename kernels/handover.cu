// The hand-over between the GPU and the host's cores, which multiply a part of a matrix's rows where they lie in host memory.
//
//   hand_over(x bf16 [m, k], host_x f32 [m, k], request u32 [3], state u32 [2], job, m, k)
//     Widens x into host memory and then writes job and m to request[1], request[2] and the next epoch to request[0].
//     grid (any), block 256; k % 8 == 0. state: {epoch, blocks done}, device memory that begins as zeros.
//   take_back_bf16(host_y f32 [m, n], answer u32 [1], lost u32 [1], state, y bf16 [m, ldy], m, n, ldy, timeout_ms)
//   take_back_f32 (…, y f32 [m, ldy], …)
//   take_back_gated(host_y f32 [m, 2 · n], …, y bf16 [m, ldy], m, n, ldy, timeout_ms)       y = silu(gate) · up
//     Waits until the host has written the epoch at hand to answer[0], then fetches its rows of the product into the n columns of y.
//     grid (≤ 32), block 256. The gated one takes rows as they lie in host memory: 8 gate rows, then their 8 up rows; n % 8 == 0.
//     A host that does not answer within timeout_ms: 1 goes to *lost, y is worthless, and no later launch waits.
//
// host_x, host_y, request, answer and lost are pinned host memory. What the kernel wrote before the epoch is there when the host
// sees it: a fence of the whole system stands between. Few blocks fetch, because each asks over the link again and again, and the link
// has weights to carry.
//
// Numerics: exact, then one rounding to bf16.
//
// Measured as a part of whole steps alone: the 7B shape in 5 GiB of one H100, 9.9 GB offloaded, 113 hand-overs a token (2026-11-25): 78 to 87 ms
// a token where link and cores had shown 104 to 142 GB/s together at the start, so what all hand-overs cost is less than those rates vary.
#include "common.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    hand_over(const bf16* x, float* host_x, u32* request, u32* state, u32 job, int m, int k) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int n = m * (k / 8), step = static_cast<int>(gridDim.x) * THREADS;
    for (int i = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x); i < n; i += step) {
        float f[8];
        unpack8(load16(x + static_cast<u64>(i) * 8), f);
        float* to = host_x + static_cast<u64>(i) * 8;
#pragma unroll
        for (int h = 0; h < 8; h += 4)
            store16(to + h, Vec16{{float_to_bits(f[h]), float_to_bits(f[h + 1]), float_to_bits(f[h + 2]), float_to_bits(f[h + 3])}});
    }
    fence_system();
    __syncthreads();
    if (threadIdx.x != 0 || atomic_add(state + 1, 1) + 1 != gridDim.x) return;
    const u32 epoch = load(state) + 1;
    store(state, epoch);
    store(state + 1, 0u);
    store(request + 1, job);
    store(request + 2, static_cast<u32>(m));
    fence_system();
    store_flag(request, epoch);
}

// One thread asks, the block waits for it; false when the host is lost.
__device__ __forceinline__ bool host_is_done(const u32* answer, u32* lost, const u32* state, u32 timeout_ms) {
    SHARED(u32, done, 1);
    if (threadIdx.x == 0) {
        const u32 epoch = load(state);
        const u64 begin = nanoseconds(), timeout_ns = static_cast<u64>(timeout_ms) * 1000000u;
        u32 arrived = 1;
        while (load_flag(answer) != epoch) {
            if (load_flag(lost) != 0) {
                arrived = 0;
                break;
            }
            if (nanoseconds() - begin > timeout_ns) {
                store_flag(lost, 1u);
                arrived = 0;
                break;
            }
            pause_thread();
        }
        done[0] = arrived;
    }
    __syncthreads();
    return done[0] != 0;
}

__device__ __forceinline__ void put(bf16* p, float v) {
    store(p, to_bf16(v));
}
__device__ __forceinline__ void put(float* p, float v) {
    store(p, v);
}

template <class Out>
__device__ __forceinline__ void take_back(const float* host_y, const u32* answer, u32* lost, const u32* state, Out* y, int m, int n, int ldy,
                                          u32 timeout_ms) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (!host_is_done(answer, lost, state, timeout_ms)) return;
    const int step = static_cast<int>(gridDim.x) * THREADS;
    for (int i = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x); i < m * n; i += step)
        put(y + static_cast<u64>(i / n) * ldy + i % n, bits_to_float(load_flag(reinterpret_cast<const u32*>(host_y) + i)));
}

extern "C" __global__ void __launch_bounds__(THREADS) take_back_bf16(const float* host_y, const u32* answer, u32* lost, const u32* state, bf16* y,
                                                                     int m, int n, int ldy, u32 timeout_ms) {
    take_back(host_y, answer, lost, state, y, m, n, ldy, timeout_ms);
}

extern "C" __global__ void __launch_bounds__(THREADS) take_back_f32(const float* host_y, const u32* answer, u32* lost, const u32* state, float* y,
                                                                    int m, int n, int ldy, u32 timeout_ms) {
    take_back(host_y, answer, lost, state, y, m, n, ldy, timeout_ms);
}

extern "C" __global__ void __launch_bounds__(THREADS) take_back_gated(const float* host_y, const u32* answer, u32* lost, const u32* state, bf16* y,
                                                                      int m, int n, int ldy, u32 timeout_ms) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (!host_is_done(answer, lost, state, timeout_ms)) return;
    const u32* words = reinterpret_cast<const u32*>(host_y);
    const int step = static_cast<int>(gridDim.x) * THREADS;
    for (int i = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x); i < m * n; i += step) {
        const int row = i / n, feature = i % n;
        const u64 at = static_cast<u64>(row) * 2 * n + feature / 8 * 16 + feature % 8;
        const float gate = bits_to_float(load_flag(words + at)), up = bits_to_float(load_flag(words + at + 8));
        put(y + static_cast<u64>(row) * ldy + feature, silu(gate) * up);
    }
}

KERNELS_IN_ORDER(hand_over, take_back_bf16, take_back_f32, take_back_gated)
