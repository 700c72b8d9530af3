// Runs the CPU's kernels over memory of exactly the size that they were promised, and says what they took of it.
//
// Each line of input is a pass: bits, tokens, start_pos, positions, heads, head_dim, pairs, inner, vocabulary, group_size,
// ordered, floats of the block's workspace, rank of the adapters, bits of the cache. Each line of output: the floats of it that were written
// to, the bytes of keys and values, and the most bytes
// that the threads held of their own so far, oneDNN's among them, since the first line. Compiled with a sanitizer, which
// has allocators of its own, the second number is zero.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "simd.h"

#include "held.h"

#include "block.h"
#include "head.h"

using namespace moss;

constexpr uint32_t kUntouched = 0x7fc12345;

// Bytes that are fine as packed fields, as zero points and, two of them, as a small float16.
template <class T>
static std::vector<T> filled(int64_t count) {
    std::vector<T> values(count);
    auto* bytes = (uint8_t*)values.data();
    for (size_t i = 0; i < count * sizeof(T); i++) bytes[i] = i % 2 ? 0x20 : (uint8_t)(i * 37 % 251);
    return values;
}

struct Arrays {
    std::vector<uint8_t> packed, zeros;
    std::vector<uint16_t> scales;
    std::vector<int32_t> order;
};

struct Line {
    int64_t bits, tokens, start, positions, heads, head_dim, pairs, inner, vocabulary, group, ordered, workspace, rank, cache;
};

// Keys or values, in memory of exactly their size.
template <class R>
struct CacheRows;

template <>
struct CacheRows<HalfRows> {
    std::vector<uint16_t> numbers;

    explicit CacheRows(const Line& pass) : numbers(filled<uint16_t>(pass.positions * pass.heads * pass.head_dim)) {}
    HalfRows rows() { return {numbers.data()}; }
    int64_t bytes() const { return numbers.size() * sizeof(uint16_t); }
};

template <>
struct CacheRows<ByteRows> {
    std::vector<int8_t> numbers;
    std::vector<float> scales;

    explicit CacheRows(const Line& pass)
        : numbers(filled<int8_t>(pass.positions * pass.heads * pass.head_dim)), scales(pass.positions * pass.heads, 0.01f) {}
    ByteRows rows() { return {numbers.data(), scales.data()}; }
    int64_t bytes() const { return numbers.size() + scales.size() * sizeof(float); }
};

static void set(Dense& m, Arrays& a, int64_t n, int64_t k, const Line&) {
    a.scales = filled<uint16_t>(n * k);
    m = Dense{a.scales.data(), n, k};
}

template <class Natural, class Few>
static void set(Packed<Natural, Few>& m, Arrays& a, int64_t n, int64_t k, const Line& pass) {
    const int64_t groups = k / pass.group;
    a.packed = filled<uint8_t>(n * k * Natural::kBits / 8);
    a.zeros = filled<uint8_t>(n * groups);
    a.scales = filled<uint16_t>(n * groups);
    for (int64_t i = k - 1; i >= 0; i--) a.order.push_back((int32_t)i);
    m = Packed<Natural, Few>{a.packed.data(), a.scales.data(), a.zeros.data(), pass.ordered ? a.order.data() : nullptr, n, k, groups};
}

struct Taken {
    int64_t floats, cache_bytes;
};

