// Products of one packed matrix, from standard input to standard output, by the CPU's kernels of one level.
//
// Input: eight-byte numbers bits, n, k, groups, tokens (whole pages), ordered; then packed, scales, zeros, order, and tokens
// rows of inputs. Output: the products as of few tokens, then as of whole pages; both are added to what is already there,
// which is one.
#include <cstdio>
#include <vector>

#include "gemm.h"
#include "packed.h"

using namespace moss;

// An array of exactly its own size, so that a sanitizer sees what is read beyond it.
template <class T>
static std::vector<T> array(int64_t count) {
    std::vector<T> values(count);
    if (fread(values.data(), sizeof(T), count, stdin) != (size_t)count) abort();
    return values;
}

template <class M>
static void write_products(int64_t n, int64_t k, int64_t groups, int64_t tokens, bool ordered) {
    const auto packed = array<uint8_t>(n * k * M::Row::kBits / 8);
    const auto scales = array<uint16_t>(n * groups);
    const auto zeros = array<uint8_t>(n * groups);
    const auto order = array<int32_t>(ordered ? k : 0);
    auto x = array<float>(tokens * k);
    const M m{packed.data(), scales.data(), zeros.data(), ordered ? order.data() : nullptr, n, k, groups};
    const int64_t ld = input_floats(k), rows = (n + 7) / 8 * 8;
    std::vector<float> memory(tokens * ld + 16), y(tokens * rows, 1.0f);
    float* own = aligned(memory.data());
    const InputRows arranged{own, ld}, plain{x.data(), k};
    auto write = [&] {
        for (int64_t t = 0; t < tokens; t++) fwrite(y.data() + t * rows, sizeof(float), n, stdout);
    };

    const Pass few(tokens, 0);
    const Inputs few_inputs{plain, m.order || m.arranged() ? arranged : plain, kPage};
    for (int64_t t = 0; t < tokens; t++) arrange(m, few_inputs, few, t, x.data());
    product_few(m, 0, n, few_inputs.few.x, few_inputs.few.ld, tokens, y.data(), rows, true);
    write();

    std::fill(y.begin(), y.end(), 1.0f);
#if MOSS_SIMD > 0
    for (int64_t t = 0; t < tokens; t++)
        write_words(m, x.data() + t * k, t % kPage, WordPage(m, span_of(m), own + t / kPage * kPage * ld));
    product_words(m, 0, n, own, ld, tokens, y.data(), rows, true, word_scratch());
#endif
    write();
}

int main() {
    const auto sizes = array<int64_t>(6);
    if (sizes[0] == 8) write_products<Int8>(sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
    else write_products<Int4>(sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
}
