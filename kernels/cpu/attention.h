// Attention of new tokens, each over its own sequence's pages in one layer of the cache.
//
// Few rows: every (token, head, page) is softmaxed on its own and the pages are merged in their order, so that threads can
// share one head's long past and the result depends on nothing but the token's position. Whole rows: two sgemms per head
// and tile of positions, over a widened copy of its keys or values.
//
// Keys and values are rows of one kind or the other (HalfRows, ByteRows). Of numbers in int8 the scale is taken out of the
// sums: a position's score is multiplied with its key's, its weight with its value's.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace moss {

constexpr int64_t kFewTokens = MOSS_FEW_TOKENS;  // few rows that are worked on at once

// One layer's keys or values in float16.
struct HalfRows {
    using Number = uint16_t;
    static constexpr bool kScaled = false;
    Number* numbers;  // (P, H, D)

    static F load(const Number* p, int n) { return load_half_n(p, n); }
    void skip(int64_t count, int64_t) { numbers += count; }
};

// In int8, each head's at a position with its scale.
struct ByteRows {
    using Number = int8_t;
    static constexpr bool kScaled = true;
    Number* numbers;  // (P, H, D)
    float* scales;    // (P / kPage, H, kPage)

    void skip(int64_t count, int64_t head_dim) {
        numbers += count;
        scales += count / head_dim;
    }
    static F load(const Number* p, int n) {
        return n == kLanes ? Simd::load_signed(p) : Simd::load_signed_partial(p, n);
    }
};

template <class R>
struct Attention {
    const float* q;          // (T, C), already divided by sqrt(head_dim)
    R keys, values;
    float* result;           // (T, C)
    float* partial;          // (few tokens, H, pages, D + 2) at most: sums, then the largest score and the sum of weights
    const int32_t *places, *pages;  // (T, 2): slot and position; (slots, pages_per_slot)
    Pass pass;
    int64_t pages_per_slot, heads, head_dim;

    int64_t width() const { return heads * head_dim; }
    int64_t slot(int64_t t) const { return places[2 * t]; }
    int64_t position(int64_t t) const { return places[2 * t + 1]; }
    // Number of a page of token t's sequence, and where it begins in keys and values.
    int64_t page(int64_t t, int64_t group) const { return pages[slot(t) * pages_per_slot + group]; }
    int64_t page_at(int64_t t, int64_t group) const { return page(t, group) * kPage * width(); }
    // x[j] times the scale of position j of the page, as far as there are any.
    void scale(const R& rows, int64_t page, int64_t head, int64_t count, float* x) const {
        if constexpr (R::kScaled) {
            const float* scales = rows.scales + (page * heads + head) * kPage;
            for_lanes(count, [&](int64_t j, int n) { store_n(x + j, Simd::mul(load_n(x + j, n), load_n(scales + j, n)), n); });
        }
    }
};

// New tokens of one sequence that follow one another, and the pages that they see.
struct Run {
    int64_t first, tokens, position;

    int64_t groups() const { return (position + tokens + kPage - 1) / kPage; }
};

// Up to kFewTokens few rows, from `first` on.
struct FewRows {
    int64_t first, tokens, groups = 0, run_pages = 0;  // groups: the most of a run; run_pages: those of all runs
    int64_t count = 0;
    Run runs[kFewTokens];

    template <class R>
    FewRows(const Attention<R>& a, int64_t first_, int64_t tokens_) : first(first_), tokens(tokens_) {
        for (int64_t t = first; t < first + tokens; t++) {
            const bool follows = t > first && a.slot(t) == a.slot(t - 1) && a.position(t) == a.position(t - 1) + 1;
            if (follows) runs[count - 1].tokens++;
            else runs[count++] = {t, 1, a.position(t)};
        }
        for (int64_t i = 0; i < count; i++) {
            groups = std::max(groups, runs[i].groups());
            run_pages += runs[i].groups();
        }
    }
    // Number `index` of the pages that the runs see: its run, and which of the run's pages it is.
    const Run& run_page(int64_t index, int64_t& group) const {
        int64_t i = 0;
        for (; index >= runs[i].groups(); i++) index -= runs[i].groups();
        group = index;
        return runs[i];
    }
    template <class R>
    float* part(const Attention<R>& a, int64_t t, int64_t head, int64_t group) const {
        return a.partial + (((t - first) * a.heads + head) * groups + group) * (a.head_dim + 2);
    }
};

// Four positions further on: the cache is read four rows at a time.
template <class Number>
inline void prefetch_rows(const Number* p, int64_t stride) { __builtin_prefetch(p + 4 * stride, 0, 2); }

constexpr int kTogether = Simd::kRegisters >= 32 ? 4 : 2;  // tokens whose sums fit into registers

