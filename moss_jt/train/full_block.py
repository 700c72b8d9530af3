"""One block all of whose weights learn: the gradients of its tensors beside that of its input."""

from collections.abc import Iterator

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import BlockWeights, Var
from moss_jt.kernels.training import Spans, TrainingOperators
from moss_jt.train.block import BlockTrainer, Kept
from moss_jt.train.lora import Floats


class Gradients:
    """Gradients of some tensors, added up over batches; by the operators' names for them."""

    def __init__(self, operators: TrainingOperators) -> None:
        self._operators = operators
        self._totals: dict[str, Var] = {}

    def add(self, field: str, a: Var, b: Var) -> None:
        """a (T, N), b (T, K): a matrix's ``a.T @ b``."""
        total = self._totals.get(field)
        self._totals[field] = self._operators.multiply(a, b, transpose_a=True, plus=total)

    def add_sum(self, field: str, a: Var) -> None:
        """a (T, N): a vector's sum over all tokens."""
        self.add(field, jt.array(np.ones((a.shape[0], 1), np.float32)), a)

    def sync(self) -> None:
        """Compute all of it now, so that nothing else is kept for it."""
        jt.sync(list(self._totals.values()))

    def take(self) -> Iterator[tuple[str, Floats]]:
        """Each gradient, which is then let go."""
        for field in list(self._totals):
            gradient: Floats = self._totals.pop(field).numpy()
            yield field, gradient[0] if len(gradient) == 1 else gradient


class FullBlock(BlockTrainer):
    """A block without adapters; its weights are float32."""

    def __init__(self, operators: TrainingOperators) -> None:
        super().__init__(operators, 1.0)

    def there(self, h: Var, weights: BlockWeights, spans: Spans) -> tuple[Var, Kept]:
        """h (T, C) -> the block's result, and what may be kept for :meth:`back`."""
        return self.forward(h, weights, {}, spans)

    def back(
        self, g: Var, h: Var, weights: BlockWeights, spans: Spans, gradients: Gradients, kept: Kept | None
    ) -> Var:
        """g (T, C) of the block's result -> that of h; the weights' are added to ``gradients``."""
        ops = self._operators
        normed = ops.norm(h, weights.ln_1_weight, weights.ln_1_bias)
        kept = self._kept(normed, weights, {}) if kept is None else kept
        gradients.add_sum("fc_out_bias", g)
        gradients.add("fc_out", g, ops.gelu(kept.y, weights.fc_in_bias))
        g_y = ops.gelu_back(ops.product_back(g, weights.fc_out), kept.y, weights.fc_in_bias)
        gradients.add_sum("fc_in_bias", g_y)
        gradients.add("fc_in", g_y, normed)
        gradients.add("out", g, ops.attention(kept.qkv, spans))
        g_qkv = ops.attention_back(ops.product_back(g, weights.out), kept.qkv, spans)
        gradients.add("qkv", g_qkv, normed)
        g_normed = ops.product_back(g_y, weights.fc_in) + ops.product_back(g_qkv, weights.qkv)
        g_h, straight = ops.norm_back(g_normed, h, weights.ln_1_weight)
        gradients.add_sum("ln_1_bias", g_normed)
        gradients.add_sum("ln_1_weight", g_normed * straight)
        return g + g_h
