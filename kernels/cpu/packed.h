// Group-quantised matrices, widened in registers: w = scale * (q - zero), which float32 holds exactly (11 bits times 9).
//
// So a product with a packed matrix is the product with its dequantised copy, and follows the same rules of order.
#pragma once

#include "matrix.h"

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

// A whole vector of bytes at a time: as 32-bit lanes, each holds eight fields, and a shift by four bits brings the next
// field of every lane into place. Spreading the bytes over lanes, as Nibbles does, takes more than reading them.
struct ShuffledNibbles {
    static constexpr int kBits = 4, kStep = kShuffle;
    Simd::NibbleWeights group;
    Simd::I lanes;
    void set(float scale, float offset) { group.set(Simd::set1(scale), Simd::set1(offset)); }
    void step(const uint8_t* p) { lanes = Simd::load_ints(p); }
    F weights(int v) const { return group.weights(lanes, 4 * v); }
};

template <class Natural, class Few>
struct Packed {
    const uint8_t* packed;
    const uint16_t* scales;
    const uint8_t* zeros;
    const int32_t* order;
    int64_t n, k, groups;

    int64_t group_size() const { return k / groups; }
    int64_t row_bytes() const { return k * Natural::kBits / 8; }
    bool shuffled() const { return Few::kStep == kShuffle && group_size() % kShuffle == 0; }

    template <class Fields>
    struct Reader {
        static constexpr int kStep = Fields::kStep, kVectors = kStep / kLanes, kStreams = 8;
        static constexpr bool kPartial = false;  // groups are multiples of 32
        const uint8_t *p, *row_zeros;
        const uint16_t* row_scales;
        int64_t groups;
        float scales[kLanes], offsets[kLanes];  // of the kLanes groups around the current one
        Fields fields;
        void start(const Packed& m, int64_t row) {
            p = m.packed + row * m.row_bytes();
            row_scales = m.scales + row * m.groups;
            row_zeros = m.zeros + row * m.groups;
            groups = m.groups;
            prefetch(row_scales);
            prefetch(row_zeros);
        }
        void group(int64_t g) {
            fields.set(scales[g % kLanes], offsets[g % kLanes]);
        }
        void prepare(int64_t g) {
            const int count = (int)std::min<int64_t>(kLanes, groups - g);
            const F scale = load_half_n(row_scales + g, count);
            const F zero = Simd::load_bytes_partial(row_zeros + g, count);
            Simd::store(scales, scale);
            Simd::store(offsets, Simd::mul(scale, Simd::sub(Simd::set1(-1.0f), zero)));
        }
        void step(int64_t at) {
            const uint8_t* first = p + at * Fields::kBits / 8;
            prefetch(first);
            fields.step(first);
        }
        F weights(int v) const { return fields.weights(v); }
    };
    using Row = Reader<Natural>;
    using FewRow = Reader<Few>;
};

using Int8 = Packed<Bytes, Bytes>;
using Int4 = Packed<Nibbles, ShuffledNibbles>;

}  // namespace moss
