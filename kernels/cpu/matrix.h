// Weight matrices as the kernels read them: (n, k) row-major, widened to float in registers.
//
// A matrix type M has its sizes n, k, group_size() (inputs between two changes of scale), row_bytes(), and
//   order      which input belongs to column k, or nullptr
//   M::Row     reads one row: start(matrix, row), prepare(g) at every kLanes-th group, group(g) at the first input of each
//              group, then step(k) for every kStep inputs, which prefetches what comes later in memory, and
//              weights(v) for the kVectors vectors of the step
//   Row::kPartial   whether a group may end within a step; then partial(k, count) gives one short vector
//   Row::kStreams   rows to read at once for a single token
//   M::FewRow  the same, for passes over few tokens if shuffled(): its inputs stand in the order of shuffled_input
#pragma once

#include <algorithm>

#include "elementwise.h"

namespace moss {

constexpr int kPrefetchBytes = 1024;

inline void prefetch(const void* p) { __builtin_prefetch((const char*)p + kPrefetchBytes, 0, 3); }

struct Dense {
    const uint16_t* weight;  // float16
    int64_t n, k;
    static constexpr const int32_t* order = nullptr;

    int64_t group_size() const { return k; }
    int64_t row_bytes() const { return k * 2; }
    static constexpr bool shuffled() { return false; }

    struct Row {
        static constexpr int kStep = 32, kVectors = kStep / kLanes, kStreams = 4;
        static constexpr bool kPartial = true;
        const uint16_t *p, *now;
        void start(const Dense& m, int64_t row) { p = m.weight + row * m.k; }
        void prepare(int64_t) {}
        void group(int64_t) {}
        void step(int64_t at) {
            prefetch(p + at);
            now = p + at;
        }
        F weights(int v) const { return Simd::load_half(now + v * kLanes); }
        F partial(int64_t at, int count) const { return load_half_n(p + at, count); }
    };
    using FewRow = Row;
};

// Of each step of kShuffle shuffled inputs, which one stands at place i: 16 bytes of int4 hold 32 inputs, low nibbles
// first, and vector i / kLanes takes one nibble of one byte of each of the kLanes 32-bit lanes of the step's bytes.
constexpr int kShuffle = 8 * kLanes;

constexpr int shuffled_input(int i) {
    const int nibble = i / kLanes, byte = i % kLanes * 4 + nibble / 2;
    return byte / 16 * 32 + nibble % 2 * 16 + byte % 16;
}

// Whether a pass must copy the inputs of a matrix into another order.
template <class M>
inline bool rearranged(const M& m, bool few) {
    return m.order || (few && m.shuffled());
}

// One token's inputs in the matrix's order. An index out of range, which only a damaged model folder holds, reads the
// last input and nothing beyond it.
template <class M>
inline void rearrange(const M& m, bool few, const float* x, float* result) {
    const int32_t* order = m.order;
    auto input = [&](int64_t column) {
        return x[order ? std::min<uint32_t>((uint32_t)order[column], (uint32_t)m.k - 1) : column];
    };
    if (few && m.shuffled())
        for (int64_t step = 0; step < m.k; step += kShuffle)
            for (int i = 0; i < kShuffle; i++) result[step + i] = input(step + shuffled_input(i));
    else
        for (int64_t i = 0; i < m.k; i++) result[i] = input(i);
}

}  // namespace moss
