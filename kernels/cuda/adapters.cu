// What low-rank adapters add to products: (x A^T) B^T, for each token by the adapter that it has, if any. A launch does two matrices, those
// that a block multiplies together. A token's sums have an order of their own, so that who shares the pass changes no bit.
#include "device.cuh"

constexpr int kTargets = 4;      // in the order of moss_jt.store.architecture
constexpr int kBankUnit = 16;    // BANK_UNIT in kernels/needs.py
constexpr int kRankWarps = 8, kRankThreads = kWarp * kRankWarps;

// One adapter's matrices for a target: where A (rank, K) and B transposed and scaled (rank, N) begin; rank 0 for none.
struct LowRank {
    long long a, b;
    int rank;
};

// directory (adapters, kTargets, 3): where A and B begin, in kBankUnit floats, and the rank. of_token (T): an adapter's number, or -1.
__device__ __forceinline__ LowRank low_rank_of(IN(int) directory, IN(int) of_token, int token, int target) {
    const int adapter = of_token[token];
    if (adapter < 0) return {0, 0, 0};
    const int entry = (adapter * kTargets + target) * 3;
    return {(long long)directory[entry] * kBankUnit, (long long)directory[entry + 1] * kBankUnit, directory[entry + 2]};
}

// low (2, T, most_rank) = x A^T; a block of kRankThreads does one number of one token for one of the matrices. K is a multiple of 4.
extern "C" __global__ void to_low_rank(
    IN(float) bank, IN(int) directory, IN(int) of_token, IN(float) x, int target, int inputs, IN(float) x_2, int target_2,
    int inputs_2, OUT(float) low, int tokens, int most_rank) {
    SHARED(float, sums, kRankWarps);
    const int token = blockIdx.y, r = blockIdx.x;
    const bool second = blockIdx.z > 0;
    const LowRank own = low_rank_of(directory, of_token, token, second ? target_2 : target);
    if (r >= own.rank) return;
    const int width = second ? inputs_2 : inputs;
    const long long row = (long long)token * width, a = own.a + (long long)r * width;
    float sum = 0;
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < width; i += 4 * kRankThreads) {
        const uint4 weights = load_vector(bank, a + i), four = second ? load_vector(x_2, row + i) : load_vector(x, row + i);
        sum = fmaf(__uint_as_float(weights.x), __uint_as_float(four.x), sum);
        sum = fmaf(__uint_as_float(weights.y), __uint_as_float(four.y), sum);
        sum = fmaf(__uint_as_float(weights.z), __uint_as_float(four.z), sum);
        sum = fmaf(__uint_as_float(weights.w), __uint_as_float(four.w), sum);
    }
    sum = block_sum<kRankWarps>(sum, sums);
    if (threadIdx.x == 0) low[((long long)blockIdx.z * tokens + token) * most_rank + r] = sum;
}

// y += low B^T, y (T, N) of each of the two matrices; one thread for each output.
extern "C" __global__ void add_low_rank(
    IN(float) bank, IN(int) directory, IN(int) of_token, IN(float) low, OUT(float) y, int target, int outputs, OUT(float) y_2,
    int target_2, int outputs_2, int tokens, int most_rank) {
    const int token = blockIdx.y, n = blockIdx.x * blockDim.x + threadIdx.x;
    const bool second = blockIdx.z > 0;
    const int width = second ? outputs_2 : outputs;
    const LowRank own = low_rank_of(directory, of_token, token, second ? target_2 : target);
    if (n >= width || !own.rank) return;
    const long long from = ((long long)blockIdx.z * tokens + token) * most_rank, at = (long long)token * width + n;
    float sum = 0;
    for (int r = 0; r < own.rank; r++) sum = fmaf(low[from + r], bank[own.b + (long long)r * width + n], sum);
    if (second)
        y_2[at] += sum;
    else
        y[at] += sum;
}
