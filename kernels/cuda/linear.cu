// Products of float32 activations with matrices whose rows are outputs: y[t, n] = sum over k of x[t, k] * w[n, k].
//
// Decode reads each weight once and is bound by memory, so a warp asks for 16 bytes a lane of several rows at once before it multiplies
// any of them; rows and columns beyond the end are read at the last one instead of being left out, so that no branch stands between the
// loads. The activations of a chunk of K come to shared memory, in the order in which the lanes read them. Where the rows are too few to
// fill a card, K is split; whoever reads the result adds the parts, in their order. A launch does one or two matrices: those that read
// the same activations, or whose results are added. Sums are float32, and a token's are the same whatever else is in the pass.
#include "device.cuh"

// What a warp does of a launch; y is (parts, tokens, outputs).
struct Part {
    int first_row, row_step, number, first_token, tokens, all_tokens, outputs, inputs, begin, end;
};

// row_blocks: blocks that cover the rows; each: inputs of a part. A matrix of fewer rows than a warp takes is done a row a warp; the last
// warps of any other go back to the last rows, and compute the same numbers twice.
template <int kRows, int kTokens>
__device__ __forceinline__ Part find_part(int block, int row_blocks, int outputs, int inputs, int each, int all_tokens) {
    Part part;
    part.number = 0;
    for (; block >= row_blocks; block -= row_blocks) part.number++;
    const int rows = outputs < kRows ? 1 : kRows;
    part.first_row = min((block * kWarpsPerBlock + (int)threadIdx.x / kWarp) * rows, outputs - rows);
    part.row_step = outputs < kRows ? 0 : 1;
    part.first_token = blockIdx.z * kTokens;
    part.tokens = min(kTokens, all_tokens - part.first_token);
    part.all_tokens = all_tokens;
    part.outputs = outputs;
    part.inputs = inputs;
    part.begin = part.number * each;
    part.end = min(inputs, part.begin + each);
    return part;
}

template <int kRows, int kTokens>
__device__ __forceinline__ void store_sums(float (&sums)[kRows][kTokens], const Part& part, OUT(float) y) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        if (t >= part.tokens) break;
        const long long row = ((long long)part.number * part.all_tokens + part.first_token + t) * part.outputs + part.first_row;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const float sum = warp_sum(sums[r][t]);
            if (lane == 0) y[row + r * part.row_step] = sum;
        }
    }
}

// ---- float16 weights

constexpr int kDenseRows = 4;                 // rows of a warp
constexpr int kDenseStep = 8 * kWarp;         // inputs that a warp multiplies at once: 16 bytes a lane
constexpr int kDenseChunk = 2 * kDenseStep;   // parts of K are full chunks, for every number of tokens
// Where in shared memory a lane finds the first and the second four of its eight activations, in vectors of 16 bytes. The second ones
// begin half of the banks later, so that neither the lanes that read nor the threads that write meet in a bank.
constexpr int kDenseHalf = kWarp + 4, kDenseStaged = 2 * kDenseHalf;

