// One CodeGen block in one parallel region: h + attention(a) + mlp(a) with a = layer_norm(h).
#pragma once

#include "adapters.h"
#include "attention.h"
#include "lost_file.h"
#include "packed.h"
#include "python_lock.h"

namespace moss {

template <class M>
struct Block {
    const float* h;                                // (T, C)
    const uint16_t *norm_weight, *norm_bias;       // (C,)
    M qkv, out_proj, fc_in, fc_out;
    const uint16_t *fc_in_bias, *fc_out_bias;
    uint16_t *keys, *values;                       // (P, H, D) of this layer, page after page
    const int32_t *places, *pages;                 // (T, 2): slot and position; (slots, pages_per_slot)
    const float* rotary;                           // (positions, 2, pairs)
    float* result;                                 // (T, C)
    float* workspace;
    Adapters adapters;
    int64_t tokens, whole, pages_per_slot, heads, head_dim, pairs;
    float epsilon;

    int64_t width() const { return heads * head_dim; }
};

// Where the intermediate results lie in the workspace; kernels/needs.py counts the same.
template <class M>
struct Workspace {
    const Pass pass;
    float *normed, *q, *attended, *inner;              // (T, C), (T, C), (T, C), (T, I)
    float* low[2];                                     // (T, most_rank): of two products at a time
    Inputs qkv_x, fc_in_x, out_x, fc_out_x;            // inputs in each matrix's own order
    float* partial;

    explicit Workspace(const Block<M>& b) : pass(b.tokens, b.whole) {
        float* free = aligned(b.workspace);
        auto take = [&](int64_t columns) {
            float* part = free;
            free += b.tokens * columns;
            return part;
        };
        const int64_t width = b.width(), inner_width = b.fc_in.n;
        normed = take(width);
        q = take(width);
        attended = take(width);
        inner = take(inner_width);
        auto inputs = [&](const M& m, float* plain) {
            const bool whole = pass.whole && (m.order || M::kInWords);
            const bool few = pass.whole < pass.tokens && (m.order || m.arranged());
            const InputRows same{plain, m.k};
            const InputRows other = whole || few ? InputRows{take(input_floats(m.k)), input_floats(m.k)} : same;
            return Inputs{whole ? other : same, few ? other : same, rows_of_gemm<M>(m.k, pass)};
        };
        qkv_x = inputs(b.qkv, normed);
        const bool as_qkv = !b.qkv.order && !b.fc_in.order && b.qkv.group_size() == b.fc_in.group_size();
        fc_in_x = as_qkv ? qkv_x : inputs(b.fc_in, normed);
        out_x = inputs(b.out_proj, attended);
        fc_out_x = inputs(b.fc_out, inner);
        for (float*& one : low) one = take(b.adapters.most_rank);
        partial = free;
    }
};

// Rows first .. end of the qkv product for all tokens: queries are scaled, keys and values go to the cache.
template <class M>
inline void keep_qkv(const Block<M>& b, float* q, float* rows, int64_t first, int64_t end, int64_t ld) {
    const int64_t width = b.width(), head_dim = b.head_dim;
    const float scale = 1.0f / std::sqrt((float)head_dim);
    for (int64_t t = 0; t < b.tokens; t++) {
        const int64_t position = b.places[2 * t + 1];
        const int64_t page = b.pages[b.places[2 * t] * b.pages_per_slot + position / kPage];
        const int64_t at = (page * kPage + position % kPage) * width;
        const float* table = b.rotary + position * 2 * b.pairs;
        for (int64_t n = first; n < end;) {  // in segments, each within one head of one of the three parts
            const int64_t part = n / width, column = n % width, in_head = column % head_dim;
            const int64_t count = std::min(head_dim - in_head, end - n);
            float* segment = rows + t * ld + (n - first);
            if (part < 2 && in_head < 2 * b.pairs)
                rotate_pairs(segment, table, b.pairs, in_head / 2, std::min(b.pairs - in_head / 2, count / 2));
            if (part == 0)
                for (int64_t i = 0; i < count; i++) q[t * width + column + i] = segment[i] * scale;
            else
                narrow_row(segment, count, (part == 1 ? b.keys : b.values) + at + column);
            n += count;
        }
    }
}

// Work that the threads share, one queue for each product's rows.
template <class M>
struct Queues {
    RowQueue qkv, fc_in, output;

