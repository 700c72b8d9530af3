"""A model folder becomes a model that computes. Importing this starts Jittor."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moss_jt.engine.causal_model import TokenRun
from moss_jt.engine.kv_cache import KVCache, cache_positions
from moss_jt.engine.model import Model
from moss_jt.engine.warm_up import warm_up
from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.cpu.operators import CpuOperators
from moss_jt.kernels.needs import logit_rows
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.weights.cpu_units import CpuUnits, open_copy_weights
from moss_jt.weights.host_units import HostUnits
from moss_jt.weights.swap import SwappedTensors, swap_errors, swap_folder
from moss_jt.weights.weights import Weights


class SwappedModel(Model):
    """A model whose weights Jittor swaps: its disk may be full at any pass."""

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        with swap_errors(swap_folder()):
            return super().forward_many(runs, wanted)


def load_model(
    store: Store, plan: ResidencyPlan, host: HostUnits | None, adapters: AdapterBank | None = None
) -> Model:
    """The store's model on the CPU, its weights where the plan says, or in Jittor's care.

    Args:
        host: holds the weights, and is closed with the model; None where Jittor swaps them.
        adapters: that sequences may have.

    Raises:
        MossError: the operators cannot be compiled, or a file cannot be read.
    """
    cache_bits = plan.sizes.cache_bits
    warm_up(store.bits, cache_bits, weights_move=host is None)
    operators = CpuOperators(store.config, adapters=adapters, weights_move=host is None)
    cache = KVCache(store.config, cache_positions(plan), bits=cache_bits)
    limits = plan.pass_tokens, logit_rows(plan.parallel), plan.context
    if host is None:
        swapped = Weights(store, plan, SwappedTensors(store, plan))
        return SwappedModel(store.config, operators, swapped, cache, *limits)
    return Model(store.config, operators, Weights(store, plan, CpuUnits(host)), cache, *limits)


def load_copy(store: Store, model: Model, plan: ResidencyPlan, home: Path, host: HostUnits) -> Model:
    """The copy that drafts for a model on the CPU, over its cache and with its operators; close it first.

    Args:
        home: the folder where the disk's speed is remembered.
        host: holds the model's weights, which are read first.

    Raises:
        MossError: the operators cannot be compiled, or a file cannot be read.
    """
    warm_up(store.bits, plan.sizes.cache_bits)
    assert isinstance(model.weights, Weights)
    weights = open_copy_weights(store, plan, home, model.weights, host)
    return model.with_weights(weights)
