// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of the f32 residual stream, alone and behind the residual add.
//
//   rms_norm(x f32 [n_tokens, hidden], weight bf16 [hidden], h bf16 [n_tokens, hidden], hidden, eps)
//     h = x / sqrt(mean(x²) + eps) · weight
//   add_rms_norm(partial bf16 [n_tokens, hidden], x f32 in and out, weight, h, hidden, eps)
//     x += partial, then the same
//     both: grid (n_tokens), block whole warps, at least hidden / 16 threads: min(1024, hidden / 8 rounded up to warps)
//     is the choice. hidden % 8 == 0, hidden ≤ 16384. Each row is read once and written once.
//
// Numerics: f32 throughout, one rounding to bf16 at the end. The order of the sum depends on the block size alone.
//
// Measured on an H200 (driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py, add_rms_norm in a graph: one row of 3584 1.5 µs, of 8192
// 2.3 µs; 4096 rows of 3584 45 µs (4.0 TB/s counting x twice, partial and h once).
#include "common.cuh"
#include "rows.cuh"

template <bool ADD>
__device__ __forceinline__ void norm_row(const bf16* partial, const float* x_in, float* x_out, const bf16* weight, bf16* h, int hidden, float eps) {
    const u64 row = static_cast<u64>(blockIdx.x) * hidden;
    let_next_kernel_start();
    Vec16 w[MAX_VECTORS];
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; ++v)
        if (element(v) < hidden) w[v] = load16(weight + element(v));
    wait_for_previous_kernel();

    float values[MAX_VECTORS][8];
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; ++v) {
        const int i = element(v);
        if (i >= hidden) continue;
        load_floats(x_in + row + i, values[v]);
        if (ADD) {
            float add[8];
            unpack8(load16(partial + row + i), add);
#pragma unroll
            for (int j = 0; j < 8; ++j) values[v][j] += add[j];
            store_floats(x_out + row + i, values[v]);
        }
    }
    write_norm(values, w, h + row, hidden, eps);
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const float* x, const bf16* weight, bf16* h, int hidden, float eps) {
    norm_row<false>(nullptr, x, nullptr, weight, h, hidden, eps);
}

extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const bf16* partial, float* x, const bf16* weight, bf16* h, int hidden, float eps) {
    norm_row<true>(partial, x, x, weight, h, hidden, eps);
}

KERNELS(rms_norm, add_rms_norm)
