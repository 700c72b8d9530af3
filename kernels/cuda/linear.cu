// Products of float32 activations with matrices whose rows are outputs: y[t, n] = sum over k of x[t, k] * w[n, k].
//
// Decode reads each weight once and is bound by memory, so a warp reads kRows rows, 16 bytes per lane at a time, for all
// tokens together. Where a matrix has too few rows to fill the card, gridDim.y splits K; the parts are summed by add_parts in a
// fixed order, so that results repeat. Sums are float32.
#include "device.cuh"

constexpr int kRows = 2;

// y as (parts, T, N): one part per split of K.
struct Place {
    int first_row, lane, begin, end;
    long long part;
};

__device__ __forceinline__ Place find_place(int outputs, int inputs, int step) {
    Place place;
    const int warp = threadIdx.x / kWarp;
    place.lane = threadIdx.x % kWarp;
    place.first_row = (blockIdx.x * kWarpsPerBlock + warp) * kRows;
    // Parts are whole steps of a lane's load, so that loads stay aligned and groups whole.
    const int steps = (inputs + step - 1) / step;
    const int each = (steps + gridDim.y - 1) / gridDim.y;
    place.begin = blockIdx.y * each * step;
    place.end = min(inputs, place.begin + each * step);
    place.part = blockIdx.y;
    return place;
}

template <int kTokens>
__device__ __forceinline__ void store_sums(
    float (&sums)[kRows][kTokens], const Place& place, OUT(float) y, int tokens, int outputs) {
    for (int r = 0; r < kRows; r++)
        for (int t = 0; t < kTokens; t++) {
            const float sum = warp_sum(sums[r][t]);
            if (place.lane == 0 && t < tokens && place.first_row + r < outputs)
                y[(place.part * tokens + t) * outputs + place.first_row + r] = sum;
        }
}

// Eight weights of a row and the tokens' eight activations.
template <int kTokens>
__device__ __forceinline__ void multiply_eight(
    const float (&w)[8], IN(float) x, int k, int tokens, int inputs, float factor, float (&sums)[kTokens]) {
    for (int t = 0; t < kTokens; t++) {
        if (t >= tokens) break;
        const uint4 low = load_vector(x, (long long)t * inputs + k);
        const uint4 high = load_vector(x, (long long)t * inputs + k + 4);
        float sum = w[0] * __uint_as_float(low.x);
        sum = fmaf(w[1], __uint_as_float(low.y), sum);
        sum = fmaf(w[2], __uint_as_float(low.z), sum);
        sum = fmaf(w[3], __uint_as_float(low.w), sum);
        sum = fmaf(w[4], __uint_as_float(high.x), sum);
        sum = fmaf(w[5], __uint_as_float(high.y), sum);
        sum = fmaf(w[6], __uint_as_float(high.z), sum);
        sum = fmaf(w[7], __uint_as_float(high.w), sum);
        sums[t] = fmaf(factor, sum, sums[t]);
    }
}

