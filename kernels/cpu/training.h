// What training needs beside a pass: products with a matrix both ways, attention, layer norm and GELU with their derivatives.
//
// Every result is added up in an order that follows from the sizes alone, so that the number of threads changes no bit.
#pragma once

#include "lost_file.h"
#include "packed.h"
#include "float_products.h"

namespace moss {

// Of a product at once: tokens, and rows of a matrix that are widened for its transpose. Queries of one head at once.
constexpr int64_t kTrainTokens = MOSS_TRAIN_TOKENS, kBackRows = MOSS_BACK_ROWS, kQueries = MOSS_QUERIES;
// Tiles of a product of float32 matrices; where there are fewer than kFewTiles, tiles of a sixteenth: a gradient of a small
// model's matrix is small, and many tokens deep.
constexpr int64_t kProductRows = MOSS_TRAIN_ROWS, kProductColumns = MOSS_TRAIN_COLUMNS, kFewTiles = MOSS_FEW_TILES;

// Columns of a matrix that one task takes of its transpose's product: small matrices give every thread something.
inline int64_t back_inputs(int64_t k) { return k <= 1024 ? 128 : kTileRows * kTileInputs / kBackRows; }

struct Tokens {
    int64_t first, count;
};

inline int64_t chunks(int64_t total, int64_t size) { return (total + size - 1) / size; }

inline Tokens chunk(int64_t index, int64_t total, int64_t size) {
    return {index * size, std::min(size, total - index * size)};
}

// x (T, K) in a matrix's own order of inputs: x itself, or a copy in `own`.
template <class M>
inline const float* in_order(const M& m, const float* x, int64_t tokens, float* own) {
    if (!m.order) return x;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < m.k; i++) own[t * m.k + i] = input_of(m, x + t * m.k, i);
    return own;
}

// y (T, N) = x (T, K) W^T
template <class M>
inline void train_product(const M& m, const float* x, int64_t tokens, float* own, float* y) {
    x = in_order(m, x, tokens, own);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t c = 0; c < chunks(tokens, kTrainTokens); c++)
        for (int64_t n = 0; n < m.n; n += kTileRows) {
            const Tokens now = chunk(c, tokens, kTrainTokens);
            const int64_t rows = std::min(kTileRows, m.n - n);
            float* tile = scratch<Widened>(kTileRows * (kTileInputs + kGap));
            for (int64_t k = 0; k < m.k; k += kTileInputs) {
                const int64_t inputs = std::min(kTileInputs, m.k - k), ld = inputs + kGap;
                for (int64_t r = 0; r < rows; r++) widen(m, n + r, k, k + inputs, tile + r * ld);
                multiply(false, true, now.count, rows, inputs, 1.0f, x + now.first * m.k + k, m.k, tile, ld, k > 0,
                         y + now.first * m.n + n, m.n);
            }
        }
}

// x (T, K) = g (T, N) W, by way of `own` (T, K) where the matrix has an order of its own.
template <class M>
inline void train_product_back(const M& m, const float* g, int64_t tokens, float* own, float* x) {
    float* packed = m.order ? own : x;
    const int64_t width = back_inputs(m.k);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t c = 0; c < chunks(tokens, kTrainTokens); c++)
        for (int64_t k = 0; k < m.k; k += width) {
            const Tokens now = chunk(c, tokens, kTrainTokens);
            const int64_t inputs = std::min(width, m.k - k);
            float* tile = scratch<Widened>(kBackRows * inputs);
            for (int64_t n = 0; n < m.n; n += kBackRows) {
                const int64_t rows = std::min(kBackRows, m.n - n);
                for (int64_t r = 0; r < rows; r++) widen(m, n + r, k, k + inputs, tile + r * inputs);
                multiply(false, false, now.count, inputs, rows, 1.0f, g + now.first * m.n + n, m.n, tile, inputs, n > 0,
                         packed + now.first * m.k + k, m.k);
            }
        }
    if (!m.order) return;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        std::fill(x + t * m.k, x + (t + 1) * m.k, 0.0f);
        for (int64_t i = 0; i < m.k; i++)
            x[t * m.k + std::min<uint32_t>((uint32_t)m.order[i], (uint32_t)m.k - 1)] += packed[t * m.k + i];
    }
}

