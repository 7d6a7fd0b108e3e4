// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of the f32 residual stream, behind the residual add.
//
//   add_rms_norm(partial bf16 [n_tokens, hidden], x f32 [n_tokens, hidden] in and out, weight bf16 [hidden],
//                h bf16 [n_tokens, hidden], hidden, eps)
//     x += partial;  h = x / sqrt(mean(x²) + eps) · weight
//     grid (n_tokens), block whole warps, at least hidden / 16 threads: min(1024, hidden / 8 rounded up to warps)
//     is the choice. hidden % 8 == 0, hidden ≤ 16384. Each row is read once and written once.
//
// Numerics: f32 throughout, one rounding to bf16 at the end. The order of the sum depends on the block size alone.
//
// Measured on an H200 (driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py, add_rms_norm in a graph: one row of 3584 1.5 µs, of 8192
// 2.3 µs; 4096 rows of 3584 45 µs (4.0 TB/s counting x twice, partial and h once).
#include "common.cuh"
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const bf16* partial, float* x, const bf16* weight, bf16* h, int hidden, float eps) {
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
        float add[8];
        load_floats(x + row + i, values[v]);
        unpack8(load16(partial + row + i), add);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[v][j] += add[j];
        store_floats(x + row + i, values[v]);
    }
    write_norm(values, w, h + row, hidden, eps);
}

KERNELS(add_rms_norm)