// w (N, K) float16, K a multiple of 8; x (T, K).
template <int kTokens>
__device__ __forceinline__ void dense(IN(__half) w, IN(float) x, OUT(float) y, const Part& part) {
    constexpr int kSteps = kTokens < 16 ? kDenseChunk / kDenseStep : 1, kVectors = kDenseStep / 4;
    constexpr int kBuffer = kTokens * kSteps * kDenseStaged;
    SHARED(uint4, staged, 2 * kBuffer);
    const int lane = threadIdx.x % kWarp, inputs = part.inputs;
    const long long row_stride = (long long)part.row_step * inputs;
    int buffer = 0;
    float sums[kDenseRows][kTokens] = {};
#pragma unroll 1
    for (int first = part.begin; first < part.end; first += kSteps * kDenseStep) {
        uint4 words[kSteps][kDenseRows];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const int k = min(first + s * kDenseStep + 8 * lane, inputs - 8);
            long long at = (long long)part.first_row * inputs + k;
#pragma unroll
            for (int r = 0; r < kDenseRows; r++, at += row_stride) words[s][r] = load_vector(w, at);
        }
        for (int i = threadIdx.x; i < part.tokens * kSteps * kVectors; i += kThreads) {
            const int row = i / kVectors, vector = i % kVectors;  // row: a token's step
            const int k = first + row % kSteps * kDenseStep + 4 * vector;
            const uint4 none = {0, 0, 0, 0};
            staged[buffer + row * kDenseStaged + vector % 2 * kDenseHalf + vector / 2] =
                k < part.end ? load_vector(x, (long long)(part.first_token + row / kSteps) * inputs + k) : none;
        }
        __syncthreads();  // one is enough: the next chunk goes to the other buffer
#pragma unroll
        for (int s = 0; s < kSteps; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float wide[kDenseRows][4];
#pragma unroll
                for (int r = 0; r < kDenseRows; r++)
                    widen_four(half ? words[s][r].z : words[s][r].x, half ? words[s][r].w : words[s][r].y, wide[r]);
#pragma unroll
                for (int t = 0; t < kTokens; t++) {
                    if (t >= part.tokens) break;
                    const uint4 four = staged[buffer + (t * kSteps + s) * kDenseStaged + half * kDenseHalf + lane];
#pragma unroll
                    for (int r = 0; r < kDenseRows; r++) {
                        sums[r][t] = fmaf(wide[r][0], __uint_as_float(four.x), sums[r][t]);
                        sums[r][t] = fmaf(wide[r][1], __uint_as_float(four.y), sums[r][t]);
                        sums[r][t] = fmaf(wide[r][2], __uint_as_float(four.z), sums[r][t]);
                        sums[r][t] = fmaf(wide[r][3], __uint_as_float(four.w), sums[r][t]);
                    }
                }
            }
        buffer = kBuffer - buffer;
    }
    store_sums<kDenseRows, kTokens>(sums, part, y);
}

// How many blocks fit on a multiprocessor side by side: what keeps the compiler to its registers.
#define SIDE_BY_SIDE(N) __launch_bounds__(kThreads, N)
#define DENSE(T, N)                                                                                                                \
    extern "C" __global__ void SIDE_BY_SIDE(N) dense_##T(                                                                       \
        IN(__half) w, IN(float) x, OUT(float) y, int row_blocks, int outputs, int inputs, int each, IN(__half) w_2,             \
        IN(float) x_2, OUT(float) y_2, int row_blocks_2, int outputs_2, int inputs_2, int each_2, int first_blocks,             \
        int tokens) {                                                                                                           \
        const bool second = (int)blockIdx.x >= first_blocks;                                                                    \
        const Part part = find_part<kDenseRows, T>(                                                                             \
            second ? blockIdx.x - first_blocks : blockIdx.x, second ? row_blocks_2 : row_blocks,                                \
            second ? outputs_2 : outputs, second ? inputs_2 : inputs, second ? each_2 : each, tokens);                          \
        dense<T>(second ? w_2 : w, second ? x_2 : x, second ? y_2 : y, part);                                                   \
    }
DENSE(1, 6)
DENSE(4, 5)
DENSE(16, 4)

// ---- packed weights
//
// Inputs are written as three digits of eight bits. What a lane multiplies at once, a span of 32 inputs (int4) or 16 (int8), shares a power
// of two 2^-e, and an input is X * 2^-e with an integer X of 24 bits: the span's largest input keeps its float32 precision, and each other
// one is rounded to a part in 2^24 of that largest, as adding it to a float32 sum would do. X = (d2 * 256 + d1) * 256 + d0 with signed
// bytes, and fields of 4 or 8 bits are multiplied with each of the three, four at a time: sum (q - z) * X is exact but for its last
// rounding to float32, and takes half of the instructions that widening each field does.

template <int kBits>
struct Packing {
    static constexpr int kSpan = 128 / kBits;         // weights in a lane's 16 bytes
    static constexpr int kDigitVectors = kSpan / 16;  // vectors of 16 bytes that hold one digit of a span
    static constexpr int kVectors = 3 * kDigitVectors + 1;  // of a span: its digits, the highest first, and 2^-e with two sums
    static constexpr int kChunk = kSpan * kWarp;      // inputs that a warp multiplies at once
};

__device__ __forceinline__ unsigned four_bytes(int a, int b, int c, int d) {
    return (unsigned)(a & 255) | (unsigned)(b & 255) << 8 | (unsigned)(c & 255) << 16 | (unsigned)d << 24;
}

