"""How long the host takes to queue a block on the GPU: over a stand-in for CuPy whose kernels do nothing.

    python benchmarks/host_time.py

34 blocks of one token, as in a pass of a model that lies on the card; medians over passes, of the time that the thread
ran, which other programs on the machine disturb least. A real card adds what its driver takes for a launch, so the launches of a
block are counted, too. It needs no card, and says nothing about one.
"""

import argparse
import ctypes
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, PackedMatrix, Region
from moss_jt.store.config import MossConfig

WIDTH, LAYERS = 64, 34
CONFIG = MossConfig("moss", 8, 2048, WIDTH, LAYERS, 2, 8, 4 * WIDTH, 1e-5, 0, 1)


class IdleCupy:
    """Instead of CuPy: arrays are NumPy's, and a launch does nothing."""

    def RawModule(self, code: str, options: Any) -> Any:  # noqa: N802
        def get_function(name: str) -> Any:
            def launch(grid: Any, block: Any, arguments: Any) -> None:
                pass

            launch.kernel = SimpleNamespace(ptr=0)  # type: ignore[attr-defined]
            return launch

        return SimpleNamespace(get_function=get_function)

    def launch_kernel_address(self) -> int:
        """A function that answers 0, for success, when its first argument is 0: the C library's abs."""
        return ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value or 0

    empty = staticmethod(np.empty)
    asarray = staticmethod(np.asarray)


def block_weights(bits: int) -> BlockWeights:
    """A block in one Var's memory, full of zeros."""
    sizes = [0]

    def region(shape: tuple[int, ...], dtype: str) -> tuple[int, tuple[int, ...], str]:
        sizes.append(sizes[-1] + -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 256) * 256)
        return sizes[-2], shape, dtype

    def matrix(outputs: int, inputs: int) -> Any:
        if bits == 16:
            return [region((outputs, inputs), "float16")]
        groups = inputs // 32
        packed = region((outputs, inputs * bits // 8), "uint8")
        return [packed, region((outputs, groups), "float16"), region((outputs, groups), "uint8")]

    vectors = {name: region((WIDTH,), "float16") for name in ("ln_1_weight", "ln_1_bias", "fc_out_bias")}
    vectors["fc_in_bias"] = region((4 * WIDTH,), "float16")
    shapes = {
        "qkv": (3 * WIDTH, WIDTH),
        "out": (WIDTH, WIDTH),
        "fc_in": (4 * WIDTH, WIDTH),
        "fc_out": (WIDTH, 4 * WIDTH),
    }
    matrices = {name: matrix(*shape) for name, shape in shapes.items()}
    memory = jt.array(np.zeros(sizes[-1], np.uint8))

    def made(parts: Any) -> Any:
        regions = [Region(memory, *part) for part in parts]
        return DenseMatrix(*regions) if bits == 16 else PackedMatrix(*regions, bits=bits, group_size=32)

    return BlockWeights(
        **{name: Region(memory, *part) for name, part in vectors.items()},
        **{name: made(parts) for name, parts in matrices.items()},
    )


def host_seconds(bits: int, passes: int) -> tuple[float, int]:
    """Seconds per block, and the launches of a block."""
    operators = CudaOperators(CONFIG, IdleCupy())
    blocks = [block_weights(bits) for _ in range(LAYERS)]
    cache = jt.zeros((LAYERS, 2048, 2, WIDTH // 2), "float16")
    cache.sync()
    durations = []
    for position in range(passes):
        h = jt.array(np.zeros((1, WIDTH), np.float32))
        h.sync()
        begin = time.thread_time()
        for layer, weights in enumerate(blocks):
            h = operators.block(h, weights, cache, cache, layer, position)
        h.sync()
        durations.append((time.thread_time() - begin) / LAYERS)
    return statistics.median(durations[5:]), operators.launches_per_block(blocks[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=100)
    options = parser.parse_args()
    for bits in (16, 8, 4):
        seconds, launches = host_seconds(bits, options.passes)
        print(f"{bits:2} bits: {seconds * 1e6:6.1f} us per block on the host, {launches} launches")


if __name__ == "__main__":
    main()
