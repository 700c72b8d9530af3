// Vectors of floats: one set of operations, three implementations; MOSS_SIMD (512, 256 or 0) says which one is Simd. The
// first two also have integers, whose products MOSS_VNNI gives instructions of their own (AVX-512 VNNI, AVX-VNNI).
//
// Kernels are written once over Simd. They promise that a token's result does not depend on how many tokens share a
// pass, so every operation here rounds in one defined way: fused where it says fma, and the compiler is told
// (-fno-fast-math -ffp-contract=off) to neither fuse nor reorder anything else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if MOSS_SIMD > 0
#include <immintrin.h>
#endif

// Before loops of constant length whose bodies work on registers: -O3 alone leaves long ones rolled, and then the
// accumulators live in memory.
#define MOSS_UNROLL _Pragma("GCC unroll 32")

namespace moss {

#if MOSS_SIMD == 512

struct Simd {
    static constexpr int kLanes = 16, kRegisters = 32;
    using F = __m512;
    using I = __m512i;
    // Keeps the compiler from reading x from memory again for each use.
    static void in_register(F& x) { asm("" : "+v"(x)); }
    static void in_register(I& x) { asm("" : "+v"(x)); }
    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }
    static float sum(F x) { return _mm512_reduce_add_ps(x); }
    // The sums of four vectors, for less than four times the work.
    static void sum4(F a, F b, F c, F d, float* sums) {
        const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const F all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
    static float largest(F x) { return _mm512_reduce_max_ps(x); }
    static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static F load_half_partial(const uint16_t* p, int n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p));
    }
    // The numbers in kLanes bytes, and the 32 in the nibbles of 16 bytes: all low ones, then all high ones.
    static F load_bytes(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    static F load_bytes_partial(const uint8_t* p, int n) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask(n), p)));
    }
    // The same of signed bytes, and numbers of at most 127 rounded to them.
    static F load_signed(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    static F load_signed_partial(const int8_t* p, int n) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask(n), p)));
    }
    static void store_signed(int8_t* p, F x) {
        _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
    }
    static void load_nibbles(const uint8_t* p, F* w) {
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        w[0] = _mm512_cvtepi32_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(15)));
        w[1] = _mm512_cvtepi32_ps(_mm512_srli_epi32(pairs, 4));
    }
    static void store_half(uint16_t* p, F x) {
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    // Integers. Names say what a lane is: ints of 32 bits, words of 16, bytes.
    static I zero_ints() { return _mm512_setzero_si512(); }
    static I load_ints(const void* p) { return _mm512_loadu_si512(p); }
    static void store_ints(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
    static I set1_ints(int32_t x) { return _mm512_set1_epi32(x); }
    static I set1_words(int16_t x) { return _mm512_set1_epi16(x); }
    static I round_to_ints(F x) { return _mm512_cvtps_epi32(x); }
    static F to_floats(I x) { return _mm512_cvtepi32_ps(x); }
    static I add_ints(I a, I b) { return _mm512_add_epi32(a, b); }
    static I times_256(I x) { return _mm512_slli_epi32(x, 8); }
    static I bits(I a, I b) { return _mm512_and_si512(a, b); }
    template <int kBits>
    static I shift_words(I x) {
        return _mm512_srli_epi16(x, kBits);
    }
    static I add_words(I a, I b) { return _mm512_add_epi16(a, b); }
    // Sums of two products in each lane: of words as ints, and of unsigned with signed bytes as words, which must hold them.
    static I dot_words(I a, I b) { return _mm512_madd_epi16(a, b); }
    static I dot_bytes(I a, I b) { return _mm512_maddubs_epi16(a, b); }
#if MOSS_VNNI
    static I add_dot_words(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
    static I add_dot_bytes(I sum, I a, I b) { return _mm512_dpbusd_epi32(sum, a, b); }  // four products in each int
#else
    static I add_dot_words(I sum, I a, I b) {
        sum = add_ints(sum, dot_words(a, b));
        in_register(sum);  // sums that the compiler takes in another order do not fit the registers
        return sum;
    }
#endif
    // x rounded to words, of each four the first, third, second and fourth.
    static void store_words(int16_t* p, F x) {
        const __m256i order = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0f0e0b0a0d0c0908, 0x0706030205040100));
        _mm256_storeu_si256((__m256i*)p, _mm256_shuffle_epi8(_mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)), order));
    }

  private:
    static __mmask16 mask(int n) { return (__mmask16)((1u << n) - 1); }
};

