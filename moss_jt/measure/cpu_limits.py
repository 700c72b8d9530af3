"""What this processor can do at most: read memory, and multiply float32 matrices. Measured, to judge our own speed by.

Imports Jittor: the reading is a small operation of our own over OpenMP's threads, the multiplying is oneDNN's sgemm.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.store.sizes import MIB
from moss_jt.weights.page_buffer import page_buffer

READ_BYTES = 512 * MIB  # far more than any cache holds

# Eight streams per thread, as wide as the compiler's vectors: one stream would not keep enough reads under way.
READ_SOURCE = """
typedef float Wide __attribute__((vector_size(64), aligned(64)));
const int64_t streams = 8, total = in0_shape0 / 64;
const Wide* memory = (const Wide*)in0_p;
float sum = 0;
#pragma omp parallel reduction(+ : sum)
{
    const int64_t each = total / omp_get_num_threads() / streams;
    const Wide* start = memory + each * streams * omp_get_thread_num();
    Wide sums[streams] = {};
    for (int64_t i = 0; i < each; i++)
        for (int64_t s = 0; s < streams; s++) {
            __builtin_prefetch((const char*)(start + s * each + i) + 512);
            sums[s] += start[s * each + i];
        }
    for (int64_t s = 0; s < streams; s++) sum += sums[s][0];
}
out0_p[0] = sum;
"""


@dataclass(frozen=True)
class MachineLimits:
    """read: bytes per second from the device's memory. sgemm: operations per second in products of float32 matrices,
    or on a GPU of float16 ones. link: bytes per second from pinned host memory to a GPU.
    """

    read: float
    sgemm: float
    link: float | None = None


def machine_limits(tokens: int, width: int, repeats: int = 5) -> MachineLimits:
    """The best of several tries each; sgemm at the shape of a model's largest product: ``tokens`` by 4 * ``width``."""
    return MachineLimits(read_speed(repeats), sgemm_speed(tokens, 4 * width, width, repeats))


def read_speed(repeats: int) -> float:
    memory = page_buffer(READ_BYTES)
    memory.fill(0)  # a page that was never written is not in memory
    source = jt.reuse_np_array(memory)

    def read() -> None:
        header = "#include <omp.h>"
        jt.code([(1, 1)], ["float32"], [source], cpu_header=header, cpu_src=READ_SOURCE)[0].sync()

    return READ_BYTES / best_time(read, repeats)


def sgemm_speed(rows: int, columns: int, inner: int, repeats: int) -> float:
    """Of ``x @ w.T``, as in a linear layer, with at least a tenth of a second of work in each try."""
    draw = np.random.default_rng(0)
    x = jt.array(draw.standard_normal((rows, inner), dtype=np.float32))
    w = jt.array(draw.standard_normal((columns, inner), dtype=np.float32))

    def multiply() -> None:
        jt.nn.matmul_transpose(x, w).sync()

    operations = 2.0 * rows * columns * inner
    return operations / best_time(multiply, max(repeats, int(3e10 / operations)))


def best_time(work: Callable[[], None], repeats: int) -> float:
    """Seconds of the quickest of ``repeats`` runs, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
