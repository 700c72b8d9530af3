// Group-quantised matrices: w = scale * (q - zero), which float32 holds exactly (11 bits times 9).
//
// Widened in registers, the product with a packed matrix is the product with its dequantised copy, and follows the same
// rules of order. Where the processor allows it the product is one of integers instead: for few tokens (packed_few.h), if
// groups are multiples of 128, and for whole pages (packed_whole.h).
#pragma once

#include <type_traits>

#include "packed_few.h"

namespace moss {

// Readers of fields: set() at every group, step() for kStep fields, then weights() of one vector of them.

struct Bytes {
    static constexpr int kBits = 8, kStep = 32;
    F scale, offset;
    const uint8_t* now;
    void set(float group_scale, float group_offset) {
        scale = Simd::set1(group_scale);
        offset = Simd::set1(group_offset);
    }
    void step(const uint8_t* p) { now = p; }
    F weights(int v) const { return Simd::fma(Simd::load_bytes(now + v * kLanes), scale, offset); }
};

struct Nibbles {
    static constexpr int kBits = 4, kStep = 32;
    F scale, offset, fields[kStep / kLanes];
    void set(float group_scale, float group_offset) {
        scale = Simd::set1(group_scale);
        offset = Simd::set1(group_offset);
    }
    void step(const uint8_t* p) { Simd::load_nibbles(p, fields); }
    F weights(int v) const { return Simd::fma(fields[v], scale, offset); }
};

#if MOSS_SIMD == 0

// A vector of bytes at a time: as 32-bit lanes, each holds eight fields, and a shift by four bits brings the next
// field of every lane down. Spreading the bytes over lanes, as Nibbles does, takes more than reading them.
struct ShuffledNibbles {
    static constexpr int kBits = 4, kStep = 8 * kLanes;
    F scale, offset;
    Simd::I lanes;
    // 16 bytes hold 32 inputs, low nibbles first, and vector i / kLanes takes one nibble of one byte of each of the kLanes
    // 32-bit lanes of the step's bytes: that is where the input stands that is number i of a step.
    static constexpr int input(int i) {
        const int nibble = i / kLanes, byte = i % kLanes * 4 + nibble / 2;
        return byte / 16 * 32 + nibble % 2 * 16 + byte % 16;
    }
    void set(float group_scale, float group_offset) {
        scale = Simd::set1(group_scale);
        offset = Simd::set1(group_offset);
    }
    void step(const uint8_t* p) { lanes = Simd::load_ints(p); }
    F weights(int v) const { return Simd::fma(Simd::nibbles(lanes, 4 * v), scale, offset); }
};

#endif

// Reads one row of such a matrix, see matrix.h.
template <class Fields>
struct FieldRow {
    static constexpr bool kInDigits = false;
    static constexpr int kBits = Fields::kBits, kStep = Fields::kStep, kVectors = kStep / kLanes;
    static constexpr int kStreams = Simd::kRegisters >= 32 ? 8 : 4;
    static constexpr bool kPartial = false;  // groups are multiples of 32
    const uint8_t *p, *row_zeros;
    const uint16_t* row_scales;
    int64_t groups;
    float scales[kLanes], offsets[kLanes];  // of the kLanes groups around the current one
    Fields fields;
    template <class M>
    static void arrange(const M& m, const float* x, float* result) {
        for (int64_t step = 0; step < m.k; step += kStep)
            for (int i = 0; i < kStep; i++) result[step + i] = input_of(m, x, step + Fields::input(i));
    }
    template <class M>
    void start(const M& m, int64_t row) {
        p = m.packed + row * m.row_bytes();
        row_scales = m.scales + row * m.groups;
        row_zeros = m.zeros + row * m.groups;
        groups = m.groups;
        prefetch(row_scales);
        prefetch(row_zeros);
    }
    void group(int64_t g) { fields.set(scales[g % kLanes], offsets[g % kLanes]); }
    void prepare(int64_t g) {
        const int count = (int)std::min<int64_t>(kLanes, groups - g);
        const F scale = load_half_n(row_scales + g, count);
        const F zero = Simd::load_bytes_partial(row_zeros + g, count);
        Simd::store(scales, scale);
        Simd::store(offsets, Simd::mul(scale, Simd::sub(Simd::set1(-1.0f), zero)));
    }
    void step(int64_t at) {
        const uint8_t* first = p + at * kBits / 8;
        prefetch(first);
        fields.step(first);
    }
    F weights(int v) const { return fields.weights(v); }
};

template <class Natural, class Few>
struct Packed {
    using Row = Natural;
    using FewRow = Few;
    const uint8_t* packed;
    const uint16_t* scales;
    const uint8_t* zeros;
    const int32_t* order;
    int64_t n, k, groups;
    void read(Numbers& numbers) {
        packed = numbers.address<uint8_t>();
        scales = numbers.address<uint16_t>();
        zeros = numbers.address<uint8_t>();
        order = numbers.address<int32_t>();
        n = numbers.number();
        k = numbers.number();
        groups = numbers.number();
    }

    static constexpr bool kArranges = !std::is_same_v<Row, FewRow>, kInWords = MOSS_SIMD > 0;
    bool arranged() const { return kArranges && group_size() % FewRow::kStep == 0; }
    int64_t group_size() const { return k / groups; }
    int64_t row_bytes() const { return k * Row::kBits / 8; }
    void prefetch_scales(int64_t row, int64_t rows) const {
        prefetch_start(scales + row * groups, rows * groups * sizeof(uint16_t));
        prefetch_start(zeros + row * groups, rows * groups);
    }
};

#if MOSS_SIMD > 0
using Int8 = Packed<FieldRow<Bytes>, DigitRow<ByteFields>>;
using Int4 = Packed<FieldRow<Nibbles>, DigitRow<NibbleFields>>;
#else
using Int8 = Packed<FieldRow<Bytes>, FieldRow<Bytes>>;
using Int4 = Packed<FieldRow<Nibbles>, FieldRow<ShuffledNibbles>>;
#endif

}  // namespace moss
