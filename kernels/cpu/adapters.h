// What low-rank adapters add to a block's products: (x A^T) B^T, for each token by the adapter that it has, if any.
//
// Each token's sums have an order of their own, so that who shares the pass, and with which adapter, changes no bit.
#pragma once

#include "elementwise.h"
#include "queue.h"

namespace moss {

enum Target { kQkv, kOutProj, kFcIn, kFcOut, kTargets };  // in the order of moss_jt.store.architecture

// One adapter's matrices for a target; rank 0 for none.
struct LowRank {
    const float *a, *b;  // (rank, K); (rank, N), B transposed and scaled
    int64_t rank;
};

struct Adapters {
    const float* bank;         // all matrices of all adapters
    const int32_t* directory;  // (adapters, kTargets, 3) of this block: where A and B begin, in MOSS_BANK_UNIT floats; rank
    const int32_t* of_token;   // (T,): the number of each token's adapter, or -1
    int64_t most_rank;         // of all of them; 0: no token of the pass has any

    LowRank of(int64_t token, Target target) const {
        if (of_token[token] < 0) return {nullptr, nullptr, 0};
        const int32_t* entry = directory + (of_token[token] * kTargets + target) * 3;
        return {bank + (int64_t)entry[0] * MOSS_BANK_UNIT, bank + (int64_t)entry[1] * MOSS_BANK_UNIT, entry[2]};
    }
};

inline float dot(const float* a, const float* b, int64_t count) {
    F sum = Simd::zero();
    for_lanes(count, [&](int64_t i, int n) { sum = Simd::fma(load_n(a + i, n), load_n(b + i, n), sum); });
    return Simd::sum(sum);
}

// low (T, most_rank) = x A^T of x (T, K). The threads share it, and wait for each other in the end.
inline void to_low_rank(const Adapters& adapters, Target target, const float* x, int64_t tokens, int64_t inputs, float* low) {
    const int64_t most = adapters.most_rank;
    if (!most) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * most; i++) {
        const LowRank own = adapters.of(i / most, target);
        if (i % most < own.rank) low[i] = dot(own.a + i % most * inputs, x + i / most * inputs, inputs);
    }
}

// y[t * ld + (n - first)] += low[t] B^T for the rows first <= n < end of a matrix of so many outputs.
inline void add_low_rank(const Adapters& adapters, Target target, const float* low, int64_t tokens, int64_t outputs, Rows rows,
                         float* y, int64_t ld) {
    if (!adapters.most_rank) return;
    for (int64_t t = 0; t < tokens; t++) {
        const LowRank own = adapters.of(t, target);
        for (int64_t r = 0; r < own.rank; r++) {
            const F factor = Simd::set1(low[t * adapters.most_rank + r]);
            const float* b = own.b + r * outputs + rows.first;
            for_lanes(rows.end - rows.first, [&](int64_t i, int n) {
                float* sum = y + t * ld + i;
                store_n(sum, Simd::fma(factor, load_n(b + i, n), load_n(sum, n)), n);
            });
        }
    }
}

}  // namespace moss
