// Packed matrices times whole pages of a prompt: integer products of inputs written in 16 bits.
//
// A span of inputs, at most 128 that share a group, has one scale s, a 32767th of the largest of them, and an input is the
// word X = round(x / s). Weights are words, too: q - z, of at most 9 bits. So a span's sum of (q - z) * X is exact in 32
// bits, in any order, and what is rounded is
//   the inputs    |x - s X| <= s / 2, that is a 65534th of the span's largest input
//   the result    float32's sum of one term for each span: scale * s * (sum of (q - z) * X)
// A float16 input, which the reference takes, is rounded to a part in 2^12 of itself: for inputs of a kind, several times
// more. A row of the result depends on its own inputs only, whatever the pass.
#pragma once

#include "packed_few.h"

namespace moss {

constexpr int64_t kPage = MOSS_PAGE;  // tokens of a page

#if MOSS_SIMD > 0

constexpr int kWordRows = 2 * kLanes;  // rows of a tile: two vectors of sums for each token
constexpr int kWordTile = 4;           // tokens whose sums are in registers at once
constexpr int kStepInputs = 32;        // groups are multiples of it
constexpr int64_t kWordTokens = 256;   // whose inputs and sums stay in the cache while a thread goes through its rows
constexpr int64_t kSpansAhead = 2;     // where the fields are that are fetched while a span is multiplied

// Inputs of one span: a divisor of the group's.
template <class M>
inline int64_t span_of(const M& m) {
    for (int64_t length = kSpan; length > kStepInputs; length -= kStepInputs)
        if (m.group_size() % length == 0) return length;
    return kStepInputs;
}

// One page's inputs, in the memory of as many floats.
struct WordPage {
    int64_t length;
    int16_t* words;  // (spans, kPage, length); of each four inputs the first, third, second and fourth
    float* scales;   // (spans, kPage)

