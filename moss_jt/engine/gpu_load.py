"""A model folder becomes a model that computes on the GPU. Importing this starts Jittor and CuPy."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from moss_jt.backend.device import Offload
from moss_jt.backend.gpu_requirements import says_full
from moss_jt.backend.jittor import card_free_bytes, jt
from moss_jt.engine.gpu_model import FULL, GpuModel, full_card, raise_if_full
from moss_jt.engine.kv_cache import KVCache, cache_positions, device_memory
from moss_jt.engine.model import Model
from moss_jt.engine.warm_up import warm_up_gpu
from moss_jt.errors import MossError
from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.plan.placement import GpuPlanner, StartedCard, less_margin
from moss_jt.plan.residency import ResidencyPlan, gib
from moss_jt.store.model_folder import Store
from moss_jt.weights.disk_speed import reader_for
from moss_jt.weights.gpu_units import StreamedUnits, SwappedUnits, UnifiedUnits
from moss_jt.weights.shared_head import copy_weights
from moss_jt.weights.weights import Units, Weights

Loaded = TypeVar("Loaded")


def load_gpu_model(
    store: Store, planner: GpuPlanner, home: Path, offload: Offload, adapters: AdapterBank | None = None
) -> GpuModel:
    """See :func:`moss_jt.engine.load.load_model`. The plan is made anew with what CUDA takes on this card.

    A plan that turns out too large, because other programs use the card too, shrinks once to what is free.
    """
    return load_on_card(
        planner,
        lambda cupy: warm_up_gpu(cupy, store.bits, planner.cache_bits),
        lambda plan, cupy: _load(store, plan, home, offload, cupy, adapters),
    )


def load_on_card(
    planner: GpuPlanner,
    warm: Callable[[ModuleType], None],
    load: Callable[[ResidencyPlan, ModuleType], Loaded],
) -> Loaded:
    """What ``load`` makes of a plan, with what CUDA takes on this card once ``warm`` has compiled everything.

    Raises:
        MossError: the operators cannot be compiled, a file cannot be read, or the card is full.
    """
    cupy = import_cupy()
    try:
        warm(cupy)
    except FULL as error:
        raise_if_full(error)
        raise
    started = StartedCard(free_now(cupy), cuda_takes(cupy))
    plan = _plan_again(planner, started)
    try:
        return load(plan, cupy)
    except FULL as error:
        if not says_full(error):
            raise
    # Only here has the failed attempt let go of its memory: the error held on to it.
    free_bytes = less_margin(free_now(cupy) + started.taken_bytes)
    if free_bytes >= plan.budget_bytes:
        raise full_card(plan)
    smaller = _plan_again(planner, started, free_bytes)
    sys.stderr.write(
        f"moss-jt: the card has no room for {gib(plan.peak_bytes)}: another program uses it, too (nvidia-smi shows them). "
        f"Loading again with {gib(smaller.budget_bytes)}, of which {gib(smaller.bytes_on('device'))} are weights.\n"
    )
    try:
        return load(smaller, cupy)
    except FULL as error:
        raise_if_full(error, smaller)
        raise


def load_copy(store: Store, model: Model, plan: ResidencyPlan, home: Path) -> Model:
    """The copy that drafts for a model on the card, over its cache and with its operators; close it first.

    Raises:
        MossError: the operators cannot be compiled, a file cannot be read, or the card is full.
    """
    assert isinstance(model.weights, Weights)
    try:
        warm_up_gpu(import_cupy(), store.bits, plan.sizes.cache_bits)
        return model.with_weights(
            copy_weights(
                store,
                plan,
                model.weights,
                lambda blocks: StreamedUnits(store, blocks, reader_for(store, home)),
            )
        )
    except FULL as error:
        raise_if_full(error, plan)
        raise


@cache
def cuda_takes(cupy: Any) -> int:
    """Bytes of the card that CUDA, its libraries and the kernels' code take. Measured once, before this process loads a model."""
    return max(0, card_free_bytes - free_now(cupy))


def free_now(cupy: Any) -> int:
    """Bytes that are free on the card, once Jittor and CuPy have given back what they only keep for later."""
    jt.gc()
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    return int(free)


def import_cupy() -> ModuleType:
    """CuPy itself: that its package is there does not mean that it works.

    Raises:
        MossError: it does not; the message says why. The card may be full, too.
    """
    try:
        import cupy

        cupy.cuda.device.get_cublas_handle()  # its library is opened only now
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise_if_full(error)
        raise MossError(
            f"CuPy is installed and does not start ({error}). Its version must suit the CUDA toolkit: see moss-jt doctor."
        ) from error
    module: ModuleType = cupy
    return module


def _plan_again(planner: GpuPlanner, started: StartedCard, at_most: int | None = None) -> ResidencyPlan:
    try:
        return planner.plan_again(started, at_most)
    except MossError as error:
        raise MossError(
            f"{error} CUDA and its libraries, and perhaps other programs (nvidia-smi shows them), take "
            f"{gib(started.taken_bytes)} of this card; {gib(started.free_bytes)} are free."
        ) from error


def _load(
    store: Store,
    plan: ResidencyPlan,
    home: Path,
    offload: Offload,
    cupy: Any,
    adapters: AdapterBank | None,
) -> GpuModel:
    rank = 0 if adapters is None else adapters.most_rank
    results = CudaNeeds(store.config, store.bits, rank).workspace_bytes(plan.pass_tokens)
    # CuPy keeps freed memory for reuse: no more than the plan has for the results within a pass.
    cupy.get_default_memory_pool().set_limit(size=results)
    operators = CudaOperators(store.config, cupy, adapters)
    positions, bits = cache_positions(plan), plan.sizes.cache_bits
    cache = KVCache(store.config, positions, device_memory, operators, bits)
    weights = Weights(store, plan, _units(store, plan, home, offload))
    try:
        # Whether there is memory for the results is seen now, and not in the midst of an answer.
        cupy.cuda.runtime.free(cupy.cuda.runtime.malloc(results))
        return GpuModel(store.config, operators, weights, cache, plan)
    except BaseException:
        weights.close()
        raise


def _units(store: Store, plan: ResidencyPlan, home: Path, offload: Offload) -> Units:
    reader = reader_for(store, home)
    if offload == "swap":
        return SwappedUnits(store, plan, reader)
    return UnifiedUnits(store, plan, reader) if offload == "unified" else StreamedUnits(store, plan, reader)
