// The vector instructions that the CPU's kernels use, in plain C++: what each does stands here as its manual says it, so that
// kernels for a processor can be tested on any other. Found instead of the compiler's own header of this name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define asm(...) ((void)0)  // only ever says that a value is to stay in a register

template <int kBytes, char kKind>
struct Register {
    uint8_t bytes[kBytes];
    template <class T>
    T lane(int i) const {
        T value;
        std::memcpy(&value, bytes + i * sizeof(T), sizeof(T));
        return value;
    }
    template <class T>
    void set(int i, T value) {
        std::memcpy(bytes + i * sizeof(T), &value, sizeof(T));
    }
};

using __m128 = Register<16, 'f'>;
using __m128i = Register<16, 'i'>;
using __m256 = Register<32, 'f'>;
using __m256i = Register<32, 'i'>;
using __m512 = Register<64, 'f'>;
using __m512i = Register<64, 'i'>;
using __m512d = Register<64, 'd'>;
using __mmask16 = uint16_t;

constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8;

// Lane i of the result is f(i).
template <class V, class T, class Function>
V lanes(Function f) {
    V result;
    for (int i = 0; i < (int)(sizeof(V) / sizeof(T)); i++) result.template set<T>(i, (T)f(i));
    return result;
}
template <class To, class From>
To low_part(const From& x, int at = 0) {
    To result;
    std::memcpy(&result, x.bytes + at, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
    return result;
}
template <class V>
V loaded(const void* p) {
    V result;
    std::memcpy(&result, p, sizeof result);
    return result;
}
inline int16_t saturated(int32_t x) { return (int16_t)(x > 32767 ? 32767 : x < -32768 ? -32768 : x); }
inline int32_t rounded(float x) { return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)std::nearbyint(x) : INT32_MIN; }
inline float from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                      : std::ldexp((float)fraction, -24);
    return half >> 15 ? -size : size;
}
inline uint16_t to_half(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (!(size < 65520.0f)) return sign | (std::isnan(x) ? 0x7e00 : 0x7c00);
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const int steps = (int)std::nearbyint(std::ldexp(size, 10 - exponent));  // 1024 and more but for subnormals
    return (uint16_t)(sign | (steps + (exponent + 14) * 1024));
}

