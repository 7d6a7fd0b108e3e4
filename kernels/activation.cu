// Element-wise work around the large GEMMs (small batches have it inside gemv.cu).
//
//   silu_mul(gate_up bf16 [n_tokens, 2 · inter], mlp bf16 [n_tokens, ld], inter, ld, run)  mlp = silu(gate) · up
//     In a row of gate_up, `run` gates are followed by their ups: run = inter, or 8 for rows that lie as in host memory.
//   add_bias(y bf16 [n_tokens, n], bias bf16 [n], n)                                      y += bias
//   gather_rows(h bf16 [·, hidden], rows u32 [n_rows], out bf16 [n_rows, hidden], hidden) out[i] = h[rows[i]]
//     all three: grid (ceil(width / (8 · block)), rows), block any number of warps (256); width % 8 == 0.
//   to_bf16_array(x f32 [n], y bf16 [n], n)                                               y = x rounded
//     grid (ceil(n / (8 · block))), n % 8 == 0.
//
// Numerics: f32 inside, one rounding to bf16.
//
// Measured on an H200 (driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py: silu_mul of 4096 × 18944 in 112 µs, 4.2 TB/s.
#include "common.cuh"

__device__ __forceinline__ int element() {
    return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 8;
}

extern "C" __global__ void silu_mul(const bf16* gate_up, bf16* mlp, int inter, int ld, int run) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int i = element();
    if (i >= inter) return;
    const bf16* gate = gate_up + static_cast<u64>(blockIdx.y) * 2 * inter + i / run * 2 * run + i % run;
    float g[8], u[8];
    unpack8(load16(gate), g);
    unpack8(load16(gate + run), u);
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = silu(g[j]) * u[j];
    store16(mlp + static_cast<u64>(blockIdx.y) * ld + i, pack8(g));
}

extern "C" __global__ void add_bias(bf16* y, const bf16* bias, int n) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int i = element();
    if (i >= n) return;
    bf16* p = y + static_cast<u64>(blockIdx.y) * n + i;
    float a[8], b[8];
    unpack8(load16(p), a);
    unpack8(load16(bias + i), b);
#pragma unroll
    for (int j = 0; j < 8; ++j) a[j] += b[j];
    store16(p, pack8(a));
}

extern "C" __global__ void gather_rows(const bf16* h, const u32* rows, bf16* out, int hidden) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int i = element();
    if (i >= hidden) return;
    u64 row = load(rows + blockIdx.y);
    store16(out + static_cast<u64>(blockIdx.y) * hidden + i, load16(h + row * hidden + i));
}

extern "C" __global__ void to_bf16_array(const float* x, bf16* y, int n) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int i = element();
    if (i >= n) return;
    Vec16 a = load16(x + i), b = load16(x + i + 4);
    float f[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        f[j] = bits_to_float(a.w[j]);
        f[j + 4] = bits_to_float(b.w[j]);
    }
    store16(y + i, pack8(f));
}

KERNELS(silu_mul, add_bias, gather_rows, to_bf16_array)
