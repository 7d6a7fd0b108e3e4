// What all kernels share: types, memory accesses, warp operations, tensor-core products.
//
// The kernels are compiled by NVRTC and include no CUDA header; everything the language does not give is PTX here, right
// from sm_80 on. With TANDEM_EMULATE the same names come from emulate.hpp and the kernels run on the CPU, so a kernel
// keeps to these rules:
//   * global memory is touched only through load…, store…, cp_async16 and atomic_add (bounds are checked there);
//   * shared memory is declared by SHARED or DYNAMIC_SHARED and passed on as SharedPtr (races are found there);
//   * blocks are whole warps in one dimension, and a warp operation is reached by all 32 lanes together;
//   * every kernel is listed in KERNELS(...) at the end of its file; in KERNELS_IN_ORDER(...) if its blocks wait for other ranks
//     (blocks then run one after the other in the order of their index, as on every rank).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
    u16 bits;
};
struct alignas(4) bf16x2 {
    u32 bits;
};
// 16 bytes: the widest access of a thread, 8 bf16 or 4 f32.
struct alignas(16) Vec16 {
    u32 w[4];
};
// A sequence's part of a step, one row of the `seqs` tables.
struct alignas(16) Seq {
    u32 start;        // first of its rows among the step's tokens
    u32 len;          // its rows in this step
    u32 context_len;  // cached tokens once the step is done; its rows are the last `len` of them
    u32 table_row;    // row of the block table
};

// Two words for another rank, each with a mark that tells a new one from an old one: 8 bytes arrive together or not at all.
struct alignas(16) MarkedWords {
    u32 first, first_mark, second, second_mark;
};

// Tokens in a block of the KV cache: K and V of a layer are each [n_blocks][n_kv_heads][KV_BLOCK][head_dim].
constexpr int KV_BLOCK = 16;
// A slot that is not written: rows that only fill a batch up.
constexpr u32 NO_SLOT = 0xffffffffu;
#define NEG_INFINITY bits_to_float(0xff800000u)
constexpr float LOG2_E = 1.4426950408889634f;

#ifdef TANDEM_EMULATE
#include "emulate.hpp"
#else

#define SHARED(T, name, n) __shared__ alignas(16) T name[n]
#define DYNAMIC_SHARED(T, name)                          \
    extern __shared__ __align__(16) u8 dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared)
#define KERNELS(...)
#define KERNELS_IN_ORDER(...)

template <class T>
using SharedPtr = T*;

template <class T>
__device__ __forceinline__ T load(const T* p) {
    return *p;
}

template <class T>
__device__ __forceinline__ void store(T* p, T v) {
    *p = v;
}

// Read once by one thread and never written while the kernel runs: keep it out of L1.
__device__ __forceinline__ Vec16 load_stream(const void* p) {
    Vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p));
    return v;
}

// Starts bringing the 128 bytes around `p` into the L2.
__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory behind the threads' back; zeros instead where `valid` is false.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `N` of this thread's groups are under way; a barrier then shows them to the other threads.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8×8 matrices of bf16; lane l names row l % 8 of matrix l / 8, `p` 16-byte aligned.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}

// An 8×8 matrix of bf16, a lane holding (g, 2t) and (g, 2t + 1): its transpose in the same places.
__device__ __forceinline__ u32 transpose_8x8(u32 pair) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
    return r;
}

// d += a · b with a [16, 16] and b [16, 8] in bf16, d [16, 8] in f32. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 (pairs);  b: rows 2t, 2t+8 (pairs) of column g;
//   d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shuffle_xor(u32 v, int mask) {
    u32 r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}
__device__ __forceinline__ void sync_warp() {
    asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
}

// The low and high halves named by `selector`, bytes 0-3 from `a`, 4-7 from `b`.
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}

// `lo` and `hi` rounded to bf16 (ties to even).
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
__device__ __forceinline__ float bits_to_float(u32 bits) {
    return __int_as_float(static_cast<int>(bits));
}
__device__ __forceinline__ u32 float_to_bits(float v) {
    return static_cast<u32>(__float_as_int(v));
}
// 2^x to about 2 units in the last place; 0 for -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Adds and returns the old value; what this block wrote before is seen by whoever sees the sum (after __syncthreads).
__device__ __forceinline__ u32 atomic_add(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

// Sets bits of a word of shared memory that other threads set others in.
__device__ __forceinline__ void or_shared(u32* p, u32 bits) {
    asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(shared_address(p)), "r"(bits) : "memory");
}

