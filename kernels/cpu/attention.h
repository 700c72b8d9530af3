// Attention of new tokens over one layer of the float16 cache.
//
// Few tokens: the positions are cut into groups; every (token, head, group) is softmaxed on its own and the groups
// are merged in their order, so that threads can share one head's long past and the result depends on nothing but the
// token's position. Many tokens: two sgemms per head and tile of positions, over a widened copy of its keys or values.
#pragma once

#include "gemm.h"

namespace moss {

constexpr int64_t kGroup = MOSS_ATTENTION_GROUP;
constexpr int64_t kManyTokens = MOSS_FEW_TOKENS + 1;  // from here on two sgemms per head are ahead

struct Attention {
    const float* q;          // (T, C), already divided by sqrt(head_dim)
    const uint16_t* keys;    // (P, H, D) float16: one layer
    const uint16_t* values;
    float* result;           // (T, C)
    float* partial;          // (few tokens, H, groups, D + 2) at most: sums, then the largest score and the sum of weights
    int64_t tokens, start_pos, heads, head_dim;

    int64_t width() const { return heads * head_dim; }
    int64_t groups() const { return (start_pos + tokens + kGroup - 1) / kGroup; }
    float* part(int64_t t, int64_t head, int64_t group) const {
        return partial + ((t * heads + head) * groups() + group) * (head_dim + 2);
    }
};

// Four positions further on: the cache is read four rows at a time.
inline void prefetch_rows(const uint16_t* p, int64_t stride) { __builtin_prefetch(p + 4 * stride, 0, 2); }

// scores[j] = k[j] . q for four positions, of which the last `missing` do not exist: they repeat one that does.
inline void four_scores(const uint16_t* k, int64_t stride, int64_t missing, const float* q, int64_t head_dim,
                        float* scores) {
    const uint16_t* rows[4];
    F sums[4];
    MOSS_UNROLL
    for (int j = 0; j < 4; j++) {
        rows[j] = k + std::min<int64_t>(j, 3 - missing) * stride;
        sums[j] = Simd::zero();
    }
    for_lanes(head_dim, [&](int64_t d, int n) {
        const F x = load_n(q + d, n);
        MOSS_UNROLL
        for (int j = 0; j < 4; j++) {
            prefetch_rows(rows[j] + d, stride);
            sums[j] = Simd::fma(load_half_n(rows[j] + d, n), x, sums[j]);
        }
    });
    Simd::sum4(sums[0], sums[1], sums[2], sums[3], scores);
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
    F most = Simd::set1(x[0]);
    for_lanes(count, [&](int64_t i, int n) {
        if (n == kLanes) most = Simd::max(most, Simd::load(x + i));
        else
            for (int lane = 0; lane < n; lane++) most = Simd::max(most, Simd::set1(x[i + lane]));
    });
    return Simd::largest(most);
}

// sums[d] += weights[j] * v[j][d] for four positions, of which the last `missing` do not exist and have no weight.
inline void weigh_four(const uint16_t* v, int64_t stride, int64_t missing, const float* weights, int64_t head_dim,
                       float* sums) {
    const uint16_t* rows[4];
    MOSS_UNROLL
    for (int j = 0; j < 4; j++) rows[j] = v + std::min<int64_t>(j, 3 - missing) * stride;
    for_lanes(head_dim, [&](int64_t d, int n) {
        F sum = load_n(sums + d, n);
        MOSS_UNROLL
        for (int j = 0; j < 4; j++) {
            prefetch_rows(rows[j] + d, stride);
            sum = Simd::fma(Simd::set1(weights[j]), load_half_n(rows[j] + d, n), sum);
        }
        store_n(sums + d, sum, n);
    });
}

// What one thread works on at a time: one group of positions, a few tokens, and heads that lie side by side in the cache.
// It walks through the cache position by position, so that it reads memory in long runs.
struct Piece {
    int64_t group, first_token, end_token, first_head, end_head;
};

constexpr int64_t kPieceTokens = 4, kScores = kGroup + kLanes;

inline void attend_piece(const Attention& a, const Piece& piece) {
    const int64_t begin = piece.group * kGroup, stride = a.width(), heads = piece.end_head - piece.first_head;
    const int64_t tokens = piece.end_token - piece.first_token;
    const uint16_t *k = a.keys + begin * stride, *v = a.values + begin * stride;
    float* all_scores = scratch<Widened>(tokens * heads * kScores);
    auto count = [&](int64_t t) { return std::min(kGroup, a.start_pos + t + 1 - begin); };
    auto scores = [&](int64_t t, int64_t head) {
        return all_scores + ((t - piece.first_token) * heads + head - piece.first_head) * kScores;
    };
    auto for_four = [&](auto body) {  // body(t, head, j, missing) over all that the tokens see, four positions at a time
        for (int64_t j = 0; j < count(piece.end_token - 1); j += 4)
            for (int64_t t = piece.first_token; t < piece.end_token; t++)
                for (int64_t head = piece.first_head; j < count(t) && head < piece.end_head; head++)
                    body(t, head, j, std::max<int64_t>(0, j + 4 - count(t)));
    };
    for_four([&](int64_t t, int64_t head, int64_t j, int64_t missing) {
        const int64_t at = head * a.head_dim;
        four_scores(k + j * stride + at, stride, missing, a.q + t * stride + at, a.head_dim, scores(t, head) + j);
    });
    for (int64_t t = piece.first_token; t < piece.end_token; t++)
        for (int64_t head = piece.first_head; head < piece.end_head; head++) {
            float *own = scores(t, head), *sums = a.part(t, head, piece.group);
            const float largest = largest_of(own, count(t));
            std::fill(sums, sums + a.head_dim, 0.0f);
            sums[a.head_dim] = largest;
            sums[a.head_dim + 1] = exponentials(own, count(t), largest);
        }
    for_four([&](int64_t t, int64_t head, int64_t j, int64_t missing) {
        const int64_t at = head * a.head_dim;
        weigh_four(v + j * stride + at, stride, missing, scores(t, head) + j, a.head_dim, a.part(t, head, piece.group));
    });
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

// Heads per piece: enough pieces for all threads to end together, and long runs in memory.
inline int64_t piece_heads(const Attention& a) {
    constexpr int64_t kPiecesPerThread = 2, kLeastRun = 256;
    const int64_t pieces = (kPiecesPerThread * omp_get_num_threads() + a.groups() - 1) / a.groups();
    return std::min(a.heads, std::max((a.heads + pieces - 1) / pieces, (kLeastRun + a.head_dim - 1) / a.head_dim));
}

inline void attend_few(const Attention& a) {
    const int64_t step = piece_heads(a);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t group = 0; group < a.groups(); group++)
        for (int64_t head = 0; head < a.heads; head += step) {
            int64_t t = std::max<int64_t>(0, group * kGroup - a.start_pos);  // the first token that sees this group
            for (; t < a.tokens; t += kPieceTokens)
                attend_piece(a, {group, t, std::min(a.tokens, t + kPieceTokens), head, std::min(a.heads, head + step)});
        }
#pragma omp for collapse(2) schedule(static)
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t head = 0; head < a.heads; head++) merge_groups(a, t, head);
}

