// The names of wgmma.cuh for emulate.hpp, after the PTX ISA's chapter on asynchronous warpgroup instructions.
//
// A product reads shared memory twice: where it starts, when its operands must be there, and where it is waited for, when they
// must still be; only then is it computed. Until then its accumulators are NaN. Found are thus a missing wait, fence or barrier, and
// a place that is written while a product may still read it. Only operands with the 128-byte swizzle are known.
#pragma once

namespace emulate {

// The fields of a matrix descriptor, in bytes.
struct Descriptor {
    uint32_t start, leading, stride;
    explicit Descriptor(uint64_t bits) : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) machine().fail("wgmma: the emulation knows the 128-byte swizzle without a base offset only");
    }
    // Rows along k: 8 rows of 128 bytes, and the next 8 a stride further.
    float along_k(int row, int k) const { return at(start + row / 8 * stride + row % 8 * 128 + k * 2); }
    // Rows along the width: 64 elements a row and the next 64 a leading offset further; 8 rows, and the next 8 a stride further.
    float along_width(int k, int n) const { return at(start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2); }

  private:
    static float at(uint32_t address) {
        uint32_t bits = uint32_t(machine().read_operand(address ^ (address >> 7 & 7) << 4)) << 16;
        float v;
        memcpy(&v, &bits, 4);
        return v;
    }
};

// A warp's part of a product's operands.
struct Operands {
    float a[16][16], b[16][128];

    Operands(Thread* const* lanes, size_t index, int warp) {
        const Product& p = lanes[0]->products[index];
        for (int lane = 0; lane < 32; ++lane) {
            const Product& o = lanes[lane]->products[index];
            if (o.b != p.b || o.a != p.a || o.width != p.width || o.accumulate != p.accumulate)
                machine().fail("wgmma: lanes of a warp name different operands");
            if (!p.in_registers) continue;
            for (int i = 0; i < 4; ++i)
                for (int h = 0; h < 2; ++h) {
                    uint32_t bits = h ? o.registers[i] & 0xffff0000u : o.registers[i] << 16;
                    memcpy(&a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + h], &bits, 4);
                }
        }
        for (int row = 0; row < 16 && !p.in_registers; ++row)
            for (int k = 0; k < 16; ++k) a[row][k] = Descriptor(p.a).along_k(warp % 4 * 16 + row, k);
        const Descriptor from(p.b);
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < p.width; ++n) b[k][n] = p.in_registers ? from.along_width(k, n) : from.along_k(n, k);
    }
};

inline void start_product(Product product, int line) {
    Thread& t = machine().thread();
    if (!t.products_fenced) machine().fail("wgmma at line %d without wgmma_fence", line);
    bool chained = false;
    for (const Product& other : t.products) chained |= other.d == product.d;
    const size_t n = product.width / 2;
    if (!chained) {
        product.before.assign(product.d, product.d + n);
        std::fill_n(product.d, n, std::nanf(""));
    }
    product.group = t.product_groups;
    t.products.push_back(std::move(product));
    const int warp = int(machine().thread_index.x) / 32;
    machine().warp_operation("wgmma", line, &t, [=](void** lanes) {
        Thread** threads = reinterpret_cast<Thread**>(lanes);
        Operands(threads, threads[0]->products.size() - 1, warp);
    });
}

inline void wait_for_products(uint32_t left, int line) {
    const int warp = int(machine().thread_index.x) / 32;
    machine().warp_operation("wgmma.wait_group", line, &machine().thread(), [=](void** lanes) {
        Thread** threads = reinterpret_cast<Thread**>(lanes);
        size_t done = 0;
        for (const auto& all = threads[0]->products; done < all.size() && all[done].group + left < threads[0]->product_groups; ++done) {
            const Operands o(threads, done, warp);
            for (int lane = 0; lane < 32; ++lane) {
                Product& p = threads[lane]->products[done];
                std::copy(p.before.begin(), p.before.end(), p.d);
                for (int i = 0; i < p.width / 2; ++i) {
                    float sum = p.accumulate ? p.d[i] : 0.0f;
                    for (int k = 0; k < 16; ++k) sum += o.a[lane / 4 + i / 2 % 2 * 8][k] * o.b[k][i / 4 * 8 + lane % 4 * 2 + i % 2];
                    p.d[i] = sum;
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto& all = threads[lane]->products;
            all.erase(all.begin(), all.begin() + done);
            threads[lane]->products_fenced = false;
        }
    });
}

}  // namespace emulate

// The emulated shared memory begins at 0.
#define SWIZZLED_SHARED(T, name) DYNAMIC_SHARED(T, name)

inline u32 shared_address(SharedPtr<bf16> p) {
    return p.offset;
}
inline void fence_async_proxy() {
    ++emulate::machine().thread().proxy_fences;
}
inline void wgmma_fence() {
    emulate::machine().thread().products_fenced = true;
}
inline void wgmma_commit() {
    ++emulate::machine().thread().product_groups;
}
template <int N>
inline void wgmma_wait(int line = __builtin_LINE()) {
    emulate::wait_for_products(N, line);
}
template <int N>
inline void pin(float (&)[N][4]) {}

template <int N>
inline void wgmma_start(float (&d)[N][4], u64 a, u64 b, bool accumulate, int line = __builtin_LINE()) {
    emulate::Product p;
    p.d = d[0], p.width = N * 8, p.a = a, p.b = b, p.accumulate = accumulate;
    emulate::start_product(std::move(p), line);
}
template <int N>
inline void wgmma_add(float (&d)[N][4], const u32 (&a)[4], u64 b, int line = __builtin_LINE()) {
    emulate::Product p;
    p.d = d[0], p.width = N * 8, p.b = b, p.accumulate = p.in_registers = true;
    std::copy(a, a + 4, p.registers);
    emulate::start_product(std::move(p), line);
}
