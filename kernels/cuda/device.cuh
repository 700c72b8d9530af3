// What every kernel here shares: how memory is named and loaded, and sums over a warp.
//
// Pointers are declared as IN(type), OUT(type) and SHARED(type, name, size), and vectors are loaded by load_vector, so that the same
// source compiles as C++ for the tests' emulation, which checks bounds, alignment, races and barriers at each access.
#pragma once

#ifdef MOSS_EMULATION
#include "emulation.h"
#else
#include <cuda_fp16.h>
#define IN(type) const type* __restrict__
#define OUT(type) type* __restrict__
#define SHARED(type, name, size) __shared__ type name[size]

// 16 bytes in one load; `index` counts elements and must lie on a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* memory, long long index) {
    return *reinterpret_cast<const uint4*>(memory + index);
}
#endif

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarp * kWarpsPerBlock;

__device__ __forceinline__ float warp_sum(float value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
    return value;
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
