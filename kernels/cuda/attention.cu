// Rotary embedding with the cache's new entries, and attention of new tokens over the cache.
//
// The cache holds one layer's keys and values as (P, H, D) float16. Each query of each head is one block of four warps; a warp takes
// every fourth position, 16 bytes of a key per lane, with an online softmax; the four partial results are merged at the end.
#include "device.cuh"

constexpr int kDims = 8;  // dimensions of a head per lane: D is a multiple of 8 and at most 256

// qkv (T, 3 * H * D) float32 -> q (T, H * D) rotated, keys (rotated) and values at positions start_pos onward.
// rotary (P, 2, pairs): cosines, sines. Pairs are (2t, 2t + 1) of the first 2 * pairs dimensions. One thread per pair of dimensions.
extern "C" __global__ void rotary_cache(
    IN(float) qkv, IN(float) rotary, OUT(float) q, OUT(__half) keys, OUT(__half) values, int tokens, int heads, int head_dim,
    int pairs, int start_pos) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int width = heads * head_dim, half_width = width / 2;
    if (i >= (long long)tokens * half_width) return;
    const int t = (int)(i / half_width), at = (int)(i % half_width) * 2, pair = at % head_dim / 2;
    const long long row = (long long)t * 3 * width + at, position = start_pos + t;
    float q0 = qkv[row], q1 = qkv[row + 1], k0 = qkv[row + width], k1 = qkv[row + width + 1];
    if (pair < pairs) {
        const float c = rotary[(position * 2) * pairs + pair], s = rotary[(position * 2 + 1) * pairs + pair];
        const float q2 = q0 * c - q1 * s, k2 = k0 * c - k1 * s;
        q1 = q1 * c + q0 * s;
        k1 = k1 * c + k0 * s;
        q0 = q2;
        k0 = k2;
    }
    q[(long long)t * width + at] = q0;
    q[(long long)t * width + at + 1] = q1;
    const long long slot = position * width + at;
    keys[slot] = __float2half_rn(k0);
    keys[slot + 1] = __float2half_rn(k1);
    values[slot] = __float2half_rn(qkv[row + 2 * width]);
    values[slot + 1] = __float2half_rn(qkv[row + 2 * width + 1]);
}

__device__ __forceinline__ void widen_eight(uint4 words, float (&out)[kDims]) {
    const float2 a = widen(words.x), b = widen(words.y), c = widen(words.z), d = widen(words.w);
    out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y, out[4] = c.x, out[5] = c.y, out[6] = d.x, out[7] = d.y;
}

// context (T, H * D); grid (H, T), kThreads threads. Token t attends to positions 0 .. start_pos + t.
extern "C" __global__ void attention(
    IN(float) q, IN(__half) keys, IN(__half) values, OUT(float) context, int heads, int head_dim, int start_pos) {
    SHARED(float, merged, kWarpsPerBlock * (kDims * kWarp + 2));
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, head = blockIdx.x, t = blockIdx.y;
    const int width = heads * head_dim, dim = kDims * lane;
    const bool mine = dim < head_dim;
    const float scale = rsqrtf((float)head_dim);
    float query[kDims] = {}, sum[kDims] = {}, value[kDims], key[kDims];
    if (mine)
        for (int i = 0; i < kDims; i++) query[i] = q[(long long)t * width + head * head_dim + dim + i] * scale;
    float largest = -1e30f, total = 0;
    for (int position = warp; position <= start_pos + t; position += kWarpsPerBlock) {
        const long long slot = (long long)position * width + head * head_dim + dim;
        float score = 0;
        if (mine) {
            widen_eight(load_vector(keys, slot), key);
            for (int i = 0; i < kDims; i++) score = fmaf(query[i], key[i], score);
        }
        score = warp_sum(score);
        const float next = fmaxf(largest, score), fade = __expf(largest - next), weight = __expf(score - next);
        largest = next;
        total = total * fade + weight;
        if (mine) {
            widen_eight(load_vector(values, slot), value);
            for (int i = 0; i < kDims; i++) sum[i] = sum[i] * fade + weight * value[i];
        }
    }
    // merged: per warp the largest score, the sum of weights, and the weighted values.
    const int mine_at = warp * (kDims * kWarp + 2);
    if (lane == 0) {
        merged[mine_at] = largest;
        merged[mine_at + 1] = total;
    }
    for (int i = 0; i < kDims; i++) merged[mine_at + 2 + dim + i] = sum[i];
    __syncthreads();
    if (warp > 0 || !mine) return;
    float most = merged[0];
    for (int w = 1; w < kWarpsPerBlock; w++) most = fmaxf(most, merged[w * (kDims * kWarp + 2)]);
    float whole = 0, result[kDims] = {};
    for (int w = 0; w < kWarpsPerBlock; w++) {
        const int at = w * (kDims * kWarp + 2);
        const float share = __expf(merged[at] - most);
        whole += share * merged[at + 1];
        for (int i = 0; i < kDims; i++) result[i] += share * merged[at + 2 + dim + i];
    }
    for (int i = 0; i < kDims; i++) context[(long long)t * width + head * head_dim + dim + i] = result[i] / whole;
}
