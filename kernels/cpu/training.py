"""Training's operators on the CPU: each is one jt.code operation over training.h."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from moss_jt.backend.jittor import jt
from moss_jt.kernels.checks import check_dtype, check_matrix, check_shape
from moss_jt.kernels.cpu.simd import available_simd, chosen_simd
from moss_jt.kernels.cpu.source import run
from moss_jt.kernels.interface import DenseMatrix, Matrix, Var
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.kernels.training import LogitSummary, Spans, check_spans, product_shape
from moss_jt.store.config import MossConfig

KINDS = {16: "Dense", 8: "Int8", 4: "Int4"}
HEADER = "training.h"

MULTIPLY = """
const int64_t m = out0_shape0, n = out0_shape1, k = (int64_t)data["k"];
moss::train_multiply(data["ta"], data["tb"], m, n, k, (float)data["alpha"], (const float*)in0_p, (const float*)in1_p,
                     data["plus"] ? (const float*)in2_p : nullptr, (float*)out0_p);
"""
VECTORS = {"float16": "uint16_t", "float32": "float"}
NORM = """
moss::train_norm((const float*)in0_p, (const VECTOR*)in1_p, (const VECTOR*)in2_p, (float)data["epsilon"], in0_shape0,
                 in0_shape1, (float*)out0_p);
"""
NORM_BACK = """
moss::train_norm_back((const float*)in0_p, (const float*)in1_p, (const VECTOR*)in2_p, (float)data["epsilon"], in0_shape0,
                      in0_shape1, (float*)out0_p, (float*)out1_p);
"""
GELU = """
moss::train_gelu((const float*)in0_p, (const VECTOR*)in1_p, in0_shape0, in0_shape1, (float*)out0_p);
"""
GELU_BACK = """
moss::train_gelu_back((const float*)in0_p, (const float*)in1_p, (const VECTOR*)in2_p, in0_shape0, in0_shape1,
                      (float*)out0_p);
