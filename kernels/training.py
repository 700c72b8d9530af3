"""What training asks of its operators, whichever device runs them: products both ways, and derivatives.

Letters as in moss_jt.kernels.interface. All activations and results are float32; matrices and vectors are a model's own, or, where
they learn themselves, float32.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moss_jt.kernels.checks import check_shape
from moss_jt.kernels.interface import Matrix, Var, Weight

Spans = NDArray[np.int32]


@dataclass(frozen=True)
class LogitSummary:
    """Of rows of logits over some of the vocabulary.

    largest  (R,) float32
    total    (R,) of exponentials, relative to the largest
    best     (R,) int64; the column of the largest, of several the first
    own      (R,) float32; the logit of the row's own column, 0 where it has none
    """

    largest: NDArray[np.float32]
    total: NDArray[np.floating]
    best: NDArray[np.int64]
    own: NDArray[np.float32]


def check_spans(spans: Spans, tokens: int) -> None:
    """Raises ValueError unless these are so many rows of samples, one after another."""
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype != np.int32:
        raise ValueError(f"spans are {spans.dtype} of shape {spans.shape}; int32 of shape (S, 2) are needed")
    firsts, counts = spans[:, 0], spans[:, 1]
    if (
        len(spans) == 0
        or counts.min() < 1
        or (firsts != np.cumsum(counts) - counts).any()
        or counts.sum() != tokens
    ):
        raise ValueError(f"spans {spans.tolist()} are not {tokens} rows one after another")


def product_shape(
    a: Var, b: Var, transpose_a: bool, transpose_b: bool, plus: Var | None
) -> tuple[int, int, int]:
    """Of :meth:`TrainingOperators.multiply`: rows and columns of the result, and what is summed over.

    Raises:
        ValueError: the matrices do not fit together.
    """
    rows, inner = reversed(a.shape) if transpose_a else a.shape
    other, columns = reversed(b.shape) if transpose_b else b.shape
    if inner != other:
        raise ValueError(f"{a.shape} and {b.shape} cannot be multiplied so")
    if plus is not None:
        check_shape("plus", plus, (rows, columns))
    return rows, columns, inner


class TrainingOperators(Protocol):
    """Steps of a block and of their derivatives. Results are lazy Vars; nothing is written in place.

    ``spans`` (S, 2) int32, on the host, says which rows are one sample: its first row, and how many it has, one after another. The
    result's bits depend on neither threads nor what else is in a pass of the same shape.
    """

    def product(self, x: Var, matrix: Matrix) -> Var:
        """x (T, K) -> (T, N): ``x @ w.T``."""
        ...

    def product_back(self, g: Var, matrix: Matrix) -> Var:
        """g (T, N) -> (T, K): ``g @ w``, the derivative of :meth:`product` by x."""
        ...

    def multiply(
        self,
        a: Var,
        b: Var,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        plus: Var | None = None,
    ) -> Var:
        """``plus + alpha * a @ b`` of float32 matrices, each perhaps transposed."""
        ...

    def norm(self, h: Var, weight: Weight, bias: Weight) -> Var:
        """Layer norm of h (T, C); weight and bias (C,), both float16 or both float32."""
        ...

    def norm_back(self, g: Var, h: Var, weight: Weight) -> tuple[Var, Var]:
        """g (T, C) of the norm's result -> that of h, and h normed without weight and bias: ``sum(g * normed)`` is the weight's."""
        ...

    def gelu(self, y: Var, bias: Weight) -> Var:
        """``gelu_new(y + bias)``; y (T, I), bias (I,) float16 or float32."""
        ...

    def gelu_back(self, g: Var, y: Var, bias: Weight) -> Var:
        """g (T, I) of :meth:`gelu`'s result -> that of y."""
        ...

    def attention(self, qkv: Var, spans: Spans) -> Var:
        """qkv (T, 3C), before the rotary embedding -> (T, C): causal within each span, positions from 0."""
        ...

    def attention_back(self, g: Var, qkv: Var, spans: Spans) -> Var:
        """g (T, C) of :meth:`attention`'s result -> that of qkv (T, 3C)."""
        ...

    def add(self, a: Var, b: Var, bias: Weight | None = None) -> Var:
        """``a + b``, and the bias (N,) float16 or float32 where there is one; a, b (T, N)."""
        ...

    def logit_summary(self, logits: Var, bias: Var, columns: NDArray[np.int64]) -> LogitSummary:
        """Of ``logits + bias``; logits (R, N), bias (N,) float16 or float32, columns (R,): each row's own, or -1."""
        ...

    def logit_slope(
        self, logits: Var, bias: Var, columns: NDArray[np.int64], shift: NDArray[np.float32], share: float
    ) -> Var:
        """(R, N): ``share * (exp(logits + bias - shift) - 1 at the row's own column)``; shift (R,)."""
        ...
