"""One step over a model's weights, forwards and backwards: the loss of some samples, and the adapters' gradients.

The weights are walked over once in each direction however many samples there are: a block takes batch after batch before the
next block's turn. The walk turns at the head, so that what was read last is used first on the way back.
"""

from collections.abc import Sequence

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import DenseMatrix, Var
from moss_jt.kernels.training import TrainingOperators
from moss_jt.store.config import MossConfig
from moss_jt.train.batches import Batch, batches_of
from moss_jt.train.block import BlockTrainer, on_device
from moss_jt.train.frozen_front import FrontRows, key_of
from moss_jt.train.kept_activations import Waiting
from moss_jt.train.lora import Adapter, Floats, Pair
from moss_jt.train.loss import Softmax, StepResult, predictions
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.step_memory import LOSS_ROWS
from moss_jt.weights.weights import HeadSlab, Weights


class TrainingModel:
    """A frozen base with one adapter.

    batch_tokens  a block takes whole samples of about so many tokens at once
    waiting       what blocks compute, from the way there to the way back
    front         what the blocks before the adapter's made of samples; None where that is not kept
    """

    def __init__(
        self,
        config: MossConfig,
        operators: TrainingOperators,
        weights: Weights,
        adapter: Adapter,
        batch_tokens: int,
        waiting: Waiting,
        front: FrontRows | None = None,
    ) -> None:
        self.config, self.adapter = config, adapter
        self._operators, self._weights = operators, weights
        self._batch_tokens, self._waiting, self._front = batch_tokens, waiting, front
        self._block = BlockTrainer(operators, adapter.scale)

    def step(self, samples: Sequence[TokenSample]) -> tuple[StepResult, Floats]:
        """The loss of these samples together, and the gradient of the adapter's values, laid out as they are.

        Raises:
            MossError: a weight cannot be read.
        """
        gradient = np.zeros_like(self.adapter.values)
        batches = self._batches(samples)
        self._waiting.clear()
        hidden = self._forward(batches, samples, with_gradient=True)
        result, g = self._loss(hidden, samples, with_gradient=True)
        del hidden
        self._backward(batches, g, self.adapter.pairs_of(gradient))
        return result, gradient

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult:
        """The loss alone."""
        hidden = self._forward(self._batches(samples), samples, with_gradient=False)
        return self._loss(hidden, samples, with_gradient=False)[0]

    def remove_front(self) -> None:
        """What is kept of samples will not be needed again."""
        if self._front is not None:
            self._front.remove()
            self._front = None

    def close(self) -> None:
        self._waiting.close()
        if self._front is not None:
            self._front.close()
        self._weights.close()

    def _batches(self, samples: Sequence[TokenSample]) -> list[Batch]:
        return batches_of(samples, self._batch_tokens)

    def _forward(self, batches: list[Batch], samples: Sequence[TokenSample], with_gradient: bool) -> Floats:
        """What the last block makes of the samples (T, C). What going backwards needs waits for it."""
        first = self.adapter.first_layer
        known = {} if self._front is None else self._front.find(samples)
        unknown = [sample for sample in samples if key_of(sample) not in known]
        begin = 0 if unknown else first
        h = self._embedded(unknown)
        now = self._batches(unknown)
        weights = self._weights
        walk = weights.blocks_there(first, begin) if with_gradient else weights.blocks(begin=begin)
        for layer, block in walk:
            if layer == first:
                h, now = self._joined(samples, known, unknown, h), batches
            adapters = on_device(self._of_layer(self.adapter.pairs, layer))
            result = np.empty_like(h)
            for number, batch in enumerate(now):
                var, kept = self._block.forward(jt.array(h[batch.rows]), block, adapters, batch.spans)
                result[batch.rows] = var.numpy()
                if with_gradient and layer >= first:
                    self._waiting.put(layer, number, h[batch.rows], kept)
            h = result
        return h

    def _embedded(self, samples: Sequence[TokenSample]) -> Floats:
        ids = [token for sample in samples for token in sample.token_ids.tolist()]
        return self._weights.embedding_rows(ids).astype(np.float32)

    def _joined(
        self,
        samples: Sequence[TokenSample],
        known: dict[str, Floats],
        unknown: Sequence[TokenSample],
        h: Floats,
    ) -> Floats:
        """The rows of all samples at the first block with adapters; those that were computed just now are kept."""
        if self._front is None:
            return h
        ends = np.cumsum([len(sample) for sample in unknown])[:-1]
        computed = dict(zip(map(key_of, unknown), np.split(h, ends), strict=True)) if unknown else {}
        self._front.keep(computed)
        rows = known | computed
        return np.concatenate([rows[key_of(sample)] for sample in samples])

    def _backward(self, batches: list[Batch], g: Floats, gradients: dict[tuple[int, str], Pair]) -> None:
        for layer, weights in self._weights.blocks_back(self.adapter.first_layer):
            adapters = on_device(self._of_layer(self.adapter.pairs, layer))
            own = self._of_layer(gradients, layer)
            for number, batch in enumerate(batches):
                h, kept = self._waiting.take(layer, number)
                back = self._block.backward(
                    jt.array(g[batch.rows]), jt.array(h), weights, adapters, batch.spans, own, kept
                )
                g[batch.rows] = back.numpy()

    @staticmethod
    def _of_layer(pairs: dict[tuple[int, str], Pair], layer: int) -> dict[str, Pair]:
        return {target: pair for (number, target), pair in pairs.items() if number == layer}

    def _loss(
        self, hidden: Floats, samples: Sequence[TokenSample], with_gradient: bool
    ) -> tuple[StepResult, Floats]:
        """hidden (T, C) -> the result, and the gradient of hidden (T, C), where it is wanted."""
        rows, wanted = predictions(samples)
        h = hidden[rows]
        norm_weight, norm_bias = self._weights.norm_weight, self._weights.norm_bias
        normed = np.concatenate(
            [self._operators.norm(jt.array(part), norm_weight, norm_bias).numpy() for part in _parts(h)]
        )
        softmax = Softmax(wanted)
        g_normed = np.zeros_like(normed)
        for slab in self._weights.head_slabs():
            for part in _slices(len(normed)):
                columns = softmax.columns(part, slab.first_row, slab.last_row - slab.first_row)
                logits = self._logits(normed[part], slab)
                softmax.see(
                    part, slab.first_row, columns, self._operators.logit_summary(logits, slab.bias, columns)
                )
            if with_gradient and slab.last_row == self.config.vocab_size:
                self._add_slopes(softmax, slab, normed, g_normed)
        result, g = softmax.result(), np.zeros_like(hidden)
        if with_gradient:
            for slab in self._weights.head_slabs_back():
                self._add_slopes(softmax, slab, normed, g_normed)
            for part in _slices(len(normed)):
                back, _ = self._operators.norm_back(jt.array(g_normed[part]), jt.array(h[part]), norm_weight)
                g[rows[part]] = back.numpy()
        return result, g

    def _add_slopes(self, softmax: Softmax, slab: HeadSlab, normed: Floats, g_normed: Floats) -> None:
        """What the loss depends on through this slab's logits, once all slabs have been seen."""
        ops = self._operators
        for part in _slices(len(normed)):
            columns = softmax.columns(part, slab.first_row, slab.last_row - slab.first_row)
            logits = self._logits(normed[part], slab)
            slope = ops.logit_slope(logits, slab.bias, columns, softmax.shift(part), softmax.share)
            g_normed[part] += ops.product_back(slope, DenseMatrix(slab.weight)).numpy()

    def _logits(self, normed: Floats, slab: HeadSlab) -> Var:
        """normed (R, C) -> (R, rows of the slab), without bias."""
        return self._operators.product(jt.array(normed), DenseMatrix(slab.weight))


def _slices(count: int) -> list[slice]:
    return [slice(begin, min(count, begin + LOSS_ROWS)) for begin in range(0, count, LOSS_ROWS)]


def _parts(h: Floats) -> list[Floats]:
    return [h[part] for part in _slices(len(h))]
