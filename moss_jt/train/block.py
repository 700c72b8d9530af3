"""One block with its adapters, forwards and backwards. The base is frozen: only adapters get gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import BlockWeights, Var
from moss_jt.kernels.training import Spans, TrainingOperators
from moss_jt.train.lora import Floats, Pair


class PairVars(NamedTuple):
    """An adapter's matrices on the device: A (rank, K) and B (N, rank)."""

    a: Var
    b: Var


Adapters = Mapping[str, PairVars]  # target -> its adapter


def on_device(pairs: Mapping[str, Pair]) -> dict[str, PairVars]:
    return {target: PairVars(jt.array(pair.a), jt.array(pair.b)) for target, pair in pairs.items()}


@dataclass
class Kept:
    """What going backwards needs of a block, beside its input: made anew where it was not kept.

    qkv  (T, 3C) before the rotary embedding
    y    (T, I) before bias and GELU
    """

    qkv: Var
    y: Var


class BlockTrainer:
    """A block's steps for ``operators``; ``scale`` is the adapters' own."""

    def __init__(self, operators: TrainingOperators, scale: float) -> None:
        self._operators, self._scale = operators, scale

    def forward(self, h: Var, weights: BlockWeights, adapters: Adapters, spans: Spans) -> tuple[Var, Kept]:
        """h (T, C) -> the block's result, and what may be kept for :meth:`backward`."""
        ops = self._operators
        normed = ops.norm(h, weights.ln_1_weight, weights.ln_1_bias)
        kept = self._kept(normed, weights, adapters)
        attended = ops.attention(kept.qkv, spans)
        inner = ops.gelu(kept.y, weights.fc_in_bias)
        out = self._linear(attended, weights, "out", adapters)
        mlp = self._linear(inner, weights, "fc_out", adapters)
        return ops.add(ops.add(h, out), mlp, weights.fc_out_bias), kept

    def backward(
        self,
        g: Var,
        h: Var,
        weights: BlockWeights,
        adapters: Adapters,
        spans: Spans,
        gradients: Mapping[str, Pair],
        kept: Kept | None = None,
    ) -> Var:
        """g (T, C) of the block's result -> that of h; the adapters' gradients are added to ``gradients``."""
        ops = self._operators
        normed = ops.norm(h, weights.ln_1_weight, weights.ln_1_bias)
        kept = self._kept(normed, weights, adapters) if kept is None else kept
        inner = ops.gelu(kept.y, weights.fc_in_bias)
        g_inner = self._linear_back(g, inner, weights, "fc_out", adapters, gradients)
        g_y = ops.gelu_back(g_inner, kept.y, weights.fc_in_bias)
        g_normed = self._linear_back(g_y, normed, weights, "fc_in", adapters, gradients)
        attended = ops.attention(kept.qkv, spans)
        g_attended = self._linear_back(g, attended, weights, "out", adapters, gradients)
        g_qkv = ops.attention_back(g_attended, kept.qkv, spans)
        g_normed = ops.add(g_normed, self._linear_back(g_qkv, normed, weights, "qkv", adapters, gradients))
        return ops.add(g, ops.norm_back(g_normed, h, weights.ln_1_weight)[0])

    def _kept(self, normed: Var, weights: BlockWeights, adapters: Adapters) -> Kept:
        return Kept(
            self._linear(normed, weights, "qkv", adapters), self._linear(normed, weights, "fc_in", adapters)
        )

    def _linear(self, x: Var, weights: BlockWeights, target: str, adapters: Adapters) -> Var:
        ops = self._operators
        y = ops.product(x, getattr(weights, target))
        if target not in adapters:
            return y
        pair = adapters[target]
        narrow = ops.multiply(x, pair.a, transpose_b=True)
        return ops.multiply(narrow, pair.b, transpose_b=True, alpha=self._scale, plus=y)

    def _linear_back(
        self,
        g: Var,
        x: Var,
        weights: BlockWeights,
        target: str,
        adapters: Adapters,
        gradients: Mapping[str, Pair],
    ) -> Var:
        """g (T, N) of a matrix's result -> that of its input x (T, K)."""
        ops = self._operators
        g_x = ops.product_back(g, getattr(weights, target))
        if target not in adapters:
            return g_x
        pair = adapters[target]
        narrow = ops.multiply(x, pair.a, transpose_b=True)  # (T, rank)
        g_narrow = ops.multiply(g, pair.b, alpha=self._scale)
        _add(gradients[target].b, ops.multiply(g, narrow, transpose_a=True, alpha=self._scale))
        _add(gradients[target].a, ops.multiply(g_narrow, x, transpose_a=True))
        return ops.multiply(g_narrow, pair.a, plus=g_x)


def _add(total: Floats, part: Var) -> None:
    total += part.numpy()
