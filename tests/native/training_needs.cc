// Runs training's operators on the CPU, and says what the threads held of their own.
//
// Each line of input: tokens of a sample, heads, head_dim, inner. Each line of output: the most bytes that the threads held so
// far, oneDNN's among them, since the first line.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "held.h"

#include "training.h"

using namespace moss;

static void run(int64_t tokens, int64_t heads, int64_t head_dim, int64_t inner) {
    const int64_t width = heads * head_dim, pairs = head_dim / 2;
    std::vector<uint16_t> weight(inner * width, 0x2020);
    const Dense m{weight.data(), inner, width};
    std::vector<float> x(tokens * width, 0.5f), y(tokens * inner), none(1), wide(inner * width);
    train_product(m, x.data(), tokens, none.data(), y.data());
    train_product_back(m, y.data(), tokens, none.data(), x.data());
    train_multiply(true, false, inner, width, tokens, 1.0f, y.data(), x.data(), nullptr, wide.data());
    train_multiply(false, true, tokens, inner, width, 1.0f, x.data(), wide.data(), nullptr, y.data());
    const int32_t spans[] = {0, (int32_t)tokens};
    std::vector<float> qkv(tokens * 3 * width, 0.5f), rotary(tokens * 2 * pairs, 0.5f), turned(tokens * 2 * width), g = qkv;
    TrainAttention a{qkv.data(), rotary.data(), {spans, 1}, tokens, heads, head_dim, pairs, turned.data()};
    train_attention(a, x.data());
    train_attention_back(a, x.data(), g.data());
}

int main() {
    int64_t tokens, heads, head_dim, inner;
    size_t before = 0;
    for (bool first = true; scanf("%ld %ld %ld %ld", &tokens, &heads, &head_dim, &inner) == 4; first = false) {
        run(tokens, heads, head_dim, inner);
        if (first) before = held_now();  // what oneDNN compiled, and a little of ours
        printf("%zu\n", first ? 0 : most_held() - before);
    }
}
