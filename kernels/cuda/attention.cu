// Rotary embedding with the cache's new entries, and attention of new tokens over the cache.
//
// The cache holds one layer's keys and values as (P, H, D) float16, in pages of kPage positions; a token's sequence has its pages in any
// order: places (T, 2) are slots and positions, pages (slots, per_slot) each slot's pages. Few tokens: a block does one page for one query
// of one head: four warps, a warp four positions at once, 16 bytes of each key and value per lane, all asked for together, with an online
// softmax. The results of a query's blocks are combined afterwards, page after page. Whole pages of new tokens: a block does all pages for
// half a page of queries, which share what it reads. Either way a token's bits depend on nothing but its own query and the keys and values
// of its own text.
#include "device.cuh"

constexpr int kPage = 64;    // positions
constexpr int kAtOnce = 4;   // positions of a warp
constexpr int kDims = 8;     // dimensions of a head per lane: D is a multiple of 8 and at most 256
constexpr int kLane = kWarp + 4, kPerWarp = kDims * kLane + 2;  // where the warps' results lie: no two lanes meet in a bank
constexpr int kSplitsAtOnce = 4;
constexpr int kNumbers = 4;  // floats beside a part's D sums: the largest score, the sum of the weights, and two of nothing

// Where in the cache the page lies that a position of a slot is in.
template <typename Pages>
__device__ __forceinline__ long long page_of(const Pages& pages, int per_slot, int slot, int position) {
    return (long long)pages[(long long)slot * per_slot + position / kPage] * kPage;
}

// A number as float16 can hold it, as on the CPU: an infinity in the cache would make every later token NaN.
__device__ __forceinline__ __half saturated(float x) { return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

// qkv (parts, T, 3 * H * D) float32 -> q (T, H * D) rotated, keys (rotated) and values where places and pages say.
// rotary (P, 2, pairs): cosines, sines. Pairs are (2t, 2t + 1) of the first 2 * pairs dimensions. One thread per pair of dimensions.
extern "C" __global__ void rotary_cache(
    IN(float) qkv, IN(float) rotary, OUT(float) q, OUT(__half) keys, OUT(__half) values, IN(int) places, IN(int) pages, int parts,
    int tokens, int heads, int head_dim, int pairs, int per_slot) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int width = heads * head_dim, half_width = width / 2;
    if (i >= (long long)tokens * half_width) return;
    const int t = (int)(i / half_width), at = (int)(i % half_width) * 2, pair = at % head_dim / 2;
    const long long row = (long long)t * 3 * width + at, position = places[2 * t + 1], count = (long long)tokens * 3 * width;
    float two[3][2];
#pragma unroll
    for (int which = 0; which < 3; which++)
#pragma unroll
        for (int j = 0; j < 2; j++) two[which][j] = sum_of_parts(qkv, parts, count, row + which * width + j);
    if (pair < pairs) {
        const float c = rotary[(position * 2) * pairs + pair], s = rotary[(position * 2 + 1) * pairs + pair];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const float even = two[which][0], odd = two[which][1];
            two[which][0] = even * c - odd * s;
            two[which][1] = odd * c + even * s;
        }
    }
    const long long slot = (page_of(pages, per_slot, places[2 * t], (int)position) + position % kPage) * width + at;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        q[(long long)t * width + at + j] = two[0][j];
        keys[slot + j] = saturated(two[1][j]);
        values[slot + j] = saturated(two[2][j]);
    }
}

