// Runs the kernels of this folder on the CPU, to test them without a GPU. common.cuh includes it where TANDEM_EMULATE is set:
//
//     g++ -std=c++17 -O2 -shared -fPIC -DTANDEM_EMULATE -x c++ kernels/norm.cu -o norm.so
//
// A thread of a block is a fiber. A fiber runs until it reaches a barrier, a warp operation or its end; warps, lanes and
// blocks take turns in an order drawn from a seed. What a GPU would let pass in silence ends the launch with an error:
//   * global memory: an access outside the registered allocations, or not aligned to its size;
//   * shared memory: an access outside its array, a read of what nobody wrote, and every race: two threads at the same bytes,
//     one of them writing, and no __syncthreads (in one warp: sync_warp) between. A shuffle or a tensor-core product orders
//     no memory. Bytes under cp.async count as unwritten until the thread that issued it has waited;
//   * barriers and warp operations that not all threads reach at the same line, and threads that end before the others' barrier.
// What is not seen: races between blocks in global memory (the order of the blocks is shuffled), and reads of global memory
// that nobody wrote (whoever allocates should fill it with NaN).
//
// The C interface is at the end. Launches of different host threads may run at the same time; one launch is sequential.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulate_fiber.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulate {

struct Index {
    unsigned x, y, z;
};

// ---- Registered global memory ------------------------------------------------------------------------------------------

class Registry {
  public:
    // The same memory may be registered several times; it stays until it is removed as often.
    void add(uintptr_t begin, size_t bytes) {
        std::unique_lock<std::shared_mutex> lock(mutex_);
        Range& range = ranges_[begin];
        range.end = std::max(range.end, begin + bytes);
        ++range.count;
    }
    void remove(uintptr_t begin) {
        std::unique_lock<std::shared_mutex> lock(mutex_);
        auto found = ranges_.find(begin);
        if (found != ranges_.end() && --found->second.count == 0) ranges_.erase(found);
    }
    // The allocation at or below `address`; {0, 0} where there is none.
    std::pair<uintptr_t, uintptr_t> find(uintptr_t address) {
        std::shared_lock<std::shared_mutex> lock(mutex_);
        auto next = ranges_.upper_bound(address);
        if (next == ranges_.begin()) return {0, 0};
        --next;
        return {next->first, next->second.end};
    }

  private:
    struct Range {
        uintptr_t end = 0;
        size_t count = 0;
    };
    std::shared_mutex mutex_;
    std::map<uintptr_t, Range> ranges_;
};

inline Registry& registry() {
    static Registry r;
    return r;
}

// ---- One launch --------------------------------------------------------------------------------------------------------

constexpr int MAX_THREADS = 1024;

enum class State : uint8_t { Ready, AtBarrier, AtWarpOperation, Ended };

struct PendingCopy {
    uint32_t offset, group;
    unsigned char bytes[16];
};

// A tensor-core product under way; emulate_wgmma.hpp has all that is done with it.
struct Product {
    float* d = nullptr;         // its accumulators, width / 2 of them
    std::vector<float> before;  // what they were, in the first product under way on them
    int width = 0;
    uint64_t a = 0, b = 0;      // descriptors
    uint32_t registers[4] = {};
    bool in_registers = false, accumulate = false;
    uint32_t group = 0;
};

struct Thread {
    Fiber fiber;
    State state = State::Ended;
    int line = 0;
    const char* what = "";
    void* operand = nullptr;
    std::vector<PendingCopy> copies;
    uint32_t groups = 0;
    std::vector<Product> products;
    uint32_t product_groups = 0, proxy_fences = 0;
    bool products_fenced = false;
};

// Who touched two bytes of shared memory last, and when.
struct Cell {
    uint32_t block = 0;  // serial number of the block it speaks of
    uint32_t write_epoch = 0, write_warp_epoch = 0;
    uint32_t read_epoch = 0, read_warp_epoch = 0;
    uint32_t proxy_fences = 0;  // of the writer, before it wrote
    uint16_t writer = 0, reader = 0;  // thread + 1; SEVERAL where they combined; reader may be SEVERAL or IN_WARP + warp
    bool copying = false;
};
constexpr uint16_t SEVERAL = 0xffff, IN_WARP = 0x8000;

enum class Access { Read, Write, Combine };

struct SharedArray {
    int site;
    uint32_t begin, end;
};