// result (m, n) = plus (m, n, or nullptr for none) + alpha a (m, k) b (k, n), each perhaps given as its transpose.
inline void train_multiply(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a, const float* b,
                           const float* plus, float* result) {
    const int64_t part = chunks(m, kProductRows) * chunks(n, kProductColumns) < kFewTiles ? 4 : 1;
    const int64_t size_m = kProductRows / part, size_n = kProductColumns / part;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < m; i += size_m)
        for (int64_t j = 0; j < n; j += size_n) {
            const int64_t rows = std::min(size_m, m - i), columns = std::min(size_n, n - j);
            if (plus)
                for (int64_t r = i; r < i + rows; r++)
                    std::copy(plus + r * n + j, plus + r * n + j + columns, result + r * n + j);
            multiply(ta, tb, rows, columns, k, alpha, ta ? a + i : a + i * k, ta ? m : k, tb ? b + j * k : b + j,
                     tb ? k : n, plus != nullptr, result + i * n + j, n);
        }
}

// h (T, C) -> (h - mean) / sqrt(variance + epsilon) * weight + bias
template <class V>
inline void train_norm(const float* h, const V* weight, const V* bias, float epsilon, int64_t tokens, int64_t width,
                       float* result) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        layer_norm(h + t * width, weight, bias, epsilon, width, result + t * width);
}

// What layer norm's result depends on, back to h; normed (T, C) becomes (h - mean) / sqrt(variance + epsilon), which the
// gradients of weight and bias are made of.
template <class V>
inline void train_norm_back(const float* g, const float* h, const V* weight, float epsilon, int64_t tokens, int64_t width,
                            float* result, float* normed) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float *g_row = g + t * width, *row = h + t * width;
        float *x = normed + t * width, *out = result + t * width;
        double mean = 0, variance = 0, sum = 0, along = 0;
        for (int64_t i = 0; i < width; i++) mean += row[i];
        mean /= width;
        for (int64_t i = 0; i < width; i++) variance += (row[i] - mean) * (row[i] - mean);
        const double factor = 1 / std::sqrt(variance / width + epsilon);
        for_lanes(width, [&](int64_t i, int n) {
            store_n(out + i, Simd::mul(load_n(g_row + i, n), load_wide_n(weight + i, n)), n);
        });
        for (int64_t i = 0; i < width; i++) {
            x[i] = (float)((row[i] - mean) * factor);
            sum += out[i];
            along += (double)out[i] * x[i];
        }
        const float mean_g = (float)(sum / width), mean_along = (float)(along / width), scale = (float)factor;
        for (int64_t i = 0; i < width; i++) out[i] = scale * (out[i] - mean_g - x[i] * mean_along);
    }
}

// gelu(y + bias), and its derivative there times g.
template <class V>
inline void train_gelu(const float* y, const V* bias, int64_t tokens, int64_t width, float* result) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) gelu_row(y + t * width, bias, width, result + t * width);
}