// partial (T, H, splits, D + kNumbers); grid (H, T, splits), kThreads threads. A token attends to its sequence's positions up to its own, of which
// split s does those on page s.
extern "C" __global__ void attention(
    IN(float) q, IN(__half) keys, IN(__half) values, OUT(float) partial, IN(int) places, IN(int) pages, int heads, int head_dim,
    int per_slot) {
    SHARED(float, merged, kWarpsPerBlock * kPerWarp);
    const int head = blockIdx.x, t = blockIdx.y, slot_of = places[2 * t], seen = places[2 * t + 1] + 1;
    const int begin = blockIdx.z * kPage, last = min(kPage, seen - begin) - 1;
    if (begin >= seen) return;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, width = heads * head_dim;
    const bool mine = kDims * lane < head_dim;
    const int dim = mine ? kDims * lane : 0;  // lanes beyond the head read what the first one does, and add none of it
    const float scale = rsqrtf((float)head_dim);
    float query[kDims], sum[kDims] = {};
    for (int i = 0; i < kDims; i++) query[i] = mine ? q[(long long)t * width + head * head_dim + dim + i] * scale : 0.0f;
    float largest = -1e30f, total = 0;
    const long long page_at = page_of(pages, per_slot, slot_of, begin) * width + head * head_dim + dim;
    for (int first = warp * kAtOnce; first <= last; first += kWarpsPerBlock * kAtOnce) {
        uint4 key[kAtOnce], value[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const long long slot = page_at + (long long)min(first + i, last) * width;
            key[i] = load_vector(keys, slot);
            value[i] = load_vector(values, slot);
        }
        float score[kAtOnce], next = largest;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            float wide[kDims], product = 0;
            widen_eight(key[i], wide);
#pragma unroll
            for (int j = 0; j < kDims; j++) product = fmaf(query[j], wide[j], product);
            score[i] = warp_sum(product);
            if (first + i <= last) next = fmaxf(next, score[i]);
        }
        const float fade = __expf(largest - next);
        largest = next;
        total *= fade;
#pragma unroll
        for (int j = 0; j < kDims; j++) sum[j] *= fade;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const float weight = first + i <= last ? __expf(score[i] - largest) : 0.0f;
            float wide[kDims];
            widen_eight(value[i], wide);
            total += weight;
#pragma unroll
            for (int j = 0; j < kDims; j++) sum[j] = fmaf(weight, wide[j], sum[j]);
        }
    }
    // merged: per warp the largest score, the sum of weights, and the weighted values.
    for (int i = 0; i < kDims; i++) merged[warp * kPerWarp + 2 + i * kLane + lane] = sum[i];
    if (lane == 0) {
        merged[warp * kPerWarp] = largest;
        merged[warp * kPerWarp + 1] = total;
    }
    __syncthreads();
    float most = merged[0];
    for (int w = 1; w < kWarpsPerBlock; w++) most = fmaxf(most, merged[w * kPerWarp]);
    float shares[kWarpsPerBlock], weights = 0;
    for (int w = 0; w < kWarpsPerBlock; w++) {
        shares[w] = __expf(merged[w * kPerWarp] - most);
        weights += shares[w] * merged[w * kPerWarp + 1];
    }
    const long long out = (((long long)t * heads + head) * gridDim.z + blockIdx.z) * (head_dim + kNumbers);
    for (int d = threadIdx.x; d < head_dim; d += kThreads) {
        float result = 0;
        for (int w = 0; w < kWarpsPerBlock; w++) result += shares[w] * merged[w * kPerWarp + 2 + d % kDims * kLane + d / kDims];
        partial[out + d] = result;
    }
    if (threadIdx.x == 0) {
        partial[out + head_dim] = most;
        partial[out + head_dim + 1] = weights;
    }
}