#ifdef MOSS_ONEDNN

constexpr int64_t kTilePositions = MOSS_TILE_POSITIONS;

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
    float* tile = scratch<Widened>(std::min(seen, kTilePositions) * a.head_dim + count * lds);
    float* scores = tile + std::min(seen, kTilePositions) * a.head_dim;
    auto for_tiles = [&](const uint16_t* cache, auto body) {  // body(j, positions) with each tile's rows widened
        for (int64_t j = 0; j < seen; j += kTilePositions) {
            const int64_t positions = std::min(kTilePositions, seen - j);
            widen_head(cache + j * stride + offset, stride, positions, a.head_dim, tile);
            body(j, positions);
        }
    };
    for_tiles(a.keys, [&](int64_t j, int64_t positions) {
        const float* q = a.q + first * stride + offset;
        sgemm(true, count, positions, a.head_dim, q, stride, tile, a.head_dim, false, scores + j, lds);
    });
    float* result = a.result + first * stride + offset;
    float totals[kTileRows];
    for (int64_t t = 0; t < count; t++) {
        float* row = scores + t * lds;
        const int64_t own = a.start_pos + first + t + 1;  // what this token may see
        totals[t] = exponentials(row, own, largest_of(row, own));
        std::fill(row + own, row + seen, 0.0f);
    }
    for_tiles(a.values, [&](int64_t j, int64_t positions) {
        sgemm(false, count, a.head_dim, positions, scores + j, lds, tile, a.head_dim, j > 0, result, stride);
    });
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < a.head_dim; d++) result[t * stride + d] /= totals[t];
}

inline void attend_many(const Attention& a) {
    constexpr int64_t kBlock = MOSS_ATTENTION_TOKENS;
    static_assert(kBlock <= kTileRows, "totals");
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t head = 0; head < a.heads; head++)
        for (int64_t first = 0; first < a.tokens; first += kBlock)
            attend_block(a, head, first, std::min(kBlock, a.tokens - first));
}

#endif

// To be called by every thread of a parallel region.
inline void attend(const Attention& a) {
#ifdef MOSS_ONEDNN
    if (a.tokens >= kManyTokens) return attend_many(a);
#endif
    for (int64_t first = 0; first < a.tokens; first += kManyTokens - 1) {  // `partial` has room for that many
        Attention few = a;
        few.q += first * a.width();
        few.result += first * a.width();
        few.start_pos += first;
        few.tokens = std::min(kManyTokens - 1, a.tokens - first);
        attend_few(few);
    }
}

}  // namespace moss