template <class V>
inline void train_gelu_back(const float* g, const float* y, const V* bias, int64_t tokens, int64_t width, float* result) {
    const F one = Simd::set1(1.0f), two = Simd::set1(2.0f), factor = Simd::set1(0.79788456f);
    const F cubic = Simd::set1(0.044715f), thrice = Simd::set1(3 * 0.044715f);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for_lanes(width, [&](int64_t i, int n) {
            const F x = Simd::add(load_n(y + t * width + i, n), load_wide_n(bias + i, n)), square = Simd::mul(x, x);
            const F u = Simd::mul(factor, Simd::mul(x, Simd::fma(square, cubic, one)));
            // s = (1 + tanh u) / 2; d(x s) = s + x * 2 s (1 - s) * du
            const F s = Simd::div(one, Simd::add(one, exp(Simd::mul(u, Simd::set1(-2.0f)))));
            const F du = Simd::mul(factor, Simd::fma(square, thrice, one));
            const F slope = Simd::fma(Simd::mul(x, Simd::mul(two, Simd::mul(s, Simd::sub(one, s)))), du, s);
            store_n(result + t * width + i, Simd::mul(load_n(g + t * width + i, n), slope), n);
        });
}

// Samples that lie one after another, each attending to itself alone.
struct Spans {
    const int32_t* spans;  // (S, 2): first row, rows
    int64_t count;
};

// One head of one sample.
struct HeadOfSpan {
    int64_t first, tokens, column;
};

struct TrainAttention {
    const float* qkv;  // (T, 3 C): queries, keys, values, each head-major
    const float* rotary;  // (positions, 2, pairs)
    Spans spans;
    int64_t tokens, heads, head_dim, pairs;
    float* turned;  // (T, 2 C): queries and keys, rotated

    int64_t width() const { return heads * head_dim; }
    float scale() const { return 1.0f / std::sqrt((float)head_dim); }
    HeadOfSpan head(int64_t span, int64_t head) const {
        return {spans.spans[2 * span], spans.spans[2 * span + 1], head * head_dim};
    }
};

// Queries and keys of all tokens turned by their positions within their samples; backwards with the angles' negatives.
inline void turn(const TrainAttention& a, const float* from, int64_t from_stride, float* to, int64_t to_stride, bool back) {
    const int64_t width = a.width();
    for (int64_t span = 0; span < a.spans.count; span++) {
        const int64_t first = a.spans.spans[2 * span], count = a.spans.spans[2 * span + 1];
#pragma omp parallel for schedule(static)
        for (int64_t position = 0; position < count; position++) {
            const float *cosines = a.rotary + position * 2 * a.pairs, *sines = cosines + a.pairs;
            const float* x = from + (first + position) * from_stride;
            float* y = to + (first + position) * to_stride;
            if (x != y) std::copy(x, x + 2 * width, y);
            for (int64_t head = 0; head < 2 * a.heads; head++)
                for (int64_t pair = 0; pair < a.pairs; pair++) {
                    float* p = y + head * a.head_dim + 2 * pair;
                    const float even = p[0], odd = p[1], sine = back ? -sines[pair] : sines[pair];
                    p[0] = even * cosines[pair] - odd * sine;
                    p[1] = odd * cosines[pair] + even * sine;
                }
        }
    }
}

inline void softmax_row(float* row, int64_t count) {
    F most = Simd::set1(row[0]), sum = Simd::zero();
    const int64_t full = count / kLanes * kLanes;
    for (int64_t j = 0; j < full; j += kLanes) most = Simd::max(most, Simd::load(row + j));
    float largest = Simd::largest(most), total = 0;
    for (int64_t j = full; j < count; j++) largest = std::max(largest, row[j]);
    most = Simd::set1(largest);
    for (int64_t j = 0; j < full; j += kLanes) {
        const F power = exp(Simd::sub(Simd::load(row + j), most));
        Simd::store(row + j, power);
        sum = Simd::add(sum, power);
    }
    for (int64_t j = full; j < count; j++) total += row[j] = std::exp(row[j] - largest);
    const F share = Simd::set1(1.0f / (total + Simd::sum(sum)));
    for_lanes(count, [&](int64_t j, int n) { store_n(row + j, Simd::mul(load_n(row + j, n), share), n); });
}

