"""A model folder becomes a model that learns on a card. Importing this starts Jittor and CuPy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.engine.gpu_load import load_on_card
from moss_jt.engine.gpu_model import FULL, raise_if_full
from moss_jt.engine.warm_up import TINY, WIDTH, announced_on_card, on_card, tiny_block
from moss_jt.kernels.cuda.training import CudaTrainingOperators
from moss_jt.plan.placement import GpuPlanner
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.train.block import BlockTrainer
from moss_jt.train.frozen_front import FrontRows
from moss_jt.train.kept_activations import Waiting
from moss_jt.train.lora import Adapter, Floats
from moss_jt.train.loss import StepResult
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.model import TrainingModel
from moss_jt.train.step_memory import CardNeeds
from moss_jt.weights.disk_speed import reader_for
from moss_jt.weights.gpu_units import StreamedUnits
from moss_jt.weights.weights import Weights


class CardTrainingModel(TrainingModel):
    """On a card, whose memory may be full at any step: other programs use it, too. ``plan`` is of its weights."""

    def __init__(
        self,
        operators: CudaTrainingOperators,
        weights: Weights,
        adapter: Adapter,
        batch_tokens: int,
        waiting: Waiting,
        front: FrontRows | None,
        plan: ResidencyPlan,
    ) -> None:
        super().__init__(operators.config, operators, weights, adapter, batch_tokens, waiting, front)
        self.plan = plan
        self._on_card = operators

    def step(self, samples: Sequence[TokenSample]) -> tuple[StepResult, Floats]:
        with self._told_if_full():
            return super().step(samples)

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult:
        with self._told_if_full():
            return super().evaluate(samples)

    def close(self) -> None:
        super().close()
        self._on_card.close()

    @contextmanager
    def _told_if_full(self) -> Iterator[None]:
        self._on_card.begin()
        try:
            yield
        except FULL as error:
            raise_if_full(error, self.plan)
            raise


def load_training_on_card(
    store: Store,
    planner: GpuPlanner,
    home: Path,
    adapter: Adapter,
    needs: CardNeeds,
    folder: Path,
    front: FrontRows | None = None,
) -> CardTrainingModel:
    """The store's model on the card that Jittor computes on, its weights where the planner says, once CUDA has started.

    Args:
        home: the folder where the disk's speed is remembered.
        needs: with which it was planned.
        folder: where a file of what waits for the way back may be.
        front: see TrainingModel.

    Raises:
        MossError: the operators cannot be compiled, a file cannot be read, or the card or the host has no room.
    """

    def load(plan: ResidencyPlan, cupy: Any) -> CardTrainingModel:
        # CuPy keeps freed memory for reuse: no more than the plan has for the results within an operation.
        cupy.get_default_memory_pool().set_limit(size=needs.pool_bytes)
        operators = CudaTrainingOperators(store.config, cupy)
        weights = Weights(store, plan, StreamedUnits(store, plan, reader_for(store, home)))
        try:
            # Whether there is memory for the results is seen now, and not in the midst of a step.
            cupy.cuda.runtime.free(cupy.cuda.runtime.malloc(needs.workspace_bytes(1)))
        except BaseException:
            weights.close()
            raise
        waiting = Waiting(needs.training.keeping, store.config.n_layer, folder)
        return CardTrainingModel(
            operators, weights, adapter, needs.training.batch_tokens, waiting, front, plan
        )

    return load_on_card(planner, lambda cupy: _warm_up(cupy, store.bits), load)


def _warm_up(cupy: Any, bits: int) -> None:
    """Compile our kernels, and Jittor's operation for copies: milliseconds once that was done before."""

    def run() -> None:
        block = BlockTrainer(CudaTrainingOperators(TINY, cupy), 1.0)
        weights, spans = tiny_block(bits, on_card()), np.array([[0, 2]], np.int32)
        h = jt.array(np.zeros((2, WIDTH), np.float32))
        result, kept = block.forward(h, weights, {}, spans)
        block.backward(result, h, weights, {}, spans, {}, kept).sync()

    announced_on_card(run, f"{cupy.__version__} {bits} training")
