// Packed matrices times inputs written as three digits of eight bits: integer products, exact within each span of inputs.
//
// A span of 128 inputs shares a power of two 2^-k, and an input is X * 2^-k with an integer X of 24 bits: the largest
// input of the span keeps its float32 precision, and each other one is rounded to a part in 2^24 of that largest, which
// is what adding it to a float32 sum does as well. X = (d2 * 256 + d1) * 256 + d0 with signed bytes, and a row's fields q
// are multiplied with each of the three by vpdpbusd: sum q * X is exact, and takes half of the instructions that widening
// each field to a float does. Then
//   sum s * (q - z) * x  =  s * 2^-k * (sum q * X)  -  s * z * (sum x)   for each span,
// where sum x is taken of the X * 2^-k, so that both terms round the inputs alike.
#pragma once

#include "matrix.h"

namespace moss {

constexpr int kSpan = 128, kDigits = 3;

// One token's inputs, in the memory of k floats: the spans' digits, then 2^-k of each span, then the sum of each span.
struct DigitInputs {
    int8_t* digits;  // (spans, 3, 128), the highest digit first
    float *scales, *sums;

    DigitInputs(const float* x, int64_t k)
        : digits((int8_t*)x), scales((float*)(digits + kDigits * k)), sums(scales + k / kSpan) {}
};

#if MOSS_SIMD == 512

// x in 16 lanes, of which those beyond are read at the last input: only a damaged model folder has such an order.
inline F input_lanes(const float* x, const int32_t* order, int64_t at, int64_t k) {
    if (!order) return Simd::load(x + at);
    const __m512i last = _mm512_set1_epi32((int)(k - 1));
    return _mm512_i32gather_ps(_mm512_min_epu32(_mm512_loadu_si512(order + at), last), x, sizeof(float));
}

// The digits of one span, its 2^-k, and the sum of its inputs. Inputs that are not finite make both numbers NaN.
inline void write_span(const F* x, int8_t* digits, float& scale, float& sum) {
    constexpr int kInfinity = 0x7f800000, kLeastExponent = -120;
    constexpr float kMost = 8355000.0f;  // less than 127 * 2^16 + 127 * 2^8 + 127
    __m512i most = _mm512_setzero_si512(), total = _mm512_setzero_si512();
    MOSS_UNROLL
    for (int v = 0; v < kSpan / kLanes; v++)
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x[v]), _mm512_set1_epi32(0x7fffffff)));
    const int bits = _mm512_reduce_max_epi32(most);  // as integers, NaN is greater than infinity
    float largest;
    std::memcpy(&largest, &bits, sizeof bits);
    const int exponent = largest * 0x1p120f < kMost ? -kLeastExponent : std::ilogb(kMost / largest);
    const F power = Simd::set1((float)exponent);
    MOSS_UNROLL
    for (int v = 0; v < kSpan / kLanes; v++) {
        __m512i rest = _mm512_cvtps_epi32(Simd::scale2(x[v], power));
        total = _mm512_add_epi32(total, rest);
        MOSS_UNROLL
        for (int d = kDigits - 1; d >= 0; d--) {  // the lowest byte, signed, and what it leaves of the rest
            _mm_storeu_si128((__m128i*)(digits + d * kSpan + v * kLanes), _mm512_cvtepi32_epi8(rest));
            rest = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
        }
    }
    scale = bits < kInfinity ? std::ldexp(1.0f, -exponent) : NAN;
    sum = scale * (float)_mm512_reduce_add_epi32(total);
}

// Readers of fields: kSpan of them as bytes, in two vectors, in the order of the inputs' digits.
//   sum(x)   of the products with one token's span, in each lane, as floats

struct ByteFields {
    static constexpr int kBits = 8;
    __m512i low, high;
    void step(const uint8_t* p) {
        prefetch(p);
        prefetch(p + 64);
        low = _mm512_loadu_si512(p);
        high = _mm512_loadu_si512(p + 64);
    }
    static constexpr int input(int v) { return v * kLanes; }
    __m512i digit(const __m512i* x) const {
        return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), low, x[0]), high, x[1]);
    }
    __m512i two_digits(const __m512i* x) const {
        return _mm512_add_epi32(_mm512_slli_epi32(digit(x), 8), digit(x + 2));
    }
    // A lane's eight products take 34 bits: the lowest digit's are added as floats.
    F sum(const __m512i* x) const {
        return Simd::fma(_mm512_cvtepi32_ps(two_digits(x)), Simd::set1(256.0f), _mm512_cvtepi32_ps(digit(x + 4)));
    }
};

struct NibbleFields {
    static constexpr int kBits = 4;
    ByteFields bytes;
    void step(const uint8_t* p) {
        prefetch(p);
        const __m512i pairs = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
        bytes.low = _mm512_and_si512(pairs, mask);
        bytes.high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask);
    }
    // Where the inputs of vector v begin: 16 bytes hold 16 inputs in their low nibbles and the next 16 in the high ones.
    static constexpr int input(int v) { return v % 4 * 32 + v / 4 * 16; }
    F sum(const __m512i* x) const {  // within 30 bits
        const __m512i upper = _mm512_slli_epi32(bytes.two_digits(x), 8);
        return _mm512_cvtepi32_ps(_mm512_add_epi32(upper, bytes.digit(x + 4)));
    }
};