"""
ATTENTION = """
moss::TrainAttention a{};
a.qkv = (const float*)in0_p;
a.rotary = (const float*)in1_p;
a.spans = {(const int32_t*)in2_p, in2_shape0};
a.tokens = in0_shape0;
a.heads = (int64_t)data["heads"];
a.head_dim = in0_shape1 / 3 / a.heads;
a.pairs = in1_shape2;
a.turned = (float*)out1_p;
"""


def matrix_source(bits: int, call: str) -> str:
    """The matrix of in1 and following, and a product with it."""
    if bits == 16:
        made = "{(const uint16_t*)in1_p, in1_shape0, in1_shape1}"
    else:
        inputs = f"in1_shape1 * {8 // bits}"
        made = (
            f"{{(const uint8_t*)in1_p, (const uint16_t*)in2_p, (const uint8_t*)in3_p, in4_shape0 == {inputs} ? "
            f"(const int32_t*)in4_p : nullptr, in1_shape0, {inputs}, in2_shape1}}"
        )
    return (
        f"const moss::{KINDS[bits]} m{made};\n"
        f"moss::{call}(m, (const float*)in0_p, in0_shape0, (float*)out1_p, (float*)out0_p);\n"
    )


class CpuTrainingOperators:
    """See :class:`moss_jt.kernels.training.TrainingOperators`.

    Args:
        config: the model's geometry.
        simd: as for CpuOperators.

    Raises:
        ValueError: this machine does not have ``simd``.
    """

    def __init__(self, config: MossConfig, simd: str | None = None) -> None:
        self.config = config
        self.simd = chosen_simd() if simd is None else simd
        if self.simd not in available_simd():
            raise ValueError(f"simd {simd!r} is not among {available_simd()}")
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        self.no_order = jt.array(np.zeros((2, 1), np.int32))  # for a matrix without input_order: no K is 2

    def product(self, x: Var, matrix: Matrix) -> Var:
        if learns(matrix):
            return self.multiply(x, matrix.weight, transpose_b=True)
        outputs, inputs = matrix_shape(matrix)
        return self._product("train_product", x, inputs, outputs, matrix)

    def product_back(self, g: Var, matrix: Matrix) -> Var:
        if learns(matrix):
            return self.multiply(g, matrix.weight)
        outputs, inputs = matrix_shape(matrix)
        return self._product("train_product_back", g, outputs, inputs, matrix)

    def _product(self, call: str, x: Var, width: int, result: int, matrix: Matrix) -> Var:
        outputs, inputs = matrix_shape(matrix)
        check_matrix("matrix", matrix, outputs, inputs)
        tokens = x.shape[0]
        check_shape("x", x, (tokens, width))
        if isinstance(matrix, DenseMatrix):
            bits, arrays, ordered = 16, [matrix.weight], False
        else:
            ordered = matrix.input_order is not None
            order = matrix.input_order if ordered else self.no_order
            bits, arrays = matrix.bits, [matrix.packed, matrix.scales, matrix.zeros, order]
        shapes = [(tokens, result), (tokens if ordered else 1, inputs if ordered else 1)]
        return self._run(matrix_source(bits, call), shapes, [x, *arrays])[0]

    def multiply(
        self,
        a: Var,
        b: Var,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        plus: Var | None = None,
    ) -> Var:
        rows, columns, inner = product_shape(a, b, transpose_a, transpose_b, plus)
        flags = {"ta": int(transpose_a), "tb": int(transpose_b), "plus": int(plus is not None)}
        data = {"k": inner, "alpha": alpha, **flags}
        return self._run(MULTIPLY, [(rows, columns)], [a, b, a if plus is None else plus], data)[0]

    def norm(self, h: Var, weight: Var, bias: Var) -> Var:
        source = self._over(NORM, h, weight, bias)
        return self._run(source, [tuple(h.shape)], [h, weight, bias], self._epsilon)[0]

    def norm_back(self, g: Var, h: Var, weight: Var) -> tuple[Var, Var]:
        check_shape("g", g, tuple(h.shape))
        source = self._over(NORM_BACK, h, weight)
        back, normed = self._run(source, [tuple(h.shape)] * 2, [g, h, weight], self._epsilon)
        return back, normed

    def gelu(self, y: Var, bias: Var) -> Var:
        return self._run(self._over(GELU, y, bias), [tuple(y.shape)], [y, bias])[0]

    def gelu_back(self, g: Var, y: Var, bias: Var) -> Var:
        check_shape("g", g, tuple(y.shape))
        return self._run(self._over(GELU_BACK, y, bias), [tuple(y.shape)], [g, y, bias])[0]

    def attention(self, qkv: Var, spans: Spans) -> Var:
        tokens, width = self._check_qkv(qkv, spans)
        source = ATTENTION + "moss::train_attention(a, (float*)out0_p);\n"
        shapes = [(tokens, width), (tokens, 2 * width)]
        return self._run(source, shapes, [qkv, self.rotary, jt.array(spans)], {"heads": self.config.n_head})[
            0
        ]

    def attention_back(self, g: Var, qkv: Var, spans: Spans) -> Var:
        tokens, width = self._check_qkv(qkv, spans)
        check_shape("g", g, (tokens, width))
        source = ATTENTION + "moss::train_attention_back(a, (const float*)in3_p, (float*)out0_p);\n"
        shapes = [(tokens, 3 * width), (tokens, 2 * width)]
        return self._run(
            source, shapes, [qkv, self.rotary, jt.array(spans), g], {"heads": self.config.n_head}
        )[0]

    def add(self, a: Var, b: Var, bias: Var | None = None) -> Var:
        return a + b if bias is None else a + b + bias.float32()

    def logit_summary(self, logits: Var, bias: Var, columns: NDArray[np.int64]) -> LogitSummary:
        values = _biased(logits, bias)
        largest = values.max(axis=1)
        total = np.exp(values - largest[:, None]).sum(axis=1, dtype=np.float64)
        rows, own = np.flatnonzero(columns >= 0), np.zeros(len(columns), np.float32)
        own[rows] = values[rows, columns[rows]]
        return LogitSummary(largest, total, values.argmax(axis=1), own)

    def logit_slope(
        self, logits: Var, bias: Var, columns: NDArray[np.int64], shift: NDArray[np.float32], share: float
    ) -> Var:
        slope = _biased(logits, bias)
        np.exp(slope - shift[:, None], out=slope)
        rows = np.flatnonzero(columns >= 0)
        slope[rows, columns[rows]] -= 1
        slope *= np.float32(share)
        return jt.array(slope)

    @property
    def _epsilon(self) -> dict[str, Any]:
        return {"epsilon": self.config.layer_norm_epsilon}

    @staticmethod
    def _over(source: str, x: Var, *vectors: Var) -> str:
        """The source for vectors of their type, as wide as x."""
        dtype = str(vectors[0].dtype)
        for vector in vectors:
            check_shape("a norm's or bias's vector", vector, (x.shape[1],))
            check_dtype("a norm's or bias's vector", vector, dtype if dtype in VECTORS else "float16")
        return source.replace("VECTOR", VECTORS[dtype])

    def _check_qkv(self, qkv: Var, spans: Spans) -> tuple[int, int]:
        tokens, width = qkv.shape[0], self.config.n_embd
        check_shape("qkv", qkv, (tokens, 3 * width))
        check_spans(spans, tokens)
        return tokens, width

    def _run(
        self,
        source: str,
        shapes: Sequence[tuple[int, ...]],
        inputs: list[Var],
        data: dict[str, Any] | None = None,
    ) -> list[Var]:
        return run(self.simd, HEADER, source, list(shapes), inputs, data)


def _biased(logits: Var, bias: Var) -> NDArray[np.float32]:
    """(R, N) on the host, newly allocated."""
    values: NDArray[np.float32] = logits.numpy()
    values += bias.numpy().astype(np.float32)
    return values


def learns(matrix: Matrix) -> TypeGuard[DenseMatrix]:
    """Whether it is of float32, as matrices are that learn themselves."""
    return isinstance(matrix, DenseMatrix) and matrix.weight.dtype == "float32"


def matrix_shape(matrix: Matrix) -> tuple[int, int]:
    """(N, K)"""
    if isinstance(matrix, DenseMatrix):
        outputs, inputs = matrix.weight.shape
        return outputs, inputs
    return matrix.packed.shape[0], matrix.packed.shape[1] * 8 // matrix.bits