class Machine {
  public:
    Index grid{}, block_dim{}, block_index{}, thread_index{};
    char error[512] = {};

    int launch(const char* name, Index g, Index b, unsigned shared_bytes, uint64_t seed, bool in_order, void (*body)(void*), void* arg) {
        kernel_ = name;
        grid = g;
        block_dim = b;
        dynamic_bytes_ = shared_bytes;
        random_ = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
        body_ = body;
        arg_ = arg;
        failed_ = false;
        error[0] = 0;
        const char* wrong = nullptr;
        if (b.y != 1 || b.z != 1 || b.x == 0 || b.x % 32 != 0 || b.x > MAX_THREADS) wrong = "block must be 32 to 1024 threads, whole warps, one dimension";
        if (g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 || g.z > 65535) wrong = "grid is empty or too large";
        if (shared_bytes > (227u << 10)) wrong = "more than 227 KiB of dynamic shared memory";
        if (wrong) {
            snprintf(error, sizeof error, "%s: %s", name, wrong);
            return 1;
        }
        if (!stacks_) {
            void* p = mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (p == MAP_FAILED) {
                snprintf(error, sizeof error, "%s: no memory for the emulation's stacks", name);
                return 1;
            }
            stacks_ = static_cast<char*>(p);
        }
        // A linear congruence modulo a power of two walks through all blocks once, in a shuffled order (Hull and Dobell, 1962).
        uint64_t n = uint64_t(g.x) * g.y * g.z, size = 1;
        while (size < n) size *= 2;
        uint64_t factor = in_order ? 1 : next_random() * 4 + 1, step = in_order ? 1 : next_random() * 2 + 1;
        uint64_t at = in_order ? 0 : next_random() % size;
        for (uint64_t i = 0; i < size && !failed_; ++i, at = (at * factor + step) % size) {
            if (at >= n) continue;
            block_index = {unsigned(at % g.x), unsigned(at / g.x % g.y), unsigned(at / g.x / g.y)};
            run_block();
        }
        return failed_ ? 1 : 0;
    }

    // ---- Called by the threads -----------------------------------------------------------------------------------------

    void sync_threads(int line) {
        Thread& t = threads_[current_];
        t.state = State::AtBarrier;
        t.line = line;
        ++at_barrier_;
        if (ended_ > 0) fail("__syncthreads at line %d, but another thread of the block has ended", line);
        if (at_barrier_ < n_threads_) return yield();
        for (int i = 0; i < n_threads_; ++i) {
            if (threads_[i].line != line) fail("threads meet at different barriers: lines %d and %d", line, threads_[i].line);
            threads_[i].state = State::Ready;
        }
        at_barrier_ = 0;
        ++epoch_;
    }

    // Lets the other threads run; this one is ready all the while.
    void pause() { yield(); }

    // All 32 lanes hand in their operands; the last to come runs `complete` on them.
    template <class F>
    void warp_operation(const char* what, int line, void* operand, F complete) {
        Thread& t = threads_[current_];
        int warp = current_ / 32;
        t.state = State::AtWarpOperation;
        t.line = line;
        t.what = what;
        t.operand = operand;
        if (++at_warp_operation_[warp] < 32) return yield();
        void* operands[32];
        for (int lane = 0; lane < 32; ++lane) {
            Thread& other = threads_[warp * 32 + lane];
            if (other.line != line || other.what != what)
                fail("a warp's lanes meet at different operations: %s (line %d) and %s (line %d)", what, line, other.what, other.line);
            operands[lane] = other.operand;
        }
        complete(operands);
        for (int lane = 0; lane < 32; ++lane) threads_[warp * 32 + lane].state = State::Ready;
        at_warp_operation_[warp] = 0;
    }
    void sync_warp(int line) {
        warp_operation("sync_warp", line, nullptr, [&](void**) { ++warp_epoch_[current_ / 32]; });
    }

    void check_global(const void* p, size_t bytes, bool write) {
        uintptr_t a = reinterpret_cast<uintptr_t>(p);
        const char* verb = write ? "writes" : "reads";
        if (a % bytes != 0) fail("%s %zu bytes of global memory at %p, which is not aligned", verb, bytes, p);
        if (a >= last_range_.first && a + bytes <= last_range_.second) return;
        auto range = registry().find(a);
        if (a < range.first || a + bytes > range.second)
            fail("%s %zu bytes of global memory at %p; the allocation before begins %zu bytes earlier and has %zu bytes", verb, bytes, p,
                 size_t(a - range.first), size_t(range.second - range.first));
        last_range_ = range;
    }

