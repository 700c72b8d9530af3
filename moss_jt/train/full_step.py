"""One step of a model all of whose weights learn: forwards, and backwards with the update in the same walk.

A block's gradients exist while the walk is in that block, and no others (LOMO, arXiv 2306.09782). Where gradients are clipped,
the walk back is made twice: the first time for their length alone. Where there is memory for all gradients, they are gathered
instead: the bits are the same, it takes one walk, and what is interrupted before its end has changed nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import DenseMatrix, Var
from moss_jt.kernels.training import TrainingOperators
from moss_jt.store.architecture import full_name
from moss_jt.train.batches import batches_of
from moss_jt.train.full_block import FullBlock, Gradients
from moss_jt.train.fused_optimizers import FusedOptimizer
from moss_jt.train.lora import Floats
from moss_jt.train.loss import Softmax, StepResult, predictions
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.master_weights import EMBEDDING, Masters, block_name
from moss_jt.train.optimizer import check_finite, shortening, squares_of
from moss_jt.train.step_memory import LOSS_ROWS

Visit = Callable[[str, Floats], object]  # a tensor's name, and its gradient, which may be overwritten
NORM_WEIGHT, NORM_BIAS, HEAD_BIAS = map(full_name, ("ln_f.weight", "ln_f.bias", "lm_head.bias"))


class FullModel:
    """A model that learns as a whole.

    batch_tokens  a block takes whole samples of about so many tokens at once
    keeps         what blocks compute is kept from the way there to the way back
    gathers       all gradients exist at once, and the update begins when they are there
    clip          the longest gradient; infinite for any. Optimizers that normalise need none.
    """

    def __init__(
        self,
        masters: Masters,
        operators: TrainingOperators,
        optimizer: FusedOptimizer,
        batch_tokens: int,
        keeps: bool,
        gathers: bool,
        clip: float,
    ) -> None:
        self.masters, self.optimizer = masters, optimizer
        self._operators, self._block = operators, FullBlock(operators)
        self._batch_tokens, self._keeps, self._gathers, self._clip = batch_tokens, keeps, gathers, clip

    def step(
        self,
        samples: Sequence[TokenSample],
        rate: float,
        number: int,
        before_update: Callable[[], object] = lambda: None,
    ) -> StepResult:
        """Learn from these samples; ``number`` counts steps from 1. The result is of the weights before it. ``before_update`` is
        called when the first of them is about to change.

        Raises:
            MossError: the loss or the gradient's length is no number any more; nothing has learned from it.
        """
        walk = _Walk(self, samples, with_gradient=True)
        check_finite(walk.result.loss, "the loss")  # before anything is changed
        clipped = not self.optimizer.normalises and math.isfinite(self._clip)
        gathered: dict[str, Floats] = {}
        squares: list[float] = []

        def look(name: str, gradient: Floats) -> None:
            if clipped:
                squares.append(squares_of(gradient))
            if self._gathers:
                gathered[name] = gradient

        if clipped or self._gathers:
            walk.back(look)
        factor = shortening(math.sqrt(sum(squares)), self._clip) if clipped else 1.0

        def update(name: str, gradient: Floats) -> None:
            if factor < 1:
                gradient *= np.float32(factor)
            self.optimizer.update(name, gradient, rate, number)

        before_update()
        if self._gathers:
            for name, gradient in gathered.items():
                update(name, gradient)
        else:
            walk.back(update)
        return walk.result

    def gradients(self, samples: Sequence[TokenSample]) -> tuple[StepResult, dict[str, Floats]]:
        """The loss, and every gradient by its tensor's name, all at once: for tests and for curiosity."""
        gradients: dict[str, Floats] = {}
        walk = _Walk(self, samples, with_gradient=True)
        walk.back(lambda name, gradient: gradients.update({name: gradient.copy()}))
        return walk.result, gradients

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult:
        """The loss alone."""
        return _Walk(self, samples, with_gradient=False).result


