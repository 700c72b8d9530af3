"""The operators' compilation, before the first token and not during it: once per machine, announced when it happens.

Jittor compiles an operator when it first runs, and CuPy a kernel, whatever the shapes; so a model of a few hundred numbers
will do.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.backend.gpu_requirements import says_full
from moss_jt.backend.home import home_kept, log_path
from moss_jt.backend.jittor import jt
from moss_jt.engine.kv_cache import KVCache
from moss_jt.errors import MossError, reason_of
from moss_jt.kernels.cpu import source
from moss_jt.kernels.cpu.operators import CpuOperators
from moss_jt.kernels.cuda import launchers
from moss_jt.kernels.cuda.copy_engine import CudaCopyEngine, device_memory
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.interface import PAGE, BlockWeights, DenseMatrix, Matrix, PackedMatrix, Region, Weight
from moss_jt.kernels.places import one_sequence
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig

WIDTH = 64
TINY = MossConfig("codegen", 8, PAGE, WIDTH, 1, 2, 4, WIDTH, 1e-5, 0, 1)
PASSES = (2, PAGE)  # tokens: by our own products, and a whole page by cuBLAS

Make = Callable[[tuple[int, ...], str], Weight]


def warm_up(bits: int, cache_bits: int = 16, weights_move: bool = False) -> None:
    """Compile and load the CPU operators for weights and a cache of so many bits: milliseconds once that was done before.

    Args:
        weights_move: see CpuOperators.

    Raises:
        MossError: the compiler failed; the message names the log.
    """
    operators = CpuOperators(TINY, weights_move=weights_move)

    def run() -> None:
        _run_all(operators, bits, _zeros, PASSES[:1], cache_bits)

    fingerprint = _fingerprint(f"{operators.simd} {bits} {cache_bits} {weights_move}", source.FOLDER)
    advice = "MOSS_JT_SIMD=0 chooses plain C++ instead of vector instructions."
    _announced(run, fingerprint, "this processor", "about 20 seconds", advice)


def warm_up_gpu(cupy: Any, bits: int, cache_bits: int = 16) -> None:
    """The same for the GPU: Jittor's operation for copies with nvcc, and our kernels with CuPy.

    Raises:
        MossError: a compiler failed; the message names the log.
    """

    def run() -> None:
        _run_all(CudaOperators(TINY, cupy), bits, on_card(), PASSES, cache_bits)

    announced_on_card(run, f"{cupy.__version__} {bits} {cache_bits}")


def on_card() -> Make:
    """Makes weights on the card, once copies there have been tried."""
    engine = CudaCopyEngine()
    event = engine.new_event()
    engine.synchronize(event)
    memory = device_memory(1 << 16)
    return lambda shape, dtype: Region(memory, 0, shape, dtype)


def announced_on_card(run: Callable[[], None], name: str) -> None:
    """Run what compiles operators for the card, and say so where it was not done before under this name.

    Raises:
        MossError: a compiler failed; the message names the log.
    """
    fingerprint = _fingerprint(name, Path(launchers.folder()))
    advice = "moss-jt doctor checks the toolkit; its version must suit the card and the driver."
    _announced(run, fingerprint, "this GPU", "about a minute", advice)


def _announced(run: Callable[[], None], fingerprint: str, target: str, duration: str, advice: str) -> None:
    marker = Path(jt.flags.cache_path) / f"moss-jt-operators-{fingerprint}"
    if not marker.exists():
        sys.stderr.write(f"moss-jt: compiling the operators for {target}, once: {duration}.\n")
    begin = time.monotonic()
    try:
        with home_kept():
            run()
    except Exception as error:  # noqa: BLE001  CuPy's own do not derive from RuntimeError
        if says_full(error):
            raise
        log = log_path("operators")
        raise MossError(
            f"the operators could not be compiled for {target} ({reason_of(error)}). The compiler's output is in {log}; "
            f"{advice}"
        ) from error
    if not marker.exists():
        sys.stderr.write(f"moss-jt: operators compiled in {time.monotonic() - begin:.0f} s.\n")
        marker.touch()


def _fingerprint(text: str, folder: Path) -> str:
    """Of everything that makes the operators be compiled anew."""
    digest = hashlib.sha256(text.encode())
    for path in sorted(folder.glob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tiny_block(bits: int, make: Make) -> BlockWeights:
    """A block of :data:`TINY`."""
    fields = {}
    for tensor in BLOCK:
        shape = tensor.shape(TINY)
        fields[tensor.field] = _matrix(shape[0], bits, make) if tensor.is_matrix else make(shape, "float16")
    return BlockWeights(**fields)


def _run_all(operators: Any, bits: int, make: Make, passes: tuple[int, ...], cache_bits: int = 16) -> None:
    weights = tiny_block(bits, make)
    cache = KVCache(TINY, TINY.n_positions, _zeros, bits=cache_bits)
    for tokens in passes:
        rows = jt.array(np.zeros((tokens, WIDTH), np.float32))
        places = one_sequence(0, tokens, tokens // PAGE * PAGE)
        operators.block(rows, weights, cache.keys, cache.values, 0, places).sync()
    vector, bias = _zeros((WIDTH,), "float16"), _zeros((TINY.vocab_size,), "float16")
    operators.head(rows, vector, vector, make((TINY.vocab_size, WIDTH), "float16"), bias).sync()


def _matrix(outputs: int, bits: int, make: Make) -> Matrix:
    if bits == 16:
        return DenseMatrix(make((outputs, WIDTH), "float16"))
    packed = make((outputs, WIDTH * bits // 8), "uint8")
    return PackedMatrix(packed, make((outputs, 1), "float16"), make((outputs, 1), "uint8"), bits, WIDTH)


def _zeros(shape: tuple[int, ...], dtype: str) -> Any:
    return jt.array(np.zeros(shape, dtype))