    SharedArray shared_array(int site, uint32_t bytes) {
        for (auto& array : arrays_)
            if (array.site == site) return array;
        uint32_t begin = (shared_used_ + 15) / 16 * 16;
        arrays_.push_back({site, begin, begin + bytes});
        shared_used_ = begin + bytes;
        if (shared_.size() < shared_used_) {
            shared_.resize(shared_used_ + 4096);
            cells_.resize(shared_.size() / 2);
        }
        if (shared_used_ - dynamic_bytes_ > (48u << 10)) fail("more than 48 KiB of static shared memory");
        return arrays_.back();
    }
    SharedArray dynamic_array() { return {-1, 0, dynamic_bytes_}; }

    void* check_shared(uint32_t offset, uint32_t begin, uint32_t end, uint32_t bytes, Access access) {
        if (offset < begin || offset + bytes > end || end > shared_.size())
            fail("%s shared memory at byte %d of an array of %u bytes", access == Access::Read ? "reads" : "writes", int(offset - begin), end - begin);
        if (offset % bytes != 0) fail("shared memory at byte %u is not aligned to %u bytes", offset - begin, bytes);
        auto touch = access == Access::Read ? &Machine::read : access == Access::Write ? &Machine::wrote : &Machine::combined;
        for (uint32_t i = offset / 2; i < (offset + bytes) / 2; ++i) (this->*touch)(cells_[i], offset - begin);
        return &shared_[offset];
    }

    void copy_async(uint32_t offset, uint32_t begin, uint32_t end, const void* global, bool valid) {
        Thread& t = threads_[current_];
        check_shared(offset, begin, end, 16, Access::Write);
        PendingCopy copy{offset, t.groups, {}};
        if (valid) {
            check_global(global, 16, false);
            memcpy(copy.bytes, global, 16);
        }
        for (uint32_t i = offset / 2; i < offset / 2 + 8; ++i) cells_[i].copying = true;
        t.copies.push_back(copy);
    }
    void copy_commit() { ++threads_[current_].groups; }
    void copy_wait(uint32_t left) {
        Thread& t = threads_[current_];
        size_t kept = 0;
        for (PendingCopy& copy : t.copies) {
            if (copy.group + left >= t.groups) {
                t.copies[kept++] = copy;
                continue;
            }
            memcpy(&shared_[copy.offset], copy.bytes, 16);
            for (uint32_t i = copy.offset / 2; i < copy.offset / 2 + 8; ++i) {
                cells_[i].copying = false;
                wrote(cells_[i], copy.offset);
            }
        }
        t.copies.resize(kept);
    }

    Thread& thread() { return threads_[current_]; }

    // Two bytes of shared memory as the tensor cores read them.
    uint16_t read_operand(uint32_t address) {
        if (address + 2 > shared_used_) fail("wgmma reads shared memory at byte %u of %u", address, shared_used_);
        Cell& c = cells_[address / 2];
        read(c, address);
        if (c.proxy_fences == threads_[c.writer - 1].proxy_fences)
            fail("wgmma reads shared memory that thread %d wrote without fence_async_proxy since (byte %u)", c.writer - 1, address);
        uint16_t v;
        memcpy(&v, &shared_[address], 2);
        return v;
    }

    [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
        char text[320];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        snprintf(error, sizeof error, "%s: block (%u, %u, %u), thread %d: %s", kernel_, block_index.x, block_index.y, block_index.z, current_, text);
        failed_ = true;
        Fiber::switch_to(threads_[current_].fiber, scheduler_);
        abort();  // a failed launch's fibers are never resumed
    }

    static Machine*& current() {
        static thread_local Machine* machine = nullptr;
        return machine;
    }

