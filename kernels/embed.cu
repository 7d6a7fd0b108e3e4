// Vocabulary-parallel embedding: the rows of this rank's part of the table; zeros for tokens of other ranks' rows, so that the sum over
// ranks is the embedding. The residual stream, to which that sum is added, begins as zeros. The tokens themselves are kept beside
// their keys and values, for the repetition penalty (candidates.cu).
//
//   embed(table bf16 [n_near, hidden], far_table bf16 [n_rows - n_near, hidden], tokens u32 [n_tokens], chosen u32, slots u32 [n_tokens],
//         history u32 [n_blocks, 16], partial bf16 [n_tokens, hidden], x f32 [n_tokens, hidden], hidden, first_row, n_near, n_rows)
//     The rows from n_near on may lie in pinned host memory.
//     grid (n_tokens), block any number of warps (128). Token id t is row t - first_row of the tables; an entry of `tokens` with
//     its highest bit set is a row of `chosen`, what the step before has sampled, which the host need not know yet.
//     hidden % 8 == 0. Reads the named rows, writes all of partial and x, and of history the tokens' slots.
//
// Numerics: exact, the sum over ranks included: all but one of its terms are zeros.
#include "common.cuh"

constexpr u32 CHOSEN = 0x80000000u;

extern "C" __global__ void embed(const bf16* table, const bf16* far_table, const u32* tokens, const u32* chosen, const u32* slots, u32* history,
                                 bf16* partial, float* x, int hidden, u32 first_row, u32 n_near, u32 n_rows) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    u32 token = load(tokens + blockIdx.x);
    if (token & CHOSEN) token = load(chosen + (token & ~CHOSEN));
    u32 slot = load(slots + blockIdx.x);
    if (threadIdx.x == 0 && slot != NO_SLOT) store(history + slot, token);
    // Unsigned: a token below first_row wraps to a number above n_rows.
    u32 row = token - first_row;
    bool here = row < n_rows;
    const bf16* from = row < n_near ? table + static_cast<u64>(row) * hidden : far_table + static_cast<u64>(here ? row - n_near : 0) * hidden;
    const u64 to = static_cast<u64>(blockIdx.x) * hidden;
    for (int i = static_cast<int>(threadIdx.x) * 8; i < hidden; i += static_cast<int>(blockDim.x) * 8) {
        store16(partial + to + i, here ? load16(from + i) : zero16());
        store16(x + to + i, zero16());
        store16(x + to + i + 4, zero16());
    }
}

KERNELS(embed)