// body(number, t) for the tokens first <= t < end, up to kTogether of them at a time: t and what follows, `number` in all.
template <int kTokens = kTogether, class Body>
inline void for_together(int64_t first, int64_t end, Body body) {
    for (; first + kTokens <= end; first += kTokens) body(std::integral_constant<int, kTokens>(), first);
    if constexpr (kTokens > 1) for_together<kTokens - 1>(first, end, body);
}

// scores[t][j] = k[j] . q[t] for kTokens tokens and four positions, of which the last `missing` do not exist: they repeat one
// that does. Keys are widened once for all tokens.
template <int kTokens, class R>
inline void four_scores(const typename R::Number* k, int64_t stride, int64_t missing, const float* q, int64_t head_dim,
                        float* scores, int64_t lds) {
    const typename R::Number* rows[4];
    F sums[kTokens][4];
    MOSS_UNROLL
    for (int j = 0; j < 4; j++) {
        rows[j] = k + std::min<int64_t>(j, 3 - missing) * stride;
        MOSS_UNROLL
        for (int t = 0; t < kTokens; t++) sums[t][j] = Simd::zero();
    }
    for_lanes(head_dim, [&](int64_t d, int n) {
        F x[kTokens];
        MOSS_UNROLL
        for (int t = 0; t < kTokens; t++) x[t] = load_n(q + t * stride + d, n);
        MOSS_UNROLL
        for (int j = 0; j < 4; j++) {
            prefetch_rows(rows[j] + d, stride);
            const F key = R::load(rows[j] + d, n);
            MOSS_UNROLL
            for (int t = 0; t < kTokens; t++) sums[t][j] = Simd::fma(key, x[t], sums[t][j]);
        }
    });
    MOSS_UNROLL
    for (int t = 0; t < kTokens; t++) Simd::sum4(sums[t][0], sums[t][1], sums[t][2], sums[t][3], scores + t * lds);
}

// weights[j] = e^(scores[j] - largest) in place, zero from count up to the end of the vector; returns their sum.
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
    F most = Simd::set1(x[0]);
    for_lanes(count, [&](int64_t i, int n) {
        if (n == kLanes) most = Simd::max(most, Simd::load(x + i));
        else
            for (int lane = 0; lane < n; lane++) most = Simd::max(most, Simd::set1(x[i + lane]));
    });
    return Simd::largest(most);
}

// sums[t][d] += weights[t][j] * v[j][d] for kTokens tokens, `count` positions in their order, and kVectors vectors of which the
// last has n lanes.
template <int kTokens, int kVectors, class R>
inline void weigh_vectors(const typename R::Number* v, int64_t stride, int64_t count, const float* weights, int64_t lds, int n,
                          float* sums, int64_t ld) {
    F sum[kTokens][kVectors];
    MOSS_UNROLL
    for (int t = 0; t < kTokens; t++)
        MOSS_UNROLL
        for (int i = 0; i < kVectors; i++) sum[t][i] = load_n(sums + t * ld + i * kLanes, n);
    for (int64_t j = 0; j < count; j++, v += stride) {
        F value[kVectors];
        MOSS_UNROLL
        for (int i = 0; i < kVectors; i++) {
            prefetch_rows(v + i * kLanes, stride);
            value[i] = R::load(v + i * kLanes, n);
        }
        MOSS_UNROLL
        for (int t = 0; t < kTokens; t++) {
            const F weight = Simd::set1(weights[t * lds + j]);
            MOSS_UNROLL
            for (int i = 0; i < kVectors; i++) sum[t][i] = Simd::fma(weight, value[i], sum[t][i]);
        }
    }
    MOSS_UNROLL
    for (int t = 0; t < kTokens; t++)
        MOSS_UNROLL
        for (int i = 0; i < kVectors; i++) store_n(sums + t * ld + i * kLanes, sum[t][i], n);
}

template <int kTokens, class R>
inline void weigh(const typename R::Number* v, int64_t stride, int64_t count, const float* weights, int64_t lds,
                  int64_t head_dim, float* sums, int64_t ld) {
    constexpr int kVectors = 4;
    int64_t d = 0;
    for (; d + kVectors * kLanes <= head_dim; d += kVectors * kLanes)
        weigh_vectors<kTokens, kVectors, R>(v + d, stride, count, weights, lds, kLanes, sums + d, ld);
    for_lanes(head_dim - d, [&](int64_t i, int n) {
        weigh_vectors<kTokens, 1, R>(v + d + i, stride, count, weights, lds, n, sums + d + i, ld);
    });
}

