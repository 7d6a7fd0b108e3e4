// A tile of scores to probabilities, as both prefill kernels hold them: in the layout of the tensor cores' accumulators, where a lane has
// two rows and two neighbouring columns of every eight.
#pragma once
#include "common.cuh"

// Scores times `to_log2` to powers of two, in units that each row's highest score so far makes 1 of; `shrink` is what older ones are now worth.
template <int N>
__device__ __forceinline__ void soften(float (&scores)[N][4], float (&high)[2], float (&sum)[2], float (&shrink)[2], float to_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float peak = NEG_INFINITY;
#pragma unroll
        for (int n = 0; n < N; ++n) peak = fmaxf(peak, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        peak = fmaxf(quad_max(peak) * to_log2, high[r]);
        // A row that sees nothing (it is past the end) keeps zeros instead of NaN.
        const float safe = peak == NEG_INFINITY ? 0.0f : peak;
        shrink[r] = exp2_fast(high[r] - safe);
        high[r] = peak;
        sum[r] *= shrink[r];
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
                scores[n][i] = exp2_fast(scores[n][i] * to_log2 - safe);
                sum[r] += scores[n][i];
            }
    }
}
