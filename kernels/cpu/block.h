// CodeGen blocks in one parallel region: h + attention(a) + mlp(a) with a = layer_norm(h). A result may lie where h does.
#pragma once

#include <array>
#include <deque>

#include "adapters.h"
#include "attention.h"
#include "lost_file.h"
#include "packed.h"
#include "python_lock.h"

namespace moss {

// M: the matrices' kind; R: the cache's, HalfRows or ByteRows.
template <class M, class R = HalfRows>
struct Block {
    const float* h;                                // (T, C)
    const uint16_t *norm_weight, *norm_bias;       // (C,)
    M qkv, out_proj, fc_in, fc_out;
    const uint16_t *fc_in_bias, *fc_out_bias;
    R keys, values;                                // of this layer, page after page
    const int32_t *places, *pages;                 // (T, 2): slot and position; (slots, pages_per_slot)
    const float* rotary;                           // (positions, 2, pairs)
    float* result;                                 // (T, C)
    float* workspace;
    Adapters adapters;
    int64_t tokens, whole, pages_per_slot, heads, head_dim, pairs;
    float epsilon;

    int64_t width() const { return heads * head_dim; }

    // The weights, as the numbers of moss_jt.kernels.cpu.block_table: addresses, and a matrix's sizes after its own.
    void read_weights(const int64_t* row) {
        Numbers numbers{row};
        norm_weight = numbers.address<uint16_t>();
        norm_bias = numbers.address<uint16_t>();
        qkv.read(numbers);
        out_proj.read(numbers);
        fc_in.read(numbers);
        fc_in_bias = numbers.address<uint16_t>();
        fc_out.read(numbers);
        fc_out_bias = numbers.address<uint16_t>();
    }
    // So many layers on, in a cache of so many positions, and in directories of adapters that have so many numbers each.
    void skip(int64_t layers, int64_t positions, int64_t directory) {
        keys.skip(layers * positions * width(), head_dim);
        values.skip(layers * positions * width(), head_dim);
        adapters.directory += layers * directory;
    }
};

// Where the intermediate results lie in the workspace; kernels/needs.py counts the same.
template <class M, class R>
struct Workspace {
    const Pass pass;
    float *normed, *q, *attended, *inner;              // (T, C), (T, C), (T, C), (T, I)
    float *new_keys, *new_values;                      // (T, C) each, until a head is there to be quantised
    float* low[2];                                     // (T, most_rank): of two products at a time
    Inputs qkv_x, fc_in_x, out_x, fc_out_x;            // inputs in each matrix's own order
    float* partial;

