// Weight matrices as the kernels read them: (n, k) row-major, widened to float in registers, kStep inputs at a time.
//
// A matrix type M offers
//   M::Row          one row's reader: start(matrix, row), group(g) before the first input of each group, then
//                   load(k, w), which gives kStep weights as vectors and prefetches what comes later in memory
//   M::kStep, M::kVectors
//   M::kPartial     whether a group may end within a step; then load_partial(k, count) gives one short vector
//   group_size()    how many inputs share one call of group(); row_bytes(), to size chunks of work
//   order           which input belongs to column k, or nullptr
#pragma once

#include "elementwise.h"

namespace moss {

constexpr int kPrefetchBytes = 512;

inline void prefetch(const void* p) { __builtin_prefetch((const char*)p + kPrefetchBytes, 0, 3); }

struct Dense {
    const uint16_t* weight;  // float16
    int64_t n, k;
    static constexpr const int32_t* order = nullptr;
    static constexpr int kStep = 32, kVectors = kStep / kLanes;
    static constexpr bool kPartial = true;

    int64_t group_size() const { return k; }
    int64_t row_bytes() const { return k * 2; }

    struct Row {
        const uint16_t* p;
        void start(const Dense& m, int64_t row) { p = m.weight + row * m.k; }
        void group(int64_t) {}
        void load(int64_t at, F* w) const {
            prefetch(p + at);
            for (int v = 0; v < kVectors; v++) w[v] = Simd::load_half(p + at + v * kLanes);
        }
        F load_partial(int64_t at, int count) const { return load_half_n(p + at, count); }
    };
};

}  // namespace moss
