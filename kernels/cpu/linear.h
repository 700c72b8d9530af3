// Products of a matrix with a few tokens: each weight is read from memory once, and widened once per few tokens.
//
// Every (row, token) has one accumulator that takes its terms in the order of k, and one reduction at the end, in all
// variants below. So the number of tokens in a pass changes no bit of any token's result.
#pragma once

#include "packed_few.h"

namespace moss {

// y[t * ldy + r * gap] (+)= rows[r] . x[t] for kRows rows and kTokens tokens, each weight widened to a float.
template <class Row, class M, int kRows, int kTokens>
inline void float_block(const M& m, const int64_t* rows, const float* x, int64_t ldx, float* y, int64_t ldy,
                        int64_t gap, bool add) {
    Row row[kRows];
    F sum[kRows][kTokens];
    MOSS_UNROLL
    for (int r = 0; r < kRows; r++) {
        row[r].start(m, rows[r]);
        MOSS_UNROLL
        for (int t = 0; t < kTokens; t++) sum[r][t] = Simd::zero();
    }
    const int64_t size = m.group_size();
    for (int64_t begin = 0, g = 0; begin < m.k; begin += size, g++) {
        if (g % kLanes == 0)
            MOSS_UNROLL
            for (int r = 0; r < kRows; r++) row[r].prepare(g);
        MOSS_UNROLL
        for (int r = 0; r < kRows; r++) row[r].group(g);
        int64_t at = begin;
        for (; at + Row::kStep <= begin + size; at += Row::kStep) {
            MOSS_UNROLL
            for (int r = 0; r < kRows; r++) row[r].step(at);
            MOSS_UNROLL
            for (int v = 0; v < Row::kVectors; v++) {
                F inputs[kTokens];
                MOSS_UNROLL
                for (int t = 0; t < kTokens; t++) {
                    inputs[t] = Simd::load(x + t * ldx + at + v * kLanes);
                    if (kTokens > 1) Simd::in_register(inputs[t]);
                }
                MOSS_UNROLL
                for (int r = 0; r < kRows; r++) {
                    const F w = row[r].weights(v);
                    MOSS_UNROLL
                    for (int t = 0; t < kTokens; t++) sum[r][t] = Simd::fma(w, inputs[t], sum[r][t]);
                }
            }
        }
        if constexpr (Row::kPartial)
            for_lanes(begin + size - at, [&](int64_t i, int n) {
                MOSS_UNROLL
                for (int r = 0; r < kRows; r++) {
                    const F w = row[r].partial(at + i, n);
                    MOSS_UNROLL
                    for (int t = 0; t < kTokens; t++)
                        sum[r][t] = Simd::fma(w, load_n(x + t * ldx + at + i, n), sum[r][t]);
                }
            });
    }
    MOSS_UNROLL
    for (int r = 0; r < kRows; r++)
        MOSS_UNROLL
        for (int t = 0; t < kTokens; t++) {
            float& result = y[t * ldy + r * gap];
            result = (add ? result : 0.0f) + Simd::sum(sum[r][t]);
        }
}

template <class Row, class M, int kRows, int kTokens>
inline void product_block(const M& m, const int64_t* rows, const float* x, int64_t ldx, float* y, int64_t ldy,
                          int64_t gap, bool add) {
#if MOSS_SIMD > 0
    if constexpr (Row::kInDigits) digit_block<Row, M, kRows, kTokens>(m, rows, x, ldx, y, ldy, gap, add);
    else
#endif
        float_block<Row, M, kRows, kTokens>(m, rows, x, ldx, y, ldy, gap, add);
}

// Sums that stay in registers where there are several tokens: rows times tokens. Taking fields apart is for all tokens, so that
// more of these pay where registers are few.
template <class Row>
struct AtOnce {
    static constexpr bool kMany = Simd::kRegisters >= 32;
    static constexpr int kRows = Row::kInDigits && !kMany ? 2 : 4, kTokens = Row::kInDigits || kMany ? 4 : 2;
    // Of many tokens: four at once are the quickest only while the weights come from memory.
    static constexpr int kOfMany = Row::kInDigits && kMany ? kStayingTokens : kTokens;
};

// The next `now` of up to kTokens tokens.
template <class Row, int kRows, int kTokens, class M>
inline void product_next(const M& m, const int64_t* rows, const float* x, int64_t ldx, int64_t now, float* y, int64_t ldy,
                         int64_t gap, bool add) {
    if (now == kTokens) return product_block<Row, M, kRows, kTokens>(m, rows, x, ldx, y, ldy, gap, add);
    if constexpr (kTokens > 1) product_next<Row, kRows, kTokens - 1>(m, rows, x, ldx, now, y, ldy, gap, add);
}

template <class Row, int kRows, class M>
inline void product_tokens(const M& m, const int64_t* rows, const float* x, int64_t ldx, int64_t tokens, float* y,
                           int64_t ldy, int64_t gap, bool add) {
    constexpr int kMost = AtOnce<Row>::kTokens, kOfMany = AtOnce<Row>::kOfMany;
    while (tokens > 0) {
        // A single last token costs nearly as much as two: five go as three and two.
        const int64_t now = tokens <= kMost ? tokens : tokens == kMost + 1 && kMost > 2 ? kMost - 1 : kOfMany;
        product_next<Row, kRows, kMost>(m, rows, x, ldx, now, y, ldy, gap, add);
        x += now * ldx;
        y += now * ldy;
        tokens -= now;
    }
}

// kRows streams at once, each walking through `length` rows that follow one another in memory: several far-apart
// sequential streams are what brings one core to its share of the memory's bandwidth.
template <class Row, int kRows, class M>
inline int64_t product_streams(const M& m, int64_t first, int64_t end, const float* x, int64_t ldx, int64_t tokens,
                               float* y, int64_t ldy, bool add) {
    const int64_t length = (end - first) / kRows;
    for (int r = 0; r < kRows; r++) m.prefetch_scales(first + r * length, length);
    for (int64_t i = 0; i < length; i++) {
        int64_t rows[kRows];
        for (int r = 0; r < kRows; r++) rows[r] = first + r * length + i;
        product_tokens<Row, kRows>(m, rows, x, ldx, tokens, y + i, ldy, length, add);
    }
    return first + length * kRows;
}

template <class Row, class M>
inline void product_rows(const M& m, int64_t first, int64_t end, const float* x, int64_t ldx, int64_t tokens, float* y,
                         int64_t ldy, bool add) {
    int64_t done;
    if (tokens == 1) done = product_streams<Row, Row::kStreams>(m, first, end, x, ldx, 1, y, ldy, add);
    else done = product_streams<Row, AtOnce<Row>::kRows>(m, first, end, x, ldx, tokens, y, ldy, add);
    product_streams<Row, 1>(m, done, end, x, ldx, tokens, y + (done - first), ldy, add);
}

// y[t * ldy + (n - first)] (+)= row n . x[t] for the rows first <= n < end; x as arrange() (gemm.h) leaves it.
template <class M>
inline void product_few(const M& m, int64_t first, int64_t end, const float* x, int64_t ldx, int64_t tokens, float* y,
                        int64_t ldy, bool add) {
    if (m.arranged()) product_rows<typename M::FewRow>(m, first, end, x, ldx, tokens, y, ldy, add);
    else product_rows<typename M::Row>(m, first, end, x, ldx, tokens, y, ldy, add);
}

}  // namespace moss
