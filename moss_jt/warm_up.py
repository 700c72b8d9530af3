"""The operators' compilation, before the first token and not during it: once per machine, announced when it happens.

Jittor compiles an operator when it first runs, whatever the shapes; so a model of a few hundred numbers will do.
"""

import hashlib
import sys
import time
from pathlib import Path

import numpy as np

from moss_jt.backend import jt
from moss_jt.config import MossConfig
from moss_jt.errors import MossError
from moss_jt.jittor_home import log_path
from moss_jt.kernels.cpu import source
from moss_jt.kernels.cpu.operators import CpuOperators
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Matrix, PackedMatrix, Var

WIDTH = 64
TINY = MossConfig("codegen", 8, 4, WIDTH, 1, 2, 4, WIDTH, 1e-5, 0, 1)


def warm_up(bits: int) -> None:
    """Compile and load the CPU operators for weights of ``bits`` bits: milliseconds once that was done before.

    Raises:
        MossError: the compiler failed; the message names the log.
    """
    operators = CpuOperators(TINY)
    marker = Path(jt.compiler.cache_path) / f"moss-jt-operators-{_fingerprint(operators.simd, bits)}"
    if not marker.exists():
        sys.stderr.write("moss-jt: compiling the operators for this processor, once: about 20 seconds.\n")
    begin = time.monotonic()
    try:
        _run_all(operators, bits)
    except RuntimeError as error:
        log = log_path("operators")
        raise MossError(
            f"the operators could not be compiled for this machine. The compiler's output is in {log}; "
            "MOSS_JT_SIMD=0 chooses plain C++ instead of vector instructions."
        ) from error
    if not marker.exists():
        sys.stderr.write(f"moss-jt: operators compiled in {time.monotonic() - begin:.0f} s.\n")
        marker.touch()


def _fingerprint(simd: int, bits: int) -> str:
    """Of everything that makes Jittor compile anew."""
    digest = hashlib.sha256(f"{simd} {bits}".encode())
    for path in sorted(source.FOLDER.glob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run_all(operators: CpuOperators, bits: int) -> None:
    rows = jt.array(np.zeros((2, WIDTH), np.float32))
    norm = _halves(WIDTH)
    weights = BlockWeights(
        ln_1_weight=norm,
        ln_1_bias=norm,
        qkv=_matrix(3 * WIDTH, bits),
        out=_matrix(WIDTH, bits),
        fc_in=_matrix(WIDTH, bits),
        fc_in_bias=norm,
        fc_out=_matrix(WIDTH, bits),
        fc_out_bias=norm,
    )
    shape = (1, TINY.n_positions, TINY.n_head, TINY.head_dim)
    operators.block(rows, weights, _halves(*shape), _halves(*shape), 0, 0).sync()
    operators.head(rows, norm, norm, _halves(TINY.vocab_size, WIDTH), _halves(TINY.vocab_size)).sync()


def _matrix(outputs: int, bits: int) -> Matrix:
    if bits == 16:
        return DenseMatrix(_halves(outputs, WIDTH))
    packed = jt.array(np.zeros((outputs, WIDTH * bits // 8), np.uint8))
    zeros = jt.array(np.zeros((outputs, 1), np.uint8))
    return PackedMatrix(packed, _halves(outputs, 1), zeros, bits, WIDTH)


def _halves(*shape: int) -> Var:
    return jt.array(np.zeros(shape, np.float16))
