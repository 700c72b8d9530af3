"""One matrix's product through the launch code of the GPU's kernels. In a model, whoever reads a product adds its parts up."""

from typing import Any

from moss_jt.kernels.cuda.launchers import Launchers, Product

Array = Any  # CuPy's, or NumPy's in the emulation


def dense(run: Launchers, x: Array, weight: Array, whole: bool = False) -> Array:
    """x (T, K) float32 times weight (N, K) float16 -> (T, N) float32."""
    return run.products([Product(x, weight)], whole)[0].sum(axis=0)


def packed(
    run: Launchers, x: Array, packed: Array, scales: Array, zeros: Array, bits: int, whole: bool = False
) -> Array:
    """x (T, K) float32 times a packed matrix (see moss_jt.store.quant) -> (T, N) float32."""
    return run.products([Product(x, packed, bits, scales, zeros)], whole)[0].sum(axis=0)