#elif MOSS_SIMD == 256

struct Simd {
    static constexpr int kLanes = 8, kRegisters = 16;
    using F = __m256;
    using I = __m256i;
    static void in_register(F& x) { asm("" : "+x"(x)); }
    static void in_register(I& x) { asm("" : "+x"(x)); }
    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load_partial(const float* p, int n) {
        float padded[kLanes] = {};
        std::memcpy(padded, p, n * sizeof(float));
        return load(padded);
    }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale2(F x, F n) {
        __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }
    static float sum(F x) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static void sum4(F a, F b, F c, F d, float* sums) {
        const F all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
    static float largest(F x) {
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static F load_half_partial(const uint16_t* p, int n) {
        uint16_t padded[kLanes] = {};
        std::memcpy(padded, p, n * sizeof(uint16_t));
        return load_half(padded);
    }
    static F load_bytes(const uint8_t* p) { return widen_bytes(_mm_loadl_epi64((const __m128i*)p)); }
    static F load_bytes_partial(const uint8_t* p, int n) {
        uint8_t padded[kLanes] = {};
        std::memcpy(padded, p, n);
        return load_bytes(padded);
    }
    static F load_signed(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    static F load_signed_partial(const int8_t* p, int n) {
        int8_t padded[kLanes] = {};
        std::memcpy(padded, p, n);
        return load_signed(padded);
    }
    static void store_signed(int8_t* p, F x) {
        const __m256i ints = _mm256_cvtps_epi32(x);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
        _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
    }
    static void load_nibbles(const uint8_t* p, F* w) {
        const __m128i pairs = _mm_loadu_si128((const __m128i*)p), mask = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(pairs, mask), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
        w[0] = widen_bytes(low);
        w[1] = widen_bytes(_mm_srli_si128(low, 8));
        w[2] = widen_bytes(high);
        w[3] = widen_bytes(_mm_srli_si128(high, 8));
    }
    static I zero_ints() { return _mm256_setzero_si256(); }
    static I load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static void store_ints(int32_t* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
    static I set1_ints(int32_t x) { return _mm256_set1_epi32(x); }
    static I set1_words(int16_t x) { return _mm256_set1_epi16(x); }
    static I round_to_ints(F x) { return _mm256_cvtps_epi32(x); }
    static F to_floats(I x) { return _mm256_cvtepi32_ps(x); }
    static I add_ints(I a, I b) { return _mm256_add_epi32(a, b); }
    static I times_256(I x) { return _mm256_slli_epi32(x, 8); }
    static I bits(I a, I b) { return _mm256_and_si256(a, b); }
    template <int kBits>
    static I shift_words(I x) {
        return _mm256_srli_epi16(x, kBits);
    }
    static I add_words(I a, I b) { return _mm256_add_epi16(a, b); }
    static I dot_words(I a, I b) { return _mm256_madd_epi16(a, b); }
    static I dot_bytes(I a, I b) { return _mm256_maddubs_epi16(a, b); }
#if !MOSS_VNNI
    static I add_dot_words(I sum, I a, I b) {
        sum = add_ints(sum, dot_words(a, b));
        in_register(sum);
        return sum;
    }
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
    static I add_dot_words(I sum, I a, I b) { return _mm256_dpwssd_epi32(sum, a, b); }
    static I add_dot_bytes(I sum, I a, I b) { return _mm256_dpbusd_epi32(sum, a, b); }
#else
    static I add_dot_words(I sum, I a, I b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
    static I add_dot_bytes(I sum, I a, I b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#endif
    static void store_words(int16_t* p, F x) {
        const __m256i ints = _mm256_cvtps_epi32(x);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
        _mm_storeu_si128((__m128i*)p, _mm_shuffle_epi8(words, _mm_set_epi64x(0x0f0e0b0a0d0c0908, 0x0706030205040100)));
    }
    static void store_half(uint16_t* p, F x) {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

  private:
    static F widen_bytes(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); }
};

#else

// Plain C++, in the compiler's own vectors: whatever the machine has, without assuming a fused multiply-add.
struct Simd {
    static constexpr int kLanes = 8, kRegisters = 16;
    typedef float F __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    static void in_register(F&) {}
    static F zero() { return F{}; }
    static F set1(float x) { return F{x, x, x, x, x, x, x, x}; }
    static F load(const float* p) {
        F x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static F load_partial(const float* p, int n) {
        F x = {};
        std::memcpy(&x, p, n * sizeof(float));
        return x;
    }
    static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F min(F a, F b) { return a < b ? a : b; }
    static F max(F a, F b) { return a > b ? a : b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F round(F x) {
        for (int i = 0; i < kLanes; i++) x[i] = std::nearbyint(x[i]);
        return x;
    }
    static F scale2(F x, F n) { return x * (F)((__builtin_convertvector(n, I) + 127) << 23); }
    static float sum(F x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
    static void sum4(F a, F b, F c, F d, float* sums) {
        const F all[4] = {a, b, c, d};
        for (int i = 0; i < 4; i++) sums[i] = sum(all[i]);
    }
    static float largest(F x) {
        float most = x[0];
        for (int i = 1; i < kLanes; i++) most = x[i] > most ? x[i] : most;
        return most;
    }
    static F load_half(const uint16_t* p) {
        typedef uint16_t H __attribute__((vector_size(16)));
        H half;
        std::memcpy(&half, p, sizeof half);
        const I bits = __builtin_convertvector(half, I), magnitude = bits & 0x7fff;
        const F normal = (F)((magnitude << 13) + (112 << 23));
        const F subnormal = __builtin_convertvector(magnitude, F) * 0x1p-24f;
        const F size = magnitude < 0x400 ? subnormal : normal;
        return (F)((I)size | ((bits & 0x8000) << 16));
    }
    static F load_half_partial(const uint16_t* p, int n) {
        uint16_t padded[kLanes] = {};
        std::memcpy(padded, p, n * sizeof(uint16_t));
        return load_half(padded);
    }
    static F load_bytes(const uint8_t* p) { return widen_bytes(p, 0, 255); }
    static F load_bytes_partial(const uint8_t* p, int n) {
        uint8_t padded[kLanes] = {};
        std::memcpy(padded, p, n);
        return load_bytes(padded);
    }
    static F load_signed(const int8_t* p) {
        typedef int8_t B __attribute__((vector_size(8)));
        B bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        return __builtin_convertvector(bytes, F);
    }
    static F load_signed_partial(const int8_t* p, int n) {
        int8_t padded[kLanes] = {};
        std::memcpy(padded, p, n);
        return load_signed(padded);
    }
    static void store_signed(int8_t* p, F x) {
        for (int i = 0; i < kLanes; i++) p[i] = (int8_t)std::nearbyint(x[i]);
    }
    static void load_nibbles(const uint8_t* p, F* w) {
        for (int v = 0; v < 4; v++) w[v] = widen_bytes(p + v % 2 * kLanes, v / 2 * 4, 15);
    }
    static I load_ints(const uint8_t* p) {
        I x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static F nibbles(I lanes, int shift) { return __builtin_convertvector((lanes >> shift) & 15, F); }
    static void store_half(uint16_t* p, F x) {
        for (int i = 0; i < kLanes; i++) p[i] = to_half(x[i]);
    }

  private:
    static F widen_bytes(const uint8_t* p, int shift, int mask) {
        typedef uint8_t B __attribute__((vector_size(8)));
        B bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        return __builtin_convertvector((__builtin_convertvector(bytes, I) >> shift) & mask, F);
    }

    // Round to nearest, ties to even, of a value within float16's range.
    static uint16_t to_half(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
        if (magnitude < 0x38800000)  // below the smallest normal: in steps of 2^-24
            return (uint16_t)(sign | (uint32_t)std::nearbyint(std::fabs(x) * 0x1p24f));
        const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
        return (uint16_t)(sign | ((rounded - (112u << 23)) >> 13));
    }
};

#endif

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;

// e^x to about one unit in the last place of float32; x is clamped to [-87, 88].
inline F exp(F x) {
    x = Simd::min(Simd::max(x, Simd::set1(-87.0f)), Simd::set1(88.0f));
    const F n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
    F r = Simd::fma(n, Simd::set1(-0.693359375f), x);  // log 2 in two parts: n times the first is exact
    r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
    // The Taylor series up to r^7 / 7!: |r| <= log(2) / 2, so the rest is below 6e-9.
    F p = Simd::set1(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = Simd::fma(p, r, Simd::set1(factor));
    return Simd::scale2(p, n);
}

}  // namespace moss
