"""A model folder becomes a model that computes on the GPU. Importing this starts Jittor and CuPy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from moss_jt.causal_model import Rows
from moss_jt.config import MossConfig
from moss_jt.device import Offload
from moss_jt.disk_speed import disk_speed
from moss_jt.errors import MossError
from moss_jt.file_reader import FileReader
from moss_jt.gpu_units import GpuUnits, StreamedUnits, SwappedUnits, UnifiedUnits
from moss_jt.gpu_weights import GpuWeights
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kv_cache import KVCache, device_room
from moss_jt.model import Model, Weights
from moss_jt.residency import ResidencyPlan, gib
from moss_jt.store import Store
from moss_jt.warm_up import warm_up_gpu

# What CUDA, Jittor and CuPy say where memory on the card ran out.
OUT_OF_MEMORY = ("cudaerrormemoryallocation", "out of memory", "outofmemory")


class GpuModel(Model):
    """A model whose card may run out of memory at any pass: other programs use it, too."""

    def __init__(
        self, config: MossConfig, operators: Any, weights: Weights, cache: KVCache, plan: ResidencyPlan
    ) -> None:
        super().__init__(config, operators, weights, cache, plan.pass_tokens)
        self._plan = plan

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows = "last") -> np.ndarray:
        try:
            return super().forward(token_ids, start_pos, rows)
        except RuntimeError as error:
            raise_if_full(error, self._plan)
            raise


def load_gpu_model(store: Store, plan: ResidencyPlan, home: Path, offload: Offload) -> Model:
    """See :func:`moss_jt.load.load_model`."""
    try:
        warm_up_gpu(cupy, store.bits)
        # CuPy keeps freed memory for reuse: no more than the plan has for all results of a pass.
        cupy.get_default_memory_pool().set_limit(size=plan.workspace_bytes)
        cache = KVCache(store.config, plan.context, device_room)
        weights = GpuWeights(store, plan, _units(store, plan, home, offload))
    except RuntimeError as error:
        raise_if_full(error, plan)
        raise
    return GpuModel(store.config, CudaOperators(store.config, cupy), weights, cache, plan)


def _units(store: Store, plan: ResidencyPlan, home: Path, offload: Offload) -> GpuUnits:
    if offload == "swap":
        return SwappedUnits(store, plan)
    speed = disk_speed(max(store.blocks, key=lambda file: file.nbytes).path, home / "disk-speed.json")
    reader = FileReader(speed.prefer_direct, speed.best)
    return UnifiedUnits(store, plan, reader) if offload == "unified" else StreamedUnits(store, plan, reader)


def raise_if_full(error: RuntimeError, plan: ResidencyPlan) -> None:
    """Raises MossError where the error says that the card's memory is full."""
    if any(word in f"{type(error).__name__}: {error}".lower() for word in OUT_OF_MEMORY):
        raise MossError(
            f"the GPU's memory is full, although {gib(plan.budget_bytes)} were planned with: another program may use it "
            "(nvidia-smi shows them). Give --gpu-memory a smaller amount, or lower --context."
        ) from error
