"""The model over a GPU's operators and weights, whose card may be full at any pass: other programs use it, too."""

from collections.abc import Callable, Sequence

import numpy as np

from moss_jt.backend.gpu_requirements import says_full
from moss_jt.engine.causal_model import TokenRun
from moss_jt.engine.kv_cache import KVCache
from moss_jt.engine.model import Model, Weights
from moss_jt.errors import MossError
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.needs import logit_rows
from moss_jt.plan.residency import ResidencyPlan, gib
from moss_jt.store.config import MossConfig

FULL = (RuntimeError, MemoryError)  # in which Jittor, CUDA and CuPy say that the card's memory is full


class GpuModel(Model):
    """See :class:`moss_jt.engine.model.Model`."""

    operators: CudaOperators

    def __init__(
        self,
        config: MossConfig,
        operators: CudaOperators,
        weights: Weights,
        cache: KVCache,
        plan: ResidencyPlan,
    ) -> None:
        limits = plan.pass_tokens, logit_rows(plan.parallel), plan.context
        super().__init__(config, operators, weights, cache, *limits)
        self.plan = plan

    def with_weights(self, weights: Weights) -> "GpuModel":
        return GpuModel(self.config, self.operators, weights, self._cache, self.plan)

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        try:
            return super().forward_many(runs, wanted)
        except FULL as error:
            raise_if_full(error, self.plan)
            raise

    def close(self) -> None:
        super().close()
        self.operators.free()


def raise_if_full(error: BaseException, plan: ResidencyPlan | None = None) -> None:
    """Raises MossError where the error says that the card's memory is full."""
    if says_full(error):
        raise full_card(plan) from error


def full_card(plan: ResidencyPlan | None) -> MossError:
    planned = f", although {gib(plan.budget_bytes)} were planned with" if plan else ""
    return MossError(
        f"the GPU's memory is full{planned}: another program may use it "
        "(nvidia-smi shows them). Give --gpu-memory a smaller amount, or lower --context."
    )
