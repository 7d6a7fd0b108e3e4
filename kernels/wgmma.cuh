// Hopper's own tensor-core products (wgmma): a warpgroup, four warps whose first is a multiple of four, multiplies 64 rows at a time and
// reads its operands from shared memory by itself, while its threads go on. Only for sm_90a; what is compiled for others must not run.
//
// Operands in shared memory lie in rows of 128 bytes (64 bf16), eight rows after one another from an address that is a multiple of 1024;
// the 16-byte piece c of row r is at place c ^ r % 8 (128-byte swizzle: address bits 4-6 are changed by bits 7-9). Wider operands are
// several such columns of rows. swizzled() is where an element is, operand() the descriptor by which wgmma finds it.
//
// The order that must be kept: cp_async_wait, fence_async_proxy (by the thread that copied), barrier, wgmma_fence, products,
// wgmma_commit, wgmma_wait; between the first product and the wait no thread touches the accumulators or operands in registers, and
// nobody writes what they read in shared memory.
#pragma once
#include "common.cuh"

// The element offset of 16-byte piece `piece` of row `row`, where a column of 64 elements has `ROWS` rows.
template <int ROWS>
__device__ __forceinline__ int swizzled(int row, int piece) {
    return piece / 8 * (ROWS * 64) + row * 64 + (piece ^ row) % 8 * 8;
}

#ifdef TANDEM_EMULATE
#include "emulate_wgmma.hpp"
#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
// Whoever launches this on another GPU finds out at once.
#define WGMMA_ASM(...) asm volatile("trap;")
#endif

// Dynamic shared memory that begins at a multiple of 1024.
#define SWIZZLED_SHARED(T, name)                           \
    extern __shared__ __align__(1024) u8 swizzled_shared[]; \
    T* name = reinterpret_cast<T*>(swizzled_shared)

// Shows what this thread wrote to shared memory, and its copies that have arrived, to the tensor cores' own reads.
__device__ __forceinline__ void fence_async_proxy() {
    WGMMA_ASM("fence.proxy.async.shared::cta;" ::: "memory");
}
// Before the first product, and whenever a thread has touched accumulators or operands in registers.
__device__ __forceinline__ void wgmma_fence() {
    WGMMA_ASM("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    WGMMA_ASM("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `N` committed groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    WGMMA_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving what is done with these registers across this place.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

#define WGMMA_ROW(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define WGMMA_ROWS4(i) WGMMA_ROW(i), WGMMA_ROW(i + 1), WGMMA_ROW(i + 2), WGMMA_ROW(i + 3)

#define WGMMA_64 WGMMA_ROWS4(0), WGMMA_ROWS4(4)
#define WGMMA_NAMES_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_96 WGMMA_ROWS4(0), WGMMA_ROWS4(4), WGMMA_ROWS4(8)
#define WGMMA_NAMES_96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_128 WGMMA_ROWS4(0), WGMMA_ROWS4(4), WGMMA_ROWS4(8), WGMMA_ROWS4(12)
#define WGMMA_NAMES_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Products of width N: d += a · bᵀ with a and b read from shared memory, their rows along k; and d += a · b with a in registers, as
// mma_bf16 has it in each warp, and the rows of b along its width. The numbers are those of the operands behind the accumulators.
#define WGMMA_PRODUCTS(N, A, B, C, D, E, F)                                                                                            \
    __device__ __forceinline__ void wgmma_start(float (&d)[N / 8][4], u64 a, u64 b, bool accumulate) {                                 \
        WGMMA_ASM("{ .reg .pred p; setp.ne.b32 p, %" C ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_NAMES_##N \
                  "}, %" A ", %" B ", p, 1, 1, 0, 0; }"                                                                                 \
                  : WGMMA_##N                                                                                                          \
                  : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                                \
    }                                                                                                                                  \
    __device__ __forceinline__ void wgmma_add(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {                                        \
        WGMMA_ASM("{ .reg .pred p; setp.ne.b32 p, %" F ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_NAMES_##N \
                  "}, {%" A ", %" B ", %" C ", %" D "}, %" E ", p, 1, 1, 1; }"                                                          \
                  : WGMMA_##N                                                                                                          \
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                                       \
    }
WGMMA_PRODUCTS(64, "32", "33", "34", "35", "36", "37")
WGMMA_PRODUCTS(96, "48", "49", "50", "51", "52", "53")
WGMMA_PRODUCTS(128, "64", "65", "66", "67", "68", "69")

#endif  // TANDEM_EMULATE

// The descriptor of an operand that begins at `p`. `columns_apart` bytes lie between its columns of 64 elements; only operands whose rows
// lie along their width and are wider than 64 have a second one in a product.
__device__ __forceinline__ u64 operand(SharedPtr<bf16> p, u32 columns_apart = 16) {
    constexpr u64 SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024;
    return SWIZZLE_128 | EIGHT_ROWS / 16 << 32 | static_cast<u64>(columns_apart / 16) << 16 | (shared_address(p) & 0x3ffffu) / 16;
}
// The descriptor of what lies `bytes` further on.
__device__ __forceinline__ u64 advance(u64 operand, u32 bytes) {
    return operand + bytes / 16;
}
