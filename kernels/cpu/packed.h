// Group-quantised matrices, widened in registers: w = scale * (q - zero), which float32 holds exactly (11 bits times 9).
//
// So a product with a packed matrix is the product with its dequantised copy, and follows the same rules of order.
#pragma once

#include "matrix.h"

namespace moss {

// Turns the fields of one group into weights.
struct Group {
    F scale, offset;  // w = q * scale + offset
    void set(uint16_t scale_bits, uint8_t zero_minus_one) {
        scale = Simd::set1_half(scale_bits);
        offset = Simd::mul(scale, Simd::set1(-1.0f - zero_minus_one));
    }
    F weights(F fields) const { return Simd::fma(fields, scale, offset); }
};

struct Bytes {
    static constexpr int kBits = 8;
    Group group;
    void set(uint16_t scale, uint8_t zero) { group.set(scale, zero); }
    void load(const uint8_t* p, F* w) const {
        for (int v = 0; v < 32 / kLanes; v++) w[v] = group.weights(Simd::load_bytes(p + v * kLanes));
    }
};

#if MOSS_SIMD == 512

// All sixteen weights that a group can have stand in one register, and a nibble picks one.
struct Nibbles {
    static constexpr int kBits = 4;
    F table;
    void set(uint16_t scale, uint8_t zero) {
        Group group;
        group.set(scale, zero);
        table = group.weights(_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    }
    void load(const uint8_t* p, F* w) const {
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        w[0] = _mm512_permutexvar_ps(pairs, table);  // looks at the low four bits only
        w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
    }
};

#else

struct Nibbles {
    static constexpr int kBits = 4;
    Group group;
    void set(uint16_t scale, uint8_t zero) { group.set(scale, zero); }
    void load(const uint8_t* p, F* w) const {
        Simd::load_nibbles(p, w);
        for (int v = 0; v < 32 / kLanes; v++) w[v] = group.weights(w[v]);
    }
};

#endif

template <class Fields>
struct Packed {
    const uint8_t* packed;
    const uint16_t* scales;
    const uint8_t* zeros;
    const int32_t* order;
    int64_t n, k, groups;
    static constexpr int kStep = 32, kVectors = kStep / kLanes;
    static constexpr bool kPartial = false;  // groups are multiples of 32

    int64_t group_size() const { return k / groups; }
    int64_t row_bytes() const { return k * Fields::kBits / 8; }

    struct Row {
        const uint8_t *p, *zeros;
        const uint16_t* scales;
        Fields fields;
        void start(const Packed& m, int64_t row) {
            p = m.packed + row * m.row_bytes();
            scales = m.scales + row * m.groups;
            zeros = m.zeros + row * m.groups;
        }
        void group(int64_t g) { fields.set(scales[g], zeros[g]); }
        void load(int64_t at, F* w) const {
            const uint8_t* first = p + at * Fields::kBits / 8;
            prefetch(first);
            fields.load(first, w);
        }
    };
};

}  // namespace moss