// What one thread works on at a time: one page, a few tokens of a sequence, and heads that lie side by side in the cache.
// For a single token it walks through the cache position by position, so that it reads memory in long runs.
struct Task {
    int64_t group, first_token, end_token, first_head, end_head;
};

constexpr int64_t kTaskTokens = 4, kScores = kPage + kLanes;
constexpr int64_t kWalked = 16;  // positions whose values several tokens take at a time

template <class R>
inline void attend_task(const Attention<R>& a, const FewRows& few, const Task& task) {
    const int64_t begin = task.group * kPage, at_page = a.page_at(task.first_token, task.group), stride = a.width();
    const int64_t tokens = task.end_token - task.first_token, heads = task.end_head - task.first_head;
    const int64_t page = a.page(task.first_token, task.group), lds = heads * kScores;
    const typename R::Number *k = a.keys.numbers + at_page, *v = a.values.numbers + at_page;
    float* all_scores = scratch<Widened>(tokens * lds);
    auto count = [&](int64_t t) { return std::min(kPage, a.position(t) + 1 - begin); };
    auto scores = [&](int64_t t, int64_t head) {
        return all_scores + (t - task.first_token) * lds + (head - task.first_head) * kScores;
    };
    auto sums = [&](int64_t t, int64_t head) { return few.part(a, t, head, task.group); };
    auto for_heads = [&](auto body) {
        for (int64_t head = task.first_head; head < task.end_head; head++) body(head, head * a.head_dim);
    };
    for_together(task.first_token, task.end_token, [&](auto number, int64_t t) {
        const int64_t seen = count(t + number - 1);  // more than the first ones see, who do not use it
        for (int64_t j = 0; j < seen; j += 4)
            for_heads([&](int64_t head, int64_t at) {
                four_scores<number, R>(k + j * stride + at, stride, std::max<int64_t>(0, j + 4 - seen), a.q + t * stride + at,
                                       a.head_dim, scores(t, head) + j, lds);
            });
    });
    for (int64_t t = task.first_token; t < task.end_token; t++)
        for_heads([&](int64_t head, int64_t) {
            float *own = scores(t, head), *part = sums(t, head);
            a.scale(a.keys, page, head, count(t), own);
            const float largest = largest_of(own, count(t));
            std::fill(part, part + a.head_dim, 0.0f);
            part[a.head_dim] = largest;
            part[a.head_dim + 1] = exponentials(own, count(t), largest);
            a.scale(a.values, page, head, count(t), own);
        });
    const int64_t ld = a.heads * few.groups * (a.head_dim + 2);
    auto weigh_head = [&](auto number, int64_t t, int64_t head, int64_t at, int64_t first, int64_t end) {
        weigh<number, R>(v + first * stride + at, stride, end - first, scores(t, head) + first, lds, a.head_dim, sums(t, head), ld);
    };
    for_together(task.first_token, task.end_token, [&](auto number, int64_t t) {
        constexpr std::integral_constant<int, 1> one;
        const int64_t shared = count(t), step = number > 1 ? kWalked : 4;
        for (int64_t j = 0; j < shared; j += step)
            for_heads([&](int64_t head, int64_t at) { weigh_head(number, t, head, at, j, std::min(shared, j + step)); });
        for (int64_t later = t + 1; later < t + number; later++)
            for_heads([&](int64_t head, int64_t at) { weigh_head(one, later, head, at, shared, count(later)); });
    });
}

template <class R>
inline void merge_groups(const Attention<R>& a, const FewRows& few, int64_t t, int64_t head) {
    const int64_t groups = a.position(t) / kPage + 1, head_dim = a.head_dim;
    float largest = few.part(a, t, head, 0)[head_dim], total = 0.0f;
    for (int64_t g = 1; g < groups; g++) largest = std::max(largest, few.part(a, t, head, g)[head_dim]);
    float* result = a.result + t * a.width() + head * head_dim;
    std::fill(result, result + head_dim, 0.0f);
    for (int64_t g = 0; g < groups; g++) {
        const float* sums = few.part(a, t, head, g);
        const float factor = std::exp(sums[head_dim] - largest);
        total = total + factor * sums[head_dim + 1];
        const F scale = Simd::set1(factor);
        for_lanes(head_dim, [&](int64_t d, int n) {
            store_n(result + d, Simd::fma(scale, load_n(sums + d, n), load_n(result + d, n)), n);
        });
    }
    for (int64_t d = 0; d < head_dim; d++) result[d] = result[d] / total;
}

// Heads per task: enough tasks for all threads to end together, and long runs in memory.
template <class R>
inline int64_t heads_per_task(const Attention<R>& a, int64_t run_pages) {
    constexpr int64_t kTasksPerThread = 2, kLeastRun = 256;
    const int64_t wanted = (kTasksPerThread * omp_get_num_threads() + run_pages - 1) / run_pages;
    return std::min(a.heads, std::max((a.heads + wanted - 1) / wanted, (kLeastRun + a.head_dim - 1) / a.head_dim));
}

