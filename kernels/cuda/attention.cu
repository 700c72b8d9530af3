// Rotary embedding with the cache's new entries, and attention of new tokens over the cache.
//
// The cache holds one layer's keys and values as (P, H, D), in pages of kPage positions; a token's sequence has its pages in any
// order: places (T, 2) are slots and positions, pages (slots, per_slot) each slot's pages. Few tokens: a block does one page for one query
// of one head: teams of lanes, each four positions at once, 16 bytes of each key and value per lane, all asked for together, with an online
// softmax. The results of a query's blocks are combined afterwards, page after page. Whole pages of new tokens: a block does all pages for
// half a page of queries, which share what it reads. Either way a token's bits depend on nothing but its own query and the keys and values
// of its own text.
//
// Numbers of the cache are float16, or int8 with scales (P / kPage, H, kPage) of each head's vectors, as the CPU writes them. A scale is
// taken out of the sums: a position's score is multiplied with its key's, its weight with its value's.
#include "device.cuh"

constexpr int kPage = 64;    // positions
constexpr int kAtOnce = 4;   // positions of a team
constexpr int kMostDims = 256;
constexpr int kSplitsAtOnce = 4;
constexpr int kNumbers = 4;  // floats beside a part's D sums: the largest score, the sum of the weights, and two of nothing

// Numbers of the cache in 16 bytes: of a head, whose D is a multiple of that and at most kMostDims. And whether they have scales.
template <typename Number>
constexpr int kPerVector = 16 / sizeof(Number);
template <typename Number>
constexpr bool kScaled = sizeof(Number) == 1;

__device__ __forceinline__ void widen_vector(uint4 words, float (&out)[8]) { widen_eight(words, out); }
__device__ __forceinline__ void widen_vector(uint4 words, float (&out)[16]) {
    const unsigned all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 16; i++) out[i] = byte_of(all[i / 4] ^ 0x80808080u, i % 4);
}

// Number of the cache's page that a position of a slot is in.
template <typename Pages>
__device__ __forceinline__ long long page_of(const Pages& pages, int per_slot, int slot, int position) {
    return pages[(long long)slot * per_slot + position / kPage];
}

// A number as float16 can hold it, as on the CPU: an infinity in the cache would make every later token NaN.
__device__ __forceinline__ float saturated(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

// qkv (parts, T, 3 * H * D) float32 -> q (T, H * D) rotated, keys (rotated) and values where places and pages say.
// rotary (P, 2, pairs): cosines, sines. Pairs are (2t, 2t + 1) of the first 2 * pairs dimensions. Grid (H, T), a thread per pair of
// dimensions of a head, in full warps.
template <typename Number>
__device__ __forceinline__ void rotate_and_keep(
    IN(float) qkv, IN(float) rotary, OUT(float) q, OUT(Number) keys, OUT(Number) values, OUT(float) key_scales, OUT(float) value_scales,
    IN(int) places, IN(int) pages, int parts, int head_dim, int pairs, int per_slot) {
    const int head = blockIdx.x, heads = gridDim.x, t = blockIdx.y, pair = threadIdx.x, width = heads * head_dim;
    const int at = head * head_dim + 2 * pair, position = places[2 * t + 1];
    const bool mine = 2 * pair < head_dim;
    const long long row = (long long)t * 3 * width + at, count = (long long)gridDim.y * 3 * width;
    float two[3][2] = {};
    if (mine) {
#pragma unroll
        for (int which = 0; which < 3; which++)
#pragma unroll
            for (int j = 0; j < 2; j++) two[which][j] = sum_of_parts(qkv, parts, count, row + which * width + j);
    }
    if (pair < pairs) {
        const long long angle = (long long)position * 2 * pairs + pair;
        const float c = rotary[angle], s = rotary[angle + pairs];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const float even = two[which][0], odd = two[which][1];
            two[which][0] = even * c - odd * s;
            two[which][1] = odd * c + even * s;
        }
    }
    const long long page = page_of(pages, per_slot, places[2 * t], position), lies = (page * kPage + position % kPage) * width + at;
    for (int j = 0; j < 2 && mine; j++) q[(long long)t * width + at + j] = two[0][j];
#pragma unroll
    for (int which = 1; which < 3; which++)
#pragma unroll
        for (int j = 0; j < 2; j++) two[which][j] = saturated(two[which][j]);
    if constexpr (!kScaled<Number>) {
        for (int j = 0; j < 2 && mine; j++) {
            keys[lies + j] = __float2half_rn(two[1][j]);
            values[lies + j] = __float2half_rn(two[2][j]);
        }
    } else {
        constexpr float kLeast = 1e-30f;  // what is smaller is zero, for its scale has no reciprocal
        SHARED(float, largest, 2 * kWarpsPerBlock);
        for (int which = 0; which < 2; which++) {
            const float most = warp_max(fmaxf(fabsf(two[which + 1][0]), fabsf(two[which + 1][1])));
            if (threadIdx.x % kWarp == 0) largest[which * kWarpsPerBlock + threadIdx.x / kWarp] = most;
        }
        __syncthreads();
#pragma unroll
        for (int which = 0; which < 2; which++) {
            float most = 0;
            for (int warp = 0; warp < (int)blockDim.x / kWarp; warp++) most = fmaxf(most, largest[which * kWarpsPerBlock + warp]);
            const float reciprocal = most < kLeast ? 0.0f : 127.0f / most;
            auto& numbers = which == 0 ? keys : values;
            for (int j = 0; j < 2 && mine; j++) numbers[lies + j] = (signed char)__float2int_rn(two[which + 1][j] * reciprocal);
            auto& scales = which == 0 ? key_scales : value_scales;
            if (pair == 0) scales[(page * heads + head) * kPage + position % kPage] = most < kLeast ? 0.0f : most / 127.0f;
        }
    }
}

