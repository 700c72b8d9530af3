"""What this card can do at most: move its memory, multiply float16 matrices, take copies from the host. Measured.

Imports Jittor and CuPy. See moss_jt.measure.cpu_limits for the processor's.
"""

import cupy
import numpy as np

from moss_jt.kernels.cuda.copy_engine import CudaCopyEngine, device_memory
from moss_jt.kernels.cuda.cublas import multiply
from moss_jt.kernels.interface import Queue
from moss_jt.measure.cpu_limits import MachineLimits, best_time
from moss_jt.store.sizes import MIB
from moss_jt.weights.page_buffer import page_buffer

MOVED_BYTES = 256 * MIB  # far more than a card's cache holds
DEVICE_TO_DEVICE = 3  # cudaMemcpyKind


def gpu_limits(tokens: int, width: int, repeats: int = 5) -> MachineLimits:
    """The best of several tries each; products at the shape of a model's largest, ``tokens`` by 4 * ``width``."""
    return MachineLimits(
        memory_speed(repeats), gemm_speed(tokens, 4 * width, width, repeats), link_speed(repeats)
    )


def memory_speed(repeats: int) -> float:
    """Bytes read and written per second by a copy within the card."""
    source, target = (cupy.empty((MOVED_BYTES,), np.uint8) for _ in range(2))

    def copy() -> None:
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, MOVED_BYTES, DEVICE_TO_DEVICE, 0)
        cupy.cuda.runtime.deviceSynchronize()

    return 2 * MOVED_BYTES / best_time(copy, repeats)


def gemm_speed(rows: int, columns: int, inner: int, repeats: int) -> float:
    """Of float16 matrices with float32 sums, as prompts are read."""
    x, weight = (cupy.asarray(np.zeros((n, inner), np.float16)) for n in (rows, columns))
    out = cupy.empty((rows, columns), np.float32)

    def work() -> None:
        multiply(cupy, x, weight, out)
        cupy.cuda.runtime.deviceSynchronize()

    return 2.0 * rows * columns * inner / best_time(work, repeats)


def link_speed(repeats: int) -> float:
    """Bytes per second from pinned host memory to the card."""
    engine, memory, source = CudaCopyEngine(), device_memory(MOVED_BYTES), page_buffer(MOVED_BYTES)
    event = engine.new_event()
    source.fill(1)
    engine.pin(source)

    def copy() -> None:
        engine.copy(memory, 0, source)
        engine.record(event, Queue.COPIES)
        engine.synchronize(event)

    try:
        return MOVED_BYTES / best_time(copy, repeats)
    finally:
        engine.unpin(source)
