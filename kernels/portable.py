"""Every operator in plain Jittor operations: right on any device, and fast on none.

The oracle of the tests, and what a GPU runs where there is no kernel of its own. Layers and positions enter as index
Vars, because Jittor compiles a Python number into its kernels: nothing here compiles anew from token to token, apart
from the shapes that Jittor's own operations specialise on.
"""

import math

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.checks import check_adapters, check_block, check_cache, check_shape
from moss_jt.kernels.interface import (
    PAGE,
    BlockByBlock,
    BlockWeights,
    ByteRows,
    CacheRows,
    DenseMatrix,
    Matrix,
    PackedMatrix,
    Places,
    Var,
)
from moss_jt.kernels.rotary_table import spread_rotary_table
from moss_jt.store.config import MossConfig

# The largest number of a vector below which it counts as zero in int8.
LEAST_LARGEST = 1e-30


def dequantize(matrix: PackedMatrix) -> Var:
    """The packed matrix as (N, K) float32, columns in packed order."""
    outputs, groups = matrix.scales.shape
    q = matrix.packed.float32()
    if matrix.bits == 4:
        high = jt.floor(q * 0.0625)
        low = q - high * 16.0
        halves = [half.reshape((outputs, -1, 16)) for half in (low, high)]
        q = jt.concat(halves, dim=2)
    q = q.reshape((outputs, groups, matrix.group_size))
    scales = matrix.scales.float32().reshape((outputs, groups, 1))
    zeros = matrix.zeros.float32().reshape((outputs, groups, 1)) + 1.0
    return (scales * (q - zeros)).reshape((outputs, -1))


def linear(x: Var, matrix: Matrix) -> Var:
    """``x @ w.T`` in float32: (T, K) -> (T, N)."""
    if isinstance(matrix, DenseMatrix):
        return jt.nn.matmul_transpose(x, matrix.weight.float32())
    if matrix.input_order is not None:
        x = x[:, matrix.input_order.reshape((-1,))]
    return jt.nn.matmul_transpose(x, dequantize(matrix))


def layer_norm(h: Var, weight: Var, bias: Var, epsilon: float) -> Var:
    """Two passes, as torch: Jittor's own takes E[x^2] - E[x]^2, which cancels."""
    centred = h - h.mean(dim=-1, keepdims=True)
    variance = (centred * centred).mean(dim=-1, keepdims=True)
    return centred / jt.sqrt(variance + epsilon) * weight.float32() + bias.float32()


