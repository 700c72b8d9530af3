// Layer norm, and what stands between the products of a block. What products gave comes in parts, (parts, T, width).
#include "device.cuh"

constexpr int kNormWarps = 16, kNormThreads = kWarp * kNormWarps;

__device__ __forceinline__ float add_four(uint4 four, float from, int power) {
    const float all[4] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z), __uint_as_float(four.w)};
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += power == 1 ? all[i] : (all[i] - from) * (all[i] - from);
    return sum;
}

// One row per block, kNormThreads threads, four numbers a thread at once; mean and variance in two passes, as the reference does. A row
// of up to kHeld * 4 * kNormThreads numbers is read once. Width is a multiple of 4.
extern "C" __global__ void layer_norm(IN(float) x, IN(__half) weight, IN(__half) bias, OUT(float) y, int width, float epsilon) {
    SHARED(float, means, kNormWarps);
    SHARED(float, variances, kNormWarps);
    constexpr int kHeld = 4, kStep = 4 * kNormThreads;
    const long long row = (long long)blockIdx.x * width;
    const int first = 4 * threadIdx.x;
    uint4 held[kHeld];
    float sum = 0;
#pragma unroll
    for (int h = 0; h < kHeld; h++) {
        const uint4 none = {0, 0, 0, 0};
        held[h] = first + h * kStep < width ? load_vector(x, row + first + h * kStep) : none;
    }
#pragma unroll
    for (int h = 0; h < kHeld; h++) sum += add_four(held[h], 0.0f, 1);
    for (int i = first + kHeld * kStep; i < width; i += kStep) sum += add_four(load_vector(x, row + i), 0.0f, 1);
    const float mean = block_sum<kNormWarps>(sum, means) / width;
    float squares = 0;
#pragma unroll
    for (int h = 0; h < kHeld; h++)
        if (first + h * kStep < width) squares += add_four(held[h], mean, 2);
    for (int i = first + kHeld * kStep; i < width; i += kStep) squares += add_four(load_vector(x, row + i), mean, 2);
    const float inverse = rsqrtf(block_sum<kNormWarps>(squares, variances) / width + epsilon);
    for (int i = threadIdx.x; i < width; i += kNormThreads)
        y[row + i] = (x[row + i] - mean) * inverse * __half2float(weight[i]) + __half2float(bias[i]);
}

// y = gelu_new(x + bias), the tanh form that GPT-2's config calls gelu_new.
extern "C" __global__ void bias_gelu(IN(float) x, IN(__half) bias, OUT(float) y, int parts, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, count = (long long)tokens * width;
    if (i >= count) return;
    const float v = sum_of_parts(x, parts, count, i) + __half2float(bias[i % width]);
    y[i] = 0.5f * v * (1.0f + tanhf(0.7978845608f * (v + 0.044715f * v * v * v)));
}

// y = h + x + bias.
extern "C" __global__ void add_block(
    IN(float) h, IN(float) x, IN(__half) bias, OUT(float) y, int parts, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, count = (long long)tokens * width;
    if (i < count) y[i] = h[i] + sum_of_parts(x, parts, count, i) + __half2float(bias[i % width]);
}

// y = x + bias.
extern "C" __global__ void add_bias(IN(float) x, IN(__half) bias, OUT(float) y, int parts, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, count = (long long)tokens * width;
    if (i < count) y[i] = sum_of_parts(x, parts, count, i) + __half2float(bias[i % width]);
}