// w (N, K) float16, K a multiple of 8.
template <int kTokens>
__device__ __forceinline__ void dense(IN(__half) w, IN(float) x, OUT(float) y, int tokens, int outputs, int inputs) {
    const Place place = find_place(outputs, inputs, 8 * kWarp);
    float sums[kRows][kTokens] = {};
    for (int k = place.begin + 8 * place.lane; k < place.end; k += 8 * kWarp)
        for (int r = 0; r < kRows; r++) {
            if (place.first_row + r >= outputs) break;
            const uint4 words = load_vector(w, (long long)(place.first_row + r) * inputs + k);
            const float2 a = widen(words.x), b = widen(words.y), c = widen(words.z), d = widen(words.w);
            const float wide[8] = {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
            multiply_eight<kTokens>(wide, x, k, tokens, inputs, 1.0f, sums[r]);
        }
    store_sums<kTokens>(sums, place, y, tokens, outputs);
}

// Four fields of a word, one in each byte, minus the zero point: exact. With 0x64 above it a byte is the float16 number 1024 + byte, so that
// two subtractions in half2 arithmetic do for four fields; Pascal's sm_61, where half arithmetic is slow, goes by way of integers.
__device__ __forceinline__ void four_fields(unsigned bytes, int zero, float (&out)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 610
    for (int i = 0; i < 4; i++) out[i] = (float)((int)(bytes >> 8 * i & 0xffu) - zero);
#else
    union {
        unsigned bits;
        __half2 halves;
    } low, high;
    low.bits = 0x64006400u | (bytes & 0xffu) | (bytes & 0xff00u) << 8;
    high.bits = 0x64006400u | (bytes >> 16 & 0xffu) | (bytes >> 8 & 0xff0000u);
    const __half2 offset = __float2half2_rn(1024.0f + (float)zero);
    const float2 a = __half22float2(__hsub2(low.halves, offset)), b = __half22float2(__hsub2(high.halves, offset));
    out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y;
#endif
}

__device__ __forceinline__ void eight_fields(unsigned first, unsigned second, int zero, float (&out)[8]) {
    float low[4], high[4];
    four_fields(first, zero, low);
    four_fields(second, zero, high);
    for (int i = 0; i < 4; i++) out[i] = low[i], out[4 + i] = high[i];
}

// 16 bytes of a row: 16 int8 weights, or 32 int4 weights of which the first 16 lie in the low nibbles.
template <int kBits, int kTokens>
__device__ __forceinline__ void packed(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, IN(float) x, OUT(float) y, int tokens, int outputs,
    int inputs, int groups) {
    constexpr int kWeights = 128 / kBits;
    const int group_size = inputs / groups;
    const Place place = find_place(outputs, inputs, kWeights * kWarp);
    float sums[kRows][kTokens] = {};
    for (int k = place.begin + kWeights * place.lane; k < place.end; k += kWeights * kWarp)
        for (int r = 0; r < kRows; r++) {
            const int row = place.first_row + r;
            if (row >= outputs) break;
            const uint4 words = load_vector(w, ((long long)row * inputs + k) * kBits / 8);
            const long long group = (long long)row * groups + k / group_size;
            const float scale = __half2float(scales[group]);
            const int zero = (int)zeros[group] + 1;
            float wide[8];
            if (kBits == 8) {
                eight_fields(words.x, words.y, zero, wide);
                multiply_eight<kTokens>(wide, x, k, tokens, inputs, scale, sums[r]);
                eight_fields(words.z, words.w, zero, wide);
                multiply_eight<kTokens>(wide, x, k + 8, tokens, inputs, scale, sums[r]);
            } else {
                const unsigned mask = 0x0f0f0f0fu;
                eight_fields(words.x & mask, words.y & mask, zero, wide);
                multiply_eight<kTokens>(wide, x, k, tokens, inputs, scale, sums[r]);
                eight_fields(words.z & mask, words.w & mask, zero, wide);
                multiply_eight<kTokens>(wide, x, k + 8, tokens, inputs, scale, sums[r]);
                eight_fields(words.x >> 4 & mask, words.y >> 4 & mask, zero, wide);
                multiply_eight<kTokens>(wide, x, k + 16, tokens, inputs, scale, sums[r]);
                eight_fields(words.z >> 4 & mask, words.w >> 4 & mask, zero, wide);
                multiply_eight<kTokens>(wide, x, k + 24, tokens, inputs, scale, sums[r]);
            }
        }
    store_sums<kTokens>(sums, place, y, tokens, outputs);
}

#define DENSE(T)                                                                                                       \
    extern "C" __global__ void dense_##T(                                                                              \
        IN(__half) w, IN(float) x, OUT(float) y, int tokens, int outputs, int inputs) {                                \
        dense<T>(w, x, y, tokens, outputs, inputs);                                                                    \
    }
#define PACKED(BITS, T)                                                                                                \
    extern "C" __global__ void int##BITS##_##T(                                                                        \
        IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, IN(float) x, OUT(float) y, int tokens,        \
        int outputs, int inputs, int groups) {                                                                         \
        packed<BITS, T>(w, scales, zeros, x, y, tokens, outputs, inputs, groups);                                      \
    }
DENSE(1)
DENSE(4)
DENSE(16)
PACKED(8, 1)
PACKED(8, 4)
PACKED(8, 16)
PACKED(4, 1)
PACKED(4, 4)
PACKED(4, 16)

// y[i] = the sum of all parts of x (parts, count), first to last.
extern "C" __global__ void add_parts(IN(float) x, OUT(float) y, int parts, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = 0;
    for (int part = 0; part < parts; part++) sum += x[(long long)part * count + i];
    y[i] = sum;
}

// The whole matrix (N, K) in float16, for long prompts and cuBLAS: scale * (q - zero), rounded once. A thread does 16 bytes of packed weights.
template <int kBits>
__device__ __forceinline__ void dequantize(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, OUT(__half) out, int outputs, int inputs, int groups) {
    constexpr int kWeights = 128 / kBits;
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long first = index * kWeights;
    if (first >= (long long)outputs * inputs) return;
    const int row = (int)(first / inputs), k = (int)(first % inputs);
    const long long group = (long long)row * groups + k / (inputs / groups);
    const float scale = __half2float(scales[group]);
    const int zero = (int)zeros[group] + 1;
    const uint4 words = load_vector(w, index * 16);
    const unsigned all[4] = {words.x, words.y, words.z, words.w};
    float wide[4];
    for (int half = 0; half < 8 / kBits; half++)
        for (int i = 0; i < 4; i++) {
            four_fields(kBits == 8 ? all[i] : all[i] >> 4 * half & 0x0f0f0f0fu, zero, wide);
            for (int j = 0; j < 4; j++) out[first + 16 * half + 4 * i + j] = __float2half_rn(scale * wide[j]);
        }
}

extern "C" __global__ void dequantize_int8(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, OUT(__half) out, int outputs, int inputs, int groups) {
    dequantize<8>(w, scales, zeros, out, outputs, inputs, groups);
}
extern "C" __global__ void dequantize_int4(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, OUT(__half) out, int outputs, int inputs, int groups) {
    dequantize<4>(w, scales, zeros, out, outputs, inputs, groups);
}

// x[t, i] = y[t, order[i]]: the activations in the order in which an act-order matrix stores its inputs.
extern "C" __global__ void gather_inputs(IN(float) y, IN(int) order, OUT(float) x, int tokens, int inputs) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)tokens * inputs) return;
    x[i] = y[i / inputs * inputs + order[i % inputs]];
}
