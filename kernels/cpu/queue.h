// Rows of a matrix handed out to threads: big chunks first, for long streams, and small ones at the end, so that all
// threads end together.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moss {

struct Rows {
    int64_t first, end;
};

class RowQueue {
  public:
    // Chunks of about most_bytes down to least_bytes; their sizes are multiples of 8 rows (complete rotary pairs, eight
    // streams), but for the last.
    RowQueue(int64_t rows, int64_t row_bytes, int64_t least_bytes, int64_t most_bytes)
        : rows_(rows), least_(eights(least_bytes / row_bytes)), most_(std::max(least_, eights(most_bytes / row_bytes))) {}

    // The most that take() gives at once; kernels/needs.py counts the same.
    int64_t most_rows() const {
        return std::min((rows_ + 7) / 8 * 8, std::max(least_, std::min(most_, eights(rows_ / 2))));
    }

    // The next chunk, or an empty one when all rows are given out.
    Rows take() {
        const int64_t threads = omp_get_num_threads();
        int64_t first = next_.load(std::memory_order_relaxed), end;
        do {
            if (first >= rows_) return {rows_, rows_};
            const int64_t share = eights((rows_ - first) / (2 * threads));
            end = std::min(rows_, first + std::min(most_, std::max(least_, share)));
        } while (!next_.compare_exchange_weak(first, end, std::memory_order_relaxed));
        return {first, end};
    }

  private:
    static int64_t eights(int64_t rows) { return std::max<int64_t>(1, rows / 8) * 8; }
    int64_t rows_, least_, most_;
    std::atomic<int64_t> next_{0};
};

}  // namespace moss
