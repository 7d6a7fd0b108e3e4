// Reads memory and adds it up: the rate that every kernel bound by memory is measured against. Nothing of the forward pass.
//
//   read_sum(data [n] of 16 bytes, sum u32 [1], n)
//     any grid ≥ 1, block any number of warps up to 16; `data` 16-byte aligned, 0 ≤ n < 2^31. Adds every 32-bit word of `data` to *sum,
//     modulo 2^32.
//
// How it works. The grid stays as it is and strides over the data, a thread with eight loads of 16 bytes under way, a warp's side by
// side. The sum is there so that no load can be left out, and so that a test can tell that none was. How many blocks read fastest differs
// between devices: gpu/probe.rs tries several and keeps the best.
//
// Numerics: exact, in any order.
//
// Measured on H100s (driver 580), 2026-11-25, `tandem bench`: 3.08 to 3.09 TB/s in six runs, where the vendor's figure for the memory is 3.35.
#include "common.cuh"

constexpr int UNDER_WAY = 8;

__device__ __forceinline__ u32 sum_words(const Vec16& v) {
    return (v.w[0] + v.w[1]) + (v.w[2] + v.w[3]);
}

extern "C" __global__ void __launch_bounds__(512) read_sum(const Vec16* data, u32* sum, int n) {
    wait_for_previous_kernel();
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
    const u64 end = static_cast<u64>(n);
    u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    u32 total = 0;
    for (; i + (UNDER_WAY - 1) * stride < end; i += UNDER_WAY * stride) {
        Vec16 v[UNDER_WAY];
#pragma unroll
        for (int j = 0; j < UNDER_WAY; ++j) v[j] = load_stream(data + i + j * stride);
#pragma unroll
        for (int j = 0; j < UNDER_WAY; ++j) total += sum_words(v[j]);
    }
    for (; i < end; i += stride) total += sum_words(load_stream(data + i));
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) total += shuffle_xor(total, mask);
    if (lane_id() == 0) atomic_add(sum, total);
}

KERNELS(read_sum)
