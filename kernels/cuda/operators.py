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
        kernels, epsilon = self.kernels, config.layer_norm_epsilon
        norm = [weights.ln_1_weight, weights.ln_1_bias]

        def attend(a: list[Array]) -> Array:
            """a: h, norm weight and bias, rotary, keys, values, qkv."""
            normed = kernels.layer_norm(a[0], a[1], a[2], epsilon)
            keys_here, values_here = a[4][layer], a[5][layer]
            qkv = _product(kernels, weights.qkv, a[6:], normed)
            q = kernels.rotary_cache(qkv, a[3], keys_here, values_here, start_pos)
            return kernels.attention(q, keys_here, values_here, start_pos)

        def project(a: list[Array]) -> Array:
            """a: context, out."""
            return _product(kernels, weights.out, a[1:], a[0])

        def widen(a: list[Array]) -> Array:
            """a: h, norm weight and bias, fc_in bias, fc_in."""
            normed = kernels.layer_norm(a[0], a[1], a[2], epsilon)
            return kernels.bias_gelu(_product(kernels, weights.fc_in, a[4:], normed), a[3])

        def narrow(a: list[Array]) -> Array:
            """a: h, attended, inner, fc_out bias, fc_out."""
            return kernels.add_block(a[0], a[1], _product(kernels, weights.fc_out, a[4:], a[2]), a[3])

        # Four operations and not one, because jt.numpy_code takes at most ten inputs.
        context = _code(h.shape, [h, *norm, self.rotary, keys, values, *_arrays(weights.qkv)], attend)
        attended = _code(h.shape, [context, *_arrays(weights.out)], project)
        inner_inputs = [h, *norm, weights.fc_in_bias, *_arrays(weights.fc_in)]
        inner = _code((tokens, config.n_inner), inner_inputs, widen)
        return _code(h.shape, [h, attended, inner, weights.fc_out_bias, *_arrays(weights.fc_out)], narrow)


def _arrays(matrix: Matrix) -> list[Var]:
    if isinstance(matrix, DenseMatrix):
        return [matrix.weight]
    order = [] if matrix.input_order is None else [matrix.input_order]
    return [matrix.packed, matrix.scales, matrix.zeros, *order]


def _product(kernels: Launchers, matrix: Matrix, arrays: list[Array], x: Array) -> Array:
    """x times the matrix, over the matrix's arrays on the device."""
    if isinstance(matrix, DenseMatrix):
        return kernels.dense(x, arrays[0])
    if len(arrays) == 4:
        x = kernels.gather_inputs(x, arrays[3].reshape(-1))
    return kernels.packed(x, arrays[0], arrays[1], arrays[2], matrix.bits)


def _code(shape: tuple[int, ...], inputs: list[Var], work: Work) -> Var:
    """One Jittor operation that calls ``work`` with its inputs' arrays and stores what it returns."""

    def run(_: Any, data: dict[str, list[Array]]) -> None:
        data["outputs"][0][...] = work(list(data["inputs"]))

    return jt.numpy_code(shape, np.float32, inputs, run)
