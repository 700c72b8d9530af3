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
    float *workspace, *logits;                // (R, C) with room to align it, (R, V)
    int64_t rows;
    float epsilon;
};

inline void run_head(const Head& a) {
    const int64_t width = a.weight.k, vocab = a.weight.n;
    float* normed = aligned(a.workspace);
    RowQueue queue = row_queue(vocab, a.weight.row_bytes(), a.rows);
    const int64_t ld = queue.most_rows();
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a.rows; r++)
            layer_norm(a.h + r * width, a.norm_weight, a.norm_bias, a.epsilon, width, normed + r * width);
        float* y = scratch<Results>(ld * a.rows);
        for (Rows rows = queue.take(); rows.first < rows.end; rows = queue.take()) {
            product(a.weight, rows.first, rows.end, normed, width, a.rows, y, ld, false);
            for (int64_t r = 0; r < a.rows; r++)
                for_lanes(rows.end - rows.first, [&](int64_t i, int n) {
                    const F logit = Simd::add(load_n(y + r * ld + i, n), load_half_n(a.bias + rows.first + i, n));
                    store_n(a.logits + r * vocab + rows.first + i, logit, n);
                });
        }
    }
}

}  // namespace moss
