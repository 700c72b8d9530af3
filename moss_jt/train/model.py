"""One step over a model's weights, forwards and backwards: the loss of some samples, and the adapters' gradients.

The weights are walked over once in each direction however many samples there are: a block takes batch after batch before the
next block's turn. The walk turns at the head, so that what was read last is used first on the way back.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import DenseMatrix, Var
from moss_jt.kernels.training import TrainingOperators
from moss_jt.store.config import MossConfig
from moss_jt.train.batches import Batch, batches_of
from moss_jt.train.block import BlockTrainer, on_device
from moss_jt.train.lora import Adapter, Floats, Pair
from moss_jt.train.loss import Softmax, StepResult, predictions
from moss_jt.train.needs import LOSS_ROWS
from moss_jt.train.samples import TokenSample
from moss_jt.weights.weights import HeadSlab, Weights


class TrainingModel:
    """A frozen base with one adapter.

    keeps         what blocks compute is kept from the way there to the way back
    batch_tokens  a block takes whole samples of about so many tokens at once
    """

    def __init__(
        self,
        config: MossConfig,
        operators: TrainingOperators,
        weights: Weights,
        adapter: Adapter,
        batch_tokens: int,
        keeps: bool,
    ) -> None:
        self.config, self.adapter = config, adapter
        self._operators, self._weights = operators, weights
        self._batch_tokens, self._keeps = batch_tokens, keeps
        self._block = BlockTrainer(operators, adapter.scale)

    def step(self, samples: Sequence[TokenSample]) -> tuple[StepResult, Floats]:
        """The loss of these samples together, and the gradient of the adapter's values, laid out as they are.

        Raises:
            MossError: a weight cannot be read.
        """
        gradient = np.zeros_like(self.adapter.values)
        batches, token_ids = self._batches(samples)
        inputs = self._forward(batches, token_ids, self._keeps)
        result, g = self._loss(inputs[-1], samples, with_gradient=True)
        self._backward(batches, inputs, g, self.adapter.pairs_of(gradient))
        return result, gradient

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult:
        """The loss alone."""
        batches, token_ids = self._batches(samples)
        hidden = self._forward(batches, token_ids, keeps=False, only_last=True)[-1]
        return self._loss(hidden, samples, with_gradient=False)[0]

    def close(self) -> None:
        self._weights.close()

    def _batches(self, samples: Sequence[TokenSample]) -> tuple[list[Batch], NDArray[np.int32]]:
        token_ids = np.concatenate([sample.token_ids for sample in samples])
        return batches_of(samples, self._batch_tokens), token_ids

    def _forward(
        self, batches: list[Batch], token_ids: NDArray[np.int32], keeps: bool, only_last: bool = False
    ) -> list[Floats]:
        """The inputs of all blocks from the first with adapters on, each (T, C), and the last block's result."""
        h = self._weights.embedding_rows(token_ids.tolist()).astype(np.float32)
        inputs = []
        walk = self._weights.blocks() if only_last else self._weights.blocks_there(self.adapter.first_layer)
        for layer, weights in walk:
            adapters = on_device(self._of_layer(self.adapter.pairs, layer))
            trained = layer >= self.adapter.first_layer
            if trained and not only_last:
                inputs.append(h)
            result = np.empty_like(h)
            for batch in batches:
                var, kept = self._block.forward(jt.array(h[batch.rows]), weights, adapters, batch.spans)
                result[batch.rows] = var.numpy()
                if keeps and trained:
                    batch.kept[layer] = kept
            h = result
        return [*inputs, h]

    def _backward(
        self, batches: list[Batch], inputs: list[Floats], g: Floats, gradients: dict[tuple[int, str], Pair]
    ) -> None:
        first = self.adapter.first_layer
        for layer, weights in self._weights.blocks_back(first):
            adapters = on_device(self._of_layer(self.adapter.pairs, layer))
            own = self._of_layer(gradients, layer)
            for batch in batches:
                back = self._block.backward(
                    jt.array(g[batch.rows]),
                    jt.array(inputs[layer - first][batch.rows]),
                    weights,
                    adapters,
                    batch.spans,
                    own,
                    batch.kept.pop(layer, None),
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
                softmax.see(part, slab.first_row, self._logits(normed[part], slab.weight, slab.bias))
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
        for part in _slices(len(normed)):
            logits = self._logits(normed[part], slab.weight, slab.bias)
            slope = softmax.slope(part, slab.first_row, logits)
            g_normed[part] += self._operators.product_back(jt.array(slope), DenseMatrix(slab.weight)).numpy()

    def _logits(self, normed: Floats, weight: Var, bias: Var) -> Floats:
        logits: Floats = self._operators.product(jt.array(normed), DenseMatrix(weight)).numpy()
        logits += bias.numpy().astype(np.float32)
        return logits


def _slices(count: int) -> list[slice]:
    return [slice(begin, min(count, begin + LOSS_ROWS)) for begin in range(0, count, LOSS_ROWS)]


def _parts(h: Floats) -> list[Floats]:
    return [h[part] for part in _slices(len(h))]
