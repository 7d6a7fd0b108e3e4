// One-shot all-reduce of decode-size messages over peer memory, fused with the residual add and the RMSNorm that always follow.
//
//   all_reduce_add_rms_norm(partial bf16 [n_rows, hidden], x f32 [n_rows, hidden] in and out, weight bf16 [hidden],
//                           h bf16 [n_rows, hidden], inboxes [n_ranks] pointers, epochs u32 [≥ n_rows], lost u32 [1],
//                           rank, n_ranks, max_rows, hidden, eps, timeout_ms)
//     x += Σ over ranks of their partial;  h = x / sqrt(mean(x²) + eps) · weight
//     grid (n_rows), block as in norm.cu. n_rows ≤ max_rows, hidden % 8 == 0, hidden ≤ 16384. Every rank launches it with the same
//     shapes, in the same order; all its blocks must fit the device at once beside whatever waits there (n_rows of them).
//     inboxes[r] is rank r's inbox as this rank's device sees it: MarkedWords [2][n_ranks][max_rows][hidden / 4].
//     Inboxes and epochs are this kernel's own and begin as zeros, before any rank's first launch.
//     A peer that does not answer within timeout_ms: its rank + 1 goes to *lost and the sum goes on without it (x and h are then
//     worthless); *lost is otherwise left alone, and while it is not 0 no
//     launch waits.
//
//   all_gather_words(local u32 [n_words], out u32 [n_ranks, n_words], inboxes, first, epoch u32 [1], lost, rank, n_ranks, max_pairs,
//                    n_words, timeout_ms)
//     out = every rank's local, in rank order; for the few words by which ranks agree on a token.
//     grid 1, block any number of warps. n_words ≤ 2 · max_pairs. Its part of an inbox begins at MarkedWords `first`:
//     [2][n_ranks][max_pairs], zeros at first as the rest; `epoch` is its own.
//
// How it works. Every rank writes its row into the inboxes of all others and then adds up what has come into its own. Two words
// travel with two marks in one 16-byte store, so data carries its own "ready" flag and no fence or second trip is needed (NCCL's LL
// protocol has the same idea). The mark is the row's epoch, which counts its launches, so a graph can be replayed. Two halves of
// an inbox take turns: whoever has an epoch e + 1 from a peer knows that the peer is done with e, so half e may be overwritten.
//
// Numerics: f32 sum in the order of ranks, so x is the same on every rank to the bit; one rounding to bf16 in h.
//
// Measured on one H200 (driver 580, CUDA 13.0), 2026-11-23, tests/kernels/bench.py: two ranks as two streams of one GPU in a graph, so the protocol's
// own time without a link: one row of 3584 3.3 µs, of 8192 4.9 µs.
// Measured on two H100s with NVLink (driver 580, NCCL 2.28), 2026-11-25, `tandem doctor --measure` and `tandem bench scaling`, a chain of 20 in a
// graph; NCCL is its all-reduce alone, and with add_rms_norm behind it:
//     rows of 3584    1: 4.2 µs (NCCL 6.9, 8.6)   8: 5.0 (7.0, 8.9)   16: 6.2 (7.2, 9.1)   32: 8.3 to 8.5 (8.4, 10.2)
//     rows of 8192    1: 5.8 µs (NCCL 6.9)        8: 6.8 (7.4)
// With two ranks on one GPU and overlapped launches (an arrangement for tests only), one rank's waiting launches filled the GPU and the other's
// found no room: leave the overlap off there.
#include "common.cuh"
#include "rows.cuh"

// Two words of this epoch; zeros from a peer that is lost.
__device__ __forceinline__ MarkedWords receive_pair(const MarkedWords* from, u32 epoch, int sender, u64 timeout_ns, u32* lost) {
    u64 begin = 0;
    MarkedWords m = load_marked(from);
    while (m.first_mark != epoch || m.second_mark != epoch) {
        u64 now = nanoseconds();
        // Once a peer is lost nobody waits any more, so that the launches behind this one end at once.
        if (begin == 0 && load(lost) != 0) return MarkedWords{0, epoch, 0, epoch};
        if (begin == 0) begin = now;
        if (now - begin > timeout_ns) {
            store(lost, static_cast<u32>(sender + 1));
            return MarkedWords{0, epoch, 0, epoch};
        }
        m = load_marked(from);
    }
    return m;
}

