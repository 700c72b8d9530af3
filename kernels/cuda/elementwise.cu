// Layer norm, and what stands between the products of a block.
#include "device.cuh"

template <typename Shared>
__device__ __forceinline__ float block_sum(float value, Shared& parts) {
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < kWarpsPerBlock; warp++) sum += parts[warp];
    return sum;
}

// One row per block, kThreads threads; mean and variance in two passes, as the reference does.
extern "C" __global__ void layer_norm(IN(float) x, IN(__half) weight, IN(__half) bias, OUT(float) y, int width, float epsilon) {
    SHARED(float, means, kWarpsPerBlock);
    SHARED(float, variances, kWarpsPerBlock);
    const long long row = (long long)blockIdx.x * width;
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += kThreads) sum += x[row + i];
    const float mean = block_sum(sum, means) / width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += kThreads) squares += (x[row + i] - mean) * (x[row + i] - mean);
    const float inverse = rsqrtf(block_sum(squares, variances) / width + epsilon);
    for (int i = threadIdx.x; i < width; i += kThreads)
        y[row + i] = (x[row + i] - mean) * inverse * __half2float(weight[i]) + __half2float(bias[i]);
}

// y = gelu_new(x + bias), the tanh form that GPT-2's config calls gelu_new.
extern "C" __global__ void bias_gelu(IN(float) x, IN(__half) bias, OUT(float) y, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)tokens * width) return;
    const float v = x[i] + __half2float(bias[i % width]);
    y[i] = 0.5f * v * (1.0f + tanhf(0.7978845608f * (v + 0.044715f * v * v * v)));
}

// y = h + attention + mlp + bias.
extern "C" __global__ void add_block(
    IN(float) h, IN(float) attention, IN(float) mlp, IN(__half) bias, OUT(float) y, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (long long)tokens * width) y[i] = h[i] + attention[i] + mlp[i] + __half2float(bias[i % width]);
}

extern "C" __global__ void add_bias(IN(float) x, IN(__half) bias, OUT(float) y, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (long long)tokens * width) y[i] = x[i] + __half2float(bias[i % width]);
}
