// What training needs beside cuBLAS's products: rows as float16 for them, layer norm's and GELU's derivatives, the rotary embedding both ways,
// the softmax of attention and its derivative, and the loss over a slab of the vocabulary. Every sum has an order that follows from the sizes
// alone. Letters as in moss_jt.kernels.interface.
#include "device.cuh"

constexpr int kRowWarps = 8, kRowThreads = kWarp * kRowWarps;  // of a block that works on one row
constexpr int kLargestPower = 14;                              // a row's largest number becomes 2^14 to 2^15
constexpr int kLeastPower = -112;                              // of a row's largest number: 2^(14 + 112) is still a float
constexpr float kLowest = -3.402823466e38f;

// The largest of what all threads of a block of kRowThreads have, for all of them.
template <typename Shared>
__device__ __forceinline__ float block_max(float value, Shared& largest) {
    value = warp_max(value);
    if (threadIdx.x % kWarp == 0) largest[threadIdx.x / kWarp] = value;
    __syncthreads();
    return warp_max(threadIdx.x % kWarp < kRowWarps ? largest[threadIdx.x % kWarp] : kLowest);
}

// x (T, K) -> out (T, K) float16, each row times a power of two that brings its largest number near float16's: gradients are smaller than
// what float16 holds, and activations may be larger. powers (T): what undoes it. order: null, or the input of each column. A block a row.
extern "C" __global__ void scaled_half(IN(float) x, IN(int) order, OUT(__half) out, OUT(float) powers, int ordered, int width) {
    SHARED(float, maxima, kRowWarps);
    const long long row = (long long)blockIdx.x * width;
    float largest = 0;
    for (int i = threadIdx.x; i < width; i += kRowThreads) largest = fmaxf(largest, fabsf(x[row + i]));
    const unsigned bits = __float_as_uint(block_max(largest, maxima));
    const int power = max((int)(bits >> 23) - 127, kLeastPower);
    const bool usual = bits != 0 && power < 128;  // neither nothing nor infinite
    const float factor = usual ? __uint_as_float((unsigned)(127 + kLargestPower - power) << 23) : 1.0f;
    if (threadIdx.x == 0) powers[blockIdx.x] = 1.0f / factor;
    for (int i = threadIdx.x; i < width; i += kRowThreads)
        out[row + i] = __float2half_rn(x[row + (ordered ? order[i] : i)] * factor);
}

// y (T, N) with each row times its power, in place.
extern "C" __global__ void scale_rows(OUT(float) y, IN(float) powers, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (long long)tokens * width) y[i] = y[i] * powers[i / width];
}

// The same into another memory, column i becoming column order[i].
extern "C" __global__ void scatter_scaled(IN(float) y, IN(float) powers, IN(int) order, OUT(float) out, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (long long)tokens * width) out[i / width * width + order[i % width]] = y[i] * powers[i / width];
}

// g (T, C) of a layer norm's result -> back, that of h (T, C); normed: h without weight and bias. A block a row.
extern "C" __global__ void norm_back(
    IN(float) g, IN(float) h, IN(__half) weight, OUT(float) back, OUT(float) normed, int width, float epsilon) {
    SHARED(float, means, kRowWarps);
    SHARED(float, variances, kRowWarps);
    SHARED(float, slopes, kRowWarps);
    SHARED(float, products, kRowWarps);
    const long long row = (long long)blockIdx.x * width;
    float sum = 0, squares = 0, slope = 0, along = 0;
    for (int i = threadIdx.x; i < width; i += kRowThreads) sum += h[row + i];
    const float mean = block_sum<kRowWarps>(sum, means) / width;
    for (int i = threadIdx.x; i < width; i += kRowThreads) squares += (h[row + i] - mean) * (h[row + i] - mean);
    const float factor = rsqrtf(block_sum<kRowWarps>(squares, variances) / width + epsilon);
    for (int i = threadIdx.x; i < width; i += kRowThreads) {
        const float x = (h[row + i] - mean) * factor, weighted = g[row + i] * __half2float(weight[i]);
        normed[row + i] = x;
        slope += weighted;
        along += weighted * x;
    }
    slope = block_sum<kRowWarps>(slope, slopes) / width;
    along = block_sum<kRowWarps>(along, products) / width;
    for (int i = threadIdx.x; i < width; i += kRowThreads)
        back[row + i] = factor * (g[row + i] * __half2float(weight[i]) - slope - (h[row + i] - mean) * factor * along);
}

// g (T, I) of gelu_new(y + bias) -> that of y. With s = (1 + tanh u) / 2 the derivative of x s is s + x * 2 s (1 - s) * du.
extern "C" __global__ void gelu_back(IN(float) g, IN(float) y, IN(__half) bias, OUT(float) out, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)tokens * width) return;
    const float x = y[i] + __half2float(bias[i % width]), square = x * x;
    const float s = 0.5f * (1.0f + tanhf(0.7978845608f * x * (1.0f + 0.044715f * square)));
    out[i] = g[i] * (s + x * 2.0f * s * (1.0f - s) * 0.7978845608f * (1.0f + 0.134145f * square));
}