// partial (T, H, splits, D + kNumbers); grid (H, T, splits), kThreads threads. A token attends to its sequence's positions up to its own, of which
// split s does those on page s.
template <typename Number>
__device__ __forceinline__ void attend_to_page(
    IN(float) q, IN(Number) keys, IN(Number) values, IN(float) key_scales, IN(float) value_scales, OUT(float) partial, IN(int) places,
    IN(int) pages, int heads, int head_dim, int per_slot) {
    constexpr int kDims = kPerVector<Number>, kLanes = kMostDims / kDims, kTeams = kThreads / kLanes;
    constexpr int kLane = kLanes + kWarp / kDims, kPerTeam = kDims * kLane + kWarp / 2;  // no two lanes meet in a bank
    SHARED(float, merged, kTeams * kPerTeam);
    const int head = blockIdx.x, t = blockIdx.y, slot_of = places[2 * t], seen = places[2 * t + 1] + 1;
    const int begin = blockIdx.z * kPage, last = min(kPage, seen - begin) - 1;
    if (begin >= seen) return;
    const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, width = heads * head_dim;
    const bool mine = kDims * lane < head_dim;
    const int dim = mine ? kDims * lane : 0;  // lanes beyond the head read what the first one does, and add none of it
    const float scale = rsqrtf((float)head_dim);
    float query[kDims], sum[kDims] = {};
    for (int i = 0; i < kDims; i++) query[i] = mine ? q[(long long)t * width + head * head_dim + dim + i] * scale : 0.0f;
    float largest = -1e30f, total = 0;
    const long long page = page_of(pages, per_slot, slot_of, begin), page_at = page * kPage * width + head * head_dim + dim;
    constexpr int kOfWarp = kWarp / kLanes * kAtOnce;  // positions of a warp, whose teams shuffle together
    for (int begin_of_warp = threadIdx.x / kWarp * kOfWarp; begin_of_warp <= last; begin_of_warp += kWarpsPerBlock * kOfWarp) {
        const int first = begin_of_warp + threadIdx.x % kWarp / kLanes * kAtOnce;
        uint4 key[kAtOnce], value[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const long long slot = page_at + (long long)min(first + i, last) * width;
            key[i] = load_vector(keys, slot);
            value[i] = load_vector(values, slot);
        }
        float key_scale[kAtOnce], value_scale[kAtOnce];
        if constexpr (kScaled<Number>) {
            const long long scales_at = (page * heads + head) * kPage + first;
            as_floats(load_vector(key_scales, scales_at), key_scale);
            as_floats(load_vector(value_scales, scales_at), value_scale);
        }
        float score[kAtOnce], next = largest;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            float wide[kDims], product = 0;
            widen_vector(key[i], wide);
#pragma unroll
            for (int j = 0; j < kDims; j++) product = fmaf(query[j], wide[j], product);
            score[i] = warp_sum<kLanes>(product);
            if constexpr (kScaled<Number>) score[i] *= key_scale[i];
            if (first + i <= last) next = fmaxf(next, score[i]);
        }
        const float fade = __expf(largest - next);
        largest = next;
        total *= fade;
#pragma unroll
        for (int j = 0; j < kDims; j++) sum[j] *= fade;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const bool there = first + i <= last;  // scales beyond the last one may be no numbers
            float weight = there ? __expf(score[i] - largest) : 0.0f, wide[kDims];
            widen_vector(value[i], wide);
            total += weight;
            if constexpr (kScaled<Number>) weight = there ? weight * value_scale[i] : 0.0f;
#pragma unroll
            for (int j = 0; j < kDims; j++) sum[j] = fmaf(weight, wide[j], sum[j]);
        }
    }
    // merged: per team the largest score, the sum of weights, and the weighted values.
    for (int i = 0; i < kDims; i++) merged[team * kPerTeam + 2 + i * kLane + lane] = sum[i];
    if (lane == 0) {
        merged[team * kPerTeam] = largest;
        merged[team * kPerTeam + 1] = total;
    }
    __syncthreads();
    float most = merged[0];
    for (int i = 1; i < kTeams; i++) most = fmaxf(most, merged[i * kPerTeam]);
    float shares[kTeams], weights = 0;
    for (int i = 0; i < kTeams; i++) {
        shares[i] = __expf(merged[i * kPerTeam] - most);
        weights += shares[i] * merged[i * kPerTeam + 1];
    }
    const long long out = (((long long)t * heads + head) * gridDim.z + blockIdx.z) * (head_dim + kNumbers);
    for (int d = threadIdx.x; d < head_dim; d += kThreads) {
        float result = 0;
        for (int i = 0; i < kTeams; i++) result += shares[i] * merged[i * kPerTeam + 2 + d % kDims * kLane + d / kDims];
        partial[out + d] = result;
    }
    if (threadIdx.x == 0) {
        partial[out + head_dim] = most;
        partial[out + head_dim + 1] = weights;
    }
}