// The same for each width: name of the intrinsics, of their integer types, the types.
#define WIDTH(mm, si, F, I)                                                                                            \
    inline F mm##_setzero_ps() { return lanes<F, float>([](int) { return 0; }); }                                      \
    inline I mm##_setzero_##si() { return lanes<I, int32_t>([](int) { return 0; }); }                                  \
    inline F mm##_set1_ps(float x) { return lanes<F, float>([=](int) { return x; }); }                                 \
    inline I mm##_set1_epi32(int32_t x) { return lanes<I, int32_t>([=](int) { return x; }); }                          \
    inline I mm##_set1_epi16(int16_t x) { return lanes<I, int16_t>([=](int) { return x; }); }                          \
    inline F mm##_loadu_ps(const float* p) { return loaded<F>(p); }                                                    \
    inline I mm##_loadu_##si(const void* p) { return loaded<I>(p); }                                                   \
    inline void mm##_storeu_ps(float* p, F x) { std::memcpy(p, &x, sizeof x); }                                        \
    inline void mm##_storeu_##si(void* p, I x) { std::memcpy(p, &x, sizeof x); }                                       \
    inline I mm##_and_##si(I a, I b) {                                                                                 \
        return lanes<I, int32_t>([=](int i) { return a.template lane<int32_t>(i) & b.template lane<int32_t>(i); });    \
    }                                                                                                                  \
    FLOATS(mm##_add_ps, F, a + b)                                                                                      \
    FLOATS(mm##_sub_ps, F, a - b)                                                                                      \
    FLOATS(mm##_mul_ps, F, a* b)                                                                                       \
    FLOATS(mm##_div_ps, F, a / b)                                                                                      \
    FLOATS(mm##_min_ps, F, a < b ? a : b)                                                                              \
    FLOATS(mm##_max_ps, F, a > b ? a : b)                                                                              \
    INTS(mm##_add_epi32, I, uint32_t, a + b)                                                                           \
    INTS(mm##_add_epi16, I, uint16_t, a + b)                                                                           \
    INTS(mm##_sub_epi16, I, uint16_t, a - b)                                                                           \
    inline F mm##_fmadd_ps(F a, F b, F c) {                                                                            \
        return lanes<F, float>([=](int i) {                                                                            \
            return std::fma(a.template lane<float>(i), b.template lane<float>(i), c.template lane<float>(i));          \
        });                                                                                                            \
    }                                                                                                                  \
    inline I mm##_slli_epi32(I x, int bits) {                                                                          \
        return lanes<I, uint32_t>([=](int i) { return x.template lane<uint32_t>(i) << bits; });                        \
    }                                                                                                                  \
    inline I mm##_srli_epi32(I x, int bits) {                                                                          \
        return lanes<I, uint32_t>([=](int i) { return x.template lane<uint32_t>(i) >> bits; });                        \
    }                                                                                                                  \
    inline I mm##_srli_epi16(I x, int bits) {                                                                          \
        return lanes<I, uint16_t>([=](int i) { return x.template lane<uint16_t>(i) >> bits; });                        \
    }                                                                                                                  \
    inline I mm##_cvtps_epi32(F x) {                                                                                   \
        return lanes<I, int32_t>([=](int i) { return rounded(x.template lane<float>(i)); });                           \
    }                                                                                                                  \
    inline F mm##_cvtepi32_ps(I x) {                                                                                   \
        return lanes<F, float>([=](int i) { return x.template lane<int32_t>(i); });                                    \
    }                                                                                                                  \
    inline I mm##_madd_epi16(I a, I b) {                                                                               \
        return lanes<I, uint32_t>([=](int i) { return products<int16_t, int16_t, 2>(a, b, i); });                      \
    }                                                                                                                  \
    inline I mm##_maddubs_epi16(I a, I b) {                                                                            \
        return lanes<I, int16_t>([=](int i) { return saturated(products<uint8_t, int8_t, 2>(a, b, i)); });             \
    }                                                                                                                  \
    inline I mm##_dpwssd_epi32(I sum, I a, I b) {                                                                      \
        return lanes<I, uint32_t>(                                                                                     \
            [=](int i) { return sum.template lane<uint32_t>(i) + products<int16_t, int16_t, 2>(a, b, i); });           \
    }                                                                                                                  \
    inline I mm##_dpbusd_epi32(I sum, I a, I b) {                                                                      \
        return lanes<I, uint32_t>(                                                                                     \
            [=](int i) { return sum.template lane<uint32_t>(i) + products<uint8_t, int8_t, 4>(a, b, i); });            \
    }
#define FLOATS(name, F, expression)                                            \
    inline F name(F x, F y) {                                                  \
        return lanes<F, float>([=](int i) {                                    \
            const float a = x.template lane<float>(i), b = y.template lane<float>(i); \
            return expression;                                                 \
        });                                                                    \
    }
#define INTS(name, I, T, expression)                                           \
    inline I name(I x, I y) {                                                  \
        return lanes<I, T>([=](int i) {                                        \
            const T a = x.template lane<T>(i), b = y.template lane<T>(i);      \
            return expression;                                                 \
        });                                                                    \
    }

// The sum of kCount products of neighbours in lane i.
template <class A, class B, int kCount, class V>
int32_t products(const V& a, const V& b, int i) {
    int64_t sum = 0;
    for (int j = 0; j < kCount; j++)
        sum += (int64_t)a.template lane<A>(kCount * i + j) * b.template lane<B>(kCount * i + j);
    return (int32_t)sum;
}

WIDTH(_mm, si128, __m128, __m128i)
WIDTH(_mm256, si256, __m256, __m256i)
WIDTH(_mm512, si512, __m512, __m512i)

inline __m256i _mm256_dpwssd_avx_epi32(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_epi32(sum, a, b); }
inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_epi32(sum, a, b); }