// context (T, H * D) of what attention() gave; grid (H, T), kThreads threads. Four dimensions a thread; threads that are left over share
// the splits.
extern "C" __global__ void combine_attention(
    IN(float) partial, OUT(float) context, IN(int) places, int heads, int head_dim, int splits) {
    SHARED(float, sums, kThreads * 5);
    const int head = blockIdx.x, t = blockIdx.y, lane = threadIdx.x % kWarp, stride = head_dim + kNumbers;
    const int used = places[2 * t + 1] / kPage + 1;
    const long long from = ((long long)t * heads + head) * splits * stride;
    float most = -1e30f;
    for (int split = lane; split < used; split += kWarp) most = fmaxf(most, partial[from + split * stride + head_dim]);
    most = warp_max(most);
    const int fours = head_dim / 4, teams = kThreads / fours, team = threadIdx.x / fours, four = threadIdx.x % fours;
    float sum[5] = {};
    if (team < teams) {
        for (int first = team; first < used; first += kSplitsAtOnce * teams) {
            uint4 values[kSplitsAtOnce];
            float largest[kSplitsAtOnce], total[kSplitsAtOnce];
#pragma unroll
            for (int i = 0; i < kSplitsAtOnce; i++) {
                const long long at = from + min(first + i * teams, used - 1) * stride;
                values[i] = load_vector(partial, at + 4 * four);
                largest[i] = partial[at + head_dim];
                total[i] = partial[at + head_dim + 1];
            }
#pragma unroll
            for (int i = 0; i < kSplitsAtOnce; i++) {
                const float share = first + i * teams < used ? __expf(largest[i] - most) : 0.0f;
                sum[0] = fmaf(share, __uint_as_float(values[i].x), sum[0]);
                sum[1] = fmaf(share, __uint_as_float(values[i].y), sum[1]);
                sum[2] = fmaf(share, __uint_as_float(values[i].z), sum[2]);
                sum[3] = fmaf(share, __uint_as_float(values[i].w), sum[3]);
                sum[4] = fmaf(share, total[i], sum[4]);
            }
        }
    }
    for (int i = 0; i < 5; i++) sums[i * kThreads + threadIdx.x] = sum[i];
    __syncthreads();
    if (team > 0) return;
    for (int other = 1; other < teams; other++)
        for (int i = 0; i < 5; i++) sum[i] += sums[i * kThreads + other * fours + four];
    const float share = 1.0f / sum[4];
    for (int i = 0; i < 4; i++) context[((long long)t * heads + head) * head_dim + 4 * four + i] = sum[i] * share;
}

// ---- whole pages of new tokens

constexpr int kQueries = 4;                        // of a warp: their sums over the values lie in registers
constexpr int kPageThreads = 256, kHalfPage = kPageThreads / kWarp * kQueries;
constexpr int kKeyVectors = 16, kKeyRow = kKeyVectors + 1;  // of each key at a time, in a row of which no two lanes meet in a bank
constexpr int kValueRows = 32;                     // of the page's values at a time
constexpr int kStaged = kPage * kKeyRow;           // vectors of 16 bytes: keys (kPage, kKeyRow) or values (kValueRows, kWarp)