template <class Fields>
struct DigitRow {
    static constexpr bool kInDigits = true;
    static constexpr int kBits = Fields::kBits, kStep = kSpan, kStreams = 2;
    const uint8_t *p, *zeros;
    const uint16_t* scales;
    int64_t per_group;  // spans
    Fields fields;

    template <class M>
    static void arrange(const M& m, const float* x, float* result) {
        const DigitInputs to(result, m.k);
        for (int64_t span = 0; span < m.k / kSpan; span++) {
            F inputs[kSpan / kLanes];
            for (int v = 0; v < kSpan / kLanes; v++)
                inputs[v] = input_lanes(x, m.order, span * kSpan + Fields::input(v), m.k);
            write_span(inputs, to.digits + span * kDigits * kSpan, to.scales[span], to.sums[span]);
        }
    }

    template <class M>
    void start(const M& m, int64_t row) {
        p = m.packed + row * m.row_bytes();
        scales = m.scales + row * m.groups;
        zeros = m.zeros + row * m.groups;
        per_group = m.group_size() / kSpan;
        prefetch(scales);
        prefetch(zeros);
    }
    // The scales of `count` spans, and scale * zero point of each.
    void prepare(int64_t span, int count, F& scale, F& zero) const {
        if (per_group == 1) {
            scale = load_half_n(scales + span, count);
            zero = Simd::load_bytes_partial(zeros + span, count);
        } else {
            uint16_t half[kLanes];
            uint8_t bytes[kLanes];
            for (int i = 0; i < count; i++) {
                half[i] = scales[(span + i) / per_group];
                bytes[i] = zeros[(span + i) / per_group];
            }
            scale = load_half_n(half, count);
            zero = Simd::load_bytes_partial(bytes, count);
        }
        zero = Simd::mul(scale, Simd::add(zero, Simd::set1(1.0f)));
    }
    void step(int64_t span) { fields.step(p + span * kSpan * kBits / 8); }
};

// y[t * ldy + r * gap] (+)= rows[r] . x[t] for kRows rows and kTokens tokens, whose inputs arrange() has written.
template <class Row, class M, int kRows, int kTokens>
inline void digit_block(const M& m, const int64_t* rows, const float* x, int64_t ldx, float* y, int64_t ldy, int64_t gap,
                        bool add) {
    constexpr int kVectors = kDigits * kSpan / (int)sizeof(Simd::I);
    Row row[kRows];
    F sum[kRows][kTokens];
    MOSS_UNROLL
    for (int r = 0; r < kRows; r++) {
        row[r].start(m, rows[r]);
        MOSS_UNROLL
        for (int t = 0; t < kTokens; t++) sum[r][t] = Simd::zero();
    }
    const int64_t spans = m.k / kSpan;
    for (int64_t begin = 0; begin < spans; begin += kLanes) {
        const int count = (int)std::min<int64_t>(kLanes, spans - begin);
        float factors[kRows][kTokens][kLanes];
        MOSS_UNROLL
        for (int r = 0; r < kRows; r++) {
            F scale, zero;
            row[r].prepare(begin, count, scale, zero);
            MOSS_UNROLL
            for (int t = 0; t < kTokens; t++) {
                const DigitInputs in(x + t * ldx, m.k);
                Simd::store(factors[r][t], Simd::mul(scale, load_n(in.scales + begin, count)));
                sum[r][t] = Simd::sub(sum[r][t], Simd::mul(zero, load_n(in.sums + begin, count)));
            }
        }
        for (int i = 0; i < count; i++) {
            Simd::I inputs[kTokens][kVectors];
            MOSS_UNROLL
            for (int t = 0; t < kTokens; t++) {
                const int8_t* digits = DigitInputs(x + t * ldx, m.k).digits + (begin + i) * kDigits * kSpan;
                MOSS_UNROLL
                for (int v = 0; v < kVectors; v++) {
                    inputs[t][v] = _mm512_loadu_si512(digits + v * sizeof(Simd::I));
                    if (kTokens < 3) Simd::in_register(inputs[t][v]);  // more do not fit
                }
            }
            MOSS_UNROLL
            for (int r = 0; r < kRows; r++) {
                row[r].step(begin + i);
                MOSS_UNROLL
                for (int t = 0; t < kTokens; t++)
                    sum[r][t] = Simd::fma(row[r].fields.sum(inputs[t]), Simd::set1(factors[r][t][i]), sum[r][t]);
            }
        }
    }
    MOSS_UNROLL
    for (int r = 0; r < kRows; r++)
        MOSS_UNROLL
        for (int t = 0; t < kTokens; t++) {
            float& result = y[t * ldy + r * gap];
            result = (add ? result : 0.0f) + Simd::sum(sum[r][t]);
        }
}

#endif

}  // namespace moss
