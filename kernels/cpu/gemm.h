// Products with many tokens: tiles of the matrix are widened to float32 in the cache and given to oneDNN's sgemm.
#pragma once

#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "linear.h"
#include "queue.h"

#ifdef MOSS_ONEDNN
extern "C" int dnnl_sgemm(char transa, char transb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
#endif

namespace moss {

constexpr int64_t kGemmTokens = MOSS_GEMM_TOKENS;  // from here on sgemm is ahead
constexpr int64_t kTileRows = MOSS_TILE_ROWS, kTileInputs = MOSS_TILE_INPUTS;

// What a thread has scratch memory for: the rows that it works on, and beside them keys, values and scores, or a tile.
struct Results;
struct Widened;

// Memory that grows and stays, so that no pass pays for fresh pages. A mapping of its own: malloc has an arena for each
// thread, and there every growth would leave a hole that nothing fits into.
class Growing {
  public:
    ~Growing() { release(); }
    float* floats(size_t count) {
        const size_t bytes = count * sizeof(float);
        if (bytes > bytes_) {
            release();
            memory_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory_ == MAP_FAILED) std::abort();
            bytes_ = bytes;
        }
        return (float*)memory_;
    }

  private:
    void release() {
        if (bytes_ > 0) munmap(memory_, bytes_);
        bytes_ = 0;
    }
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

// Scratch memory of one thread; kernels/needs.py counts it.
template <class Tag>
inline float* scratch(size_t count) {
    static thread_local Growing memory;
    return memory.floats(count);
}

// The next multiple of 64 bytes: inputs that straddle cache lines halve the speed of products with several tokens.
inline float* aligned(float* p) { return (float*)(((uintptr_t)p + 63) / 64 * 64); }

#ifdef MOSS_ONEDNN

// a (m, k) times the transpose of b (n, k), or times b (k, n): c (m, n), added to c when `add`.
inline void sgemm(bool transposed_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, bool add, float* c, int64_t ldc) {
    dnnl_sgemm('N', transposed_b ? 'T' : 'N', m, n, k, 1.0f, a, lda, b, ldb, add ? 1.0f : 0.0f, c, ldc);
}

// What oneDNN has freed stays in malloc's arenas, one per thread, in parts that its next buffers do not fit into: without
// this the arenas grow to many times what is ever used at once.
inline void give_back() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

template <class M>
inline void widen(const M& m, int64_t row_index, int64_t begin, int64_t end, float* result) {
    using Row = typename M::Row;
    Row row;
    row.start(m, row_index);
    const int64_t size = m.group_size();
    while (begin < end) {
        const int64_t stop = std::min(end, (begin / size + 1) * size);
        row.prepare(begin / size / kLanes * kLanes);
        row.group(begin / size);
        int64_t at = begin;
        for (; at + Row::kStep <= stop; at += Row::kStep, result += Row::kStep) {
            row.step(at);
            MOSS_UNROLL
            for (int v = 0; v < Row::kVectors; v++) Simd::store(result + v * kLanes, row.weights(v));
        }
        if constexpr (Row::kPartial) {
            for_lanes(stop - at, [&](int64_t i, int n) { store_n(result + i, row.partial(at + i, n), n); });
            result += stop - at;
        }
        begin = stop;
    }
}

template <class M>
inline void product_tiled(const M& m, int64_t first, int64_t end, const float* x, int64_t ldx, int64_t tokens,
                          float* y, int64_t ldy, bool add) {
    float* tile = scratch<Widened>(kTileRows * kTileInputs);
    for (int64_t n = first; n < end; n += kTileRows) {
        const int64_t rows = std::min(kTileRows, end - n);
        for (int64_t k = 0; k < m.k; k += kTileInputs) {
            const int64_t inputs = std::min(kTileInputs, m.k - k);
            for (int64_t r = 0; r < rows; r++) widen(m, n + r, k, k + inputs, tile + r * inputs);
            sgemm(true, tokens, rows, inputs, x + k, ldx, tile, inputs, add || k > 0, y + (n - first), ldy);
        }
    }
}

inline bool many(int64_t tokens) { return tokens >= kGemmTokens; }

#else

inline bool many(int64_t) { return false; }

#endif

// y[t * ldy + (n - first)] (+)= row n . x[t] for the rows first <= n < end.
template <class M>
inline void product(const M& m, int64_t first, int64_t end, const float* x, int64_t ldx, int64_t tokens, float* y,
                    int64_t ldy, bool add) {
#ifdef MOSS_ONEDNN
    if (many(tokens)) return product_tiled(m, first, end, x, ldx, tokens, y, ldy, add);
#endif
    product_few(m, first, end, x, ldx, tokens, y, ldy, add);
}

// Work for all threads: rows of a product with this many bytes in each, in pieces that suit the pass.
inline RowQueue row_queue(int64_t rows, int64_t row_bytes, int64_t tokens) {
    if (many(tokens)) return RowQueue(rows, 1, kTileRows, kTileRows);
    return RowQueue(rows, row_bytes, MOSS_LEAST_TAKEN, MOSS_MOST_TAKEN);
}

}  // namespace moss