    explicit Workspace(const Block<M, R>& b) : pass(b.tokens, b.whole) {
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
        new_keys = attended;  // which nothing is in before attention
        new_values = R::kScaled ? take(width) : nullptr;
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

// Where token t's position lies in the cache.
template <class M, class R>
inline int64_t row_in_cache(const Block<M, R>& b, int64_t t) {
    const int64_t position = b.places[2 * t + 1];
    return b.pages[b.places[2 * t] * b.pages_per_slot + position / kPage] * kPage + position % kPage;
}

// Rows first .. end of the qkv product for all tokens: queries are scaled, keys and values go to the cache, or, where they are
// quantised, to the workspace: their scale needs all of a head.
template <class M, class R>
inline void keep_qkv(const Block<M, R>& b, const Workspace<M, R>& w, float* rows, int64_t first, int64_t end, int64_t ld) {
    const int64_t width = b.width(), head_dim = b.head_dim;
    const float scale = 1.0f / std::sqrt((float)head_dim);
    for (int64_t t = 0; t < b.tokens; t++) {
        const int64_t position = b.places[2 * t + 1];
        const int64_t at = row_in_cache(b, t) * width;
        const float* table = b.rotary + position * 2 * b.pairs;
        for (int64_t n = first; n < end;) {  // in segments, each within one head of one of the three parts
            const int64_t part = n / width, column = n % width, in_head = column % head_dim;
            const int64_t count = std::min(head_dim - in_head, end - n);
            float* segment = rows + t * ld + (n - first);
            if (part < 2 && in_head < 2 * b.pairs)
                rotate_pairs(segment, table, b.pairs, in_head / 2, std::min(b.pairs - in_head / 2, count / 2));
            if (part == 0)
                for (int64_t i = 0; i < count; i++) w.q[t * width + column + i] = segment[i] * scale;
            else if constexpr (R::kScaled)
                std::memcpy((part == 1 ? w.new_keys : w.new_values) + t * width + column, segment, count * sizeof(float));
            else
                narrow_row(segment, count, (part == 1 ? b.keys : b.values).numbers + at + column);
            n += count;
        }
    }
}

// The new keys and values to a cache of bytes. To be called by every thread of a parallel region.
template <class M>
inline void quantize_new(const Block<M, ByteRows>& b, const Workspace<M, ByteRows>& w) {
    const int64_t head_dim = b.head_dim;
    auto keep = [&](const float* rows, const ByteRows& cache, int64_t t, int64_t head) {
        const int64_t row = row_in_cache(b, t), column = head * head_dim;
        cache.scales[(row / kPage * b.heads + head) * kPage + row % kPage] =
            quantize_row(rows + t * b.width() + column, head_dim, cache.numbers + row * b.width() + column);
    };
#pragma omp for collapse(2) schedule(static)
    for (int64_t t = 0; t < b.tokens; t++)
        for (int64_t head = 0; head < b.heads; head++) {
            keep(w.new_keys, b.keys, t, head);
            keep(w.new_values, b.values, t, head);
        }
}

// Work that the threads share, one queue for each product's rows.
template <class M>
struct Queues {
    RowQueue qkv, fc_in, output;

    template <class R>
    Queues(const Block<M, R>& b, const Pass& pass)
        : qkv(row_queue(b.qkv.n, b.qkv.row_bytes(), pass)),
          fc_in(row_queue(b.fc_in.n, b.fc_in.row_bytes(), pass)),
          output(row_queue(b.width(), b.out_proj.row_bytes() + b.fc_out.row_bytes(), pass)) {}
};

// Both products that read the normed input.
template <class M, class R>
inline void block_input(const Block<M, R>& b, const Workspace<M, R>& w, Queues<M>& queues) {
    const int64_t tokens = b.tokens, inner = b.fc_in.n;
    const int64_t ld = std::max(queues.qkv.most_rows(), queues.fc_in.most_rows());
    float* y = scratch<Results>(ld * tokens);
    for (Rows rows = queues.qkv.take(); rows.first < rows.end; rows = queues.qkv.take()) {
        product(b.qkv, rows.first, rows.end, w.qkv_x, w.pass, y, ld, false);
        add_low_rank(b.adapters, kQkv, w.low[0], tokens, b.qkv.n, rows, y, ld);
        keep_qkv(b, w, y, rows.first, rows.end, ld);
    }
    for (Rows rows = queues.fc_in.take(); rows.first < rows.end; rows = queues.fc_in.take()) {
        product(b.fc_in, rows.first, rows.end, w.fc_in_x, w.pass, y, ld, false);
        add_low_rank(b.adapters, kFcIn, w.low[1], tokens, inner, rows, y, ld);
        for (int64_t t = 0; t < tokens; t++)
            gelu_row(y + t * ld, b.fc_in_bias + rows.first, rows.end - rows.first, w.inner + t * inner + rows.first);
    }
#pragma omp barrier
    if constexpr (R::kScaled) quantize_new(b, w);
}

template <class M, class R>
inline void block_output(const Block<M, R>& b, const Workspace<M, R>& w, Queues<M>& queues) {
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

// A block with what its threads share.
template <class M, class R>
struct SharedBlock {
    const Block<M, R> b;
    const Workspace<M, R> w;
    const Attention<R> attention;
    Queues<M> queues;

    explicit SharedBlock(const Block<M, R>& block)
        : b(block),
          w(b),
          attention{w.q,     b.keys, b.values,         w.attended, w.partial, b.places,
                    b.pages, w.pass, b.pages_per_slot, b.heads,    b.head_dim},
          queues(b, w.pass) {}

    // To be called by every thread of a parallel region; they wait for each other in the end.
    void run() {
        const int64_t tokens = b.tokens, width = b.width();
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
#pragma omp barrier
    }
};

// Blocks that follow one another, in one parallel region: each has a row of the table, see read_weights(). All but the first read
// what the one before has left in the result, and all use one workspace.
template <class M, class R>
inline void run_blocks(Block<M, R> block, const int64_t* table, int64_t blocks, int64_t row, int64_t positions, int64_t directory) {
    std::deque<SharedBlock<M, R>> shared;
    for (int64_t i = 0; i < blocks; i++) {
        block.read_weights(table + i * row);
        shared.emplace_back(block);
        block.h = block.result;
        block.skip(1, positions, directory);
    }
#pragma omp parallel
    for (SharedBlock<M, R>& one : shared) one.run();
}

}  // namespace moss