    template <class M>
    WordPage(const M& m, int64_t length_, const float* memory)
        : length(length_), words((int16_t*)memory), scales((float*)(words + kPage * m.k)) {}
    int16_t* span(int64_t index, int64_t t) const { return words + (index * kPage + t) * length; }
};

// The inputs of a page's token t. Inputs that are not finite make the scale, and so the token's results, NaN.
template <class M>
inline void write_words(const M& m, const float* x, int64_t t, const WordPage& page) {
    constexpr float kMost = 32767.0f;
    float inputs[kSpan];
    for (int64_t span = 0; span < m.k / page.length; span++) {
        copy_inputs(m, x, span * page.length, page.length, inputs);
        const float largest = largest_input(inputs, page.length), scale = std::max(largest / kMost, kLeastScale);
        const F factor = Simd::set1(1.0f / scale);
        int16_t* words = page.span(span, t);
        for (int64_t i = 0; i < page.length; i += kLanes)
            Simd::store_words(words + i, Simd::mul(Simd::load(inputs + i), factor));
        page.scales[span * kPage + t] = largest <= FLT_MAX ? scale : NAN;
    }
}

// Four 32-bit lanes of each of eight rows, `stride` bytes apart: columns[c] has lane c of all of them.
inline void read_columns(const uint8_t* const* rows, int64_t at, __m256i* columns) {
    __m256i both[4];
    MOSS_UNROLL
    for (int r = 0; r < 4; r++) {
        const __m128i low = _mm_loadu_si128((const __m128i*)(rows[r] + at));
        const __m128i high = _mm_loadu_si128((const __m128i*)(rows[r + 4] + at));
        both[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(both[0], both[1]), b = _mm256_unpackhi_epi32(both[0], both[1]);
    const __m256i c = _mm256_unpacklo_epi32(both[2], both[3]), d = _mm256_unpackhi_epi32(both[2], both[3]);
    columns[0] = _mm256_unpacklo_epi64(a, c);
    columns[1] = _mm256_unpackhi_epi64(a, c);
    columns[2] = _mm256_unpacklo_epi64(b, d);
    columns[3] = _mm256_unpackhi_epi64(b, d);
}

inline void store_pair(int32_t* tile, int64_t pair, __m256i fields, __m256i zeros) {
    _mm256_storeu_si256((__m256i*)(tile + pair * kWordRows), _mm256_sub_epi16(fields, zeros));
}

// The weights q - z of kStepInputs inputs of eight rows: (pairs, kWordRows) with two words each, in the order of WordPage.
template <int kBits>
inline void write_step(const uint8_t* const* rows, int64_t at, __m256i zeros, int32_t* tile) {
    __m256i columns[4];
    if constexpr (kBits == 8) {
        const __m256i low = _mm256_set1_epi16(255);
        MOSS_UNROLL
        for (int half = 0; half < 2; half++) {
            read_columns(rows, at + half * 16, columns);
            MOSS_UNROLL
            for (int c = 0; c < 4; c++) {
                store_pair(tile, half * 8 + 2 * c, _mm256_and_si256(columns[c], low), zeros);
                store_pair(tile, half * 8 + 2 * c + 1, _mm256_srli_epi16(columns[c], 8), zeros);
            }
        }
    } else {  // 16 bytes hold 16 inputs in their low nibbles and the next 16 in the high ones
        const __m256i low = _mm256_set1_epi16(15);
        read_columns(rows, at, columns);
        MOSS_UNROLL
        for (int c = 0; c < 4; c++) {
            store_pair(tile, 2 * c, _mm256_and_si256(columns[c], low), zeros);
            store_pair(tile, 2 * c + 1, _mm256_and_si256(_mm256_srli_epi16(columns[c], 8), low), zeros);
            store_pair(tile, 8 + 2 * c, _mm256_and_si256(_mm256_srli_epi16(columns[c], 4), low), zeros);
            store_pair(tile, 8 + 2 * c + 1, _mm256_srli_epi16(columns[c], 12), zeros);
        }
    }
}

// One span of kWordRows rows from `row` on, of which those from `end` on repeat the last.
struct WordTile {
    alignas(64) int32_t pairs[kSpan / 2 * kWordRows];
    alignas(64) float scales[kWordRows];

    template <class M>
    void read(const M& m, int64_t row, int64_t end, int64_t span, int64_t length) {
        const int64_t group = span * length / m.group_size(), bytes = length * M::Row::kBits / 8, first = span * bytes;
        uint16_t halves[kWordRows];
        for (int part = 0; part < kWordRows; part += 8) {
            const uint8_t* rows[8];
            alignas(32) int32_t zeros[8];
            for (int r = 0; r < 8; r++) {
                const int64_t own = std::min(row + part + r, end - 1);
                rows[r] = m.packed + own * m.row_bytes() + first;
                for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows[r] + kSpansAhead * bytes + at);
                zeros[r] = (m.zeros[own * m.groups + group] + 1) * 0x10001;
                halves[part + r] = m.scales[own * m.groups + group];
            }
            const __m256i zero = _mm256_load_si256((const __m256i*)zeros);
            for (int64_t i = 0; i < length; i += kStepInputs)
                write_step<M::Row::kBits>(rows, i * M::Row::kBits / 8, zero, pairs + i / 2 * kWordRows + part);
        }
        for (int v = 0; v < 2; v++) Simd::store(scales + v * kLanes, Simd::load_half(halves + v * kLanes));
    }
};

// sums[t * kWordRows + r] += row r . x[t] over one span, for the kWordTile tokens from t on.
inline void add_span(const WordTile& tile, const WordPage& page, int64_t span, int64_t t, float* sums) {
    Simd::I sum[kWordTile][2];
    MOSS_UNROLL
    for (int i = 0; i < kWordTile; i++) sum[i][0] = sum[i][1] = Simd::zero_ints();
    for (int64_t begin = 0; begin < page.length; begin += kStepInputs) {
        const int32_t* pairs = tile.pairs + begin / 2 * kWordRows;
        const int16_t* words = page.span(span, t) + begin;
        MOSS_UNROLL
        for (int pair = 0; pair < kStepInputs / 2; pair++) {
            Simd::I first = Simd::load_ints(pairs + pair * kWordRows);
            Simd::I second = Simd::load_ints(pairs + pair * kWordRows + kLanes);
            Simd::in_register(first);  // else each token's product would load them once more
            Simd::in_register(second);
            MOSS_UNROLL
            for (int i = 0; i < kWordTile; i++) {
                int32_t two;
                std::memcpy(&two, words + i * page.length + 2 * pair, sizeof two);
                const Simd::I inputs = Simd::set1_ints(two);
                sum[i][0] = Simd::add_dot_words(sum[i][0], first, inputs);
                sum[i][1] = Simd::add_dot_words(sum[i][1], second, inputs);
            }
        }
    }
    MOSS_UNROLL
    for (int i = 0; i < kWordTile; i++)
        MOSS_UNROLL
        for (int v = 0; v < 2; v++) {
            float* own = sums + i * kWordRows + v * kLanes;
            const F scale = Simd::mul(Simd::load(tile.scales + v * kLanes), Simd::set1(page.scales[span * kPage + t + i]));
            Simd::store(own, Simd::fma(Simd::to_floats(sum[i][v]), scale, Simd::load(own)));
        }
}

// What a thread works in.
struct WordScratch {
    WordTile tile;
    alignas(64) float sums[kWordTokens * kWordRows];
};

// y[t * ldy + (n - first)] (+)= row n . x[t] for the rows first <= n < end, and for whole pages that write_words() has
// written, of kPage * ldx floats each.
template <class M>
inline void product_words(const M& m, int64_t first, int64_t end, const float* x, int64_t ldx, int64_t tokens, float* y,
                          int64_t ldy, bool add, WordScratch& own) {
    static_assert(kPage % kWordTile == 0 && kWordTokens % kPage == 0, "pages are done in whole tiles");
    const int64_t length = span_of(m);
    for (int64_t begin = 0; begin < tokens; begin += kWordTokens) {
        const int64_t count = std::min(kWordTokens, tokens - begin);
        for (int64_t n = first; n < end; n += kWordRows) {
            std::fill(own.sums, own.sums + count * kWordRows, 0.0f);
            for (int64_t span = 0; span < m.k / length; span++) {
                own.tile.read(m, n, end, span, length);
                for (int64_t t = 0; t < count; t += kPage) {
                    const WordPage page(m, length, x + (begin + t) * ldx);
                    for (int64_t i = 0; i < kPage; i += kWordTile)
                        add_span(own.tile, page, span, i, own.sums + (t + i) * kWordRows);
                }
            }
            for (int64_t t = 0; t < count; t++)
                for_lanes(std::min<int64_t>(kWordRows, end - n), [&](int64_t i, int lanes) {
                    float* result = y + (begin + t) * ldy + (n - first) + i;
                    const F sum = Simd::load(own.sums + t * kWordRows + i);
                    store_n(result, add ? Simd::add(load_n(result, lanes), sum) : sum, lanes);
                });
        }
    }
}

#endif

}  // namespace moss
