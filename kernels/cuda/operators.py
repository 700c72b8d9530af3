"""The GPU's operators: CuPy kernels over Jittor's own memory, through jt.numpy_code, which hands arrays over without a copy.

Each operator is one operation for Jittor: launching costs the host more than the small kernels cost the card. A block's weights
are regions of one Var, since jt.numpy_code takes at most ten inputs.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.checks import check_cache, check_dtype, check_matrix, check_shape
from moss_jt.kernels.cuda.launchers import Array, Launchers
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Matrix, Region, Var
from moss_jt.kernels.rotary import rotary_table
from moss_jt.store.config import MossConfig

Work = Callable[[Sequence[Array], Array], None]
At = Callable[[Region], Array]


class CudaOperators:
    """See :class:`moss_jt.kernels.interface.Operators`. Weights of blocks and head are Regions.

    Args:
        config: the model's geometry; head_dim a multiple of 8 and at most 256.
        cupy: the module, or what stands in for it in tests.
    """

    def __init__(self, config: MossConfig, cupy: Any) -> None:
        self.config = config
        self.kernels = Launchers(cupy)
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        self._checked = weakref.WeakSet[BlockWeights]()

    def free(self) -> None:
        """Give back to the card what CuPy keeps of the memory of intermediate results."""
        pool = self.kernels.cupy.get_default_memory_pool()
        pool.free_all_blocks()
        pool.set_limit(size=0)  # none

    def head(self, h: Var, norm_weight: Var, norm_bias: Var, weight: Region, bias: Var) -> Var:
        check_shape("h", h, (h.shape[0], self.config.n_embd))
        check_shape("weight", weight, (bias.shape[0], self.config.n_embd))

        def work(a: Sequence[Array], out: Array) -> None:
            normed = self.kernels.layer_norm(a[0], a[1], a[2], self.config.layer_norm_epsilon)
            self.kernels.add_bias(self.kernels.dense(normed, _at(a[3], weight)), a[4], out)

        inputs = [h, norm_weight, norm_bias, weight.memory, bias]
        return _code((h.shape[0], weight.shape[0]), inputs, work)

    def block(self, h: Var, weights: BlockWeights, keys: Var, values: Var, layer: int, start_pos: int) -> Var:
        check_shape("h", h, (h.shape[0], self.config.n_embd))
        check_cache(keys, values, self.config.n_head, self.config.head_dim, layer, start_pos, h.shape[0])
        self._check_weights(weights)

        def work(a: Sequence[Array], out: Array) -> None:
            def at(region: Region) -> Array:
                return _at(a[1], region)

            self._block(a[0], weights, at, (a[2], a[3][layer], a[4][layer]), start_pos, out)

        return _code(h.shape, [h, weights.ln_1_weight.memory, self.rotary, keys, values], work)

    def _block(
        self,
        h: Array,
        weights: BlockWeights,
        at: At,
        tables: tuple[Array, Array, Array],
        start_pos: int,
        out: Array,
    ) -> None:
        """The block over arrays on the device; tables: rotary, and the layer's keys and values."""
        kernels = self.kernels
        norm = at(weights.ln_1_weight), at(weights.ln_1_bias)
        normed = kernels.layer_norm(h, *norm, self.config.layer_norm_epsilon)
        q = kernels.rotary_cache(_product(kernels, weights.qkv, at, normed), *tables, start_pos)
        context = kernels.attention(q, *tables[1:], start_pos)
        attended = _product(kernels, weights.out, at, context)
        inner = kernels.bias_gelu(_product(kernels, weights.fc_in, at, normed), at(weights.fc_in_bias))
        narrowed = _product(kernels, weights.fc_out, at, inner)
        kernels.add_block(h, attended, narrowed, at(weights.fc_out_bias), out)

    def _check_weights(self, weights: BlockWeights) -> None:
        """Once for each object, for it goes with a piece of memory that native code will trust."""
        if weights in self._checked:
            return
        width, inner = self.config.n_embd, self.config.n_inner
        check_matrix("qkv", weights.qkv, 3 * width, width)
        check_matrix("out", weights.out, width, width)
        check_matrix("fc_in", weights.fc_in, inner, width)
        check_matrix("fc_out", weights.fc_out, width, inner)
        for name in ("ln_1_weight", "ln_1_bias", "fc_in_bias", "fc_out_bias"):
            vector = getattr(weights, name)
            check_shape(name, vector, (inner if name == "fc_in_bias" else width,))
            check_dtype(name, vector, "float16")
        self._checked.add(weights)


def _at(memory: Array, region: Region) -> Array:
    """The region of a unit's memory, as an array over it."""
    n_bytes = int(np.prod(region.shape)) * np.dtype(region.dtype).itemsize
    piece = memory[region.offset : region.offset + n_bytes]
    return piece.view(np.dtype(region.dtype)).reshape(region.shape)


def _product(kernels: Launchers, matrix: Matrix, at: At, x: Array) -> Array:
    """x times the matrix."""
    if isinstance(matrix, DenseMatrix):
        return kernels.dense(x, at(matrix.weight))
    if matrix.input_order is not None:
        x = kernels.gather_inputs(x, at(matrix.input_order).reshape(-1))
    return kernels.packed(x, at(matrix.packed), at(matrix.scales), at(matrix.zeros), matrix.bits)


def _code(shape: tuple[int, ...], inputs: list[Var], work: Work) -> Var:
    """One Jittor operation that calls ``work`` with its inputs' arrays and the array for its result."""

    def run(_: Any, data: dict[str, list[Array]]) -> None:
        work(data["inputs"], data["outputs"][0])

    return jt.numpy_code(shape, np.float32, inputs, run)