def gelu_new(x: Var) -> Var:
    return 0.5 * x * (1.0 + jt.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def index(values: np.ndarray) -> Var:
    """An index Var of two axes: one of shape (1,) would be compiled in as a constant."""
    return jt.array(values.astype(np.int32).reshape(-1, 1))


class PortableOperators(BlockByBlock):
    """See :class:`moss_jt.kernels.interface.Operators`."""

    level = "portable"

    def __init__(self, config: MossConfig, adapters: AdapterBank | None = None) -> None:
        self.config, self.adapters = config, adapters
        cosines, sines = spread_rotary_table(config.n_positions, config.head_dim, config.rotary_dim)
        self.cosines, self.sines = jt.array(cosines), jt.array(sines)
        swapped = np.arange(config.head_dim)
        swapped[: config.rotary_dim] ^= 1
        self.swapped = jt.array(swapped.astype(np.int32))

    def head(self, h: Var, norm_weight: Var, norm_bias: Var, weight: Var, bias: Var, whole: int = 0) -> Var:
        normed = layer_norm(h, norm_weight, norm_bias, self.config.layer_norm_epsilon)
        return linear(normed, DenseMatrix(weight)) + bias.float32()

    def block(
        self, h: Var, weights: BlockWeights, keys: CacheRows, values: CacheRows, layer: int, places: Places
    ) -> Var:
        check_shape("h", h, (places.count, self.config.n_embd))
        check_block(weights, self.config)
        check_cache(keys, values, self.config, layer, places)
        check_adapters(places, self.adapters, layer)

        def product(x: Var, field: str) -> Var:
            y = linear(x, getattr(weights, field))
            return self._with_adapters(x, y, layer, field, places)

        normed = layer_norm(h, weights.ln_1_weight, weights.ln_1_bias, self.config.layer_norm_epsilon)
        attended = self._attention(product(normed, "qkv"), keys, values, layer, places)
        inner = gelu_new(product(normed, "fc_in") + weights.fc_in_bias.float32())
        mlp = product(inner, "fc_out") + weights.fc_out_bias.float32()
        return h + product(attended, "out") + mlp

    def _with_adapters(self, x: Var, y: Var, layer: int, field: str, places: Places) -> Var:
        """A product y (T, N) of x (T, K) with what the tokens' adapters add to it."""
        if self.adapters is None or places.adapters is None:
            return y
        for number in {*places.adapters.tolist()} - {-1}:
            pair = self.adapters.pair(number, layer, field)
            if pair is not None:
                a, b = (jt.array(matrix) for matrix in pair)
                has = jt.array((places.adapters == number)[:, None].astype(np.float32))
                y = y + has * jt.nn.matmul(jt.nn.matmul_transpose(x, a), b)
        return y

    def _rotate(self, x: Var, positions: Var) -> Var:
        """x (T, H, D), positions (T, 1)."""
        return x * self.cosines[positions] + x[:, :, self.swapped] * self.sines[positions]

    def _attention(self, qkv: Var, keys: CacheRows, values: CacheRows, layer: int, places: Places) -> Var:
        """qkv (T, 3C) -> (T, C), after writing the new keys and values.

        Every token is scored against all positions of all slots, and sees those of its own.
        """
        heads, head_dim = self.config.n_head, self.config.head_dim
        tokens, (slots, groups) = places.count, places.pages.shape
        new = index(places.positions)
        q, k, v = (part.reshape((tokens, heads, head_dim)) for part in jt.chunk(qkv, 3, dim=1))
        cached = places.pages[:, :, None] * PAGE + np.arange(
            PAGE
        )  # (S, G, PAGE): where each slot's positions lie
        lies = cached.reshape(slots, -1)[places.slots, places.positions]
        for cache, rows in ((keys, self._rotate(k, new)), (values, v)):
            _write(cache, rows, layer, lies)
        end = cached.size
        # (H, S, D) each
        past_k, past_v = (
            _read(cache, layer, cached.reshape(-1)).transpose((1, 0, 2)) for cache in (keys, values)
        )
        position = np.arange(slots * groups * PAGE) % (groups * PAGE)
        seen = position <= places.positions[:, None]
        seen &= np.arange(end) // (groups * PAGE) == places.slots[:, None]
        mask = jt.array(np.where(seen, np.float32(0), np.float32(-1e30)))
        scores = jt.nn.bmm_transpose(self._rotate(q, new).transpose((1, 0, 2)), past_k)
        weights = jt.nn.softmax(scores * (1 / math.sqrt(head_dim)) + mask, dim=-1)
        return jt.nn.bmm(weights, past_v).transpose((1, 0, 2)).reshape((tokens, heads * head_dim))


def _write(cache: CacheRows, rows: Var, layer: int, lies: np.ndarray) -> None:
    """rows (T, H, D) float32 to positions (T,) of a layer of the cache."""
    tokens, heads, head_dim = rows.shape
    in_layer, at = index(np.full(tokens, layer)), index(lies)
    one_each = (tokens, 1, heads, head_dim)
    if not isinstance(cache, ByteRows):
        cache[in_layer, at] = rows.reshape(one_each).float16()
        return
    largest = jt.abs(rows).max(dim=-1, keepdims=True)
    numbers = jt.round(rows * (127.0 / jt.maximum(largest, LEAST_LARGEST)))
    cache.numbers[in_layer, at] = numbers.reshape(one_each).int8()
    cache.scales[in_layer, *_scales_at(lies, heads)] = largest.reshape((tokens, heads)) / 127.0


def _read(cache: CacheRows, layer: int, lies: np.ndarray) -> Var:
    """Positions (S,) of a layer of the cache: (S, H, D) float32."""
    in_layer = index(np.full(len(lies), layer))
    rows = (cache.numbers if isinstance(cache, ByteRows) else cache)[in_layer, index(lies)].float32()
    _, _, heads, head_dim = rows.shape
    rows = rows.reshape((len(lies), heads, head_dim))
    if not isinstance(cache, ByteRows):
        return rows
    scales = cache.scales[in_layer, *_scales_at(lies, heads)]
    return rows * scales.reshape((len(lies), heads, 1))


def _scales_at(lies: np.ndarray, heads: int) -> tuple[Var, Var, Var]:
    """Where the scales of all heads at these positions are in a layer's (P // PAGE, H, PAGE)."""
    return index(lies // PAGE), index(np.arange(heads)).reshape((1, heads)), index(lies % PAGE)
