// The names of common.cuh for emulate.hpp, which includes this file: each does its work at once, after what it touches was checked.
#pragma once

#include <sched.h>
#include <time.h>

template <class T>
using SharedPtr = ::emulate::Pointer<T>;

template <class T>
inline T load(const T* p) {
    emulate::machine().check_global(p, sizeof(T), false);
    return *p;
}
template <class T>
inline void store(T* p, T v) {
    emulate::machine().check_global(p, sizeof(T), true);
    *p = v;
}
inline Vec16 load_stream(const void* p) {
    return load(static_cast<const Vec16*>(p));
}
inline void prefetch_l2(const void* p) {
    emulate::machine().check_global(p, 16, false);
}
template <class T>
inline void cp_async16(SharedPtr<T> shared, const void* global, bool valid) {
    emulate::machine().copy_async(shared.offset, shared.begin, shared.end, global, valid);
}
inline void cp_async_commit() {
    emulate::machine().copy_commit();
}
template <int N>
inline void cp_async_wait() {
    emulate::machine().copy_wait(N);
}

// Shared-memory forms of load16 and store16.
template <class T>
inline Vec16 load16(SharedPtr<T> p) {
    return emulate::Ref<Vec16>{p.offset, p.begin, p.end};
}
template <class T>
inline void store16(SharedPtr<T> p, const Vec16& v) {
    emulate::Ref<Vec16>{p.offset, p.begin, p.end} = v;
}

inline void emulate_ldmatrix(u32 (&r)[4], SharedPtr<bf16> p, bool transposed, int line) {
    struct Operand {
        u32* r;
        u16 row[8];
    } mine;
    mine.r = r;
    Vec16 row = load16(p);
    memcpy(mine.row, &row, 16);
    emulate::machine().warp_operation(transposed ? "ldmatrix.trans" : "ldmatrix", line, &mine, [&](void** operands) {
        for (int lane = 0; lane < 32; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                u16 pair[2];
                for (int i = 0; i < 2; ++i) {
                    int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
                    pair[i] = static_cast<Operand*>(operands[matrix * 8 + row])->row[column];
                }
                static_cast<Operand*>(operands[lane])->r[matrix] = u32(pair[0]) | u32(pair[1]) << 16;
            }
    });
}
inline void ldmatrix_x4(u32 (&r)[4], SharedPtr<bf16> p, int line = __builtin_LINE()) {
    emulate_ldmatrix(r, p, false, line);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], SharedPtr<bf16> p, int line = __builtin_LINE()) {
    emulate_ldmatrix(r, p, true, line);
}

inline u32 transpose_8x8(u32 pair, int line = __builtin_LINE()) {
    struct Operand {
        u32 v, result;
    } mine{pair, 0};
    emulate::machine().warp_operation("movmatrix", line, &mine, [](void** operands) {
        for (int lane = 0; lane < 32; ++lane) {
            u32 result = 0;
            for (int i = 0; i < 2; ++i) {
                int row = lane % 4 * 2 + i, column = lane / 4;
                u32 from = static_cast<Operand*>(operands[row * 4 + column / 2])->v;
                result |= (column % 2 ? from >> 16 : from & 0xffffu) << (16 * i);
            }
            static_cast<Operand*>(operands[lane])->result = result;
        }
    });
    return mine.result;
}

inline float bits_to_float(u32 bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
inline u32 float_to_bits(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return bits;
}

inline void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int line = __builtin_LINE()) {
    struct Operand {
        float* d;
        u32 a[4], b[2];
    } mine{d, {a0, a1, a2, a3}, {b0, b1}};
    emulate::machine().warp_operation("mma", line, &mine, [](void** operands) {
        float a[16][16], b[16][8], sum[16][8] = {};
        for (int lane = 0; lane < 32; ++lane) {
            const Operand& o = *static_cast<Operand*>(operands[lane]);
            int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i)
                for (int h = 0; h < 2; ++h) a[g + i % 2 * 8][t * 2 + i / 2 * 8 + h] = bits_to_float(h ? o.a[i] & 0xffff0000u : o.a[i] << 16);
            for (int i = 0; i < 2; ++i)
                for (int h = 0; h < 2; ++h) b[t * 2 + i * 8 + h][g] = bits_to_float(h ? o.b[i] & 0xffff0000u : o.b[i] << 16);
        }
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) static_cast<Operand*>(operands[lane])->d[i] += sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    });
}

inline u32 shuffle_xor(u32 v, int mask, int line = __builtin_LINE()) {
    struct Operand {
        u32 v, mask, result;
    } mine{v, u32(mask), 0};
    emulate::machine().warp_operation("shuffle", line, &mine, [](void** operands) {
        for (int lane = 0; lane < 32; ++lane) {
            Operand& o = *static_cast<Operand*>(operands[lane]);
            o.result = static_cast<Operand*>(operands[(lane ^ o.mask) & 31])->v;
        }
    });
    return mine.result;
}
#define sync_warp() ::emulate::machine().sync_warp(__LINE__)

inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u64 both = u64(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= u32(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    return r;
}
inline u32 pack_bf16(float lo, float hi) {
    auto round = [](float v) -> u32 {
        u32 bits = float_to_bits(v);
        return v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return round(lo) | round(hi) << 16;
}
inline float exp2_fast(float x) {
    return exp2f(x);
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline u32 atomic_add(u32* p, u32 v) {
    emulate::machine().check_global(p, 4, true);
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
inline void or_shared(SharedPtr<u32> p, u32 bits) {
    *static_cast<u32*>(emulate::machine().check_shared(p.offset, p.begin, p.end, 4, emulate::Access::Combine)) |= bits;
}
inline void store_marked(MarkedWords* p, MarkedWords v) {
    emulate::machine().check_global(p, 16, true);
    u64 halves[2];
    memcpy(halves, &v, 16);
    for (int i = 0; i < 2; ++i) __atomic_store_n(reinterpret_cast<u64*>(p) + i, halves[i], __ATOMIC_RELEASE);
}
inline MarkedWords load_marked(const MarkedWords* p) {
    emulate::machine().check_global(p, 16, false);
    u64 halves[2];
    for (int i = 0; i < 2; ++i) halves[i] = __atomic_load_n(reinterpret_cast<const u64*>(p) + i, __ATOMIC_ACQUIRE);
    MarkedWords v;
    memcpy(&v, halves, 16);
    return v;
}
inline void store_flag(u32* p, u32 v) {
    emulate::machine().check_global(p, 4, true);
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
inline u32 load_flag(const u32* p) {
    emulate::machine().check_global(p, 4, false);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void fence_system() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void pause_thread() {}
inline u64 nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    // Whoever asks waits: let the other threads of the block go on, and the peer, which may want this core.
    emulate::machine().pause();
    sched_yield();
    return u64(now.tv_sec) * 1000000000u + u64(now.tv_nsec);
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
