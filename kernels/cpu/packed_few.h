// Packed matrices times a few tokens' inputs in digits: integer products, exact within each span of inputs.
//
// Inputs are written as for whole pages (packed_whole.h): a span of 128 has one scale u, and an input is u * X with an integer X of 16
// bits. X is written in what the processor multiplies with fields: two signed bytes (vpdpbusd, or vpmaddubsw for fields of 4
// bits), or one word (vpmaddwd). sum q * X is exact, and takes a third of the instructions that widening each field to a float
// does. Then
//   sum s * (q - z) * x  =  s * u * (sum q * X)  -  s * z * (sum x)   for each span,
// where sum x is taken of the u * X, so that both terms round the inputs alike.
#pragma once

#include <cfloat>

#include "matrix.h"

namespace moss {

constexpr int kSpan = 128;
constexpr float kLeastScale = 0x1p-100f;  // of a span's inputs

// Tokens whose digits stay in registers: those of three, the sums of four rows with each, and the fields of one fit 32.
constexpr int kStayingTokens = Simd::kRegisters >= 32 ? 3 : 0;

// Floats of the memory that one token's inputs have: as many as inputs, and two for each span, in whole cache lines.
inline int64_t input_floats(int64_t k) { return k + (k + 1023) / 1024 * 16; }

// One token's inputs: the spans' digits, then the scale of each span, then the sum of each span, both as vectors: zeros fill them.
template <class Digits>
struct DigitInputs {
    static constexpr int kSpanBytes = Digits::kInputBytes * kSpan;
    int64_t vectors;  // floats of them
    uint8_t* digits;
    float *scales, *sums;

    DigitInputs(const float* x, int64_t k)
        : vectors((k / kSpan + kLanes - 1) / kLanes * kLanes),
          digits((uint8_t*)x),
          scales((float*)(digits + k * Digits::kInputBytes)),
          sums(scales + vectors) {}
};

// The largest of the inputs, or NaN where one is not finite.
inline float largest_input(const float* x, int64_t count) {
    F most = Simd::zero(), unknown = Simd::zero();
    for (int64_t i = 0; i < count; i += kLanes) {
        const F value = Simd::load(x + i);
        most = Simd::max(most, Simd::max(value, Simd::sub(Simd::zero(), value)));
        unknown = Simd::fma(value, Simd::zero(), unknown);
    }
    return Simd::largest(most) + Simd::sum(unknown);
}

#if MOSS_SIMD > 0

// X = d1 * 256 + d0, signed bytes, the higher ones first.
struct ByteDigits {
    static constexpr int kInputBytes = 2;
    static constexpr float kMost = 127 * 256 + 127;
    static void write(const int32_t* ints, uint8_t* digits) {
        for (int i = 0; i < kSpan; i++) {
            digits[i] = (uint8_t)((ints[i] + 128) >> 8);  // the low byte is a signed one
            digits[kSpan + i] = (uint8_t)ints[i];
        }
    }
};

// X as signed words: of each vector's bytes the even ones, then the odd ones.
struct WordDigits {
    static constexpr int kInputBytes = 2, kVector = sizeof(Simd::I);
    static constexpr float kMost = 32767;
    static void write(const int32_t* ints, uint8_t* digits) {
        for (int i = 0; i < kSpan; i++) {
            const int at = i / kVector * kVector + i % 2 * (kVector / 2) + i % kVector / 2;
            ((int16_t*)digits)[at] = (int16_t)ints[i];
        }
    }
};

// The digits of one span, its scale, and the sum of its inputs. Inputs that are not finite make both numbers NaN.
template <class Digits>
inline void write_span(const float* x, uint8_t* digits, float& scale, float& sum) {
    const float largest = largest_input(x, kSpan), unit = std::max(largest / Digits::kMost, kLeastScale);
    const F factor = Simd::set1(1.0f / unit);
    Simd::I total = Simd::zero_ints();
    int32_t ints[kSpan];
    for (int i = 0; i < kSpan; i += kLanes) {
        const Simd::I rounded = Simd::round_to_ints(Simd::mul(Simd::load(x + i), factor));
        total = Simd::add_ints(total, rounded);
        Simd::store_ints(ints + i, rounded);
    }
    int32_t lanes[kLanes], all = 0;
    Simd::store_ints(lanes, total);
    for (int lane : lanes) all += lane;
    Digits::write(ints, digits);
    scale = largest <= FLT_MAX ? unit : NAN;
    sum = scale * (float)all;
}

// Readers of fields, kSpan of them: step() takes them apart, and sum(x) gives their products with one token's digits, in each
// lane, as floats. input(i) is the input that belongs to number i, a multiple of 16, of the digits.

constexpr int kVectorBytes = sizeof(Simd::I), kFieldVectors = kSpan / kVectorBytes;

// The digits of one span as sum() reads them. Where registers are many they stay there for all rows.
template <int kVectors, bool kStay>
struct SpanDigits {
    Simd::I vectors[kStay ? kVectors : 1];
    const uint8_t* p;

