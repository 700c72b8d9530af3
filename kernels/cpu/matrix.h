// Weight matrices as the kernels read them: (n, k) row-major, widened to float in registers.
//
// A matrix type M has its sizes n, k, group_size() (inputs between two changes of scale), row_bytes(), and
//   order      which input belongs to column k, or nullptr
//   prefetch_scales(row, rows)   what reading these rows one after another does not prefetch itself
//   M::Row     reads one row: start(matrix, row), prepare(g) at every kLanes-th group, group(g) at the first input of each
//              group, then step(k) for every kStep inputs, which prefetches what comes later in memory, and
//              weights(v) for the kVectors vectors of the step
//   Row::kPartial   whether a group may end within a step; then partial(k, count) gives one short vector
//   Row::kStreams   rows to read at once for a single token
//   M::FewRow  for passes over few tokens, if arranged(): the same, or a row in digits (see packed_few.h); its inputs are
//              what FewRow::arrange(matrix, x, result) makes of a token's
//   M::kInWords   whether whole pages are multiplied as integers (see packed_whole.h)
#pragma once

#include <algorithm>

#include "elementwise.h"

namespace moss {

// How far ahead, and into the second cache: a core waits for fewer lines at once in its first one than the memory can bring.
constexpr int kPrefetchBytes = 2048;

// Of `bytes` that are read from p on, those that prefetch() comes too late for.
inline void prefetch_start(const void* p, int64_t bytes) {
    for (int64_t at = 0; at < std::min<int64_t>(bytes, kPrefetchBytes); at += 64)
        __builtin_prefetch((const char*)p + at, 0, 2);
}

inline void prefetch(const void* p) { __builtin_prefetch((const char*)p + kPrefetchBytes, 0, 2); }

// Reads numbers one after another, some of which are addresses.
struct Numbers {
    const int64_t* next;
    int64_t number() { return *next++; }
    template <class T>
    const T* address() {
        return (const T*)number();
    }
};

struct Dense {
    const uint16_t* weight;  // float16
    int64_t n, k;
    void read(Numbers& numbers) {
        weight = numbers.address<uint16_t>();
        n = numbers.number();
        k = numbers.number();
    }
    static constexpr const int32_t* order = nullptr;

    int64_t group_size() const { return k; }
    int64_t row_bytes() const { return k * 2; }
    static constexpr bool kArranges = false, kInWords = false;
    static constexpr bool arranged() { return false; }
    void prefetch_scales(int64_t, int64_t) const {}

    struct Row {
        static constexpr bool kInDigits = false;
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

// What a matrix multiplies with its column. An index out of range, which only a damaged model folder holds, reads the last
// input and nothing beyond it.
template <class M>
inline float input_of(const M& m, const float* x, int64_t column) {
    return x[m.order ? std::min<uint32_t>((uint32_t)m.order[column], (uint32_t)m.k - 1) : column];
}

// The inputs of `count` columns from `first` on.
template <class M>
inline void copy_inputs(const M& m, const float* x, int64_t first, int64_t count, float* result) {
    if (!m.order) std::memcpy(result, x + first, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; i++) result[i] = input_of(m, x, first + i);
}

}  // namespace moss
