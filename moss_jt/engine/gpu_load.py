"""A model folder becomes a model that computes on the GPU. Importing this starts Jittor and CuPy."""

from pathlib import Path
from types import ModuleType

from moss_jt.backend.device import Offload
from moss_jt.backend.jittor import jt
from moss_jt.engine.gpu_model import GpuModel, raise_if_full
from moss_jt.engine.kv_cache import KVCache, device_room
from moss_jt.engine.model import Model
from moss_jt.engine.warm_up import warm_up_gpu
from moss_jt.errors import MossError
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.weights.disk_speed import reader_for
from moss_jt.weights.gpu_units import StreamedUnits, SwappedUnits, UnifiedUnits
from moss_jt.weights.weights import Units, Weights


def load_gpu_model(store: Store, plan: ResidencyPlan, home: Path, offload: Offload) -> Model:
    """See :func:`moss_jt.engine.load.load_model`."""
    cupy = import_cupy()
    try:
        warm_up_gpu(cupy, store.bits)
        # CuPy keeps freed memory for reuse: no more than the plan has for the results within a pass.
        needs = CudaNeeds(store.config, store.bits)
        cupy.get_default_memory_pool().set_limit(size=needs.workspace_bytes(plan.pass_tokens))
        cache = KVCache(store.config, plan.context, device_room)
        weights = Weights(store, plan, _units(store, plan, home, offload))
        return GpuModel(store.config, CudaOperators(store.config, cupy), weights, cache, plan)
    except BaseException as error:
        jt.gc()  # a second try finds the memory free
        raise_if_full(error, plan)
        raise


def import_cupy() -> ModuleType:
    """CuPy itself: that its package is there does not mean that it works.

    Raises:
        MossError: it does not; the message says why.
    """
    try:
        import cupy

        cupy.cuda.device.get_cublas_handle()  # its library is opened only now
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise MossError(
            f"CuPy is installed and does not start ({error}). Its version must suit the CUDA toolkit: see moss-jt doctor."
        ) from error
    module: ModuleType = cupy
    return module


def _units(store: Store, plan: ResidencyPlan, home: Path, offload: Offload) -> Units:
    if offload == "swap":
        return SwappedUnits(store, plan)
    reader = reader_for(store, home)
    return UnifiedUnits(store, plan, reader) if offload == "unified" else StreamedUnits(store, plan, reader)