    void read(const uint8_t* digits) {
        p = digits;
        if constexpr (kStay)
            MOSS_UNROLL
            for (int v = 0; v < kVectors; v++) {
                vectors[v] = Simd::load_ints(p + v * kVectorBytes);
                Simd::in_register(vectors[v]);
            }
    }
    // For one more row: what is read again has no register meanwhile.
    void next_row() {
        if constexpr (!kStay) asm("" : "+r"(p));
    }
    Simd::I operator[](int v) const {
        if constexpr (kStay) return vectors[v];
        else return Simd::load_ints(p + v * kVectorBytes);
    }
};

#if MOSS_VNNI

// sum + the fields' products with one of the two bytes of their inputs, whose vectors begin at x[first].
template <class X>
inline Simd::I add_digit(Simd::I sum, const Simd::I* fields, const X& x, int first) {
    MOSS_UNROLL
    for (int v = 0; v < kFieldVectors; v++) sum = Simd::add_dot_bytes(sum, fields[v], x[first + v]);
    return sum;
}

// The fields' products with inputs of two bytes: each lane's are within 27 bits.
template <class X>
inline Simd::I byte_products(const Simd::I* fields, const X& x) {
    return add_digit(Simd::times_256(add_digit(Simd::zero_ints(), fields, x, 0)), fields, x, kFieldVectors);
}

#else

// The products of fields of 4 bits with one of the two bytes, in words: up to four times 2 * 15 * 128.
template <class X>
inline Simd::I digit_words(const Simd::I* fields, const X& x, int first) {
    Simd::I products[kFieldVectors];
    MOSS_UNROLL
    for (int v = 0; v < kFieldVectors; v++) products[v] = Simd::dot_bytes(fields[v], x[first + v]);
    MOSS_UNROLL
    for (int v = 1; v < kFieldVectors; v++) products[0] = Simd::add_words(products[0], products[v]);
    return products[0];
}

#endif

// 16 bytes hold 16 inputs in their low nibbles and the next 16 in the high ones.
struct NibbleFields {
    using Digits = ByteDigits;
    static constexpr int kBits = 4, kStreams = Simd::kRegisters >= 32 ? 8 : 4, kInputVectors = 2 * kFieldVectors;
    Simd::I fields[kFieldVectors];
    void step(const uint8_t* p) {
        prefetch(p);
        const Simd::I low = Simd::set1_words(0x0f0f);
        MOSS_UNROLL
        for (int v = 0; v < kFieldVectors; v += 2) {
            const Simd::I pairs = Simd::load_ints(p + v / 2 * kVectorBytes);
            fields[v] = Simd::bits(pairs, low);
            fields[v + 1] = Simd::bits(Simd::shift_words<4>(pairs), low);
        }
    }
    static constexpr int input(int i) {
        const int vector = i / kVectorBytes;
        return (vector / 2 * kVectorBytes + i % kVectorBytes) * 2 + vector % 2 * 16;
    }
    template <class X>
    F sum(const X& x) const {
#if MOSS_VNNI
        return Simd::to_floats(byte_products(fields, x));
#else
        const Simd::I high = Simd::dot_words(digit_words(fields, x, 0), Simd::set1_words(256));
        return Simd::to_floats(Simd::add_ints(high, Simd::dot_words(digit_words(fields, x, kFieldVectors), Simd::set1_words(1))));
#endif
    }
};

#if MOSS_VNNI

struct ByteFields {
    using Digits = ByteDigits;
    static constexpr int kBits = 8, kStreams = 8, kInputVectors = 2 * kFieldVectors;
    Simd::I fields[kFieldVectors];
    void step(const uint8_t* p) {
        prefetch(p);
        prefetch(p + 64);
        MOSS_UNROLL
        for (int v = 0; v < kFieldVectors; v++) fields[v] = Simd::load_ints(p + v * kVectorBytes);
    }
    static constexpr int input(int i) { return i; }
    template <class X>
    F sum(const X& x) const {
        return Simd::to_floats(byte_products(fields, x));
    }
};

#else

// As words, the even bytes of a vector and then the odd ones: a sum of two products of bytes is no word.
struct ByteFields {
    using Digits = WordDigits;
    static constexpr int kBits = 8, kStreams = 8, kWordVectors = 2 * kFieldVectors, kInputVectors = kWordVectors;
    Simd::I fields[kWordVectors];
    void step(const uint8_t* p) {
        prefetch(p);
        prefetch(p + 64);
        MOSS_UNROLL
        for (int v = 0; v < kFieldVectors; v++) {
            const Simd::I bytes = Simd::load_ints(p + v * kVectorBytes);
            fields[2 * v] = Simd::bits(bytes, Simd::set1_words(255));
            fields[2 * v + 1] = Simd::shift_words<8>(bytes);
        }
    }
    static constexpr int input(int i) { return i; }
    template <class X>
    F sum(const X& x) const {
        Simd::I sum = Simd::dot_words(fields[0], x[0]);
        MOSS_UNROLL
        for (int v = 1; v < kWordVectors; v++) sum = Simd::add_dot_words(sum, fields[v], x[v]);
        return Simd::to_floats(sum);
    }
};

#endif

template <class Fields>
struct DigitRow {
    static constexpr bool kInDigits = true;
    static constexpr int kBits = Fields::kBits, kStep = kSpan;
    static constexpr int kStreams = Fields::kStreams;
    using Inputs = DigitInputs<typename Fields::Digits>;
    const uint8_t *p, *zeros;
    const uint16_t* scales;
    int64_t per_group;  // spans
    Fields fields;

