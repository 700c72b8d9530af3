// Runs CUDA kernels on the CPU, one thread of a block after the other, and checks what a GPU does not: bounds and alignment of every access,
// races on shared memory, barriers and shuffles that not all threads reach. The kernels' own source is compiled against this header.
//
// Each thread is a fiber with its own stack. It runs until a barrier or a shuffle and then gives way to the next, in an order drawn anew each time.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};

// ---- float16

struct __half {
    _Float16 value;
};
struct __half2 {
    __half x, y;
};
inline float __half2float(__half h) { return (float)h.value; }
inline __half __float2half_rn(float f) { return {(_Float16)f}; }
inline __half2 __floats2half2_rn(float low, float high) { return {{(_Float16)low}, {(_Float16)high}}; }
inline unsigned short __half_as_ushort(__half h) {
    unsigned short bits;
    memcpy(&bits, &h, 2);
    return bits;
}
inline __half __ushort_as_half(unsigned short bits) {
    __half h;
    memcpy(&h, &bits, 2);
    return h;
}
inline float2 __half22float2(__half2 h) { return {(float)h.x.value, (float)h.y.value}; }
inline float __uint_as_float(unsigned bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
inline int __float2int_rn(float f) { return (int)lrintf(f); }
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return sum;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// ---- threads

namespace emu {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class State { ready, barrier, shuffle, done };

// Of shared memory, as one thread makes them between two barriers or shuffles.
struct Access {
    const void* array;
    long long byte;
    int bytes;
    bool write;
};

// A thread of the block. It goes from block to block: making one costs more than a small kernel does.
struct Fiber {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it goes on: unlike swapcontext, longjmp asks nothing of the system
    bool begun = false;
    std::unique_ptr<char[]> stack;
    dim3 thread;
    int number = 0;
    State state = State::ready;
    const char* where = "";
    float exchange[2] = {0, 0};  // two, so that a fast lane's next value does not hide the last one
    unsigned shuffles = 0;
    std::vector<Access> accesses;
};

struct SharedBase {
    virtual ~SharedBase() = default;
};

struct Fibers {
    Fiber* first = nullptr;
    size_t count = 0;
    Fiber* begin() const { return first; }
    Fiber* end() const { return first + count; }
    size_t size() const { return count; }
    Fiber& operator[](size_t i) const { return first[i]; }
};

struct Block {
    dim3 grid, size, index;
    Fibers fibers;
    std::map<std::string, std::unique_ptr<SharedBase>> shared;
    int epoch = 0;  // barriers passed
    std::string error;
};

// The most visits of a bank for one access of a warp, since somebody asked for it: 1 is no conflict.
inline int worst_conflict = 0;

inline Block* block = nullptr;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline const std::function<void()>* body = nullptr;
constexpr size_t kStack = 96 << 10;

inline void give_way(State state, const char* where) {
    current->state = state;
    current->where = where;
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}

inline void fiber_main() {
    for (;;) {
        try {
            (*body)();
        } catch (const std::exception& error) {
            if (block->error.empty()) block->error = error.what();
        }
        give_way(State::done, "");
    }
}

constexpr size_t kMostThreads = 1024;

// ``count`` fibers that stand before the body. Those of a block that failed stand somewhere within it, and are never used again.
inline Fibers fibers_for(size_t count, bool last_failed) {
    static Fiber* pool = nullptr;
    if (!pool || last_failed) pool = new Fiber[kMostThreads];
    for (size_t i = 0; i < count; i++) {
        Fiber& fiber = pool[i];
        fiber.thread = {(unsigned)i, 0, 0};
        fiber.number = (int)i;
        fiber.state = State::ready;
        fiber.shuffles = 0;
        fiber.accesses.clear();
        if (fiber.stack) continue;
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    return {pool, count};
}

constexpr int kBanks = 32, kBankBytes = 4;

// How often the banks are visited for one access of some lanes: the most different words that lie in one of them.
inline int visits(const std::vector<Access>& lanes) {
    std::map<long long, std::set<long long>> words;
    for (const Access& access : lanes)
        for (long long word = access.byte / kBankBytes; word * kBankBytes < access.byte + access.bytes; word++)
            words[word % kBanks].insert(word);
    size_t most = 0;
    for (auto& bank : words) most = std::max(most, bank.second.size());
    return (int)most;
}

// A warp's lanes have done the same instructions since they last stood together, but that some may have done more at the end: what their
// accesses cost, a warp's access of 4 bytes a lane at once, of 16 bytes eight lanes at a time.
inline void count_conflicts(size_t first_lane, size_t lanes) {
    size_t longest = 0;
    for (size_t i = 0; i < lanes; i++) longest = std::max(longest, block->fibers[first_lane + i].accesses.size());
    for (size_t n = 0; n < longest; n++) {
        std::vector<Access> together;
        const auto flush = [&] {
            if (!together.empty()) worst_conflict = std::max(worst_conflict, visits(together));
            together.clear();
        };
        for (size_t i = 0; i < lanes; i++) {
            const auto& all = block->fibers[first_lane + i].accesses;
            if (n >= all.size()) continue;
            const Access& access = all[n];
            const size_t at_once = std::max<size_t>(1, 32 * kBankBytes / access.bytes);
            if (!together.empty() && (i % std::min<size_t>(32, at_once) == 0 || together[0].array != access.array || together[0].write != access.write))
                flush();
            together.push_back(access);
        }
        flush();
    }
    for (size_t i = 0; i < lanes; i++) block->fibers[first_lane + i].accesses.clear();
}

inline std::string place() {
    char text[160];
    snprintf(text, sizeof text, " (block %u,%u,%u thread %u)", block->index.x, block->index.y, block->index.z, current->thread.x);
    return text;
}

// All of a warp's lanes wait at a shuffle, or none does.
inline bool release_warps() {
    bool any = false;
    for (size_t first = 0; first < block->fibers.size(); first += 32) {
        size_t waiting = 0, lanes = std::min<size_t>(32, block->fibers.size() - first);
        for (size_t i = 0; i < lanes; i++) waiting += block->fibers[first + i].state == State::shuffle;
        if (waiting != lanes) continue;
        count_conflicts(first, lanes);
        for (size_t i = 0; i < lanes; i++) block->fibers[first + i].state = State::ready;
        any = true;
    }
    return any;
}

inline bool release_barrier() {
    size_t waiting = 0;
    for (auto& fiber : block->fibers) waiting += fiber.state == State::barrier;
    if (waiting != block->fibers.size()) return false;
    for (size_t first = 0; first < waiting; first += 32) count_conflicts(first, std::min<size_t>(32, waiting - first));
    for (auto& fiber : block->fibers) fiber.state = State::ready;
    block->epoch++;
    return true;
}

inline void run_block(std::mt19937& random) {
    std::vector<size_t> order(block->fibers.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        bool ran = false, all_done = true;
        for (size_t i : order) {
            Fiber& fiber = block->fibers[i];
            if (fiber.state == State::ready) {
                resume(fiber);
                ran = true;
                if (!block->error.empty()) return;
            }
            all_done &= fiber.state == State::done;
        }
        if (all_done) {
            for (size_t first = 0; first < order.size(); first += 32)
                count_conflicts(first, std::min<size_t>(32, order.size() - first));
            return;
        }
        if (release_warps() || release_barrier()) continue;
        if (!ran) {
            for (auto& fiber : block->fibers)
                if (fiber.state != State::done) {
                    block->error = std::string("not all threads reach this ") + fiber.where;
                    return;
                }
        }
    }
}

inline std::string launch(dim3 grid, dim3 size, unsigned seed, const std::function<void()>& kernel) {
    static bool failed = false;  // the last block of this module
    if (size.x > kMostThreads) return "a block of " + std::to_string(size.x) + " threads";
    std::mt19937 random(seed);
    body = &kernel;
    for (unsigned number = 0; number < grid.x * grid.y * grid.z; number++) {
        Block here;
        here.grid = grid;
        here.size = size;
        here.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
        here.fibers = fibers_for(size.x, failed);
        block = &here;
        run_block(random);
        failed = !here.error.empty();
        if (failed) return here.error;
    }
    return "";
}

// ---- memory

template <typename T>
struct Array {
    T* start;
    long long count;
    T& operator[](long long i) const {
        if (i < 0 || i >= count)
            throw Error("out of bounds: element " + std::to_string(i) + " of " + std::to_string(count) + place());
        return start[i];
    }
};

template <typename T>
struct Cell {
    T value{};
    int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1;
};

template <typename T>
struct Ref {
    Cell<T>* cell;
    const void* array;
    long long index;
    void note(bool write) const {
        current->accesses.push_back({array, index * (long long)sizeof(T), (int)sizeof(T), write});
    }
    operator T() const {
        const int me = current->number;
        note(false);
        if (cell->write_epoch < 0) throw Error("shared memory is read before it is written" + place());
        if (cell->write_epoch == block->epoch && cell->writer != me)
            throw Error("race: shared memory is read beside another thread's write" + place());
        const bool others = cell->read_epoch == block->epoch && cell->reader != me;
        cell->reader = others ? -2 : me;
        cell->read_epoch = block->epoch;
        return cell->value;
    }
    T operator=(T value) {
        const int me = current->number;
        note(true);
        if (cell->write_epoch == block->epoch && cell->writer != me)
            throw Error("race: two threads write the same shared memory" + place());
        if (cell->read_epoch == block->epoch && cell->reader != me)
            throw Error("race: shared memory is written beside another thread's read" + place());
        cell->writer = me;
        cell->write_epoch = block->epoch;
        return cell->value = value;
    }
};

template <typename T>
struct Shared : SharedBase {
    std::vector<Cell<T>> cells;
    explicit Shared(size_t size) : cells(size) {}
    Ref<T> operator[](long long i) {
        if (i < 0 || i >= (long long)cells.size()) throw Error("out of bounds of shared memory" + place());
        return {&cells[i], this, i};
    }
};

template <typename T>
Shared<T>& shared_memory(const char* name, size_t size) {
    auto& found = block->shared[name];
    if (!found) found.reset(new Shared<T>(size));
    return *static_cast<Shared<T>*>(found.get());
}

}  // namespace emu

#define IN(type) emu::Array<const type>
#define OUT(type) emu::Array<type>
#define SHARED(type, name, size) emu::Shared<type>& name = emu::shared_memory<type>(#name, size)
#define threadIdx (emu::current->thread)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->size)
#define gridDim (emu::block->grid)

template <typename T>
T* vector_at(emu::Array<T> memory, long long index) {
    const long long wide = 16 / sizeof(T);
    if (index < 0 || index + wide > memory.count)
        throw emu::Error("out of bounds: a vector at element " + std::to_string(index) + " of " + std::to_string(memory.count) + emu::place());
    if ((uintptr_t)(memory.start + index) % 16) throw emu::Error("misaligned: a vector at element " + std::to_string(index) + emu::place());
    return memory.start + index;
}
template <typename T>
uint4 load_vector(emu::Array<T> memory, long long index) {
    uint4 vector;
    memcpy(&vector, vector_at(memory, index), 16);
    return vector;
}
template <typename T>
void store_vector(emu::Array<T> memory, long long index, uint4 vector) {
    memcpy(vector_at(memory, index), &vector, 16);
}

inline void __syncthreads() { emu::give_way(emu::State::barrier, "barrier"); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    emu::Fiber* me = emu::current;
    const unsigned side = me->shuffles++ % 2;
    me->exchange[side] = value;
    emu::give_way(emu::State::shuffle, "shuffle");
    return emu::block->fibers[(size_t)(me->number ^ offset)].exchange[side];
}

inline float __shfl_sync(unsigned, float value, int lane) {
    emu::Fiber* me = emu::current;
    const unsigned side = me->shuffles++ % 2;
    me->exchange[side] = value;
    emu::give_way(emu::State::shuffle, "shuffle");
    return emu::block->fibers[(size_t)(me->number / 32 * 32 + lane)].exchange[side];
}

// ---- launches from elsewhere than Python: kernels/cuda/launch_queue.h calls this as cuLaunchKernel

namespace emu {

// What stands for a CUfunction.
struct Function {
    void (*launch)(unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned seed, void** arguments, char* error);
    int parameters;
    const char* arrays;  // for each parameter whether it is one
};

// As launch_queue.h lays arguments out: a card looks at the value only.
struct Argument {
    uint64_t value, elements;
};

inline int launch_function(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned threads, void** parameters) {
    const Function& known = *(Function*)function;
    std::vector<void*> arguments;
    for (int i = 0; i < known.parameters; i++) {
        auto* argument = (Argument*)parameters[i];
        arguments.push_back(known.arrays[i] ? (void*)argument->value : (void*)&argument->value);
        arguments.push_back((void*)argument->elements);
    }
    char error[300];
    known.launch(gx, gy, gz, threads, 1, arguments.data(), error);
    if (*error) fprintf(stderr, "emulation: %s\n", error);
    return *error ? 719 : 0;  // cudaErrorLaunchFailure
}

}  // namespace emu