// Memory shared with other GPUs: never cached in L1, halves of 8 bytes whole.
__device__ __forceinline__ void store_marked(MarkedWords* p, MarkedWords v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.first), "r"(v.first_mark), "r"(v.second), "r"(v.second_mark)
                 : "memory");
}
__device__ __forceinline__ MarkedWords load_marked(const MarkedWords* p) {
    MarkedWords v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.first), "=r"(v.first_mark), "=r"(v.second), "=r"(v.second_mark)
                 : "l"(p)
                 : "memory");
    return v;
}
// A word that the host or another device writes or reads meanwhile: what was written before it is seen first.
__device__ __forceinline__ void store_flag(u32* p, u32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ u32 load_flag(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// What this thread wrote before is seen by the host and other devices before what it writes after.
__device__ __forceinline__ void fence_system() {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}
// Lets some hundred nanoseconds pass.
__device__ __forceinline__ void pause_thread() {
    asm volatile("nanosleep.u32 200;");
}
__device__ __forceinline__ u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// Programmatic dependent launch: with the launch attribute set, a kernel starts before the one in front of it has ended and
// waits here until all that one's writes are visible. Without the attribute, and before sm_90, nothing happens.
// Every kernel waits before it ends and before it touches what a kernel in front of it may write, so that the order of a stream
// stays what it says. Read ahead of the wait are only weights, and in attention_decode.cu the tables of the step and older tokens'
// K and V: whatever writes those must be followed by one launch without the attribute (the first of a step).
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#endif  // TANDEM_EMULATE

__device__ __forceinline__ float shuffle_xor(float v, int mask) {
    return bits_to_float(shuffle_xor(float_to_bits(v), mask));
}
__device__ __forceinline__ bf16 to_bf16(float v) {
    return bf16{static_cast<u16>(pack_bf16(v, 0.0f))};
}
__device__ __forceinline__ float to_float(bf16 v) {
    return bits_to_float(static_cast<u32>(v.bits) << 16);
}
// The halves of a packed pair.
__device__ __forceinline__ float low_half(u32 pair) {
    return bits_to_float(pair << 16);
}
__device__ __forceinline__ float high_half(u32 pair) {
    return bits_to_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void unpack8(const Vec16& v, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        f[2 * i] = low_half(v.w[i]);
        f[2 * i + 1] = high_half(v.w[i]);
    }
}
__device__ __forceinline__ Vec16 pack8(const float (&f)[8]) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = pack_bf16(f[2 * i], f[2 * i + 1]);
    return v;
}
template <class T>
__device__ __forceinline__ Vec16 load16(const T* p) {
    return load(reinterpret_cast<const Vec16*>(p));
}
template <class T>
__device__ __forceinline__ void store16(T* p, const Vec16& v) {
    store(reinterpret_cast<Vec16*>(p), v);
}
__device__ __forceinline__ Vec16 zero16() {
    return Vec16{{0, 0, 0, 0}};
}

__device__ __forceinline__ int lane_id() {
    return static_cast<int>(threadIdx.x & 31u);
}
__device__ __forceinline__ int warp_id() {
    return static_cast<int>(threadIdx.x >> 5);
}
__device__ __forceinline__ int div_up(int a, int b) {
    return (a + b - 1) / b;
}
__device__ __forceinline__ float silu(float v) {
    return v / (1.0f + exp2_fast(-v * LOG2_E));
}

// The same value in every lane, summed in the same order whatever the lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += shuffle_xor(v, mask);
    return v;
}
// Over the four lanes that share g = lane / 4.
__device__ __forceinline__ float quad_sum(float v) {
    v += shuffle_xor(v, 1);
    return v + shuffle_xor(v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, shuffle_xor(v, 1));
    return fmaxf(v, shuffle_xor(v, 2));
}