    template <class M>
    static void arrange(const M& m, const float* x, float* result) {
        const Inputs to(result, m.k);
        std::fill(to.scales, to.sums + to.vectors, 0.0f);
        for (int64_t span = 0; span < m.k / kSpan; span++) {
            float inputs[kSpan];
            for (int i = 0; i < kSpan; i += 16)
                copy_inputs(m, x, span * kSpan + Fields::input(i), 16, inputs + i);
            write_span<typename Fields::Digits>(inputs, to.digits + span * Inputs::kSpanBytes, to.scales[span],
                                                to.sums[span]);
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
    using Inputs = typename Row::Inputs;
    using Digits = SpanDigits<decltype(Row::fields)::kInputVectors, (kTokens <= kStayingTokens)>;
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
                const Inputs in(x + t * ldx, m.k);
                Simd::store(factors[r][t], Simd::mul(scale, Simd::load(in.scales + begin)));
                sum[r][t] = Simd::sub(sum[r][t], Simd::mul(zero, Simd::load(in.sums + begin)));
            }
        }
        for (int i = 0; i < count; i++) {
            Digits inputs[kTokens];
            MOSS_UNROLL
            for (int t = 0; t < kTokens; t++)
                inputs[t].read(Inputs(x + t * ldx, m.k).digits + (begin + i) * Inputs::kSpanBytes);
            MOSS_UNROLL
            for (int r = 0; r < kRows; r++) {
                row[r].step(begin + i);
                MOSS_UNROLL
                for (int t = 0; t < kTokens; t++) {
                    inputs[t].next_row();
                    sum[r][t] = Simd::fma(row[r].fields.sum(inputs[t]), Simd::set1(factors[r][t][i]), sum[r][t]);
                }
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
