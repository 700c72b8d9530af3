// The two ends of a pass: the embedding's rows, and the final norm with the head's product.
#pragma once

#include "gemm.h"

namespace moss {

inline void run_embed(const int32_t* ids, int64_t tokens, const uint16_t* table, int64_t width, float* result) {
    for (int64_t t = 0; t < tokens; t++)
        for_lanes(width, [&](int64_t i, int n) {
            store_n(result + t * width + i, load_half_n(table + ids[t] * width + i, n), n);
        });
}

struct Head {
    const float* h;                           // (R, C)
    const uint16_t *norm_weight, *norm_bias;  // (C,)
    Dense weight;                             // (V, C)
    const uint16_t* bias;                     // (V,)
    float *normed, *logits;                   // (R, C), (R, V)
    int64_t rows;
    float epsilon;
};

inline void run_head(const Head& a) {
    struct Rows;
    const int64_t width = a.weight.k, vocab = a.weight.n, size = chunk_rows(a.weight.row_bytes(), a.rows);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a.rows; r++)
            layer_norm(a.h + r * width, a.norm_weight, a.norm_bias, a.epsilon, width, a.normed + r * width);
        float* y = scratch<Rows>(size * a.rows);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < vocab; first += size) {
            const int64_t end = std::min(vocab, first + size);
            product(a.weight, first, end, a.normed, width, a.rows, y, size, false);
            for (int64_t r = 0; r < a.rows; r++)
                for_lanes(end - first, [&](int64_t i, int n) {
                    const F logit = Simd::add(load_n(y + r * size + i, n), load_half_n(a.bias + first + i, n));
                    store_n(a.logits + r * vocab + first + i, logit, n);
                });
        }
    }
}

}  // namespace moss