// context (T, H * D) of what attend_to_page() gave; grid (H, T), kThreads threads. Four dimensions a thread; threads that are left over share
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

constexpr int kQueries = 4, kDims = 8;             // of a warp, and of a lane: their sums over the values lie in registers
constexpr int kPageThreads = 256, kHalfPage = kPageThreads / kWarp * kQueries;
constexpr int kKeyVectors = 16, kKeyRow = kKeyVectors + 1;  // of each key at a time, in a row of which no two lanes meet in a bank
constexpr int kValueRows = 32;                     // of the page's values at a time
constexpr int kStaged = kPage * kKeyRow;           // vectors of 16 bytes: keys (kPage, kKeyRow) or values (kValueRows, kWarp)

// What 16 bytes of the cache are in float16, as one vector or two from staged[to] on. Of two, every other four lanes of eight write the
// second one first: their banks are those that the others leave.
template <typename Staged>
__device__ __forceinline__ void stage(Staged& staged, int to, uint4 words, __half) { staged[to] = words; }
template <typename Staged>
__device__ __forceinline__ void stage(Staged& staged, int to, uint4 words, signed char) {
    float wide[16];
    widen_vector(words, wide);
    uint4 two[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float* eight = wide + 8 * i;
        two[i] = {narrow(eight[0], eight[1]), narrow(eight[2], eight[3]), narrow(eight[4], eight[5]), narrow(eight[6], eight[7])};
    }
    const int begin = to / 8 % 2;
    staged[to + begin] = begin ? two[1] : two[0];
    staged[to + 1 - begin] = begin ? two[0] : two[1];
}

