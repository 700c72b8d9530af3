// What every kernel here shares: how memory is named, loaded and stored, and sums over a warp.
//
// Pointers are declared as IN(type), OUT(type) and SHARED(type, name, size), and vectors move by load_vector and store_vector, so that
// the same source compiles as C++ for the tests' emulation, which checks bounds, alignment, races and barriers at each access.
#pragma once

#ifdef MOSS_EMULATION
#include "emulation.h"
#else
#include <cuda_fp16.h>
#define IN(type) const type* __restrict__
#define OUT(type) type* __restrict__
#define SHARED(type, name, size) __shared__ type name[size]

// 16 bytes in one load, by the cache for what nobody writes; `index` counts elements and must lie on a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* memory, long long index) {
    return __ldg(reinterpret_cast<const uint4*>(memory + index));
}
template <typename T>
__device__ __forceinline__ void store_vector(T* memory, long long index, uint4 vector) {
    *reinterpret_cast<uint4*>(memory + index) = vector;
}
#endif

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarp * kWarpsPerBlock;

// Of a warp, or of the kLanes that lie together in it.
template <int kLanes = kWarp>
__device__ __forceinline__ float warp_sum(float value) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
    return value;
}

// The sum of what all threads of a block of kWarps warps have, for all of them.
template <int kWarps, typename Shared>
__device__ __forceinline__ float block_sum(float value, Shared& sums) {
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % kWarp < kWarps ? sums[threadIdx.x % kWarp] : 0.0f);
}

// Element i of what a product gave in parts (parts, count): their sum, first to last.
__device__ __forceinline__ float sum_of_parts(IN(float) x, int parts, long long count, long long i) {
    float sum = x[i];
    for (int part = 1; part < parts; part++) sum += x[part * count + i];
    return sum;
}

// The two float16 numbers in a 32-bit word, widened.
__device__ __forceinline__ float2 widen(unsigned word) {
    union {
        unsigned bits;
        __half2 halves;
    } both;
    both.bits = word;
    return __half22float2(both.halves);
}

// And two numbers as float16 in one word, rounded to nearest.
__device__ __forceinline__ unsigned narrow(float low, float high) {
    union {
        unsigned bits;
        __half2 halves;
    } both;
    both.halves = __floats2half2_rn(low, high);
    return both.bits;
}

// A float16 number's bits, and the number in the low half of a word, widened.
__device__ __forceinline__ unsigned bits_of(__half half) { return __half_as_ushort(half); }
__device__ __forceinline__ float half_of(unsigned word) { return __half2float(__ushort_as_half((unsigned short)word)); }

__device__ __forceinline__ void widen_four(unsigned first, unsigned second, float (&out)[4]) {
    const float2 a = widen(first), b = widen(second);
    out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y;
}

__device__ __forceinline__ void widen_eight(uint4 words, float (&out)[8]) {
    const float2 a = widen(words.x), b = widen(words.y), c = widen(words.z), d = widen(words.w);
    out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y, out[4] = c.x, out[5] = c.y, out[6] = d.x, out[7] = d.y;
}

// Byte i of a word, less 128: it takes the last places of 2^23, whose neighbours are whole numbers. Two instructions at full speed, where
// a conversion of an integer is a slow one.
__device__ __forceinline__ float byte_of(unsigned word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650u + i)) - (8388608.0f + 128.0f);
}

// The four numbers in a vector of float32.
__device__ __forceinline__ void as_floats(uint4 words, float (&out)[4]) {
    out[0] = __uint_as_float(words.x), out[1] = __uint_as_float(words.y), out[2] = __uint_as_float(words.z);
    out[3] = __uint_as_float(words.w);
}

// Four products of signed bytes, added to a sum. The first Pascal (6.0) has no instruction for it.
__device__ __forceinline__ int dot_of_bytes(unsigned a, unsigned b, int sum) {
#if defined(MOSS_NO_DP4A) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 610)
    for (int i = 0; i < 4; i++) sum += ((int)(a << (24 - 8 * i)) >> 24) * ((int)(b << (24 - 8 * i)) >> 24);
    return sum;
#else
    return __dp4a((int)a, (int)b, sum);
#endif
}