// x (T, K) -> (T, chunks, kVectors, lanes) vectors, as packed() reads them; what lies beyond K is zero. order: null, or the input of each
// column. One thread writes one span.
template <int kBits>
__device__ __forceinline__ void write_digits(
    IN(float) x, IN(int) order, OUT(unsigned) digits, bool ordered, int token, int span, int inputs) {
    using P = Packing<kBits>;
    constexpr float kMost = 8355000.0f;  // less than 127 * 2^16 + 127 * 2^8 + 127
    constexpr int kLargestExponent = 120;
    const int k = span * P::kSpan;
    const long long row = (long long)token * inputs;
    float all[P::kSpan] = {};
    if (k < inputs) {
#pragma unroll
        for (int i = 0; i < P::kSpan; i += 4) {
            if (ordered) {
#pragma unroll
                for (int j = 0; j < 4; j++) all[i + j] = x[row + order[k + i + j]];
            } else {
                const uint4 four = load_vector(x, row + k + i);
                all[i] = __uint_as_float(four.x), all[i + 1] = __uint_as_float(four.y);
                all[i + 2] = __uint_as_float(four.z), all[i + 3] = __uint_as_float(four.w);
            }
        }
    }
    unsigned most = 0;  // as integers, NaN is greater than infinity
#pragma unroll
    for (int i = 0; i < P::kSpan; i++) most = max(most, __float_as_uint(all[i]) & 0x7fffffffu);
    const float largest = __uint_as_float(most);
    int exponent = kLargestExponent;
    if (largest * 0x1p120f >= kMost) exponent = (int)(__float_as_uint(kMost / largest) >> 23) - 127;
    const bool finite = most < 0x7f800000u;
    const float power = __uint_as_float((unsigned)(exponent + 127) << 23);
    int upper = 0, lower = 0;
    const long long chunks = (inputs + P::kChunk - 1) / P::kChunk;
    const long long at = ((token * chunks + span / kWarp) * P::kVectors * kWarp + span % kWarp) * 4;
#pragma unroll
    for (int v = 0; v < P::kDigitVectors; v++) {
        uint4 vector[3];
#pragma unroll
        for (int word = 0; word < 4; word++) {
            int d0[4], d1[4], d2[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                d0[i] = finite ? __float2int_rn(all[16 * v + 4 * word + i] * power) : 0;
                d1[i] = (d0[i] + 128) >> 8;
                d2[i] = (d1[i] + 128) >> 8;
                upper += d1[i];
                lower += d0[i] - d1[i] * 256;
            }
            const unsigned words[3] = {
                four_bytes(d2[0], d2[1], d2[2], d2[3]), four_bytes(d1[0], d1[1], d1[2], d1[3]),
                four_bytes(d0[0], d0[1], d0[2], d0[3])};
#pragma unroll
            for (int digit = 0; digit < 3; digit++) {
                if (word == 0) vector[digit].x = words[digit];
                if (word == 1) vector[digit].y = words[digit];
                if (word == 2) vector[digit].z = words[digit];
                if (word == 3) vector[digit].w = words[digit];
            }
        }
#pragma unroll
        for (int digit = 0; digit < 3; digit++)
            store_vector(digits, at + (digit * P::kDigitVectors + v) * kWarp * 4, vector[digit]);
    }
    const unsigned scale = finite ? (unsigned)(127 - exponent) << 23 : 0x7fc00000u;
    store_vector(digits, at + 3 * P::kDigitVectors * kWarp * 4, uint4{scale, (unsigned)upper, (unsigned)lower, 0});
}

#define DIGITS(BITS)                                                                                                            \
    extern "C" __global__ void digits_int##BITS(                                                                                \
        IN(float) x, IN(int) order, OUT(unsigned) digits, int ordered, int inputs, IN(float) x_2, IN(int) order_2,              \
        OUT(unsigned) digits_2, int ordered_2, int inputs_2, int tokens) {                                                      \
        using P = Packing<BITS>;                                                                                                \
        const int spans = (inputs + P::kChunk - 1) / P::kChunk * kWarp, spans_2 = (inputs_2 + P::kChunk - 1) / P::kChunk * kWarp; \
        const int span = blockIdx.x * blockDim.x + threadIdx.x;                                                                 \
        if (span < spans)                                                                                                       \
            write_digits<BITS>(x, order, digits, ordered, blockIdx.y, span, inputs);                                            \
        else if (span < spans + spans_2)                                                                                        \
            write_digits<BITS>(x_2, order_2, digits_2, ordered_2, blockIdx.y, span - spans, inputs_2);                          \
    }