__device__ __forceinline__ Vec16 receive(const MarkedWords* from, u32 epoch, int sender, u64 timeout_ns, u32* lost) {
    MarkedWords a = receive_pair(from, epoch, sender, timeout_ns, lost), b = receive_pair(from + 1, epoch, sender, timeout_ns, lost);
    return Vec16{{a.first, a.second, b.first, b.second}};
}

extern "C" __global__ void __launch_bounds__(1024)
    all_reduce_add_rms_norm(const bf16* partial, float* x, const bf16* weight, bf16* h, MarkedWords* const* inboxes, u32* epochs, u32* lost, int rank,
                            int n_ranks, int max_rows, int hidden, float eps, u32 timeout_ms) {
    const int row = static_cast<int>(blockIdx.x), words = hidden / 4;
    const u64 at = static_cast<u64>(row) * hidden;
    let_next_kernel_start();
    Vec16 w[MAX_VECTORS], mine[MAX_VECTORS];
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; ++v)
        if (element(v) < hidden) w[v] = load16(weight + element(v));
    wait_for_previous_kernel();
    const u32 epoch = load(epochs + row) + 1;
    auto slot = [&](int to, int from) {
        u64 index = (static_cast<u64>(epoch & 1) * n_ranks + from) * max_rows + row;
        return load(inboxes + to) + index * words;
    };
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; ++v) {
        if (element(v) >= hidden) continue;
        mine[v] = load16(partial + at + element(v));
        for (int peer = 0; peer < n_ranks; ++peer) {
            if (peer == rank) continue;
            MarkedWords* to = slot(peer, rank) + element(v) / 4;
            store_marked(to, MarkedWords{mine[v].w[0], epoch, mine[v].w[1], epoch});
            store_marked(to + 1, MarkedWords{mine[v].w[2], epoch, mine[v].w[3], epoch});
        }
    }

    float values[MAX_VECTORS][8];
    const u64 timeout_ns = static_cast<u64>(timeout_ms) * 1000000u;
#pragma unroll
    for (int v = 0; v < MAX_VECTORS; ++v) {
        if (element(v) >= hidden) continue;
        float sum[8] = {};
        for (int from = 0; from < n_ranks; ++from) {
            float add[8];
            unpack8(from == rank ? mine[v] : receive(slot(rank, from) + element(v) / 4, epoch, from, timeout_ns, lost), add);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += add[j];
        }
        load_floats(x + at + element(v), values[v]);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[v][j] += sum[j];
        store_floats(x + at + element(v), values[v]);
    }
    write_norm(values, w, h + at, hidden, eps);  // its barrier stands between the last read of the epoch and the write
    if (threadIdx.x == 0) store(epochs + row, epoch);
}

extern "C" __global__ void __launch_bounds__(1024)
    all_gather_words(const u32* local, u32* out, MarkedWords* const* inboxes, u32 first, u32* epochs, u32* lost, int rank, int n_ranks, int max_pairs,
                     int n_words, u32 timeout_ms) {
    const int threads = static_cast<int>(blockDim.x), pairs = div_up(n_words, 2);
    const u64 timeout_ns = static_cast<u64>(timeout_ms) * 1000000u;
    let_next_kernel_start();
    wait_for_previous_kernel();
    const u32 epoch = load(epochs) + 1;
    auto slot = [&](int to, int from) { return load(inboxes + to) + first + (static_cast<u64>(epoch & 1) * n_ranks + from) * max_pairs; };
    for (int p = static_cast<int>(threadIdx.x); p < pairs; p += threads) {
        u32 a = load(local + 2 * p), b = 2 * p + 1 < n_words ? load(local + 2 * p + 1) : 0;
        for (int peer = 0; peer < n_ranks; ++peer)
            if (peer != rank) store_marked(slot(peer, rank) + p, MarkedWords{a, epoch, b, epoch});
        store(out + rank * n_words + 2 * p, a);
        if (2 * p + 1 < n_words) store(out + rank * n_words + 2 * p + 1, b);
    }
    for (int p = static_cast<int>(threadIdx.x); p < pairs; p += threads) {
        for (int from = 0; from < n_ranks; ++from) {
            if (from == rank) continue;
            MarkedWords m = receive_pair(slot(rank, from) + p, epoch, from, timeout_ns, lost);
            store(out + from * n_words + 2 * p, m.first);
            if (2 * p + 1 < n_words) store(out + from * n_words + 2 * p + 1, m.second);
        }
    }
    __syncthreads();  // the last read of the epoch is over
    if (threadIdx.x == 0) store(epochs, epoch);
}

KERNELS_IN_ORDER(all_reduce_add_rms_norm, all_gather_words)
