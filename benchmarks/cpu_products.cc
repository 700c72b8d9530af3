// Times the CPU's products with one block's matrices; see cpu_products.py.
//
// Arguments: width, inner width, tokens ... Each line of output: bits, tokens, rows, inputs, and GB/s or GFLOP/s of our product,
// of the same by tiles and sgemm, of sgemm over float32 weights; for one token, of reading memory instead of the last two.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gemm.h"
#include "packed.h"

using namespace moss;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the quickest run of several, after one that warms up, for a tenth of a second at least.
template <class Body>
static double best(Body body) {
    body();
    double least = 1e9;
    for (double begin = now(), end = begin; end - begin < 0.1;) {
        const double start = end;
        body();
        end = now();
        least = std::min(least, end - start);
    }
    return least;
}

static uint64_t state = 88172645463325252ull;
static uint64_t draw() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}
template <class T>
static std::vector<T> drawn(int64_t bytes) {
    std::vector<T> values(bytes / sizeof(T) + 64);
    auto* words = (uint64_t*)values.data();
    for (int64_t i = 0; i < bytes / 8; i++) words[i] = draw();
    return values;
}

// As machine_limits() does: eight streams for each thread.
static double read_speed() {
    typedef float Wide __attribute__((vector_size(64), aligned(64)));
    constexpr int64_t kBytes = 512 << 20, kStreams = 8;
    static const auto* memory = (const Wide*)[] {
        void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(p, 1, kBytes);
        return p;
    }();
    volatile float sink;
    return kBytes / best([&] {
               float sum = 0;
#pragma omp parallel reduction(+ : sum)
               {
                   const int64_t each = kBytes / 64 / omp_get_num_threads() / kStreams;
                   const Wide* start = memory + each * kStreams * omp_get_thread_num();
                   Wide sums[kStreams] = {};
                   for (int64_t i = 0; i < each; i++)
                       for (int64_t s = 0; s < kStreams; s++) {
                           __builtin_prefetch((const char*)(start + s * each + i) + 512);
                           sums[s] += start[s * each + i];
                       }
                   for (int64_t s = 0; s < kStreams; s++) sum += sums[s][0];
               }
               sink = sum;
           });
}

template <class M>
struct Matrix {
    std::vector<uint8_t> packed, zeros;
    std::vector<uint16_t> scales;
    M m;
    Matrix(int64_t n, int64_t k)
        : packed(drawn<uint8_t>(n * k * M::Row::kBits / 8)), zeros(n * k / 128, (1 << (M::Row::kBits - 1)) - 1),
          scales(n * k / 128, 0x2000), m{packed.data(), scales.data(), zeros.data(), nullptr, n, k, k / 128} {}
};
template <>
struct Matrix<Dense> {
    std::vector<uint16_t> weight;
    Dense m;
    Matrix(int64_t n, int64_t k) : weight(n * k, 0x2000), m{weight.data(), n, k} {}
};

template <class M>
static void measure(int bits, int64_t n, int64_t k, const std::vector<int64_t>& counts) {
    const Matrix<M> matrix(n, k);
    const M& m = matrix.m;
    for (int64_t tokens : counts) {
        const int64_t whole = tokens / kPage * kPage, ld = input_floats(k);
        const Pass pass(tokens, whole);
        std::vector<float> x(tokens * k), memory(tokens * ld + 16), y(tokens * n);
        for (float& value : x) value = (float)(draw() % 2001) / 300.0f - 3.3f;
        const InputRows plain{x.data(), k};
        const bool other = whole ? M::kInWords : m.arranged();
        const InputRows rows = other ? InputRows{aligned(memory.data()), ld} : plain;
        const Inputs inputs{rows, rows, rows_of_gemm<M>(k, pass)}, as_floats{plain, plain, rows_at_once(k, tokens)};
        auto in_parallel = [&](const Pass& by, auto body) {
            RowQueue queue = row_queue(n, m.row_bytes(), by);
#pragma omp parallel
            {
                if (other)
#pragma omp for schedule(static)
                    for (int64_t t = 0; t < tokens; t++) arrange(m, inputs, pass, t, x.data());
                for (Rows now = queue.take(); now.first < now.end; now = queue.take())
                    body(now.first, now.end, y.data() + now.first);
            }
        };
        auto ours = [&] {
            return best([&] {
                in_parallel(pass, [&](int64_t first, int64_t end, float* result) {
                    product(m, first, end, inputs, pass, result, n, false);
                });
            });
        };
        printf("%d %ld %ld %ld ", bits, tokens, n, k);
        if (tokens == 1) {
            const double before = read_speed(), speed = n * m.row_bytes() / ours();
            printf("%g %g\n", speed / 1e9, std::max(before, read_speed()) / 1e9);
        } else {
            const double tiled = best([&] {
                in_parallel(Pass(kPage, kPage), [&](int64_t first, int64_t end, float* result) {
                    product_tiled(m, first, end, x.data(), k, tokens, as_floats.at_once, result, n, false);
                });
            });
            const std::vector<float> weights(n * k, 0.01f);
            const double floats = best([&] {
                sgemm(true, tokens, n, k, x.data(), k, weights.data(), k, false, y.data(), n);
            });
            const double work = 2e-9 * n * k * tokens;
            printf("%g %g %g\n", work / ours(), work / tiled, work / floats);
        }
        fflush(stdout);
    }
}

int main(int, char** arguments) {
    const int64_t width = atol(arguments[1]), inner = atol(arguments[2]);
    std::vector<int64_t> tokens;
    for (char** at = arguments + 3; *at; at++) tokens.push_back(atol(*at));
    for (auto [n, k] : {std::pair(3 * width, width), std::pair(width, width), std::pair(inner, width), std::pair(width, inner)}) {
        measure<Int4>(4, n, k, tokens);
        measure<Int8>(8, n, k, tokens);
        measure<Dense>(16, n, k, tokens);
    }
}