DIGITS(8)
DIGITS(4)

// A row's fields in one word of its packed bytes, as signed bytes: int4's first or second half, or int8 less 128.
template <int kBits>
__device__ __forceinline__ unsigned fields(unsigned word, int half) {
    if (kBits == 8) return word ^ 0x80808080u;
    return word >> 4 * half & 0x0f0f0f0fu;
}

// w: 16 bytes hold 16 int8 weights, or 32 int4 weights of which the first 16 lie in the low nibbles. x: what write_digits gave.
template <int kBits, int kRows, int kTokens>
__device__ __forceinline__ void packed(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, IN(unsigned) x, OUT(float) y, const Part& part, int groups) {
    using P = Packing<kBits>;
    constexpr int kStaged = kTokens < 4 ? kTokens : 4, kOne = P::kVectors * kWarp;  // kOne: vectors of one token's chunk
    constexpr int kShift = kBits == 8 ? 127 : -1;  // of the zero point that is stored: less one, and what fields() takes away
    SHARED(uint4, staged, 2 * kStaged * kOne);
    const int lane = threadIdx.x % kWarp, inputs = part.inputs, chunks = (inputs + P::kChunk - 1) / P::kChunk;
    const long long row_stride = (long long)part.row_step * inputs * kBits / 8, group_stride = (long long)part.row_step * groups;
    const float groups_per_input = (float)groups / (float)inputs;
    int buffer = 0;
    float sums[kRows][kTokens] = {};
#pragma unroll 1
    for (int first_input = part.begin; first_input < part.end; first_input += P::kChunk) {
        const int k = min(first_input + lane * P::kSpan, inputs - P::kSpan), chunk = first_input / P::kChunk;
        // In the middle of the span, so that rounding cannot lead to another group.
        const int group = (int)(((float)k + P::kSpan / 2) * groups_per_input);
        long long at = ((long long)part.first_row * inputs + k) * kBits / 8, group_at = (long long)part.first_row * groups + group;
        uint4 words[kRows];
        unsigned group_numbers[kRows];  // the scale's bits, and above them the zero point
#pragma unroll
        for (int r = 0; r < kRows; r++, at += row_stride, group_at += group_stride) {
            words[r] = load_vector(w, at);
            group_numbers[r] = bits_of(scales[group_at]) | (unsigned)zeros[group_at] << 16;
        }
#pragma unroll
        for (int first = 0; first < kTokens; first += kStaged) {
            if (first >= part.tokens) break;
            for (int i = threadIdx.x; i < kStaged * kOne; i += kThreads) {
                const long long token = part.first_token + min(first + i / kOne, part.tokens - 1);
                staged[buffer + i] = load_vector(x, ((token * chunks + chunk) * kOne + i % kOne) * 4);
            }
            __syncthreads();  // one is enough: the next chunk goes to the other buffer
#pragma unroll
            for (int t = 0; t < kStaged; t++) {
                uint4 digits[P::kVectors];
#pragma unroll
                for (int v = 0; v < P::kVectors; v++) digits[v] = staged[buffer + t * kOne + v * kWarp + lane];
                const uint4 numbers = digits[P::kVectors - 1];
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    int sum[3] = {};
#pragma unroll
                    for (int v = 0; v < P::kDigitVectors; v++)
#pragma unroll
                        for (int digit = 0; digit < 3; digit++) {
                            const uint4 four = digits[digit * P::kDigitVectors + v];
                            sum[digit] = dot_of_bytes(fields<kBits>(words[r].x, v), four.x, sum[digit]);
                            sum[digit] = dot_of_bytes(fields<kBits>(words[r].y, v), four.y, sum[digit]);
                            sum[digit] = dot_of_bytes(fields<kBits>(words[r].z, v), four.z, sum[digit]);
                            sum[digit] = dot_of_bytes(fields<kBits>(words[r].w, v), four.w, sum[digit]);
                        }
                    const int zero = (int)(group_numbers[r] >> 16) - kShift;
                    const int upper = sum[0] * 256 + sum[1] - zero * (int)numbers.y, lower = sum[2] - zero * (int)numbers.z;
                    const float exact = fmaf((float)upper, 256.0f, (float)lower);
                    const float scale = half_of(group_numbers[r]) * __uint_as_float(numbers.x);
                    sums[r][first + t] = fmaf(scale, exact, sums[r][first + t]);
                }
            }
            buffer = kStaged * kOne - buffer;
        }
    }
    store_sums<kRows, kTokens>(sums, part, y);
}