  private:
    const char* kernel_ = "";
    void (*body_)(void*) = nullptr;
    void* arg_ = nullptr;
    uint64_t random_ = 1;
    bool failed_ = false;
    Fiber scheduler_;
    char* stacks_ = nullptr;
    Thread threads_[MAX_THREADS];
    int current_ = 0, n_threads_ = 0, ended_ = 0, at_barrier_ = 0;
    int at_warp_operation_[MAX_THREADS / 32] = {};
    uint32_t epoch_ = 0, warp_epoch_[MAX_THREADS / 32] = {};
    uint32_t serial_ = 0, dynamic_bytes_ = 0, shared_used_ = 0;
    std::vector<unsigned char> shared_;
    std::vector<Cell> cells_;
    std::vector<SharedArray> arrays_;
    std::pair<uintptr_t, uintptr_t> last_range_{0, 0};

    uint64_t next_random() {
        random_ ^= random_ << 13;
        random_ ^= random_ >> 7;
        random_ ^= random_ << 17;
        return random_ >> 11;
    }

    static void fiber_main() {
        Machine* m = current();
        m->body_(m->arg_);
        m->threads_[m->current_].state = State::Ended;
        ++m->ended_;
        if (!m->thread().products.empty()) m->fail("ends with wgmma under way");
        if (m->at_barrier_ > 0) m->fail("ends while other threads wait at __syncthreads");
        Fiber::switch_to(m->threads_[m->current_].fiber, m->scheduler_);
        abort();
    }

    void yield() { Fiber::switch_to(threads_[current_].fiber, scheduler_); }

    void run_block() {
        n_threads_ = int(block_dim.x);
        ended_ = at_barrier_ = 0;
        epoch_ = 1;
        ++serial_;
        last_range_ = {0, 0};
        arrays_.clear();
        shared_used_ = dynamic_bytes_;
        if (shared_.size() < dynamic_bytes_ || shared_.empty()) {
            shared_.resize(dynamic_bytes_ + 4096);
            cells_.resize(shared_.size() / 2);
        }
        for (int w = 0; w < MAX_THREADS / 32; ++w) at_warp_operation_[w] = 0, warp_epoch_[w] = 1;
        for (int i = 0; i < n_threads_; ++i) {
            threads_[i].state = State::Ready;
            threads_[i].copies.clear();
            threads_[i].groups = threads_[i].product_groups = threads_[i].proxy_fences = 0;
            threads_[i].products.clear();
            threads_[i].products_fenced = false;
            threads_[i].fiber.start(stacks_ + size_t(i) * STACK_BYTES, fiber_main);
        }
        int n_warps = n_threads_ / 32;
        while (ended_ < n_threads_) {
            bool moved = false;
            int first = int(next_random() % n_warps);
            for (int i = 0; i < n_warps; ++i) {
                int warp = (first + i) % n_warps;
                int lane = int(next_random() % 32), step = int(next_random() | 1);
                for (int j = 0; j < 32; ++j, lane = (lane + step) & 31) {
                    int t = warp * 32 + lane;
                    if (threads_[t].state != State::Ready) continue;
                    moved = true;
                    current_ = t;
                    thread_index = {unsigned(t), 0, 0};
                    Fiber::switch_to(scheduler_, threads_[t].fiber);
                    if (failed_) return;
                }
            }
            if (!moved) return report_deadlock();
        }
    }

    void report_deadlock() {
        const Thread* waiting = nullptr;
        for (int i = 0; i < n_threads_ && !waiting; ++i)
            if (threads_[i].state == State::AtWarpOperation) waiting = &threads_[i];
        snprintf(error, sizeof error, "%s: block (%u, %u, %u): lanes of one warp wait at %s (line %d) for lanes that wait elsewhere or have ended", kernel_,
                 block_index.x, block_index.y, block_index.z, waiting ? waiting->what : "__syncthreads", waiting ? waiting->line : 0);
        failed_ = true;
    }

