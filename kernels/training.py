"""What training asks of its operators, whichever device runs them: products both ways, and derivatives.

Letters as in moss_jt.kernels.interface. All activations and results are float32; matrices and vectors are a model's own, or, where
they learn themselves, float32.
"""

from typing import Protocol

from moss_jt.kernels.interface import Matrix, Var


class TrainingOperators(Protocol):
    """Steps of a block and of their derivatives. Results are lazy Vars; nothing is written in place.

    ``spans`` (S, 2) int32 says which rows are one sample: its first row, and how many it has. The result's bits depend on
    neither threads nor what else is in a pass of the same shape.
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

    def norm(self, h: Var, weight: Var, bias: Var) -> Var:
        """Layer norm of h (T, C); weight and bias (C,), both float16 or both float32."""
        ...

    def norm_back(self, g: Var, h: Var, weight: Var) -> tuple[Var, Var]:
        """g (T, C) of the norm's result -> that of h, and h normed without weight and bias: ``sum(g * normed)`` is the weight's."""
        ...

    def gelu(self, y: Var, bias: Var) -> Var:
        """``gelu_new(y + bias)``; y (T, I), bias (I,) float16 or float32."""
        ...

    def gelu_back(self, g: Var, y: Var, bias: Var) -> Var:
        """g (T, I) of :meth:`gelu`'s result -> that of y."""
        ...

    def attention(self, qkv: Var, spans: Var) -> Var:
        """qkv (T, 3C), before the rotary embedding -> (T, C): causal within each span, positions from 0."""
        ...

    def attention_back(self, g: Var, qkv: Var, spans: Var) -> Var:
        """g (T, C) of :meth:`attention`'s result -> that of qkv (T, 3C)."""
        ...
