"""The GPU's operators: CuPy kernels over Jittor's own memory, through jt.numpy_code, which hands arrays over without a copy."""

from collections.abc import Callable
from typing import Any

import numpy as np

from moss_jt.backend import jt
from moss_jt.config import MossConfig
from moss_jt.kernels.checks import check_cache, check_dtype, check_shape
from moss_jt.kernels.cuda.launchers import Array, Launchers
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Matrix, Var
from moss_jt.kernels.rotary import rotary_table

Work = Callable[[list[Array]], Array]


class CudaOperators:
    """See :class:`moss_jt.kernels.interface.Operators`.

    Args:
        config: the model's geometry; head_dim a multiple of 8 and at most 256.
        cupy: the module, or what stands in for it in tests.
    """

    def __init__(self, config: MossConfig, cupy: Any) -> None:
        self.config = config
        self.kernels = Launchers(cupy)
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))

    def embed(self, token_ids: Var, table: Var) -> Var:
        check_dtype("table", table, "float16")
        shape = (token_ids.shape[0], table.shape[1])
        return _code(shape, [token_ids, table], lambda a: self.kernels.embed(a[0].reshape(-1), a[1]))

    def head(self, h: Var, norm_weight: Var, norm_bias: Var, weight: Var, bias: Var) -> Var:
        check_shape("h", h, (h.shape[0], self.config.n_embd))

        def work(a: list[Array]) -> Array:
            normed = self.kernels.layer_norm(a[0], a[1], a[2], self.config.layer_norm_epsilon)
            return self.kernels.add_bias(self.kernels.dense(normed, a[3]), a[4])

        return _code((h.shape[0], weight.shape[0]), [h, norm_weight, norm_bias, weight, bias], work)

    def block(self, h: Var, weights: BlockWeights, keys: Var, values: Var, layer: int, start_pos: int) -> Var:
        config, tokens = self.config, h.shape[0]
        check_shape("h", h, (tokens, config.n_embd))
        check_cache(keys, values, config.n_head, config.head_dim, layer, start_pos, tokens)
        vectors = [weights.ln_1_weight, weights.ln_1_bias, weights.fc_in_bias, weights.fc_out_bias]
        matrices = [weights.qkv, weights.out, weights.fc_in, weights.fc_out]
        inputs = [h, *vectors, self.rotary, keys, values]
        places = []
        for matrix in matrices:
            parts = _arrays(matrix)
            places.append(slice(len(inputs), len(inputs) + len(parts)))
            inputs += parts

        def work(a: list[Array]) -> Array:
            products = [
                _product(self.kernels, matrix, a[place])
                for matrix, place in zip(matrices, places, strict=True)
            ]
            return self._block(a, products, layer, start_pos)

        return _code(h.shape, inputs, work)

    def _block(
        self, a: list[Array], products: list[Callable[[Array], Array]], layer: int, start_pos: int
    ) -> Array:
        """a: h, norm weight and bias, fc_in bias, fc_out bias, rotary, keys, values."""
        kernels = self.kernels
        qkv, out, fc_in, fc_out = products
        keys, values = a[6][layer], a[7][layer]
        normed = kernels.layer_norm(a[0], a[1], a[2], self.config.layer_norm_epsilon)
        q = kernels.rotary_cache(qkv(normed), a[5], keys, values, start_pos)
        attended = out(kernels.attention(q, keys, values, start_pos))
        inner = kernels.bias_gelu(fc_in(normed), a[3])
        return kernels.add_block(a[0], attended, fc_out(inner), a[4])


def _arrays(matrix: Matrix) -> list[Var]:
    if isinstance(matrix, DenseMatrix):
        return [matrix.weight]
    order = [] if matrix.input_order is None else [matrix.input_order]
    return [matrix.packed, matrix.scales, matrix.zeros, *order]


def _product(kernels: Launchers, matrix: Matrix, arrays: list[Array]) -> Callable[[Array], Array]:
    """x -> x times the matrix, over its arrays on the device."""
    if isinstance(matrix, DenseMatrix):
        return lambda x: kernels.dense(x, arrays[0])
    bits = matrix.bits

    def product(x: Array) -> Array:
        if len(arrays) == 4:
            x = kernels.gather_inputs(x, arrays[3].reshape(-1))
        return kernels.packed(x, arrays[0], arrays[1], arrays[2], bits)

    return product


def _code(shape: tuple[int, ...], inputs: list[Var], work: Work) -> Var:
    """One Jittor operation that calls ``work`` with its inputs' arrays and stores what it returns."""

    def run(_: Any, data: dict[str, list[Array]]) -> None:
        data["outputs"][0][...] = work(list(data["inputs"]))

    return jt.numpy_code(shape, np.float32, inputs, run)