    // No barrier between an access of thread `other` (its number + 1) and now.
    bool unordered(uint16_t other, uint32_t epoch, uint32_t warp_epoch) const {
        if (epoch != epoch_) return false;
        int warp = current_ / 32;
        if (other == SEVERAL) return true;
        if (other >= IN_WARP) return other - IN_WARP != warp || warp_epoch == warp_epoch_[warp];
        if (other == current_ + 1) return false;
        return (other - 1) / 32 != warp || warp_epoch == warp_epoch_[warp];
    }
    void read(Cell& c, uint32_t byte) {
        if (c.block != serial_ || c.writer == 0) fail("reads shared memory that nobody wrote (byte %u of its array)", byte);
        if (c.copying) fail("reads shared memory under cp.async before the wait (byte %u)", byte);
        if (unordered(c.writer, c.write_epoch, c.write_warp_epoch))
            fail("race in shared memory: reads what thread %d wrote, no barrier between (byte %u)", c.writer - 1, byte);
        uint32_t mine = warp_epoch_[current_ / 32];
        uint16_t me = uint16_t(current_ + 1);
        if (c.reader != 0 && c.read_epoch == epoch_ && c.reader != me) {
            int warp = c.reader == SEVERAL ? -1 : c.reader >= IN_WARP ? c.reader - IN_WARP : (c.reader - 1) / 32;
            if (warp != current_ / 32)
                me = SEVERAL;
            else if (c.read_warp_epoch == mine)
                me = uint16_t(IN_WARP + warp);
        }
        c.reader = me;
        c.read_epoch = epoch_;
        c.read_warp_epoch = mine;
    }
    void wrote(Cell& c, uint32_t byte) {
        if (c.block != serial_) {
            c = Cell();
            c.block = serial_;
        }
        if (c.writer != 0 && unordered(c.writer, c.write_epoch, c.write_warp_epoch))
            fail("race in shared memory: writes where thread %d wrote, no barrier between (byte %u)", c.writer - 1, byte);
        if (c.reader != 0 && unordered(c.reader, c.read_epoch, c.read_warp_epoch))
            fail("race in shared memory: writes what another thread reads, no barrier between (byte %u)", byte);
        c.writer = uint16_t(current_ + 1);
        c.proxy_fences = threads_[current_].proxy_fences;
        c.write_epoch = epoch_;
        c.write_warp_epoch = warp_epoch_[current_ / 32];
        c.reader = 0;
    }
    // An atomic operation: in the way of reads and writes, and of no other of its kind.
    void combined(Cell& c, uint32_t byte) {
        if (c.block != serial_ || c.writer == 0) fail("combines with shared memory that nobody wrote (byte %u of its array)", byte);
        if (c.writer == SEVERAL && c.write_epoch == epoch_) return;
        wrote(c, byte);
        c.writer = SEVERAL;
    }
};

inline Machine& machine() {
    return *Machine::current();
}

// ---- Shared memory -----------------------------------------------------------------------------------------------------

template <class T>
struct Ref {
    uint32_t offset, begin, end;
    operator T() const {
        T v;
        memcpy(&v, machine().check_shared(offset, begin, end, sizeof(T), Access::Read), sizeof(T));
        return v;
    }
    T operator=(T v) const {
        memcpy(machine().check_shared(offset, begin, end, sizeof(T), Access::Write), &v, sizeof(T));
        return v;
    }
    T operator=(const Ref& other) const { return *this = T(other); }
};

template <class T>
struct Pointer {
    uint32_t offset, begin, end;
    explicit Pointer(SharedArray a) : offset(a.begin), begin(a.begin), end(a.end) {}
    Pointer(uint32_t o, uint32_t b, uint32_t e) : offset(o), begin(b), end(e) {}
    Ref<T> operator[](ptrdiff_t i) const { return {uint32_t(offset + i * ptrdiff_t(sizeof(T))), begin, end}; }
    Ref<T> operator*() const { return (*this)[0]; }
    Pointer operator+(ptrdiff_t i) const { return {uint32_t(offset + i * ptrdiff_t(sizeof(T))), begin, end}; }
};

// ---- Kernels by name ---------------------------------------------------------------------------------------------------

using Launcher = int (*)(Machine&, const char*, Index, Index, unsigned, void**, uint64_t, bool);

struct Kernel {
    Launcher launcher;
    bool in_order;
};

inline std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> k;
    return k;
}

template <auto Function>
struct Launch;
template <class... Args, void (*Function)(Args...)>
struct Launch<Function> {
    template <size_t... I>
    static void call(void** args, std::index_sequence<I...>) {
        Function(*static_cast<Args*>(args[I])...);
    }
    static void body(void* args) { call(static_cast<void**>(args), std::index_sequence_for<Args...>()); }
    static int run(Machine& m, const char* name, Index g, Index b, unsigned shared, void** args, uint64_t seed, bool in_order) {
        return m.launch(name, g, b, shared, seed, in_order, body, args);
    }
};