    Queues(const Block<M>& b, const Pass& pass)
        : qkv(row_queue(b.qkv.n, b.qkv.row_bytes(), pass)),
          fc_in(row_queue(b.fc_in.n, b.fc_in.row_bytes(), pass)),
          output(row_queue(b.width(), b.out_proj.row_bytes() + b.fc_out.row_bytes(), pass)) {}
};

// Both products that read the normed input.
template <class M>
inline void block_input(const Block<M>& b, const Workspace<M>& w, Queues<M>& queues) {
    const int64_t tokens = b.tokens, inner = b.fc_in.n;
    const int64_t ld = std::max(queues.qkv.most_rows(), queues.fc_in.most_rows());
    float* y = scratch<Results>(ld * tokens);
    for (Rows rows = queues.qkv.take(); rows.first < rows.end; rows = queues.qkv.take()) {
        product(b.qkv, rows.first, rows.end, w.qkv_x, w.pass, y, ld, false);
        add_low_rank(b.adapters, kQkv, w.low[0], tokens, b.qkv.n, rows, y, ld);
        keep_qkv(b, w.q, y, rows.first, rows.end, ld);
    }
    for (Rows rows = queues.fc_in.take(); rows.first < rows.end; rows = queues.fc_in.take()) {
        product(b.fc_in, rows.first, rows.end, w.fc_in_x, w.pass, y, ld, false);
        add_low_rank(b.adapters, kFcIn, w.low[1], tokens, inner, rows, y, ld);
        for (int64_t t = 0; t < tokens; t++)
            gelu_row(y + t * ld, b.fc_in_bias + rows.first, rows.end - rows.first, w.inner + t * inner + rows.first);
    }
#pragma omp barrier
}

template <class M>
inline void block_output(const Block<M>& b, const Workspace<M>& w, Queues<M>& queues) {
    const int64_t tokens = b.tokens, width = b.width(), ld = queues.output.most_rows();
    float* y = scratch<Results>(ld * tokens);
    for (Rows rows = queues.output.take(); rows.first < rows.end; rows = queues.output.take()) {
        product(b.out_proj, rows.first, rows.end, w.out_x, w.pass, y, ld, false);
        product(b.fc_out, rows.first, rows.end, w.fc_out_x, w.pass, y, ld, true);
        add_low_rank(b.adapters, kOutProj, w.low[0], tokens, width, rows, y, ld);
        add_low_rank(b.adapters, kFcOut, w.low[1], tokens, width, rows, y, ld);
        for (int64_t t = 0; t < tokens; t++)
            for_lanes(rows.end - rows.first, [&](int64_t i, int n) {
                const F sum = Simd::add(load_n(y + t * ld + i, n), load_half_n(b.fc_out_bias + rows.first + i, n));
                const int64_t at = t * width + rows.first + i;
                store_n(b.result + at, Simd::add(load_n(b.h + at, n), sum), n);
            });
    }
}

template <class M>
inline void run_block(const Block<M>& b) {
    const Workspace<M> w(b);
    const Attention attention{w.q,     b.keys,  b.values,         w.attended, w.partial, b.places,
                              b.pages, w.pass,  b.pages_per_slot, b.heads,    b.head_dim};
    Queues<M> queues(b, w.pass);
    const int64_t tokens = b.tokens, width = b.width();
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            layer_norm(b.h + t * width, b.norm_weight, b.norm_bias, b.epsilon, width, w.normed + t * width);
            arrange(b.qkv, w.qkv_x, w.pass, t, w.normed);
            const bool shared = w.fc_in_x.whole.x == w.qkv_x.whole.x && w.fc_in_x.few.x == w.qkv_x.few.x;
            if (!shared) arrange(b.fc_in, w.fc_in_x, w.pass, t, w.normed);
        }
        to_low_rank(b.adapters, kQkv, w.normed, tokens, width, w.low[0]);
        to_low_rank(b.adapters, kFcIn, w.normed, tokens, width, w.low[1]);
        block_input(b, w, queues);
        if (w.fc_out_x.apart(w.inner)) {
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < tokens; t++) arrange(b.fc_out, w.fc_out_x, w.pass, t, w.inner);
        }
        attend(attention);
        if (w.out_x.apart(w.attended)) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t++) arrange(b.out_proj, w.out_x, w.pass, t, w.attended);
        }
        to_low_rank(b.adapters, kOutProj, w.attended, tokens, width, w.low[0]);
        to_low_rank(b.adapters, kFcOut, w.inner, tokens, b.fc_in.n, w.low[1]);
        block_output(b, w, queues);
    }
#ifdef MOSS_ONEDNN
    if (w.pass.whole) give_back();
#endif
}

}  // namespace moss
