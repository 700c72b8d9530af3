// The end of a pass: the final norm with the head's product.
#pragma once

#include "gemm.h"
#include "python_lock.h"

namespace moss {

struct Head {
    const float* h;                           // (R, C)
    const uint16_t *norm_weight, *norm_bias;  // (C,)
    Dense weight;                             // (V, C)
    const uint16_t* bias;                     // (V,)
    float *workspace, *logits;                // (R, C) and what aligning it takes, (R, V)
    int64_t rows, whole;
    float epsilon;
};

inline void run_head(const Head& a) {
    const int64_t width = a.weight.k, vocab = a.weight.n;
    float* normed = aligned(a.workspace);
    const Pass pass(a.rows, a.whole);
    const Inputs x{{normed, width}, {normed, width}, rows_of_gemm<Dense>(width, pass)};
    RowQueue queue = row_queue(vocab, a.weight.row_bytes(), pass);
    const int64_t ld = queue.most_rows();
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a.rows; r++)
            layer_norm(a.h + r * width, a.norm_weight, a.norm_bias, a.epsilon, width, normed + r * width);
        float* y = scratch<Results>(ld * a.rows);
        for (Rows rows = queue.take(); rows.first < rows.end; rows = queue.take()) {
            product(a.weight, rows.first, rows.end, x, pass, y, ld, false);
            for (int64_t r = 0; r < a.rows; r++)
                for_lanes(rows.end - rows.first, [&](int64_t i, int n) {
                    const F logit = Simd::add(load_n(y + r * ld + i, n), load_half_n(a.bias + rows.first + i, n));
                    store_n(a.logits + r * vocab + rows.first + i, logit, n);
                });
        }
    }
}

}  // namespace moss