// context (T, H * D) for T tokens of whole pages, each page one sequence's from its first position to its last; grid (H, T / kHalfPage),
// kPageThreads threads. The last queries come first: they have the most to do. Of a page of keys a lane scores two positions for all of its
// warp's queries, of the values it sums eight dimensions; both come to shared memory as float16 and are widened once for the queries.
extern "C" __global__ void __launch_bounds__(kPageThreads, 2) attention_of_pages(
    IN(float) q, IN(__half) keys, IN(__half) values, OUT(float) context, IN(int) places, IN(int) pages, int heads, int head_dim,
    int per_slot) {
    SHARED(uint4, staged, kStaged);
    SHARED(uint4, weights, kPageThreads / kWarp * kPage);  // of a warp's four queries at each position
    const int head = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * kHalfPage, slot_of = places[2 * first];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, width = heads * head_dim, vectors = head_dim / 8;
    const int position = places[2 * first + 1] + warp * kQueries;  // of the warp's first query
    const int own_page = position / kPage, seen = position % kPage;
    const bool mine = lane < vectors;
    const long long query = (long long)(first + warp * kQueries) * width + head * head_dim;
    const float scale = rsqrtf((float)head_dim);
    float sums[kQueries][kDims] = {};
    float largest = -1e30f, total = 0;  // of the query that is this lane's number
#pragma unroll 1
    for (int page = 0; page <= own_page; page++) {
        const bool last = page == own_page;
        const long long page_at = page_of(pages, per_slot, slot_of, page * kPage) * width + head * head_dim;
        float scores[kQueries][2] = {};
#pragma unroll 1
        for (int begin = 0; begin < vectors; begin += kKeyVectors) {
            const int count = min(kKeyVectors, vectors - begin);
            __syncthreads();  // nobody reads any more what lies there
            for (int i = threadIdx.x; i < kPage * kKeyVectors; i += kPageThreads) {
                const int row = i / kKeyVectors, vector = i % kKeyVectors;
                if (vector < count)
                    staged[row * kKeyRow + vector] = load_vector(keys, page_at + (long long)row * width + 8 * (begin + vector));
            }
            __syncthreads();
            long long at = query + 8 * begin;
#pragma unroll 1
            for (int vector = 0; vector < count; vector++, at += 8) {
                const uint4 words[2] = {staged[lane * kKeyRow + vector], staged[(lane + kWarp) * kKeyRow + vector]};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float key[2][4];
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        widen_four(half ? words[i].z : words[i].x, half ? words[i].w : words[i].y, key[i]);
                    long long row = at + 4 * half;
#pragma unroll
                    for (int j = 0; j < kQueries; j++, row += width) {
                        const uint4 four = load_vector(q, row);
                        const float some[4] = {
                            __uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z), __uint_as_float(four.w)};
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            scores[j][0] = fmaf(some[i], key[0][i], scores[j][0]);
                            scores[j][1] = fmaf(some[i], key[1][i], scores[j][1]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kQueries; j++) {
            const bool sees[2] = {!last || lane <= seen + j, !last || lane + kWarp <= seen + j};
#pragma unroll
            for (int i = 0; i < 2; i++) scores[j][i] = sees[i] ? scores[j][i] * scale : -1e30f;
            const float before = __shfl_sync(kFullMask, largest, j);
            const float most = fmaxf(before, warp_max(fmaxf(scores[j][0], scores[j][1])));
            const float fade = __expf(before - most);
#pragma unroll
            for (int i = 0; i < 2; i++) scores[j][i] = sees[i] ? __expf(scores[j][i] - most) : 0.0f;
            const float sum = warp_sum(scores[j][0] + scores[j][1]);
            if (lane == j) {
                largest = most;
                total = fmaf(total, fade, sum);
            }
#pragma unroll
            for (int i = 0; i < kDims; i++) sums[j][i] *= fade;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            weights[warp * kPage + i * kWarp + lane] = {
                __float_as_uint(scores[0][i]), __float_as_uint(scores[1][i]), __float_as_uint(scores[2][i]),
                __float_as_uint(scores[3][i])};
#pragma unroll 1
        for (int begin = 0; begin < kPage; begin += kValueRows) {
            __syncthreads();
            for (int i = threadIdx.x; i < kValueRows * kWarp; i += kPageThreads) {
                const int row = i / kWarp, vector = i % kWarp;
                if (vector < vectors) staged[i] = load_vector(values, page_at + (long long)(begin + row) * width + 8 * vector);
            }
            __syncthreads();
            if (!mine) continue;
#pragma unroll 4
            for (int row = 0; row < kValueRows; row++) {
                float value[8];
                widen_eight(staged[row * kWarp + lane], value);
                const uint4 four = weights[warp * kPage + begin + row];
                const float weight[kQueries] = {
                    __uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z), __uint_as_float(four.w)};
#pragma unroll
                for (int j = 0; j < kQueries; j++)
#pragma unroll
                    for (int i = 0; i < kDims; i++) sums[j][i] = fmaf(weight[j], value[i], sums[j][i]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kQueries; j++) {
        const float share = 1.0f / __shfl_sync(kFullMask, total, j);
        if (!mine) continue;
#pragma unroll
        for (int half = 0; half < 2; half++)
            store_vector(
                context, query + (long long)j * width + kDims * lane + 4 * half,
                {__float_as_uint(sums[j][4 * half] * share), __float_as_uint(sums[j][4 * half + 1] * share),
                 __float_as_uint(sums[j][4 * half + 2] * share), __float_as_uint(sums[j][4 * half + 3] * share)});
    }
}