class _Walk:
    """The way of some samples through the model, from where it can be walked back.

    result  the loss and what belongs to it
    """

    def __init__(self, model: FullModel, samples: Sequence[TokenSample], with_gradient: bool) -> None:
        self._model, self._masters, self._operators = model, model.masters, model._operators
        self._token_ids = np.concatenate([sample.token_ids for sample in samples])
        self._batches = batches_of(samples, model._batch_tokens)
        self._inputs: list[Floats] = []
        self._head = Gradients(self._operators)
        h = self._there(with_gradient)
        self.result, self._g = self._loss(h, samples, with_gradient)
        self._head_gradients = dict(self._head.take())

    def _there(self, with_gradient: bool) -> Floats:
        """(T, C) after all blocks."""
        h = self._masters.tensors[EMBEDDING][self._token_ids]
        for layer in range(self._masters.config.n_layer):
            weights = self._masters.block(layer, jt.reuse_np_array)
            if with_gradient:
                self._inputs.append(h)
            result = np.empty_like(h)
            for batch in self._batches:
                var, kept = self._model._block.there(jt.array(h[batch.rows]), weights, batch.spans)
                result[batch.rows] = var.numpy()
                if with_gradient and self._model._keeps:
                    batch.kept[layer] = kept
            h = result
        return h

    def _loss(
        self, h: Floats, samples: Sequence[TokenSample], with_gradient: bool
    ) -> tuple[StepResult, Floats]:
        """h (T, C) -> the result, and its gradient (T, C), where it is wanted."""
        ops, head = self._operators, self._head
        rows, wanted = predictions(samples)
        matrix = DenseMatrix(self._var(self._masters.head))
        norm_weight, norm_bias, bias = map(self._var, (NORM_WEIGHT, NORM_BIAS, HEAD_BIAS))
        softmax, g = Softmax(wanted), np.zeros_like(h)
        for begin in range(0, len(rows), LOSS_ROWS):
            part = slice(begin, begin + LOSS_ROWS)
            last = jt.array(h[rows[part]])
            normed = ops.norm(last, norm_weight, norm_bias)
            logits = ops.product(normed, matrix)
            columns = softmax.columns(part, 0, len(self._tensor(self._masters.head)))
            softmax.see(part, 0, columns, ops.logit_summary(logits, bias, columns))
            if not with_gradient:
                continue
            slope = ops.logit_slope(logits, bias, columns, softmax.shift(part), softmax.share)
            g_normed = ops.product_back(slope, matrix)
            back, straight = ops.norm_back(g_normed, last, norm_weight)
            head.add(self._masters.head, slope, normed)
            head.add_sum(HEAD_BIAS, slope)
            head.add_sum(NORM_BIAS, g_normed)
            head.add_sum(NORM_WEIGHT, g_normed * straight)
            g[rows[part]] = back.numpy()
            head.sync()
        return softmax.result(), g

    def back(self, visit: Visit) -> None:
        """Every tensor's gradient, as soon as it is there; nothing that comes later needs that tensor."""
        g = self._g.copy()
        for name, gradient in self._head_gradients.items():
            if name != EMBEDDING:
                visit(name, gradient)
        for layer in reversed(range(self._masters.config.n_layer)):
            for field, gradient in self._back_through(layer, g):
                visit(block_name(layer, field), gradient)
        embedding = sums_by_row(self._token_ids, g, self._masters.config.vocab_size)
        if self._masters.tied:
            embedding += self._head_gradients[EMBEDDING]
        visit(EMBEDDING, embedding)

    def _back_through(self, layer: int, g: Floats) -> Iterator[tuple[str, Floats]]:
        """g (T, C) of a block's result becomes that of its input."""
        weights, gradients = self._masters.block(layer, jt.reuse_np_array), Gradients(self._operators)
        for batch in self._batches:
            given = jt.array(g[batch.rows]), jt.array(self._inputs[layer][batch.rows])
            kept = batch.kept.get(layer)
            g[batch.rows] = self._model._block.back(*given, weights, batch.spans, gradients, kept).numpy()
            gradients.sync()
        return gradients.take()

    def _tensor(self, name: str) -> Floats:
        return self._masters.tensors[name]

    def _var(self, name: str) -> Var:
        return jt.reuse_np_array(self._tensor(name))


def sums_by_row(rows: NDArray[np.int32], values: Floats, count: int) -> Floats:
    """values (T, C) added up by their row, (count, C), each in the order in which they come."""
    order = np.argsort(rows, kind="stable")
    chosen, firsts = np.unique(rows[order], return_index=True)
    sums = np.zeros((count, values.shape[1]), np.float32)
    sums[chosen] = np.add.reduceat(values[order], firsts, axis=0)
    return sums
