// Layer norm, GELU, rotary and narrowing to float16, each over one row of floats.
#pragma once

#include "simd.h"

namespace moss {

// Run body(i, n) over [0, count) in vectors: n is kLanes but for the last, shorter one.
template <class Body>
inline void for_lanes(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
    if (i < count) body(i, (int)(count - i));
}

inline F load_n(const float* p, int n) { return n == kLanes ? Simd::load(p) : Simd::load_partial(p, n); }

inline F load_half_n(const uint16_t* p, int n) {
    return n == kLanes ? Simd::load_half(p) : Simd::load_half_partial(p, n);
}

// Vectors of a norm, and biases, are float16 where a model runs, and float32 where it learns.
inline F load_wide_n(const uint16_t* p, int n) { return load_half_n(p, n); }
inline F load_wide_n(const float* p, int n) { return load_n(p, n); }

inline void store_n(float* p, F x, int n) {
    if (n == kLanes) return Simd::store(p, x);
    float lanes[kLanes];
    Simd::store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(float));
}

// (h - mean) / sqrt(variance + epsilon) * weight + bias, in two passes: E[x^2] - E[x]^2 would cancel.
template <class V>
inline void layer_norm(const float* h, const V* weight, const V* bias, float epsilon, int64_t width, float* result) {
    F sum = Simd::zero(), squares = Simd::zero();
    for_lanes(width, [&](int64_t i, int n) { sum = Simd::add(sum, load_n(h + i, n)); });
    const float mean = Simd::sum(sum) / width;
    const F centre = Simd::set1(mean);
    for_lanes(width, [&](int64_t i, int n) {
        F x = Simd::sub(load_n(h + i, n), centre);
        if (n < kLanes) {  // the lanes past the end are zero in h, not in x
            float lanes[kLanes];
            Simd::store(lanes, x);
            x = Simd::load_partial(lanes, n);
        }
        squares = Simd::fma(x, x, squares);
    });
    const F factor = Simd::set1(1.0f / std::sqrt(Simd::sum(squares) / width + epsilon));
    for_lanes(width, [&](int64_t i, int n) {
        const F x = Simd::mul(Simd::sub(load_n(h + i, n), centre), factor);
        store_n(result + i, Simd::fma(x, load_wide_n(weight + i, n), load_wide_n(bias + i, n)), n);
    });
}

// gelu_new: x / 2 * (1 + tanh u) = x / (1 + e^(-2u)), with u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline F gelu(F x) {
    const F cubic = Simd::mul(Simd::mul(x, x), x);
    const F u = Simd::fma(cubic, Simd::set1(0.044715f), x);
    const F one = Simd::set1(1.0f);
    return Simd::div(x, Simd::add(one, exp(Simd::mul(u, Simd::set1(-1.59576912f)))));
}

// result[i] = gelu(x[i] + bias[i])
template <class V>
inline void gelu_row(const float* x, const V* bias, int64_t count, float* result) {
    for_lanes(count, [&](int64_t i, int n) {
        store_n(result + i, gelu(Simd::add(load_n(x + i, n), load_wide_n(bias + i, n))), n);
    });
}

// Turn the pairs (2t, 2t + 1) of x, in place; the table has their cosines, then their sines.
inline void rotate_pairs(float* x, const float* table, int64_t table_pairs, int64_t first_pair, int64_t pairs) {
    const float *cosines = table + first_pair, *sines = table + table_pairs + first_pair;
    for (int64_t t = 0; t < pairs; t++) {
        const float even = x[2 * t], odd = x[2 * t + 1];
        x[2 * t] = even * cosines[t] - odd * sines[t];
        x[2 * t + 1] = odd * cosines[t] + even * sines[t];
    }
}

// As float16 can hold it: an infinity in the cache would make every later token NaN.
inline F saturated(F x) { return Simd::max(Simd::min(x, Simd::set1(65504.0f)), Simd::set1(-65504.0f)); }

inline void narrow_row(const float* x, int64_t count, uint16_t* result) {
    for_lanes(count, [&](int64_t i, int n) {
        const F narrowed = saturated(load_n(x + i, n));
        if (n == kLanes) return Simd::store_half(result + i, narrowed);
        uint16_t lanes[kLanes];
        Simd::store_half(lanes, narrowed);
        std::memcpy(result + i, lanes, n * sizeof(uint16_t));
    });
}

// x as result * the scale that is returned, which is a 127th of the largest: off by half a scale at most, and by what float32
// rounds. What is smaller than all that matters is zero, for its scale has no reciprocal.
inline float quantize_row(const float* x, int64_t count, int8_t* result) {
    constexpr float kLeast = 1e-30f;
    F most = Simd::zero();
    for_lanes(count, [&](int64_t i, int n) {
        const F some = saturated(load_n(x + i, n));
        most = Simd::max(most, Simd::max(some, Simd::sub(Simd::zero(), some)));
    });
    const float largest = Simd::largest(most), reciprocal = largest < kLeast ? 0.0f : 127.0f / largest;
    for_lanes(count, [&](int64_t i, int n) {
        const F numbers = Simd::mul(saturated(load_n(x + i, n)), Simd::set1(reciprocal));
        if (n == kLanes) return Simd::store_signed(result + i, numbers);
        int8_t lanes[kLanes];
        Simd::store_signed(lanes, numbers);
        std::memcpy(result + i, lanes, n);
    });
    return reciprocal == 0.0f ? 0.0f : largest / 127.0f;
}

}  // namespace moss
