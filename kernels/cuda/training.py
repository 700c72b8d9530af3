"""Training's operators on a card: each is one operation over Jittor's own memory, of cuBLAS's products and our kernels.

Products with the model's matrices are of float16, each row of the activations times a power of two of its own; all else is float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_jt.backend.jittor import jt
from moss_jt.kernels.checks import check_dtype, check_matrix, check_shape
from moss_jt.kernels.cuda.cublas import Array
from moss_jt.kernels.cuda.operators import array_at, operation
from moss_jt.kernels.cuda.training_launchers import CardMatrix, TrainingLaunchers
from moss_jt.kernels.interface import DenseMatrix, Matrix, Region, Var, Weight
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.kernels.training import LogitSummary, Spans, check_spans, product_shape
from moss_jt.store.config import MossConfig

Arrays = Sequence[Array]


class CudaTrainingOperators:
    """See :class:`moss_jt.kernels.training.TrainingOperators`. Weights are frozen: Regions, or Vars of float16.

    Args:
        config: the model's geometry; n_embd a multiple of 4, head_dim an even number.
        cupy: the module, or what stands in for it in tests.
    """

    def __init__(self, config: MossConfig, cupy: Any) -> None:
        self.config = config
        self.kernels = TrainingLaunchers(cupy)
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        self._most_tokens = 0

    def begin(self) -> None:
        """Give back to the card what CuPy and Jittor keep of the memory of results. Call it before each step."""
        self._most_tokens = 0
        self._free()

    def close(self) -> None:
        """The same for good."""
        self._free()
        self.kernels.cupy.get_default_memory_pool().set_limit(size=0)  # none

    def _free(self) -> None:
        self.kernels.cupy.get_default_memory_pool().free_all_blocks()
        jt.gc()

    def _free_for(self, tokens: int) -> None:
        """Whoever has more tokens than all before finds no use for their memory, and both would be too much."""
        if tokens > self._most_tokens:
            self._free()
            self._most_tokens = tokens

    def product(self, x: Var, matrix: Matrix) -> Var:
        inputs, on_card, (outputs, width) = self._with_matrix(x, matrix)
        check_shape("x", x, (x.shape[0], width))
        work = self.kernels.product
        return operation((x.shape[0], outputs), inputs, lambda a, out: work(a[0], on_card(a), out))

    def product_back(self, g: Var, matrix: Matrix) -> Var:
        inputs, on_card, (outputs, width) = self._with_matrix(g, matrix)
        check_shape("g", g, (g.shape[0], outputs))
        work = self.kernels.product_back
        return operation((g.shape[0], width), inputs, lambda a, out: work(a[0], on_card(a), out))

    def multiply(
        self,
        a: Var,
        b: Var,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        plus: Var | None = None,
    ) -> Var:
        rows, columns, _ = product_shape(a, b, transpose_a, transpose_b, plus)
        inputs = [a, b] if plus is None else [a, b, plus]

        def work(arrays: Arrays, out: Array) -> None:
            added = arrays[2] if plus is not None else None
            self.kernels.multiply(arrays[0], arrays[1], out, transpose_a, transpose_b, alpha, added)

        return operation((rows, columns), inputs, work)

    def norm(self, h: Var, weight: Weight, bias: Weight) -> Var:
        self._free_for(h.shape[0])  # a block begins with it, both ways
        inputs, (own_weight, own_bias) = self._with_vectors([h], weight, bias)
        epsilon, norm = self.config.layer_norm_epsilon, self.kernels.norm
        return operation(h.shape, inputs, lambda a, out: norm(a[0], own_weight(a), own_bias(a), epsilon, out))

    def norm_back(self, g: Var, h: Var, weight: Weight) -> tuple[Var, Var]:
        check_shape("g", g, tuple(h.shape))
        inputs, (own,) = self._with_vectors([g, h], weight)

        def run(_: Any, data: dict[str, list[Array]]) -> None:
            a, (back, normed) = data["inputs"], data["outputs"]
            self.kernels.norm_back(a[0], a[1], own(a), self.config.layer_norm_epsilon, back, normed)

        back, normed = jt.numpy_code([h.shape] * 2, [np.float32] * 2, inputs, run)
        return back, normed

    def gelu(self, y: Var, bias: Weight) -> Var:
        inputs, (own,) = self._with_vectors([y], bias)
        return operation(y.shape, inputs, lambda a, out: self.kernels.gelu(a[0], own(a), out))

    def gelu_back(self, g: Var, y: Var, bias: Weight) -> Var:
        check_shape("g", g, tuple(y.shape))
        inputs, (own,) = self._with_vectors([g, y], bias)
        return operation(y.shape, inputs, lambda a, out: self.kernels.gelu_back(a[0], a[1], own(a), out))

    def attention(self, qkv: Var, spans: Spans) -> Var:
        tokens, width = self._check_qkv(qkv, spans)
        heads, work = self.config.n_head, self.kernels.attention
        return operation(
            (tokens, width), [qkv, self.rotary], lambda a, out: work(a[0], a[1], spans, heads, out)
        )

    def attention_back(self, g: Var, qkv: Var, spans: Spans) -> Var:
        tokens, width = self._check_qkv(qkv, spans)
        check_shape("g", g, (tokens, width))
        heads, work = self.config.n_head, self.kernels.attention_back
        inputs = [g, qkv, self.rotary]
        return operation(
            (tokens, 3 * width), inputs, lambda a, out: work(a[0], a[1], a[2], spans, heads, out)
        )

    def add(self, a: Var, b: Var, bias: Weight | None = None) -> Var:
        check_shape("b", b, tuple(a.shape))
        inputs, own = self._with_vectors([a, b], *([] if bias is None else [bias]))

        def work(arrays: Arrays, out: Array) -> None:
            self.kernels.add(arrays[0], arrays[1], own[0](arrays) if own else None, out)

        return operation(a.shape, inputs, work)

    def logit_summary(self, logits: Var, bias: Var, columns: NDArray[np.int64]) -> LogitSummary:
        inputs, (own,) = self._with_vectors([logits], bias)
        self._check_columns(columns, logits)
        work = self.kernels.logit_summary
        numbers = operation(
            (logits.shape[0], 4), inputs, lambda a, out: work(a[0], own(a), columns, out)
        ).numpy()
        return LogitSummary(numbers[:, 0], numbers[:, 1], numbers[:, 2].astype(np.int64), numbers[:, 3])

    def logit_slope(
        self, logits: Var, bias: Var, columns: NDArray[np.int64], shift: NDArray[np.float32], share: float
    ) -> Var:
        inputs, (own,) = self._with_vectors([logits], bias)
        self._check_columns(columns, logits)
        work = self.kernels.logit_slope
        return operation(logits.shape, inputs, lambda a, out: work(a[0], own(a), columns, shift, share, out))

    @staticmethod
    def _check_columns(columns: NDArray[np.int64], logits: Var) -> None:
        rows, width = logits.shape
        if len(columns) != rows or columns.max() >= width or columns.min() < -1:
            raise ValueError(
                f"{len(columns)} columns up to {columns.max()} do not fit logits of {logits.shape}"
            )

    def _check_qkv(self, qkv: Var, spans: Spans) -> tuple[int, int]:
        tokens, width = qkv.shape[0], self.config.n_embd
        check_shape("qkv", qkv, (tokens, 3 * width))
        check_spans(spans, tokens)
        if spans[:, 1].max() > self.config.n_positions:
            raise ValueError(f"a sample is longer than the model's {self.config.n_positions} positions")
        return tokens, width

    @staticmethod
    def _with_vectors(
        inputs: list[Var], *vectors: Weight
    ) -> tuple[list[Var], list[Callable[[Arrays], Array]]]:
        """An operation's inputs with float16 vectors as wide as the first of them, and how each is found among its arrays."""
        for vector in vectors:
            check_shape("a norm's or bias's vector", vector, (inputs[0].shape[1],))
            check_dtype("a norm's or bias's vector", vector, "float16")
        return inputs, [_among(inputs, vector) for vector in vectors]

    @staticmethod
    def _with_matrix(
        x: Var, matrix: Matrix
    ) -> tuple[list[Var], Callable[[Arrays], CardMatrix], tuple[int, int]]:
        """An operation's inputs, x and what holds a matrix; how that is found among its arrays; and its (N, K)."""
        inputs = [x]
        if isinstance(matrix, DenseMatrix):
            outputs, width = matrix.weight.shape
            check_matrix("matrix", matrix, outputs, width)
            dense = _among(inputs, matrix.weight)
            return inputs, lambda a: CardMatrix(dense(a)), (outputs, width)
        outputs, width = matrix.packed.shape[0], matrix.packed.shape[1] * 8 // matrix.bits
        check_matrix("matrix", matrix, outputs, width)
        packed, scales, zeros = (_among(inputs, w) for w in (matrix.packed, matrix.scales, matrix.zeros))
        order = None if matrix.input_order is None else _among(inputs, matrix.input_order)

        def on_card(a: Arrays) -> CardMatrix:
            own_order = None if order is None else order(a).reshape(-1)
            return CardMatrix(packed(a), matrix.bits, scales(a), zeros(a), own_order)

        return inputs, on_card, (outputs, width)


def _among(inputs: list[Var], weight: Weight) -> Callable[[Arrays], Array]:
    """Puts what holds a weight among an operation's inputs, once, and finds it among the operation's arrays."""
    memory = weight.memory if isinstance(weight, Region) else weight
    number = next((i for i, var in enumerate(inputs) if var is memory), len(inputs))
    if number == len(inputs):
        inputs.append(memory)
    if isinstance(weight, Region):
        return lambda arrays: array_at(arrays[number], weight)
    return lambda arrays: arrays[number]
