// Attention of new tokens over one layer of the float16 cache.
//
// Few tokens: the positions are cut into groups of 128; every (token, head, group) is softmaxed on its own and the groups
// are merged in their order, so that threads can share one head's long past and the result depends on nothing but the
// token's position. Many tokens: two sgemms per head over a widened copy of its keys and values.
#pragma once

#include "gemm.h"

namespace moss {

constexpr int64_t kGroup = 128;

struct Attention {
    const float* q;          // (T, C), already divided by sqrt(head_dim)
    const uint16_t* keys;    // (P, H, D) float16: one layer
    const uint16_t* values;
    float* result;           // (T, C)
    float* partial;          // (T, H, groups, D + 2) for few tokens: sums, then the largest score and the sum of weights
    int64_t tokens, start_pos, heads, head_dim;

    int64_t width() const { return heads * head_dim; }
    int64_t groups() const { return (start_pos + tokens + kGroup - 1) / kGroup; }
    float* part(int64_t t, int64_t head, int64_t group) const {
        return partial + ((t * heads + head) * groups() + group) * (head_dim + 2);
    }
};

inline float dot_half(const uint16_t* k, const float* q, int64_t count) {
    F sum = Simd::zero();
    for_lanes(count, [&](int64_t i, int n) { sum = Simd::fma(load_half_n(k + i, n), load_n(q + i, n), sum); });
    return Simd::sum(sum);
}

// weights[j] = e^(scores[j] - largest) in place, zero from count up to the next whole vector; returns their sum.
inline float exponentials(float* scores, int64_t count, float largest) {
    const F most = Simd::set1(largest);
    F sum = Simd::zero();
    for_lanes(count, [&](int64_t i, int n) {
        Simd::store(scores + i, exp(Simd::sub(load_n(scores + i, n), most)));
        for (int lane = n; lane < kLanes; lane++) scores[i + lane] = 0.0f;
        sum = Simd::add(sum, Simd::load(scores + i));
    });
    return Simd::sum(sum);
}

inline float largest_of(const float* x, int64_t count) {
    float most = x[0];
    for (int64_t i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// sums[d] += weight[j] * v[j][d], four positions at a time, each sum in the order of j.
inline void weigh_values(const uint16_t* v, int64_t stride, const float* weight, int64_t count, int64_t head_dim,
                         float* sums) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4)
        for_lanes(head_dim, [&](int64_t d, int n) {
            F sum = load_n(sums + d, n);
            for (int i = 0; i < 4; i++)
                sum = Simd::fma(Simd::set1(weight[j + i]), load_half_n(v + (j + i) * stride + d, n), sum);
            store_n(sums + d, sum, n);
        });
    for (; j < count; j++)
        for_lanes(head_dim, [&](int64_t d, int n) {
            const F sum = load_n(sums + d, n);
            store_n(sums + d, Simd::fma(Simd::set1(weight[j]), load_half_n(v + j * stride + d, n), sum), n);
        });
}

// One token over positions group * 128 .. for the heads first_head .. end_head, which lie side by side in the cache.
inline void attend_group(const Attention& a, int64_t t, int64_t group, int64_t first_head, int64_t end_head) {
    const int64_t begin = group * kGroup, stride = a.width();
    const int64_t count = std::min(kGroup, a.start_pos + t + 1 - begin);
    const uint16_t *k = a.keys + begin * stride, *v = a.values + begin * stride;
    for (int64_t head = first_head; head < end_head; head++) {
        const int64_t offset = head * a.head_dim;
        float scores[kGroup + kLanes];
        for (int64_t j = 0; j < count; j++)
            scores[j] = dot_half(k + j * stride + offset, a.q + t * stride + offset, a.head_dim);
        float* sums = a.part(t, head, group);
        const float largest = largest_of(scores, count);
        sums[a.head_dim] = largest;
        sums[a.head_dim + 1] = exponentials(scores, count, largest);
        std::fill(sums, sums + a.head_dim, 0.0f);
        weigh_values(v + offset, stride, scores, count, a.head_dim, sums);
    }
}

inline void merge_groups(const Attention& a, int64_t t, int64_t head) {
    const int64_t groups = (a.start_pos + t) / kGroup + 1, head_dim = a.head_dim;
    float largest = a.part(t, head, 0)[head_dim], total = 0.0f;
    for (int64_t g = 1; g < groups; g++) largest = std::max(largest, a.part(t, head, g)[head_dim]);
    float* result = a.result + t * a.width() + head * head_dim;
    std::fill(result, result + head_dim, 0.0f);
    for (int64_t g = 0; g < groups; g++) {
        const float* sums = a.part(t, head, g);
        const float factor = std::exp(sums[head_dim] - largest);
        total = total + factor * sums[head_dim + 1];
        const F scale = Simd::set1(factor);
        for_lanes(head_dim, [&](int64_t d, int n) {
            store_n(result + d, Simd::fma(scale, load_n(sums + d, n), load_n(result + d, n)), n);
        });
    }
    for (int64_t d = 0; d < head_dim; d++) result[d] = result[d] / total;
}

// To be called by every thread of a parallel region.
inline void attend_few(const Attention& a) {
    constexpr int64_t kTaskWidth = 256;  // cache elements of one position that one task reads: whole cache lines in a row
    const int64_t per_task = std::max<int64_t>(1, kTaskWidth / a.head_dim);
    const int64_t head_tasks = (a.heads + per_task - 1) / per_task;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t group = 0; group < a.groups(); group++)
        for (int64_t task = 0; task < head_tasks; task++)
            for (int64_t t = std::max<int64_t>(0, group * kGroup - a.start_pos); t < a.tokens; t++)
                attend_group(a, t, group, task * per_task, std::min(a.heads, (task + 1) * per_task));
#pragma omp for collapse(2) schedule(static)
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t head = 0; head < a.heads; head++) merge_groups(a, t, head);
}