struct Listed {
    // `names` is the text between the parentheses of KERNELS(...).
    Listed(const char* names, bool in_order, std::initializer_list<Launcher> launchers) {
        std::string all(names);
        size_t begin = 0;
        for (Launcher l : launchers) {
            size_t end = std::min(all.find(',', begin), all.size());
            size_t first = all.find_first_not_of(" \n", begin);
            kernels()[all.substr(first, all.find_last_not_of(" \n", end - 1) + 1 - first)] = Kernel{l, in_order};
            begin = end + 1;
        }
    }
};

}  // namespace emulate

#define threadIdx (::emulate::machine().thread_index)
#define blockIdx (::emulate::machine().block_index)
#define blockDim (::emulate::machine().block_dim)
#define gridDim (::emulate::machine().grid)
#define __syncthreads() ::emulate::machine().sync_threads(__LINE__)
#define SHARED(T, name, n) SharedPtr<T> name(::emulate::machine().shared_array(__COUNTER__, (n) * sizeof(T)))
#define DYNAMIC_SHARED(T, name) SharedPtr<T> name(::emulate::machine().dynamic_array())

// KERNELS(a, b): each name to its launcher.
#define EMULATE_1(k) ::emulate::Launch<k>::run
#define EMULATE_2(k, ...) EMULATE_1(k), EMULATE_1(__VA_ARGS__)
#define EMULATE_3(k, ...) EMULATE_1(k), EMULATE_2(__VA_ARGS__)
#define EMULATE_4(k, ...) EMULATE_1(k), EMULATE_3(__VA_ARGS__)
#define EMULATE_5(k, ...) EMULATE_1(k), EMULATE_4(__VA_ARGS__)
#define EMULATE_6(k, ...) EMULATE_1(k), EMULATE_5(__VA_ARGS__)
#define EMULATE_7(k, ...) EMULATE_1(k), EMULATE_6(__VA_ARGS__)
#define EMULATE_8(k, ...) EMULATE_1(k), EMULATE_7(__VA_ARGS__)
#define EMULATE_PICK(_1, _2, _3, _4, _5, _6, _7, _8, name, ...) name
#define EMULATE_LIST(...) \
    {EMULATE_PICK(__VA_ARGS__, EMULATE_8, EMULATE_7, EMULATE_6, EMULATE_5, EMULATE_4, EMULATE_3, EMULATE_2, EMULATE_1, )(__VA_ARGS__)}
#define KERNELS(...) static ::emulate::Listed emulate_listed(#__VA_ARGS__, false, EMULATE_LIST(__VA_ARGS__));
#define KERNELS_IN_ORDER(...) static ::emulate::Listed emulate_listed(#__VA_ARGS__, true, EMULATE_LIST(__VA_ARGS__));

#include "emulate_names.hpp"

// ---- The C interface ---------------------------------------------------------------------------------------------------

#define TANDEM_EXPORT extern "C" __attribute__((visibility("default")))

// Lets kernels touch `bytes` bytes at `p`, until they are unregistered.
TANDEM_EXPORT void tandem_emulate_register(const void* p, size_t bytes) {
    emulate::registry().add(reinterpret_cast<uintptr_t>(p), bytes);
}
TANDEM_EXPORT void tandem_emulate_unregister(const void* p) {
    emulate::registry().remove(reinterpret_cast<uintptr_t>(p));
}

// Whether this file has a kernel of that name.
TANDEM_EXPORT int tandem_emulate_has(const char* kernel) {
    return emulate::kernels().count(kernel) ? 1 : 0;
}

// Runs a kernel to its end. `grid` and `block` are x, y, z; `args` is as for cuLaunchKernel. Returns 0, or 1 with a message
// in `error` (what was written until then stays written).
TANDEM_EXPORT int tandem_emulate_launch(const char* kernel, const unsigned* grid, const unsigned* block, unsigned shared_bytes, void** args,
                                        unsigned long long seed, char* error, size_t error_len) {
    auto found = emulate::kernels().find(kernel);
    if (found == emulate::kernels().end()) {
        snprintf(error, error_len, "no kernel named %s", kernel);
        return 1;
    }
    static thread_local emulate::Machine* machine = new emulate::Machine;  // lives as long as the process: its stacks are reused
    emulate::Machine::current() = machine;
    const emulate::Kernel& k = found->second;
    int rc = k.launcher(*machine, kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, args, seed, k.in_order);
    if (rc != 0 && error_len > 0) snprintf(error, error_len, "%s", machine->error);
    return rc;
}