// context (T, H * D) for T tokens of whole pages, each page one sequence's from its first position to its last; grid (H, T / kHalfPage),
// kPageThreads threads. The last queries come first: they have the most to do. Of a page of keys a lane scores two positions for all of its
// warp's queries, of the values it sums eight dimensions; both come to shared memory as float16 and are widened once for the queries.
template <typename Number>
__device__ __forceinline__ void attend_to_pages(
    IN(float) q, IN(Number) keys, IN(Number) values, IN(float) key_scales, IN(float) value_scales, OUT(float) context, IN(int) places,
    IN(int) pages, int heads, int head_dim, int per_slot) {
    constexpr int kWide = 2 / sizeof(Number);  // vectors of float16 that 16 bytes of the cache are
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
        const long long number = page_of(pages, per_slot, slot_of, page * kPage), page_at = number * kPage * width + head * head_dim;
        float scores[kQueries][2] = {};
#pragma unroll 1
        for (int begin = 0; begin < vectors; begin += kKeyVectors) {
            const int count = min(kKeyVectors, vectors - begin);
            __syncthreads();  // nobody reads any more what lies there
            for (int i = kWide * threadIdx.x; i < kPage * kKeyVectors; i += kWide * kPageThreads) {
                const int row = i / kKeyVectors, vector = i % kKeyVectors;
                if (vector < count)
                    stage(
                        staged, row * kKeyRow + vector, load_vector(keys, page_at + (long long)row * width + 8 * (begin + vector)),
                        Number());
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
                        float some[4];
                        as_floats(load_vector(q, row), some);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            scores[j][0] = fmaf(some[i], key[0][i], scores[j][0]);
                            scores[j][1] = fmaf(some[i], key[1][i], scores[j][1]);
                        }
                    }
                }
            }
        }
        float of_scores[2] = {scale, scale}, of_weights[2] = {1, 1};
        if constexpr (kScaled<Number>) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const long long at = (number * heads + head) * kPage + i * kWarp + lane;
                of_scores[i] *= key_scales[at];
                of_weights[i] = value_scales[at];
            }
        }
#pragma unroll
        for (int j = 0; j < kQueries; j++) {
            const bool sees[2] = {!last || lane <= seen + j, !last || lane + kWarp <= seen + j};
#pragma unroll
            for (int i = 0; i < 2; i++) scores[j][i] = sees[i] ? scores[j][i] * of_scores[i] : -1e30f;
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
#pragma unroll
            for (int i = 0; i < 2; i++) scores[j][i] *= of_weights[i];
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            weights[warp * kPage + i * kWarp + lane] = {
                __float_as_uint(scores[0][i]), __float_as_uint(scores[1][i]), __float_as_uint(scores[2][i]),
                __float_as_uint(scores[3][i])};
#pragma unroll 1
        for (int begin = 0; begin < kPage; begin += kValueRows) {
            __syncthreads();
            for (int i = kWide * threadIdx.x; i < kValueRows * kWarp; i += kWide * kPageThreads) {
                const int row = i / kWarp, vector = i % kWarp;
                if (vector < vectors)
                    stage(staged, i, load_vector(values, page_at + (long long)(begin + row) * width + 8 * vector), Number());
            }
            __syncthreads();
            if (!mine) continue;
#pragma unroll 4
            for (int row = 0; row < kValueRows; row++) {
                float value[8];
                widen_eight(staged[row * kWarp + lane], value);
                float weight[kQueries];
                as_floats(weights[warp * kPage + begin + row], weight);
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

// ---- the kernels, for either kind of cache

#define KERNELS(SUFFIX, NUMBER)                                                                                                    \
    extern "C" __global__ void rotary_cache##SUFFIX(                                                                               \
        IN(float) qkv, IN(float) rotary, OUT(float) q, OUT(NUMBER) keys, OUT(NUMBER) values, OUT(float) key_scales,                \
        OUT(float) value_scales, IN(int) places, IN(int) pages, int parts, int head_dim, int pairs, int per_slot) {                \
        rotate_and_keep<NUMBER>(                                                                                                   \
            qkv, rotary, q, keys, values, key_scales, value_scales, places, pages, parts, head_dim, pairs, per_slot);              \
    }                                                                                                                              \
    extern "C" __global__ void attention##SUFFIX(                                                                                  \
        IN(float) q, IN(NUMBER) keys, IN(NUMBER) values, IN(float) key_scales, IN(float) value_scales, OUT(float) partial,         \
        IN(int) places, IN(int) pages, int heads, int head_dim, int per_slot) {                                                    \
        attend_to_page<NUMBER>(q, keys, values, key_scales, value_scales, partial, places, pages, heads, head_dim, per_slot);      \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(kPageThreads, 2) attention_of_pages##SUFFIX(                                      \
        IN(float) q, IN(NUMBER) keys, IN(NUMBER) values, IN(float) key_scales, IN(float) value_scales, OUT(float) context,         \
        IN(int) places, IN(int) pages, int heads, int head_dim, int per_slot) {                                                    \
        attend_to_pages<NUMBER>(q, keys, values, key_scales, value_scales, context, places, pages, heads, head_dim, per_slot);     \
    }

KERNELS(, __half)
KERNELS(_int8, signed char)