#define PACKED(BITS, ROWS, T, N)                                                                                                 \
    extern "C" __global__ void SIDE_BY_SIDE(N) int##BITS##_##T(                                                                 \
        IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, IN(unsigned) x, OUT(float) y, int row_blocks,          \
        int outputs, int inputs, int each, int groups, IN(unsigned char) w_2, IN(__half) scales_2, IN(unsigned char) zeros_2,   \
        IN(unsigned) x_2, OUT(float) y_2, int row_blocks_2, int outputs_2, int inputs_2, int each_2, int groups_2,              \
        int first_blocks, int tokens) {                                                                                         \
        const bool second = (int)blockIdx.x >= first_blocks;                                                                    \
        const Part part = find_part<ROWS, T>(                                                                                   \
            second ? blockIdx.x - first_blocks : blockIdx.x, second ? row_blocks_2 : row_blocks,                                \
            second ? outputs_2 : outputs, second ? inputs_2 : inputs, second ? each_2 : each, tokens);                          \
        packed<BITS, ROWS, T>(                                                                                                  \
            second ? w_2 : w, second ? scales_2 : scales, second ? zeros_2 : zeros, second ? x_2 : x, second ? y_2 : y, part,   \
            second ? groups_2 : groups);                                                                                        \
    }
PACKED(8, 8, 1, 4)
PACKED(8, 4, 4, 4)
PACKED(8, 4, 8, 4)
PACKED(4, 8, 1, 4)
PACKED(4, 4, 4, 4)

// All of a matrix (N, K) in float16, for long prompts and cuBLAS: scale * (q - zero), rounded once. A thread does 16 bytes of packed
// weights. A field under 0x4b000000 is the float 2^23 + field, so that one subtraction gives it less its zero point, exactly, on any card.
template <int kBits>
__device__ __forceinline__ void dequantize(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, OUT(__half) out, int outputs, int inputs, int groups) {
    constexpr int kWeights = 128 / kBits;
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long first = index * kWeights;
    if (first >= (long long)outputs * inputs) return;
    const int row = (int)(first / inputs), k = (int)(first % inputs);
    const long long group = (long long)row * groups + k / (inputs / groups);
    const float scale = __half2float(scales[group]), offset = 8388609.0f + (float)zeros[group];
    const uint4 words = load_vector(w, index * 16);
    const unsigned all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int eight = 0; eight < kWeights; eight += 8) {
        unsigned pairs[4];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float two[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int weight = (eight + i + j) % 16, half = (eight + i + j) / 16;
                const unsigned field = all[weight / 4] >> (8 * (weight % 4) + 4 * half) & ((1u << kBits) - 1);
                two[j] = scale * (__uint_as_float(0x4b000000u | field) - offset);
            }
            pairs[i / 2] = narrow(two[0], two[1]);
        }
        store_vector(out, first + eight, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
}

extern "C" __global__ void dequantize_int8(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, OUT(__half) out, int outputs, int inputs, int groups) {
    dequantize<8>(w, scales, zeros, out, outputs, inputs, groups);
}
extern "C" __global__ void dequantize_int4(
    IN(unsigned char) w, IN(__half) scales, IN(unsigned char) zeros, OUT(__half) out, int outputs, int inputs, int groups) {
    dequantize<4>(w, scales, zeros, out, outputs, inputs, groups);
}

// x[t, i] = y[t, order[i]]: the activations in the order in which an act-order matrix stores its inputs.
extern "C" __global__ void gather_inputs(IN(float) y, IN(int) order, OUT(float) x, int tokens, int inputs) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)tokens * inputs) return;
    x[i] = y[i / inputs * inputs + order[i % inputs]];
}