// Parts and other readings of a register.
inline __m128 _mm256_castps256_ps128(__m256 x) { return low_part<__m128>(x); }
inline __m128i _mm256_castsi256_si128(__m256i x) { return low_part<__m128i>(x); }
inline __m256i _mm256_castsi128_si256(__m128i x) { return low_part<__m256i>(x); }
inline __m256 _mm256_castsi256_ps(__m256i x) { return low_part<__m256>(x); }
inline __m256 _mm512_castps512_ps256(__m512 x) { return low_part<__m256>(x); }
inline __m512 _mm512_castpd_ps(__m512d x) { return low_part<__m512>(x); }
inline __m512d _mm512_castps_pd(__m512 x) { return low_part<__m512d>(x); }
inline __m128 _mm256_extractf128_ps(__m256 x, int part) { return low_part<__m128>(x, 16 * part); }
inline __m128i _mm256_extracti128_si256(__m256i x, int part) { return low_part<__m128i>(x, 16 * part); }
inline __m256 _mm512_extractf32x8_ps(__m512 x, int part) { return low_part<__m256>(x, 32 * part); }
inline __m256i _mm256_inserti128_si256(__m256i x, __m128i part, int at) {
    std::memcpy(x.bytes + 16 * at, &part, sizeof part);
    return x;
}
inline __m256i _mm256_broadcastsi128_si256(__m128i x) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(x), x, 1);
}

// Loads with masks, which read nothing beyond.
template <class V, class T>
V masked(unsigned mask, const void* p) {
    return lanes<V, T>([=](int i) { return mask >> i & 1 ? loaded<T>((const T*)p + i) : T(0); });
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) { return masked<__m512, float>(mask, p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) { return masked<__m256i, uint16_t>(mask, p); }
inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* p) { return masked<__m128i, uint8_t>(mask, p); }
inline __m128i _mm_loadl_epi64(const __m128i* p) { return masked<__m128i, uint64_t>(1, p); }
inline __m256i _mm256_load_si256(const __m256i* p) { return loaded<__m256i>(p); }

// Floats.
inline __m256 _mm256_round_ps(__m256 x, int) {
    return lanes<__m256, float>([=](int i) { return std::nearbyint(x.lane<float>(i)); });
}
inline __m512 _mm512_roundscale_ps(__m512 x, int) {
    return lanes<__m512, float>([=](int i) { return std::nearbyint(x.lane<float>(i)); });
}
inline __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
    return lanes<__m512, float>([=](int i) { return std::ldexp(x.lane<float>(i), (int)std::floor(n.lane<float>(i))); });
}
inline __m256 _mm256_cvtph_ps(__m128i x) {
    return lanes<__m256, float>([=](int i) { return from_half(x.lane<uint16_t>(i)); });
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
    return lanes<__m512, float>([=](int i) { return from_half(x.lane<uint16_t>(i)); });
}
inline __m128i _mm256_cvtps_ph(__m256 x, int) {
    return lanes<__m128i, uint16_t>([=](int i) { return to_half(x.lane<float>(i)); });
}
inline __m256i _mm512_cvtps_ph(__m512 x, int) {
    return lanes<__m256i, uint16_t>([=](int i) { return to_half(x.lane<float>(i)); });
}
// As GCC adds them: halves onto each other.
inline float _mm512_reduce_add_ps(__m512 x) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x.set<float>(i, x.lane<float>(i) + x.lane<float>(i + half));
    return x.lane<float>(0);
}
inline float _mm512_reduce_max_ps(__m512 x) {
    for (int i = 1; i < 16; i++) x.set<float>(0, std::fmax(x.lane<float>(0), x.lane<float>(i)));
    return x.lane<float>(0);
}
inline float _mm_cvtss_f32(__m128 x) { return x.lane<float>(0); }
inline __m128 first_lane(__m128 x, float value) {
    x.set<float>(0, value);
    return x;
}
inline __m128 _mm_add_ss(__m128 a, __m128 b) { return first_lane(a, a.lane<float>(0) + b.lane<float>(0)); }
inline __m128 _mm_max_ss(__m128 a, __m128 b) { return first_lane(a, std::fmax(a.lane<float>(0), b.lane<float>(0))); }
inline __m128 _mm_movehdup_ps(__m128 x) {
    return lanes<__m128, float>([=](int i) { return x.lane<float>(i | 1); });
}
inline __m128 _mm_movehl_ps(__m128 a, __m128 b) {
    return lanes<__m128, float>([=](int i) { return i < 2 ? b.lane<float>(i + 2) : a.lane<float>(i); });
}

