// The 64 most likely tokens of a row of f32 logits, exactly, for sampling on the host: 512 bytes a row leave the device instead
// of the whole vocabulary. A tournament: blocks sort 1024 entries each and keep 64, until one block is left.
//
//   candidates(logits f32 [n_rows, ld], n_known, ld, first_id, out u64 [n_rows, n_parts, 64])
//     grid (n_parts, n_rows), block 512, n_parts = ceil(n_known / 1024). Tokens 0 .. n_known of each row; ids count from first_id.
//   candidates_merge(in u64, n, group_stride, row_stride, out u64 [n_rows, n_parts, 64])
//     grid (n_parts, n_rows), block 512, n_parts = ceil(n / 1024). The n keys of row r are groups of 64: key e is element
//     (e / 64) · group_stride + r · row_stride + e % 64. (64, n) behind another launch; (64 · n_rows, 64) behind what the ranks
//     have gathered, [n_ranks][n_rows][64].
//
// A key is the logit in its upper half, as an integer in the same order, and the complement of the id in its lower: among equals
// the lowest id comes first. 0 is no token; lists are padded with it and NaN becomes it. Every list is sorted, best first.
//
// Numerics: exact. Not yet measured.
#include "common.cuh"

constexpr int ENTRIES = 1024, KEPT = 64;

__device__ __forceinline__ u64 key_of(float logit, u32 id) {
    if (!(logit == logit)) return 0;
    u32 bits = float_to_bits(logit);
    u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(ordered) << 32 | static_cast<u32>(~id);
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

extern "C" __global__ void __launch_bounds__(512) candidates(const float* logits, int n_known, int ld, u32 first_id, u64* out) {
    SHARED(u64, keys, ENTRIES);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const float* row = logits + static_cast<u64>(blockIdx.y) * ld;
    for (int i = static_cast<int>(threadIdx.x); i < ENTRIES; i += 512) {
        int token = static_cast<int>(blockIdx.x) * ENTRIES + i;
        keys[i] = token < n_known ? key_of(load(row + token), first_id + static_cast<u32>(token)) : 0;
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

KERNELS(candidates, candidates_merge)
