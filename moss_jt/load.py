"""A model folder becomes a model that computes. Importing this starts Jittor."""

from pathlib import Path

from moss_jt.kernels.cpu.operators import CpuOperators
from moss_jt.kv_cache import KVCache
from moss_jt.model import Model
from moss_jt.residency import ResidencyPlan
from moss_jt.store import Store
from moss_jt.warm_up import warm_up
from moss_jt.weight_stream import open_weights


def load_model(store: Store, plan: ResidencyPlan, home: Path) -> Model:
    """The store's model on the CPU, its weights where the plan says.

    Args:
        home: the folder where the disk's speed is remembered.

    Raises:
        MossError: the operators cannot be compiled, or a file cannot be read.
    """
    warm_up(store.bits)
    weights = open_weights(store, plan, home)
    cache = KVCache(store.config, plan.context)
    return Model(store.config, CpuOperators(store.config), weights, cache, plan.pass_tokens)
