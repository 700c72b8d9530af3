// A whole CodeGen block in one parallel region: h + attention(a) + mlp(a) with a = layer_norm(h).
#pragma once

#include "attention.h"
#include "packed.h"

namespace moss {

template <class M>
struct Block {
    const float* h;                                // (T, C)
    const uint16_t *norm_weight, *norm_bias;       // (C,)
    M qkv, out_proj, fc_in, fc_out;
    const uint16_t *fc_in_bias, *fc_out_bias;
    uint16_t *keys, *values;                       // (P, H, D) of this layer
    const float* rotary;                           // (positions, 2, pairs)
    float* result;                                 // (T, C)
    float* workspace;
    int64_t tokens, start_pos, heads, head_dim, pairs;
    float epsilon;

    int64_t width() const { return heads * head_dim; }
};

// Where the intermediate results lie in the workspace; operators.py computes the same size.
template <class M>
struct Workspace {
    float *normed, *q, *attended, *inner;              // (T, C), (T, C), (T, C), (T, I)
    float *qkv_x, *fc_in_x, *out_x, *fc_out_x;         // inputs in each matrix's own order
    float* partial;

    explicit Workspace(const Block<M>& b) {
        float* free = b.workspace;
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
        qkv_x = b.qkv.order ? take(width) : normed;
        fc_in_x = b.fc_in.order ? take(width) : normed;
        out_x = b.out_proj.order ? take(width) : attended;
        fc_out_x = b.fc_out.order ? take(inner_width) : inner;
        partial = free;
    }
};

// An index out of range, which only a damaged model folder holds, reads the last input and nothing beyond it.
inline void gather(const float* x, const int32_t* order, int64_t count, float* result) {
    if (order)
        for (int64_t i = 0; i < count; i++) result[i] = x[std::min<uint32_t>((uint32_t)order[i], (uint32_t)count - 1)];
}

// Rows first .. end of the qkv product for all tokens: queries are scaled, keys and values go to the cache.
template <class M>
inline void keep_qkv(const Block<M>& b, float* q, float* rows, int64_t first, int64_t end, int64_t ld) {
    const int64_t width = b.width(), head_dim = b.head_dim;
    const float scale = 1.0f / std::sqrt((float)head_dim);
    for (int64_t t = 0; t < b.tokens; t++) {
        const int64_t position = b.start_pos + t;
        const float* table = b.rotary + position * 2 * b.pairs;
        for (int64_t n = first; n < end;) {  // piece by piece, each within one head of one of the three parts
            const int64_t part = n / width, column = n % width, in_head = column % head_dim;
            const int64_t count = std::min(head_dim - in_head, end - n);
            float* piece = rows + t * ld + (n - first);
            if (part < 2 && in_head < 2 * b.pairs)
                rotate_pairs(piece, table, b.pairs, in_head / 2, std::min(b.pairs - in_head / 2, count / 2));
            if (part == 0)
                for (int64_t i = 0; i < count; i++) q[t * width + column + i] = piece[i] * scale;
            else
                narrow_row(piece, count, (part == 1 ? b.keys : b.values) + position * width + column);
            n += count;
        }
    }
}

// Both products that read the normed input; their chunks form one queue of work.
template <class M>
inline void block_input(const Block<M>& b, const Workspace<M>& w) {
    struct Rows;
    const int64_t tokens = b.tokens, inner = b.fc_in.n;
    const int64_t size = chunk_rows(b.qkv.row_bytes(), tokens);
    const int64_t qkv_chunks = (b.qkv.n + size - 1) / size, inner_chunks = (inner + size - 1) / size;
    float* y = scratch<Rows>(size * tokens);
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < qkv_chunks + inner_chunks; chunk++) {
        if (chunk < qkv_chunks) {
            const int64_t first = chunk * size, end = std::min(b.qkv.n, first + size);
            product(b.qkv, first, end, w.qkv_x, b.width(), tokens, y, size, false);
            keep_qkv(b, w.q, y, first, end, size);
        } else {
            const int64_t first = (chunk - qkv_chunks) * size, end = std::min(inner, first + size);
            product(b.fc_in, first, end, w.fc_in_x, b.width(), tokens, y, size, false);
            for (int64_t t = 0; t < tokens; t++)
                gelu_row(y + t * size, b.fc_in_bias + first, end - first, w.inner + t * inner + first);
        }
    }
}

template <class M>
inline void block_output(const Block<M>& b, const Workspace<M>& w) {
    struct Rows;
    const int64_t tokens = b.tokens, width = b.width();
    const int64_t size = chunk_rows(b.out_proj.row_bytes() + b.fc_out.row_bytes(), tokens);
    float* y = scratch<Rows>(size * tokens);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < width; first += size) {
        const int64_t end = std::min(width, first + size);
        product(b.out_proj, first, end, w.out_x, width, tokens, y, size, false);
        product(b.fc_out, first, end, w.fc_out_x, b.fc_out.k, tokens, y, size, true);
        for (int64_t t = 0; t < tokens; t++)
            for_lanes(end - first, [&](int64_t i, int n) {
                const F sum = Simd::add(load_n(y + t * size + i, n), load_half_n(b.fc_out_bias + first + i, n));
                const int64_t at = t * width + first + i;
                store_n(b.result + at, Simd::add(load_n(b.h + at, n), sum), n);
            });
    }
}

template <class M>
inline void run_block(const Block<M>& b) {
    const Workspace<M> w(b);
    const Attention attention{w.q,      b.keys,      b.values, w.attended, w.partial,
                              b.tokens, b.start_pos, b.heads,  b.head_dim};
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < b.tokens; t++) {
            float* row = w.normed + t * b.width();
            layer_norm(b.h + t * b.width(), b.norm_weight, b.norm_bias, b.epsilon, b.width(), row);
            gather(row, b.qkv.order, b.width(), w.qkv_x + t * b.width());
            gather(row, b.fc_in.order, b.width(), w.fc_in_x + t * b.width());
        }
        block_input(b, w);
        attend(attention);
        if (b.out_proj.order || b.fc_out.order) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < b.tokens; t++) {
                gather(w.attended + t * b.width(), b.out_proj.order, b.width(), w.out_x + t * b.width());
                gather(w.inner + t * b.fc_out.k, b.fc_out.order, b.fc_out.k, w.fc_out_x + t * b.fc_out.k);
            }
        }
        block_output(b, w);
    }
}

}  // namespace moss