// out = a, where `added` + b, and where `biased` + bias; a, b (T, N), bias (N) float16, each null where it is not added.
extern "C" __global__ void add_rows(
    IN(float) a, IN(float) b, IN(__half) bias, OUT(float) out, int added, int biased, int tokens, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)tokens * width) return;
    float sum = a[i];
    if (added) sum += b[i];
    if (biased) sum += __half2float(bias[i % width]);
    out[i] = sum;
}

// Queries and keys, in rows of `from` floats, turned by their positions' angles, or back by them where `back`, into rows of `into`.
// rotary (P, 2, pairs): cosines, sines; positions (T). One thread for each two dimensions.
extern "C" __global__ void turn(
    IN(float) x, IN(float) rotary, IN(int) positions, OUT(float) out, int tokens, int heads, int head_dim, int pairs, int from,
    int into, int back) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int twos = heads * head_dim;  // of queries and keys together
    if (i >= (long long)tokens * twos) return;
    const int token = (int)(i / twos), column = (int)(i % twos) * 2, pair = column % head_dim / 2;
    const long long at = (long long)token * from + column, target = (long long)token * into + column;
    float even = x[at], odd = x[at + 1];
    if (pair < pairs) {
        const long long angle = (long long)positions[token] * 2 * pairs + pair;
        const float c = rotary[angle], s = back ? -rotary[angle + pairs] : rotary[angle + pairs], first = even;
        even = even * c - odd * s;
        odd = odd * c + first * s;
    }
    out[target] = even;
    out[target + 1] = odd;
}

// scores (H, Q, seen) of queries `first` .. of a sample become their softmax, in place, each over itself and what is before it, with zeros
// after. Grid (Q, H).
extern "C" __global__ void causal_softmax(OUT(float) scores, int seen, int first) {
    SHARED(float, maxima, kRowWarps);
    SHARED(float, sums, kRowWarps);
    const long long row = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * seen;
    const int own = first + blockIdx.x + 1;
    float largest = kLowest, sum = 0;
    for (int i = threadIdx.x; i < own; i += kRowThreads) largest = fmaxf(largest, scores[row + i]);
    largest = block_max(largest, maxima);
    for (int i = threadIdx.x; i < own; i += kRowThreads) {
        const float power = expf(scores[row + i] - largest);
        scores[row + i] = power;
        sum += power;
    }
    const float share = 1.0f / block_sum<kRowWarps>(sum, sums);
    for (int i = threadIdx.x; i < seen; i += kRowThreads) scores[row + i] = i < own ? scores[row + i] * share : 0.0f;
}

// slopes (R, seen), what the result depends on weights through -> through scores, in place. A block a row.
extern "C" __global__ void softmax_back(IN(float) weights, OUT(float) slopes, int seen) {
    SHARED(float, sums, kRowWarps);
    const long long row = (long long)blockIdx.x * seen;
    float along = 0;
    for (int i = threadIdx.x; i < seen; i += kRowThreads) along += weights[row + i] * slopes[row + i];
    along = block_sum<kRowWarps>(along, sums);
    for (int i = threadIdx.x; i < seen; i += kRowThreads) slopes[row + i] = weights[row + i] * (slopes[row + i] - along);
}

// Of each row of logits (R, N), with bias (N): out (R, 4) is the largest, the sum of exponentials relative to it, its column (of several the
// first; floats hold every column exactly below 2^24), and the logit of the row's own column, 0 where that is -1. A block a row.
extern "C" __global__ void logit_summary(IN(float) logits, IN(__half) bias, IN(int) columns, OUT(float) out, int width) {
    SHARED(float, maxima, kRowWarps);
    SHARED(float, bests, kRowWarps);
    SHARED(float, sums, kRowWarps);
    const long long row = (long long)blockIdx.x * width;
    float own_largest = kLowest, sum = 0;
    int own_best = width;
    for (int i = threadIdx.x; i < width; i += kRowThreads) {
        const float logit = logits[row + i] + __half2float(bias[i]);
        if (logit > own_largest) own_largest = logit, own_best = i;
    }
    const float largest = block_max(own_largest, maxima);
    const float best = -block_max(own_largest == largest ? -(float)own_best : -(float)width, bests);
    for (int i = threadIdx.x; i < width; i += kRowThreads) sum += expf(logits[row + i] + __half2float(bias[i]) - largest);
    sum = block_sum<kRowWarps>(sum, sums);
    if (threadIdx.x > 0) return;
    const int column = columns[blockIdx.x];
    const long long at = 4 * (long long)blockIdx.x;
    out[at] = largest;
    out[at + 1] = sum;
    out[at + 2] = best;
    out[at + 3] = column < 0 ? 0.0f : logits[row + column] + __half2float(bias[column]);
}

// out (R, N) = share * (exp(logit - shift) - 1 at the row's own column): what the loss depends on each logit.
extern "C" __global__ void logit_slope(
    IN(float) logits, IN(__half) bias, IN(int) columns, IN(float) shift, OUT(float) out, float share, int rows, int width) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)rows * width) return;
    const int row = (int)(i / width), column = (int)(i % width);
    const float probability = expf(logits[i] + __half2float(bias[column]) - shift[row]);
    out[i] = share * (column == columns[row] ? probability - 1.0f : probability);
}
