"""Launches what training computes on a card: cuBLAS's products both ways, and the kernels of training.cu. Arrays are CuPy's.

Letters as in moss_jt.kernels.interface. As launchers.py, this imports nowhere without a GPU's packages.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_jt.kernels.cuda.cublas import Array, Matrices, gemm, gemm_of_heads
from moss_jt.kernels.cuda.launchers import NORM_THREADS, Launchers
from moss_jt.kernels.needs import CARD_QUERIES
from moss_jt.kernels.training import Spans

ROW_THREADS = 256  # kRowThreads in training.cu
SOURCE = "training.cu"


@dataclass(frozen=True)
class CardMatrix:
    """A matrix (N, K) as it lies on the card.

    weight  (N, K) float16; or where ``bits`` is not 16 the packed bytes
    scales, zeros, order  of a packed matrix, as of moss_jt.kernels.cuda.launchers.Product
    """

    weight: Array
    bits: int = 16
    scales: Array = None
    zeros: Array = None
    order: Array = None


class TrainingLaunchers:
    """Of one device. Every method writes its result where it is told to.

    Args:
        cupy: the module, or what stands in for it.
    """

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.kernels = Launchers(cupy)

    def product(self, x: Array, matrix: CardMatrix, out: Array) -> None:
        """out (T, N) = x (T, K) @ w.T, in float16 with float32 sums: see scaled_half in training.cu."""
        half, powers = self._scaled(x, matrix.order)
        gemm(self.cupy, half, self._widened(matrix), out, transpose_b=True)
        self._each("scale_rows", out.size, out, powers, *out.shape)

    def product_back(self, g: Array, matrix: CardMatrix, out: Array) -> None:
        """out (T, K) = g (T, N) @ w, likewise."""
        half, powers = self._scaled(g, None)
        target = out if matrix.order is None else self.cupy.empty(out.shape, np.float32)
        gemm(self.cupy, half, self._widened(matrix), target)
        if matrix.order is None:
            self._each("scale_rows", out.size, out, powers, *out.shape)
        else:
            self._each("scatter_scaled", out.size, target, powers, matrix.order, out, *out.shape)

    def multiply(
        self,
        a: Array,
        b: Array,
        out: Array,
        transpose_a: bool,
        transpose_b: bool,
        alpha: float,
        plus: Array = None,
    ) -> None:
        """out = plus + alpha * a @ b in float32."""
        if plus is not None:
            self._each("add_rows", out.size, plus, None, None, out, 0, 0, *out.shape)
        gemm(self.cupy, a, b, out, transpose_a, transpose_b, alpha, 0.0 if plus is None else 1.0)

    def norm(self, h: Array, weight: Array, bias: Array, epsilon: float, out: Array) -> None:
        arguments = (h, weight, bias, out, h.shape[1], float(epsilon))
        self.kernels.launch("elementwise.cu", "layer_norm", (h.shape[0],), *arguments, threads=NORM_THREADS)

    def norm_back(
        self, g: Array, h: Array, weight: Array, epsilon: float, back: Array, normed: Array
    ) -> None:
        self._rows("norm_back", (h.shape[0],), g, h, weight, back, normed, h.shape[1], float(epsilon))

    def gelu(self, y: Array, bias: Array, out: Array) -> None:
        self.kernels.each("elementwise.cu", "bias_gelu", out.size, y, bias, out, 1, *out.shape)

    def gelu_back(self, g: Array, y: Array, bias: Array, out: Array) -> None:
        self._each("gelu_back", out.size, g, y, bias, out, *out.shape)

    def add(self, a: Array, b: Array, bias: Array, out: Array) -> None:
        """out = a + b, and the bias where it is not None."""
        self._each("add_rows", out.size, a, b, bias, out, 1, int(bias is not None), *out.shape)

    def attention(self, qkv: Array, rotary: Array, spans: Spans, heads: int, out: Array) -> None:
        """qkv (T, 3C) -> out (T, C), causal within each span; rotary (P, 2, pairs)."""
        head = HeadsOf(qkv.shape[1] // 3, heads)
        turned = self._turned(qkv, rotary, spans, heads)
        for first, count in spans.tolist():
            for queries in _queries(count):
                weights = self._weights(turned, first, queries, head)
                shape = (heads, len(queries), head.dim, queries.stop)
                context = Matrices(out, (first + queries.start) * head.width, head.width, head.dim)
                gemm_of_heads(
                    self.cupy, head.scores(weights, queries), head.values(qkv, first), context, shape
                )

    def attention_back(
        self, g: Array, qkv: Array, rotary: Array, spans: Spans, heads: int, out: Array
    ) -> None:
        """g (T, C) of attention's result -> out (T, 3C), that of qkv.

        From the last queries to the first: those have seen all of a sample, and write what the others add to.
        """
        width, head = qkv.shape[1] // 3, HeadsOf(qkv.shape[1] // 3, heads)
        turned = self._turned(qkv, rotary, spans, heads)
        back = self.cupy.empty(turned.shape, np.float32)  # through queries and keys as they are turned
        for first, count in spans.tolist():
            for queries in reversed(_queries(count)):
                rows, seen = len(queries), queries.stop
                beta = 0.0 if seen == count else 1.0
                weights = self._weights(turned, first, queries, head)
                slopes = self.cupy.empty(weights.shape, np.float32)
                own = Matrices(g, (first + queries.start) * width, width, head.dim)
                scores, through = (head.scores(array, queries) for array in (weights, slopes))
                by_key = (heads, seen, head.dim, rows)
                gemm_of_heads(
                    self.cupy,
                    own,
                    head.values(qkv, first),
                    through,
                    (heads, rows, seen, head.dim),
                    transpose_b=True,
                )
                gemm_of_heads(
                    self.cupy, scores, own, head.values(out, first), by_key, transpose_a=True, beta=beta
                )
                self._rows("softmax_back", (heads * rows,), weights, slopes, seen)
                gemm_of_heads(
                    self.cupy,
                    through,
                    head.keys(turned, first),
                    head.queries(back, first + queries.start),
                    (heads, rows, head.dim, seen),
                    alpha=head.scale,
                )
                gemm_of_heads(
                    self.cupy,
                    through,
                    head.queries(turned, first + queries.start),
                    head.keys(back, first),
                    by_key,
                    transpose_a=True,
                    alpha=head.scale,
                    beta=beta,
                )
        self._turn(back, rotary, spans, heads, out, back=True)

    def logit_summary(self, logits: Array, bias: Array, columns: NDArray[np.int64], out: Array) -> None:
        """out (R, 4): see logit_summary in training.cu."""
        own = self.cupy.asarray(columns.astype(np.int32))
        self._rows("logit_summary", (logits.shape[0],), logits, bias, own, out, logits.shape[1])

    def logit_slope(
        self,
        logits: Array,
        bias: Array,
        columns: NDArray[np.int64],
        shift: NDArray[np.float32],
        share: float,
        out: Array,
    ) -> None:
        own, shifts = self.cupy.asarray(columns.astype(np.int32)), self.cupy.asarray(shift)
        self._each("logit_slope", out.size, logits, bias, own, shifts, out, float(share), *out.shape)

    def _scaled(self, x: Array, order: Array) -> tuple[Array, Array]:
        half = self.cupy.empty(x.shape, np.float16)
        powers = self.cupy.empty((x.shape[0],), np.float32)
        self._rows("scaled_half", (x.shape[0],), x, order, half, powers, int(order is not None), x.shape[1])
        return half, powers

    def _widened(self, matrix: CardMatrix) -> Array:
        if matrix.bits == 16:
            return matrix.weight
        return self.kernels.dequantize(matrix.weight, matrix.scales, matrix.zeros, matrix.bits)

    def _turned(self, qkv: Array, rotary: Array, spans: Spans, heads: int) -> Array:
        """Queries and keys (T, 2C), turned by their positions."""
        tokens, width = qkv.shape
        turned = self.cupy.empty((tokens, width // 3 * 2), np.float32)
        self._turn(qkv, rotary, spans, heads, turned)
        return turned

    def _turn(
        self, x: Array, rotary: Array, spans: Spans, heads: int, out: Array, back: bool = False
    ) -> None:
        """Of x (T, 2C or 3C) queries and keys into those of out (T, 3C or 2C)."""
        positions = np.concatenate([np.arange(count, dtype=np.int32) for _, count in spans])
        tokens, width = x.shape[0], min(x.shape[1], out.shape[1]) // 2
        strides = x.shape[1], out.shape[1]
        arguments = (x, rotary, self.cupy.asarray(positions), out)
        sizes = (tokens, heads, width // heads, rotary.shape[2], *strides, int(back))
        self._each("turn", tokens * width, *arguments, *sizes)

    def _weights(self, turned: Array, first: int, queries: range, head: "HeadsOf") -> Array:
        """(H, Q, seen): of some queries of a sample that begins at row ``first``, over what they see."""
        seen = queries.stop
        scores = self.cupy.empty((head.count, len(queries), seen), np.float32)
        gemm_of_heads(
            self.cupy,
            head.queries(turned, first + queries.start),
            head.keys(turned, first),
            head.scores(scores, queries),
            (head.count, len(queries), seen, head.dim),
            transpose_b=True,
            alpha=head.scale,
        )
        self._rows("causal_softmax", (len(queries), head.count), scores, seen, queries.start)
        return scores

    def _each(self, kernel: str, count: int, *arguments: Any) -> None:
        self.kernels.each(SOURCE, kernel, count, *arguments)

    def _rows(self, kernel: str, grid: tuple[int, ...], *arguments: Any) -> None:
        self.kernels.launch(SOURCE, kernel, grid, *arguments, threads=ROW_THREADS)


@dataclass(frozen=True)
class HeadsOf:
    """Where a model's heads lie in the arrays of attention: ``count`` of them in rows of ``width``."""

    width: int
    count: int

    @property
    def dim(self) -> int:
        return self.width // self.count

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)

    def queries(self, turned: Array, row: int) -> Matrices:
        return Matrices(turned, 2 * row * self.width, 2 * self.width, self.dim)

    def keys(self, turned: Array, row: int) -> Matrices:
        return Matrices(turned, (2 * row + 1) * self.width, 2 * self.width, self.dim)

    def values(self, qkv: Array, row: int) -> Matrices:
        return Matrices(qkv, (3 * row + 2) * self.width, 3 * self.width, self.dim)

    def scores(self, array: Array, queries: range) -> Matrices:
        return Matrices(array, 0, queries.stop, len(queries) * queries.stop)


def _queries(count: int) -> list[range]:
    return [range(first, min(first + CARD_QUERIES, count)) for first in range(0, count, CARD_QUERIES)]
