// Products of float32 matrices: oneDNN's where Jittor has it, and plain loops elsewhere.
#pragma once

#include "gemm.h"

namespace moss {

// c (m, n), row i at c + i * ldc, is alpha times a (m, k) b (k, n), added to what is there when `add`; ta: a is given as its
// transpose (k, m), and tb likewise. One thread's work.
inline void multiply(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                     const float* b, int64_t ldb, bool add, float* c, int64_t ldc) {
#ifdef MOSS_ONEDNN
    dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, k, alpha, a, lda, b, ldb, add ? 1.0f : 0.0f, c, ldc);
#else
    for (int64_t i = 0; i < m; i++) {
        float* row = c + i * ldc;
        if (!add) std::fill(row, row + n, 0.0f);
        if (tb) {
            for (int64_t j = 0; j < n; j++) {
                float sum = 0;
                for (int64_t p = 0; p < k; p++) sum += (ta ? a[p * lda + i] : a[i * lda + p]) * b[j * ldb + p];
                row[j] += alpha * sum;
            }
        } else {
            for (int64_t p = 0; p < k; p++) {
                const float factor = alpha * (ta ? a[p * lda + i] : a[i * lda + p]);
                for (int64_t j = 0; j < n; j++) row[j] += factor * b[p * ldb + j];
            }
        }
    }
#endif
}

}  // namespace moss