template <class R>
inline void attend_few(const Attention<R>& a, const FewRows& few) {
    const int64_t step = heads_per_task(a, few.run_pages);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < few.run_pages; i++)
        for (int64_t head = 0; head < a.heads; head += step) {
            int64_t group;
            const Run& run = few.run_page(i, group);
            const int64_t end = run.first + run.tokens;
            int64_t t = run.first + std::max<int64_t>(0, group * kPage - run.position);  // the first that sees this page
            for (; t < end; t += kTaskTokens)
                attend_task(a, few, {group, t, std::min(end, t + kTaskTokens), head, std::min(a.heads, head + step)});
        }
#pragma omp for collapse(2) schedule(static)
    for (int64_t t = few.first; t < few.first + few.tokens; t++)
        for (int64_t head = 0; head < a.heads; head++) merge_groups(a, few, t, head);
}

#ifdef MOSS_ONEDNN

constexpr int64_t kTilePositions = MOSS_TILE_POSITIONS;
static_assert(kTilePositions % kPage == 0, "a tile is a number of pages");

// One head's rows of a page.
template <class R>
inline void widen_head(const Attention<R>& a, const R& cache, int64_t page, int64_t head, float* result) {
    const int64_t stride = a.width(), head_dim = a.head_dim;
    const typename R::Number* rows = cache.numbers + page * kPage * stride + head * head_dim;
    for (int64_t j = 0; j < kPage; j++) {
        F scale = Simd::zero();
        if constexpr (R::kScaled) scale = Simd::set1(cache.scales[(page * a.heads + head) * kPage + j]);
        for_lanes(head_dim, [&](int64_t d, int n) {
            const F numbers = R::load(rows + j * stride + d, n);
            store_n(result + j * head_dim + d, R::kScaled ? Simd::mul(numbers, scale) : numbers, n);
        });
    }
}

// One head of the page whose tokens begin at row `first`.
template <class R>
inline void attend_page(const Attention<R>& a, int64_t head, int64_t first) {
    const int64_t seen = a.position(first) + kPage, stride = a.width(), offset = head * a.head_dim;
    const int64_t lds = seen + kGap;
    float* tile = scratch<Widened>(std::min(seen, kTilePositions) * a.head_dim + kPage * lds);
    float* scores = tile + std::min(seen, kTilePositions) * a.head_dim;
    auto for_tiles = [&](const R& cache, auto body) {  // body(j, positions) with each tile's rows widened
        for (int64_t j = 0; j < seen; j += kTilePositions) {
            const int64_t positions = std::min(kTilePositions, seen - j);
            for (int64_t i = 0; i < positions; i += kPage)
                widen_head(a, cache, a.page(first, (j + i) / kPage), head, tile + i * a.head_dim);
            body(j, positions);
        }
    };
    for_tiles(a.keys, [&](int64_t j, int64_t positions) {
        const float* q = a.q + first * stride + offset;
        sgemm(true, kPage, positions, a.head_dim, q, stride, tile, a.head_dim, false, scores + j, lds);
    });
    float* result = a.result + first * stride + offset;
    float totals[kPage];
    for (int64_t t = 0; t < kPage; t++) {
        float* row = scores + t * lds;
        const int64_t own = a.position(first + t) + 1;  // what this token may see
        totals[t] = exponentials(row, own, largest_of(row, own));
        std::fill(row + own, row + seen, 0.0f);
    }
    for_tiles(a.values, [&](int64_t j, int64_t positions) {
        sgemm(false, kPage, a.head_dim, positions, scores + j, lds, tile, a.head_dim, j > 0, result, stride);
    });
    for (int64_t t = 0; t < kPage; t++)
        for (int64_t d = 0; d < a.head_dim; d++) result[t * stride + d] /= totals[t];
}

template <class R>
inline void attend_whole(const Attention<R>& a) {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t head = 0; head < a.heads; head++)
        for (int64_t first = 0; first < a.pass.whole; first += kPage) attend_page(a, head, first);
}

#endif

// To be called by every thread of a parallel region.
template <class R>
inline void attend(const Attention<R>& a) {
#ifdef MOSS_ONEDNN
    if (a.pass.whole) attend_whole(a);
#endif
    for (int64_t first = a.pass.whole; first < a.pass.tokens; first += kFewTokens)  // `partial` holds that many
        attend_few(a, FewRows(a, first, std::min(kFewTokens, a.pass.tokens - first)));
}

}  // namespace moss