template <class M, class R>
static Taken run(const Line& pass) {
    const int64_t width = pass.heads * pass.head_dim, tokens = pass.tokens;
    Arrays arrays[4];
    auto vectors = filled<uint16_t>(std::max(width, pass.inner));
    auto h = std::vector<float>(tokens * width, 0.5f), result = h;
    auto rotary = std::vector<float>(pass.positions * 2 * pass.pairs, 0.5f);
    CacheRows<R> keys(pass), values(pass);
    auto* workspace = (uint32_t*)malloc(pass.workspace * sizeof(float));
    std::fill(workspace, workspace + pass.workspace, kUntouched);
    Block<M, R> b{};
    b.h = h.data();
    b.norm_weight = b.norm_bias = b.fc_in_bias = b.fc_out_bias = vectors.data();
    set(b.qkv, arrays[0], 3 * width, width, pass);
    set(b.out_proj, arrays[1], width, width, pass);
    set(b.fc_in, arrays[2], pass.inner, width, pass);
    set(b.fc_out, arrays[3], width, pass.inner, pass);
    b.keys = keys.rows();
    b.values = values.rows();
    b.rotary = rotary.data();
    b.result = result.data();
    b.workspace = (float*)workspace;
    b.tokens = tokens;
    std::vector<int32_t> places, pages;
    for (int64_t t = 0; t < tokens; t++) places.insert(places.end(), {0, (int32_t)(pass.start + t)});
    for (int64_t page = 0; page * kPage < pass.positions; page++) pages.push_back((int32_t)page);
    b.places = places.data();
    b.pages = pages.data();
    b.pages_per_slot = (int64_t)pages.size();
    b.whole = tokens % kPage == 0 ? tokens : 0;
    // Two adapters: every third token has none, and the second one has a pair for qkv only.
    std::vector<float> bank(pass.rank * (8 * width + 2 * pass.inner) + 8 * MOSS_BANK_UNIT, 0.01f);
    std::vector<int32_t> directory(2 * kTargets * 3), of_token;
    int64_t at = 0;
    auto place = [&](int64_t floats) {
        const int64_t unit = at;
        at += (floats + MOSS_BANK_UNIT - 1) / MOSS_BANK_UNIT;
        return (int32_t)unit;
    };
    const int64_t sizes[kTargets][2] = {{width, 3 * width}, {width, width}, {width, pass.inner}, {pass.inner, width}};
    for (int target = 0; target < kTargets; target++) {
        int32_t* entry = &directory[target * 3];
        entry[0] = place(pass.rank * sizes[target][0]);
        entry[1] = place(pass.rank * sizes[target][1]);
        entry[2] = (int32_t)pass.rank;
    }
    std::copy(directory.begin(), directory.begin() + 3, directory.begin() + kTargets * 3);
    for (int64_t t = 0; t < tokens; t++) of_token.push_back((int32_t)(t % 3) - 1);
    b.adapters = Adapters{bank.data(), directory.data(), of_token.data(), pass.rank};
    b.heads = pass.heads;
    b.head_dim = pass.head_dim;
    b.pairs = pass.pairs;
    b.epsilon = 1e-5f;
    SharedBlock<M, R> shared(b);
#pragma omp parallel
    shared.run();
    int64_t taken = pass.workspace;
    while (taken > 0 && workspace[taken - 1] == kUntouched) taken--;
    free(workspace);
    return {taken, keys.bytes() + values.bytes()};
}

// Each kind of matrix with one kind of cache or the other; what they take does not depend on both.
static Taken run(const Line& pass) {
    if (pass.bits == 8 && pass.cache == 16) return run<Int8, HalfRows>(pass);
    if (pass.bits == 4 && pass.cache == 8) return run<Int4, ByteRows>(pass);
    if (pass.bits != 16) std::abort();
    return pass.cache == 16 ? run<Dense, HalfRows>(pass) : run<Dense, ByteRows>(pass);
}

static void head(const Line& pass) {
    const int64_t width = pass.heads * pass.head_dim, rows = std::min<int64_t>(pass.tokens, MOSS_HEAD_ROWS);
    auto vectors = filled<uint16_t>(std::max(width, pass.vocabulary)), weight = filled<uint16_t>(pass.vocabulary * width);
    auto h = std::vector<float>(rows * width, 0.5f), logits = std::vector<float>(rows * pass.vocabulary);
    auto workspace = std::vector<float>(rows * width + MOSS_ALIGNMENT);
    run_head(Head{h.data(), vectors.data(), vectors.data(), Dense{weight.data(), pass.vocabulary, width}, vectors.data(),
                  workspace.data(), logits.data(), rows, rows % kPage == 0 ? rows : 0, 1e-5f});
}

int main() {
    size_t before = 0;
    Line p;
    for (bool first = true;
         scanf("%ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld", &p.bits, &p.tokens, &p.start, &p.positions, &p.heads,
               &p.head_dim, &p.pairs, &p.inner, &p.vocabulary, &p.group, &p.ordered, &p.workspace, &p.rank, &p.cache) == 14;
         first = false) {
        const Taken taken = run(p);
        head(p);
        if (first) before = held_now();  // what oneDNN compiled, and a little of ours
        printf("%ld %ld %zu\n", taken.floats, taken.cache_bytes, first ? 0 : most_held() - before);
    }
}