// weights (queries, seen) of queries `first` .. of a head's sample, each over itself and what is before it.
inline void softmax_weights(const TrainAttention& a, const HeadOfSpan& h, const Tokens& queries, float* weights) {
    const int64_t seen = queries.first + queries.count, stride = 2 * a.width();
    const float* q = a.turned + (h.first + queries.first) * stride + h.column;
    const float* k = a.turned + h.first * stride + a.width() + h.column;
    multiply(false, true, queries.count, seen, a.head_dim, a.scale(), q, stride, k, stride, false, weights, seen);
    for (int64_t i = 0; i < queries.count; i++) {
        float* row = weights + i * seen;
        const int64_t own = queries.first + i + 1;
        softmax_row(row, own);
        std::fill(row + own, row + seen, 0.0f);
    }
}

template <class Body>
inline void for_heads(const TrainAttention& a, Body body) {
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t span = 0; span < a.spans.count; span++)
        for (int64_t head = 0; head < a.heads; head++) {
            const HeadOfSpan h = a.head(span, head);
            for (int64_t c = 0; c < chunks(h.tokens, kQueries); c++) body(h, chunk(c, h.tokens, kQueries));
        }
}

// result (T, C)
inline void train_attention(const TrainAttention& a, float* result) {
    const int64_t width = a.width();
    turn(a, a.qkv, 3 * width, a.turned, 2 * width, false);
    for_heads(a, [&](const HeadOfSpan& h, const Tokens& queries) {
        const int64_t seen = queries.first + queries.count;
        float* weights = scratch<Results>(kQueries * h.tokens);
        softmax_weights(a, h, queries, weights);
        multiply(false, false, queries.count, a.head_dim, seen, 1.0f, weights, seen,
                 a.qkv + h.first * 3 * width + 2 * width + h.column, 3 * width, false,
                 result + (h.first + queries.first) * width + h.column, width);
    });
}

// g (T, C), what the result depends on -> result (T, 3 C), what qkv does.
inline void train_attention_back(const TrainAttention& a, const float* g, float* result) {
    const int64_t width = a.width(), stride = 3 * width;
    turn(a, a.qkv, stride, a.turned, 2 * width, false);
    std::fill(result, result + a.tokens * stride, 0.0f);
    for_heads(a, [&](const HeadOfSpan& h, const Tokens& queries) {
        const int64_t seen = queries.first + queries.count, first = h.first + queries.first;
        float* weights = scratch<Results>(2 * kQueries * h.tokens);
        float* slopes = weights + kQueries * h.tokens;
        const float* g_rows = g + first * width + h.column;
        softmax_weights(a, h, queries, weights);
        multiply(false, true, queries.count, seen, a.head_dim, 1.0f, g_rows, width,
                 a.qkv + h.first * stride + 2 * width + h.column, stride, false, slopes, seen);
        float* into = result + h.first * stride + h.column;
        multiply(true, false, seen, a.head_dim, queries.count, 1.0f, weights, seen, g_rows, width, true, into + 2 * width,
                 stride);
        for (int64_t i = 0; i < queries.count; i++) {
            const float* row = weights + i * seen;
            float* slope = slopes + i * seen;
            F along = Simd::zero();
            for_lanes(seen, [&](int64_t j, int n) { along = Simd::fma(load_n(row + j, n), load_n(slope + j, n), along); });
            const F less = Simd::set1(Simd::sum(along));
            for_lanes(seen, [&](int64_t j, int n) {
                store_n(slope + j, Simd::mul(load_n(row + j, n), Simd::sub(load_n(slope + j, n), less)), n);
            });
        }
        const float* keys = a.turned + h.first * 2 * width + width + h.column;
        multiply(false, false, queries.count, a.head_dim, seen, a.scale(), slopes, seen, keys, 2 * width, false,
                 into + queries.first * stride, stride);
        multiply(true, false, seen, a.head_dim, queries.count, a.scale(), slopes, seen,
                 a.turned + first * 2 * width + h.column, 2 * width, true, into + width, stride);
    });
    turn(a, result, stride, result, stride, true);
}

}  // namespace moss
