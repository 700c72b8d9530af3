// Products with whole pages of a prompt: tiles of the matrix are widened to float32 in the cache and given to oneDNN's sgemm.
//
// Which way a token takes must not depend on who shares its pass. So it is not the pass that decides, but the token's own
// page: the rows of a pass are `whole` ones, of pages that are computed at once, and after them few ones (linear.h).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "linear.h"
#include "queue.h"
#include "packed_whole.h"

#ifdef MOSS_ONEDNN
extern "C" int dnnl_sgemm(char transa, char transb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
#endif

namespace moss {

constexpr int64_t kTileRows = MOSS_TILE_ROWS, kTileInputs = MOSS_TILE_INPUTS;
// Floats between two rows of what is multiplied: rows that begin a power of two apart share a few lines of the cache.
constexpr int64_t kGap = MOSS_GAP;

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

#if MOSS_SIMD > 0
inline WordScratch& word_scratch() { return *(WordScratch*)scratch<Widened>(sizeof(WordScratch) / sizeof(float)); }
#endif

// The next multiple of 64 bytes: inputs that straddle cache lines halve the speed of products with several tokens.
inline float* aligned(float* p) { return (float*)(((uintptr_t)p + 63) / 64 * 64); }

// Inputs begin .. end of a row, widened to float32, in the matrix's own order.
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

#ifdef MOSS_ONEDNN

// a (m, k) times the transpose of b (n, k), or times b (k, n): c (m, n), added to c when `add`.
inline void sgemm(bool transposed_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                  int64_t ldb, bool add, float* c, int64_t ldc) {
    dnnl_sgemm('N', transposed_b ? 'T' : 'N', m, n, k, 1.0f, a, lda, b, ldb, add ? 1.0f : 0.0f, c, ldc);
}

// Whether sgemm gives a page's rows the same bits alone and among others. It adds in an order that follows the inputs, not
// the rows, as far as its builds are known; so this is tried on each machine, once for each number of inputs.
inline bool rows_alike(int64_t inputs) {
    struct Tried {
        int64_t inputs;
        bool alike;
    };
    static std::vector<Tried> tried;
    for (const Tried& one : tried)
        if (one.inputs == inputs) return one.alike;
    constexpr int64_t kMost = 8 * kPage;
    std::vector<float> x(kMost * inputs), tile(kTileRows * inputs), alone(kMost * kTileRows), among(kMost * kTileRows);
    uint32_t state = 1;
    auto fill = [&](std::vector<float>& values) {
        for (float& value : values) value = (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f;
    };
    fill(x), fill(tile);
    bool alike = true;
#pragma omp parallel
#pragma omp single
    {
        for (int64_t t = 0; t < kMost; t += kPage)
            sgemm(true, kPage, kTileRows, inputs, x.data() + t * inputs, inputs, tile.data(), inputs, false,
                  alone.data() + t * kTileRows, kTileRows);
        for (int64_t pages = 2; pages <= 8; pages += 3) {
            sgemm(true, pages * kPage, kTileRows, inputs, x.data(), inputs, tile.data(), inputs, false, among.data(),
                  kTileRows);
            alike = alike && !std::memcmp(alone.data(), among.data(), pages * kPage * kTileRows * sizeof(float));
        }
    }
    tried.push_back({inputs, alike});
    return alike;
}

// How many whole rows go into one sgemm. To be asked outside of a parallel region.
inline int64_t rows_at_once(int64_t k, int64_t whole) {
    const bool alike = whole <= kPage || ((k < kTileInputs || rows_alike(kTileInputs)) &&
                                          (k % kTileInputs == 0 || rows_alike(k % kTileInputs)));
    return alike ? std::max(whole, kPage) : kPage;
}

template <class M>
inline void product_tiled(const M& m, int64_t first, int64_t end, const float* x, int64_t ldx, int64_t tokens,
                          int64_t at_once, float* y, int64_t ldy, bool add) {
    float* tile = scratch<Widened>(kTileRows * (kTileInputs + kGap));
    for (int64_t n = first; n < end; n += kTileRows) {
        const int64_t rows = std::min(kTileRows, end - n);
        for (int64_t k = 0; k < m.k; k += kTileInputs) {
            const int64_t inputs = std::min(kTileInputs, m.k - k), ld = inputs + kGap;
            for (int64_t r = 0; r < rows; r++) widen(m, n + r, k, k + inputs, tile + r * ld);
            for (int64_t t = 0; t < tokens; t += at_once)
                sgemm(true, std::min(at_once, tokens - t), rows, inputs, x + t * ldx + k, ldx, tile, ld, add || k > 0,
                      y + t * ldy + (n - first), ldy);
        }
    }
}

constexpr bool kHasGemm = true;

#else

constexpr bool kHasGemm = false;

#endif

// The rows of a pass: `whole` ones, and after them few ones.
struct Pass {
    int64_t tokens, whole;

    Pass(int64_t tokens_, int64_t whole_) : tokens(tokens_), whole(kHasGemm ? whole_ : 0) {}
    bool few(int64_t t) const { return t >= whole; }
};

// Inputs of a matrix: a row of ld floats for each token of the pass.
struct InputRows {
    float* x;
    int64_t ld;
};

// One matrix's inputs: where the whole rows lie, and where the few ones.
struct Inputs {
    InputRows whole, few;
    int64_t at_once;  // whole rows that go into one sgemm

    bool apart(const float* plain) const { return whole.x != plain || few.x != plain; }
};

// Token t's inputs of a matrix from its row of `plain`, where it takes them in another form.
template <class M>
inline void arrange(const M& m, const Inputs& x, const Pass& pass, int64_t t, const float* plain) {
    const InputRows& rows = pass.few(t) ? x.few : x.whole;
    if (rows.x == plain) return;
    const float* from = plain + t * m.k;
#if MOSS_SIMD > 0
    if constexpr (M::kInWords)
        if (!pass.few(t)) return write_words(m, from, t % kPage, WordPage(m, span_of(m), rows.x + t / kPage * kPage * rows.ld));
#endif
    float* to = rows.x + t * rows.ld;
    if constexpr (M::kArranges)
        if (pass.few(t) && m.arranged()) return M::FewRow::arrange(m, from, to);
    copy_inputs(m, from, 0, m.k, to);
}

#ifdef MOSS_ONEDNN

template <class M>
inline void product_whole(const M& m, int64_t first, int64_t end, const Inputs& x, int64_t tokens, float* y, int64_t ldy,
                          bool add) {
#if MOSS_SIMD > 0
    if constexpr (M::kInWords)
        return product_words(m, first, end, x.whole.x, x.whole.ld, tokens, y, ldy, add, word_scratch());
    else
#endif
        product_tiled(m, first, end, x.whole.x, x.whole.ld, tokens, x.at_once, y, ldy, add);
}

#endif

// y[t * ldy + (n - first)] (+)= row n . x[t] for the rows first <= n < end.
template <class M>
inline void product(const M& m, int64_t first, int64_t end, const Inputs& x, const Pass& pass, float* y, int64_t ldy,
                    bool add) {
    const int64_t whole = pass.whole;
#ifdef MOSS_ONEDNN
    if (whole) product_whole(m, first, end, x, whole, y, ldy, add);
#endif
    if (whole < pass.tokens)
        product_few(m, first, end, x.few.x + whole * x.few.ld, x.few.ld, pass.tokens - whole, y + whole * ldy, ldy, add);
}

// Work for all threads: rows of a product with this many bytes in each, in chunks that suit the pass.
inline RowQueue row_queue(int64_t rows, int64_t row_bytes, const Pass& pass) {
    if (pass.whole) return RowQueue(rows, 1, kTileRows, kTileRows);
    return RowQueue(rows, row_bytes, MOSS_LEAST_TAKEN, MOSS_MOST_TAKEN);
}

template <class M>
inline int64_t rows_of_gemm(int64_t k, const Pass& pass) {
#ifdef MOSS_ONEDNN
    if constexpr (!M::kInWords) return rows_at_once(k, pass.whole);
#endif
    return kPage;
}

}  // namespace moss