#ifdef MOSS_ONEDNN

inline void widen_head(const uint16_t* rows, int64_t stride, int64_t count, int64_t head_dim, float* result) {
    for (int64_t j = 0; j < count; j++)
        for_lanes(head_dim, [&](int64_t d, int n) {
            store_n(result + j * head_dim + d, load_half_n(rows + j * stride + d, n), n);
        });
}

// Tokens first .. first + count of one head.
inline void attend_block(const Attention& a, int64_t head, int64_t first, int64_t count) {
    const int64_t seen = a.start_pos + first + count, stride = a.width(), offset = head * a.head_dim;
    const int64_t lds = (seen + kLanes - 1) / kLanes * kLanes;
    struct Block;
    float* k = scratch<Block>(2 * seen * a.head_dim + count * lds);
    float *v = k + seen * a.head_dim, *scores = v + seen * a.head_dim;
    widen_head(a.keys + offset, stride, seen, a.head_dim, k);
    widen_head(a.values + offset, stride, seen, a.head_dim, v);
    sgemm(true, count, seen, a.head_dim, a.q + first * stride + offset, stride, k, a.head_dim, false, scores, lds);
    float* result = a.result + first * stride + offset;
    float totals[kTileRows];
    for (int64_t t = 0; t < count; t++) {
        float* row = scores + t * lds;
        const int64_t own = a.start_pos + first + t + 1;  // what this token may see
        totals[t] = exponentials(row, own, largest_of(row, own));
        std::fill(row + own, row + seen, 0.0f);
    }
    sgemm(false, count, a.head_dim, seen, scores, lds, v, a.head_dim, false, result, stride);
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < a.head_dim; d++) result[t * stride + d] /= totals[t];
}

// To be called by every thread of a parallel region.
inline void attend_many(const Attention& a) {
    constexpr int64_t kBlock = 64;
    static_assert(kBlock <= kTileRows, "totals");
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t head = 0; head < a.heads; head++)
        for (int64_t first = 0; first < a.tokens; first += kBlock)
            attend_block(a, head, first, std::min(kBlock, a.tokens - first));
}

#endif

inline void attend(const Attention& a) {
#ifdef MOSS_ONEDNN
    if (many(a.tokens)) return attend_many(a);
#endif
    attend_few(a);
}

}  // namespace moss