// Integers.
inline __m256i _mm256_cvtepu8_epi32(__m128i x) {
    return lanes<__m256i, int32_t>([=](int i) { return x.lane<uint8_t>(i); });
}
inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
    return lanes<__m512i, int32_t>([=](int i) { return x.lane<uint8_t>(i); });
}
inline __m256i _mm512_cvtsepi32_epi16(__m512i x) {
    return lanes<__m256i, int16_t>([=](int i) { return saturated(x.lane<int32_t>(i)); });
}
inline __m128i _mm_packs_epi32(__m128i a, __m128i b) {
    return lanes<__m128i, int16_t>([=](int i) { return saturated((i < 4 ? a : b).lane<int32_t>(i % 4)); });
}
inline __m256i _mm256_cvtepi8_epi32(__m128i x) {
    return lanes<__m256i, int32_t>([=](int i) { return x.lane<int8_t>(i); });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
    return lanes<__m512i, int32_t>([=](int i) { return x.lane<int8_t>(i); });
}
inline int8_t saturated_byte(int32_t x) { return (int8_t)(x > 127 ? 127 : x < -128 ? -128 : x); }
inline __m128i _mm512_cvtsepi32_epi8(__m512i x) {
    return lanes<__m128i, int8_t>([=](int i) { return saturated_byte(x.lane<int32_t>(i)); });
}
inline __m128i _mm_packs_epi16(__m128i a, __m128i b) {
    return lanes<__m128i, int8_t>([=](int i) { return saturated_byte((i < 8 ? a : b).lane<int16_t>(i % 8)); });
}
inline void _mm_storel_epi64(__m128i* p, __m128i x) { std::memcpy(p, &x, 8); }
inline __m128i _mm_set_epi64x(int64_t high, int64_t low) {
    return lanes<__m128i, int64_t>([=](int i) { return i ? high : low; });
}
inline __m128i _mm_set1_epi8(int8_t x) {
    return lanes<__m128i, int8_t>([=](int) { return x; });
}
inline __m128i _mm_srli_si128(__m128i x, int bytes) {
    return lanes<__m128i, uint8_t>([=](int i) { return i + bytes < 16 ? x.bytes[i + bytes] : 0; });
}

// Within each 128 bits.
template <class V>
V shuffled(const V& x, const V& order) {
    return lanes<V, uint8_t>([&](int i) {
        return order.bytes[i] & 128 ? 0 : x.bytes[i / 16 * 16 + order.bytes[i] % 16];
    });
}
inline __m128i _mm_shuffle_epi8(__m128i x, __m128i order) { return shuffled(x, order); }
inline __m256i _mm256_shuffle_epi8(__m256i x, __m256i order) { return shuffled(x, order); }
template <class T, class V>
V unpacked(const V& a, const V& b, bool high) {  // halves of 128 bits, lanes in turn
    constexpr int kIn = 16 / sizeof(T);
    return lanes<V, T>([&](int i) {
        return (i % 2 ? b : a).template lane<T>(i / kIn * kIn + (high ? kIn / 2 : 0) + i % kIn / 2);
    });
}
inline __m256i _mm256_unpacklo_epi32(__m256i a, __m256i b) { return unpacked<uint32_t>(a, b, false); }
inline __m256i _mm256_unpackhi_epi32(__m256i a, __m256i b) { return unpacked<uint32_t>(a, b, true); }
inline __m256i _mm256_unpacklo_epi64(__m256i a, __m256i b) { return unpacked<uint64_t>(a, b, false); }
inline __m256i _mm256_unpackhi_epi64(__m256i a, __m256i b) { return unpacked<uint64_t>(a, b, true); }
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return unpacked<uint32_t>(a, b, false); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return unpacked<uint32_t>(a, b, true); }
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return unpacked<uint64_t>(a, b, false); }
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return unpacked<uint64_t>(a, b, true); }
inline __m256 _mm256_hadd_ps(__m256 a, __m256 b) {
    return lanes<__m256, float>([=](int i) {
        const __m256& from = i % 4 < 2 ? a : b;
        const int at = i / 4 * 4 + i % 2 * 2;
        return from.lane<float>(at) + from.lane<float>(at + 1);
    });
}
